"""The plots of the report, as SVG that eyes and screen readers can read.

Colours are those of report.html, by class. All text is escaped here, by `text`.
"""

import html
import math
import statistics
import unicodedata
from collections.abc import Callable

from exit_codes import printable

CURVE_POINTS = 400  # of a loss curve; more updates are averaged
LABELLED = 8  # marks on a curve that have room for their figures; of more, the last has one
SPIKE = 5  # times the median of a curve, above which it is cut off
WIDTH = 400  # of a plot, in the pixels of a phone; a page that has room shows it larger
ROOM = 116  # of it at the left, for a system's name
TRUE = "true titles"


def text(value) -> str:
    """Return a value as text of HTML, or of one of its attributes."""
    return html.escape(printable(str(value)))


def interval(bounds, sign: str = "") -> str:
    if bounds is None:
        return "–"
    return " to ".join(format(bound, f"{sign}.4f") for bound in bounds).replace("-", "−")


def with_true_titles(scores: dict) -> dict:
    true = {TRUE: scores["references"]} if "references" in scores else {}
    return true | scores["predictions"]


def plots(scores: dict, figures: dict) -> str:
    shown = [plot_scores(scores)] if "references" in scores else []
    shown += [plot_lengths(figures), plot_languages(scores)]
    return f'<div class="plots">{"".join(shown)}</div>'


def figure(name: str, caption: str, description: str, height: float, shapes: str) -> str:
    """Return a plot, for eyes and for screen readers."""
    return (
        f'<figure><figcaption>{caption}</figcaption><svg viewBox="0 0 {WIDTH} {height:.0f}" '
        f'role="img" aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{caption}'
        f'</title><desc id="{name}-desc">{text(description)}</desc>{shapes}</svg></figure>'
    )


