"""scripts/score.py and its metric: the figures, the pairing by ID, what is refused.

python -m pytest tests/test_score.py
"""

import csv
import itertools
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
        ("Straße, 50 m² et ½ ﬁn", ["straße", "50", "m²", "et", "½", "ﬁn"]),
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


def test_rows_are_their_own_ids_where_there_are_none(files, capsys):
    shuffled = [3, 1, 0, 2]
    write_csv(files / "shuffled.csv", ["ID", "titles"], [[i, OTHER_TITLES[i]] for i in shuffled])
    write_csv(files / "plain.csv", ["titles"], [[title] for title in OTHER_TITLES])
    rows = [json.dumps({"ID": i, "titles": OTHER_TITLES[i]}) for i in shuffled]
    (files / "numbers.jsonl").write_text("\n".join(rows), encoding="utf-8")
    scores = scored(files, "a.csv", "shuffled.csv", "plain.csv", "numbers.jsonl")["predictions"]
    assert scores["a"]["rouge"]["default"]["rougeL"] > 0.2
    for name in ("shuffled", "plain", "numbers"):
        assert scores[name]["rouge"] == scores["a"]["rouge"]
    assert "left aside" not in capsys.readouterr().out  # a JSONL has no details beside it


def test_rows_without_ids_go_with_ids_that_count_them(files):
    write_csv(files / "counted.csv", ["ID", "titles"], enumerate(TRUE_TITLES))
    write_csv(files / "plain.csv", ["titles"], [[title] for title in OTHER_TITLES])
    scores = scored(files, "plain.csv", references="counted.csv")
    assert scores["predictions"]["plain"]["rouge"] == rouge_means(OTHER_TITLES, TRUE_TITLES)


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
    assert set(scores["versions"]) == {"evaluate", "rouge_score", "scipy", "py3langid"}
    assert set(scores["tokenizers"]) == {"default", "unicode"}
    assert list(scores["predictions"]) == ["a", "une bien longue étiquette, n° 1"]
    a, b = scores["predictions"].values()
    assert a["rouge"] == rouge_means(OTHER_TITLES, TRUE_TITLES)
    assert (a["path"], a["rows"], a["empty"]) == ("../a.csv", 4, 1)
    assert scores["compared_to"] == "a"
    assert "compared" not in a
    for tokenizer, kind in itertools.product(scores["tokenizers"], ROUGE_TYPES):
        for system in (a, b):
            low, high = system["intervals"][tokenizer][kind]
            assert low <= system["rouge"][tokenizer][kind] <= high
        compared = b["compared"][tokenizer][kind]
        difference = 1 - a["rouge"][tokenizer][kind]
        assert compared["difference"] == pytest.approx(difference, abs=1e-12)
        assert compared["interval"][0] <= difference <= compared["interval"][1]
        assert 0 < compared["p"] <= 1

    lines = done.stdout.splitlines()[:-2]  # the last two name the files
    assert max(len(line) for line in lines) == 80
    assert "Of fewer than 30 titles, the intervals are too narrow." in lines
    rules = [number for number, line in enumerate(lines) if line == "-" * 80]
    assert len(rules) == 4
    table = [line.rsplit(maxsplit=7) for line in lines[rules[0] + 1 : rules[0] + 3]]
    assert [row[0] for row in table] == ["a", "une bien..te, n° 1"]
    for row, system in zip(table, (a, b), strict=True):
        default, unicode = system["rouge"]["default"], system["rouge"]["unicode"]
        assert row[1:4] == [f"{default[kind]:.4f}" for kind in ROUGE_TYPES[:3]]
        assert row[4] == "{:.4f}-{:.4f}".format(*system["intervals"]["default"]["rougeL"])
        assert row[6:] == [f"{default['rougeLsum']:.4f}", f"{unicode['rougeL']:.4f}"]
    assert table[0][5] == "-"
    assert table[1][5] == score.format_p(b["compared"]["default"]["rougeL"]["p"])
    table = [line.rsplit(maxsplit=9) for line in lines[rules[1] + 1 : rules[1] + 4]]
    assert [row[0] for row in table] == ["(true titles)", "a", "une bien..te, n° 1"]
    for row, system in zip(table, (scores["references"], a, b), strict=True):
        words, flags = system["words"], system["flags"]
        assert row[1:3] == [f"{words['mean']:.1f}", f"{words['q1']:.0f}-{words['q3']:.0f}"]
        assert row[3:6] == [f"{share:.1%}" for share in system["language"].values()]
        assert row[6:] == [str(system["empty"]), str(flags["repeated"]), str(flags["looping"]), "-"]
    assert table[1][3:5] == ["66.7%", "33.3%"]
    table = [line.rsplit(maxsplit=7) for line in lines[rules[2] + 1 : rules[2] + 4]]
    for row, system in zip(table, (scores["references"], a, b), strict=True):
        assert row[1:5] == [f"{share:.1%}" for share in system["novel"].values()]
        flags = (system["flags"][name] for name in ("numbers", "names", "quotations"))
        assert row[5:] == [f"{count / 4:.1%}" for count in flags]
    written = (files / "scores/new/flags.jsonl").read_text(encoding="utf-8").splitlines()
    flagged = [json.loads(line) for line in written]
    assert {"id": "2", "system": "a", "flags": {"empty": []}} in flagged
    assert {"id": "1", "system": None, "flags": {"names": ["SNCF"]}} in flagged
    for name, system in ((None, scores["references"]), *scores["predictions"].items()):
        for flag, count in ({"empty": system["empty"]} | system["flags"]).items():
            lines = [line for line in flagged if line["system"] == name and flag in line["flags"]]
            assert len(lines) == (count or 0)


