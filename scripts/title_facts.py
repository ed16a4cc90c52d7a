"""What can be said of a title without another model: its words, its language, what is wrong in it.

A flag is a reason to look, not a verdict: true titles carry some too, and how many is told beside.
Of what a title claims, three things can be looked up in its article: numbers, names, quotations.
"""

import functools
import math
import re
import unicodedata
from collections import Counter

# What a language model may answer in. py3langid knows 139 languages, and short titles get lost
# among the neighbours of French (Occitan, Walloon, Catalan): of the first 3 words of 1,500 real
# titles it takes 86 % for French, 95 % when it chooses among these, and all 1,500 whole ones.
# It always chooses: a title of one or two words is a guess, and so is one of names only.
CANDIDATES = ("ar", "de", "en", "es", "fr", "it", "nl", "pt", "ru", "zh")
WORD = re.compile(r"[^\W_]+")
UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))  # within words: soft hyphens and such
LOOP_WORDS, LOOP_TIMES = 3, 3  # three words in a row, three times or more anywhere
NGRAMS = (1, 2, 3, 4)  # as in the tables of OrangeSum (arXiv 2010.12321)

INITIALS = re.compile(r"\b(?:[^\W\d_]\.){2,}")  # S.N.C.F.
UNIT = r"(?:(?:\b[^\W\d_]\.){2,}[^\W_]*|[^\W_]+)"
TOKEN = re.compile(rf"{UNIT}(?:[-'’]{UNIT})*")
ELISION = re.compile(r"(?:[cdjlmnst]|(?:jus|lors|puis|quel|pres)?qu)['’](?=.)", re.IGNORECASE)
SENTENCE_START = re.compile(r"[.!?…:;«»“”‘\"()\[\]|–—\n]|\s-\s")  # between two words
TITLED = re.compile(r"(?:\b[A-ZÀ-ÖØ-Þ]|\bMM|\bMmes?|\bMlles?|\bDr|\bMe|\bSte?)\.\s*$")  # M. Macron
# These have a capital because they begin a title, and are no names, even before one.
FUNCTION_WORDS = frozenset(
    """
    a à après au aux avant avec ce ces cet cette chez comment contre dans de depuis des du elle
    elles en entre et hors il ils la le les leur leurs lors mais malgré merci ne ni non notre nos
    on ou où par pas pendant plus pour pourquoi quand que quel quelle quelles quels qui sa sans
    sauf se selon ses si son sous sur tous tout toute toutes un une vers via voici voilà votre vos
    """.split()  # noqa: SIM905
)
NO_NAMES = frozenset("MM Mme Mmes Mlle Mlles Me Dr Mgr Md Mds".split())  # noqa: SIM905
# VIDÉO. or EN DIRECT : or SONDAGE - before a title; initials rarely have more than four letters.
DASH = r"\s[-–—|]\s"
IN_LABEL = rf"(?:(?!{DASH})[^.:])"
LABEL = re.compile(rf"(?={IN_LABEL}*?[^\W\d_]{{5}}){IN_LABEL}+(?:[.:](?!\w)|{DASH})")
# A straight ' is an apostrophe as often as a quotation mark, and is taken for none.
QUOTATION = re.compile(r"«([^«»]*)»|“([^“”]*)”|\"([^\"]*)\"|‘((?:[^‘’]|’(?=\w))*)’")
LEFT_OUT = re.compile(r"…|\.\.\.|\([^()]*\)|\[[^\[\]]*\]")  # of a quotation, or put into it

THOUSANDS = r"[0-9]{1,3}(?:[\s.][0-9]{3})+(?![0-9])"
NUMBER = re.compile(rf"(?<![^\W_])(?P<number>(?:{THOUSANDS}|[0-9]+)(?:[.,][0-9]+)?)")
# Behind a number, or behind a second one: 2 à 3 millions.
SCALE = re.compile(
    r"(?P<range>\s*(?:-|et|ou|à)\s*[0-9][0-9.,]*)?"
    r"(?:\s*(?P<scale>(?i:mille|million|milliard))s?\b|\s*(?P<short>Mds?\b|M(?=\s*[€$])))"
)
NEAR = re.compile(r"[\s‐‑-]*")
NUMERAL_WORDS = 20  # no number has more
SCALES = {"mille": 1_000, "million": 1_000_000, "milliard": 1_000_000_000}
SCALES |= {"M": SCALES["million"], "Md": SCALES["milliard"], "Mds": SCALES["milliard"]}
CLOCK = re.compile(r"(?<=\d)[hHx](?=\d)")  # 20h30


