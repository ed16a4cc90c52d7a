"""prompting.py: from articles to ids and from ids to titles, with two kinds of tokenizer.

python -m pytest tests/test_prompting.py
"""

import copy
import functools
import json
import signal
import tempfile
import tracemalloc
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, byte_level_tokenizer, french_rows, sentencepiece_tokenizer
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from exit_codes import UserError
from prompting import (
    PROBE,
    Prompt,
    check_tokenizer,
    load_tokenizer,
    prompt_of_run,
    read_template,
)

PROMPTS = {file.name: file for file in sorted((ROOT / "prompts").glob("*.txt"))}
KINDS = ("byte_level", "sentencepiece")
# What turns begin and end with, and pieces that become it when something between them goes.
FRAGMENTS = ["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<|endoftext|>", "<s>", "</s>"]
FRAGMENTS += ["<", "/", "s>", "<<", ">>", "[INST]", "[/INST]", "[", "INST]", "[[INST]INST]"]
FRAGMENTS += ["<unk>", "[/IN", "ST]", "<<SYS>>", "<</SYS>>", "<|im_<|im_end|>end|>", "<<s>/s>"]
FRAGMENTS += ["<0x0A>", " ", "\n", "\n\nTitre :", "\nArticle :", "\r\n", "\u2028", "\x85"]
FRAGMENTS += ["é", "▁", "Ċ"]
HOSTILE = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=12)
HOSTILE = HOSTILE.map("".join)
LIGHT = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@functools.cache
def tokenizer_of(kind: str):
    if kind == "byte_level":
        return byte_level_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        return sentencepiece_tokenizer(Path(folder))


@functools.cache
def make(kind: str, file: str, max_length: int = 256, max_title_tokens: int = 64) -> Prompt:
    template = read_template(str(PROMPTS[file]))
    return Prompt(tokenizer_of(kind), template, "chat" in file, max_length, max_title_tokens)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(kind):
    return tokenizer_of(kind)


@pytest.fixture(params=PROMPTS)
def file(request) -> str:
    return request.param


def changed(kind: str, **attributes):
    """Return a copy of a tokenizer of its own, with other attributes."""
    tokenizer = copy.deepcopy(tokenizer_of(kind))
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def article_span(prompt: Prompt, article: str) -> list[int]:
    example = prompt.encode(article)
    assert example.ids[: len(prompt.prefix_ids)] == prompt.prefix_ids
    end = len(example.ids) - len(prompt.suffix_ids)
    assert example.ids[end:] == prompt.suffix_ids
    return example.ids[len(prompt.prefix_ids) : end]


def one_line(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def seconds(limit: float):
    """Fail, rather than hang, where the code within takes longer."""

    def fail(*_):
        raise TimeoutError(f"took more than {limit} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# ---------------------------------------------------------------------- prompt files


def test_the_prompts_that_the_documentation_names_are_there():
    language = ("en", "fr")
    forms = ("", "_chat", "_llama2")
    assert PROMPTS.keys() >= {f"{x}{form}.txt" for x in language for form in forms}


def test_prompt_file_is_read_and_reaches_the_model(file, tokenizer):
    template = read_template(str(PROMPTS[file]))
    assert template == PROMPTS[file].read_text(encoding="utf-8").removesuffix("\n")
    assert not template.endswith((" ", "\n"))
    prompt = Prompt(tokenizer, template, "chat" in file)
    text = tokenizer.decode(prompt.encode("Un mot.").ids, skip_special_tokens=False)
    squeezed = text.replace(" ", "")  # SentencePiece puts spaces between the pieces
    assert template.replace("{article}", "Un mot.").replace(" ", "") in squeezed
    assert ("<|im_start|>assistant" in text or "[/INST]" in text) == (
        "chat" in file or "llama2" in file
    )


def test_newlines_at_the_end_bom_and_crlf_of_a_prompt_file_do_not_matter(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffUn article :\r\n{article}\r\nTitre : \n\n".encode())
    assert read_template(str(tmp_path / "p.txt")) == "Un article :\n{article}\nTitre :"


def test_white_space_at_the_beginning_of_a_prompt_file_is_part_of_it(tmp_path):
    (tmp_path / "p.txt").write_text("\n  Un article :\n{article} \n\n", encoding="utf-8")
    assert read_template(str(tmp_path / "p.txt")) == "\n  Un article :\n{article}"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"Un article :", "{article} stands there 0 times; write it once, where the article goes"),
        (
            b"{article} {article}",
            "{article} stands there 2 times; write it once, where the article goes",
        ),
        (b"", "{article} stands there 0 times; write it once, where the article goes"),
        (
            b"{article} \xe9t\xe9",
            "no readable prompt ('utf-8' codec can't decode byte 0xe9 in position 10: invalid "
            "continuation byte); give a file of prompts/",
        ),
        (
            None,
            "no readable prompt ([Errno 2] No such file or directory: '{path}'); give a file of "
            "prompts/",
        ),
    ],
)
def test_complaints_about_a_prompt_file(tmp_path, content, problem):
    path = str(tmp_path / "p.txt")
    if content is not None:
        Path(path).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_template(path)
    assert str(error.value) == f"{path}: {problem.replace('{path}', path)}"


