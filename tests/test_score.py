"""scripts/score.py and its metric: the figures, the pairing by ID, what is refused.

python -m pytest tests/test_score.py
"""

import csv
import json
import os
import random
import statistics
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import score
from exit_codes import UserError
from title_figures import import_rouge, rouge_means, rouge_rows

SCRIPTS = Path(score.__file__).parent
ROUGE_TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
TRUE_TITLES = [
    "L'été à l'Élysée : Macron évacué",
    "Grève à la SNCF : le trafic très perturbé ce lundi",
    "Météo : la canicule s'installe dans le sud de la France",
    "Un incendie a ravagé la cathédrale Notre-Dame de Paris",
]
OTHER_TITLES = [
    "Macron à l'Élysée cet été",
    "SNCF : une grève perturbe le trafic",
    "",
    "The fire destroyed the roof of the cathedral in Paris",
]


def write_csv(path: Path, header: list[str], rows) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def files(tmp_path):
    """References without IDs, as the challenge's validation file, and what infer.py writes."""
    write_csv(
        tmp_path / "references.csv",
        ["text", "titles"],
        [["un article", title] for title in TRUE_TITLES],
    )
    write_csv(tmp_path / "a.csv", ["ID", "titles"], enumerate(OTHER_TITLES))
    write_csv(tmp_path / "b.csv", ["ID", "titles"], enumerate(TRUE_TITLES))
    return tmp_path


def command_line(*arguments, cwd=None, code=0, python_options=(), **environment):
    """Run score.py as a user does, in a place where nothing can be cached or downloaded."""
    done = subprocess.run(
        [sys.executable, *python_options, SCRIPTS / "score.py", *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HOME": "/dev/null/no", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def refused(folder: Path, *predictions, references="references.csv") -> str:
    """Return the one line of complaint of a call that must leave nothing behind."""
    arguments = ["--references", references, "--predictions", *predictions, "--output_dir", "out"]
    done = command_line(*arguments, cwd=folder, code=2)
    assert done.stdout == ""
    assert not (folder / "out").exists()
    assert done.stderr.count("\n") == 1
    return done.stderr.removesuffix("\n")


def rouge(prediction: str, reference: str, tokenizer: str) -> list[float]:
    return list(rouge_means([prediction], [reference])[tokenizer].values())


def metric():
    metric_class, _ = import_rouge()
    return metric_class(keep_in_memory=True)


@pytest.fixture(autouse=True)
def metrics_cache(tmp_path, monkeypatch):
    """The folder that a metric makes when it is told no other."""
    import_rouge()
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "metrics_cache")


# --- ROUGE -------------------------------------------------------------------------------------


def test_default_figures_equal_rouge_score_called_directly():
    from rouge_score.rouge_scorer import RougeScorer

    rng = random.Random(3)
    words = [*" ".join(TRUE_TITLES).split(), "2.600", "canicules", "œuvre", "\n", "\n"]
    titles = [" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(60)]
    predictions = ["", " ", "à", *(" ".join(rng.choices(words, k=12)) for _ in range(57))]
    scorer = RougeScorer(ROUGE_TYPES)
    rows = [scorer.score(*pair) for pair in zip(titles, predictions, strict=True)]

    scores = rouge_means(predictions, titles)["default"]
    each = rouge_rows(predictions, titles)["default"]

    assert list(scores) == ROUGE_TYPES
    for name in ROUGE_TYPES:
        mean = statistics.fmean(row[name].fmeasure for row in rows)
        assert 0.05 < mean < 0.9
        assert abs(scores[name] - mean) < 1e-12
        assert each[name] == pytest.approx([row[name].fmeasure for row in rows], abs=1e-12)
    assert each["rougeL"] != each["rougeLsum"]  # some titles have lines


def test_french_example_computed_by_hand():
    # default: les c t s vacu s / les cit s vacu es: 3 common words of 6 and 5, 1 pair of 5 and 4.
    # unicode: les côtés évacués / les cités évacuées: 1 common word of 3 and 3, no pair.
    pair = "Les cités évacuées", "Les côtés évacués"
    assert rouge(*pair, "default") == pytest.approx([6 / 11, 2 / 9, 6 / 11, 6 / 11], abs=1e-12)
    assert rouge(*pair, "unicode") == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=1e-12)
    # unicode: l été à l élysée macron évacué / macron à l élysée cet été: 5 common words of 7
    # and 6, the pairs à l and l élysée, and à l élysée in order.
    pair = OTHER_TITLES[0], TRUE_TITLES[0]
    assert rouge(*pair, "unicode") == pytest.approx([10 / 13, 4 / 11, 6 / 13, 6 / 13], abs=1e-12)


@pytest.mark.parametrize("tokenizer", ["default", "unicode"])
def test_the_same_title_scores_one(tokenizer):
    assert rouge(TRUE_TITLES[0], TRUE_TITLES[0], tokenizer) == [1, 1, 1, 1]


def test_unicode_figures_see_accents_and_not_how_they_are_encoded():
    title = "Évacué à l'Élysée"
    bare, decomposed = "Evacue a l'Elysee", unicodedata.normalize("NFD", title)
    assert rouge(bare, title, "unicode") == pytest.approx([1 / 4, 0, 1 / 4, 1 / 4])
    assert decomposed != title
    assert rouge(decomposed, title, "unicode") == [1, 1, 1, 1]
    assert rouge(title, decomposed, "unicode") == [1, 1, 1, 1]
    assert rouge(decomposed, title, "default")[0] < 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("à", ["à"]),
        ("L'Élysée, l\u2019œuvre", ["l", "élysée", "l", "œuvre"]),
        (
            "« Noël » : 2.600 €, c'est-à-dire ça !",
            ["noël", "2", "600", "c", "est", "à", "dire", "ça"],
        ),
        ("snake_case", ["snake", "case"]),
        ("İmamoğlu à İzmir", ["i̇mamoğlu", "à", "i̇zmir"]),
        ("Путин и 习近平", ["путин", "и", "习近平"]),
        ("… « » — \u2019", []),
    ],
)
def test_unicode_tokenizer(text, words):
    _, tokenizers = import_rouge()
    assert tokenizers["unicode"].tokenize(text) == words
    assert tokenizers["unicode"].tokenize(unicodedata.normalize("NFD", text)) == words


