"""Score titles of any number of systems against the true ones, and show them in a report.

    python scripts/score.py --references valid.csv --predictions a.csv B=b.csv \\
        --baselines lead1 first40 ext-oracle --output_dir scores

Prints tables with one row per system, named by its file or by NAME=, and writes scores.json,
flags.jsonl and report.html. Titles are paired by ID, or by row where there are no IDs. Without true
titles, give --articles: all but the scores is there. Predictions may come from anywhere.
"""

import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path

from articles import SUFFIXES, Checked, Columns, check_articles, evenly_spaced, iterate_articles
from baselines import check_baselines
from exit_codes import ArgumentParser, UserError, note, run, writing
from model_card import write_results
from plots import TRUE
from run_folder import read_metrics, read_run_config, write_json

# Of a Hub dataset that names none; of articles as infer.py has it.
SPLIT, ARTICLES_SPLIT = "validation", "test"
PACKAGES = ("evaluate", "rouge_score", "scipy", "py3langid")
SCORES, FLAGGED, REPORT = "scores.json", "flags.jsonl", "report.html"
MADE_BY = ("model", "adapter", "base_weights", "precision", "decoding", "max_new_tokens")
SHOWN_ROWS = 2_000  # of larger files, so many evenly spaced rows are listed in the report
FEW_ROWS = 30  # of fewer, a bootstrap's intervals are too narrow: of 10, they hold 90 % for 95
BASELINES_HELP = "any of lead1, first40 (or another number), ext-oracle"
RUNS_HELP = "of train.py or merge.py: curves, memory; results into their cards"


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--references", metavar="FILE", help="the true titles")
    several = {"action": "extend", "nargs": "+", "default": []}
    add("--predictions", **several, metavar="[NAME=]FILE", help="titles, by system")
    add("--articles", metavar="FILE", help="(default: the references, if they have the column)")
    add("--runs", **several, metavar="FOLDER", help=RUNS_HELP)
    add("--output_dir", required=True, metavar="FOLDER", help=f"for {REPORT} and the figures")
    add = parser.add_argument_group("comparison").add_argument
    add("--baselines", **several, metavar="NAME", help=BASELINES_HELP)
    add("--compare_to", metavar="NAME", help="p-values against it (default: the first one)")
    columns = parser.add_argument_group("columns", "Default: the challenge's and infer.py's names.")
    add = columns.add_argument
    add("--text_column", default="text", help="of the articles")
    add("--title_column", default="titles", help="of the references")
    add("--id_column", default="ID", help="of the references and the articles")
    add("--prediction_title_column", default="titles", help="of the predictions")
    add("--prediction_id_column", default="ID", help="of the predictions")
    args = parser.parse_args(argv)
    if not args.predictions + args.baselines + args.runs:
        parser.error("nothing to show: give --predictions, --baselines or --runs")
    if args.predictions + args.baselines and not (args.references or args.articles):
        parser.error("--references: give the true titles, or at least the --articles")
    if "ext-oracle" in args.baselines and not args.references:
        parser.error("--baselines ext-oracle: it chooses by the true titles; give --references")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)

    # --- Check everything: all that takes seconds to import waits until this is passed ---
    check_baselines(args.baselines)
    files = name_files(args.predictions)
    names = [*files, *args.baselines]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--baselines {doubled}", "a second row of that name", "leave one out")
    if args.compare_to not in (None, *names):
        raise UserError(
            f"--compare_to {args.compare_to}",
            "there is no such row",
            f"give one of {', '.join(names)}",
        )
    runs = {folder: (read_run_config(folder), read_metrics(folder)) for folder in args.runs}
    scores, details, measured = {}, {}, None
    if names:
        measured = read_files(args, files)
    output_dir = make_output_dir(args.output_dir)

    # --- Measure, save and show ---
    from report import write_report

    if measured is not None:
        scores, figures, sample = score_files(args, names, *measured)
        details = measured[-1]
        write_json(output_dir / SCORES, scores)
        write_flags(output_dir / FLAGGED, measured[0], figures)
        write_report(output_dir / REPORT, scores, runs, figures, sample)
    else:
        write_report(output_dir / REPORT, scores, runs)
    for folder, (run_config, _) in runs.items():
        write_results(folder, run_config, scores, details)
    if measured is not None:  # shown last: whoever reads it may not read it all, as `| head`
        print(format_tables(scores))
        print(f"\nall figures: {output_dir / SCORES}, {output_dir / FLAGGED}")
    print(f"report: {output_dir / REPORT}")
    return 0


# --- Reading -------------------------------------------------------------------------------------