def label(x: float, y: float, words, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{text(words)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def bar(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" '
        f'class="{kind}"/>'
    )


def short(name: str) -> str:
    """Both ends are kept of a name that has no room at the left of a plot."""
    name = printable(name)
    halves = (f"{name[:half]}…{name[-half:]}" for half in range(8, 0, -1) if 2 * half < len(name))
    return name if _width(name) <= ROOM else next(s for s in halves if _width(s) <= ROOM)


def _width(words: str) -> float:
    """Return at least the width of a text in the report's sizes and the usual fonts."""
    return sum(
        13
        if unicodedata.east_asian_width(c) in "WF" or c in "MWmw@%…—"
        else 9.5
        if c.isupper()
        else 8
        for c in words
    )


def ticks(top: float, wanted: int = 5) -> list[float]:
    """Return round numbers from 0 to just above `top`."""
    if not top > 0:
        return [0, 1]
    exponent = math.floor(math.log10(top)) - 1
    steps = (
        factor * 10.0**power for power in range(exponent, exponent + 3) for factor in (1, 2, 5)
    )
    step = next(step for step in steps if top / step < wanted + 1e-6)
    return [step * n for n in range(math.ceil(top / step - 1e-6) + 1)]


def plot_scores(scores: dict) -> str:
    left, right, row, top = 122, 348, 27, 8
    systems = scores["predictions"]
    bounds = {name: s["intervals"]["default"]["rougeL"] for name, s in systems.items()}
    values = {name: s["rouge"]["default"]["rougeL"] for name, s in systems.items()}
    marks = ticks(max(bounds[name][1] if bounds[name] else values[name] for name in systems))
    place = _scale(0, marks[-1], left, right)
    bottom = top + row * len(systems)
    shapes = "".join(
        line(place(mark), top, place(mark), bottom, "grid")
        + label(place(mark), bottom + 15, f"{mark:.3g}", "axis", "middle")
        for mark in marks
    )
    for number_, (name, value) in enumerate(values.items()):
        y = top + row * (number_ + 0.5)
        shapes += label(0, y + 4, short(name))
        if bounds[name]:
            shapes += line(place(bounds[name][0]), y, place(bounds[name][1]), y, "whisker")
        shapes += f'<circle cx="{place(value):.1f}" cy="{y:.1f}" r="4" class="dot"/>'
        shapes += label(WIDTH, y + 4, f"{value:.4f}", "", "end")
    described = "; ".join(
        f"{name} {values[name]:.4f}" + (f" ({interval(bounds[name])})" if bounds[name] else "")
        for name in systems
    )
    return figure("rouge", "ROUGE-L F and its 95 % interval", described, bottom + 22, shapes)


def plot_lengths(figures: dict) -> str:
    import numpy

    left, right, row, top = 122, 392, 46, 4
    # A few titles that are far longer would press all others together.
    most = (numpy.percentile(f.words, 95, method="lower") for f in figures.values())
    longest = max(10, *map(int, most))
    step = -(-longest // 40)  # words to a bar
    edges = numpy.arange(0, longest + 2 * step, step)
    shares = {
        name: numpy.histogram(numpy.minimum(of_name.words, edges[-1] - 1), edges)[0]
        / len(of_name.words)
        for name, of_name in figures.items()
    }
    true = shares.pop(None, None)
    systems = shares if shares else {TRUE: true}
    tallest = max(share.max() for share in [*systems.values(), *([] if true is None else [true])])
    if true is not None:  # all titles of one length would flatten all others: cut off that spike
        tallest = min(tallest, 2 * true.max())
    place = _scale(0, edges[-1], left, right)
    shapes, described = "", []
    for index, (name, share) in enumerate(systems.items()):
        base = top + row * (index + 1) - 6
        height = _scale(0, tallest, 0, row - 12)

        def steps(share, base=base, height=height) -> str:
            points = [f"{place(edges[0]):.1f},{base:.1f}"]
            for start, end, value in zip(edges[:-1], edges[1:], share, strict=True):
                y = base - height(min(value, tallest))
                points += [f"{place(start):.1f},{y:.1f}", f"{place(end):.1f},{y:.1f}"]
            return " ".join([*points, f"{place(edges[-1]):.1f},{base:.1f}"])

        if true is not None:
            shapes += f'<polygon points="{steps(true)}" class="behind"/>'
        shapes += f'<polyline points="{steps(share)}" class="outline"/>'
        shapes += line(left, base, right, base, "grid")
        shapes += label(0, base - 12, short(name))
        mean = float(figures[name].words.mean()) if name in figures else 0
        shapes += label(0, base + 1, f"{mean:.1f} words", "axis")
        described.append(f"{name} {mean:.1f} words on average")
    bottom = top + row * len(systems)
    for mark in ticks(edges[-1] - step):
        if mark <= edges[-1]:
            shapes += label(place(mark), bottom + 10, f"{mark:.0f}", "axis", "middle")
    notes = ["shaded: the true titles"] * (true is not None)
    if any(of_name.words.max() >= edges[-1] for of_name in figures.values()):
        notes.append(f"the last bar: {edges[-2]} and more")
    caption = "Words per title" + (f" ({'; '.join(notes)})" if notes else "")
    return figure("lengths", caption, "; ".join(described), bottom + 16, shapes)


def plot_languages(scores: dict) -> str:
    left, right, row, top = 122, 392, 27, 26
    shapes, described = "", []
    x = left
    for name in ("french", "english", "other"):
        shapes += bar(x, 4, 10, 10, name) + label(x + 15, 13, name.capitalize(), "axis")
        x += 76
    for index, (name, system) in enumerate(with_true_titles(scores).items()):
        y, x = top + row * index, left
        shapes += label(0, y + 14, short(name))
        shares = system["language"]
        for language, share in shares.items():
            width = (share or 0) * (right - left)
            shapes += bar(x, y, width, 19, language)
            if width > 44:
                shapes += label(x + 6, y + 14, f"{share:.1%}", f"on-{language}")
            x += width
        described.append(f"{name}: " + ", ".join(f"{k} {v or 0:.1%}" for k, v in shares.items()))
    bottom = top + row * len(described)
    return figure("languages", "Languages of the titles", "; ".join(described), bottom, shapes)


def plot_curve(anchor: str, caption: str, rows: list[dict], key: str, evaluated: list[dict]) -> str:
    left, right, top, bottom = 40, 392, 8, 170
    points = _thinned([(row["step"], row[key]) for row in rows if row.get(key) is not None])
    marks = [(row["step"], row["eval_loss"]) for row in evaluated if row["eval_loss"] is not None]
    if not points:
        return ""
    last = max(step for step, _ in points + marks)
    steps = [step for step in ticks(last) if step <= last and abs(step - round(step)) < 1e-6]
    found = [value for _, value in points + marks]
    # A run that diverged, or one wild update, would flatten all others: cut off what is far above.
    most = min(max(found), SPIKE * statistics.median(found)) or max(found)
    values = ticks(most)
    across, scale = _scale(0, last, left, right), _scale(0, values[-1], bottom, top)

    def up(value: float) -> float:
        return scale(min(value, values[-1]))

    shapes = "".join(
        line(left, up(value), right, up(value), "grid")
        + label(left - 6, up(value) + 4, f"{value:.3g}", "axis", "end")
        for value in values
    )
    shapes += "".join(
        label(across(step), bottom + 16, f"{step:,.0f}", "axis", "middle") for step in steps
    )
    shapes += label(right, bottom + 32, "update", "axis", "end")
    drawn = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in points)
    shapes += f'<polyline points="{drawn}" class="curve"/>'
    if len(points) == 1:  # of which no line can be seen
        x, y = across(points[0][0]), up(points[0][1])
        shapes += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="curve"/>'
    dots = marks or (points if key != "loss" else [])
    for step, value in dots:
        shapes += f'<circle cx="{across(step):.1f}" cy="{up(value):.1f}" r="4.5" class="dot"/>'
        if len(dots) <= LABELLED or step == dots[-1][0]:
            shapes += label(across(step), up(value) - 9, f"{value:.3g}", "strong", "end")
    described = (
        f"{key} from {points[0][1]:.4g} at update {points[0][0]:.0f} to {points[-1][1]:.4g} "
    )
    described += f"at update {points[-1][0]:.0f}"
    described += "".join(f"; validation {value:.4g} after {step}" for step, value in marks)
    notes = ["dots: validation"] * bool(marks)
    notes += [f"up to {max(found):.3g}, cut off"] * (max(found) > values[-1])
    caption += f" ({'; '.join(notes)})" if notes else ""
    return figure(anchor, caption, described, bottom + 38, shapes)


def plot_memory(anchor: str, memory) -> str:
    """Return the bars of the QLoRA paper's Figure 1 for this run's model, or nothing."""
    if not isinstance(memory, dict) or not isinstance(memory.get("estimate"), dict):
        return ""
    names = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
    bars = [(shown, memory["estimate"].get(key), "estimate") for key, shown in names.items()]
    if memory.get("this_run") not in memory["estimate"].values():
        bars += [("this run, expected", memory.get("this_run"), "estimate")]
    bars += [("this run, measured", memory.get("measured_peak"), "measured")]
    # None: of a model that is not counted through.
    uncounted = [shown for key, shown in names.items() if memory["estimate"].get(key, 0) is None]
    bars = [
        (n, v, k)
        for n, v, k in bars
        if n in uncounted or (type(v) in (int, float) and 0 < v < 2**60)
    ]
    if len(bars) == len(uncounted):
        return ""
    left, right, row, top = 130, 330, 27, 4
    place = _scale(0, max(value for _, value, _ in bars if value is not None), left, right)
    shapes = ""
    for index, (name, value, kind) in enumerate(bars):
        y = top + row * index
        end = left if value is None else place(value)
        shapes += label(0, y + 14, name, "") + bar(left, y, end - left, 19, kind)
        shapes += label(end + 6, y + 14, _bytes(value), "axis" if value is None else "")
    device = "on the GPU" if memory.get("device") == "cuda" else "resident, on a CPU"
    described = "; ".join(f"{name} {_bytes(value)}" for name, value, _ in bars)
    caption = f"Memory at the peak, {device}"
    return figure(anchor, caption, described, top + row * len(bars), shapes)


def _bytes(value: float | None) -> str:
    if value is None:
        return "not counted"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1)


def _thinned(points: list[tuple]) -> list[tuple]:
    """Return no more than CURVE_POINTS of a curve: means of neighbours."""
    size = -(-len(points) // CURVE_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(sum(axis) / len(axis) for axis in zip(*group, strict=True)) for group in groups]
