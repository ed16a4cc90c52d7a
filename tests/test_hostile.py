"""Hostile files: nothing in a model, a run or articles is run, calls out or writes elsewhere.

Each trap leaves a mark when it is sprung, and a test springs it the naive way first.

python -m pytest tests/test_hostile.py
"""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import (
    SCRIPTS,
    byte_level_tokenizer,
    call,
    french_rows,
    read_csv,
    save_tiny_model,
    train_args,
    write_csv,
)

import infer
import merge
import score
import train
from exit_codes import UserError, note, printable
from prompting import Prompt
from run_folder import check_links, check_model_folder, write_json

ESCAPES = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202edrowssap\u200b"


class Trap:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Return the content of all files under a folder, links by what they name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path).encode()
        elif path.is_file():
            found[path] = path.read_bytes()
    return found


def change_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(content | changes), encoding="utf-8")


def hostile_model(folder: Path, mark: Path) -> Path:
    """Write a working model with every kind of code and pickle beside it that is known to run."""
    save_tiny_model(folder, byte_level_tokenizer(), tie=True)
    spring = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    (folder / "trap.py").write_text(
        f"{spring}from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'trap'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    names = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    change_json(folder / "config.json", auto_map=names)
    names = {"AutoTokenizer": ["trap.Tokenizer", "trap.Tokenizer"]}
    change_json(folder / "tokenizer_config.json", auto_map=names)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(f"{spring}def generate(model): pass\n")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        with (folder / name).open("wb") as stream:
            pickle.dump(Trap(mark), stream)
    return folder


@pytest.fixture
def mark(tmp_path):
    """The file that a sprung trap leaves; none may be there when a test ends."""
    file = tmp_path / "mark"
    yield file
    assert not file.exists(), "a trap was sprung"


@pytest.fixture
def yes(monkeypatch):
    """Whoever asks at the terminal, for instance whether to run a model's code, is told yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


# ---------------------------------------------------------------------- the source

FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_MODULES |= {"imp", "runpy", "code", "socket", "urllib", "requests", "httpx"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}
FORBIDDEN_CALLS |= {"torch.save", "importlib.import_module", "torch.hub.load", "np.load"}
FORBIDDEN_CALLS |= {"yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"}
FORBIDDEN_CALLS |= {"numpy.load", "tempfile.mktemp", "torch.jit.load", "pandas.read_pickle"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code": False, "shell": False, "allow_pickle": False}
FORBIDDEN_ARGUMENTS |= {"weights_only": True, "use_safetensors": True}  # others than these


def offences(source: str) -> list[str]:
    """Return what a source file imports, calls or passes that it must not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0]}
        else:
            names = set()
        found += sorted(names & FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] * (name in FORBIDDEN_CALLS)
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_ARGUMENTS and (
                    not isinstance(keyword.value, ast.Constant)
                    or keyword.value.value is not FORBIDDEN_ARGUMENTS[keyword.arg]
                ):
                    found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


@pytest.mark.parametrize("file", sorted(SCRIPTS.glob("*.py")), ids=lambda file: file.name)
def test_a_script_neither_unpickles_nor_runs_what_it_reads(file):
    assert offences(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "offence"),
    [
        ("import pickle", "pickle"),
        ("from dill import loads", "dill"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("eval('1')", "eval"),
        ("os.system('ls')", "os.system"),
        ("subprocess.run('ls', shell=True)", "shell=True"),
        ("f(trust_remote_code=True)", "trust_remote_code=True"),
        ("f(trust_remote_code=args.trust)", "trust_remote_code=args.trust"),
        ("np.load('x', allow_pickle=True)", "allow_pickle=True"),
        ("f(use_safetensors=None)", "use_safetensors=None"),
    ],
)
def test_the_search_of_the_source_finds_what_it_looks_for(source, offence):
    assert offence in offences(source)