def read_files(args, files: dict[str, str]) -> tuple:
    """Read and check all titles, and what is known of their articles.

    Returns:
        The IDs in order; the true titles, or None; the titles by system; the file of the articles,
        or None; what is known of each file; and what infer.py noted beside its predictions.
    """
    checked, references = {}, None
    if args.references:
        columns = Columns(text=None, title=args.title_column, id=args.id_column)
        checked["references"], references = read_titles(args.references, columns)
    # As a title, for those may be empty: an article that is empty should not stop the scores.
    texts = Columns(text=None, title=args.text_column, id=args.id_column)
    articles = args.articles or (args.references if has_column(args.references, texts) else None)
    if articles:
        split = ARTICLES_SPLIT if args.articles else SPLIT
        checked["articles"] = check_articles(articles, texts, split, empty_titles=True)
    elif args.baselines:
        raise UserError(
            "--baselines", "they are made of articles", "give the file of them with --articles"
        )
    first = checked.get("references") or checked["articles"]
    ids = list(references or (row["id"] for row in iterate_articles(articles, texts, split)))
    rows = {identity: row for row, identity in enumerate(ids)}
    if articles:
        check_ids_of_articles(articles, texts, split, checked["articles"], first, rows)

    columns = Columns(None, args.prediction_title_column, args.prediction_id_column)
    predictions, details = {}, {}
    for name, path in files.items():
        checked[f"predictions {name}"], titles = read_titles(path, columns, empty_titles=True)
        predictions[name] = align(checked[f"predictions {name}"], titles, first, rows)
        details[name] = read_details(path, ids, predictions[name])
    references = None if references is None else list(references.values())
    articles = articles and (articles, texts, split, rows)
    return ids, references, predictions, articles, checked, details


def name_files(arguments: list[str]) -> dict[str, str]:
    """Return the path of each predictions file by its name, NAME= or the file's own."""
    files = {}
    for argument in arguments:
        parts = argument.split("=")
        splits = [("=".join(parts[:n]), "=".join(parts[n:])) for n in range(1, len(parts))]
        if splits and not Path(argument).is_file():  # a name or a path may well hold lr=2e-4
            name, path = next((s for s in splits if Path(s[1]).is_file()), splits[0])
        else:
            path = argument
            name = Path(path).name
            suffixes = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
            name = name[: len(name) - max(map(len, suffixes), default=0)]
        if not name or not name.isprintable() or name.strip("()") == TRUE:
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


def has_column(path: str | None, columns: Columns) -> bool:
    """Return whether the first row of a file has a column of articles."""
    try:
        next(iterate_articles(path, columns, SPLIT))
    except UserError:
        return False
    return True


def align(checked: Checked, titles: dict[str, str], of: Checked, rows: dict) -> list[str]:
    """Return the predicted titles in the order of the references (or the articles).

    Raises:
        UserError: the two files do not hold the same IDs.
    """
    where = of.path
    if of.has_ids:
        if not checked.has_ids and any(identity != str(row) for identity, row in rows.items()):
            raise UserError(
                checked.path,
                f"no IDs in it, and those of {where} are not its row numbers",
                "add the column or name it with --prediction_id_column",
            )
    else:
        where += ", whose rows are counted from 0"
    if missing := [identity for identity in rows if identity not in titles]:
        raise UserError(
            checked.path,
            f"no title for ID {missing[0]!r} of {where} ({len(missing)} missing)",
            "predict the titles of that whole file",
        )
    if extra := [identity for identity in titles if identity not in rows]:
        raise UserError(
            checked.path,
            f"ID {extra[0]!r} is not in {where} ({len(extra)} too many)",
            "give the references of the articles that were predicted",
        )
    return [titles[identity] for identity in rows]


def check_ids_of_articles(
    path: str, columns: Columns, split: str, checked: Checked, of: Checked, rows: dict
) -> None:
    """Refuse a file without the article of each title; it may hold others as well.

    Raises:
        UserError: as said.
    """
    if checked.path == of.path:
        return
    numbered = all(identity == str(row) for identity, row in rows.items())
    if not (checked.has_ids or numbered) or (not of.has_ids and checked.rows != len(rows)):
        raise UserError(
            path, f"its rows cannot be paired with those of {of.path}", "add the column of IDs"
        )
    missing = rows.keys() - {row["id"] for row in iterate_articles(path, columns, split)}
    if missing:
        raise UserError(
            path,
            f"no article for ID {min(missing)!r} of {of.path} ({len(missing)} missing)",
            "give the articles of that file",
        )


def iterate_texts(path: str, columns: Columns, split: str, rows: dict) -> Iterator[tuple[int, str]]:
    """Yield the row and the text of each article that there is a title for."""
    for article in iterate_articles(path, columns, split):
        if article["id"] in rows:
            yield rows[article["id"]], article["title"]


