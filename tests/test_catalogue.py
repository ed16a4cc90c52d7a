"""Bad input, a catalogue: what is wrong, and the one line that tells it. And what is fine and kept.

python -m pytest tests/test_catalogue.py
"""

import argparse
import csv
import gzip
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, french_rows, read_csv, write_csv

import exit_codes
from prompting import PROBE

LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "evaluate")
LIBRARIES += ("pandas", "pyarrow", "scipy", "nltk", "rouge_score", "py3langid")
# What an answer may import, by what it has to know; all else cannot even be imported, so that no
# complaint waits for it. (No clock here: how long an import takes is the machine's affair.)
NEEDS = {
    "nothing": (),
    "Parquet": ("pyarrow",),
    "data sets": ("datasets", "pandas", "pyarrow"),
    "GPUs": ("torch",),
    "tokenizer": ("torch", "transformers", "accelerate", "scipy"),
    "launch": ("torch", "transformers", "accelerate", "scipy"),
    "model": LIBRARIES,
}

# ---------------------------------------------------------------------- where it happens

OPTIONS = {
    "train.py": [
        *("--model_name_or_path", "model", "--train_file", "train.csv", "--output_dir", "out"),
        *("--lora_r", "4", "--max_length", "256", "--max_title_tokens", "24"),
    ],
    "infer.py": ["--run_dir", "run", "--input_file", "test.csv", "--output_file", "out.csv"],
    "merge.py": ["--run_dir", "run", "--output_dir", "out"],
    "score.py": [
        *("--references", "true.csv", "--output_dir", "out", "--predictions", "predicted.csv"),
    ],
    "make_demo.py": ["--output_dir", "out", "--no-model"],
    "machine.py": ["--config_file", "config.yaml"],
    "run_train.sh": [],
    "run_infer.sh": [],
}


def with_options(script: str, argv) -> list[str]:
    """Return a command line; predictions that are given are all, where an option adds to others."""
    options = OPTIONS[script]
    return [*(options[:-2] if "--predictions" in argv else options), *argv]


BIN = Path(sys.executable).parent
UNSET = ("VIRTUAL_ENV", "CONDA_PREFIX", "HF_HOME", "HF_HUB_CACHE", "ACCELERATE_USE_CPU")