@pytest.mark.parametrize("chat", [False, True])
def test_other_braces_in_a_template_are_plain_text(kind, chat):
    template = '{"a": {b}} {{ x }} {% if y %} {0} {title} :\n{article}\n{{article }'
    prompt = Prompt(tokenizer_of(kind), template, chat)
    text = prompt.tokenizer.decode(prompt.encode("Un {article} {0}.").ids)
    for braces in template.replace("{article}", "").split():
        assert braces in text
    assert "Un {article} {0}." in text


# ---------------------------------------------------------------------- training and inference


def test_inference_prompt_is_a_prefix_of_the_training_ids(kind, file):
    prompt = make(kind, file)
    rows = french_rows(30, seed=4, longest=120)
    cut = 0
    for row in rows:
        training = prompt.encode(row["text"], row["titles"])
        inference = prompt.encode(row["text"])
        assert training.ids[: training.num_prompt_ids] == inference.ids
        assert inference.num_prompt_ids == len(inference.ids)
        assert inference.num_title_ids == 0
        assert training.article_cut == inference.article_cut
        cut += training.article_cut
    assert 0 < cut < len(rows)


def test_supervised_ids_are_the_title_and_one_eos(kind, file):
    prompt = make(kind, file)
    for row in french_rows(30, seed=5):
        title = f" {row['titles']}\n de  la\tveille "
        example = prompt.encode(row["text"], title)
        labels = example.ids[example.num_prompt_ids :]
        assert example.num_title_ids == len(labels)
        assert labels[-1] == prompt.tokenizer.eos_token_id
        assert labels.count(prompt.tokenizer.eos_token_id) == 1
        assert prompt.tokenizer.decode(labels[:-1]).strip() == one_line(title)
        assert prompt.decode(labels) == one_line(title)
        assert not example.title_cut


def test_title_begins_as_a_word_after_the_prompt(kind):
    tokenizer = tokenizer_of(kind)
    example = make(kind, "fr.txt").encode("Un article.", "maire")
    joint = tokenizer("Titre : maire", add_special_tokens=False).input_ids
    alone = example.ids[example.num_prompt_ids : -1]
    assert joint[-len(alone) :] == alone


@pytest.mark.parametrize("pad", [None, "<|endoftext|>", "<|im_start|>"])
def test_the_pad_token_plays_no_role(pad):
    prompt = make("byte_level", "fr.txt")
    other = Prompt(changed("byte_level", pad_token=pad), prompt.template, False, 256, 64)
    assert prompt.tokenizer.pad_token == prompt.tokenizer.eos_token != other.tokenizer.pad_token
    assert other.settings() == prompt.settings()
    assert other.encode("Un article.", "Un titre") == prompt.encode("Un article.", "Un titre")


def test_bos_comes_at_most_once_and_first(kind, file):
    prompt = make(kind, file)
    bos = prompt.tokenizer.bos_token_id
    ids = prompt.encode(f"Un {prompt.tokenizer.bos_token} article.", "Un titre").ids
    if kind == "sentencepiece":  # with its own BOS or with that of the chat format
        assert ids[0] == bos
        assert ids.count(bos) == 1
    elif "chat" in file:  # <|im_start|>, its BOS by name, begins both turns
        official = prompt.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Un article."}], add_generation_prompt=True
        )
        assert ids.count(bos) == official["input_ids"].count(bos) == 2
        assert ids[0] == bos
    else:
        assert bos not in ids


def test_a_template_that_spells_out_the_bos_gets_no_second_one():
    spelled, plain = (
        Prompt(tokenizer_of("sentencepiece"), f"{bos}[INST] {{article}} [/INST]")
        for bos in ("<s>", "")
    )
    assert spelled.prefix_ids.count(1) == 1
    assert spelled.prefix_ids[0] == plain.prefix_ids[0] == 1


def test_a_chat_format_without_bos_gets_none():
    chat_template = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    prompt = Prompt(changed("sentencepiece", chat_template=chat_template), "{article}", True)
    assert prompt.tokenizer.bos_token_id not in prompt.encode("Un article.", "Un titre").ids


def test_no_space_begins_the_title_on_a_line_of_its_own():
    prompt = make("byte_level", "fr_chat.txt")
    example = prompt.encode("Un article.", "maire")
    ids = prompt.tokenizer("maire", add_special_tokens=False).input_ids
    assert example.ids[example.num_prompt_ids : -1] == ids


def test_chat_formats_that_tell_the_date_make_the_same_prompt_every_day():
    tokenizer = changed(
        "byte_level",
        chat_template="{% for m in messages %}Le {{ strftime_now('%d %b %Y') }} : "
        "{{ m['content'] }}{% endfor %}",
    )
    prompt = Prompt(tokenizer, "{article}", True)
    assert tokenizer.decode(prompt.encode("Un article.").ids) == "Le 26 Jul 2024 : Un article."


def test_the_space_before_the_article_belongs_to_its_first_word(kind):
    """As in the text that the model has read; a space of its own would make "Le" another id."""
    prompt = make(kind, "fr.txt")
    natural = prompt.tokenizer("Article : Le maire", add_special_tokens=False).input_ids
    ids = prompt.encode("Le maire").ids
    joined = " ".join(map(str, ids))
    assert " ".join(map(str, natural[-3:])) in joined