def read_details(path: str, ids: list[str], titles: list[str]) -> dict | None:
    """Return what infer.py wrote beside a CSV: its record, and `cut`, whether each title was
    stopped by the limit of its length. None if there is no such file, or it tells of other titles.
    """
    file = Path(path).with_suffix(".jsonl")
    if not path.endswith(".csv") or not file.is_file():
        return None
    try:
        with file.open(encoding="utf-8") as stream:
            record = json.loads(next(stream))
            rows = {row["id"]: row for row in map(json.loads, stream)}
        told = [(rows[identity]["title"], rows[identity]["stopped_by"]) for identity in ids]
        if not isinstance(record, dict) or [title for title, _ in told] != titles:
            raise ValueError("other titles")
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        note(f"{file} is not of the titles in {path}, and is left aside")
        return None
    return {"record": record, "cut": [stopped_by == "length" for _, stopped_by in told]}


def make_output_dir(output_dir: str) -> Path:
    """Make the folder. It need not be empty: of what is in it only our own files are replaced."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            output_dir, f"no folder can be made ({error.strerror})", "give another --output_dir"
        ) from None
    for name in (SCORES, FLAGGED, REPORT):
        if not os.access(folder, os.W_OK) or (folder / name).is_dir():
            raise UserError(output_dir, f"{name} cannot be written", "give another --output_dir")
    return folder


# --- Scoring -------------------------------------------------------------------------------------


def score_files(args, names, ids, references, predictions, articles, checked, details) -> tuple:
    """Return the scores as they are written, the figures of each title, and what is shown of them:
    evenly spaced rows with their IDs, articles and titles."""
    from title_figures import describe, measure

    sample = evenly_spaced(len(ids), SHOWN_ROWS)
    cut = {name: found["cut"] for name, found in details.items() if found}
    texts = articles and iterate_texts(*articles)
    figures, texts, written = measure(references, predictions, cut, texts, args.baselines, sample)
    scores = {"rows": len(ids)}
    if articles:
        scores["articles"] = file_facts(checked["articles"])
    if references is not None:
        scores["references"] = file_facts(checked["references"]) | describe(figures[None])
    scores["predictions"] = {}
    for name in names:
        file = checked.get(f"predictions {name}")
        source = file_facts(file) if file else {"baseline": name}
        scores["predictions"][name] = source | describe(figures[name])
    for name, found in details.items():
        if found:
            made_by = {key: found["record"].get(key) for key in MADE_BY}
            scores["predictions"][name]["made_by"] = {
                key: value for key, value in made_by.items() if isinstance(value, str | int)
            }
    if references is not None:
        add_rouge(scores, figures, args.compare_to or names[0])
    scores["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}

    titles = {None: references} if references is not None else {}
    titles = {
        name: {row: of_name[row] for row in sample}
        for name, of_name in (titles | predictions).items()
    }
    shown = {"rows": sample, "ids": ids, "texts": texts, "titles": titles | written}
    return scores, figures, shown


def file_facts(checked: Checked) -> dict:
    return {"path": checked.path, "rows": checked.rows, "sha256": checked.sha256}


def add_rouge(scores: dict, figures: dict, compare_to: str) -> None:
    """Add to the scores of each system its means with their intervals and, for all but one, how
    they differ from those of that one."""
    import statistics

    import numpy

    from intervals import CONFIDENCE, RESAMPLES, SEED, Bootstrap
    from title_figures import ROUGE_TYPES, import_rouge

    import_rouge()  # without transformers; what it imports stays imported
    from title_rouge import TOKENIZER_NAMES

    keys = [
        (name, tokenizer, rouge_type)
        for name in scores["predictions"]
        for tokenizer in TOKENIZER_NAMES
        for rouge_type in ROUGE_TYPES
    ]
    columns = [figures[name].rouge[tokenizer][kind] for name, tokenizer, kind in keys]
    bootstrap = Bootstrap(numpy.stack(columns)) if scores["rows"] > 1 else None
    for name, system in scores["predictions"].items():
        system |= {key: {t: {} for t in TOKENIZER_NAMES} for key in ("rouge", "intervals")}
        if name != compare_to and bootstrap:
            system["compared"] = {tokenizer: {} for tokenizer in TOKENIZER_NAMES}
    for index, (name, tokenizer, kind) in enumerate(keys):
        system = scores["predictions"][name]
        # Summed exactly, as the metric does it.
        system["rouge"][tokenizer][kind] = statistics.fmean(columns[index].tolist())
        interval = bootstrap.intervals[index].tolist() if bootstrap else None
        system["intervals"][tokenizer][kind] = interval
        if "compared" in system:
            other = keys.index((compare_to, tokenizer, kind))
            system["compared"][tokenizer][kind] = bootstrap.compare(index, other)
    scores["compared_to"] = compare_to
    scores["tokenizers"] = TOKENIZER_NAMES
    scores["bootstrap"] = {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": SEED}


def write_flags(path: Path, ids: list[str], figures: dict) -> None:
    """Write a line for each title that is flagged, with the words that each flag is about.

    The system of the true titles is null.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        temporary.unlink(missing_ok=True)  # were it a link, what it names would be overwritten
        with temporary.open("x", encoding="utf-8") as stream:
            for row, identity in enumerate(ids):
                for name, of_name in figures.items():
                    flags = of_name.flags_of(row)
                    if flags:
                        line = {"id": identity, "system": name, "flags": flags}
                        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(temporary, path)