def count_words(title: str) -> int:
    """French sets « : » and guillemets between spaces: they are no words."""
    return sum(any(character.isalnum() for character in word) for word in title.split())


@functools.cache
def language_classifier():
    import py3langid

    py3langid.set_languages(CANDIDATES)
    return py3langid.classify


def words_of(text: str) -> list[str]:
    """Return the words of a text in any script, in lower case; l'Élysée is l and élysée."""
    return WORD.findall(plain(text.lower()))


def plain(text: str) -> str:
    """Return a text with one character for a letter and its accent, and without what is not seen:
    it may have come by a PDF or another system."""
    return unicodedata.normalize("NFC", text).translate(UNSEEN)


def join_initials(text: str) -> str:
    """S.N.C.F. becomes SNCF."""
    return INITIALS.sub(lambda match: match[0].replace(".", ""), text)


def ngrams(words: list[str], n: int):
    return zip(*(words[start:] for start in range(n)), strict=False)


def novelty(titles: list[str], article: list[str]) -> list[list[float | None]]:
    """Return, for each title, the share of its 1-, 2-, 3- and 4-grams that its article has not.

    `article` is `words_of` it. None: a title that is shorter than n words.
    """
    wanted = [words_of(title) for title in titles]
    shares = [[] for _ in titles]
    for n in NGRAMS:
        # Only what the titles hold is remembered of an article, which may have megabytes.
        found = set().union(*(ngrams(words, n) for words in wanted))
        found.intersection_update(ngrams(article, n))
        for words, share in zip(wanted, shares, strict=True):
            own = list(ngrams(words, n))
            new = sum(ngram not in found for ngram in own)
            share.append(new / len(own) if own else None)
    return shares


def loop_in(title: str) -> str | None:
    """Return the words that a title says over and over, or None: three of them anywhere, or fewer
    that follow themselves at once."""
    words = words_of(title)
    counts = Counter(ngrams(words, LOOP_WORDS))
    ngram, times = counts.most_common(1)[0] if counts else (None, 0)
    if times >= LOOP_TIMES:
        return " ".join(ngram)
    for n in range(1, LOOP_WORDS):
        for start in range(len(words) - n * LOOP_TIMES + 1):
            ngram = words[start : start + n]
            # Not 1 000 000 000.
            if ngram != ["000"] and words[start : start + n * LOOP_TIMES] == ngram * LOOP_TIMES:
                return " ".join(ngram)
    return None


class Article:
    """What of an article the claims of a title are looked up in."""

    def __init__(self, text: str):
        text = join_initials(plain(text))
        self.words = [fold(word) for word in WORD.findall(text)]
        stems = list(map(stem, self.words))
        self.stems, self.text = set(stems), f" {' '.join(stems)} "
        self.numbers = {value for _, values in numbers_in(text, True) for value in values}

    def lacks_numbers(self, title: str) -> list[str]:
        """Return the numbers of a title that the article has not, in figures or in words."""
        found = numbers_in(plain(title))
        return _unique(number for number, values in found if self.numbers.isdisjoint(values))

    def lacks_names(self, title: str) -> list[str]:
        """Return the names of a title that hold a word which the article has not, and names one
        after another of which no two follow each other there: of two people, one was made.

        Accents, capitals, and a plural or feminine ending make no difference: what is
        "américaine" comes from "Américains".
        """
        missing = []
        for run in names_in(plain(title)):
            words = [WORD.findall(name.replace(".", "")) for name in run]  # of initials
            parts = [[stem(fold(part)) for part in of_name] for of_name in words]
            new = [
                name
                for name, stems in zip(run, parts, strict=True)
                if any(part not in self.stems for part in stems if len(part) > 1)
            ]
            # "Le Parisien" may well be "au Parisien" there.
            pairs = [
                f" {one[-1]} {two[0]} "
                for name, one, two in zip(run, parts, parts[1:], strict=False)
                if name.lower() not in FUNCTION_WORDS
            ]
            if new:
                missing += new
            elif pairs and not any(pair in self.text for pair in pairs):
                missing.append(" ".join(run))
        return _unique(missing)

    def lacks_quotations(self, title: str) -> list[str]:
        """Return the quotations of two words or more that the article has not word for word."""
        text = f" {' '.join(self.words)} "
        missing = []
        for match in QUOTATION.finditer(join_initials(plain(title))):
            quoted = next(group for group in match.groups() if group is not None)
            parts = [" ".join(map(fold, WORD.findall(part))) for part in LEFT_OUT.split(quoted)]
            if sum(len(part.split()) for part in parts) > 1:
                missing += [quoted.strip()] * any(f" {part} " not in text for part in parts if part)
        return _unique(missing)


