"""From an article to the ids that a model reads, and from the ids that it writes to a title.

Training and inference both come here, and only here: the prompt of inference is a prefix of the
training ids by construction, because both are the same list. Ids are put together in pieces and
never cut out of a tokenized whole, so that no tokenizer can merge across a border:

    [bos] + prefix + article (cut to the budget) + suffix   |   title + eos
    `------------------ prompt, no loss -----------------'      `- loss -'

(With `--prompt_loss_weight`, some of the article's ids carry a little of the loss as well.)
"""

import functools
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from exit_codes import UserError
from libraries import quick_imports
from run_folder import CHAT_TEMPLATE, OWN_FILES_ONLY, TOKENIZER_FILES, first_line

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
ARTICLE = "{article}"
PROBE = "L'Élysée, cœur « évacué »\u00a0: 3,5 % d’œuvres à Nîmes — où ? Ça, 1 200 €."
# Some chat formats tell the date: today's would make another prompt of them every day.
SAME_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
TOGETHER = 128  # texts tokenized at a time: the tokenizer's objects take several times their ids
ATTEMPTS = 8  # to break what a tokenizer puts together again
BRACKETED = re.compile(r"<\|[^|<>\s]+\|>|<<?/?\w+>>?|\[/?[A-Z_]+\]")  # <|user|> <<SYS>> [/INST]


def read_template(path: str) -> str:
    """Return the text of a prompt file, without the newline that editors put at its end.

    Raises:
        UserError: there is no such file, or it does not hold `{article}` exactly once.
    """
    try:
        template = Path(path).read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, f"no readable prompt ({error})", "give a file of prompts/") from None
    if template.count(ARTICLE) != 1:
        raise UserError(
            path,
            f"{ARTICLE} stands there {template.count(ARTICLE)} times",
            "write it once, where the article goes",
        )
    return template


@dataclass(frozen=True)
class Example:
    """The ids of one article and, in training, of its title."""

    ids: list[int]
    num_prompt_ids: int  # the first so many carry no loss, unless they are in `article_labels`
    article_cut: bool
    title_cut: bool = False
    article: range = range(0)  # where its ids are
    article_labels: tuple[int, ...] = ()  # which of them carry loss all the same,
    article_weight: float = 0.0  # and how much each, where an id of the title carries 1

    @property
    def num_title_ids(self) -> int:
        return len(self.ids) - self.num_prompt_ids


@dataclass(frozen=True)
class Ends:
    """What ends a title: EOS or another end of turn, or the end of its line.

    Args:
        ids: of EOS and the other ends of turn.
        pad_id: what rows of a batch are filled up with.
        kinds: of each id of the vocabulary, what it holds: TEXT, BREAK and BREAK_AFTER_TEXT.
    """

    ids: frozenset[int]
    pad_id: int
    kinds: bytes

    TEXT, BREAK, BREAK_AFTER_TEXT = 1, 2, 4

    def cut(self, new_ids: list[int]) -> list[int]:
        """Return what was written up to the first end, that included."""
        has_text = False
        for n, token in enumerate(new_ids):
            kind = self.kinds[token] if token < len(self.kinds) else 0
            breaks = kind & self.BREAK_AFTER_TEXT or (has_text and kind & self.BREAK)
            if token in self.ids or breaks:
                return new_ids[: n + 1]
            has_text = has_text or bool(kind & self.TEXT)
        return new_ids

    def ended(self, cut_ids: list[int]) -> bool:
        """Return whether what `cut` returned has come to an end."""
        # With an end appended, `cut` returns it unchanged only if it had ended before.
        return cut_ids[-1] in self.ids or self.cut([*cut_ids, *self.ids]) == cut_ids