def test_each_column_of_a_table_has_its_own_figure(files, capsys):
    """Of titles of one line, R-L and R-Lsum are the same, and so would be columns mixed up."""
    scores = scored(files, "a.csv", "b.csv")
    capsys.readouterr()
    system = scores["predictions"]["b"]
    values = itertools.count(1)
    for tokenizer, kind in itertools.product(("default", "unicode"), ROUGE_TYPES):
        system["rouge"][tokenizer][kind] = next(values) / 16
        system["intervals"][tokenizer][kind] = [next(values) / 16, next(values) / 16]
        system["compared"][tokenizer][kind]["p"] = next(values) / 100
    system["language"] = dict.fromkeys(system["language"])  # no title has a letter
    tables = score.format_tables(scores).split("\n\n")
    rows = [next(line for line in table.splitlines() if line[:2] == "b ") for table in tables]
    assert rows[0].split()[1:] == [
        *("0.0625", "0.3125", "0.5625", "0.6250-0.6875", ".120", "0.8125", "1.5625")
    ]
    assert rows[1].split()[3:6] == ["-", "-", "-"]


def test_the_legend_tells_of_what_is_in_the_tables():
    def said(rows, *names):
        scores = {"references": {}, "rows": rows, "predictions": dict.fromkeys(names)}
        return "\n".join(score.legend(scores | {"compared_to": names[0]}))

    paired = "p: of a difference in R-L to a"
    assert paired in said(2, "a", "b")
    assert paired not in said(2, "a")
    assert paired not in said(1, "a", "b")
    few = "Of fewer than 30 titles, the intervals are too narrow."
    assert few in said(29, "a")
    assert few not in said(30, "a")


@pytest.mark.parametrize(
    ("p", "shown"),
    [
        (None, "-"),
        (0.00099, "<.001"),
        (0.001, ".001"),
        (0.0476, ".048"),
        (0.5, ".500"),
        (1, "1.000"),
    ],
)
def test_p_values_fit_their_column(p, shown):
    assert score.format_p(p) == shown


def test_names_fit_their_column():
    assert score.short("a" * 17 + "b") == "a" * 17 + "b"
    assert score.short("a" * 9 + "b" * 10) == "aaaaaaaa..bbbbbbbb"


def test_the_same_files_give_the_same_output_and_nothing_else_is_touched(files, capsys):
    (files / "scores").mkdir()
    (files / "scores" / "notes.txt").write_text("mine")
    first, shown = scored(files, "a.csv", "b.csv"), capsys.readouterr().out
    saved = (files / "scores" / "scores.json").read_bytes()
    assert scored(files, "a.csv", "b.csv") == first
    assert (files / "scores" / "scores.json").read_bytes() == saved
    assert capsys.readouterr().out == shown
    report = (files / "scores" / "report.html").read_bytes()
    scored(files, "a.csv", "b.csv")
    assert (files / "scores" / "report.html").read_bytes() == report
    assert scored(files, "b.csv")["predictions"].keys() == {"b"}
    written = {"scores.json", "flags.jsonl", "report.html"}
    assert {path.name for path in (files / "scores").iterdir()} == {"notes.txt", *written}
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
    named = score.name_files(["x_lr=2e-4=b.csv", "y_lr=2e-4=lr=2e-4.csv", "z=lr=none.csv"])
    assert named == {"x_lr=2e-4": "b.csv", "y_lr=2e-4": "lr=2e-4.csv", "z": "lr=none.csv"}