# ---------------------------------------------------------------------- truncation


def test_only_the_article_is_cut_whatever_its_length(kind, file):
    prompt = make(kind, file, max_length=176, max_title_tokens=32)
    tokenizer = prompt.tokenizer
    words = " ".join(row["text"] for row in french_rows(40, seed=6))
    seen = set()
    for length in range(0, len(words)):
        article, title = words[:length], f"Le titre {length}"
        # After "Article : " the space belongs to the first word: no id of its own, but " Le".
        opened = f"{prompt.before_article}{article.strip()}" if article.strip() else ""
        whole = tokenizer(opened, add_special_tokens=False).input_ids
        if len(whole) in seen:
            continue
        seen.add(len(whole))
        example = prompt.encode(article, title)
        kept = article_span(prompt, article)
        assert kept == whole[: prompt.article_budget]
        assert example.article_cut == (len(whole) > prompt.article_budget)
        assert len(example.ids) <= 176
        assert example.ids[: example.num_prompt_ids] == prompt.prefix_ids + kept + prompt.suffix_ids
        assert example.ids[-1] == tokenizer.eos_token_id
        assert prompt.decode(example.ids[example.num_prompt_ids :]) == title
        if len(whole) > 3 * 176:
            break
    assert {0, prompt.article_budget, prompt.article_budget + 1} <= seen
    assert max(seen) > 3 * 176


def test_an_article_that_is_cut_fills_the_budget_exactly(kind, file):
    prompt = make(kind, file)
    example = prompt.encode("un mot " * 500, "t" * 500)
    assert len(example.ids) == 256
    assert example.article_cut
    assert example.title_cut


def test_a_title_too_long_is_cut_flagged_and_still_ends_in_eos(kind):
    whole = make(kind, "fr.txt").encode("Un article.", "Élection : a b c d e f")
    title_ids = whole.ids[whole.num_prompt_ids :]
    assert len(title_ids) > 12
    for max_title_tokens in range(1, len(title_ids) + 2):
        prompt = make(kind, "fr.txt", max_title_tokens=max_title_tokens)
        example = prompt.encode("Un article.", "Élection : a b c d e f")
        labels = example.ids[example.num_prompt_ids :]
        assert labels == title_ids[:-1][: max_title_tokens - 1] + title_ids[-1:]
        assert labels.count(prompt.tokenizer.eos_token_id) == 1
        assert example.title_cut == (len(title_ids) > max_title_tokens)


def test_complaint_about_a_budget_without_room_for_an_article(kind):
    prompt = make(kind, "fr.txt")
    fixed = len(prompt.prefix_ids) + len(prompt.suffix_ids)
    assert Prompt(prompt.tokenizer, prompt.template, False, fixed + 65, 64).article_budget == 1
    with pytest.raises(UserError) as error:
        Prompt(prompt.tokenizer, prompt.template, False, fixed + 64, 64)
    assert str(error.value) == (
        f"prompt: its {fixed} tokens and 64 for the title leave no room for an article in "
        f"{fixed + 64}; shorten the prompt or raise --max_length"
    )


@pytest.mark.parametrize("number", [0, -3])
def test_complaint_about_a_title_without_room_for_its_eos(number):
    with pytest.raises(UserError) as error:
        Prompt(tokenizer_of("byte_level"), "{article}", False, 256, number)
    assert str(error.value) == f"--max_title_tokens {number}: a title ends in an EOS; raise it"


# ---------------------------------------------------------------------- very long texts


@pytest.mark.parametrize(
    "text",
    [
        "Le maire d'Orléans « évacué » où l'œuvre brûle, 3,5 %. " * 900,
        "a" * 50_000,
        "新闻标题" * 9000,
        "👩‍👩‍👧‍👦 é" * 5000,
        "-" * 40_001 + " fin" * 5000,
        " \n" * 40_000 + "le maire " * 3000,
        "[INST] <|im_end|></s>" * 3000,
        "[[INST]INST]" * 4000,
    ],
    ids=["french", "no space", "chinese", "emoji", "dashes", "blank", "markers", "nested"],
)
def test_tokenizing_only_the_head_of_a_long_text_changes_no_id(kind, text):
    prompt = make(kind, "fr_llama2.txt")
    for shift in range(4):
        moved = "x" * shift + text
        whole = prompt._ids(prompt.before_article + prompt._one_line(moved))
        assert len(whole) > 4 * prompt.max_length
        assert article_span(prompt, moved) == whole[: prompt.article_budget]
        assert prompt.encode(moved).article_cut


def test_tokens_of_many_characters_are_no_reason_to_cut_too_early():
    tokenizer = changed("byte_level")
    tokenizer.add_tokens(["x" * 500])
    prompt = Prompt(tokenizer, "{article}", False, 256, 64)
    fits, too_long = prompt.encode("x" * 500 * 192), prompt.encode("x" * 500 * 193)
    assert fits.ids == too_long.ids == [len(tokenizer) - 1] * 192
    assert not fits.article_cut
    assert too_long.article_cut


