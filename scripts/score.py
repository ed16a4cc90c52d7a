"""Score predicted titles against the true ones: ROUGE, length, language.

    python scripts/score.py --references valid.csv --predictions a.csv B=b.csv --output_dir scores

Prints a table with one row per predictions file, named by its file or by NAME=, and writes
scores.json to the output folder. Titles are paired by ID, or by row where there are no IDs.
"""

import argparse
import functools
import importlib.metadata
import os
import statistics
import sys
import tempfile
from pathlib import Path

from articles import SUFFIXES, Checked, Columns, check_articles, iterate_articles
from exit_codes import UserError, run
from run_folder import write_json

SPLIT = "validation"  # of a Hub dataset that names none
# What a language model may answer in. py3langid knows 139 languages, and short titles get lost
# among the neighbours of French (Occitan, Walloon, Catalan): of the first 3 words of 1,500 real
# titles it takes 86 % for French, 95 % when it chooses among these, and all 1,500 whole ones.
# It always chooses: a title of one or two words is a guess, and so is one of names only.
LANGUAGES = ("ar", "de", "en", "es", "fr", "it", "nl", "pt", "ru", "zh")
PACKAGES = ("evaluate", "rouge_score", "py3langid")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument("--references", required=True, metavar="FILE", help="the true titles")
    files.add_argument("--predictions", required=True, nargs="+", help="each [NAME=]FILE")
    files.add_argument("--output_dir", required=True, metavar="FOLDER", help="for scores.json")
    columns = parser.add_argument_group("columns", "Default: the challenge's and infer.py's names.")
    columns.add_argument("--title_column", default="titles", help="of the references")
    columns.add_argument("--id_column", default="ID", help="of the references")
    columns.add_argument("--prediction_title_column", default="titles", help="of the predictions")
    columns.add_argument("--prediction_id_column", default="ID", help="of the predictions")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)

    # --- Check everything: all that takes seconds to import waits until this is passed ---
    files = name_files(args.predictions)
    columns = Columns(text=None, title=args.title_column, id=args.id_column)
    checked_references, references = read_titles(args.references, columns)
    columns = Columns(None, args.prediction_title_column, args.prediction_id_column)
    checked, predictions = {}, {}
    for name, path in files.items():
        checked[name], titles = read_titles(path, columns, empty_titles=True)
        predictions[name] = align(checked[name], titles, checked_references, references)
    scores_file = make_output_dir(args.output_dir) / "scores.json"

    # --- Score ---
    true_titles = list(references.values())
    scores = {
        "references": file_facts(checked_references) | describe_titles(true_titles),
        "predictions": {
            name: file_facts(checked[name]) | score_titles(titles, true_titles)
            for name, titles in predictions.items()
        },
    }

    # --- Show and save ---
    from title_rouge import TOKENIZER_NAMES

    scores["tokenizers"] = TOKENIZER_NAMES
    scores["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    write_json(scores_file, scores)
    print(format_table(scores))
    print(f"\nall figures: {scores_file}")
    return 0


def score_titles(predictions: list[str], references: list[str], language: bool = True) -> dict:
    """Score titles against the true ones, pair by pair.

    Returns:
        `describe_titles` of the predictions, and `rouge`: for each tokenizer the mean F-measure
        of rouge1, rouge2, rougeL and rougeLsum, where an empty title scores 0.

    Raises:
        ValueError: there is no pair, or one list is longer.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    metric_class, tokenizers = import_rouge()
    # A metric makes a folder as soon as it exists, by default in the user's home, which may be
    # read-only on a compute node. `evaluate.load` would copy the module there as well.
    with tempfile.TemporaryDirectory(prefix="manchette-", ignore_cleanup_errors=True) as folder:
        metric = metric_class(cache_dir=folder, keep_in_memory=True)
        rouge = {
            tokenizer: metric.compute(
                predictions=predictions, references=references, tokenizer=tokenizer
            )
            for tokenizer in tokenizers
        }
    return {"rouge": rouge} | describe_titles(predictions, language)


def describe_titles(titles: list[str], language: bool = True) -> dict:
    """Describe titles by themselves.

    Returns:
        `empty`: how many hold nothing but spaces; `words`: their mean number over all titles; and
        if asked for, `language`: the shares of French, English and other among those not empty
        (None if all are).
    """
    filled = [title for title in titles if title.strip()]
    description = {
        "empty": len(titles) - len(filled),
        "words": {"mean": statistics.fmean(count_words(title) for title in titles)},
    }
    if language:
        classify = language_classifier()
        found = [classify(title)[0] for title in filled]
        french, english = (found.count(code) for code in ("fr", "en"))
        counts = {"french": french, "english": english, "other": len(found) - french - english}
        description["language"] = {
            name: count / len(found) if found else None for name, count in counts.items()
        }
    return description


def count_words(title: str) -> int:
    """French sets « : » and guillemets between spaces: they are no words."""
    return sum(any(character.isalnum() for character in word) for word in title.split())


@functools.cache
def language_classifier():
    import py3langid

    py3langid.set_languages(LANGUAGES)
    return py3langid.classify


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


def name_files(arguments: list[str]) -> dict[str, str]:
    """Return the path of each predictions file by its name, NAME= or the file's own."""
    files = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).is_file():  # a path may well hold lr=2e-4
            path = argument
            name = Path(path).name
            suffixes = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
            name = name[: len(name) - max(map(len, suffixes), default=0)]
        if not name or not name.isprintable():
            raise UserError(argument, "no name for this row", "give NAME=FILE")
        if name in files:
            raise UserError(
                path, f"a second file is called '{name}'", "tell them apart by NAME=FILE"
            )
        files[name] = path
    return files