def test_every_loader_is_told_to_run_nothing():
    """`trust_remote_code` left out is no "no": transformers then asks at the terminal."""
    loaders = 0
    for file in SCRIPTS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                assert "**OWN_FILES_ONLY" in ast.unparse(node), f"{file.name}:{node.lineno}"
                loaders += 1
    assert loaders >= 3
    import modeling

    expected = {"trust_remote_code": False, "local_files_only": True}
    assert expected == modeling.OWN_FILES_ONLY


# ---------------------------------------------------------------------- code and pickles


def test_the_traps_spring_when_a_model_is_loaded_the_naive_way(tmp_path, yes):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    mark = tmp_path / "mark"
    model = hostile_model(tmp_path / "model", mark)
    naive = {
        "pickle": lambda: torch.load(model / "pytorch_model.bin", weights_only=False),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(model, trust_remote_code=True),
        "generation": lambda: AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True),
    }
    for name, load in naive.items():
        with suppress(RuntimeError):  # the pickle holds no weights, but it has been loaded
            load()
        assert mark.exists(), name
        mark.unlink()
    # Where it knows no such kind of model, transformers asks; and is told yes.
    mark = tmp_path / "other mark"
    model = hostile_model(tmp_path / "other", mark)
    change_json(model / "config.json", model_type="trap")
    AutoConfig.from_pretrained(model)
    assert mark.exists()


RECORDER = """
import socket
def refuse(*arguments, **_):
    family = getattr(arguments[0], "family", None)
    if family != getattr(socket, "AF_UNIX", None):
        with open({log!r}, "a") as stream:
            stream.write(repr(arguments) + "\\n")
        raise OSError("there is no network")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, refuse)
"""


@pytest.fixture(scope="module")
def no_network(tmp_path_factory):
    """Return the environment of a machine that has a Hub to call, and where calls are noted."""
    folder = tmp_path_factory.mktemp("site")
    log = folder / "calls"
    (folder / "sitecustomize.py").write_text(RECORDER.format(log=str(log)))
    # If a script imported this package, bitsandbytes would fetch and run code from the Hub.
    (folder / "kernels.py").write_text(f"open({str(folder / 'kernels_imported')!r}, 'w')\n")
    home = str(folder / "home")
    return log, {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "0", "HF_HOME": home}


def test_calls_are_noted(no_network, run_script, tmp_path):
    log, environment = no_network
    article = write_csv(tmp_path / "a.csv", [{"text": "Un mot."}])
    result = run_script(
        *("infer.py", "--model_name_or_path", "owner/name", "--input_file", article),
        *("--output_file", tmp_path / "p.csv"),
        code=2,
        **environment,
    )
    assert result.stderr.startswith("error: owner/name: neither a folder here nor a model")
    assert log.exists()
    log.unlink()


def test_a_hostile_model_trains_infers_and_merges_without_a_trap_or_a_call(
    no_network, run_script, tmp_path, mark
):
    """The whole way, each step as a user runs it, from a folder that is all traps."""
    log, environment = no_network
    model = hostile_model(tmp_path / "model", mark)
    news = tmp_path / "news"
    news.mkdir()
    rows = french_rows(8, seed=1)
    for number, row in enumerate(rows):
        row["ID"] = f"../../{number}/\x1b[31m"
        row["titles"] = f"{ESCAPES} {row['titles']}"
    for name in ("train", "validation"):
        write_csv(news / f"{name}.csv", rows)
    before = snapshot(tmp_path)

    run = tmp_path / "out/run"
    steps = ("--max_train_steps", "1", "--checkpointing_steps", "1")
    trained = run_script("train.py", *train_args(model, news, run, *steps), **environment)
    for name in ("adapter_model.bin", "training_args.bin"):
        shutil.copy(model / name, run)
    shutil.copy(model / "pytorch_model.bin", run / "checkpoints/step-000001/optimizer.bin")
    predictions = tmp_path / "out/p.csv"
    given = ("--run_dir", run, "--input_file", news / "validation.csv")
    inferred = run_script("infer.py", *given, "--output_file", predictions, **environment)
    merged = run_script(
        "merge.py", "--run_dir", run, "--output_dir", tmp_path / "out/merged", **environment
    )
    scored = run_script(
        *("score.py", "--references", news / "validation.csv", "--predictions"),
        *(f"../../up={predictions}", "--output_dir", tmp_path / "out/scores"),
        **environment,
    )

    assert not log.exists(), log.read_text()
    assert not Path(environment["PYTHONPATH"], "kernels_imported").exists()
    outside = {path: content for path, content in snapshot(tmp_path).items()}
    outside = {path: c for path, c in outside.items() if tmp_path / "out" not in path.parents}
    assert outside == before
    assert [row["ID"] for row in read_csv(predictions)] == [row["ID"] for row in rows]
    # Three true titles are shown in training, without what a terminal would obey.
    assert "true:    \\x1b]0;pwned\\x07\\x1b[2J\\x9b31m\\u202edrowssap\\u200b" in trained.stdout
    for result in (trained, inferred, merged, scored):
        shown = (result.stdout + result.stderr).replace("\n", "").replace("\r", "")
        assert printable(shown) == shown
    weights = {path.name for path in (tmp_path / "out").rglob("*") if path.suffix == ".safetensors"}
    assert weights == {"adapter_model.safetensors", "optimizer.safetensors", "model.safetensors"}


