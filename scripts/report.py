"""The report of score.py: one HTML file with tables, plots and a list of titles to look through.

It asks for nothing from elsewhere and obeys nothing that stands in the data: all text is escaped
here, or put in place as text by the script of report.html, the only one that its policy lets run.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from exit_codes import printable, writing
from plots import interval, plot_curve, plot_memory, plots, text, with_true_titles
from title_facts import plain

TEMPLATE = Path(__file__).with_name("report.html")
ARTICLE_CHARACTERS, TITLE_CHARACTERS = 6_000, 1_000  # that are embedded of each
FLAG_NAMES = {
    "empty": "empty",
    "repeated": "twice",
    "looping": "loop",
    "cut": "cut",
    "numbers": "number",
    "names": "name",
    "quotations": "quote",
}
FLAG_MEANINGS = {
    "empty": "nothing but spaces",
    "repeated": "the same title, whatever its capitals, for another article as well",
    "looping": "three words in a row that come three times or more, or one or two so often at once",
    "cut": "stopped by the limit of its length, by infer.py's own notes; - where there are none",
    "numbers": "a number, in figures or in words, that the article has in neither",
    "names": "a word with a capital, not only for its place, that the article has in no form; or "
    "names together that it has only apart",
    "quotations": "words between quotation marks that the article does not have one after another; "
    "' is taken for an apostrophe",
}


def write_report(path: Path, scores: dict, runs: dict, figures=None, sample=None) -> None:
    """Write the report under a temporary name and rename it.

    Args:
        path: of the HTML file.
        scores: as score.py writes them; empty for a report of runs only.
        runs: by folder, the record of a run and the rows of its metrics.jsonl.
        figures: by system, with None for the true titles, `title_figures.Figures`.
        sample: what of the articles is listed: `rows`, and by row `ids`, `texts` and `titles`.
    """
    parts = [masthead(scores, runs)]
    if scores:
        parts += [score_section(scores), plots(scores, figures), title_section(scores)]
    parts += [run_section(f"run-{n}", folder, *runs[folder]) for n, folder in enumerate(runs)]
    if scores:
        parts += [browser(scores, sample), notes(scores)]
    data = payload(figures, sample) if scores else {}
    # Text in a script element ends at "</script", and may not hold "<!--".
    data = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    # The policy names the style and the script by their hashes: no other gets to run.
    hashes = {
        f"{kind.upper()}_HASH": _sha256(re.search(rf"<{kind}>(.*?)</{kind}>", template, re.S)[1])
        for kind in ("style", "script")
    }
    values = hashes | {"TITLE": "Manchette: report", "BODY": "\n".join(parts), "DATA": data}
    page = re.sub(r"%%([A-Z_]+)%%", lambda match: values[match[1]], template)
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path, len(page)):
        temporary.unlink(missing_ok=True)  # were it a link, what it names would be overwritten
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)


def _sha256(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


# --- Tables --------------------------------------------------------------------------------------


def masthead(scores: dict, runs: dict) -> str:
    if scores:
        count, systems = scores["rows"], len(scores["predictions"])
        headline = f"Titles for {count:,} articles, by {systems} system{'s' * (systems != 1)}"
        against = scores.get("references", scores.get("articles"))["path"]
        scored = "references" in scores
        deck = f"{'Scored against' if scored else 'Without true titles, for'} {text(against)}."
    else:
        headline = f"Training of {', '.join(text(Path(folder).name) for folder in runs)}"
        deck = "Nothing has been scored."
    links = [("scores", "Scores")] * ("references" in scores)
    links += [("titles", "Titles"), ("list", "Article by article")] * bool(scores)
    links += [("run-0", "Training")] * bool(runs)
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in links)
    return (
        f'<header><p class="name">Manchette</p><h1>{headline}</h1><p class="deck">{deck}</p>'
        f'<nav aria-label="Parts of this report">{links}</nav></header>\n<main>'
    )


def table(caption: str, columns: list[tuple[str, str]], rows: Iterable[list]) -> str:
    """Return a table whose columns sort by their headings.

    Args:
        caption: HTML.
        columns: heading and explanation of each; the first is that of the rows' names.
        rows: cells as strings, or as (shown, value to sort by).
    """
    head = "".join(
        f'<th scope="col"><button type="button" title="{text(hint)}">{text(name)}</button></th>'
        for name, hint in columns
    )
    body = []
    for name, *cells in rows:
        line = f'<th scope="row">{text(name)}</th>'
        for cell in cells:
            shown, value = cell if isinstance(cell, tuple) else (cell, None)
            value = "" if value is None else f' data-value="{value:.9g}"'
            line += f"<td{value}>{text(shown)}</td>"
        body.append(f"<tr>{line}</tr>")
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="Table, scrolls sideways"><table>'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def number(value: float | None, form: str) -> tuple | str:
    return "–" if value is None else (format(value, form).replace("-", "−"), value)


def score_section(scores: dict) -> str:
    if "references" not in scores:
        return ""
    columns = [("System", ""), ("R-1", "ROUGE-1 F: words"), ("R-2", "ROUGE-2 F: pairs of words")]
    columns += [("R-L", "ROUGE-L F: words in the same order, the challenge's metric")]
    columns += [("95 %", "bootstrap interval of R-L over the articles")]
    columns += [("R-Lsum", "as R-L, line by line"), ("R-L unicode", "words keep their accents")]
    columns += [("difference", "of R-L"), ("95 %", "of the difference"), ("p", "two-sided")]
    rows = []
    for name, system in scores["predictions"].items():
        default, unicode = system["rouge"]["default"], system["rouge"]["unicode"]
        compared = system.get("compared", {}).get("default", {}).get("rougeL")
        row = [name, *(number(default[kind], ".4f") for kind in ("rouge1", "rouge2", "rougeL"))]
        row += [interval(system["intervals"]["default"]["rougeL"])]
        row += [number(default["rougeLsum"], ".4f"), number(unicode["rougeL"], ".4f")]
        if compared:
            row += [number(compared["difference"], "+.4f"), interval(compared["interval"], "+")]
            row += [("< 0.001" if compared["p"] < 0.001 else f"{compared['p']:.3f}", compared["p"])]
        else:
            row += ["–"] * 3
        rows.append(row)
    against = text(scores["compared_to"])
    caption = (
        f"Mean F over {scores['rows']:,} titles. Difference and p: R-L against <b>{against}</b>, "
        f"by {scores['bootstrap']['resamples']:,} paired bootstrap resamples of the articles."
    )
    return (
        f'<section id="scores"><h2>Scores</h2>{table(caption, columns, rows)}'
        '<p class="note">R-1, R-2, R-L and R-Lsum use rouge_score’s own tokenizer, as published '
        "figures do; it drops accented letters. The unicode column keeps them. A score is not all: "
        "read it beside what follows, and beside a copy of the article’s first words.</p></section>"
    )


def title_section(scores: dict) -> str:
    columns = [("System", ""), ("words", "mean number of words")]
    columns += [("quartiles", "a quarter of the titles is shorter, a quarter is longer")]
    columns += [("French", "share of titles with a letter"), ("English", ""), ("other", "")]
    flags = ("repeated", "looping", "cut")
    columns += [("empty", FLAG_MEANINGS["empty"])]
    columns += [(FLAG_NAMES[flag], FLAG_MEANINGS[flag]) for flag in flags]
    rows = []
    for name, system in with_true_titles(scores).items():
        words = system["words"]
        quartiles = " / ".join(f"{words[key]:.0f}" for key in ("q1", "median", "q3"))
        row = [name, number(words["mean"], ".1f"), (quartiles, words["median"])]
        row += [number(share, ".1%") for share in system["language"].values()]
        row += [number(system["empty"], ","), *(number(system["flags"][f], ",") for f in flags)]
        rows.append(row)
    parts = [table("Length, language, and titles that went wrong.", columns, rows)]
    if "articles" in scores:
        columns = [("System", "")]
        columns += [
            (f"new {n}-grams", f"{n} words in a row that the article has not") for n in "1234"
        ]
        flags = ("numbers", "names", "quotations")
        columns += [(flag, FLAG_MEANINGS[flag]) for flag in flags]
        rows = []
        for name, system in with_true_titles(scores).items():
            shares = [system["flags"][flag] / scores["rows"] for flag in flags]
            row = [name, *(number(share, ".1%") for share in system["novel"].values())]
            rows.append(row + [number(share, ".1%") for share in shares])
        caption = (
            "What the article does not say: mean share of a title’s words and groups of words, and "
            "share of titles with a number, a name or a quotation that is not in it."
        )
        parts.append(table(caption, columns, rows))
        parts.append(
            '<p class="note">A flag is a reason to look, not a verdict. True titles have some too: '
            "journalists know more than one article says.</p>"
        )
    return f'<section id="titles"><h2>Titles</h2>{"".join(parts)}</section>'


def notes(scores: dict) -> str:
    rows = []
    for what in ("references", "articles"):
        if what in scores:
            rows.append([what, scores[what]["path"], scores[what]["sha256"][:16], ""])
    for name, system in scores["predictions"].items():
        made_by = ", ".join(f"{key} {value}" for key, value in system.get("made_by", {}).items())
        path = system.get("path", "a baseline, made of the articles")
        rows.append([name, path, system.get("sha256", "")[:16], made_by])
    columns = [("What", ""), ("file", ""), ("SHA-256 of what was read", ""), ("made by", "")]
    flags = "".join(f"<dt>{FLAG_NAMES[f]}</dt><dd>{text(m)}</dd>" for f, m in FLAG_MEANINGS.items())
    versions = ", ".join(f"{text(name)} {text(v)}" for name, v in scores["versions"].items())
    tokenizers = "".join(
        f"<dt>{text(name)}</dt><dd>{text(meaning)}</dd>"
        for name, meaning in scores.get("tokenizers", {}).items()
    )
    return (
        '<section id="notes"><h2>How this was made</h2>'
        f"{table('Files', columns, rows)}<h3>Flags</h3><dl>{flags}</dl>"
        + (f"<h3>Tokenizers of ROUGE</h3><dl>{tokenizers}</dl>" if tokenizers else "")
        + "<p>New n-grams and flags compare words without capitals; names and numbers also without "
        "accents, plural and feminine endings, and in words as in figures. Languages by py3langid, "
        "which always chooses one of ten: of one or two words it is a guess. Intervals hold what "
        f"comes of the choice of articles, and nothing else.</p><p>{versions}.</p></section>"
    )


def run_section(anchor: str, folder: str, run_config: dict, metrics: list[dict]) -> str:
    name = Path(folder).name
    updates = [row for row in metrics if "loss" in row]
    evaluated = [row for row in metrics if "eval_loss" in row]
    drawn = []
    if updates:
        drawn.append(plot_curve(f"{anchor}-loss", "Training loss", updates, "loss", evaluated))
    if any(row.get("eval_rougeL") is not None for row in evaluated):
        caption = "ROUGE-L of validation titles"
        drawn.append(plot_curve(f"{anchor}-rouge", caption, evaluated, "eval_rougeL", []))
    merged = run_config["kind"] == "merged"
    memory = plot_memory(f"{anchor}-memory", run_config.get("memory"))
    if memory and not merged:  # which has the record of its run
        drawn.append(memory)
    arguments = run_config["arguments"]
    shown = ("num_train_epochs", "learning_rate", "lora_r", "lora_alpha", "lora_dropout")
    shown += ("max_length", "base_weights", "seed")
    facts = [("base", run_config["base_model"]), ("per update", run_config["articles_per_update"])]
    facts += [(f"{split} articles", file["rows"]) for split, file in run_config["data"].items()]
    facts += [(key, arguments[key]) for key in shown if key in arguments]
    merge_check = run_config.get("merge_check")
    difference = merge_check.get("relative_difference") if isinstance(merge_check, dict) else None
    if isinstance(difference, float):
        facts.append(("merged against adapter", f"logits differ by {difference:.2%}"))
    facts = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in facts)
    return (
        f'<section id="{anchor}" class="run"><h2>{"Merged" if merged else "Training"}: {text(name)}'
        f'</h2><dl class="facts">{facts}</dl><div class="plots">{"".join(drawn)}</div></section>'
    )


# --- The list ------------------------------------------------------------------------------------


def browser(scores: dict, sample: dict) -> str:
    shown, total = len(sample["rows"]), scores["rows"]
    some = "" if shown == total else f" {shown:,} evenly spaced ones of {total:,} are here."
    flags = "".join(f'<option value="{f}">{text(n)}</option>' for f, n in FLAG_NAMES.items())
    return f"""<section id="list"><h2>Article by article</h2>