# --- Tables --------------------------------------------------------------------------------------


def format_tables(scores: dict) -> str:
    """Lay the scores out as tables that are 80 columns wide."""
    systems = scores["predictions"]
    everything = {f"({TRUE})": scores["references"]} if "references" in scores else {}
    everything |= systems
    lines = []
    if "references" in scores:
        lines += [
            f"{'ROUGE F':<18}{' comparable ':-^49}{'unicode':>9}",
            f"{'':<18}{'R-1':>7}{'R-2':>7}{'R-L':>7}{'95 % of R-L':>15}{'p':>6}{'R-Lsum':>7}"
            f"{'R-L':>9}",
            "-" * 80,
        ]
        for name, system in systems.items():
            default = system["rouge"]["default"]
            interval = system["intervals"]["default"]["rougeL"]
            interval = "-" if interval is None else "{:.4f}-{:.4f}".format(*interval)
            p = system["compared"]["default"]["rougeL"]["p"] if "compared" in system else None
            figures = "".join(f"{default[kind]:>7.4f}" for kind in ("rouge1", "rouge2", "rougeL"))
            lines.append(
                f"{short(name):<18}{figures}{interval:>15}{format_p(p):>6}"
                f"{default['rougeLsum']:>7.4f}{system['rouge']['unicode']['rougeL']:>9.4f}"
            )
        lines.append("")
    lines += [
        f"{'Titles':<18}{'words':>7}{'half':>8}{'French':>8}{'English':>8}{'other':>7}{'empty':>6}"
        f"{'twice':>6}{'loops':>6}{'cut':>6}",
        "-" * 80,
    ]
    for name, system in everything.items():
        words, language, flags = system["words"], system["language"], system["flags"]
        half = f"{words['q1']:.0f}-{words['q3']:.0f}"
        french, english, other = (
            "-" if share is None else f"{share:.1%}" for share in language.values()
        )
        counts = [system["empty"], *(flags[flag] for flag in ("repeated", "looping", "cut"))]
        counts = "".join(f"{'-' if count is None else count:>6}" for count in counts)
        lines.append(
            f"{short(name):<18}{words['mean']:>7.1f}{half:>8}{french:>8}{english:>8}{other:>7}{counts}"
        )
    if "articles" in scores:
        lines += [
            "",
            f"{'Not in article':<18}{' words in a row ':-^32}{' titles that have ':-^30}",
            f"{'':<18}{'1':>8}{'2':>8}{'3':>8}{'4':>8}{'numbers':>10}{'names':>10}{'quotes':>10}",
            "-" * 80,
        ]
        for name, system in everything.items():
            new = ["-" if s is None else f"{s:.1%}" for s in system["novel"].values()]
            flags = [system["flags"][flag] for flag in ("numbers", "names", "quotations")]
            new = "".join(f"{share:>8}" for share in new)
            flags = "".join(f"{count / scores['rows']:>10.1%}" for count in flags)
            lines.append(f"{short(name):<18}{new}{flags}")
    lines += ["-" * 80, *legend(scores)]
    return "\n".join(lines)


def legend(scores: dict) -> list[str]:
    """Return the lines that say what the columns of the tables are."""
    lines = []
    if "references" in scores:
        lines += [
            f"ROUGE: means over {scores['rows']:,} titles, of which an empty one scores 0.",
            "comparable: rouge_score's tokenizer, no stemmer, as published scores have it (it",
            "drops accented letters). unicode: words keep their accents. 95 %: by bootstrap.",
        ]
        if scores["rows"] > 1 and len(scores["predictions"]) > 1:
            lines.append(f"p: of a difference in R-L to {short(scores['compared_to'])}, paired.")
        if scores["rows"] < FEW_ROWS:
            lines.append(f"Of fewer than {FEW_ROWS} titles, the intervals are too narrow.")
    lines += [
        "half: so many words have half of the titles. Languages: of those with a letter.",
        "twice: of several articles; loops: same words three times; cut: by the limit.",
    ]
    if "articles" in scores:
        lines.append("Numbers, names, quotes not in the article: a reason to look, no verdict.")
    return lines


def short(name: str) -> str:
    """Both ends are kept: names often differ in the last letters."""
    return name if len(name) <= 18 else f"{name[:8]}..{name[-8:]}"


def format_p(p: float | None) -> str:
    return "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0")


if __name__ == "__main__":
    run(main)