@pytest.fixture(scope="module")
def template(tiny_model, trained, tmp_path_factory) -> Path:
    """A working folder in which all is well: a model, a run on it, articles, titles, launchers."""
    folder = tmp_path_factory.mktemp("catalogue") / "template"
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(trained, folder / "run", ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((folder / "run/run_config.json").read_text())
    (folder / "run/run_config.json").write_text(json.dumps(record | {"base_model": "model"}))
    rows = french_rows(3)
    write_csv(folder / "train.csv", rows)
    write_csv(folder / "test.csv", [{"ID": row["ID"], "text": row["text"]} for row in rows])
    titles = [{"ID": row["ID"], "titles": row["titles"]} for row in rows]
    write_csv(folder / "true.csv", titles)
    write_csv(folder / "predicted.csv", titles)
    for name in ("scripts", "accelerate_configs", "prompts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_train.sh", "run_infer.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    return folder


@pytest.fixture
def folder(template, tmp_path) -> Path:
    return shutil.copytree(template, tmp_path / "work")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """By need: a folder of libraries that end the process of whoever imports them."""
    folders = {}
    for need, allowed in NEEDS.items():
        folders[need] = tmp_path_factory.mktemp("site")
        for library in set(LIBRARIES) - set(allowed):
            (folders[need] / library).mkdir()
            code = f"raise SystemExit('{library} was imported')\n"
            (folders[need] / library / "__init__.py").write_text(code)
    return folders


@pytest.fixture
def answer(stand_ins):
    """Return a function that runs a script or launcher in a folder and checks its exit code."""

    def run(folder: Path, script: str, argv, needs: str, **env):
        path = f"{stand_ins[needs]}:{os.environ['PYTHONPATH']}"
        env = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "SETUP": "0"} | env
        env |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
        env |= {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{BIN}:{os.environ['PATH']}"}
        command = [sys.executable, SCRIPTS / script]
        if script.endswith(".sh"):
            command = ["bash", script]
        result = subprocess.run(
            [*map(str, command), *argv],
            capture_output=True,
            text=True,
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k not in UNSET} | env,
            timeout=200,
        )
        assert result.returncode == 2, f"{command} {argv}\n{result.stdout}\n{result.stderr}"
        return result

    return run


def everything_in(folder: Path) -> dict[str, str]:
    """Return the hash of every file, and the name of every folder."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


# ---------------------------------------------------------------------- the catalogue


@dataclass(frozen=True)
class Case:
    """One thing that is wrong, and the line that says so.

    In the line, `(…)` stands for a library's words, whatever they are, and `{work}` for the folder.

    Args:
        argv: options after those of OPTIONS, over which they win.
        files: content by name; None removes, and a function is called with the path.
    """

    script: str
    line: str
    argv: tuple = ()
    files: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    needs: str = "nothing"


def train(line, *argv, files=None, needs="nothing"):
    return Case("train.py", line, argv, files or {}, needs=needs)


def infer(line, *argv, files=None, needs="nothing"):
    return Case("infer.py", line, argv, files or {}, needs=needs)


def merge(line, *argv, files=None, needs="nothing"):
    return Case("merge.py", line, argv, files or {}, needs=needs)


def score(line, *argv, files=None):
    return Case("score.py", line, argv, files or {})


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def in_json(**changes):
    """Return a change of some keys of a JSON file."""

    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))

    return change


def without_merges(path: Path) -> None:
    """Make a tokenizer give other ids: it knows letters, and how to put together no word."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))


def tensors(change):
    """Return a change of the tensors in a file, given as (name, numpy array)."""

    def changed(path: Path) -> None:
        from safetensors.numpy import load_file, save_file

        save_file(dict(change(*item) for item in load_file(path).items()), path)

    return changed


OF_A_WIDER_BASE = tensors(
    lambda name, matrix: (name, matrix.repeat(2, axis=1) if "lora_A" in name else matrix)
)
OF_OTHER_NAMES = tensors(lambda name, matrix: (name.replace("layers.1", "layers.9"), matrix))
FIRST_OF_ALL = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
HEADER = "ID,text,titles\n"
NO_ROWS = "the file has no rows; give a file with at least one article"
NAME_IT = "rename it in the file or name it on the command line"
FILL_IT = "fill it in or remove the row"
QUOTE_IT = "quote the fields that hold commas or newlines"
NOT_THERE = "there is no such file; check the path"
CONVERT = "convert the file to UTF-8"
HUB = "download it where there is a network, or give --model_name_or_path its folder"

ARTICLES = {
    "no file": train(f"error: none.csv: {NOT_THERE}", "--train_file", "none.csv"),
    "a folder": train(
        "error: model: this is a folder, not a file; give a file of articles",
        *("--train_file", "model"),
    ),
    "another kind of file": train(
        "error: train.xlsx: unknown kind of file; give one of .csv, .csv.gz, .json, .jsonl, "
        ".parquet",
        *("--train_file", "train.xlsx"),
        files={"train.xlsx": "PK"},
    ),
    "empty file": train(f"error: train.csv: {NO_ROWS}", files={"train.csv": ""}),
    "header only": train(f"error: train.csv: {NO_ROWS}", files={"train.csv": HEADER}),
    "missing column": train(
        f"error: train.csv:2: no column 'titles' among 'ID', 'text', 'titre'; {NAME_IT}",
        files={"train.csv": "ID,text,titre\n1,a,b\n"},
    ),
    "missing column, by its name": train(
        f"error: train.csv:2: no column 'article' among 'ID', 'text', 'titles'; {NAME_IT}",
        *("--text_column", "article"),
    ),
    "doubled column": train(
        "error: train.csv:1: doubled column 'text'; rename one",
        files={"train.csv": "text,titles,text\na,b,c\n"},
    ),
    "semicolons": train(
        "error: train.csv:1: columns separated by ';'; separate them by commas",
        files={"train.csv": "ID;text;titles\n1;Le maire, élu hier;Un titre\n"},
    ),
    "tabs": train(
        r"error: train.csv:1: columns separated by '\t'; separate them by commas",
        files={"train.csv": "ID\ttext\ttitles\n1\ta\tb\n"},
    ),
    "empty text": train(
        f"error: train.csv:3: the column 'text' is empty; {FILL_IT}",
        files={"train.csv": f"{HEADER}1,a,b\n2,,b\n"},
    ),
    "blank text": train(
        f"error: train.csv:2: the column 'text' is empty; {FILL_IT}",
        files={"train.csv": f'{HEADER}1,"\n \u00a0\t",b\n'},
    ),
    "empty title": train(
        f"error: train.csv:3: the column 'titles' is empty; {FILL_IT}",
        files={"train.csv": f"{HEADER}1,a,b\n2,a,\n"},
    ),
    "blank title": train(
        f"error: train.csv:3: the column 'titles' is empty; {FILL_IT}",
        files={"train.csv": f"{HEADER}1,a,b\n2,a, \n"},
    ),
    "latin-1": train(
        f"error: train.csv:4: the column 'text' is not UTF-8; {CONVERT}",
        files={"train.csv": f"{HEADER}1,été,b\n2,a,b\n".encode() + b"3,\xe9t\xe9,b\n"},
    ),
    "NUL": train(
        "error: train.csv:3: the column 'text' holds a NUL byte; remove it",
        files={"train.csv": f"{HEADER}1,a,b\n2,a\0a,b\n"},
    ),
    "unbalanced quote": train(
        "error: train.csv:3: not valid CSV (unexpected end of data); mend the quotes",
        files={"train.csv": f'{HEADER}1,a,b\n2,"a,b\n3,a,b\n'},
    ),
    "stray quote": train(
        "error: train.csv:3: not valid CSV (',' expected after '\"'); mend the quotes",
        files={"train.csv": f'{HEADER}1,a,b\n2,"a"a,b\n'},
    ),
    "too many fields": train(
        f"error: train.csv:2: 4 fields where the header has 3; {QUOTE_IT}",
        files={"train.csv": f"{HEADER}1,Le maire, élu hier,b\n"},
    ),
    "too few fields": train(
        f"error: train.csv:2: 2 fields where the header has 3; {QUOTE_IT}",
        files={"train.csv": f"{HEADER}1,a\n"},
    ),
    "torn gzip": train(
        "error: train.csv.gz: cannot be read (…); check the file",
        *("--train_file", "train.csv.gz"),
        files={"train.csv.gz": gzip.compress(HEADER.encode() * 99)[:-9]},
    ),
    "torn Parquet": train(
        "error: train.parquet: cannot be read (…); check the file",
        *("--train_file", "train.parquet"),
        files={"train.parquet": b"PAR1 and no more"},
        needs="Parquet",
    ),
    "broken JSON line": train(
        "error: train.jsonl:2: not valid JSON (Expecting value); mend it",
        *("--train_file", "train.jsonl"),
        files={"train.jsonl": '{"text": "a", "titles": "b"}\n{"text": "a", "titles": b"}\n'},
    ),
    "null in JSON": train(
        "error: train.jsonl:1: the column 'titles' holds None, not text; make it a string",
        *("--train_file", "train.jsonl"),
        files={"train.jsonl": '{"text": "a", "titles": null}\n'},
    ),
    "validation file": train(
        f"error: validation.csv:2: the column 'titles' is empty; {FILL_IT}",
        *("--validation_file", "validation.csv"),
        files={"validation.csv": f"{HEADER}1,a,\n"},
    ),
    "data set of the Hub, offline": train(
        "error: owner/none: neither a file here nor a dataset to be had from the Hub (…); check "
        "the name, or download it and give the file",
        *("--train_file", "owner/none"),
        needs="data sets",
    ),
    "doubled ID": infer(
        "error: test.csv:4: ID '1' is there twice; make it unique",
        files={"test.csv": "ID,text\n1,a\n2,b\n1,c\n"},
    ),
    "empty ID": infer(
        "error: test.csv:3: the column 'ID' is empty; fill it in",
        files={"test.csv": "ID,text\n1,a\n,b\n"},
    ),
    "IDs by another name": infer(
        "error: test.csv: no column 'guid'; correct the name of the ID column",
        *("--id_column", "guid"),
    ),
    "nothing to infer on": infer(f"error: none.csv: {NOT_THERE}", "--input_file", "none.csv"),
    "latin-1 to infer on": infer(
        f"error: test.csv:2: the column 'text' is not UTF-8; {CONVERT}",
        files={"test.csv": b"ID,text\n1,\xe9t\xe9\n"},
    ),
    "nothing to check on": merge(f"error: none.csv: {NOT_THERE}", "--check_file", "none.csv"),
}
PROMPTS = {
    "no prompt": train(
        "error: none.txt: no readable prompt (…); give a file of prompts/",
        *("--prompt_file", "none.txt"),
    ),
    "a folder as prompt": infer(
        "error: prompts: no readable prompt (…); give a file of prompts/",
        *("--prompt_file", "prompts"),
    ),
    "prompt in latin-1": train(
        "error: prompt.txt: no readable prompt (…); give a file of prompts/",
        *("--prompt_file", "prompt.txt"),
        files={"prompt.txt": b"R\xe9sume {article}"},
    ),
    "prompt without an article": train(
        "error: prompt.txt: {article} stands there 0 times; write it once, where the article goes",
        *("--prompt_file", "prompt.txt"),
        files={"prompt.txt": "Titre :"},
    ),
    "prompt with two articles": train(
        "error: prompt.txt: {article} stands there 2 times; write it once, where the article goes",
        *("--prompt_file", "prompt.txt"),
        files={"prompt.txt": "{article}\n{article}\nTitre :"},
    ),
    "prompt longer than the budget": train(
        "error: prompt: its 401 tokens and 24 for the title leave no room for an article in 256; "
        "shorten the prompt or raise --max_length",
        *("--prompt_file", "prompt.txt"),
        files={"prompt.txt": "X" * 400 + "{article}:"},
        needs="tokenizer",
    ),
}
MODELS = {
    "no model": train(
        "error: ./none: there is no such model folder; check the path",
        *("--model_name_or_path", "./none"),
    ),
    "a folder that is no model": train(
        "error: prompts: no config.json in this folder; give the folder of a model",
        *("--model_name_or_path", "prompts"),
    ),
    "only pickled weights": train(
        "error: model: no *.safetensors weights in this folder; convert the model to safetensors "
        "(pickled weights are never loaded)",
        files={"model/model.safetensors": None, "model/pytorch_model.bin": b"PK"},
    ),
    "truncated weights": train(
        "error: model/model.safetensors: not whole (…); copy or download it again",
        files={"model/model.safetensors": cut_off},
    ),
    "broken config": train(
        "error: model/config.json: not valid JSON (…); restore the file",
        files={"model/config.json": "{"},
    ),
    "no tokenizer": train(
        "error: model: no tokenizer in this folder; add its files",
        files={"model/tokenizer.json": None, "model/tokenizer_config.json": None},
    ),
    "tokenizer that loses French": train(
        f"error: model: its tokenizer turns {PROBE!r} into {PROBE.lower()!r}; check "
        "tokenizer_class in tokenizer_config.json, or use another model",
        files={"model/tokenizer.json": in_json(normalizer={"type": "Lowercase"})},
        needs="tokenizer",
    ),
    # Offline, whether a model is gated, unknown or just not fetched yet cannot be told.
    "Hub id, offline": train(
        "error: owner/gated: neither a folder here nor in the Hub's cache, and HF_HUB_OFFLINE is "
        f"set; {HUB}",
        *("--model_name_or_path", "owner/gated"),
    ),
    "Hub id, offline, without a run": infer(
        "error: owner/gated: neither a folder here nor in the Hub's cache, and HF_HUB_OFFLINE is "
        f"set; {HUB}",
        *("--run_dir", "", "--model_name_or_path", "owner/gated"),
    ),
    "Hub id with only pickles in the cache": train(
        "error: {work}/home/.cache/huggingface/hub/models--owner--old/snapshots/1: no "
        "*.safetensors weights in this folder; convert the model to safetensors (pickled weights "
        "are never loaded)",
        *("--model_name_or_path", "owner/old"),
        files={
            "home/.cache/huggingface/hub/models--owner--old/refs/main": "1",
            "home/.cache/huggingface/hub/models--owner--old/snapshots/1/config.json": "{}",
        },
    ),
    "LoRA target that is not there": train(
        "error: --target_modules c_attn: no linear layer of the decoder has this name; give "
        "all-linear, or some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        *("--target_modules", "q_proj", "c_attn"),
        needs="model",
    ),
}
RUNS = {
    "no run": infer(
        "error: none: no run_config.json in it; give the output folder of train.py",
        *("--run_dir", "none"),
    ),
    "run_config that is not JSON": infer(
        "error: run/run_config.json: not valid JSON (…); restore the file",
        files={"run/run_config.json": '{"kind": '},
    ),
    "run_config of something else": infer(
        "error: run/run_config.json: not the record of a run; give a folder that train.py or "
        "merge.py made",
        files={"run/run_config.json": '{"kind": "adapter"}'},
    ),
    "unfinished run": infer(
        "error: run: no adapter_model.safetensors in it; let training finish first, or give one of "
        "its checkpoints",
        files={"run/adapter_model.safetensors": None},
    ),
    "truncated adapter": infer(
        "error: run/adapter_model.safetensors: not whole (…); copy or download it again",
        files={"run/adapter_model.safetensors": cut_off},
    ),
    "no adapter_config": infer(
        "error: run: no adapter_config.json in it; restore the file",
        files={"run/adapter_config.json": None},
    ),
    "broken adapter_config": infer(
        "error: run/adapter_config.json: not valid JSON (…); restore the file",
        files={"run/adapter_config.json": "{"},
    ),
    "base by another hash": infer(
        "error: model: this is not the base that run was trained on; give that one with "
        "--model_name_or_path",
        files={"model/config.json": in_json(rope_theta=5)},
    ),
    "adapter of another shape": infer(
        f"error: run/adapter_model.safetensors: does not fit this base at {FIRST_OF_ALL}; give "
        "the base it was trained on",
        files={"run/adapter_model.safetensors": OF_A_WIDER_BASE},
        needs="model",
    ),
    "base that is gone": infer(
        "error: run: its base is not at /gone/model any more; say where it lies now with "
        "--model_name_or_path",
        files={"run/run_config.json": in_json(base_model="/gone/model")},
    ),
    "base that is gone, by its own option": infer(
        "error: /gone: there is no such model folder; check the path",
        *("--model_name_or_path", "/gone"),
    ),
    "tokenizer of another run": infer(
        "error: run: its prompt has other ids with this tokenizer than it had in training; use "
        "the tokenizer and the version of transformers named in run_config.json",
        files={"run/tokenizer.json": without_merges},
        needs="tokenizer",
    ),
    "neither run nor model": infer(
        "infer.py: error: give --run_dir, or --model_name_or_path for a model as it is",
        *("--run_dir", ""),
    ),
    "merge of no run": merge(
        "error: none: no run_config.json in it; give the output folder of train.py",
        *("--run_dir", "none"),
    ),
    "merge of what is merged": merge(
        "error: run: no adapter_model.safetensors to merge; give a folder of train.py",
        files={"run/run_config.json": in_json(kind="merged")},
    ),
    "merge of a truncated adapter": merge(
        "error: run/adapter_model.safetensors: not whole (…); copy or download it again",
        files={"run/adapter_model.safetensors": cut_off},
    ),
    "merge into another base": merge(
        "error: model: this is not the base that run was trained on; give that one with "
        "--model_name_or_path",
        files={"model/config.json": in_json(rope_theta=5)},
    ),
    "merge into a base that is gone": merge(
        "error: run: its base is not at /gone/model any more; say where it lies now with "
        "--model_name_or_path",
        files={"run/run_config.json": in_json(base_model="/gone/model")},
    ),
    "merge of an adapter of another shape": merge(
        "error: run/adapter_model.safetensors: does not fit this base at "
        "model.layers.0.mlp.down_proj.weight; give the base it was trained on",
        files={"run/adapter_model.safetensors": OF_A_WIDER_BASE},
    ),
    "merge of an adapter of other names": merge(
        "error: run/adapter_model.safetensors: it adapts model.layers.9.mlp.down_proj, which is "
        "no linear layer in this base; merge with peft's merge_and_unload instead",
        files={"run/adapter_model.safetensors": OF_OTHER_NAMES},
        needs="model",
    ),
}
OUTPUTS = {
    "run folder that is not empty": train(
        "error: prompts: the folder is not empty (it holds en.txt); remove it or give another "
        "--output_dir",
        *("--output_dir", "prompts"),
    ),
    "run folder that is a file": train(
        "error: train.csv: this is a file, not a folder; give another --output_dir",
        *("--output_dir", "train.csv"),
    ),
    "run folder below a file": train(
        "error: train.csv/run: {work}/train.csv cannot be written; give another --output_dir",
        *("--output_dir", "train.csv/run"),
    ),
    "predictions in no folder": infer(
        "error: none/out.csv: there is no such folder; make it first",
        *("--output_file", "none/out.csv"),
    ),
    "predictions of no CSV": infer(
        "infer.py: error: --output_file out.txt: give a name that ends in .csv",
        *("--output_file", "out.txt"),
    ),
    "predictions of other settings": infer(
        "error: true.csv: there are predictions of other settings already; remove or rename them",
        *("--output_file", "true.csv"),
    ),
    "merged folder that is not empty": merge(
        "error: prompts: the folder is not empty (it holds en.txt); remove it or give another "
        "--output_dir",
        *("--output_dir", "prompts"),
    ),
    "scores in a file": score(
        "error: true.csv: no folder can be made (File exists); give another --output_dir",
        *("--output_dir", "true.csv"),
    ),
    "demo in a folder of something else": Case(
        "make_demo.py",
        "error: prompts: not empty, and not the demo of these options; remove it or give another "
        "--output_dir",
        ("--output_dir", "prompts"),
    ),
    "demo in a file": Case(
        "make_demo.py",
        "error: true.csv: not empty, and not the demo of these options; remove it or give another "
        "--output_dir",
        ("--output_dir", "true.csv"),
    ),
}
OPTIONS_THAT_ARE_WRONG = {
    "no such option": train(
        "train.py: error: unrecognized arguments: --learningrate 1", "--learningrate", "1"
    ),
    "no such choice": train(
        "train.py: error: argument --mixed_precision: invalid choice: 'fp16' (…)",
        *("--mixed_precision", "fp16"),
    ),
    "an option that is not given": Case(
        "machine.py",
        "machine.py: error: argument --config_file: expected one argument",
        ("--config_file",),
    ),
    "rougeL of no titles": train(
        "train.py: error: --metric_for_best_model rougeL: needs --num_eval_titles above 0",
        *("--metric_for_best_model", "rougeL", "--num_eval_titles", "0"),
    ),
}
# Predictions in another order are no case: they are paired by ID, and score the same (see below).
SCORES = {
    "no predictions": score(f"error: none.csv: {NOT_THERE}", "--predictions", "none.csv"),
    "no references": score(f"error: none.csv: {NOT_THERE}", "--references", "none.csv"),
    "missing IDs": score(
        "error: predicted.csv: no title for ID 'a1' of true.csv (2 missing); predict the titles "
        "of that whole file",
        files={"predicted.csv": "ID,titles\na0,Un titre\n"},
    ),
    "extra IDs": score(
        "error: predicted.csv: ID 'a3' is not in true.csv (1 too many); give the references of "
        "the articles that were predicted",
        files={"predicted.csv": "ID,titles\na0,a\na1,b\na2,c\na3,d\n"},
    ),
    "doubled IDs": score(
        "error: predicted.csv:4: ID 'a1' is there twice; make it unique",
        files={"predicted.csv": "ID,titles\na0,a\na1,b\na1,c\na2,d\n"},
    ),
    "no IDs": score(
        "error: predicted.csv: no IDs in it, and those of true.csv are not its row numbers; add "
        "the column or name it with --prediction_id_column",
        files={"predicted.csv": "titles\na\nb\nc\n"},
    ),
    "no titles": score(
        f"error: predicted.csv:2: no column 'titles' among 'ID', 'titre'; {NAME_IT}",
        files={"predicted.csv": "ID,titre\na0,a\n"},
    ),
    "semicolons": score(
        "error: predicted.csv:1: columns separated by ';'; separate them by commas",
        files={"predicted.csv": "ID;titles\na0;a\n"},
    ),
    "empty predictions": score(
        f"error: predicted.csv: {NO_ROWS}", files={"predicted.csv": "ID,titles\n"}
    ),
    "true title that is empty": score(
        f"error: true.csv:2: the column 'titles' is empty; {FILL_IT}",
        files={"true.csv": "ID,titles\na0,\n"},
    ),
    "two of one name": score(
        "error: run/predicted.csv: a second file is called 'predicted'; tell them apart by "
        "NAME=FILE",
        *("--predictions", "predicted.csv", "run/predicted.csv"),
    ),
}


def launcher(script, line, needs="nothing", files=None, **env):
    real = {"MODEL": "model", "TRAIN_FILE": "train.csv", "RUN_DIR": "run2", "OUTPUT_DIR": "out"}
    real |= {"INPUT_FILE": "test.csv"}
    return Case(script, line, (), files or {}, real | env, needs)


NO_MODEL = "the demo's, which has its own files; set yours"
# With SETUP=1 and no environment active, the next step would make one: that nothing is written
# shows that the answer came before.
MACHINES = {
    "no TRAIN_FILE": launcher(
        "run_train.sh", "error: TRAIN_FILE: not set; give it beside MODEL", TRAIN_FILE="", SETUP="1"
    ),
    "no INPUT_FILE": launcher(
        "run_infer.sh", "error: INPUT_FILE: not set; give it beside MODEL", INPUT_FILE="", SETUP="1"
    ),
    "no MODEL to train": launcher("run_train.sh", f"error: MODEL: {NO_MODEL}", MODEL="", SETUP="1"),
    "no MODEL to infer": launcher("run_infer.sh", f"error: MODEL: {NO_MODEL}", MODEL="", SETUP="1"),
    "no config to train": launcher(
        "run_train.sh",
        "error: none.yaml: no such file; check ACCELERATE_CONFIG",
        ACCELERATE_CONFIG="none.yaml",
        SETUP="1",
    ),
    "no config to infer": launcher(
        "run_infer.sh",
        "error: none.yaml: no such file; check ACCELERATE_CONFIG",
        ACCELERATE_CONFIG="none.yaml",
        SETUP="1",
    ),
    "no GPU": launcher(
        "run_train.sh",
        "error: accelerate_configs/single_gpu.yaml: the config asks for a GPU and there is none; "
        "use accelerate_configs/cpu.yaml",
        ACCELERATE_CONFIG="accelerate_configs/single_gpu.yaml",
        needs="GPUs",
    ),
    "no GPU for the demo": launcher(
        "run_train.sh",
        "error: accelerate_configs/single_gpu.yaml: the config asks for a GPU and there is none; "
        "use accelerate_configs/cpu.yaml",
        ACCELERATE_CONFIG="accelerate_configs/single_gpu.yaml",
        MODEL="",
        TRAIN_FILE="",
        needs="GPUs",
    ),
    "no GPUs": launcher(
        "run_infer.sh",
        "error: accelerate_configs/multi_gpu.yaml: the config asks for 2 GPUs and there is none; "
        "use accelerate_configs/cpu.yaml",
        ACCELERATE_CONFIG="accelerate_configs/multi_gpu.yaml",
        needs="GPUs",
    ),
    "config that is no YAML": launcher(
        "run_train.sh",
        "error: config.yaml: not valid YAML (…); give one of accelerate_configs/",
        files={"config.yaml": "a: [\nb"},
        ACCELERATE_CONFIG="config.yaml",
    ),
    "config of something else": launcher(
        "run_train.sh",
        "error: config.yaml: not a config of Accelerate; give one of accelerate_configs/",
        files={"config.yaml": "use_cpu: true\n"},
        ACCELERATE_CONFIG="config.yaml",
    ),
    "config without processes": launcher(
        "run_train.sh",
        "error: config.yaml: num_processes is None on num_machines 1; give a process for each GPU",
        files={"config.yaml": "distributed_type: MULTI_GPU\n"},
        ACCELERATE_CONFIG="config.yaml",
    ),
    "complaint of train.py": launcher(
        "run_train.sh",
        f"error: none.csv: {NOT_THERE}",
        TRAIN_FILE="none.csv",
        needs="launch",
    ),
    # What accelerate launch tells a script, and what torchrun tells each of two processes.
    "no GPU to train on": Case(
        "train.py",
        "error: accelerate launch: the config asks for a GPU and there is none; use "
        "accelerate_configs/cpu.yaml",
        env={"ACCELERATE_USE_CPU": "False"},
        needs="GPUs",
    ),
    "no GPU to infer on": Case(
        "infer.py",
        "error: accelerate launch: the config asks for a GPU and there is none; use "
        "accelerate_configs/cpu.yaml",
        env={"ACCELERATE_USE_CPU": "False"},
        needs="GPUs",
    ),
    "no GPU for each process": Case(
        "train.py",
        "error: accelerate launch: the config asks for 2 GPUs and there is none; use "
        "accelerate_configs/cpu.yaml",
        env={"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        needs="GPUs",
    ),
}
CHAPTERS = {
    "articles": ARTICLES,
    "prompts": PROMPTS,
    "models": MODELS,
    "runs": RUNS,
    "outputs": OUTPUTS,
    "options": OPTIONS_THAT_ARE_WRONG,
    "scores": SCORES,
    "machines": MACHINES,
}
CATALOGUE = [
    pytest.param(case, id=f"{chapter}: {name}")
    for chapter, cases in CHAPTERS.items()
    for name, case in cases.items()
]


def change_files(folder: Path, files: dict) -> None:
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.unlink()
        elif callable(content):
            content(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", CATALOGUE)
def test_bad_input_is_one_line_and_nothing_written(folder, answer, case):
    change_files(folder, case.files)
    before = everything_in(folder)
    argv = with_options(case.script, case.argv)
    result = answer(folder, case.script, argv, case.needs, **case.env)
    line = case.line.replace("{work}", str(folder)) + "\n"
    expected = re.escape(line).replace(re.escape("(…)"), r"\(.+\)")
    assert re.fullmatch(expected, result.stderr), result.stderr
    assert result.stdout == ""
    assert everything_in(folder) == before


def test_the_catalogue_is_as_long_as_it_claims():
    assert len(CATALOGUE) >= 100
    assert len({case.values[0].line for case in CATALOGUE}) > 60


# ---------------------------------------------------------------------- every number


@dataclass(frozen=True)
class Rule:
    """Which numbers an argument refuses, and with which words."""

    refused: tuple
    complaint: str


ABOVE_0 = Rule((0, -1, "nan", "-inf"), "{script}: error: --{name} {value}: give a number above 0")
FINITE = Rule(("inf",), "{script}: error: --{name} {value}: give a finite number above 0")
ANY_FINITE = Rule(("nan", "inf", "-inf"), "{script}: error: --{name} {value}: give a finite number")
SHARE = Rule(
    (1, -0.01, "nan", "inf", "-inf"),
    "{script}: error: --{name} {value}: give a number from 0 to below 1",
)
UP_TO_1 = Rule(
    (-0.01, 1.01, "nan", "inf", "-inf"),
    "{script}: error: --{name} {value}: give a number from 0 to 1",
)
BELOW_2_32 = Rule(
    (-1, 2**32), "{script}: error: --{name} {value}: give a number from 0 to below 2**32"
)
FROM_0 = Rule((-1,), "{script}: error: --{name} {value}: give a number from 0")
ROWS = Rule((0, -1, 10**12), "error: --{name}: out of range; give 1 to (…)")
SEED = Rule((-1, 2**32), "error: --seed: out of range; give 0 to 4294967295")
STEPS = Rule((0, -1), "error: --{name}: out of range; give 1 or more, or --no-model")
# Whoever adds a number adds nothing here, unless 0 is a good value of it or there is a largest.
RULES = {
    ("train.py", "lora_dropout"): [SHARE],
    ("train.py", "warmup_ratio"): [SHARE],
    ("train.py", "cooldown_ratio"): [SHARE],
    ("train.py", "prompt_loss_weight"): [UP_TO_1],
    ("train.py", "seed"): [BELOW_2_32],
    ("train.py", "num_eval_titles"): [BELOW_2_32],
    ("infer.py", "length_penalty"): [ANY_FINITE],
    ("merge.py", "check_rows"): [FROM_0],
    ("make_demo.py", "train_rows"): [ROWS],
    ("make_demo.py", "validation_rows"): [ROWS],
    ("make_demo.py", "test_rows"): [ROWS],
    ("make_demo.py", "seed"): [SEED],
    ("make_demo.py", "pretraining_steps"): [STEPS],
}


def arguments_of(script: str) -> list[argparse.Action]:
    """Return the arguments that a script takes, from the parser that it makes itself."""

    made = []

    def stop(parser, argv=None):
        made.append(parser)
        raise StopIteration

    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(StopIteration):
            module.parse_args([])
    return made[0]._actions


def numbers_out_of_range():
    """Yield the script, an option with a value, and the line that refuses it."""
    for script in (name for name in OPTIONS if name.endswith(".py")):
        for action in arguments_of(script):
            if action.type not in (int, float):
                continue
            name, kind = action.dest, action.type
            for value in ("many", "nan", "inf")[: 3 if kind is int else 1]:
                line = f"{script}: error: argument --{name}: invalid {kind.__name__} value: "
                yield script, f"--{name}={value}", line + repr(value)
            for rule in RULES.get((script, name), [ABOVE_0, FINITE]):
                for value in rule.refused:
                    if kind is int and isinstance(value, str):
                        continue
                    line = rule.complaint.format(script=script, name=name, value=kind(value))
                    yield script, f"--{name}={value}", line


NUMBERS = list(numbers_out_of_range())


@pytest.mark.parametrize(
    ("script", "option", "line"),
    NUMBERS,
    ids=[f"{script} {option}" for script, option, _ in NUMBERS],
)
def test_numbers_out_of_range(tmp_path, monkeypatch, capsys, script, option, line):
    """They come first: none of the files need be there, and `main` imports no library.

    All in this process, for there are many: that the script does not import one either, and that a
    complaint is as short when it is a process of its own, is shown above.
    """
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *OPTIONS[script], option])
    monkeypatch.setattr("__main__.__spec__", None)  # or Python 3.14 calls it `python -m pytest`
    for library in LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)  # whoever imports it now, fails
    with pytest.raises(SystemExit) as ended:
        exit_codes.run(module.main)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    expected = re.escape(line + "\n").replace(re.escape("(…)"), r"\d+")
    assert re.fullmatch(expected, printed.err), printed.err
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


