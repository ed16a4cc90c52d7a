"""run_folder.py: what a folder must hold, and the record that a run leaves.

python -m pytest tests/test_run_folder.py
"""

import errno
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SCRIPTS
from transformers import AutoModelForCausalLM

import run_folder
from exit_codes import UserError
from run_folder import (
    RUN_CONFIG,
    SAMPLED_BYTES,
    check_model_folder,
    check_output_dir,
    check_tracker,
    file_sha256,
    locked,
    log_metrics,
    log_titles,
    model_fingerprint,
    read_metrics,
    read_run_config,
    resolve_model_folder,
    share,
    tokenizer_sha256,
    versions,
    weight_files,
    write_json,
    write_run,
)

RECORD = {
    "kind": "adapter",
    "arguments": {
        "lora_dropout": 0.1,
        "output_dir": "run",
        "lora_r": 4,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "train_file": "train.csv",
    },
    "base_model": "model",
    "base_fingerprint": "0123456789abcdef",
    "prompt": {"template": "{article}", "ids_sha256": "a"},
    "data": {"train": {"path": "train.csv", "rows": 8, "sha256": "b", "has_ids": True}},
    "articles_per_update": 8,
    "versions": {},
    "commit": None,
}


def refusal(check, *arguments) -> str:
    with pytest.raises(UserError) as error:
        check(*arguments)
    return str(error.value)


# ---------------------------------------------------------------------- folders