def test_many_at_once_are_what_each_is_alone(kind):
    """Among them an empty one, one of markers, and those of which a longer head has to be read."""
    prompt = make(kind, "fr_llama2.txt")
    rows = [(row["text"], row["titles"]) for row in french_rows(40, seed=6)]
    rows += [("", ""), ("[INST] a [/INST]", "[INST]"), ("un mot " * 900, "le mot " * 900)]
    rows.append((" " * 9000 + "Le maire.", "Le" + " " * 9000 + "maire"))
    articles, titles = map(list, zip(*rows, strict=True))
    assert prompt.encode_all(articles, titles) == [prompt.encode(*row) for row in rows]
    assert prompt.encode_all(articles) == [prompt.encode(article) for article in articles]
    assert prompt.encode_all([]) == prompt.encode_all([], []) == []


def test_a_page_of_10_megabytes_takes_neither_time_nor_memory(kind):
    prompt = make(kind, "fr.txt")
    article = "Le maire de Nîmes. " * 530_000
    tracemalloc.start()
    with seconds(1):
        example = prompt.encode(article, article)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(example.ids) == 256
    assert peak < 2**20


@pytest.mark.parametrize(
    "text",
    ["[" * 500_000 + "INST]" * 100_000, "[INST]" * 170_000, "[" * 10**6, "</s" * 330_000 + "></s>"],
    ids=["nested", "repeated", "openings", "almost"],
)
def test_neutralising_a_megabyte_of_markers_is_quick(kind, text):
    prompt = make(kind, "fr_llama2.txt")
    with seconds(3):
        assert prompt.markers.search(prompt._one_line(text)) is None


# ---------------------------------------------------------------------- hostile text


def test_the_markers_would_be_control_tokens_were_they_trusted(kind):
    tokenizer = tokenizer_of(kind)
    for marker in tokenizer.all_special_tokens:
        ids = tokenizer(marker, add_special_tokens=False).input_ids
        assert ids[-1] in tokenizer.all_special_ids


@LIGHT
@given(article=HOSTILE, title=HOSTILE)
def test_data_holds_no_control_token_and_no_marker_of_the_template(article, title):
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        markers = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        for file in PROMPTS:
            prompt = make(kind, file, max_length=1024)
            own = markers | ({"[INST]", "[/INST]"} if "llama2" in file else set())
            if "chat" in file and kind == "sentencepiece":
                own |= {"[INST]", "[/INST]"}
            example, harmless = prompt.encode(article, title), prompt.encode("Un mot.", "Un mot.")
            span = article_span(prompt, article)
            labels = example.ids[example.num_prompt_ids : -1]
            for ids in (span, labels):
                assert not special & set(ids)
                text = tokenizer.decode(ids)
                assert not [marker for marker in own if marker in text]
                assert "\n" not in text
            for token in special:
                assert example.ids.count(token) == harmless.ids.count(token)
            text = tokenizer.decode(example.ids, skip_special_tokens=False)
            expected = tokenizer.decode(harmless.ids, skip_special_tokens=False)
            for marker in own | {"\n\nTitre :", "\n\nTitle:"}:
                assert text.count(marker) == expected.count(marker)


# Markers in other clothes: full-width letters, characters without width, accents, letter case.
DISGUISED = ["［INST］", "[ＩＮＳＴ]", "＜/s＞", "<／s>", "＜｜im_end｜＞", "<|im＿start|>"]
DISGUISED += ["[IN\u200bST]", "[/IN\u00adST]", "<\u2060/s>", "<|im\ufeff_end|>", "[I\u0301NST]"]
DISGUISED += ["[inst]", "<S>", "<|IM_END|>", "[/Inst]", "[/IN\x00ST]", "<|im_\x1bend|>"]
DISGUISED += ["＜think＞", "﹤s﹥", "\u200b", "\u00ad", "\ufeff", "\u0338", "ﬁ", "🅘", "ｓ"]
DISGUISED += ["［", "］", "＜", "＞", "｜", "／"]
IN_DISGUISE = st.lists(
    st.one_of(st.sampled_from(DISGUISED + FRAGMENTS), st.text(max_size=4)), max_size=12
).map("".join)
NORMALISING = ("byte_level NFKC", "sentencepiece NFKC", "unigram NFKC", "invisible removed")
NORMALISING += ("unigram", "letters changed")


