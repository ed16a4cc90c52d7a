"""The figures of many titles, row by row, on all processors that this process may use.

Articles pass by one at a time; what stays of each row are some 200 bytes of figures per system,
the titles, and what is flagged in them.
"""

import hashlib
import multiprocessing
import os
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from baselines import write_title
from machine import num_cores
from title_facts import (
    NGRAMS,
    Article,
    count_words,
    language_classifier,
    loop_in,
    novelty,
    words_of,
)

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LANGUAGES = ("french", "english", "other", "none")  # none: a title without a letter
# The first four are about a title itself, the others about what its article does not say.
FLAGS = ("empty", "repeated", "looping", "cut", "numbers", "names", "quotations")
CHUNK_ROWS = 100  # that a process is given at a time
FEW_TITLES = 2_000  # are done here, before another process would have imported what it needs


class Figures:
    """What is known of each title of one system, in arrays over the rows.

    Attributes:
        rouge: by tokenizer and type, F-measures; None for the true titles.
        words: number of words.
        language: index in LANGUAGES.
        novel: shares of 1- to 4-grams that are not in the article, shape [4, rows]; NaN where
            there is no such n-gram, or no article.
        flags: by name, booleans; None where it could not be looked at.
        marked: by row, then by flag, the words that it is about.
    """

    def __init__(self, rows: int, tokenizers: Iterable[str] | None, articles: bool, cut):
        import numpy

        self.rouge = tokenizers and {
            tokenizer: {name: numpy.zeros(rows) for name in ROUGE_TYPES} for tokenizer in tokenizers
        }
        self.words = numpy.zeros(rows, dtype=numpy.int32)
        self.language = numpy.zeros(rows, dtype=numpy.int8)
        self.novel = numpy.full((len(NGRAMS), rows), numpy.nan)
        self.flags = {name: numpy.zeros(rows, dtype=bool) for name in FLAGS}
        self.flags["cut"] = cut if cut is None else numpy.array(cut, dtype=bool)
        if not articles:
            self.flags |= dict.fromkeys(("numbers", "names", "quotations"))
        self.marked = {}
        self._hashes = numpy.zeros(rows, dtype=numpy.uint64)

    def fill(self, rows, found: dict) -> None:
        """Take over what `measure_chunk` found for some rows."""
        for tokenizer, types in found["rouge"].items():
            for name, values in types.items():
                self.rouge[tokenizer][name][rows] = values
        self.words[rows], self.language[rows] = found["words"], found["language"]
        self._hashes[rows] = found["hash"]
        for n, values in enumerate(zip(*found["novel"], strict=True)):
            self.novel[n, rows] = [float("nan") if value is None else value for value in values]
        for row, marks in zip(rows, found["marks"], strict=True):
            for name in marks:
                self.flags[name][row] = True
            marks = {name: words for name, words in marks.items() if words}
            if marks:
                self.marked[row] = marks

    def flags_of(self, row: int) -> dict[str, list[str]]:
        """Return what is flagged in a title, and the words that it is about, if there are any."""
        marked = self.marked.get(row, {})
        return {
            name: marked.get(name, [])
            for name, flags in self.flags.items()
            if flags is not None and flags[row]
        }

    def finish(self) -> None:
        """Flag the titles that stand there more than once."""
        import numpy

        _, inverse, counts = numpy.unique(self._hashes, return_inverse=True, return_counts=True)
        self.flags["repeated"] = (counts[inverse] > 1) & ~self.flags["empty"]