def names_in(title: str) -> list[list[str]]:
    """Return the words of a title that are written as names; those that follow each other at once
    are together.

    Those are words with a capital, and after an elision too (l'Élysée). The first word of a title
    or of a sentence in it, or after a colon or an opening quote, has one anyway: it counts where
    more than its first letter is a capital (SNCF, Jean-Luc), or where another name follows at once
    (Emmanuel Macron), if it is no article, preposition, numeral or the like; those two are not
    together. A title all in capitals says nothing by them, nor does a label before it (VIDÉO.).
    """
    label = LABEL.match(title)
    if label and label[0].isupper() and any(map(str.islower, title)):
        title = " " * label.end() + title[label.end() :]
    tokens = list(TOKEN.finditer(title))
    shouted = [token[0].isupper() for token in tokens if any(map(str.isalpha, token[0]))]
    if len(shouted) > 3 and sum(shouted) > len(shouted) / 2:
        return []
    names, end = [], None
    for position, token in enumerate(tokens):
        word, elided, placed = token[0], False, False
        while match := ELISION.match(word):
            word, elided = word[match.end() :], True
        if not word[0].isalpha() or len(word) < 2 or not any(map(str.isupper, word)):
            continue
        if word in NO_NAMES:
            continue
        before = title[tokens[position - 1].end() if position else 0 : token.start()]
        starts = position == 0 or SENTENCE_START.search(before)
        if (
            starts
            and not elided
            and not TITLED.search(title[max(0, token.start() - 8) : token.start()])
        ):
            inside = any(map(str.isupper, word[1:]))
            following = tokens[position + 1] if position + 1 < len(tokens) else None
            followed = following is not None and following[0][0].isupper()
            followed = followed and not title[token.end() : following.start()].strip()
            if not inside and (not followed or _is_function_word(word)):
                continue
            placed = True
        if end is not None and title[end : token.start()] == " " and not elided:
            names[-1].append(word)
        else:
            names.append([word])
        end = None if placed else token.end()
    return names


def _is_function_word(word: str) -> bool:
    return word.lower() in FUNCTION_WORDS or fold(word).replace("-", " ") in numerals(True)


def numbers_in(text: str, ordinals: bool = False) -> list[tuple[str, set[str]]]:
    """Return the numbers of a text, each as it stands there and with the values that it may have.

    In figures, 1 200, 1.200 and 1200 are one number, 3,5 and 3.5 too, 2,500 may be either, and
    "3 millions" is 3000000; in words, from deux on, without "neuf", which is also "new", and cent
    and mille alone, which are also "many". `ordinals`: and those, un and ordinals, for what a
    title's "1er" may come from, and 3 of "3 millions".
    """
    whole, text = text, CLOCK.sub("|", text)  # of the same length; 4x400 is not 4 400
    found = []
    for match in NUMBER.finditer(text):
        values = _values(match["number"])
        if scale := SCALE.match(text, match.end()):
            factor = SCALES[scale["short"] or scale["scale"].lower()]
            scaled = {_plain(float(value) * factor) for value in values if len(value) < 16}
            # Of "le 2 et 3 millions", who knows.
            values = scaled | values if ordinals or scale["range"] or not scaled else scaled
        found.append((whole[match.start() : match.end()], values))
    words = [(fold(match[0]), match.start(), match.end()) for match in WORD.finditer(text)]
    heads, position = numeral_heads(), 0
    while position < len(words):
        start, value = position, None
        if words[start][0] in heads:
            value, position = _spelled_number(text, words, start, ordinals)
        if value is not None:
            found.append((whole[words[start][1] : words[position - 1][2]], {str(value)}))
        position = max(position, start + 1)
    return found