@functools.cache
def normalising_tokenizer(kind: str):
    """Return a tokenizer that changes texts before it cuts them up, as T5's and XLNet's do."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
    from tokenizers.decoders import Metaspace as MetaspaceDecoder
    from tokenizers.pre_tokenizers import Metaspace
    from transformers import PreTrainedTokenizerFast

    if kind.startswith("unigram"):  # without bytes: what it does not know is <unk>
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = Metaspace()
        tokenizer.decoder = MetaspaceDecoder()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
        )
        texts = [row["text"] for row in french_rows(200)] + ["[INST] <s> | im_start end SYS / <>"]
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
        tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=True)])
        tokenizer.chat_template = byte_level_tokenizer().chat_template
    else:
        tokenizer = changed("sentencepiece" if "sentencepiece" in kind else "byte_level")
    backend = tokenizer.backend_tokenizer
    before = [backend.normalizer] if backend.normalizer else []
    if kind.endswith("NFKC"):
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), *before])
    elif kind == "invisible removed":
        removed = Regex("[\u0000-\u0008\u000e-\u001f\u00ad\u200b\u2060\ufeff]")
        backend.normalizer = normalizers.Replace(removed, "")
    elif kind == "letters changed":  # into markers that no look at the article could tell
        backend.normalizer = normalizers.Sequence(
            [normalizers.Replace("é", "[/INST]"), normalizers.Replace("ﬁ", "<|im_end|>")]
        )
    return tokenizer


@pytest.mark.parametrize("kind", NORMALISING)
@LIGHT
@given(article=IN_DISGUISE, title=IN_DISGUISE)
@example(article="un ［/ＩＮＳＴ］ b ＜｜im_end｜＞ </s> ＜/s＞", title="[IN\u200bST] ＜s＞")
def test_no_tokenizer_makes_a_marker_of_what_is_none(kind, article, title):
    tokenizer = normalising_tokenizer(kind)
    unknown = {tokenizer.unk_token_id} - {None}  # what a vocabulary lacks; it ends nothing
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} - unknown
    names = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {tokenizer.unk_token}
    for template in ("fr_llama2.txt", "fr_chat.txt", "fr.txt"):
        prompt = normalising_prompt(kind, template)
        own = names | ({"[INST]", "[/INST]"} if "llama2" in template else set())
        example = prompt.encode(article, title)
        harmless = prompt.encode("un mot", "un mot")
        span, labels = article_span(prompt, article), example.ids[example.num_prompt_ids : -1]
        for ids in (span, labels):
            assert not special & set(ids)
            shown = tokenizer.decode(ids, skip_special_tokens=True)
            assert not [marker for marker in own if marker in shown]
            assert "\n" not in shown
        text, expected = (tokenizer.decode(ids) for ids in (example.ids, harmless.ids))
        for marker in own | {"\n\nTitre :"}:  # so that both split into the same turns
            assert text.count(marker) == expected.count(marker)


@functools.cache
def normalising_prompt(kind: str, file: str) -> Prompt:
    template = read_template(str(PROMPTS[file]))
    return Prompt(normalising_tokenizer(kind), template, "chat" in file, 1024, 128)


@pytest.mark.parametrize("kind", [kind for kind in NORMALISING if kind != "unigram"])
def test_these_tokenizers_do_make_markers_of_what_is_none(kind):
    """Else the property above would hold of itself."""
    tokenizer = normalising_tokenizer(kind)
    made = [*DISGUISED, "été ﬁn"]
    made = [tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) for text in made]
    assert any(marker in text for text in made for marker in ("[INST]", "[/INST]", "<|im_end|>"))


def test_only_markers_are_changed_where_a_tokenizer_normalises():
    prompt = normalising_prompt("byte_level NFKC", "fr_llama2.txt")
    shown = prompt.tokenizer.decode(article_span(prompt, "Le ［INST］ à 3 ½ ; […] [ＩＮＳＴ"))
    assert shown == " Le [ INST] à 3 1⁄2 ; [...] [INST"
    assert prompt.tokenizer.decode(article_span(prompt, "À 3 ½ […]")) == " À 3 1⁄2 [...]"


@pytest.mark.parametrize("text", [*FRAGMENTS, "<<<SYS>>SYS>>", "Un [INST] et </s> et <|im_end|>"])
@pytest.mark.parametrize("template", ["[INST] <<SYS>>x<</SYS>> {article} [/INST]", "<x> {article}"])
def test_markers_are_broken_and_nothing_else(kind, text, template):
    prompt = Prompt(tokenizer_of(kind), template)
    shown = prompt.tokenizer.decode(article_span(prompt, text)).strip()
    if kind == "sentencepiece":
        text = text.replace("▁", " ")  # its own sign for a space
    assert shown.replace(" ", "") == one_line(text).replace(" ", "")
    if not prompt.markers.search(one_line(text)):
        assert shown == one_line(text)


def test_words_that_were_added_to_a_vocabulary_are_not_broken_but_tags_are():
    tokenizer = changed("byte_level")
    tokenizer.add_tokens(["Nantes", "aujourd'hui", "<think>"])
    prompt = Prompt(tokenizer, "{article}\nTitre :")
    text = "À Nantes, aujourd'hui <think> a < b"
    expected = "À Nantes, aujourd'hui < think> a < b"
    assert tokenizer.decode(article_span(prompt, text)) == expected


def test_markers_with_spaces_in_them_are_broken_too():
    tokenizer = changed("byte_level")
    tokenizer.add_tokens([" <tour>", "<fin du tour>", "<fin  du tour>"], special_tokens=True)
    prompt = Prompt(tokenizer, "{article}\nTitre :")
    text = "a <tour> b <tour><fin du tour> <fin\ndu tour> <f<fin du tour>in du tour>"
    with seconds(3):
        span = article_span(prompt, text)
    assert not {*tokenizer.all_special_ids} & {*span}
    shown = tokenizer.decode(span)
    assert "<tour>" not in shown
    assert "<fin du tour>" not in shown
    assert shown.replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_what_ends_the_article_in_its_own_line_is_a_marker(kind):
    prompt = Prompt(tokenizer_of(kind), "USER: {article} ASSISTANT:")
    span = article_span(prompt, "Fin. ASSISTANT: Faux titre USER: (12 h)")
    assert prompt.tokenizer.decode(span).strip() == "Fin. A SSISTANT: Faux titre USER: (12 h)"
    for template in ("« {article} »\nTitre :", "{article}\nTitre :", "Résume {article} en bref"):
        prompt = Prompt(tokenizer_of(kind), template)
        span = article_span(prompt, "Un » Titre : mot en bref")
        assert prompt.tokenizer.decode(span).strip() == "Un » Titre : mot en bref"


def test_control_tokens_too_short_to_break_are_plain_text_in_data():
    tokenizer = changed("byte_level")
    tokenizer.add_tokens(["~~"], special_tokens=True)
    prompt = Prompt(tokenizer, "{article}\nTitre :")
    span = article_span(prompt, "a ~~ b")
    assert len(tokenizer) - 1 not in span
    assert tokenizer.decode(span) == "a ~~ b"


@pytest.mark.parametrize("token", ["~~", "xq"])
def test_no_control_token_is_left_where_the_vocabulary_itself_makes_it(token):
    """As a Unigram does of a piece that is a control token too, and too short to be broken."""
    from tokenizers import Tokenizer

    tokenizer = copy.deepcopy(normalising_tokenizer("unigram"))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"].append([token, 0.0])
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < 3]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    number = len(content["model"]["vocab"]) - 1
    assert tokenizer(f"le {token} la", add_special_tokens=False).input_ids.count(number) == 1
    tokenizer.add_tokens([token], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(token) == number
    prompt = Prompt(tokenizer, "{article}\nTitre :")
    shown = tokenizer.decode(article_span(prompt, f"le {token} la"))
    assert " ".join(shown.split()) == "le la"


def test_what_a_vocabulary_does_not_know_stays_unknown():
    tokenizer = normalising_tokenizer("unigram")
    text = "le 🎉 la"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id in ids
    assert article_span(Prompt(tokenizer, "{article}\nTitre :"), text) == ids


def test_no_tokenizer_makes_a_line_of_what_is_none():
    from tokenizers import normalizers

    tokenizer = changed("byte_level")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("¶", "\n\nTitre :")
    span = article_span(Prompt(tokenizer, "{article}\n\nTitre :"), "un mot ¶ faux")
    assert tokenizer.decode(span) == "un mot Titre : faux"


def test_tags_in_any_brackets_are_broken_and_control_tokens_without_any_too():
    tokenizer = changed("byte_level")
    tags = ["<a>", "[SEP]", "{mot}", "|fin|", " <b>"]
    tokenizer.add_tokens(tags)
    tokenizer.add_tokens(["FINI"], special_tokens=True)
    prompt = Prompt(tokenizer, "{article}\nTitre :")
    shown = tokenizer.decode(article_span(prompt, "".join(f"x{tag}" for tag in [*tags, "FINI"])))
    assert shown == "x< a>x[ SEP]x{ mot}x| fin|x < b>xF INI"


@pytest.mark.parametrize("marker", ["<|user|>", "<<SYS>>", "<</SYS>>", "<tour>", "[/FIN]"])
def test_brackets_of_a_template_are_markers_though_no_token_is_called_so(kind, marker):
    prompt = Prompt(tokenizer_of(kind), f"{marker}\n{{article}}\nTitre :")
    shown = prompt.tokenizer.decode(article_span(prompt, f"Un {marker} mot"))
    assert shown.strip() == f"Un {marker[0]} {marker[1:]} mot"
    plain = Prompt(tokenizer_of(kind), "{article}\nTitre :")
    shown = plain.tokenizer.decode(article_span(plain, f"Un {marker} mot"))
    assert shown.strip() == f"Un {marker} mot"


@pytest.mark.parametrize("shared", ["bos_token", "eos_token"])
def test_what_a_vocabulary_does_not_know_ends_nothing_where_it_shares_an_id(shared):
    """As GPT-2's one special token does, which is BOS, EOS and the unknown in one."""
    tokenizer = copy.deepcopy(normalising_tokenizer("unigram"))
    setattr(tokenizer, shared, tokenizer.unk_token)
    text = "le 🎉 la"
    assert tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False).input_ids
    span = article_span(Prompt(tokenizer, "{article}\nTitre :"), text)
    assert tokenizer.unk_token_id not in span