@pytest.fixture
def small_model(tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    header = b'{"w":{"dtype":"U8","shape":[928],"data_offsets":[0,928]}}'.ljust(64)
    content = len(header).to_bytes(8, "little") + header + b"x" * 928
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_a_model_folder_and_a_hub_id_pass(small_model):
    check_model_folder(str(small_model))
    check_model_folder("meta-llama/Llama-2-7b-chat-hf")


@pytest.mark.parametrize("name", ["none", "./none/model", "/none", "a/b/c", "~/model", "owner/b/"])
def test_complaint_about_a_model_that_is_not_there(name):
    complaint = f"{name}: there is no such model folder; check the path"
    assert refusal(check_model_folder, name) == complaint


def test_complaints_about_a_model_folder(tmp_path, small_model):
    folder = str(tmp_path)
    no_config = f"{folder}: no config.json in this folder; give the folder of a model"
    assert refusal(check_model_folder, folder) == no_config
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert refusal(check_model_folder, folder) == (
        f"{folder}: no *.safetensors weights in this folder; convert the model to safetensors "
        "(pickled weights are never loaded)"
    )
    file = str(small_model / "config.json")
    assert refusal(check_model_folder, file) == (
        f"{file}: no config.json in this folder; give the folder of a model"
    )
    weights = small_model / "model.safetensors"
    for content in (weights.read_bytes()[:-1], b"version https://git-lfs.github.com/spec/v1", b""):
        weights.write_bytes(content)
        complaint = refusal(check_model_folder, str(small_model))
        assert complaint.startswith(f"{weights}: not whole (")
        assert complaint.endswith("); copy or download it again")


def test_a_shard_that_is_missing_is_told_and_what_nobody_reads_is_not(small_model):
    whole, shard = (small_model / f"model{number}.safetensors" for number in ("", "-1"))
    index = {"weight_map": {"a": whole.name, "b": shard.name}}
    (small_model / "model.safetensors.index.json").write_text(json.dumps(index))
    (small_model / "consolidated.safetensors").write_text("a copy in another format, cut off")
    check_model_folder(str(small_model))
    whole.rename(small_model / "model-0.safetensors")
    index["weight_map"]["a"] = "model-0.safetensors"
    (small_model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(check_model_folder, str(small_model)).startswith(f"{shard}: not whole (")
    shutil.copy(small_model / "model-0.safetensors", shard)
    check_model_folder(str(small_model))


def test_what_a_model_needs_is_fetched_and_nothing_twice(small_model, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    needed = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt"]
    needed += ["spiece.model", "vocab.txt", "chat_template.jinja"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"]
    others += ["onnx/config.json", "modeling_own.py", "model.gguf"]

    def snapshot_download(name, **patterns):
        assert list(filter_repo_objects([*needed, *others], **patterns)) == needed
        return str(small_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model_folder("owner/model") == small_model


def test_a_model_that_the_hub_does_not_give_is_refused(small_model, monkeypatch):
    assert resolve_model_folder(str(small_model)) == small_model
    assert refusal(resolve_model_folder, "owner/no-such-model") == (
        "owner/no-such-model: neither a folder here nor in the Hub's cache, and HF_HUB_OFFLINE is "
        "set; download it where there is a network, or give --model_name_or_path its folder"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    complaint = refusal(resolve_model_folder, "owner/no-such-model")
    assert complaint.startswith(
        "owner/no-such-model: neither a folder here nor a model to be had from the Hub ("
    )
    assert complaint.endswith(
        "); check the name and your access, or download it and give the folder"
    )
    assert "\n" not in complaint


def test_an_output_dir_is_new_or_empty_or_holds_only_what_is_its_own(tmp_path):
    check_output_dir(str(tmp_path / "a/b/c"))
    check_output_dir(str(tmp_path))
    (tmp_path / "own").touch()
    check_output_dir(str(tmp_path), ("own", "other"))
    assert [file.name for file in tmp_path.iterdir()] == ["own"]


def test_complaints_about_an_output_dir(tmp_path, monkeypatch):
    for name in ("b", "a"):
        (tmp_path / name).touch()
    folder, file = str(tmp_path), str(tmp_path / "a")
    for own in ((), ("b",)):
        assert refusal(check_output_dir, folder, own) == (
            f"{folder}: the folder is not empty (it holds a); remove it or give another "
            "--output_dir"
        )
    assert refusal(check_output_dir, file) == (
        f"{file}: this is a file, not a folder; give another --output_dir"
    )
    for below in ("x", "x/y"):
        assert refusal(check_output_dir, f"{file}/{below}") == (
            f"{file}/{below}: {file} cannot be written; give another --output_dir"
        )
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert refusal(check_output_dir, f"{folder}/x/y") == (
        f"{folder}/x/y: {folder} cannot be written; give another --output_dir"
    )


def test_complaint_about_a_tracker_that_is_not_installed():
    check_tracker("none")
    check_tracker("json")  # any module that is there
    assert refusal(check_tracker, "no_such_tracker") == (
        "--report_to no_such_tracker: it is not installed; run: pip install no_such_tracker"
    )


# ---------------------------------------------------------------------- records


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = RECORD | {"prompt": {"template": "« é » 👩 {article}\n"}}
    write_json(tmp_path / RUN_CONFIG, record)
    assert read_run_config(str(tmp_path)) == record
    assert "« é » 👩" in (tmp_path / RUN_CONFIG).read_text(encoding="utf-8")


def test_complaints_about_a_record(tmp_path):
    folder, file = str(tmp_path), tmp_path / RUN_CONFIG
    assert refusal(read_run_config, folder) == (
        f"{folder}: no run_config.json in it; give the output folder of train.py"
    )
    file.write_text('{"kind": ')
    assert refusal(read_run_config, folder) == (
        f"{file}: not valid JSON (Expecting value: line 1 column 10 (char 9)); restore the file"
    )
    file.write_bytes(b'{"kind": "\xe9"}')
    assert refusal(read_run_config, folder).startswith(f"{file}: not valid JSON ('utf-8' codec ")
    for other in ("[]", '"kind arguments prompt"', "{}", '{"kind": "adapter", "arguments": {}}'):
        file.write_text(other)
        assert refusal(read_run_config, folder) == (
            f"{file}: not the record of a run; give a folder that train.py or merge.py made"
        )


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": 2, "b": object()})
    seen = []
    replace = os.replace

    flushed = []
    monkeypatch.setattr(run_folder, "flush", flushed.append)

    def watched(source, target):
        assert flushed == [source]  # else a crash of the machine can leave neither
        seen.append((json.loads(Path(source).read_text()), json.loads(Path(target).read_text())))
        raise OSError("the machine stops here")

    monkeypatch.setattr(os, "replace", watched)
    with pytest.raises(OSError, match="stops here"):
        write_json(file, {"a": 3})
    assert seen == [({"a": 3}, {"a": 1})]  # whole under another name, and only then renamed
    assert json.loads(file.read_text()) == {"a": 1}
    monkeypatch.setattr(os, "replace", replace)
    write_json(file, {"a": 4})
    assert [(p.name, json.loads(p.read_text())) for p in tmp_path.iterdir()] == [
        ("a.json", {"a": 4})
    ]


def test_versions_name_what_decides():
    assert versions().keys() >= {"python", "torch", "transformers", "tokenizers", "bitsandbytes"}


def test_metrics_beyond_the_checkpoint_are_dropped_and_half_a_line_too(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").touch()

    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 1')
    write_run(tmp_path, RECORD, Tokenizer(), {"completed_steps": 2, "evaluated_steps": 0})
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
    assert {p.name for p in tmp_path.iterdir()} == {RUN_CONFIG, "metrics.jsonl", "tokenizer.json"}
    write_run(tmp_path, RECORD, Tokenizer(), {"completed_steps": 0, "evaluated_steps": 0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_titles_reach_each_kind_of_tracker_as_it_shows_them():
    logged = []

    class Tracker:
        def __init__(self, name):
            self.name = name

        def log(self, values, step):
            logged.append((self.name, values, step))

        def log_table(self, name, columns, data, step):
            logged.append((self.name, {name: [columns, *data]}, step))

    accelerator = SimpleNamespace(trackers=[Tracker("tensorboard"), Tracker("wandb")])
    log_titles(accelerator, [("un | <b>", "deux\x1b[2J")], 7)
    table = "| written | true |\n| -- | -- |\n| un &#124; &lt;b&gt; | deux\\x1b[2J |"
    rows = [["written", "true"], ["un | <b>", "deux\\x1b[2J"]]
    assert logged == [
        ("tensorboard", {"eval_titles": table}, 7),
        ("wandb", {"eval_titles": rows}, 7),
    ]


def test_metrics_are_read_as_far_as_they_can_be(tmp_path):
    assert read_metrics(str(tmp_path)) == []
    good = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}, {"step": 2, "eval_loss": 1}]
    good.append({"step": 123_456, "tokens": 98_765_432_109, "loss": -0.5})
    bad = ['{"step": "1"}', '{"loss": 1}', "[1]", "{", "[" * 100_000, '{"step": true}', "\x00"]
    lines = [
        *map(json.dumps, good),
        *bad,
        '{"step": 3, "loss": 1e999, "x": NaN, "y": {}, "z": "a"}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    last = {"step": 3} | dict.fromkeys(("loss", "x", "y", "z"))
    assert read_metrics(str(tmp_path)) == [*good, last]


# ---------------------------------------------------------------------- fingerprints


@pytest.fixture
def big_model(tmp_path):
    """A folder with two weight files, of more than the two megabytes that are read of each."""
    (tmp_path / "config.json").write_text('{"hidden_size": 1}')
    for number in (1, 2):
        data = bytes([number]) * (3 * SAMPLED_BYTES)
        (tmp_path / f"model-{number}.safetensors").write_bytes(data)
    index = {"weight_map": {f"tensor{n}": f"model-{n}.safetensors" for n in (1, 2)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def change_byte(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0xFF
    file.write_bytes(data)


def test_the_fingerprint_is_the_same_for_a_copy(big_model, tmp_path_factory):
    before = model_fingerprint(big_model)
    assert before == model_fingerprint(big_model)
    assert len(before) == 16
    copied = tmp_path_factory.mktemp("copies") / "copy"
    shutil.copytree(big_model, copied)
    (copied / "README.md").write_text("other files do not matter")
    (copied / "consolidated.safetensors").write_text("nor do copies in another format")
    assert model_fingerprint(copied) == before


def test_one_file_counts_beside_an_index_of_shards_as_it_does_for_transformers(
    tiny_model, big_model
):
    """An index stays where a sharded model was saved over by a small one."""
    shutil.copy(tiny_model / "model.safetensors", big_model)
    assert [file.name for file in weight_files(big_model)] == ["model.safetensors"]
    for file in big_model.glob("model-*.safetensors"):
        file.unlink()
    shutil.copy(tiny_model / "config.json", big_model)
    AutoModelForCausalLM.from_pretrained(big_model)  # which would miss the shards


@pytest.mark.parametrize("file", ["model-1.safetensors", "model-2.safetensors"])
@pytest.mark.parametrize("position", [0, SAMPLED_BYTES - 1, -SAMPLED_BYTES, -1])
def test_the_fingerprint_changes_with_a_byte_in_the_first_or_last_megabyte(
    big_model, file, position
):
    before = model_fingerprint(big_model)
    change_byte(big_model / file, position)
    assert model_fingerprint(big_model) != before
    change_byte(big_model / file, position)
    assert model_fingerprint(big_model) == before


@pytest.mark.parametrize("position", [0, 100, 500, -1])
def test_the_fingerprint_covers_all_of_a_small_file(small_model, position):
    before = model_fingerprint(small_model)
    change_byte(small_model / "model.safetensors", position)
    assert model_fingerprint(small_model) != before


def test_the_fingerprint_changes_with_config_size_and_names(big_model):
    found = [model_fingerprint(big_model)]
    (big_model / "config.json").write_text('{"hidden_size": 2}')
    found.append(model_fingerprint(big_model))
    file = big_model / "model-2.safetensors"
    file.write_bytes(file.read_bytes() + b"\2")  # the megabytes that are read are the same
    found.append(model_fingerprint(big_model))
    file.rename(big_model / "model-3.safetensors")
    found.append(model_fingerprint(big_model))
    (big_model / "model-1.safetensors").unlink()
    found.append(model_fingerprint(big_model))
    assert len(set(found)) == 5


def test_the_hash_of_a_file_is_of_all_of_it(big_model):
    file = big_model / "model-1.safetensors"
    before = file_sha256(file)
    change_byte(file, 3 * SAMPLED_BYTES // 2)
    assert file_sha256(file) != before
    assert len(before) == 64


def test_the_hash_of_a_tokenizer_is_of_all_that_decides_what_ids_and_ends_there_are(tmp_path):
    folder, base = tmp_path / "run", tmp_path / "base"
    folder.mkdir()
    base.mkdir()
    names = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
    names += ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
    names += ["vocab.txt", "spiece.model", "sentencepiece.bpe.model"]
    found = [tokenizer_sha256(folder, base)]
    for file in [*(folder / name for name in names), base / "generation_config.json"]:
        for content in ("a", "b"):
            file.write_text(content)
            found.append(tokenizer_sha256(folder, base))
    assert len(set(found)) == 2 * len(names) + 3
    for name in ("generation_config.json", "run_config.json"):  # these decide nothing here
        (folder / name).write_text("a")
    assert tokenizer_sha256(folder, base) == found[-1]


def test_others_may_read_a_file_as_the_umask_says_which_stays_as_it_is(tmp_path):
    file = tmp_path / "a.safetensors"
    file.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        share(file)
        after = os.umask(before)
    finally:
        os.umask(before)
    assert (after, stat.S_IMODE(file.stat().st_mode)) == (0o027, 0o640)


def test_an_evaluation_that_will_come_again_is_dropped_from_the_metrics(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            pass

    rows = [{"step": 1}, {"step": 2}, {"step": 2, "eval_loss": 1.0}, "damaged", {"loss": 1.0}]
    lines = [json.dumps(row) + "\n" for row in rows]
    for evaluated, kept in ((2, lines[:3]), (0, lines[:2])):
        (tmp_path / "metrics.jsonl").write_text("".join([*lines, "no JSON\n"]))
        state = {"completed_steps": 2, "evaluated_steps": evaluated}
        write_run(tmp_path, RECORD, Tokenizer(), state)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(kept)


def test_what_is_no_number_is_null_in_the_metrics(tmp_path):
    class Accelerator:
        is_main_process = True
        log = staticmethod(lambda metrics, step: None)

    row = {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "skipped": True}
    log_metrics(Accelerator, tmp_path, row)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": null, "grad_norm": null, "skipped": true}\n'
    )


# ---------------------------------------------------------------------- one run at a time


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    lock = tmp_path / "a/b/.lock"
    with locked(lock, "a/b"):
        holder = lock.read_text()
        assert str(os.getpid()) in holder
        refused = (
            f"a/b: another run is writing there ({holder.strip()}); wait for it, or write elsewhere"
        )
        with pytest.raises(UserError) as error, locked(lock, "a/b"):
            pass
        assert str(error.value) == refused
        assert lock.exists()  # the first still has it
        (lock.parent / "result").touch()
    assert [path.name for path in lock.parent.iterdir()] == ["result"]
    with locked(lock, "a/b"):
        pass


def test_a_lock_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "a/b/.lock", "a/b"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_lock_is_removed_before_it_is_let_go_of(tmp_path, monkeypatch):
    """Else a second run might take it in between, and a third would find no lock to wait for."""
    lock, close, seen = tmp_path / ".lock", os.close, []
    lock.write_text("process 123456789 on a machine of a very long name, which was killed\n")

    def look(descriptor):
        seen.append(lock.exists())
        close(descriptor)

    with locked(lock, "x"):
        assert lock.read_text() == f"process {os.getpid()} on {platform.node()}\n"
        monkeypatch.setattr(os, "close", look)
    monkeypatch.undo()
    assert seen == [False]


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    code = "import os; from pathlib import Path; from run_folder import locked\n"
    code += f"with locked(Path({str(tmp_path / '.lock')!r}), 'x'): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS).returncode == -9
    assert (tmp_path / ".lock").exists()
    check_output_dir(str(tmp_path))  # counts as empty
    with locked(tmp_path / ".lock", "x"):
        pass


def test_a_lock_that_was_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    """Its holder ends between our opening of the file and our lock on it."""
    import fcntl

    lock, flock, calls = tmp_path / ".lock", fcntl.flock, []

    def once_too_late(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            lock.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", once_too_late)
    with locked(lock, "x"):
        assert len(calls) == 2
        assert lock.exists()


def test_a_lock_is_no_way_to_another_file(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / ".lock", "x"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_only_the_first_process_locks(tmp_path, monkeypatch):
    with locked(tmp_path / ".lock", "x"):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path / ".lock", "x"):
            pass


def test_without_locks_the_run_goes_on_with_a_note(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / ".lock", "x"):
        pass
    assert capsys.readouterr().out == (
        f"NOTE: no lock on {tmp_path / '.lock'} (No locks available); do not start a second run "
        "there\n"
    )
