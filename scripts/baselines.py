"""Titles that need no model: what a fine-tuned one must be read against.

`lead1` is the first sentence of an article, `first40` its first 40 words (any number will do), and
`ext-oracle` the sentence that scores best, which knows the true title: a bound for copying one.
"""

import re

from exit_codes import UserError

NAMES = "lead1, first40 (or another number of words) or ext-oracle"
FIRST = re.compile(r"first:?([1-9]\d{0,3})")
# Where a sentence may end: behind a closing quote too, and before a capital without a space, for
# that is how paragraphs are joined in the challenge's articles ("Venise.Selon le quotidien").
# A row of dots is looked at once, from its first: it may have thousands.
SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]+(?:\s?[»”]|\")?(?:\s+(?=[A-ZÀ-ÖØ-Þ«“\"])|(?=[A-ZÀ-ÖØ-Þ«“]))|\n+"
)
NO_END = re.compile(r"(?:\b[A-ZÀ-ÖØ-Þ]|\bMM|\bMmes?|\bMlles?|\bDr|\bMe|\bSt|\bSte)$")  # "M. Macron"
MAX_WORDS = 400  # of what is taken for a sentence; a page without any full stop has no lead


def check_baselines(names: list[str]) -> None:
    """Refuse what is no baseline.

    Raises:
        UserError: as said.
    """
    for name in names:
        if name not in ("lead1", "ext-oracle") and not FIRST.fullmatch(name):
            raise UserError(f"--baselines {name}", "there is no such baseline", f"give {NAMES}")


def write_title(baseline: str, article: str, reference: str | None, score) -> str:
    """Return a baseline's title; `score(reference, title)` is what `ext-oracle` goes by."""
    if match := FIRST.fullmatch(baseline):
        return " ".join(article.split(None, int(match[1]))[: int(match[1])])
    found = sentences(article)
    if baseline == "lead1":
        return found[0]
    return max(found, key=lambda sentence: score(reference, sentence))  # the first of the best


def sentences(article: str) -> list[str]:
    """Return the sentences of a text, each as one line; there is at least one."""
    found, start = [], 0
    for end in SENTENCE_END.finditer(article):
        if end[0][0] == "." and NO_END.search(article, max(start, end.start() - 8), end.start()):
            continue
        found.append(article[start : end.end()])
        start = end.end()
    found.append(article[start:])
    lines = [" ".join(sentence.split(None, MAX_WORDS)[:MAX_WORDS]) for sentence in found]
    return [line for line in lines if line] or [""]