def test_the_package_that_fetches_code_is_out_of_reach(no_network, tmp_path):
    """Without the line in libraries.py, transformers alone imports it to ask for its version."""
    _, environment = no_network
    imported = Path(environment["PYTHONPATH"], "kernels_imported")
    ask = "from transformers.utils import is_kernels_available; is_kernels_available()"
    for code, found in ((ask, True), (f"import run_folder; {ask}", False)):
        imported.unlink(missing_ok=True)
        path = os.pathsep.join((environment["PYTHONPATH"], str(SCRIPTS)))
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True
        )
        assert imported.exists() == found
    imported.unlink(missing_ok=True)


def refused(*arguments) -> str:
    """Return the one line with which a script in this process refuses its arguments."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def infer_args(model, news, tmp_path) -> tuple:
    given = ("--model_name_or_path", model, "--input_file", news / "test.csv")
    return (*given, "--output_file", tmp_path / "p.csv", "--max_new_tokens", "2")


def test_a_model_that_needs_code_of_its_own_is_refused(tmp_path, mark, yes, news):
    model = hostile_model(tmp_path / "model", mark)
    change_json(model / "config.json", model_type="trap")
    assert "contains custom code" in refused(infer.main, *infer_args(model, news, tmp_path))
    assert "contains custom code" in refused(train.main, *train_args(model, news, tmp_path / "r"))
    change_json(model / "config.json", model_type="llama", auto_map={})
    change_json(model / "tokenizer_config.json", tokenizer_class="Trap")
    assert "contains custom code" in refused(infer.main, *infer_args(model, news, tmp_path))


def test_code_of_another_repository_is_not_fetched(tmp_path, mark, yes, news):
    model = save_tiny_model(tmp_path / "model", byte_level_tokenizer())
    names = {"AutoConfig": "owner/name--trap.C", "AutoModelForCausalLM": "owner/name--trap.M"}
    change_json(model / "config.json", auto_map=names, model_type="trap")
    assert "owner/name" in refused(infer.main, *infer_args(model, news, tmp_path))


def test_a_config_cannot_ask_for_code_of_the_hub(tmp_path, news):
    model = save_tiny_model(tmp_path / "model", byte_level_tokenizer())
    change_json(model / "config.json", attn_implementation="owner/kernel")
    message = refused(infer.main, *infer_args(model, news, tmp_path))
    assert "the model cannot be made" in message
    assert "`kernels`" in message
    config = json.loads((model / "config.json").read_text())
    del config["attn_implementation"]  # CVE-2026-4372 was in the other name; it is ignored now
    config["_attn_implementation_internal"] = "owner/kernel"
    (model / "config.json").write_text(json.dumps(config))
    call(infer.main, *infer_args(model, news, tmp_path))


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["pytorch_model.bin"], "'pytorch_model.bin' is no *.safetensors of this folder"),
        (["../other/model.safetensors"], "is no *.safetensors of this folder"),
        (["/etc/model.safetensors"], "is no *.safetensors of this folder"),
        ([5], "no index of weights"),
        (None, "no index of weights"),
    ],
)
def test_an_index_of_weights_names_no_other_files(tmp_path, mark, names, complaint):
    model = hostile_model(tmp_path / "model", mark)
    os.rename(model / "model.safetensors", model / "model-1.safetensors")
    weight_map = names and {f"layer {number}": name for number, name in enumerate(names)}
    change_json(model / "model.safetensors.index.json", weight_map=weight_map, metadata={})
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: ") as error:
        check_model_folder(str(model))
    assert complaint in str(error.value)


def test_a_config_names_no_other_weights(tmp_path):
    """Neither the fingerprint nor the merge would be of those."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = save_tiny_model(tmp_path / "model", byte_level_tokenizer())
    weights = load_file(model / "model.safetensors")
    zeros = {name: weight.zero_() for name, weight in weights.items()}
    save_file(zeros, model / "other.safetensors", metadata={"format": "pt"})
    change_json(model / "config.json", transformers_weights="other.safetensors")
    assert not AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight.any()
    with pytest.raises(UserError, match=r"config\.json: transformers would load the weights that"):
        check_model_folder(str(model))