def test_markers_that_overlap_are_all_broken():
    tokenizer = changed("byte_level")
    tokenizer.add_tokens(["<ab>", "ab><", "b><c"], special_tokens=True)
    prompt = Prompt(tokenizer, "{article}\nTitre :")
    assert tokenizer.decode(article_span(prompt, "<ab><c")) == "< a b ><c"


# ---------------------------------------------------------------------- French and other scripts


@pytest.mark.parametrize(
    "title",
    [
        "L'été à l'Élysée : Noël, cœur, œuvre, Œdipe, ÇA, naïf, ÿ",
        "« Où va-t-on ? » – 3,5\u202f% d’élus\u00a0!",
        "e\u0301le\u0300ve de\u0301compose\u0301",
        "👩‍👩‍👧‍👦 Famille 🇫🇷 🎉",
        "العربية في باريس — שלום",
        "新闻 и новости",
        "1 < 2 > 0 & [sic] {x} | <b>gras</b> \\n $ ~ ^",
        "null",
    ],
)
def test_text_survives_the_way_there_and_back(kind, title):
    prompt = make(kind, "fr.txt", max_length=1024, max_title_tokens=256)
    example = prompt.encode(title, title)
    assert prompt.decode(example.ids[example.num_prompt_ids :]) == one_line(title)
    assert prompt.tokenizer.decode(article_span(prompt, title)).strip() == one_line(title)