def test_every_script_with_numbers_was_walked():
    found = {(script, option.split("=")[0].removeprefix("--")) for script, option, _ in NUMBERS}
    assert found >= RULES.keys()
    assert found >= {("train.py", "learning_rate"), ("infer.py", "max_length")}
    assert len(found) >= 25


# ---------------------------------------------------------------------- fine, and kept

BOM = "\ufeff"
FINE = [
    {"ID": "007", "text": 'Un « mot »,\r\nun autre,\n"cité".', "titles": "L'été à l'Élysée"},
    {"ID": "1e3", "text": "null", "titles": "null"},
    {"ID": "NA", "text": "NA", "titles": "NA"},
    {"ID": "nan", "text": "nan", "titles": "nan"},
    {
        "ID": "e\u0301",
        "text": unicodedata.normalize("NFD", "L'élève a été reçu à Orléans."),
        "titles": unicodedata.normalize("NFD", "Élève reçu à Orléans"),
    },
    {"ID": "👩‍👩‍👧‍👦", "text": "Une famille 👩‍👩‍👧‍👦 et un ⚽️.", "titles": "But ⚽️ du « 10 »"},
    {"ID": "عنوان", "text": "قال الرئيس إن النتائج جيدة", "titles": "الرئيس: نتائج جيدة"},
    {"ID": "a\u2028b", "text": "Deux\u2028lignes\u0085et\x0bplus", "titles": "Un\u2028titre, deux"},
    {"ID": "-0", "text": "  {article} \\n <|im_end|> Titre : ", "titles": '"Quoi ?", dit-il'},
]