def test_transformers_would_load_a_pickle_that_an_index_names(tmp_path):
    """Only with weights_only, but a pickle it is: hence the refusal above."""
    import torch
    from transformers import AutoModelForCausalLM

    model = save_tiny_model(tmp_path / "model", byte_level_tokenizer())
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    torch.save(weights, model / "weights.bin")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "weights.bin")}
    change_json(model / "model.safetensors.index.json", **index)
    AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)


def test_pickles_alone_are_no_model(tmp_path, mark, news):
    model = hostile_model(tmp_path / "model", mark)
    (model / "model.safetensors").unlink()
    message = refused(train.main, *train_args(model, news, tmp_path / "run"))
    assert message.startswith(f"{model}: no *.safetensors weights in this folder;")


def test_an_adapter_in_the_base_folder_is_not_loaded_unasked(tmp_path, mark, news):
    model = hostile_model(tmp_path / "model", mark)
    change_json(model / "adapter_config.json", peft_type="LORA", base_model_name_or_path="a/b")
    message = refused(infer.main, *infer_args(model, news, tmp_path))
    assert "transformers would load the adapter beside this model" in message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "trap"}, "megatron_config is {'a': 1}"),
        ({"auto_mapping": {"base_model_class": "A", "parent_library": "trap"}}, None),
        ({"base_model_name_or_path": "owner/other", "revision": "evil"}, None),
        ({"corda_config": {"cache_file": "adapter_model.bin"}}, "corda_config is"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "eva"}, None),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"target_modules": "(.*)*x"}, "target_modules is '(.*)*x', not a list of names"),
        ({"r": -1}, "no usable adapter_config.json"),
        ({"r": "4"}, "no usable adapter_config.json"),
        ({"peft_type": ["LORA"]}, "peft_type is ['LORA'], not 'LORA'"),
    ],
    ids=str,
)
def test_of_an_adapters_config_only_the_numbers_count(
    trained, tiny_model, tmp_path, monkeypatch, change, complaint
):
    import torch

    from modeling import attach_adapter, load_base

    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    change_json(run / "adapter_config.json", **change)
    base = load_base(str(tiny_model), torch.device("cpu"), torch.float32, nf4=False)
    if complaint is None:
        attach_adapter(base, str(run))
    else:
        with pytest.raises(UserError) as error:
            attach_adapter(base, str(run))
        assert complaint in str(error.value)
    assert not (tmp_path / "mark").exists()