@LIGHT
@given(title=st.text(max_size=40))
def test_any_text_survives_up_to_white_space_and_control_characters(title):
    assume("▁" not in title)  # SentencePiece's own sign for a space
    for kind in KINDS:
        prompt = make(kind, "fr.txt", max_length=1024, max_title_tokens=256)
        example = prompt.encode("Un article.", title)
        expected = "".join(c for c in one_line(title) if unicodedata.category(c) != "Cc")
        assert prompt.decode(example.ids[example.num_prompt_ids :]) == expected.strip()


@pytest.mark.parametrize(
    ("written", "title"),
    [
        ("Un \x1b[31mtitre\x00\x7f\x9b2J \x07", "Un [31mtitre2J"),
        ("Un titre [/I\x00NST] Encore", "Un titre"),
        (" Un  titre \t de trop\nEt un article", "Un titre de trop"),
        ("\n\n Un titre\n", "Un titre"),
        ("Un titre\r\nsuite", "Un titre"),
        ("Où\u00a0? «\u202fIci\u202f» !", "Où ? « Ici » !"),
        ("Un titre{eos}suite", "Un titresuite"),  # ids after EOS are for the caller to cut
        ("{bos}Un titre{eos}", "Un titre"),
        ("{eos}", ""),
        ("", ""),
        ("\n", ""),
        ("Un titre [/INST] Encore", "Un titre"),
        ("[/INST] Un titre [INST]", "Un titre"),
        ("[/INST]", ""),
    ],
)
def test_decode_takes_the_first_line_and_shows_no_control_token(kind, written, title):
    prompt = make(kind, "fr_llama2.txt")
    tokenizer = prompt.tokenizer
    text = written.format(eos=tokenizer.eos_token, bos=tokenizer.bos_token)
    assert prompt.decode(tokenizer(text, add_special_tokens=False).input_ids) == title
    tokenizer.clean_up_tokenization_spaces = True  # as some models are saved
    try:
        assert prompt.decode(tokenizer(text, add_special_tokens=False).input_ids) == title
    finally:
        tokenizer.clean_up_tokenization_spaces = False


@pytest.mark.parametrize("blank", ["", " \n", "\u3000\n", "\u2003 \n\u3000"])
def test_a_title_ends_at_no_newline_before_it_whatever_blanks_are_there(kind, blank):
    """Byte by byte, a blank beyond ASCII does not look like one."""
    prompt = make(kind, "fr.txt")
    prefix = prompt.tokenizer(f"{blank}Le maire", add_special_tokens=False).input_ids
    ids = prompt.tokenizer(f"{blank}Le maire\nfin", add_special_tokens=False).input_ids
    cut = prompt.ends(None).cut(ids)
    assert len(prefix) < len(cut) < len(ids)
    assert prompt.ends(None).ended(cut)
    assert prompt.decode(cut) == prompt.decode(ids) == "Le maire"


def test_a_newline_within_a_token_ends_a_title_after_text_only():
    tokenizer = changed("byte_level")
    tokenizer.add_tokens(["fin\n", "\nfin"])
    after, before = len(tokenizer) - 2, len(tokenizer) - 1
    ends = Prompt(tokenizer, "{article}").ends(None)
    assert ends.cut([after, before]) == [after]
    assert ends.cut([before, before, after]) == [before, before]


def test_rows_are_filled_up_with_the_eos_and_unknown_ids_are_no_text():
    """A model's own pad token may be one that its vocabulary has no row for, or none at all."""
    for pad in (None, "<|endoftext|>"):
        ends = Prompt(changed("byte_level", pad_token=pad), "{article}").ends(None)
        assert ends.pad_id == tokenizer_of("byte_level").eos_token_id
    beyond = [len(tokenizer_of("byte_level")), 10**6]  # of a head that is padded
    assert ends.cut(beyond) == beyond
    assert not ends.ended(beyond)


def test_decode_shows_no_control_token_that_a_model_spells_out(kind):
    prompt = make(kind, "fr.txt")
    marker = prompt.tokenizer.eos_token
    ids = prompt.tokenizer(
        f"Un titre {marker} suite", add_special_tokens=False, split_special_tokens=True
    ).input_ids
    assert prompt.tokenizer.eos_token_id not in ids
    assert prompt.decode(ids) == "Un titre"


# ---------------------------------------------------------------------- refusals


def test_good_tokenizers_pass(kind, tmp_path):
    check_tokenizer(tokenizer_of(kind), "model")
    tokenizer_of(kind).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    check_tokenizer(tokenizer_of(kind), str(tmp_path))