def measure(
    references: list[str] | None,
    systems: dict[str, list[str]],
    cut: dict[str, list[bool] | None],
    articles: Iterator[tuple[int, str]] | None = None,
    baselines: Iterable[str] = (),
    shown: Iterable[int] = (),
) -> tuple[dict, dict, dict]:
    """Measure the titles of each system.

    Args:
        references: the true titles, in the order of the rows; None if there are none.
        systems: by name, titles in the same order.
        cut: by name, whether each title was stopped by the limit of its length, if that is known.
        articles: each row's index and text, in any order.
        baselines: names of `baselines`, whose titles are written here.
        shown: rows of which articles and the baselines' titles are wanted.

    Returns:
        Figures by name, with None for the references; the texts of articles by row; and the
        baselines' titles by name and row.
    """
    from tqdm import tqdm

    tokenizers = import_rouge()[1] if references is not None else ()
    rows = len(references if references is not None else next(iter(systems.values())))
    with_articles = articles is not None
    figures = {name: Figures(rows, tokenizers, with_articles, cut.get(name)) for name in systems}
    figures |= {name: Figures(rows, tokenizers, with_articles, None) for name in baselines}
    if references is not None:
        figures[None] = Figures(rows, None, with_articles, None)
    articles = articles if with_articles else ((row, None) for row in range(rows))
    shown, texts, written = set(shown), {}, {name: {} for name in baselines}

    def chunks():
        for chunk in _chunks(articles):
            texts.update((row, text) for row, text in chunk if row in shown and text is not None)
            true = None if references is None else [references[row] for row, _ in chunk]
            titles = {name: [titles[row] for row, _ in chunk] for name, titles in systems.items()}
            yield [row for row, _ in chunk], ([text for _, text in chunk], true, titles, baselines)

    processes = min(8, num_cores())
    if rows * len(figures) < FEW_TITLES:
        processes = 1
    # To a terminal or a log, once it has taken 2 seconds.
    with tqdm(total=rows, desc="scoring", unit="row", delay=2, file=sys.stderr) as progress_bar:
        for indices, (found, own) in _in_order(measure_chunk, chunks(), processes):
            for name, of_name in found.items():
                figures[name].fill(indices, of_name)
            for name, titles in own.items():
                written[name] |= {
                    row: title for row, title in zip(indices, titles, strict=True) if row in shown
                }
            progress_bar.update(len(indices))
    for of_name in figures.values():
        of_name.finish()
    return figures, texts, written


def measure_chunk(articles, references, titles, baselines) -> tuple[dict, dict]:
    """Return what is found in the titles of some rows, by system, and the baselines' titles."""
    own = {}
    if baselines:
        score = _sentence_score()
        for name in baselines:
            pairs = zip(articles, references or [None] * len(articles), strict=True)
            own[name] = [write_title(name, text, true, score) for text, true in pairs]
    everything = titles | own
    found = {name: _facts(of_name) for name, of_name in everything.items()}
    if references is not None:
        for name, of_name in everything.items():
            found[name]["rouge"] = rouge_rows(of_name, references)
        everything = everything | {None: references}
        found[None] = _facts(references)
    for row, text in enumerate(articles):
        if text is None:
            continue
        article = Article(text)
        shares = novelty([of_name[row] for of_name in everything.values()], words_of(text))
        for (name, of_name), share in zip(everything.items(), shares, strict=True):
            found[name]["novel"][row] = share
            for flag, words in (
                ("numbers", article.lacks_numbers(of_name[row])),
                ("names", article.lacks_names(of_name[row])),
                ("quotations", article.lacks_quotations(of_name[row])),
            ):
                if words:
                    found[name]["marks"][row][flag] = words
    return found, own


def _facts(titles: list[str]) -> dict:
    classify = language_classifier()
    codes = {"fr": 0, "en": 1}

    def language(title: str) -> int:
        return codes.get(classify(title)[0], 2) if any(map(str.isalpha, title)) else 3

    marks = []
    for title in titles:
        marks.append({} if title.strip() else {"empty": []})
        if loop := loop_in(title):
            marks[-1]["looping"] = [loop]
    return {
        "rouge": {},
        "words": [count_words(title) for title in titles],
        "language": [language(title) for title in titles],
        "hash": [_hash(title) for title in titles],
        "novel": [[None] * len(NGRAMS) for _ in titles],
        "marks": marks,
    }


def _hash(title: str) -> int:
    """Return the same number for a title whatever its capitals and spaces, in any process."""
    plain = " ".join(title.casefold().split()).encode()
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest())