def test_a_run_without_its_safetensors_is_not_made_up_for_by_a_pickle(
    trained, news, tmp_path, mark
):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "adapter_model.safetensors").unlink()
    (run / "adapter_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    output = ("--input_file", news / "test.csv", "--output_file", tmp_path / "p.csv")
    assert "no adapter_model.safetensors" in refused(infer.main, "--run_dir", run, *output)
    output = ("--output_dir", tmp_path / "merged")
    assert "no adapter_model.safetensors" in refused(merge.main, "--run_dir", run, *output)


BREAKOUTS = (
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0]['content'] }}",
    "{{ (messages|attr('__class__'))|attr('__init__') }}{{ lipsum.__globals__['os'].getcwd() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ ('{0.__class__}'|attr('format'))(cycler) }}{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('\x1b[2J') }}",
    "{{ 5 + 'a' }}",
    "{% if %}",
)


def test_a_chat_template_would_break_out_of_plain_jinja(tmp_path):
    import jinja2

    source = BREAKOUTS[0].replace("MARK", str(tmp_path / "mark"))
    jinja2.Environment().from_string(source).render()
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("template", BREAKOUTS)
def test_a_chat_template_cannot_leave_its_sandbox(mark, template):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template.replace("MARK", str(mark))
    with pytest.raises(UserError, match="--apply_chat_template: this model's chat template "):
        Prompt(tokenizer, "{article}", True)


# ---------------------------------------------------------------------- paths


def test_names_of_chat_templates_are_no_paths(tmp_path, news):
    model = save_tiny_model(tmp_path / "a/b/model", byte_level_tokenizer(), tie=True)
    (model / "chat_template.jinja").unlink()
    names = ("default", "../../../escaped", "/tmp/escaped-from-manchette", "rag")
    templates = [{"name": name, "template": "{{ messages[0]['content'] }}"} for name in names]
    change_json(model / "tokenizer_config.json", chat_template=templates)
    before = snapshot(tmp_path)
    run = tmp_path / "out/run"
    call(train.main, *train_args(model, news, run, "--max_train_steps", "1"))
    after = {path: content for path, content in snapshot(tmp_path).items()}
    assert {path: c for path, c in after.items() if run not in path.parents} == before
    assert not Path("/tmp/escaped-from-manchette.jinja").exists()
    assert (run / "chat_template.jinja").is_file()


LINKS = ("metrics.jsonl", "metrics.tmp", "run_config.json", "run_config.json.tmp", "README.md")
LINKS += ("checkpoints", "checkpoints/step-000001.tmp", "checkpoints/step-000002", "tokenizer.json")