def test_a_tokenizer_saved_with_truncation_and_padding_passes(kind, tmp_path):
    tokenizer_of(kind).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "direction": "Left",
        "strategy": {"Fixed": 200},
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    file.write_text(json.dumps(content))
    from transformers import AutoTokenizer

    check_tokenizer(AutoTokenizer.from_pretrained(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "tokenizer_class", "complaint"),
    [
        ("sentencepiece", "Qwen2Tokenizer", f"its tokenizer turns {PROBE!r} into \"L'lse,cur"),
        (
            "byte_level",
            "Qwen2Tokenizer",
            "transformers and tokenizer.json disagree on the ids of a ",
        ),
        ("sentencepiece", "GemmaTokenizer", "transformers and tokenizer.json disagree on the ids "),
        (
            "byte_level",
            "GemmaTokenizer",
            f"its tokenizer turns {PROBE!r} into 'an error, Unk token",
        ),
    ],
)
def test_a_wrong_tokenizer_class_is_refused(tmp_path, kind, tokenizer_class, complaint):
    from transformers import AutoTokenizer

    tokenizer_of(kind).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == tokenizer_class
    with pytest.raises(UserError) as error:
        check_tokenizer(tokenizer, str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: {complaint}")
    assert "; check tokenizer_class in tokenizer_config.json" in str(error.value)


@pytest.mark.parametrize("loss", ["lower case", "accents", "spaces"])
def test_a_tokenizer_that_loses_french_is_refused(loss):
    from tokenizers import normalizers

    lossy = {
        "lower case": normalizers.Lowercase(),
        "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        "spaces": normalizers.NFKC(),  # makes a plain space of NBSP
    }
    tokenizer = changed("byte_level")
    tokenizer.backend_tokenizer.normalizer = lossy[loss]
    with pytest.raises(UserError) as error:
        check_tokenizer(tokenizer, "model")
    assert str(error.value).startswith(f"model: its tokenizer turns {PROBE!r} into ")
    assert str(error.value).endswith(
        "; check tokenizer_class in tokenizer_config.json, or use another model"
    )


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "config.json"]
)
def test_a_folder_with_only_what_goes_with_a_tokenizer_has_none(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    assert str(error.value) == f"{tmp_path}: no tokenizer in this folder; add its files"


@pytest.mark.parametrize("names", [["rag", "default", "tool_use"], ["rag", "tool_use"]])
def test_of_several_chat_templates_the_one_by_default_is_taken(tmp_path, names):
    tokenizer_of("byte_level").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    file = tmp_path / "tokenizer_config.json"
    templates = [{"name": name, "template": f"{name} {{{{ messages }}}}"} for name in names]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": templates}))
    expected = "default {{ messages }}" if "default" in names else None
    assert load_tokenizer(str(tmp_path)).chat_template == expected


def test_a_tokenizer_is_checked_as_it_is_loaded(tmp_path):
    changed("byte_level", eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer has no EOS token; use another model"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(UserError) as error:
        check_tokenizer(changed("byte_level", eos_token=None), "model")
    assert str(error.value) == "model: its tokenizer has no EOS token; use another model"


def test_a_prompt_comes_back_from_its_settings(kind, file):
    prompt = make(kind, file)
    saved = json.loads(json.dumps(prompt.settings(), ensure_ascii=False))
    again = prompt_of_run(prompt.tokenizer, saved, "run")
    assert again.settings() == prompt.settings()
    for row in french_rows(5, longest=300):
        assert again.encode(row["text"], row["titles"]) == prompt.encode(row["text"], row["titles"])


@pytest.mark.parametrize("word", ["Voici", "Titre", "Nîmes"])  # of prefix, suffix and the data
def test_other_ids_of_any_part_of_a_row_are_other_settings(word):
    tokenizer = changed("byte_level")
    tokenizer.add_tokens([word])
    prompt = Prompt(tokenizer, read_template(str(PROMPTS["fr.txt"])), False, 256, 64)
    assert prompt.settings() != make("byte_level", "fr.txt").settings()


@pytest.mark.parametrize("change", ["tokenizer", "template", "chat"])
def test_a_prompt_with_other_ids_than_in_training_is_refused(change):
    saved = make("byte_level", "fr.txt").settings()
    tokenizer = tokenizer_of("sentencepiece" if change == "tokenizer" else "byte_level")
    saved |= {"template": "{article} Titre :"} if change == "template" else {}
    saved |= {"apply_chat_template": True} if change == "chat" else {}
    with pytest.raises(UserError) as error:
        prompt_of_run(tokenizer, saved, "run")
    assert str(error.value) == (
        "run: its prompt has other ids with this tokenizer than it had in training; use the "
        "tokenizer and the version of transformers named in run_config.json"
    )


@pytest.mark.parametrize(
    ("chat_template", "problem"),
    [
        (None, "this model has no chat template"),
        ("{{ messages[0]['content'] * 2 }}", "this model's chat template shows {article} 2 times"),
        ("Bonjour", "this model's chat template shows {article} 0 times"),
    ],
)
def test_complaints_about_a_chat_template(chat_template, problem):
    with pytest.raises(UserError) as error:
        Prompt(changed("byte_level", chat_template=chat_template), "{article}", True)
    assert str(error.value) == f"--apply_chat_template: {problem}; leave the option out"
