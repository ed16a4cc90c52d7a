"""The demo: the same bytes every time, no article twice, correct shape, and a model that loads."""

import csv
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SCRIPTS

import make_demo
from articles import Columns, check_articles, iterate_articles

SCRIPT = Path(make_demo.__file__)
FILES = ("train.csv", "validation.csv", "test.csv", "test_titles.csv")
SMALL = ("--train_rows", "40", "--validation_rows", "10", "--test_rows", "10")


def make(output_dir, *options, hash_seed="0"):
    return subprocess.run(
        [sys.executable, SCRIPT, "--output_dir", output_dir, *options],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A whole demo, but for a model that was hardly trained."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    done = make(folder, *SMALL, "--pretraining_steps", "2")
    assert done.returncode == 0, done.stderr
    return folder


def articles(split, rows, seed=0):
    return [make_demo.make_article(seed, split, row) for row in range(rows)]


def test_same_command_writes_the_same_bytes(tmp_path, demo):
    again = make(tmp_path / "again", *SMALL, "--pretraining_steps", "2", hash_seed="1")
    assert again.returncode == 0, again.stderr
    for name in (*FILES, "model/model.safetensors", "model/tokenizer.json"):
        assert (demo / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_row_does_not_depend_on_the_number_of_rows(tmp_path, demo):
    options = ("--train_rows", "50", "--validation_rows", "3", "--test_rows", "12", "--no-model")
    assert make(tmp_path / "other", *options).returncode == 0
    for name in FILES:
        one, other = ((folder / name).read_text() for folder in (demo, tmp_path / "other"))
        shorter, longer = sorted((one, other), key=len)
        assert longer.startswith(shorter), name
        assert longer != shorter, name


def test_another_seed_makes_another_corpus():
    assert articles("train", 5, seed=0) != articles("train", 5, seed=1)


def test_columns_and_rows(demo):
    expected = {
        "train.csv": (["ID", "text", "titles"], 40),
        "validation.csv": (["ID", "text", "titles"], 10),
        "test.csv": (["ID", "text"], 10),
        "test_titles.csv": (["ID", "titles"], 10),
    }
    for name, (columns, rows) in expected.items():
        with open(demo / name, encoding="utf-8", newline="") as stream:
            header, *records = csv.reader(stream)
        assert header == columns
        assert [record[0] for record in records] == [str(row) for row in range(rows)]


def test_the_reader_takes_the_files(demo):
    assert check_articles(str(demo / "train.csv"), Columns()).rows == 40
    assert check_articles(str(demo / "test.csv"), Columns(title=None)).rows == 10
    titles = [row["title"] for row in iterate_articles(str(demo / "train.csv"), Columns())]
    assert titles == [article["titles"] for article in articles("train", 40)]


def test_no_article_twice():
    texts = [
        article["text"]
        for split in make_demo.SPLITS
        for article in articles(split, 5000 if split == "train" else 1500)
    ]
    assert len(set(texts)) == len(texts)


def test_no_combination_of_facts_twice():
    """What makes it true for any number of rows: the factor and the number of combinations."""
    combinations = make_demo.combinations()
    assert combinations // len(make_demo.SPLITS) >= make_demo.MAX_ROWS
    assert make_demo.FACTOR % 2
    assert make_demo.FACTOR % 3
    assert make_demo.FACTOR % 5
    assert all(combinations % prime for prime in (7, 11, 13, 17, 19, 23, 29, 31, 37))
    rows = articles("train", 5000)
    facts = {tuple(row["facts"][name] for name in ("section", "v", "p", "n")) for row in rows}
    assert len(facts) == 5000


def test_articles_read_as_french_press():
    rows = articles("train", 2000)
    text = " ".join(row["text"] for row in rows)
    assert set("éèêàâçùôîûŒÀÉ«»%\n\N{NBSP}") <= set(text)
    assert not any(mark in text for mark in "{}[]|~")
    for wrong in ("de A", "de E", "de É", "de H", "de I", "de O", "d'B", "de le", "de les", "à le"):
        assert not re.search(rf"\b{wrong}{'' if wrong[-1].isupper() else ' '}", text), wrong
    words = sorted(len(row["text"].split()) for row in rows)
    assert 40 < words[len(words) // 2] < 120
    assert 0.02 < sum(count > 500 for count in words) / len(words) < 0.06
    assert words[-1] > 1500


def test_titles_need_the_article():
    for row in articles("train", 500):
        title, facts = row["titles"], row["facts"]
        assert 8 <= len(title.split()) <= 18, title
        assert "\n" not in title
        assert title not in row["text"]
        first_sentence = row["text"].split(". ")[0]
        assert facts["p"] not in first_sentence
        assert facts["n"] not in first_sentence
        for fact in ("v", "p", "n"):
            assert facts[fact] in row["text"], fact
        assert sum(facts[fact] in title for fact in ("v", "p", "n", "o")) >= 2


def test_memory_does_not_grow_with_rows(tmp_path):
    def peak(rows):
        folder = tmp_path / str(rows)
        folder.mkdir()
        tracemalloc.start()
        make_demo.write_corpus(
            folder,
            SimpleNamespace(seed=0, train_rows=rows, validation_rows=1, test_rows=1),
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(100)
    assert peak(20_000) < peak(2000) + 200_000


def test_tokenizer_is_llama_2_like_and_keeps_french(demo):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2)
    assert tokenizer.pad_token is None
    for text in (
        "À l'été 2024, l'œuvre coûta 1\N{NBSP}250\N{NBSP}€\N{NBSP}: «\N{NBSP}Ça va\N{NBSP}»",
        "Deux lignes\nou trois\n\nTitre\N{NBSP}:",
        "日本 et — 12,5\N{NARROW NO-BREAK SPACE}%",
        *(article["text"] for article in articles("test", 20)),
    ):
        encoded = tokenizer(text)["input_ids"]
        assert encoded[0] == 1
        assert encoded[-1] != 2
        assert tokenizer.decode(encoded, skip_special_tokens=True) == text


def test_model_loads_and_suits_4_bits(demo):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):  # NF4 rounds in blocks of 64 weights
            assert not any(size % 64 for size in module.weight.shape), name
    with torch.no_grad():
        assert model(torch.tensor([[1, 5, 6]])).logits.isfinite().all()


def test_pretraining_never_shows_a_title():
    documents = make_demo.pretraining_documents(0)
    for row, document in zip(range(500), documents, strict=False):
        assert make_demo.make_article(0, "pretraining", row)["titles"] not in document
        assert "Titre" not in document


def test_a_complete_demo_is_left_alone(demo):
    before = (demo / "train.csv").stat().st_mtime_ns
    again = make(demo, *SMALL, "--pretraining_steps", "2")
    assert again.returncode == 0
    assert "already" in again.stdout
    assert (demo / "train.csv").stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_made_and_one_that_is_a_link(tmp_path):
    refused = make("/proc/none/demo", "--no-model")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: /proc/none/demo: cannot be written (")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert make(tmp_path / "link", *SMALL, "--no-model").returncode == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "demo.json").is_file()


def test_a_launcher_that_ends_it_leaves_nothing(tmp_path):
    command = [sys.executable, str(SCRIPTS / "make_demo.py"), "--output_dir", "demo"]
    process = subprocess.Popen([*command, "--train_rows", "1000000"], cwd=tmp_path)
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["other options", "partial", "a stranger's", "a file"])
def test_anything_else_is_refused(tmp_path, demo, content):
    folder = tmp_path / "demo"
    if content == "a file":
        folder.write_text("mine")
    else:
        folder.mkdir()
        (folder / "train.csv").write_bytes((demo / "train.csv").read_bytes())
    if content == "other options":
        (folder / "demo.json").write_bytes((demo / "demo.json").read_bytes())
    if content == "a stranger's":
        (folder / "demo.json").write_text("not JSON")
    before = sorted(tmp_path.rglob("*"))
    refused = make(folder, "--no-model")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_run_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "demo"
    monkeypatch.setattr(make_demo, "make_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_demo.main(["--output_dir", str(folder), *SMALL])
    assert list(tmp_path.iterdir()) == []

    # A kill leaves the folder beside it; the next run does not mind.
    (tmp_path / "demo.partial-x" / "demo").mkdir(parents=True)
    make_demo.main(["--output_dir", str(folder), *SMALL, "--no-model"])
    assert json.loads((folder / "demo.json").read_text())["model"] is False


@pytest.mark.parametrize(
    "options", [("--train_rows", "0"), ("--test_rows", "99999999999"), ("--pretraining_steps", "0")]
)
def test_options_out_of_range(tmp_path, options):
    refused = make(tmp_path / "demo", *options)
    assert refused.returncode == 2
    assert options[0] in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_opens_with_the_command():
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "scripts/make_demo.py" in shown.stdout


def test_through_accelerate_launch(run_script, tmp_path):
    options = ("--output_dir", tmp_path / "demo", "--no-model", *SMALL)
    run_script("make_demo.py", *options, launch=True)
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {*FILES, "demo.json"}