<p class="note" id="list-note">Each with the titles of every system.{some} Marked words are those
that the article does not have.</p>
<form id="controls" role="search" aria-describedby="list-note">
<label>Sort <select id="sort"></select></label>
<label>of <select id="first"></select></label>
<label id="second-label">against <select id="second"></select></label>
<label>Flag <select id="flag"><option value="">any or none</option>
<option value="*">any</option>{flags}</select></label>
<label>Search <input id="search" type="search" autocomplete="off"
placeholder="in titles and articles"></label>
</form>
<p id="status" role="status"></p><div id="rows"></div>
<nav class="pages" aria-label="Pages of the list">
<button type="button" id="previous">Previous</button>
<span id="page"></span><button type="button" id="next">Next</button></nav>
<noscript><p class="note">The list needs JavaScript; tables and plots do without.</p></noscript>
</section>"""


def payload(figures: dict, sample: dict) -> dict:
    """Return what the list shows, by row: ID, article, titles, ROUGE-L and flags."""
    names = list(sample["titles"])
    systems = [name for name in names if name is not None]
    scored = None in sample["titles"]
    rows = []
    for row in sample["rows"]:
        titles = [_cut(sample["titles"][name][row], TITLE_CHARACTERS) for name in names]
        rouge = [figures[name].rouge["default"]["rougeL"][row] for name in systems * scored]
        rouge = [round(float(value), 4) for value in rouge]
        flags = [
            {
                flag: [printable(word) for word in words]
                for flag, words in figures[n].flags_of(row).items()
            }
            for n in names
        ]
        article = _cut(sample["texts"].get(row, ""), ARTICLE_CHARACTERS)
        rows.append([printable(sample["ids"][row]), article, titles, rouge, flags])
    return {"systems": systems, "scored": scored, "flags": FLAG_NAMES, "rows": rows}


def _cut(words: str, characters: int) -> str:
    words = plain(words)  # as what is flagged in them
    words = words if len(words) <= characters else f"{words[:characters]}…"
    return "\n".join(map(printable, words.splitlines()))