def _spelled_number(text: str, words: list, start: int, ordinals: bool) -> tuple:
    """Return what the words from `start` on are worth together, or None, and where they end.

    deux cent mille: up to 999 is added up in `part`, and that in `total` by a scale, each of which
    is smaller than the one before. Of one number is what only spaces and hyphens stand between.
    """
    spelled, end = numerals(True), start + 1
    while end < len(words) and NEAR.fullmatch(text, words[end - 1][2], words[end][1]):
        end += 1
        if end - start == NUMERAL_WORDS:
            break
    words = [word for word, _, _ in words[start:end]]
    total, part, smallest, position = 0, None, math.inf, 0
    while position < len(words):
        word = words[position]
        scale = SCALES.get(word.removesuffix("s"), math.inf)
        if (word == "cent" and part is None) or (
            word in ("cent", "cents") and part and 1 < part < 20
        ):
            part, position = (part or 1) * 100, position + 1
        elif scale < smallest and (part or word == "mille"):
            total, part, smallest = total + (part or 1) * scale, None, scale
            position += 1
        elif part is None or (part and part % 100 == 0):
            for length in (4, 3, 2, 1):  # quatre-vingt-dix-neuf
                numeral = " ".join(words[position : position + length])
                if numeral in spelled and position + length <= len(words):
                    break
            else:
                break
            value = spelled[numeral]
            if position and (value == 0 or value >= 100):
                break
            part, position = (part or 0) + value, position + length
        else:
            break
    whole = " ".join(words[:position])
    known = ordinals or whole not in spelled or whole in numerals(False)
    return total + (part or 0) if position and known else None, start + position


def _values(number: str) -> set[str]:
    """Return the values of a number in figures, each in one way of writing it."""
    compact = re.sub(r"\s", "", number)
    values = set()
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+(?:,\d+)?|\d+(?:,\d+)?", compact):  # French
        values.add(compact.replace(".", "").replace(",", "."))
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?", compact):  # English
        values.add(compact.replace(",", ""))
    return {_trimmed(value) for value in values or {compact}}


def _trimmed(value: str) -> str:
    whole, _, decimals = value.partition(".")
    return (whole.lstrip("0") or "0") + ("." + decimals.rstrip("0")).rstrip(".")


def _plain(value: float) -> str:
    return _trimmed(f"{value:.3f}")


@functools.cache
def numerals(ordinals: bool) -> dict[str, int]:
    """Return French numbers in words, folded and without hyphens, by what they are worth."""
    units = (
        "zero un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze"
    )
    units = [*f"{units} seize".split(), "dix sept", "dix huit", "dix neuf"]
    tens = {20: "vingt", 30: "trente", 40: "quarante", 50: "cinquante", 60: "soixante"}
    spelled = {word: value for value, word in enumerate(units)}
    for ten, word in (tens | {80: "quatre vingt", 70: "septante", 90: "nonante"}).items():
        spelled[word] = ten
        for unit in range(1, 20 if ten in (60, 80) else 10):
            spelled[f"{word} {units[unit]}"] = ten + unit
            spelled[f"{word} et {units[unit]}"] = ten + unit
    spelled["quatre vingts"] = 80
    if not ordinals:
        for word in ("zero", "un", "neuf"):
            del spelled[word]
        return spelled
    cardinals = spelled | {"cent": 100, "mille": 1000}
    spelled = cardinals | {"une": 1, "premier": 1, "premiere": 1, "second": 2, "seconde": 2}
    for word, value in cardinals.items():
        root = re.sub("cinq$", "cinqu", re.sub("neuf$", "neuv", word.removesuffix("e")))
        spelled[f"{root}ieme"] = value
    return spelled


@functools.cache
def numeral_heads() -> frozenset[str]:
    return frozenset(spelled.split()[0] for spelled in numerals(True))


@functools.lru_cache(maxsize=1 << 16)
def fold(word: str) -> str:
    """Return a word without accents and capitals."""
    word = word.casefold().replace("œ", "oe").replace("æ", "ae")
    return "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """Return a folded word without the endings of plural and feminine."""
    shorter = word.rstrip("esx")
    if len(shorter) > 2:
        word = shorter[:-1] if shorter[-1] == shorter[-2] else shorter  # italienne
    return word


def _unique(items) -> list[str]:
    return list(dict.fromkeys(items))