@pytest.mark.parametrize("link", LINKS)
def test_training_does_not_go_on_through_a_link(trained, tiny_model, news, tmp_path, link):
    run = shutil.copytree(trained, tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    path = run / link
    if path.is_dir():
        shutil.move(path, elsewhere)
    else:
        elsewhere.write_text("mine")
        path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    before = snapshot(tmp_path)
    resume = ("--resume_from_checkpoint", "latest")
    message = refused(train.main, *train_args(tiny_model, news, run, *resume))
    assert message.startswith(f"{path}: a symbolic link, which may lead anywhere;")
    assert snapshot(tmp_path) == before


def test_a_run_does_not_begin_through_a_link_either(tiny_model, news, tmp_path):
    (tmp_path / "mine").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run_config.json.tmp").symlink_to(tmp_path / "mine")
    resume = ("--resume_from_checkpoint", "latest")
    refused(train.main, *train_args(tiny_model, news, run, *resume))
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("suffix", [".csv", ".csv.tmp", ".jsonl", ".jsonl.tmp", ".part-0.jsonl"])
def test_predictions_are_not_written_through_a_link(tiny_model, news, tmp_path, suffix):
    (tmp_path / "mine").write_text("mine")
    link = tmp_path / f"p{suffix}"
    link.symlink_to(tmp_path / "mine")
    message = refused(infer.main, *infer_args(tiny_model, news, tmp_path))
    assert message.startswith(f"{link}: a symbolic link, which may lead anywhere;")
    assert (tmp_path / "mine").read_text() == "mine"


def test_links_elsewhere_do_not_matter(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "p.txt").write_text("p")
    check_links(tmp_path.rglob("*"))
    check_links((tmp_path / "missing").rglob("*"))


@pytest.mark.parametrize("name", ["scores.json", "scores.json.tmp"])
def test_scores_replace_a_link_and_not_what_it_names(news, tmp_path, name):
    (tmp_path / "mine").write_text("mine")
    output = tmp_path / "scores"
    output.mkdir()
    (output / name).symlink_to(tmp_path / "mine")
    write_json(output / "scores.json", {"a": 1})
    assert (tmp_path / "mine").read_text() == "mine"
    assert json.loads((output / "scores.json").read_text()) == {"a": 1}
    assert not (output / "scores.json").is_symlink()


@pytest.mark.parametrize("ending", ["", ".tmp"])
@pytest.mark.parametrize("name", ["flags.jsonl", "report.html"])
def test_flags_and_report_replace_a_link_too(news, tmp_path, name, ending):
    (tmp_path / "mine").write_text("mine")
    output = tmp_path / "scores"
    output.mkdir()
    (output / f"{name}{ending}").symlink_to(tmp_path / "mine")
    titles = news / "validation.csv"
    call(score.main, "--references", titles, "--predictions", titles, "--output_dir", output)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (output / name).is_symlink()
    assert (output / name).stat().st_size > 4


def test_escape_sequences_in_titles_and_names_of_runs_are_told_as_text(news, tmp_path, capsys):
    titles = write_csv(tmp_path / "t.csv", [{"titles": "\x1b[2J\u202e", "text": "\x1b[2J"}] * 2)
    call(score.main, "--references", titles, "--predictions", titles, "--output_dir", tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (capsys.readouterr().out, page, (tmp_path / "flags.jsonl").read_text()):
        assert not {"\x1b", "\u202e"} & set(text)


def test_the_name_of_a_row_is_no_path(news, tmp_path):
    before = snapshot(tmp_path)
    titles = news / "validation.csv"
    names = [f"{name}={titles}" for name in ("../../a", "/etc/b", "..", "a/../../c")]
    given = ("--references", titles, "--predictions", *names)
    call(score.main, *given, "--output_dir", tmp_path / "scores")
    after = snapshot(tmp_path)
    names = ("scores.json", "flags.jsonl", "report.html")
    assert after.keys() - before.keys() == {tmp_path / "scores" / name for name in names}
    assert "no name for this row" in refused(
        *(score.main, "--references", titles, "--predictions", f"a\x1b[2J={titles}"),
        *("--output_dir", tmp_path / "scores"),
    )


@pytest.mark.parametrize(
    "change",
    [
        {"completed_steps": "../../x"},
        {"completed_steps": 10**9},
        {"completed_steps": -1},
        {"completed_steps": None},
        {"best_step": "../../x"},
        {"best_step": [1]},
    ],
    ids=str,
)
def test_the_numbers_of_a_checkpoint_are_no_paths(trained, tmp_path, change):
    """Not even where whoever changed them has sealed them again."""
    from checkpoints import read_state, sealed

    source = max((trained / "checkpoints").iterdir())
    checkpoint = shutil.copytree(source, tmp_path / source.name)
    read_state(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(sealed(state | change)))
    with pytest.raises(UserError, match="damaged checkpoint"):
        read_state(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": {"template": 5}},
        {"prompt": {"__class__": "x"}},
        {"prompt": []},
        {"prompt": {"max_length": "256"}},
        {"base_model": ["a"]},
        {"base_model": None},
        {"arguments": "x"},
        {"data": {"validation": "/etc/passwd"}},
        {"data": {"validation": {"path": "x.csv", "rows": "many"}}},
        {"kind": {}},
    ],
    ids=str,
)
def test_a_record_that_no_run_writes_is_refused(trained, news, tmp_path, change):
    run = shutil.copytree(trained, tmp_path / "run")
    change_json(run / "run_config.json", **change)
    before = snapshot(tmp_path)
    given = ("--run_dir", run, "--output_dir", tmp_path / "merged")
    assert "holds what no run writes" in refused(merge.main, *given)
    given = ("--run_dir", run, "--input_file", news / "test.csv")
    message = refused(infer.main, *given, "--output_file", tmp_path / "p.csv")
    assert "holds what no run writes" in message
    assert snapshot(tmp_path) == before


def test_paths_in_a_record_are_never_written_to(trained, news, tmp_path):
    run = shutil.copytree(trained, tmp_path / "a/b/run")
    record = json.loads((run / "run_config.json").read_text())
    (tmp_path / "mine.csv").write_text("mine")
    record["arguments"] |= {"output_dir": "../../..", "train_file": str(tmp_path / "mine.csv")}
    record["arguments"] |= {"resume_from_checkpoint": "/", "prompt_file": "/etc/passwd"}
    record["data"]["train"]["path"] = "../../../mine.csv"
    record["output_dir"] = record["adapter"] = str(tmp_path / "mine.csv")
    change_json(run / "run_config.json", **record)
    before = snapshot(tmp_path)
    merged = tmp_path / "merged"
    given = ("--run_dir", run, "--output_dir", merged, "--check_rows", "0")
    call(merge.main, *given)
    after = {path: content for path, content in snapshot(tmp_path).items()}
    assert {path: c for path, c in after.items() if merged not in path.parents} == before


# ---------------------------------------------------------------------- the terminal


def test_nothing_that_a_terminal_obeys_is_printed(capsys):
    note(f"a {ESCAPES}")
    assert capsys.readouterr().out == (
        "NOTE: a \\x1b]0;pwned\\x07\\x1b[2J\\x9b31m\\u202edrowssap\\u200b\n"
    )
    for harmless in ("« Où ? »\u00a0: 3\u202f%, œuvre — naïf", "新闻", "👩 \U0001f1eb\U0001f1f7"):
        assert printable(harmless) == harmless


def test_a_complaint_shows_what_is_in_a_file_without_obeying_it(run_script, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(f"text,{ESCAPES}\nx,y\n", encoding="utf-8")
    result = run_script(
        *("score.py", "--references", file, "--predictions", file, "--output_dir", tmp_path / "s"),
        code=2,
    )
    assert printable(result.stderr[:-1]) == result.stderr[:-1]
    assert "\\x1b]0;pwned" in result.stderr
    name = tmp_path / f"a{ESCAPES}.csv"
    result = run_script(
        *("score.py", "--references", name, "--predictions", name, "--output_dir", tmp_path / "s"),
        code=2,
    )
    assert printable(result.stderr[:-1]) == result.stderr[:-1]


# ---------------------------------------------------------------------- libraries

AFFECTED = {  # the last release with an advisory that README's "Security" names
    "transformers": ("CVE-2026-4372, -5241, -9856", "5.9.0"),
    "datasets": ("PYSEC-2026-3716", "5.0.0"),
    "jinja2": ("CVE-2025-27516", "3.1.5"),
    "sentencepiece": ("CVE-2026-1260", "0.2.0"),
    "protobuf": ("CVE-2025-4565", "6.31.0"),
    "torch": ("CVE-2026-24747", "2.9.1"),
    "accelerate": ("GHSA-4j2p-28q2-5m79", "1.14.0"),
}


@pytest.mark.parametrize("package", AFFECTED)
def test_requirements_exclude_releases_with_known_advisories(package):
    from packaging.requirements import Requirement

    lines = (SCRIPTS.parent / "requirements.txt").read_text().splitlines()
    texts = [line.partition("#")[0].strip() for line in lines]
    bounds = {Requirement(text).name: Requirement(text).specifier for text in texts if text}
    advisory, last = AFFECTED[package]
    assert not bounds[package].contains(last)
    assert advisory in (SCRIPTS.parent / "README.md").read_text(encoding="utf-8")