def test_an_option_may_be_given_again(files):
    again = ("--predictions", "b.csv", "--baselines", "lead1", "--baselines", "first40")
    args = score.parse_args(
        ["--references", "r.csv", "--predictions", "a.csv", *again, "--output_dir", "out"]
    )
    assert (args.predictions, args.baselines) == (["a.csv", "b.csv"], ["lead1", "first40"])
    args = score.parse_args(["--runs", "a", "--runs", "b", "--output_dir", "out"])
    assert args.runs == ["a", "b"]


def test_names_of_files_need_not_be_utf_8(files):
    latin_1 = os.fsdecode("prédictions.csv".encode("latin-1"))
    (files / latin_1).write_bytes((files / "a.csv").read_bytes())
    done = command_line(
        *("--references", "references.csv", "--output_dir", "out"),
        *("--predictions", f"A={latin_1}"),
        cwd=files,
    )
    assert done.stderr == ""
    scores = json.loads((files / "out" / "scores.json").read_text(encoding="utf-8"))
    assert (files / scores["predictions"]["A"]["path"]).is_file()


@pytest.mark.parametrize(
    ("predictions", "complaint"),
    [
        (["a.csv", "other/a.csv"], "other/a.csv: a second file is called 'a'; tell them apart by"),
        (["b=a.csv", "b.csv"], "b.csv: a second file is called 'b'; tell them apart by NAME=FILE"),
        (["=a.csv"], "=a.csv: no name for this row; give NAME=FILE"),
        (["true titles=a.csv"], "true titles=a.csv: no name for this row; give NAME=FILE"),
        (["(true titles)=a.csv"], "(true titles)=a.csv: no name for this row; give NAME=FILE"),
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


@pytest.mark.parametrize("name", ["scores.json", "flags.jsonl", "report.html", None])
def test_all_that_is_written_has_its_place_before_anything_is_scored(tmp_path, monkeypatch, name):
    if name:
        (tmp_path / "out" / name).mkdir(parents=True)
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError) as error:
        score.make_output_dir(str(tmp_path / "out"))
    assert str(error.value) == (
        f"{tmp_path / 'out'}: {name or 'scores.json'} cannot be written; give another --output_dir"
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
    assert not imported & {"evaluate", "datasets", "numpy", "scipy", "py3langid", "huggingface_hub"}


# --- Baselines, articles, runs -------------------------------------------------------------------


def test_baselines_are_rows_beside_the_systems(files):
    options = ["--baselines", "lead1", "first1", "ext-oracle", "--compare_to", "first1"]
    scores = scored(files, "a.csv", options=options)
    assert list(scores["predictions"]) == ["a", "lead1", "first1", "ext-oracle"]
    assert scores["predictions"]["lead1"]["baseline"] == "lead1"
    assert scores["predictions"]["first1"]["words"]["mean"] == 1
    # "un" of "un article" is one of the nine words of the last title.
    expected = rouge_means(["un"] * 4, TRUE_TITLES)
    assert scores["predictions"]["first1"]["rouge"] == expected
    assert expected["unicode"]["rouge1"] > 0
    assert "compared" not in scores["predictions"]["first1"]
    assert "compared" in scores["predictions"]["a"]


def test_articles_of_a_file_of_their_own_in_another_order(files):
    write_csv(files / "titles.csv", ["ID", "titles"], [[f"n{i}", TRUE_TITLES[i]] for i in range(4)])
    write_csv(files / "c.csv", ["ID", "titles"], [[f"n{i}", OTHER_TITLES[i]] for i in (2, 0, 1, 3)])
    texts = [[f"Voici {OTHER_TITLES[i]}. Fin.", f"n{i}"] for i in (3, 1, 2, 0)]
    write_csv(files / "texts.csv", ["body", "ID"], [*texts, ["d'un autre titre", "n9"]])
    options = ["--articles", str(files / "texts.csv"), "--text_column", "body"]
    options += ["--baselines", "lead1"]
    scores = scored(files, "c.csv", references="titles.csv", options=options)
    found = scores["predictions"]["c"]
    assert found["novel"] == dict.fromkeys("1234", 0)
    assert [found["flags"][name] for name in ("numbers", "names", "quotations")] == [0, 0, 0]
    assert scores["references"]["flags"]["names"] > 0
    lead = [f"Voici {title}." for title in OTHER_TITLES]
    assert scores["predictions"]["lead1"]["rouge"] == rouge_means(lead, TRUE_TITLES)

    write_csv(files / "texts.csv", ["body", "ID"], texts[:3])
    with pytest.raises(UserError, match=r"no article for ID 'n0' of .*titles.csv .1 missing"):
        scored(files, "c.csv", references="titles.csv", options=options)
    write_csv(files / "texts.csv", ["body"], [row[:1] for row in texts])
    with pytest.raises(UserError, match="its rows cannot be paired with those of"):
        scored(files, "c.csv", references="titles.csv", options=options)
    # Nor by their numbers, where there is an article more.
    write_csv(files / "titles.csv", ["titles"], [[title] for title in TRUE_TITLES])
    write_csv(files / "texts.csv", ["body"], [["d'un autre titre"], *(row[:1] for row in texts)])
    with pytest.raises(UserError, match="its rows cannot be paired with those of"):
        scored(files, "a.csv", references="titles.csv", options=options)


def test_articles_that_are_given_come_before_those_of_the_references(files):
    texts = [[f"Voici {title}. Fin."] for title in OTHER_TITLES]
    write_csv(files / "texts.csv", ["text"], texts)
    options = ["--articles", str(files / "texts.csv"), "--baselines", "first1"]
    scores = scored(files, "a.csv", options=options)
    assert scores["articles"] == {
        "path": str(files / "texts.csv"),
        "rows": 4,
        "sha256": scores["articles"]["sha256"],
    }
    assert scores["articles"]["sha256"] != scores["references"]["sha256"]
    assert scores["predictions"]["first1"]["rouge"] == rouge_means(["Voici"] * 4, TRUE_TITLES)


def test_datasets_of_the_hub_are_read_in_the_splits_that_are_meant(files, monkeypatch):
    import datasets

    asked = set()

    def load_dataset(name, split):
        asked.add((name, split))
        titles = TRUE_TITLES if name == "owner/true" else OTHER_TITLES
        return [{"ID": n, "text": "un article", "titles": t} for n, t in enumerate(titles)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ["--references", "owner/true", "--predictions", "A=owner/written"]
    arguments += ["--output_dir", str(files / "out")]
    expected = {("owner/true", "validation"), ("owner/written", "validation")}
    for more, splits in (
        ([], expected),
        (["--articles", "owner/texts"], expected | {("owner/texts", "test")}),
    ):
        asked.clear()
        score.main([*arguments, *more])
        assert asked == splits
        scores = json.loads((files / "out/scores.json").read_text(encoding="utf-8"))
        assert scores["predictions"]["A"]["rouge"] == rouge_means(OTHER_TITLES, TRUE_TITLES)
        assert scores["articles"]["path"] == (more or arguments)[1]


def test_without_articles_only_what_needs_them_is_missing(files):
    write_csv(files / "titles.csv", ["titles"], [[title] for title in TRUE_TITLES])
    scores = scored(files, "a.csv", references="titles.csv")
    assert "articles" not in scores
    assert scores["predictions"]["a"]["novel"] == dict.fromkeys("1234")
    assert scores["predictions"]["a"]["rouge"] == rouge_means(OTHER_TITLES, TRUE_TITLES)
    with pytest.raises(UserError, match="made of articles; give the file of them with --articles"):
        scored(files, "a.csv", references="titles.csv", options=["--baselines", "lead1"])


def test_an_empty_article_stops_nothing(files):
    rows = [["", TRUE_TITLES[0]], *(["un article", title] for title in TRUE_TITLES[1:])]
    write_csv(files / "references.csv", ["text", "titles"], rows)
    scores = scored(files, "a.csv", options=["--baselines", "lead1", "first40", "ext-oracle"])
    for name in ("lead1", "first40", "ext-oracle"):
        assert scores["predictions"][name]["empty"] == 1


def test_without_true_titles_all_but_the_scores_is_there(files):
    done = command_line(
        *("--articles", files / "references.csv", "--predictions", files / "a.csv"),
        *("--baselines", "lead1", "--output_dir", files / "out"),
    )
    scores = json.loads((files / "out/scores.json").read_text(encoding="utf-8"))
    assert list(scores["predictions"]) == ["a", "lead1"]
    assert not {"rouge", "intervals", "compared"} & scores["predictions"]["a"].keys()
    assert scores["predictions"]["a"]["empty"] == 1
    assert scores["predictions"]["a"]["novel"]["1"] > 0.5
    assert "ROUGE" not in done.stdout
    assert "report.html" in done.stdout.splitlines()[-1]


def test_one_article_has_no_interval(files):
    write_csv(files / "one.csv", ["titles"], [[TRUE_TITLES[0]]])
    write_csv(files / "c.csv", ["titles"], [[OTHER_TITLES[0]]])
    write_csv(files / "d.csv", ["titles"], [[OTHER_TITLES[1]]])
    scores = scored(files, "c.csv", "d.csv", references="one.csv")
    assert scores["predictions"]["d"]["intervals"]["default"]["rougeL"] is None
    assert "compared" not in scores["predictions"]["d"]


def test_titles_that_were_cut_are_known_from_what_infer_wrote(files, capsys):
    record = {"model": "m", "adapter": None, "decoding": "greedy", "input": {"path": "x"}}
    record |= {"max_new_tokens": 24, "precision": ["of another make"]}
    ends = ["eos", "length", "eos", "length"]
    rows = [
        {"id": str(row), "title": title, "raw": title, "num_new_tokens": 3, "stopped_by": end}
        for row, (title, end) in enumerate(zip(OTHER_TITLES, ends, strict=True))
    ]
    details = files / "a.jsonl"

    def write(*lines):
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        details.write_text(text, encoding="utf-8")

    write(record, *rows)
    found = scored(files, "a.csv", "b.csv")["predictions"]
    assert (found["a"]["flags"]["cut"], found["b"]["flags"]["cut"]) == (2, None)
    assert found["a"]["made_by"] == {"model": "m", "decoding": "greedy", "max_new_tokens": 24}
    assert "left aside" not in capsys.readouterr().out

    # Whatever the order of the references.
    write_csv(files / "turned.csv", ["ID", "titles"], [*enumerate(TRUE_TITLES)][::-1])
    options = ["--references", files / "turned.csv", "--predictions", files / "a.csv"]
    score.main([*map(str, options), "--output_dir", str(files / "turned")])
    lines = (files / "turned/flags.jsonl").read_text(encoding="utf-8").splitlines()
    flagged = map(json.loads, lines)
    assert [line["id"] for line in flagged if "cut" in line["flags"]] == ["3", "1"]

    write([record], *rows)
    assert scored(files, "a.csv")["predictions"]["a"]["flags"]["cut"] is None
    rows[0]["title"] = "un autre"  # of predictions that were edited since
    write(record, *rows)
    assert scored(files, "a.csv")["predictions"]["a"]["flags"]["cut"] is None
    assert f"NOTE: {details} is not of the titles in" in capsys.readouterr().out
    for damaged in ("", "{", "[]\n1", "{}\n{}", '{}\n{"id": []}'):
        details.write_text(damaged)
        assert scored(files, "a.csv")["predictions"]["a"]["flags"]["cut"] is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--baselines", "lead2"], "--baselines lead2: there is no such baseline; give lead1"),
        (["--baselines", "lead1", "lead1"], "--baselines lead1: a second row of that name;"),
        (["--compare_to", "c"], "--compare_to c: there is no such row; give one of"),
        (["--runs", "nowhere"], "nowhere: no run_config.json in it;"),
    ],
)
def test_options_that_cannot_be_used(files, options, complaint):
    with pytest.raises(UserError) as error:
        scored(files, "a.csv", options=options)
    assert str(error.value).startswith(complaint)
    assert not (files / "scores").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to show: give --predictions, --baselines or --runs"),
        (["--predictions", "a.csv"], "--references: give the true titles, or at least the"),
        (["--baselines", "lead1"], "--references: give the true titles, or at least the"),
        (["--articles", "a.csv", "--baselines", "ext-oracle"], "it chooses by the true titles"),
    ],
)
def test_what_must_be_given(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        score.parse_args([*arguments, "--output_dir", "out"])
    assert complaint in capsys.readouterr().err


def test_through_accelerate_launch(files, run_script):
    arguments = ("--references", files / "references.csv", "--predictions", files / "a.csv")
    result = run_script("score.py", *arguments, "--output_dir", files / "s", launch=True)
    assert "comparable" in result.stdout
    assert result.stdout.splitlines()[-1] == f"report: {files / 's/report.html'}"
    assert (files / "s/scores.json").is_file()