ONE_UPDATE = ("--per_device_train_batch_size", "9", "--max_train_steps", "1")
ONE_UPDATE += ("--max_length", "512", "--max_title_tokens", "128")  # in bytes, as it is tokenized


def as_excel_writes_it(path: Path, rows: list[dict], columns) -> Path:
    """Write a CSV with a byte order mark and CRLF at the ends of rows."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        stream.write(BOM)
        writer = csv.DictWriter(stream, columns, lineterminator="\r\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


# The memory of a process counts what it had before it became another program, which of a child of
# pytest is all of pytest's: this one between them is small.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print("peak", usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(folder: Path, script: str, *argv) -> tuple[str, int]:
    """Run a script; return what it printed and the largest memory that it took, in bytes."""
    command = [sys.executable, "-c", MEASURE, sys.executable, str(SCRIPTS / script)]
    result = subprocess.run(
        [*command, *with_options(script, argv)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, int(re.search(r"peak (\d+)$", result.stdout.strip())[1])


@pytest.fixture(scope="module")
def fine(template, tmp_path_factory):
    """The folder in which the fine articles were trained on, inferred on and scored, and memory."""
    folder = shutil.copytree(template, tmp_path_factory.mktemp("fine") / "work")
    as_excel_writes_it(folder / "train.csv", FINE, ["ID", "text", "titles"])
    as_excel_writes_it(folder / "test.csv", FINE, ["ID", "text"])
    as_excel_writes_it(folder / "true.csv", FINE, ["ID", "titles"])
    as_excel_writes_it(folder / "predicted.csv", FINE[::-1], ["titles", "ID"])
    _, training = measured(folder, "train.py", *ONE_UPDATE)
    _, inference = measured(folder, "infer.py")
    measured(
        folder, "score.py", "--output_dir", "scores", "--predictions", "predicted.csv", "out.csv"
    )
    return folder, {"train.py": training, "infer.py": inference}


def test_every_fine_article_is_trained_on_whole(fine):
    from prompting import load_tokenizer, prompt_of_run

    folder, _ = fine
    prompt = json.loads((folder / "out/run_config.json").read_text(encoding="utf-8"))["prompt"]
    prompt = prompt_of_run(load_tokenizer(str(folder / "out")), prompt, "out")
    examples = [prompt.encode(row["text"], row["titles"]) for row in FINE]
    assert not any(example.article_cut or example.title_cut for example in examples)
    [update] = map(json.loads, (folder / "out/metrics.jsonl").read_text().splitlines())
    assert update["articles"] == len(FINE)
    assert update["tokens"] == sum(len(example.ids) for example in examples)
    assert update["title_tokens"] == sum(example.num_title_ids for example in examples)


def test_every_fine_article_gets_its_title(fine):
    folder, _ = fine
    assert [row["ID"] for row in read_csv(folder / "out.csv")] == [row["ID"] for row in FINE]
    lines = (folder / "out.jsonl").read_text(encoding="utf-8").split("\n")
    details = [json.loads(line) for line in lines[1:] if line]
    assert [row["id"] for row in details] == [row["ID"] for row in FINE]


def test_every_fine_title_scores_in_any_order(fine):
    """Predictions in another order are aligned by ID, which is no reason to complain."""
    folder, _ = fine
    scores = json.loads((folder / "scores/scores.json").read_text(encoding="utf-8"))
    assert scores["references"]["rows"] == len(FINE)
    itself = scores["predictions"]["predicted"]
    assert itself["rouge"]["unicode"]["rouge1"] == itself["rouge"]["unicode"]["rougeL"] == 1
    assert (itself["empty"], itself["words"]) == (0, scores["references"]["words"])
    assert scores["predictions"]["out"]["rouge"]["unicode"]["rougeL"] < 1


@pytest.mark.parametrize("script", ["train.py", "infer.py"])
def test_an_article_of_10_megabytes_is_cut_in_bounded_memory(fine, template, tmp_path, script):
    _, peaks = fine
    folder = shutil.copytree(template, tmp_path / "work")
    long = "Le maire de Nîmes a été élu « hier », à 3,5 %. " * 200_000
    assert len(long.encode()) > 10_000_000
    rows = [FINE[0] | {"text": long}, *FINE[1:]]
    for name in ("train.csv", "test.csv"):
        as_excel_writes_it(folder / name, rows, list(FINE[0]))
    more = ONE_UPDATE if script == "train.py" else ()
    text, peak = measured(folder, script, *more)
    print(f"{script}: {peak / 2**20:.0f} MiB, {peaks[script] / 2**20:.0f} without it")
    assert peak < peaks[script] + 300 * 2**20
    if script == "train.py":
        assert "1 training articles are cut to" in text
    else:
        assert len(read_csv(folder / "out.csv")) == len(rows)


# ---------------------------------------------------------------------- through accelerate launch


@pytest.mark.parametrize("config", ["single_gpu", "multi_gpu"])
def test_a_launch_without_its_gpus_ends_before_anything_is_written(folder, config):
    """What Accelerate adds, and its own exit code, are its own; the first line is ours."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    launch += ["--config_file", f"accelerate_configs/{config}.yaml", "scripts/train.py"]
    wanted = {"single_gpu": "a GPU", "multi_gpu": "2 GPUs"}[config]
    before = everything_in(folder)
    result = subprocess.run(
        [*launch, *OPTIONS["train.py"]],
        capture_output=True,
        text=True,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in UNSET}
        | {"CUDA_VISIBLE_DEVICES": "", "EXIT_CODE_FILE": str(folder.parent / "code")}
        | {"PYTHONDONTWRITEBYTECODE": "1"},
        timeout=200,
    )
    complaint = (
        f"error: accelerate launch: the config asks for {wanted} and there is none; use "
        "accelerate_configs/cpu.yaml\n"
    )
    assert result.stderr.count(complaint) == 1
    assert (folder.parent / "code").read_text() == "2\n"
    assert everything_in(folder) == before
    if config == "single_gpu":
        assert result.stderr == complaint
