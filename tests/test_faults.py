"""Full disks or memory, read-only folders, infinite gradients: a clear line, and nothing lost.

python -m pytest tests/test_faults.py
"""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from conftest import SCRIPTS, call, train_args
from test_infer import args_for
from test_train import updates

import infer
import train
from exit_codes import UserError


def run_with_file_limit(limit, script, *argv):
    """Run a script that can let no file grow beyond so many bytes, as on a disk that fills up."""
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, argv)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def last_line(text):
    return text.rstrip("\n").rpartition("\n")[2]


# ---------------------------------------------------------------------- disks


def test_a_disk_that_fills_up_in_a_checkpoint_stops_with_the_one_before(
    trained, tiny_model, news, tmp_path
):
    run_dir = tmp_path / "run"
    args = train_args(tiny_model, news, run_dir, "--resume_from_checkpoint", "latest")
    ask = ("--max_time", "0.0001")
    assert call(train.main, *args, *ask) == 75
    before = {p: p.read_bytes() for p in (run_dir / "checkpoints/step-000001").iterdir()}
    size = (run_dir / "checkpoints/step-000001/optimizer.safetensors").stat().st_size
    result = run_with_file_limit(size - 1, "train.py", *args)
    assert result.returncode == 2
    file = run_dir / "checkpoints/step-000003.tmp/optimizer.safetensors"
    assert re.fullmatch(
        rf"error: {re.escape(str(file))}: cannot be written \(Error while serializing: I/O error: "
        r"File too large \(os error 27\): 65,536 bytes needed, [\d,]+ free\); mend that and run "
        "the same command again",
        last_line(result.stderr),
    )
    assert "Traceback" not in result.stderr
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-000001"]
    assert {p: p.read_bytes() for p in before} == before
    assert call(train.main, *args) is None  # there is room again
    name = "adapter_model.safetensors"
    assert (run_dir / name).read_bytes() == (trained / name).read_bytes()


