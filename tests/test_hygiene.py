"""hygiene.py: what is said of doubtful rows, and that they are trained on all the same.

python -m pytest tests/test_hygiene.py
"""

import json
import random
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import pytest
from conftest import SCRIPTS, call, french_rows, train_args, write_csv
from test_articles import write

import articles
import train
from articles import Columns, check_articles
from hygiene import Survey, report_rows, report_titles

COLUMNS = Columns(id=None)
LONG = "Le maire d'Orléans inaugure une école."


def rows(*pairs) -> list[dict]:
    return [{"text": text, "titles": title} for text, title in pairs]


def survey(path, *pairs) -> Survey:
    """Return the survey of a file with these articles and titles, in the format of its name."""
    found = Survey(write(path, rows(*pairs)))
    check_articles(found.path, COLUMNS, survey=found)
    return found


def report(capsys, **surveys) -> list[str]:
    report_rows(surveys)
    return capsys.readouterr().out.splitlines()


FORMATS = ["a.csv", "a.csv.gz", "blank.csv", "crlf.csv", "a.json", "a.jsonl", "a.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_repeats_are_counted_and_the_first_is_named_beside_its_original(tmp_path, capsys, name):
    twice = f"{LONG}\nUn autre « maire »,\n\nde même."
    pairs = [(LONG, "A"), (twice, "B"), ("Seul, et le seul.", "C"), (twice, "Autre"), (LONG, "A")]
    found = survey(tmp_path / f"file.{name}", *pairs, (LONG, "D"))
    first = 2 if "csv" in name else 1  # the header of a CSV is its row 1
    assert report(capsys, train=found) == [
        f"NOTE: repeated articles: 3 (1 with the same title), first {found.path}:{first + 3}, "
        f"which repeats {found.path}:{first + 1}"
    ]
    assert found.counts == {"repeated": 3, "repeated_with_title": 1, "shorter_than_title": 0}


def test_rows_are_those_of_the_file_where_lines_are_blank(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text(f'text,titles\n\n"{LONG}\n\n",A\n\n\nCourt,Plus long\n"{LONG}\n\n",B\n\n')
    found = Survey(str(path))
    check_articles(found.path, COLUMNS, survey=found)
    assert report(capsys, train=found) == [
        f"NOTE: repeated articles: 1 (0 with the same title), first {path}:7, which repeats "
        f"{path}:3",
        f"NOTE: articles shorter than their title: 1, first {path}:6",
    ]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in rows((LONG, "A"), (LONG, "A"))]
    path.write_text("\n\n".join(lines))
    found = Survey(str(path))
    check_articles(found.path, COLUMNS, survey=found)
    assert report(capsys, train=found) == [
        f"NOTE: repeated articles: 1 (1 with the same title), first {path}:3, which repeats "
        f"{path}:1"
    ]


@pytest.mark.parametrize(("one", "other"), [("a.csv", "b.jsonl"), ("a.parquet", "b.json")])
def test_articles_in_both_files_are_named_in_both(tmp_path, capsys, one, other):
    training = survey(tmp_path / one, ("Un article.", "A"), (LONG, "B"), ("À la fin.", "C"))
    leak = [("Autre article.", "A"), ("À la fin.", "D"), (LONG, "B"), ("Un autre.", "B")]
    validation = survey(tmp_path / other, *leak)
    line = 4 if one == "a.csv" else 3
    assert report(capsys, train=training, validation=validation) == [
        f"NOTE: validation articles that are trained on: 2 (1 with the same title), first "
        f"{validation.path}:2, which is {training.path}:{line}"
    ]
    assert validation.counts["trained_on"] == 2
    assert validation.counts["trained_on_with_title"] == 1
    assert "trained_on" not in training.counts


def test_the_training_file_as_validation_is_a_leak_of_every_row(tmp_path, capsys):
    both = {split: survey(tmp_path / "a.csv", (LONG, "A"), ("Un.", "B")) for split in "tv"}
    assert report(capsys, train=both["t"], validation=both["v"]) == [
        f"NOTE: validation articles that are trained on: 2 (2 with the same title), first "
        f"{both['v'].path}:2, which is {both['t'].path}:2"
    ]


def test_repeats_within_the_validation_file_are_told_too(tmp_path, capsys):
    training = survey(tmp_path / "a.csv", (LONG, "A"))
    validation = survey(tmp_path / "b.csv", ("Un.", "A"), ("Deux.", "B"), ("Un.", "A"))
    assert report(capsys, train=training, validation=validation) == [
        f"NOTE: repeated articles: 1 (1 with the same title), first {validation.path}:4, which "
        f"repeats {validation.path}:2"
    ]


def test_an_article_is_shorter_than_its_title_by_characters_without_blanks_around(tmp_path, capsys):
    pairs = [("Été à Nîmes", "Été à Nîme "), ("Égal", "Égal"), ("  Court  ", "Courte"), ("a", "bc")]
    found = survey(tmp_path / "a.csv", *pairs)
    assert report(capsys, train=found) == [
        f"NOTE: articles shorter than their title: 2, first {found.path}:4"
    ]
    assert found.counts["shorter_than_title"] == 2


ALMOST = [
    ("ab", "c"),  # the same as the next when put together
    ("a", "bc"),
    ("Élève", "A"),
    (unicodedata.normalize("NFD", "Élève"), "A"),
    ("élève", "A"),
    ("Élève ", "A"),
    ("Élève\n", "A"),
    ("Élève.", "A"),
    ("Un\N{NBSP}an", "A"),
    ("Un an", "A"),
    ("Titre", "Article"),  # the other way round in the next
    ("Article", "Titre"),
    ("👩‍👩‍👧", "A"),
    ("👩‍👧‍👩", "A"),
]


def test_what_is_almost_the_same_is_not_the_same(tmp_path, capsys):
    found = survey(tmp_path / "a.csv", *ALMOST)
    lines = report(capsys, train=found)
    assert [line for line in lines if "shorter" not in line] == []
    assert (found.counts["repeated"], found.counts["repeated_with_title"]) == (0, 0)
    halves = survey(tmp_path / "b.csv", *ALMOST[::2]), survey(tmp_path / "c.csv", *ALMOST[1::2])
    lines = report(capsys, train=halves[0], validation=halves[1])
    assert [line for line in lines if "shorter" not in line] == []
    assert halves[1].counts["trained_on_with_title"] == 0


def test_characters_beyond_latin_are_found_again(tmp_path, capsys):
    text = "« Œuvre » 👩‍👩‍👧 \u2028 Ποίηση"
    found = survey(tmp_path / "a.jsonl", (text, "A"), ("Un.", "A"), (text, "A"))
    (line,) = report(capsys, train=found)
    assert line.startswith("NOTE: repeated articles: 1 (1 with")
    assert line.endswith(f"{found.path}:3, which repeats {found.path}:1")


def test_of_clean_files_nothing_is_said(tmp_path, capsys):
    found = {
        split: survey(tmp_path / f"{split}.csv", *((f"{LONG} {split} {n}", LONG) for n in range(9)))
        for split in ("train", "validation")
    }
    assert report(capsys, **found) == []
    assert not any(count for part in found.values() for count in part.counts.values())


def test_counts_equal_those_of_a_slow_and_simple_way(tmp_path, capsys):
    rng = random.Random(7)
    pairs = {
        split: [(f"{LONG} {rng.randrange(120)}", f"Titre {rng.randrange(3)}") for _ in range(150)]
        for split in ("train", "validation")
    }
    found = {split: survey(tmp_path / f"{split}.csv", *pairs[split]) for split in pairs}
    lines = report(capsys, **found)
    for split in pairs:
        texts = [text for text, _ in pairs[split]]
        again = [n for n, text in enumerate(texts) if text in texts[:n]]
        assert found[split].counts["repeated"] == len(again) > 50
        assert found[split].counts["repeated_with_title"] == 150 - len(set(pairs[split]))
        first = f"{found[split].path}:{again[0] + 2}, which repeats "
        first += f"{found[split].path}:{texts.index(texts[again[0]]) + 2}"
        assert sum(line.endswith(f"first {first}") for line in lines) == 1
    train_texts = [text for text, _ in pairs["train"]]
    leaked = [n for n, (text, _) in enumerate(pairs["validation"]) if text in train_texts]
    assert found["validation"].counts["trained_on"] == len(leaked)
    same_title = sum(pair in pairs["train"] for pair in pairs["validation"])
    assert found["validation"].counts["trained_on_with_title"] == same_title
    original = train_texts.index(pairs["validation"][leaked[0]][0]) + 2
    end = f"first {found['validation'].path}:{leaked[0] + 2}, which is {found['train'].path}"
    assert lines[-1].endswith(f"{end}:{original}")


@pytest.mark.parametrize(
    ("lengths", "line"),
    [
        ((1234, 1, True), "titles longer than 24 tokens with their EOS: 1,234, first {path}:3"),
        ((7, 0, False), "titles longer than 24 tokens with their EOS: about 7, such as {path}:2"),
        ((0, None, True), None),
    ],
)
def test_titles_over_their_budget(tmp_path, capsys, lengths, line):
    found = survey(tmp_path / "a.csv", (LONG, "A"), ("Un.", "B"))
    lengths = dict(zip(("titles_cut", "first_title_cut", "exact"), lengths, strict=True))
    report_titles(found, lengths, 24)
    said = capsys.readouterr().out
    assert said == (f"NOTE: {line.format(path=found.path)}\n" if line else "")
    assert found.counts["titles_cut"] == lengths["titles_cut"]


def test_other_processes_than_the_first_are_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    found = survey(tmp_path / "a.csv", (LONG, "A"), (LONG, "A"))
    assert report(capsys, train=found) == []


def test_a_row_takes_24_bytes_whatever_its_length():
    found, many = Survey("a"), 1000
    for row in range(many):
        found.add(row, LONG * row, f"{row}")
    sizes = [len(part) * part.itemsize for part in (found.rows, found.texts, found.pairs)]
    assert sum(sizes) == 24 * many


def test_numpy_is_not_imported_before_it_is_needed():
    code = "import sys, hygiene; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS).returncode == 0


def test_a_slow_check_says_how_long_it_took(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.csv", rows((LONG, "A"), ("Un.", "B")))
    check_articles(path, COLUMNS)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(articles, "SLOW", 0)
    clock = SimpleNamespace(perf_counter=iter([10.0, 51.3]).__next__)
    monkeypatch.setattr(articles, "time", clock)
    check_articles(path, COLUMNS)
    assert capsys.readouterr().out == f"NOTE: {path}: 2 rows checked in 41 s\n"


# ---------------------------------------------------------------------- in training


def test_training_tells_all_before_the_model_and_uses_every_row(tiny_model, tmp_path, capsys):
    training, validation = french_rows(12, seed=5), french_rows(5, seed=6)
    for row in (*training, *validation):
        row["text"] += f" {LONG * 3}"
        row["titles"] = row["titles"][:12]
    training[7] |= {"text": training[2]["text"]}
    training[9] |= {"text": training[2]["text"], "titles": training[2]["titles"]}
    training[4] |= {"text": "Bref.", "titles": "Un titre qui n'en finit pas, à Orléans " * 3}
    validation[3] |= {"text": training[0]["text"]}
    validation[1] |= {"titles": "Un titre qui n'en finit pas, à Orléans " * 3}
    write_csv(tmp_path / "train.csv", training)
    write_csv(tmp_path / "validation.csv", validation)
    call(train.main, *train_args(tiny_model, tmp_path, tmp_path / "run", "--num_train_epochs", "1"))
    output = capsys.readouterr().out
    files = {split: tmp_path / f"{split}.csv" for split in ("train", "validation")}
    expected = [
        "NOTE: repeated articles: 2 (1 with the same title), first {train}:9, which repeats "
        "{train}:4",
        "NOTE: articles shorter than their title: 1, first {train}:6",
        "NOTE: validation articles that are trained on: 1 (0 with the same title), first "
        "{validation}:5, which is {train}:2",
        "NOTE: titles longer than 24 tokens with their EOS: 1, first {train}:6",
        "NOTE: titles longer than 24 tokens with their EOS: 1, first {validation}:3",
    ]
    before_the_plan = output[: output.index("articles   12 rows")]
    assert before_the_plan.splitlines() == [line.format(**files) for line in expected]
    updates = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["articles"] for row in updates if "articles" in row] == [8, 4]
    record = json.loads((tmp_path / "run/run_config.json").read_text())
    assert record["hygiene"] == {
        "train": {
            "repeated": 2,
            "repeated_with_title": 1,
            "shorter_than_title": 1,
            "titles_cut": 1,
        },
        "validation": {
            "repeated": 0,
            "repeated_with_title": 0,
            "shorter_than_title": 0,
            "trained_on": 1,
            "trained_on_with_title": 0,
            "titles_cut": 1,
        },
    }
    assert set(record["data"]["train"]) == {"path", "rows", "sha256", "has_ids"}


def test_a_clean_corpus_is_trained_on_without_a_note(tiny_model, tmp_path, capsys):
    for split, seed in (("train", 5), ("validation", 6)):
        clean = french_rows(4, seed=seed)
        for number, row in enumerate(clean):
            row |= {"text": f"{row['text']} {LONG} {split} {number}", "titles": "Une école"}
        write_csv(tmp_path / f"{split}.csv", clean)
    call(train.main, *train_args(tiny_model, tmp_path, tmp_path / "run", "--max_train_steps", "1"))
    assert "NOTE" not in capsys.readouterr().out