def read_titles(
    path: str, columns: Columns, empty_titles: bool = False
) -> tuple[Checked, dict[str, str]]:
    """Return what is known about a file and its titles by ID."""
    checked = check_articles(path, columns, SPLIT, empty_titles)
    return checked, {row["id"]: row["title"] for row in iterate_articles(path, columns, SPLIT)}


def align(
    checked: Checked, titles: dict[str, str], checked_references: Checked, references: dict
) -> list[str]:
    """Return the predicted titles in the order of the references.

    Raises:
        UserError: the two files do not hold the same IDs.
    """
    of = checked_references.path
    if checked_references.has_ids:
        rows = [str(row) for row in range(len(references))]
        if not checked.has_ids and list(references) != rows:
            raise UserError(
                checked.path,
                f"no IDs in it, and those of {of} are not its row numbers",
                "add the column or name it with --prediction_id_column",
            )
    else:
        of += ", whose rows are counted from 0"
    if missing := [identity for identity in references if identity not in titles]:
        raise UserError(
            checked.path,
            f"no title for ID {missing[0]!r} of {of} ({len(missing)} missing)",
            "predict the titles of that whole file",
        )
    if extra := [identity for identity in titles if identity not in references]:
        raise UserError(
            checked.path,
            f"ID {extra[0]!r} is not in {of} ({len(extra)} too many)",
            "give the references of the articles that were predicted",
        )
    return [titles[identity] for identity in references]


def make_output_dir(output_dir: str) -> Path:
    """Make the folder. It need not be empty: of what is in it only scores.json is replaced."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            output_dir, f"no folder can be made ({error.strerror})", "give another --output_dir"
        ) from None
    if not os.access(folder, os.W_OK) or (folder / "scores.json").is_dir():
        raise UserError(output_dir, "scores.json cannot be written", "give another --output_dir")
    return folder


def file_facts(checked: Checked) -> dict:
    return {"path": checked.path, "rows": checked.rows, "sha256": checked.sha256}


def format_table(scores: dict) -> str:
    """Lay the scores out as a table that is 80 columns wide."""

    def line(name, figures, titles):
        if len(name) > 18:  # both ends are kept: names often differ in the last letters
            name = f"{name[:8]}..{name[-8:]}"
        share = titles["language"]["french"]
        share = "-" if share is None else f"{share:.1%}"
        cells = [f"{'-' if figure is None else format(figure, '.4f'):>8}" for figure in figures]
        words = f"{titles['words']['mean']:7.1f}"
        return f"{name:<18}{''.join(cells)}{words}{share:>8}{titles['empty']:>7}"

    lines = [
        f"{'ROUGE F':<18}  {' comparable ':-^30}  unicode{'French':>15}",
        f"{'':<18}{'R-1':>8}{'R-2':>8}{'R-L':>8}{'R-Lsum':>8}{'R-L':>8}"
        f"{'words':>7}{'titles':>8}{'empty':>7}",
        "-" * 80,
        line("(references)", [None] * 5, scores["references"]),
    ]
    for name, titles in scores["predictions"].items():
        default, unicode = titles["rouge"]["default"], titles["rouge"]["unicode"]
        lines.append(line(name, [*default.values(), unicode["rougeL"]], titles))
    lines += [
        "-" * 80,
        f"Means over {scores['references']['rows']} titles, of which an empty one scores 0.",
        "comparable: rouge_score's tokenizer, no stemmer, as published scores have it (it",
        "drops accented letters). unicode: words keep their accents.",
        "French titles: share of those that are not empty.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