class Prompt:
    """A template bound to a tokenizer and to lengths, all counted in ids.

    Args:
        tokenizer: any tokenizer of transformers that knows an EOS.
        template: text with `{article}` in it.
        apply_chat_template: send the template as the user's turn of the model's own chat format.
        max_length: of a training row: prompt, title and EOS together.
        max_title_tokens: kept free for title and EOS, in inference too, so that an article is cut
            at the same place in both.

    Raises:
        UserError: the template alone fills `max_length`, a title has no room even for its EOS, or
            the model has no chat format.
    """

    def __init__(
        self,
        tokenizer,
        template: str,
        apply_chat_template: bool = False,
        max_length: int = 1024,
        max_title_tokens: int = 128,
    ):
        self.tokenizer, self.template = tokenizer, template
        self.apply_chat_template = apply_chat_template
        self.max_length, self.max_title_tokens = max_length, max_title_tokens
        rendered = _render_chat(tokenizer, template) if apply_chat_template else template
        prefix, _, suffix = rendered.partition(ARTICLE)
        # A chat format writes its own BOS; elsewhere we follow what the tokenizer does itself.
        starts_with_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        bos = [tokenizer.bos_token_id] if starts_with_bos and not apply_chat_template else []
        self.markers = _markers(tokenizer, rendered, suffix)
        control = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        # What a vocabulary has no id for is no control token, unless it shares one's id.
        self.unknown_ids = {tokenizer.unk_token_id} - ends
        self.control_ids = (control | {*tokenizer.all_special_ids}) - self.unknown_ids

        # A space belongs to the word that it opens, as in the text that the model has read:
        # SentencePiece puts one before every piece itself, byte-level tokenizers need it said.
        opens_with_space = tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith("▁")
        say_space = "" if opens_with_space else " "
        self.before_article = say_space if prefix.endswith(" ") else ""
        self.before_title = "" if rendered[-1].isspace() else say_space
        self.prefix_ids = self._ids(prefix.removesuffix(" "), trusted=True)
        if self.prefix_ids[:1] != bos:  # a template may spell it out
            self.prefix_ids = bos + self.prefix_ids
        self.suffix_ids = self._ids(suffix, trusted=True)
        # So many ids at the end of a text cut by characters may differ from the whole text's: half
        # a token has at most as many ids as characters, and some before it may change too.
        self.margin = max(map(len, tokenizer.get_vocab())) + 128
        fixed = len(self.prefix_ids) + len(self.suffix_ids)
        self.article_budget = max_length - max_title_tokens - fixed
        if max_title_tokens < 1:
            raise UserError(
                f"--max_title_tokens {max_title_tokens}", "a title ends in an EOS", "raise it"
            )
        if self.article_budget <= 0:
            raise UserError(
                "prompt",
                f"its {fixed} tokens and {max_title_tokens} for the title leave no room for an "
                f"article in {max_length}",
                "shorten the prompt or raise --max_length",
            )

    def encode(self, article: str, title: str | None = None) -> Example:
        """Return the ids to continue (no `title`), or those to train on, which begin with them.

        Only the article is ever cut, at its end: leads carry the news. A title that does not fit
        into `max_title_tokens` is cut too, but still ends in EOS.
        """
        return self.encode_all([article], None if title is None else [title])[0]

    def encode_all(self, articles: list[str], titles: list[str] | None = None) -> list[Example]:
        """Return what `encode` does, of many: fast tokenizers read them on all cores at once."""
        many = self._data_ids(articles, self.article_budget, self.before_article)
        if titles is None:
            return [self._example(ids) for ids in many]
        ends = self._data_ids(titles, self.max_title_tokens - 1, self.before_title)
        return [self._example(*pair) for pair in zip(many, ends, strict=True)]

    def _example(self, article_ids: list[int], title_ids: list[int] | None = None) -> Example:
        article_cut = len(article_ids) > self.article_budget
        prompt_ids = self.prefix_ids + article_ids[: self.article_budget] + self.suffix_ids
        where = range(len(self.prefix_ids), len(prompt_ids) - len(self.suffix_ids))
        if title_ids is None:
            return Example(prompt_ids, len(prompt_ids), article_cut, article=where)
        title_cut = len(title_ids) > self.max_title_tokens - 1
        title_ids = [*title_ids[: self.max_title_tokens - 1], self.tokenizer.eos_token_id]
        return Example(prompt_ids + title_ids, len(prompt_ids), article_cut, title_cut, where)

    def decode(self, new_ids: list[int]) -> str:
        """Return the title in the ids that a model wrote after a prompt: their first line, without
        markers at its beginning, up to the next one."""
        text = self.tokenizer.decode(
            new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        line = " ".join(text.strip().split("\n", 1)[0].split())
        # No title holds control characters; files of titles may not, and terminals obey them.
        line = "".join(c for c in line if unicodedata.category(c) != "Cc").strip()
        return next((part.strip() for part in self.markers.split(line) if part.strip()), "")

    def ends(self, generation_config) -> Ends:
        """Return what ends a title of a model with this generation config, or None of it."""
        ids = frozenset(end_ids(self.tokenizer, generation_config))
        return Ends(ids, self.tokenizer.eos_token_id, self._kinds)

    @functools.cached_property
    def _kinds(self) -> bytes:
        """The `Ends.kinds` of the tokenizer. Half a character alone is taken for no text: a title
        that begins with one then ends a line later than it could, and is the same."""
        singles = [[token] for token in range(len(self.tokenizer))]
        texts = self.tokenizer.batch_decode(
            singles, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return bytes(
            Ends.TEXT * bool(text.strip().strip("\ufffd"))
            | Ends.BREAK * ("\n" in text)
            | Ends.BREAK_AFTER_TEXT * ("\n" in text.lstrip())
            for text in texts
        )

    def settings(self) -> dict:
        """Return all that makes this prompt, as it is saved with a run, and a hash of its ids.

        The hash tells a tokenizer, or a version of transformers, that makes other ids of it.
        """
        ids = [self.prefix_ids, self.suffix_ids, self.encode(PROBE, PROBE).ids]
        return {
            "template": self.template,
            "apply_chat_template": self.apply_chat_template,
            "max_length": self.max_length,
            "max_title_tokens": self.max_title_tokens,
            "ids_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
        }

    def _ids(self, text: str | list[str], trusted: bool = False) -> list:
        # The text of a control token is a control token in the template, and plain text in data.
        return self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=not trusted,
            return_attention_mask=False,
            verbose=False,
        ).input_ids

    def _data_ids(self, texts: list[str], wanted: int, before: str = "") -> list[list[int]]:
        """Return the ids of data, the `wanted` first, and one more of a text that has more.

        Only the head of a long text is tokenized: a page of 10 MB would take its time, and most
        of it is cut off anyway.
        """
        found, characters = [], 8 * (wanted + self.margin)
        for start in range(0, len(texts), TOGETHER):
            some = texts[start : start + TOGETHER]
            for text, ids in zip(some, self._heads_ids(some, characters, before), strict=True):
                size = characters
                while size < len(text) and len(ids) <= wanted + self.margin:
                    size *= 4
                    [ids] = self._heads_ids([text], size, before)
                found.append(ids[: wanted + 1])
        return found

    def _heads_ids(self, texts: list[str], characters: int, before: str) -> list[list[int]]:
        lines = [self._one_line(text[:characters]) for text in texts]
        many = self._ids([before + line if line else "" for line in lines])
        return [self._harmless(ids, before) for ids in many]

    def _harmless(self, ids: list[int], before: str) -> list[int]:
        """Return the ids of data once no marker is in what they read as.

        A tokenizer may make one of what is none, such as ［ＩＮＳＴ］ under NFKC: what counts is
        the text that the model then sees.
        """
        for attempt in range(ATTEMPTS):
            known = [token for token in ids if token not in self.unknown_ids]
            shown = self.tokenizer.decode(known, clean_up_tokenization_spaces=False)
            harmless = "\n" not in shown and not self.markers.search(shown)
            if harmless and self.control_ids.isdisjoint(known):
                return ids
            line = self._one_line(shown)
            if attempt >= ATTEMPTS // 2:  # broken ones have grown together: letters are left
                line = " ".join(re.findall(r"\w+", line))
            ids = self._ids(before + line if line else "")
        return [token for token in ids if token not in self.control_ids]

    def _one_line(self, text: str) -> str:
        """Make data harmless: one line, so that it cannot begin a line of the template (such as
        "Titre :"), and each marker broken by a space after its first character."""
        text = " ".join(text.split())
        while self.markers.search(text):  # breaking one may leave another that overlapped with it
            text = self.markers.sub(_broken, text)
        return text


def end_ids(tokenizer, generation_config) -> set[int]:
    """Return the ids that end a title: EOS, and a chat model's own ends of turn."""
    own = getattr(generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return {tokenizer.eos_token_id, *own} - {None}


def prompt_of_run(tokenizer, settings: dict, where: str) -> Prompt:
    """Return the prompt that a run was trained with, from its `Prompt.settings()`.

    Raises:
        UserError: this tokenizer makes other ids of it than the one that was trained with.
    """
    arguments = {key: value for key, value in settings.items() if key != "ids_sha256"}
    prompt = Prompt(tokenizer, **arguments)
    if prompt.settings() != settings:
        raise UserError(
            where,
            "its prompt has other ids with this tokenizer than it had in training",
            "use the tokenizer and the version of transformers named in run_config.json",
        )
    return prompt


def load_tokenizer(folder: str):
    """Return the tokenizer of a model or run folder once it is known to keep French intact.

    It is loaded before the libraries of a model are imported: what is wrong with it, or with the
    length of a prompt, is then told in half the time.
    """
    known = set(TOKENIZER_FILES) - {"special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE}
    if not any(Path(folder, name).is_file() for name in known):
        raise UserError(folder, "no tokenizer in this folder", "add its files")
    with quick_imports():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **OWN_FILES_ONLY)
    except Exception as error:  # a class that does not fit its files may fail in any way
        raise UserError(
            folder, f"no usable tokenizer ({first_line(error)})", "add its files"
        ) from None
    check_tokenizer(tokenizer, folder)
    # The chat format in use is all that a run needs, and the names of others are those of files.
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    return tokenizer


def check_tokenizer(tokenizer, name: str) -> None:
    """Refuse a tokenizer that loses French, or that ignores parts of its own tokenizer.json.

    transformers 5 rebuilds some tokenizers from their vocabulary; where the class named in
    tokenizer_config.json does not fit the file, spaces or accents silently disappear.

    Raises:
        UserError: a French sentence does not survive encoding and decoding, the ids differ from
            those of the tokenizer.json in the same folder, or there is no EOS.
    """
    try:
        ids = tokenizer(PROBE, add_special_tokens=False).input_ids
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    except Exception as error:  # tokenizers raises no kind of its own
        decoded = f"an error, {error}"
    if decoded.strip() != PROBE:
        raise UserError(
            name,
            f"its tokenizer turns {PROBE!r} into {decoded!r}",
            "check tokenizer_class in tokenizer_config.json, or use another model",
        )
    file = Path(name, "tokenizer.json")
    if file.is_file():
        from tokenizers import Tokenizer

        raw = Tokenizer.from_file(str(file))
        raw.no_truncation()  # some models are saved with that of their training
        raw.no_padding()
        if raw.encode(PROBE, add_special_tokens=False).ids != ids:
            raise UserError(
                name,
                "transformers and tokenizer.json disagree on the ids of a French sentence",
                "check tokenizer_class in tokenizer_config.json",
            )
    if tokenizer.eos_token_id is None:
        raise UserError(name, "its tokenizer has no EOS token", "use another model")


def _markers(tokenizer, rendered: str, suffix: str) -> re.Pattern:
    """Return what the text of data must not hold, lest it look like a turn or a control token."""
    markers = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        # Words may be added to a vocabulary too, and are no control tokens.
        if token.special or token.content.lstrip()[:1] in tuple("<[{|"):
            markers.add(token.content)
    markers |= set(BRACKETED.findall(rendered))
    after_article = suffix.split("\n", 1)[0].strip()  # "ASSISTANT:" of a template in one line
    if after_article.endswith(":"):
        markers.add(after_article)
    # Shorter ones, such as "A:", stand in too many articles to be broken in all of them.
    markers = {marker.strip() for marker in markers if len(marker.strip()) > 2}
    longest_first = sorted(map(re.escape, markers), key=len, reverse=True)
    return re.compile("|".join(longest_first) or r"(?!)")  # (?!) matches nothing


def _broken(marker: re.Match) -> str:
    return f"{marker[0][0]} {marker[0][1:]}"


def _render_chat(tokenizer, template: str) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "--apply_chat_template", "this model has no chat template", "leave the option out"
        )
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": template}],
            chat_template=SAME_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # it is a program, run in a sandbox: it may fail in any way
        raise UserError(
            "--apply_chat_template",
            f"this model's chat template fails ({error})",
            "leave the option out",
        ) from None
    if rendered.count(ARTICLE) != 1:
        raise UserError(
            "--apply_chat_template",
            f"this model's chat template shows {ARTICLE} {rendered.count(ARTICLE)} times",
            "leave the option out",
        )
    return rendered