def rouge_rows(predictions: list[str], references: list[str]) -> dict:
    """Return by tokenizer and type each row's F-measure."""
    return _rouge(predictions, references, use_aggregator=False)


def rouge_means(predictions: list[str], references: list[str]) -> dict:
    """Return by tokenizer and type the mean F-measure over rows, where an empty title scores 0.

    Raises:
        ValueError: there is no pair, or one list is longer.
    """
    return _rouge(predictions, references, use_aggregator=True)


def _rouge(predictions, references, use_aggregator: bool) -> dict:
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    metric_class, tokenizers = import_rouge()
    # A metric makes a folder as soon as it exists, by default in the user's home, which may be
    # read-only on a compute node. `evaluate.load` would copy the module there as well.
    with tempfile.TemporaryDirectory(prefix="manchette-", ignore_cleanup_errors=True) as folder:
        metric = metric_class(cache_dir=folder, keep_in_memory=True)
        return {
            tokenizer: metric.compute(
                predictions=predictions,
                references=references,
                tokenizer=tokenizer,
                use_aggregator=use_aggregator,
            )
            for tokenizer in tokenizers
        }


def import_rouge():
    """Import the metric and its tokenizers without torch."""
    # `evaluate` imports transformers, and so torch, for pipelines that ROUGE has no use for: 3 of
    # 4 seconds. None in sys.modules makes it believe that there is none; train.py has it already.
    hide = "transformers" not in sys.modules
    if hide:
        sys.modules["transformers"] = None
    try:
        from title_rouge import TOKENIZERS, TitleRouge
    finally:
        if hide:
            del sys.modules["transformers"]
    return TitleRouge, TOKENIZERS


def _sentence_score():
    """Return a function that scores a sentence as the table's ROUGE-L does."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=import_rouge()[1]["default"])
    return lambda reference, sentence: scorer.score(reference, sentence)["rougeL"].fmeasure


def _chunks(articles: Iterator) -> Iterator[list]:
    """Yield rows in lists that are bounded in memory: an article may have megabytes."""
    chunk, characters = [], 0
    for row, text in articles:
        chunk.append((row, text))
        characters += len(text or "")
        if len(chunk) == CHUNK_ROWS or characters > 1 << 22:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _in_order(function, tasks: Iterator, processes: int) -> Iterator:
    """Yield each task's rows and `function` of the rest, with few tasks waiting at a time."""
    if processes == 1:
        for rows, arguments in tasks:
            yield rows, function(*arguments)
        return
    # Not by fork: the libraries here have threads, which would be lost with their locks held.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_end_with_parent) as pool:
        waiting = deque()
        try:
            for rows, arguments in tasks:
                waiting.append((rows, pool.submit(function, *arguments)))
                if len(waiting) > 2 * processes:
                    rows, future = waiting.popleft()
                    yield rows, future.result()
            for rows, future in waiting:
                yield rows, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when the one that started it is killed: it would wait for work for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def describe(figures: Figures) -> dict:
    """Return the figures of one system over all its rows.

    `language` are shares of the titles that have a letter (None if none has), `novel` the mean
    shares of n-grams that are not in the article, by n, and `flags` numbers of titles; None stands
    for what could not be looked at.
    """
    import numpy

    quartiles = numpy.percentile(figures.words, [25, 50, 75]).tolist()
    counts = Counter(figures.language.tolist())
    filled = len(figures.language) - counts[LANGUAGES.index("none")]
    known = ~numpy.isnan(figures.novel)
    return {
        "empty": int(figures.flags["empty"].sum()),
        "words": {"mean": float(figures.words.mean())}
        | dict(zip(("q1", "median", "q3"), quartiles, strict=True)),
        "language": {
            name: counts[code] / filled if filled else None
            for code, name in enumerate(LANGUAGES[:-1])
        },
        "novel": {
            str(n): float(shares[there].mean()) if there.any() else None
            for n, shares, there in zip(NGRAMS, figures.novel, known, strict=True)
        },
        "flags": {
            name: None if flags is None else int(flags.sum())
            for name, flags in figures.flags.items()
            if name != "empty"
        },
    }
