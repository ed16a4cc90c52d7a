"""scripts/report.py and report.html: what is shown, in a real browser, and what never gets to run.

python -m pytest tests/test_report.py (parts of it skip themselves where there is no chromium)
"""

import base64
import copy
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from conftest import french_rows, write_csv
from test_run_folder import RECORD

import report
import score
from plots import figure, label, plot_curve, plot_lengths, plot_memory, short, ticks
from title_figures import Figures

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
HOSTILE = "</script><img src=x onerror=alert(1)><!-- <b>gras</b> &amp; \u202e\x1b[2J"
GIB = 2**30
MEMORY = {"estimate": {"full": 80 * GIB, "lora": 16 * GIB, "qlora": 6 * GIB}}
MEMORY |= {"this_run": int(7.5 * GIB), "measured_peak": 7 * GIB, "device": "cuda"}


def make_run(folder, memory=None):
    record = copy.deepcopy(RECORD) | {"adapter_step": 4, "memory": memory}
    folder.mkdir()
    (folder / "run_config.json").write_text(json.dumps(record))
    rows = [{"step": step, "loss": 4 / step} for step in range(1, 5)]
    rows += [{"step": step, "eval_loss": 5 / step, "eval_rougeL": step / 10} for step in (2, 4)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of 50 articles, of which the first is hostile, by two systems and a baseline."""
    folder = tmp_path_factory.mktemp("report")
    rows = french_rows(50, seed=9)
    rows[0] |= {"ID": HOSTILE.replace("\x1b", ""), "text": f"Paris. {HOSTILE}", "titles": HOSTILE}
    rows[3] |= {"text": "Le maire parle.", "titles": "Le maire de Nîmes, 12 morts"}
    write_csv(folder / "references.csv", rows)
    good = [{"ID": row["ID"], "titles": row["titles"]} for row in rows]
    bad = [{"ID": row["ID"], "titles": rows[n - 1]["titles"]} for n, row in enumerate(rows)]
    bad[5]["titles"] = "un deux trois " * 4
    write_csv(folder / "good.csv", good)
    write_csv(folder / "bad.csv", bad)
    run = make_run(folder / "run & co", MEMORY)
    arguments = ["--references", folder / "references.csv", "--output_dir", folder / "out"]
    arguments += ["--predictions", f"<bad> & co={folder / 'bad.csv'}", folder / "good.csv"]
    arguments += ["--baselines", "lead1", "--runs", run]
    assert score.main([str(argument) for argument in arguments]) == 0
    return folder / "out/report.html"


class Elements(HTMLParser):
    """All start tags of a page, with their attributes, and the open tags at its end."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for found, attributes in self.found if found == tag]


# --- Without a browser ---------------------------------------------------------------------------


def test_the_page_asks_for_nothing_and_names_what_may_run(page):
    elements, text = Elements(page), page.read_text(encoding="utf-8")
    assert elements.open == []
    for tag, attributes in elements.found:
        assert not {name for name in attributes if name.startswith("on") or name == "style"}
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert "url(" not in text
    assert "@import" not in text
    policy = next(m["content"] for m in elements.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        own = re.search(rf"<{kind}>(.*?)</{kind}>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not {"img", "iframe", "object", "b0"} & {tag for tag, _ in elements.found}
    assert text.count("<script") == text.count("</script>") == 2


def test_tables_and_plots_can_be_read_aloud(page):
    elements, text = Elements(page), page.read_text(encoding="utf-8")
    assert elements.all("html") == [{"lang": "en"}]
    assert len(elements.all("caption")) == len(elements.all("table")) == 4
    assert all(th.get("scope") in ("row", "col") for th in elements.all("th"))
    plots = elements.all("svg")
    assert len(plots) == 6  # scores, lengths, languages; loss, ROUGE-L, memory
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"].removeprefix("#") for link in elements.all("a")} <= set(ids)
    for plot in plots:
        assert plot["role"] == "img"
        assert set(plot["aria-labelledby"].split()) <= set(ids)
    described = re.findall(r"<desc [^>]*>(.*?)</desc>", text)
    assert "full fine-tuning 80.0 GiB; LoRA 16.0 GiB; QLoRA 6.0 GiB" in described[-1]
    assert "this run, expected 7.5 GiB; this run, measured 7.0 GiB" in described[-1]
    assert "loss from 4 at update 1 to 1 at update 4; validation 2.5 after 2" in described[3]
    assert len(elements.all("label")) == 5  # of the list's five controls


def test_figures_are_those_of_the_scores(page):
    text = page.read_text(encoding="utf-8")
    scores = json.loads((page.parent / "scores.json").read_text(encoding="utf-8"))
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text)
    for name, system in scores["predictions"].items():
        cells = next(cells for found, cells in rows if html.unescape(found) == name)
        shown = re.findall(r"<td[^>]*>(.*?)</td>", cells)
        default = system["rouge"]["default"]
        assert shown[:3] == [f"{default[kind]:.4f}" for kind in ("rouge1", "rouge2", "rougeL")]
        assert shown[3] == "{:.4f} to {:.4f}".format(*system["intervals"]["default"]["rougeL"])
    dots = re.search(r'<svg[^>]*aria-labelledby="rouge-title.*?</svg>', text, re.S)[0]
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', dots)]
    values = [s["rouge"]["default"]["rougeL"] for s in scores["predictions"].values()]
    assert values[1] == 1
    assert places[0] < places[1]
    left = float(re.search(r'<line x1="([\d.]+)"', dots)[1])
    assert (places[0] - left) / (places[1] - left) == pytest.approx(values[0], abs=1e-3)


def test_large_files_are_listed_in_part_and_told_so(tmp_path, monkeypatch):
    rows = french_rows(90, seed=2)
    write_csv(tmp_path / "r.csv", rows)
    monkeypatch.setattr(score, "SHOWN_ROWS", 20)
    monkeypatch.setattr(report, "ARTICLE_CHARACTERS", 30)
    options = ["--references", str(tmp_path / "r.csv"), "--predictions", str(tmp_path / "r.csv")]
    score.main([*options, "--output_dir", str(tmp_path)])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "20 evenly spaced ones of 90 are here" in " ".join(text.split())
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    shown = [int(row[0].removeprefix("a")) for row in data["rows"]]
    assert (shown[0], len(shown)) == (0, 20)
    assert {b - a for a, b in zip(shown, [*shown[1:], 90], strict=True)} == {4, 5}
    assert max(len(row[1]) for row in data["rows"]) == 31
    assert len(json.loads((tmp_path / "scores.json").read_text())["predictions"]) == 1


def test_a_report_of_runs_alone(tmp_path):
    run, bare = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (bare / "metrics.jsonl").unlink()
    options = ["--runs", str(run), str(bare), "--output_dir", str(tmp_path / "out")]
    assert score.main(options) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html"}
    elements = Elements(tmp_path / "out/report.html")
    assert elements.open == []
    assert len(elements.all("svg")) == 2  # no memory record
    assert "<h1>Training of a, b</h1>" in (tmp_path / "out/report.html").read_text()


def test_a_merged_model_has_no_curves_and_not_its_runs_memory(tmp_path):
    run = make_run(tmp_path / "merged", MEMORY)
    (run / "metrics.jsonl").unlink()
    record = json.loads((run / "run_config.json").read_text())
    record |= {"kind": "merged", "merge_check": {"relative_difference": 0.0126}}
    (run / "run_config.json").write_text(json.dumps(record))
    score.main(["--runs", str(run), "--output_dir", str(tmp_path)])
    assert Elements(tmp_path / "report.html").all("svg") == []
    assert "logits differ by 1.26%" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("count", "labelled"), [(5, 5), (20, 1)])
def test_marks_on_a_curve_do_not_cover_each_other(count, labelled):
    rows = [{"step": step, "eval_rougeL": 0.2} for step in range(count)]
    drawn = plot_curve("a", "ROUGE-L", rows, "eval_rougeL", [])
    assert drawn.count("<circle") == count
    assert drawn.count('class="strong"') == labelled


def lengths(words: dict) -> str:
    figures = {name: Figures(len(w), None, False, None) for name, w in words.items()}
    for name, of_name in words.items():
        figures[name].words[:] = of_name
    return plot_lengths(figures)


def test_one_long_title_leaves_room_for_the_others():
    usual = list(range(8, 28)) * 2
    drawn = lengths({None: usual, "a": [*usual[:-1], 5_000]})
    assert "(shaded: the true titles; the last bar: 26 and more)" in drawn
    assert re.findall(r'text-anchor="middle">(.*?)<', drawn) == ["0", "10", "20"]
    points = re.search(r'points="([^"]*)" class="outline"', drawn)[1].split()
    heights = [float(point.split(",")[1]) for point in points[1:-1:2]]
    assert heights[-1] == min(heights) < heights[-2]  # the long one is in the last bar
    assert "last bar" not in lengths({"a": [9] * 40, "b": [3] * 40})


@needs_browser
def test_names_of_systems_end_before_the_plot(tmp_path):
    names = [
        "MODEL-WITH-WIDE-LETTERS-MMMM",
        "w" * 17,
        "e" * 40,
        "模型" * 9,
        "LLAMA-2-7B-QLORA",
        "a",
    ]
    shapes = "".join(label(0, 20, short(name)) for name in names)
    page = report.TEMPLATE.read_text(encoding="utf-8").replace(
        "%%BODY%%", figure("a", "", "", 9, shapes)
    )
    page = page.replace("%%DATA%%", "{}").replace("%%TITLE%%", "t")
    for kind in ("style", "script"):
        own = re.search(rf"<{kind}>(.*?)</{kind}>", page, re.S)[1]
        page = page.replace(f"%%{kind.upper()}_HASH%%", report._sha256(own))
    (tmp_path / "p.html").write_text(page, encoding="utf-8")
    steps = (
        "seen.w = [...document.querySelectorAll('svg text')].map((e) => e.getComputedTextLength());"
    )
    seen, _ = browse(tmp_path / "p.html", tmp_path, steps)
    assert len(seen["w"]) == len(names)
    assert max(seen["w"]) <= 120
    assert short("LLAMA-2-7B") == "LLAMA-2-7B"


def test_a_run_of_one_update_has_whole_steps_and_a_point():
    drawn = plot_curve("a", "L", [{"step": 1, "loss": 2.5}], "loss", [])
    assert re.findall(r'text-anchor="middle">(.*?)<', drawn) == ["0", "1"]
    point = re.search(r'<circle cx="(.*?)" .*? class="curve"/>', drawn)[1]
    assert float(point) == float(re.search(r'points="(.*?),', drawn)[1])
    rows = [{"step": step, "loss": 1} for step in (1, 2)]
    assert "<circle" not in plot_curve("a", "L", rows, "loss", [])


def test_memory_that_is_the_same_or_not_counted():
    def described(**memory):
        return re.search(r"<desc [^>]*>(.*?)</desc>", plot_memory("a", MEMORY | memory))[1]

    assert "expected 7.5 GiB" in described()
    assert "expected" not in described(this_run=6 * GIB)
    some = {"full": None, "lora": None, "qlora": 6 * GIB}
    expected = "full fine-tuning not counted; LoRA not counted; QLoRA 6.0 GiB; this run, measured"
    assert described(estimate=some, this_run=6 * GIB).startswith(expected)
    assert ">not counted</text>" in plot_memory("a", MEMORY | {"estimate": some})
    nothing = {"estimate": dict.fromkeys(some), "this_run": None, "measured_peak": None}
    assert plot_memory("a", nothing) == ""


def test_a_run_that_diverged_leaves_the_rest_of_its_curve_to_be_seen():
    rows = [{"step": step, "loss": 3 - step / 100} for step in range(1, 101)]
    rows += [{"step": 101, "loss": 4000.0}]
    drawn = plot_curve("a", "L", rows, "loss", [{"step": 50, "eval_loss": 2.4}])
    heights = [float(pair.split(",")[1]) for pair in points_of(drawn)]
    assert heights[0] < heights[99] - 10
    assert heights[100] == min(heights)
    assert "L (dots: validation; up to 4e+03, cut off)" in drawn
    assert "to 4000 at" in drawn


def points_of(drawn: str) -> list[str]:
    return re.search(r'points="(.*?)" class="curve"', drawn)[1].split()


def test_a_long_curve_is_thinned_to_means():
    rows = [{"step": step, "loss": step % 2} for step in range(1, 4_001)]
    points = points_of(plot_curve("a", "L", rows, "loss", []))
    heights = {float(point.split(",")[1]) for point in points}
    assert len(points) == 400
    assert len(heights) == 1  # each is the mean of five noughts and five ones


@pytest.mark.parametrize(
    "memory",
    [
        [],
        {},
        {"estimate": 1},
        {"estimate": {"full": "<b>"}},
        {"estimate": {"full": -1}},
        {"estimate": {}, "this_run": True, "measured_peak": None},
        {"estimate": {"lora": 10**400}},
    ],
)
def test_a_memory_record_of_another_make_is_left_out(tmp_path, memory):
    run = make_run(tmp_path / "run", memory)
    score.main(["--runs", str(run), "--output_dir", str(tmp_path)])
    elements = Elements(tmp_path / "report.html")
    assert len(elements.all("svg")) == 2
    assert elements.open == []


def test_colours_can_be_told_apart():
    """Contrast as WCAG 2 has it: 4.5 for text, on paper and on what is filled, light and dark."""
    style = re.search(r"<style>(.*?)</style>", report.TEMPLATE.read_text(encoding="utf-8"), re.S)[1]
    sets = [dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in style.split("@media")[:2]]
    sets.append(sets[0] | dict(re.findall(r"--([\w-]+): (#\w+);", style.split("@media print")[1])))

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for colours in sets:
        pairs = [(name, "paper") for name in ("ink", "soft", "red", "blue")]
        pairs += [("on-red", "red"), ("on-blue", "blue"), ("on-mark", "mark")]
        for one, other in pairs:
            bright, dark = sorted(map(luminance, (colours[one], colours[other])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (one, other, colours)


@pytest.mark.parametrize(
    ("top", "marks"),
    [(0.31, [0, 0.1, 0.2, 0.3, 0.4]), (1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, [0, 1])],
)
def test_axes_have_round_numbers(top, marks):
    assert ticks(top) == pytest.approx(marks)
    assert ticks(marks[-1])[-1] == pytest.approx(marks[-1])


# --- In a browser --------------------------------------------------------------------------------


def browse(page, tmp_path, steps="", width=1200, dark=False) -> tuple[dict, str]:
    """Open a copy of a page, run `steps` in it, and return what they put into `seen`, and its DOM.

    Its policy is told of that one script more; the page's own is as it was.
    """
    keep = "document.documentElement.dataset.seen = JSON.stringify(seen);"
    script = f"const seen = {{}};\n{steps}\n{keep}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = page.read_text(encoding="utf-8")
    text = text.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    text = text.replace("</body>", f"<script>{script}</script></body>")
    copied = tmp_path / "copy.html"
    copied.write_text(text, encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    options += ["--disable-sync", "--disable-extensions", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    options += ["--virtual-time-budget=3000", "--enable-logging=stderr"]
    options += ["--blink-settings=preferredColorScheme=0"] * dark
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", copied.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr  # where scripts and the policy complain
    root = re.search(r"<html[^>]*>", done.stdout)[0]
    assert 'data-ready="yes"' in root
    assert "data-error" not in root
    return json.loads(html.unescape(re.search(r'data-seen="(.*?)"', root)[1])), done.stdout


@needs_browser
def test_the_list_shows_text_and_never_obeys_it(page, tmp_path):
    steps = """
    const first = document.querySelector("#rows .article");
    seen.title = first.querySelector("h3 .title").firstChild.textContent;
    seen.id = first.querySelector(".id").textContent;
    seen.article = first.querySelector("details p").textContent;
    seen.systems = [...first.querySelectorAll(".system")].map((e) => e.textContent);
    seen.images = document.images.length;
    seen.bold = document.querySelectorAll("#rows b").length;
    seen.status = document.getElementById("status").textContent;
    """
    seen, _ = browse(page, tmp_path, steps)
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert seen["title"] == shown
    assert seen["id"] == f"ID {shown.replace(chr(92) + 'x1b', '')}"
    assert seen["article"] == f"Paris. {shown}"
    assert seen["systems"] == ["<bad> & co", "good", "lead1"]
    assert (seen["images"], seen["bold"]) == (0, 0)
    assert seen["status"] == "1 to 20 of 50 articles"


@needs_browser
def test_a_script_that_is_not_the_pages_own_is_blocked(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    pwned = "<script>document.documentElement.dataset.pwned = 'yes';</script></main>"
    (tmp_path / "pwned.html").write_text(text.replace("</main>", pwned), encoding="utf-8")
    with pytest.raises(AssertionError, match="Content Security Policy"):
        browse(tmp_path / "pwned.html", tmp_path)


@needs_browser
def test_the_list_sorts_filters_searches_and_turns_pages(page, tmp_path):
    steps = """
    const get = (id) => document.getElementById(id);
    const change = (id, value, event = "change") => {
      get(id).value = value;
      get(id).dispatchEvent(new Event(event));
      return [...document.querySelectorAll("#rows .article")];
    };
    const ids = (articles) => articles.map((e) => e.querySelector(".id").textContent.slice(3));
    const scores = (articles, system) =>
      articles.map((e) => Number(e.querySelectorAll(".score")[system].textContent));
    change("first", 0);
    seen.worst = scores(change("sort", "worst"), 0);
    seen.best = scores(change("sort", "best"), 0);
    seen.hidden = get("second-label").hidden;
    change("second", 1);
    seen.behind = change("sort", "behind").map(
      (e) => [0, 1].map((n) => Number(e.querySelectorAll(".score")[n].textContent)));
    seen.hiddenThen = get("second-label").hidden;
    seen.looping = ids(change("flag", "looping"));
    seen.badges = [...document.querySelectorAll("#rows .badge")].map((e) => e.textContent);
    change("first", 1);
    seen.numbers = ids(change("flag", "numbers"));
    const marks = document.querySelectorAll("#rows li:nth-child(2) mark");
    seen.marked = [...marks].map((e) => e.textContent);
    change("flag", "");
    change("sort", "file");
    seen.found = ids(change("search", " nimes, 12 MORTS ", "input"));
    change("search", "no such words", "input");
    seen.nothing = get("status").textContent;
    change("search", "", "input");
    seen.first = [get("previous").disabled, get("next").disabled];
    get("next").click(); get("next").click();
    seen.last = [get("status").textContent, get("next").disabled, get("page").textContent];
    """
    seen, _ = browse(page, tmp_path, steps)
    assert seen["worst"] == sorted(seen["worst"])
    assert seen["best"] == sorted(seen["best"], reverse=True)
    assert seen["worst"][0] < seen["best"][0] < 1
    assert (seen["hidden"], seen["hiddenThen"]) == (True, False)
    losses = [bad - good for bad, good in seen["behind"]]
    assert losses == sorted(losses)
    assert seen["looping"] == ["a5"]
    assert "loop" in seen["badges"]
    assert seen["numbers"].count("a3") == 1
    assert "12" in seen["marked"]
    assert seen["found"] == ["a3", "a4"]  # its own title, and the one of "bad" for the next
    assert seen["nothing"] == "No article is like that."
    assert seen["first"] == [True, False]
    assert seen["last"] == ["41 to 50 of 50 articles", True, "page 3 of 3"]


@needs_browser
def test_tables_sort_by_keyboard_and_go_back(page, tmp_path):
    steps = """
    const table = document.querySelector("#scores table");
    const heading = table.tHead.rows[0].cells[3], button = heading.querySelector("button");
    const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
    button.focus();
    seen.focused = document.activeElement === button;
    seen.orders = [names()];
    for (let press = 0; press < 3; press++) {
      button.click(); // as Enter and Space do on a button
      seen.orders.push([heading.getAttribute("aria-sort"), ...names()]);
    }
    """
    seen, _ = browse(page, tmp_path, steps)
    assert seen["focused"]
    unsorted, down, up, again = seen["orders"]
    assert down[:2] == ["descending", "good"]
    assert up == ["ascending", *reversed(down[1:])]
    assert again == [None, *unsorted]


@needs_browser
@pytest.mark.parametrize(
    ("dark", "paper"), [(False, "rgb(253, 252, 248)"), (True, "rgb(23, 22, 19)")]
)
def test_it_follows_the_readers_light_and_fits_a_narrow_window(page, tmp_path, dark, paper):
    steps = """
    seen.paper = getComputedStyle(document.body).backgroundColor;
    seen.overflow = document.documentElement.scrollWidth - innerWidth;
    seen.stacked = getComputedStyle(document.querySelector(".titles li")).display;
    """
    seen, _ = browse(page, tmp_path, steps, width=500, dark=dark)
    assert seen["paper"] == paper
    assert seen["overflow"] <= 0
    assert seen["stacked"] == "grid"


@needs_browser
def test_without_scores_the_list_is_there_all_the_same(tmp_path):
    rows = french_rows(3)
    write_csv(tmp_path / "r.csv", rows)
    options = ["--articles", str(tmp_path / "r.csv"), "--predictions", str(tmp_path / "r.csv")]
    score.main([*options, "--output_dir", str(tmp_path)])
    steps = "seen.titles = [...document.querySelectorAll('.title')].map((e) => e.textContent);"
    seen, _ = browse(tmp_path / "report.html", tmp_path, steps)
    links = [link["href"] for link in Elements(tmp_path / "report.html").all("a")]
    assert links == ["#titles", "#list"]
    assert len(seen["titles"]) == 3
    assert seen["titles"][0].startswith(rows[0]["titles"])
