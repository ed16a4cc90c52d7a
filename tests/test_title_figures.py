"""scripts/title_figures.py: figures by row, on one process or several, and what they add up to.

python -m pytest tests/test_title_figures.py
"""

import contextlib
import functools
import random
import signal
import subprocess
import sys
import time

import numpy
import psutil
import pytest
from conftest import SCRIPTS, french_rows, write_csv

import title_figures
from title_figures import Figures, describe, measure, rouge_rows

TITLES = [
    "Macron à l'Élysée cet été",
    "Grève : « tout est perdu », dit la SNCF",
    "",
    "macron  à l'élysée cet ÉTÉ",
    "le chat le chat le chat le chat",
    "The fire destroyed the roof of the cathedral",
    "Der Bundestag beschließt ein neues Gesetz über die Renten",
]
ARTICLES = [
    "Macron est à l'Élysée.",
    "Une grève, dit Paul.",
    "Rien.",
    "Macron.",
    "Un chat.",
    "In Paris.",
    "Berlin.",
]


def described(titles, **more) -> dict:
    figures, _, _ = measure(None, {"a": titles}, {}, **more)
    return describe(figures["a"])


def test_words_and_empty_titles():
    found = described(["« Le Havre » : 12 morts", "L'été", "", " \n"])
    assert found["empty"] == 2
    assert found["words"] == {"mean": (4 + 1) / 4, "q1": 0, "median": 0.5, "q3": 1.75}


def test_language_shares():
    assert described(TITLES)["language"] == {
        "french": pytest.approx(4 / 6),
        "english": pytest.approx(1 / 6),
        "other": pytest.approx(1 / 6),
    }
    assert described(["", " "])["language"] == dict.fromkeys(("french", "english", "other"))


def test_a_title_without_a_letter_has_no_language_and_is_not_empty():
    found = described(["Le maire démissionne", "12", "!!!", ""])
    assert found["language"] == {"french": 1, "english": 0, "other": 0}
    assert found["empty"] == 1


def test_flags_are_counted_and_listed():
    cut = [False] * 6 + [True]
    figures, _, _ = measure(None, {"a": TITLES}, {"a": cut}, enumerate(ARTICLES))
    found = figures["a"]
    assert [sorted(found.flags_of(row)) for row in range(7)] == [
        ["repeated"],
        ["names", "quotations"],
        ["empty"],
        ["names", "repeated"],
        ["looping"],
        [],
        ["cut", "names"],
    ]
    assert found.flags_of(1) == {"names": ["SNCF"], "quotations": ["tout est perdu"]}
    assert found.flags_of(3)["names"] == ["ÉTÉ"]
    assert found.flags_of(4) == {"looping": ["le chat le"]}
    assert describe(found)["flags"] == {
        **{"repeated": 2, "looping": 1, "cut": 1, "numbers": 0, "names": 3, "quotations": 1}
    }


def test_titles_that_are_empty_are_not_repeated():
    assert described(["", " ", "un", "deux"])["flags"]["repeated"] == 0


def test_what_could_not_be_looked_at_is_none_and_not_zero():
    found = described(TITLES)
    assert found["novel"] == dict.fromkeys("1234")
    unknown = ("cut", "numbers", "names", "quotations")
    assert {name: found["flags"][name] for name in unknown} == dict.fromkeys(unknown)


def test_mean_share_of_new_ngrams():
    found = described(["un deux trois", "un", ""], articles=enumerate(["un deux", "deux", "x"]))
    assert found["novel"] == {"1": (1 / 3 + 1) / 2, "2": 1 / 2, "3": 1, "4": None}


def test_rows_may_come_in_any_order_and_on_several_processes(monkeypatch):
    rows = french_rows(230, seed=4)
    true = [row["titles"] for row in rows]
    rng = random.Random(1)
    systems = {name: rng.sample(true, len(true)) for name in ("a", "b")}
    articles = [(number, row["text"]) for number, row in enumerate(rows)]
    baselines = ["lead1", "first3", "ext-oracle"]
    arguments = (true, systems, {}, iter(articles), baselines, [0, 7, 229])
    one, texts, written = measure(*arguments)
    assert texts == {row: rows[row]["text"] for row in (0, 7, 229)}
    assert written["first3"][7] == " ".join(rows[7]["text"].split()[:3])

    monkeypatch.setattr(title_figures, "FEW_TITLES", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    shuffled = iter(rng.sample(articles, len(articles)))
    two, *rest = measure(*arguments[:3], shuffled, *arguments[4:])
    assert rest == [texts, written]
    for name in (None, *systems, *baselines):
        assert describe(two[name]) == describe(one[name])
        assert two[name].marked == one[name].marked
        if name is not None:
            for tokenizer, types in one[name].rouge.items():
                for kind, values in types.items():
                    assert numpy.array_equal(two[name].rouge[tokenizer][kind], values)
    expected = rouge_rows(systems["a"], true)["unicode"]["rouge1"]
    assert one["a"].rouge["unicode"]["rouge1"].tolist() == expected


@pytest.mark.skipif(title_figures.num_cores() < 2, reason="one core starts no others")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_one_that_started_it(tmp_path, number):
    rows = french_rows(3_000, seed=1)
    file = write_csv(tmp_path / "r.csv", rows)
    command = [sys.executable, SCRIPTS / "score.py", "--references", file, "--output_dir", tmp_path]
    # A shell has its background jobs, and so the tests in one, ignore SIGINT.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = psutil.Popen(
        [*command, "--predictions", file],
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=heed,
    )
    try:
        children = []
        while len(children) < 2:  # beside Python's own resource tracker
            assert process.poll() is None
            children = [p for p in process.children() if "spawn_main" in " ".join(p.cmdline())]
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert alive == []
        assert not (tmp_path / "scores.json").exists()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_row_takes_little_memory():
    rows = 10_000
    figures = Figures(rows, ("default", "unicode"), True, [False] * rows)
    arrays = [figures.words, figures.language, figures.novel, *figures.flags.values()]
    arrays += [values for types in figures.rouge.values() for values in types.values()]
    assert sum(array.nbytes for array in arrays) < 200 * rows