def test_a_disk_that_fills_up_with_predictions_keeps_what_is_done(
    tiny_model, news, tmp_path, capsys
):
    """The untuned model does not stop: its titles outgrow the articles, whose copy must fit."""
    small = ("--max_new_tokens", "200", "--max_batch_tokens", "800")
    output_file = tmp_path / "out.csv"
    whole = tmp_path / "whole/out.csv"
    whole.parent.mkdir()
    call(infer.main, "--model_name_or_path", tiny_model, *args_for(news, whole, *small))
    size = whole.with_suffix(".jsonl").stat().st_size
    args = ("--model_name_or_path", tiny_model, *args_for(news, output_file, *small))
    result = run_with_file_limit(size * 2 // 3, "infer.py", *args)
    assert result.returncode == 2
    part = tmp_path / "out.part-0.jsonl"
    assert re.fullmatch(
        rf"error: {re.escape(str(part))}: cannot be written \(File too large: [\d,]+ bytes needed, "
        r"[\d,]+ free\); mend that and run the same command again",
        last_line(result.stderr),
    )
    assert "Traceback" not in result.stderr
    lines = part.read_bytes().split(b"\n")
    assert 2 < len(lines) < 10
    assert not output_file.exists()
    capsys.readouterr()
    call(infer.main, *args)
    assert f"going on after {len(lines) - 2} titles" in capsys.readouterr().out
    for suffix in (".csv", ".jsonl"):
        complete = whole.with_suffix(suffix).read_bytes()
        assert output_file.with_suffix(suffix).read_bytes() == complete


def test_a_disk_that_fills_up_at_the_end_keeps_the_parts(trained, news, tmp_path):
    """All titles are there, but there is no room to join them."""
    whole, output_file = tmp_path / "whole/out.csv", tmp_path / "out.csv"
    whole.parent.mkdir()
    call(infer.main, "--run_dir", trained, *args_for(news, whole))
    header, *rows = whole.with_suffix(".jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    part = tmp_path / "out.part-0.jsonl"
    padded = [
        json.dumps({"index": n} | json.loads(row) | {"raw": "x" * 900})
        for n, row in enumerate(rows)
    ]
    part.write_text("\n".join([header, *padded]) + "\n", encoding="utf-8")
    before = part.read_bytes()
    result = run_with_file_limit(
        5000, "infer.py", "--run_dir", trained, *args_for(news, output_file)
    )
    assert result.returncode == 2
    assert last_line(result.stderr).startswith(
        f"error: {output_file}: cannot be written (File too large: {2 * len(before):,} bytes needed"
    )
    assert part.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [part.name]
    call(infer.main, "--run_dir", trained, *args_for(news, output_file))
    assert output_file.read_bytes() == whole.read_bytes()


def mount(kind, folder, options=""):
    """Mount a file system in a mount namespace of one's own; only root can, in some containers."""
    return f"mount -t {kind} {options} {kind} {folder}"


def run_mounted(commands, script, *argv, **env):
    command = [sys.executable, str(SCRIPTS / script), *map(str, argv)]
    inside = " && ".join([*commands, 'exec "$@"'])
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, "-", *command],
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


def test_a_full_file_system(tiny_model, news, tmp_path):
    """A small tmpfs: not a limit of the process, but a disk with no room left."""
    folder = tmp_path / "small"
    folder.mkdir()
    args = train_args(tiny_model, news, folder / "run", "--lora_r", "16")
    result = run_mounted([mount("tmpfs", folder, "-o size=300k")], "train.py", *args)
    assert result.returncode == 2
    assert re.search(
        r"cannot be written \(.*No space left on device.*: [\d,]+ bytes needed, [\d,]+ free\); "
        "mend that and run the same command again$",
        last_line(result.stderr),
    )
    assert "Traceback" not in result.stderr


def test_a_read_only_folder(run_script, trained, tiny_model, news, tmp_path):
    folder = tmp_path / "mounted"
    folder.mkdir()
    read_only = [mount("tmpfs", folder), f"mount -o remount,ro {folder}"]
    result = run_mounted(read_only, "train.py", *train_args(tiny_model, news, folder / "run"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {folder / 'run'}: {folder} cannot be written; give another --output_dir\n"
    )
    args = ("--run_dir", trained, *args_for(news, folder / "out.csv"))
    result = run_mounted(read_only, "infer.py", *args)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {folder / 'out.lock'}: cannot be written (Read-only file system); mend that and "
        "run the same command again\n"
    )


def test_a_full_shared_memory_does_not_matter(tiny_model, news, tmp_path):
    """Nothing here is kept in /dev/shm: there are no loader processes."""
    fill = [mount("tmpfs", "/dev/shm", "-o size=4k"), "head -c 4096 /dev/zero > /dev/shm/full"]
    args = train_args(tiny_model, news, tmp_path / "run", "--max_train_steps", "1")
    result = run_mounted(fill, "train.py", *args)
    assert result.returncode == 0, result.stderr
    assert "done:" in result.stdout


def test_a_full_temporary_folder(tiny_model, news, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    full = [mount("tmpfs", folder, "-o size=8k"), f"head -c 4096 /dev/zero > {folder}/some"]
    args = train_args(tiny_model, news, tmp_path / "run")
    result = run_mounted(full, "train.py", *args, TMPDIR=str(folder))
    assert result.returncode == 2
    assert last_line(result.stderr).startswith(f"error: {folder}: no room for a copy of ")


# ---------------------------------------------------------------------- not finite


@pytest.fixture
def losses_from(monkeypatch):
    """Return a function that makes losses infinite from a given update (of two batches) on."""
    original = train.title_loss

    def spoil(first, last=10**9, how=lambda loss: loss * float("inf")):
        calls = []

        def title_loss(model, batch):
            loss = original(model, batch)
            if model.training:
                calls.append(1)
            return how(loss) if model.training and first <= (len(calls) + 1) // 2 <= last else loss

        monkeypatch.setattr(train, "title_loss", title_loss)

    return spoil


MORE = ("--num_train_epochs", "4")  # 12 updates


def test_five_in_a_row_end_the_run_with_the_last_good_state(
    losses_from, tiny_model, news, tmp_path, capsys
):
    """Over the end of an epoch, whose checkpoint is of after the last good update."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    call(train.main, *train_args(tiny_model, news, whole, *MORE))
    args = train_args(tiny_model, news, run_dir, *MORE)
    losses_from(5)
    with pytest.raises(UserError) as error:
        call(train.main, *args)
    checkpoint = run_dir / "checkpoints/step-000004"
    assert str(error.value) == (
        f"{run_dir}: the loss or gradient of updates 5 to 9 is not finite; lower --learning_rate, "
        f"or look at these articles; {checkpoint} is as before, for --resume_anyway"
    )
    assert [row["skipped"] for row in updates(run_dir)] == [False] * 4 + [True] * 5
    found = {p.name for p in (run_dir / "checkpoints").iterdir()}
    assert found == {"step-000003", "step-000004", "step-000006.aside"}
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["completed_steps"], state["skipped_steps"]) == (4, 0)
    losses_from(10**9)
    call(train.main, *args, "--resume_from_checkpoint", "latest")
    assert "resuming from " + str(checkpoint) in capsys.readouterr().out
    name = "adapter_model.safetensors"
    assert (run_dir / name).read_bytes() == (whole / name).read_bytes()
    assert [row["step"] for row in updates(run_dir)] == list(range(1, 13))


def test_four_in_a_row_do_not(losses_from, tiny_model, news, tmp_path, capsys):
    losses_from(5, 8)
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *MORE))
    assert sum(row["skipped"] for row in updates(tmp_path / "run")) == 4
    assert "4 updates skipped, peak memory" in capsys.readouterr().out


def test_those_that_are_not_in_a_row_do_not_count(tiny_model, news, tmp_path, monkeypatch):
    original, calls = train.title_loss, []

    def title_loss(model, batch):
        calls.append(1)
        return original(model, batch) * (float("inf") if len(calls) % 4 == 1 else 1)

    monkeypatch.setattr(train, "title_loss", title_loss)
    args = train_args(tiny_model, news, tmp_path / "run", *MORE)
    del args[args.index("--validation_file") : args.index("--validation_file") + 2]
    call(train.main, *args)
    assert [row["skipped"] for row in updates(tmp_path / "run")] == [True, False] * 6


def test_a_row_of_skipped_updates_goes_on_after_a_stop(losses_from, tiny_model, news, tmp_path):
    args = train_args(tiny_model, news, tmp_path / "run", "--resume_from_checkpoint", "latest")
    del args[args.index("--validation_file") : args.index("--validation_file") + 2]
    losses_from(1)
    for _ in range(4):
        assert call(train.main, *args, "--max_time", "0.0001") == 75
        losses_from(1)
    with pytest.raises(UserError, match="of updates 1 to 5 is not finite; lower --learning_rate, "):
        call(train.main, *args, "--max_time", "0.0001")


def test_a_loss_that_is_not_finite_is_enough(losses_from, tiny_model, news, tmp_path):
    """Where its gradient is: an infinite constant has none."""
    losses_from(2, 2, how=lambda loss: loss + torch.tensor(float("inf")))
    more = ("--max_train_steps", "3")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    rows = updates(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [False, True, False]
    assert rows[1]["loss"] is None
    assert rows[1]["grad_norm"] > 0


# ---------------------------------------------------------------------- full memory


def test_a_memory_that_fills_up_in_an_update_is_one_line(tiny_model, news, tmp_path, monkeypatch):
    original, calls = train.title_loss, []

    def title_loss(model, batch):
        calls.append(1)
        if len(calls) > 2:  # in the second update
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        return original(model, batch)

    monkeypatch.setattr(train, "title_loss", title_loss)
    args = train_args(tiny_model, news, tmp_path / "run")
    with pytest.raises(UserError) as error:
        call(train.main, *args)
    assert str(error.value) == (
        "memory: not enough (CUDA out of memory. Tried to allocate 2.00 GiB.); give "
        "--activation_checkpointing full, or less --per_device_train_batch_size and as much more "
        "--gradient_accumulation_steps; --resume_from_checkpoint latest goes on"
    )
    # As it says, with the same articles in an update.
    monkeypatch.setattr(train, "title_loss", original)
    split = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    more = (*split, "--activation_checkpointing", "full", "--resume_from_checkpoint", "latest")
    assert call(train.main, *args, *more) is None
    assert [row["step"] for row in updates(tmp_path / "run")] == list(range(1, 7))


def test_a_gradient_that_is_not_finite_is_enough(losses_from, tiny_model, news, tmp_path):
    """Where its loss is: the root of 0 has an infinite slope."""
    losses_from(2, 2, how=lambda loss: loss + (loss - loss.detach()).sqrt())
    more = ("--max_train_steps", "3")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    rows = updates(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [False, True, False]
    assert rows[1]["loss"] > 0
    assert rows[1]["grad_norm"] is None


def test_an_evaluation_that_is_not_finite_is_never_the_best(
    tiny_model, news, tmp_path, monkeypatch
):
    """Nor does it keep a later one from being that: nothing is below a NaN."""
    original, calls = train.title_loss, []

    def title_loss(model, batch):
        loss = original(model, batch)
        if model.training:
            calls.append(1)
        first = not model.training and len(calls) == 6  # after the first epoch of two
        return loss * float("nan") if first else loss

    monkeypatch.setattr(train, "title_loss", title_loss)
    call(train.main, *train_args(tiny_model, news, tmp_path / "run"))
    record = json.loads((tmp_path / "run/run_config.json").read_text())
    assert record["adapter_step"] == 6