def test_rouge_lsum_differs_from_rouge_l_where_titles_have_lines():
    scores = rouge_means(["c d\na b"], ["a b\nc d"])
    for tokenizer in ("default", "unicode"):
        assert scores[tokenizer]["rougeL"] == 0.5
        assert scores[tokenizer]["rougeLsum"] == 1


def test_metric_gives_each_row_if_asked():
    arguments = {"predictions": OTHER_TITLES, "references": TRUE_TITLES, "tokenizer": "unicode"}
    means = metric().compute(**arguments)
    rows = metric().compute(**arguments, use_aggregator=False)
    assert list(rows) == list(means) == ROUGE_TYPES
    for name in ROUGE_TYPES:
        assert len(rows[name]) == 4
        assert len(set(rows[name])) > 1
        assert statistics.fmean(rows[name]) == means[name]


def test_evaluate_loads_the_metric_without_network(tmp_path):
    code = """
import json, socket, sys

def blocked(*args, **kwargs):
    raise OSError("the network is blocked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = blocked
sys.modules["transformers"] = None  # seconds of import that have no part in this
import evaluate

del sys.modules["transformers"]
rouge = evaluate.load(sys.argv[1])
titles = json.loads(sys.argv[2])
print(json.dumps([type(rouge).__module__, rouge.compute(**titles, tokenizer="unicode")]))
"""
    home = tmp_path / "home"
    titles = {"predictions": OTHER_TITLES, "references": TRUE_TITLES}
    done = subprocess.run(
        [sys.executable, "-c", code, SCRIPTS / "title_rouge.py", json.dumps(titles)],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    module, scores = json.loads(done.stdout)
    assert module.startswith("evaluate_modules.metrics.title_rouge.")  # evaluate's copy of it
    assert scores == rouge_means(OTHER_TITLES, TRUE_TITLES)["unicode"]


@pytest.mark.parametrize(
    ("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])]
)
def test_lists_that_cannot_be_paired(predictions, references):
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions for {len(references)} "):
        rouge_means(predictions, references)


# --- Pairing by ID -------------------------------------------------------------------------------


def scored(folder: Path, *predictions, references="references.csv", options=()) -> dict:
    arguments = ["--references", str(folder / references), "--output_dir", str(folder / "scores")]
    files = [name if "=" in name else str(folder / name) for name in predictions]
    assert score.main([*arguments, *options, "--predictions", *files]) == 0
    return json.loads((folder / "scores" / "scores.json").read_text(encoding="utf-8"))


def test_rows_are_paired_by_id(files):
    named = [[f"n{row}", "un article", title] for row, title in enumerate(TRUE_TITLES)]
    write_csv(files / "named.csv", ["ID", "text", "titles"], named)
    pairs = [[f"n{row}", title] for row, title in enumerate(OTHER_TITLES)]
    write_csv(files / "ordered.csv", ["ID", "titles"], pairs)
    write_csv(files / "reordered.csv", ["titles", "ID"], [[t, i] for i, t in reversed(pairs)])

    scores = scored(files, "ordered.csv", "reordered.csv", references="named.csv")["predictions"]

    expected = rouge_means(OTHER_TITLES, TRUE_TITLES)
    assert expected != rouge_means(OTHER_TITLES[::-1], TRUE_TITLES)
    for name in ("ordered", "reordered"):
        assert scores[name]["rouge"] == expected
        assert scores[name]["empty"] == 1


def test_rows_are_their_own_ids_where_there_are_none(files):
    shuffled = [3, 1, 0, 2]
    write_csv(files / "shuffled.csv", ["ID", "titles"], [[i, OTHER_TITLES[i]] for i in shuffled])
    write_csv(files / "plain.csv", ["titles"], [[title] for title in OTHER_TITLES])
    rows = [json.dumps({"ID": i, "titles": OTHER_TITLES[i]}) for i in shuffled]
    (files / "numbers.jsonl").write_text("\n".join(rows), encoding="utf-8")
    scores = scored(files, "a.csv", "shuffled.csv", "plain.csv", "numbers.jsonl")["predictions"]
    assert scores["a"]["rouge"]["default"]["rougeL"] > 0.2
    for name in ("shuffled", "plain", "numbers"):
        assert scores[name]["rouge"] == scores["a"]["rouge"]


def test_other_names_of_columns(files):
    rows = [[f"n{row}", title] for row, title in enumerate(TRUE_TITLES)]
    write_csv(files / "named.csv", ["guid", "headline"], rows)
    write_csv(files / "c.csv", ["ID", "titles"], rows[::-1])
    options = ["--title_column", "headline", "--id_column", "guid"]
    scores = scored(files, "c.csv", references="named.csv", options=options)
    assert scores["predictions"]["c"]["rouge"]["unicode"]["rouge2"] == 1

    options += ["--prediction_title_column", "headline", "--prediction_id_column", "guid"]
    scores = scored(files, "named.csv", references="named.csv", options=options)
    assert scores["predictions"]["named"]["rouge"]["unicode"]["rouge2"] == 1

    with pytest.raises(UserError, match="no column 'gid'; correct the name of the ID column"):
        scored(files, "b.csv", options=["--id_column", "gid"])


def test_missing_ids_are_refused(files):
    write_csv(files / "c.csv", ["ID", "titles"], [[0, "un titre"], [2, "un titre"]])
    assert refused(files, "a.csv", "c.csv") == (
        "error: c.csv: no title for ID '1' of references.csv, whose rows are counted from 0 "
        "(2 missing); predict the titles of that whole file"
    )


def test_extra_ids_are_refused(files):
    named = [[f"n{row}", title] for row, title in enumerate(TRUE_TITLES)]
    write_csv(files / "named.csv", ["ID", "titles"], named[:3])
    write_csv(files / "c.csv", ["ID", "titles"], named)
    assert refused(files, "c.csv", references="named.csv") == (
        "error: c.csv: ID 'n3' is not in named.csv (1 too many); "
        "give the references of the articles that were predicted"
    )


def test_doubled_ids_are_refused(files):
    write_csv(files / "c.csv", ["ID", "titles"], [[0, "un"], [1, "deux"], [1, "trois"]])
    assert refused(files, "c.csv") == "error: c.csv:4: ID '1' is there twice; make it unique"


def test_rows_without_ids_are_refused_where_the_references_are_in_another_order(files):
    write_csv(
        files / "named.csv", ["ID", "titles"], [[3 - i, t] for i, t in enumerate(TRUE_TITLES)]
    )
    write_csv(files / "plain.csv", ["titles"], [[title] for title in TRUE_TITLES])
    assert refused(files, "plain.csv", references="named.csv") == (
        "error: plain.csv: no IDs in it, and those of named.csv are not its row numbers; "
        "add the column or name it with --prediction_id_column"
    )


# --- The command line ----------------------------------------------------------------------------


def test_table_and_json_agree(files):
    """From another working directory, with no home to write to, where torch is never imported."""
    elsewhere = files / "elsewhere"
    elsewhere.mkdir()
    arguments = ["--references", "../references.csv", "--output_dir", "../scores/new"]
    arguments += ["--predictions", "../a.csv", "une bien longue étiquette, n° 1=../b.csv"]
    done = command_line(
        *arguments, cwd=elsewhere, python_options=["-X", "importtime"], HOME="/dev/null/no"
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "evaluate" in imported
    assert not imported & {"torch", "tensorflow", "jax"}

    scores = json.loads((files / "scores/new/scores.json").read_text(encoding="utf-8"))
    assert list(scores) == ["references", "predictions", "tokenizers", "versions"]
    assert set(scores["versions"]) == {"evaluate", "rouge_score", "py3langid"}
    assert set(scores["tokenizers"]) == {"default", "unicode"}
    assert list(scores["predictions"]) == ["a", "une bien longue étiquette, n° 1"]
    assert (
        scores["predictions"]["a"] | score.score_titles(OTHER_TITLES, TRUE_TITLES)
        == (scores["predictions"]["a"])
    )
    assert scores["predictions"]["a"]["path"] == "../a.csv"
    assert scores["predictions"]["a"]["rows"] == 4
    assert scores["predictions"]["a"]["empty"] == 1

    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines) == 80
    rules = [number for number, line in enumerate(lines) if line == "-" * 80]
    assert len(rules) == 2
    table = [line.rsplit(maxsplit=8) for line in lines[rules[0] + 1 : rules[1]]]
    assert [row[0] for row in table] == ["(references)", "a", "une bien..te, n° 1"]
    assert table[0][1:6] == ["-"] * 5
    for row, titles in zip(table[1:], scores["predictions"].values(), strict=True):
        default, unicode = titles["rouge"]["default"], titles["rouge"]["unicode"]
        figures = [*(default[name] for name in ROUGE_TYPES), unicode["rougeL"]]
        assert row[1:6] == [f"{figure:.4f}" for figure in figures]
    for row, titles in zip(
        table, [scores["references"], *scores["predictions"].values()], strict=True
    ):
        words, french = titles["words"]["mean"], titles["language"]["french"]
        assert row[6:] == [f"{words:.1f}", f"{french:.1%}", str(titles["empty"])]
    assert table[1][7:] == ["66.7%", "1"]


def test_the_same_files_give_the_same_output_and_nothing_else_is_touched(files, capsys):
    (files / "scores").mkdir()
    (files / "scores" / "notes.txt").write_text("mine")
    first, shown = scored(files, "a.csv", "b.csv"), capsys.readouterr().out
    saved = (files / "scores" / "scores.json").read_bytes()
    assert scored(files, "a.csv", "b.csv") == first
    assert (files / "scores" / "scores.json").read_bytes() == saved
    assert capsys.readouterr().out == shown
    assert scored(files, "b.csv")["predictions"].keys() == {"b"}
    assert {path.name for path in (files / "scores").iterdir()} == {"notes.txt", "scores.json"}
    assert (files / "scores" / "notes.txt").read_text() == "mine"
    assert not (files / "metrics_cache").exists()


def test_names_of_rows(files, monkeypatch):
    (files / "lr=2e-4.csv").write_bytes((files / "a.csv").read_bytes())
    monkeypatch.chdir(files)
    named = score.name_files(["lr=2e-4.csv", "x=lr=2e-4.csv", "m.v2.CSV.gz", "owner/name", "é=p"])
    assert named == {
        "lr=2e-4": "lr=2e-4.csv",
        "x": "lr=2e-4.csv",
        "m.v2": "m.v2.CSV.gz",
        "name": "owner/name",
        "é": "p",
    }


@pytest.mark.parametrize(
    ("predictions", "complaint"),
    [
        (["a.csv", "other/a.csv"], "other/a.csv: a second file is called 'a'; tell them apart by"),
        (["b=a.csv", "b.csv"], "b.csv: a second file is called 'b'; tell them apart by NAME=FILE"),
        (["=a.csv"], "=a.csv: no name for this row; give NAME=FILE"),
        (["a\nb=a.csv"], "a\nb=a.csv: no name for this row; give NAME=FILE"),
    ],
)
def test_rows_that_cannot_be_told_apart(predictions, complaint):
    with pytest.raises(UserError) as error:
        score.name_files(predictions)
    assert str(error.value).startswith(complaint)


def test_references_without_titles_are_refused(files):
    write_csv(files / "empty.csv", ["text", "titles"], [["un article", ""]])
    complaint = refused(files, "a.csv", references="empty.csv")
    assert complaint.startswith("error: empty.csv:2: the column 'titles' is empty; ")
    assert refused(files, "none.csv").startswith("error: none.csv: there is no such file; ")


def test_an_output_folder_that_cannot_be_written(files):
    arguments = ["--references", "references.csv", "--predictions", "a.csv", "--output_dir"]
    done = command_line(*arguments, "b.csv", cwd=files, code=2)
    assert done.stderr == (
        "error: b.csv: no folder can be made (File exists); give another --output_dir\n"
    )
    (files / "taken" / "scores.json").mkdir(parents=True)
    done = command_line(*arguments, "taken", cwd=files, code=2)
    assert done.stderr == (
        "error: taken: scores.json cannot be written; give another --output_dir\n"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["a.csv"]])
def test_help_and_complaints_wait_for_no_heavy_import(files, arguments):
    if arguments != ["--help"]:
        write_csv(files / "c.csv", ["ID", "titles"], [[0, "un titre"]])
        arguments = ["--references", "references.csv", "--predictions", "c.csv"]
        arguments += ["--output_dir", "out"]
    code = 0 if arguments == ["--help"] else 2
    done = command_line(*arguments, cwd=files, code=code, python_options=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "articles" in imported
    assert not imported & {"evaluate", "datasets", "numpy", "pandas", "py3langid", "rouge_score"}


def test_through_accelerate_launch(files, run_script):
    arguments = ("--references", files / "references.csv", "--predictions", files / "a.csv")
    result = run_script("score.py", *arguments, "--output_dir", files / "s", launch=True)
    assert "comparable" in result.stdout
    assert (files / "s/scores.json").is_file()
