"""Stopping when asked: nothing is lost, and what goes on ends with the same bytes.

python -m pytest tests/test_stopping.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import SCRIPTS, call, french_rows, train_args, write_csv
from test_infer import args_for
from test_train import metrics, updates

import checkpoints
import infer
import train
from exit_codes import STOPPED, UserError
from prompting import Prompt
from stopping import SIGNALS, StopRequest


def ask_at(monkeypatch, module, name, number, how):
    """Call `how` inside the given call of a function, counted from 1."""
    original, calls = getattr(module, name), []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            how()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, function)


def assert_same_ending(run_dir, whole):
    """The adapter byte for byte, and each row of the metrics once."""
    name = "adapter_model.safetensors"
    assert (run_dir / name).read_bytes() == (whole / name).read_bytes()
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(folder)]
        for folder in (run_dir, whole)
    ]
    assert rows[0] == rows[1]
    for run in (run_dir, whole):
        assert not list(run.rglob("*.tmp"))
        assert not (run / ".lock").exists()


# ---------------------------------------------------------------------- train


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_after_the_update_with_a_checkpoint(
    number, trained, tiny_model, news, tmp_path, monkeypatch, capsys
):
    """With dropout, in the middle of an update in the middle of an epoch."""
    run_dir, before = tmp_path / "run", signal.getsignal(number)
    args = train_args(tiny_model, news, run_dir, "--resume_from_checkpoint", "latest")
    ask_at(monkeypatch, train, "title_loss", 3, lambda: os.kill(os.getpid(), number))
    assert call(train.main, *args) == STOPPED
    assert signal.getsignal(number) == before
    assert [row["step"] for row in updates(run_dir)] == [1, 2]
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run_dir / "adapter_model.safetensors").exists()
    by = signal.Signals(number).name
    printed = capsys.readouterr().out
    assert f"stopped by {by} after update 2 of 6, with a checkpoint; " in printed
    monkeypatch.undo()
    assert call(train.main, *args) is None
    assert_same_ending(run_dir, trained)


@pytest.mark.parametrize("number", [7, 8])  # of 6 calls in 3 updates, and then the evaluation
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(
    number, trained, tiny_model, news, tmp_path, monkeypatch
):
    run_dir = tmp_path / "run"
    args = train_args(tiny_model, news, run_dir, "--resume_from_checkpoint", "latest")
    ask_at(monkeypatch, train, "title_loss", number, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert call(train.main, *args) == STOPPED
    assert len(metrics(run_dir)) == len(updates(run_dir)) == 3
    monkeypatch.undo()
    assert call(train.main, *args) is None
    assert_same_ending(run_dir, trained)


def test_a_signal_while_titles_are_written_stops_after_their_batch(
    trained, tiny_model, news, tmp_path, monkeypatch
):
    """In the last evaluation, after which nothing but the adapter is left to save."""
    run_dir = tmp_path / "run"
    args = train_args(tiny_model, news, run_dir, "--resume_from_checkpoint", "latest")
    ask_at(monkeypatch, infer, "generate_batch", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert call(train.main, *args) == STOPPED
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3, 3, 4, 5, 6]
    monkeypatch.undo()
    assert call(train.main, *args) is None
    assert_same_ending(run_dir, trained)


def test_each_start_gets_on_however_short_its_time(trained, tiny_model, news, tmp_path):
    run_dir = tmp_path / "run"
    args = train_args(tiny_model, news, run_dir, "--resume_from_checkpoint", "latest")
    for step in (1, 2, 3, 4, 5, 6):  # of 3 an epoch: the fourth start catches up on an evaluation
        assert call(train.main, *args, "--max_time", "0.0001") == STOPPED
        assert len(updates(run_dir)) == step
    assert call(train.main, *args, "--max_time", "0.0001") is None
    assert_same_ending(run_dir, trained)


def test_the_launchers_file_stops_too(tiny_model, news, tmp_path, monkeypatch):
    monkeypatch.setenv("STOP_FILE", str(tmp_path / "stop"))
    ask_at(monkeypatch, train, "title_loss", 1, (tmp_path / "stop").touch)
    assert call(train.main, *train_args(tiny_model, news, tmp_path / "run")) == STOPPED
    assert len(updates(tmp_path / "run")) == 1


def test_a_second_run_on_the_folder_is_refused_while_the_first_goes_on(
    run_script, tiny_model, news, tmp_path, monkeypatch
):
    run_dir, second = tmp_path / "run", []
    args = train_args(tiny_model, news, run_dir, "--resume_from_checkpoint", "latest")

    def start_another():
        second.append(run_script("train.py", *args, code=2))

    ask_at(monkeypatch, train, "title_loss", 3, start_another)
    assert call(train.main, *args, "--max_train_steps", "2") is None
    assert second[0].stderr.startswith(
        f"error: {run_dir}: another run is writing there (process {os.getpid()} on "
    )
    assert second[0].stderr.count("\n") == 1
    assert len(updates(run_dir)) == 2


def test_a_run_that_came_and_went_while_this_one_checked_its_input_is_seen(
    tiny_model, news, tmp_path, monkeypatch
):
    run_dir = tmp_path / "run"
    checkpoint = run_dir / "checkpoints/step-000001"
    ask_at(monkeypatch, train, "report_rows", 1, lambda: checkpoint.mkdir(parents=True))
    with pytest.raises(UserError, match="the folder is not empty"):
        call(train.main, *train_args(tiny_model, news, run_dir))
    assert checkpoint.exists()
    assert not (run_dir / ".lock").exists()


def test_a_long_evaluation_is_not_read_through_when_it_is_to_stop(
    trained, tiny_model, news, tmp_path, monkeypatch
):
    """Its rows are tokenized 64 at a time."""
    write_csv(tmp_path / "long.csv", french_rows(500))
    args = train_args(tiny_model, news, tmp_path / "run", "--num_train_epochs", "1")
    args[args.index("--validation_file") + 1] = str(tmp_path / "long.csv")
    read = []

    def ask():
        os.kill(os.getpid(), signal.SIGTERM)
        original = Prompt.encode_all
        monkeypatch.setattr(Prompt, "encode_all", lambda *a: read.extend(a[1]) or original(*a))

    ask_at(monkeypatch, train, "title_loss", 7, ask)  # 6 in 3 updates, and then the evaluation
    assert call(train.main, *args) == STOPPED
    assert len(read) <= 3  # those whose titles are compared


def test_the_step_of_a_finished_adapter_is_known_while_its_run_goes_on(
    trained, tiny_model, news, tmp_path, monkeypatch
):
    """run_train.sh again on a finished run, killed before its end: merge.py needs the number."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    args = train_args(tiny_model, news, run_dir, "--resume_from_checkpoint", "latest")
    monkeypatch.setattr(checkpoints, "save_adapter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(train.main, *args)
    step = json.loads((trained / "run_config.json").read_text())["adapter_step"]
    assert json.loads((run_dir / "run_config.json").read_text())["adapter_step"] == step


# ---------------------------------------------------------------------- infer


@pytest.fixture(scope="module")
def in_batches(trained, news, tmp_path_factory):
    """The uninterrupted predictions, a few articles a batch."""
    output_file = tmp_path_factory.mktemp("whole") / "out.csv"
    call(infer.main, "--run_dir", trained, *args_for(news, output_file, *SMALL))
    return output_file


SMALL = ("--max_batch_tokens", "400")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_infer_after_the_batch(
    number, in_batches, trained, news, tmp_path, monkeypatch, capsys
):
    output_file = tmp_path / "out.csv"
    args = ("--run_dir", trained, *args_for(news, output_file, *SMALL))
    ask_at(monkeypatch, infer, "generate_batch", 2, lambda: os.kill(os.getpid(), number))
    assert call(infer.main, *args) == STOPPED
    assert [path.name for path in tmp_path.iterdir()] == ["out.part-0.jsonl"]
    done = len((tmp_path / "out.part-0.jsonl").read_text().splitlines()) - 1
    assert 1 < done < 9
    by = signal.Signals(number).name
    printed = capsys.readouterr().out
    assert f"stopped by {by} after {done} of 9 titles; the same command goes on" in printed
    monkeypatch.undo()
    assert call(infer.main, *args) is None
    assert f"NOTE: going on after {done} titles" in capsys.readouterr().out
    for suffix in (".csv", ".jsonl"):
        whole = in_batches.with_suffix(suffix)
        assert output_file.with_suffix(suffix).read_bytes() == whole.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_infer_gets_on_with_each_start_too(in_batches, trained, news, tmp_path):
    output_file = tmp_path / "out.csv"
    args = ("--run_dir", trained, *args_for(news, output_file, *SMALL))
    lines = []
    while call(infer.main, *args, "--max_time", "0.0001") == STOPPED:
        lines.append(len((tmp_path / "out.part-0.jsonl").read_text().splitlines()))
        assert len(lines) == len(set(lines)) < 10
    assert len(lines) > 2
    assert output_file.read_bytes() == in_batches.read_bytes()


def test_a_batch_that_was_half_written_is_written_again_in_the_same_company(
    in_batches, trained, news, tmp_path, monkeypatch
):
    """Under bf16 a title may depend on the padding of its batch, so batches never change."""
    output_file = tmp_path / "out.csv"
    args = ("--run_dir", trained, *args_for(news, output_file, *SMALL))
    batches = []
    ask_at(monkeypatch, infer, "generate_batch", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    call(infer.main, *args)
    part = tmp_path / "out.part-0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:-1]) + lines[-1][:-5])  # killed in the second batch
    monkeypatch.undo()
    original = infer.generate_batch

    def spy(model, prompt, prompts, limit):
        batches.append(len(prompts))
        return original(model, prompt, prompts, limit)

    monkeypatch.setattr(infer, "generate_batch", spy)
    call(infer.main, *args)
    assert batches[0] > 1  # though one title was missing
    for suffix in (".csv", ".jsonl"):
        whole = in_batches.with_suffix(suffix)
        assert output_file.with_suffix(suffix).read_bytes() == whole.read_bytes()


def test_a_second_infer_on_the_same_file_is_refused(
    run_script, trained, news, tmp_path, monkeypatch
):
    args = ("--run_dir", trained, *args_for(news, tmp_path / "out.csv"))
    second = []
    ask_at(
        monkeypatch,
        infer,
        "generate_batch",
        1,
        lambda: second.append(run_script("infer.py", *args, code=2)),
    )
    assert call(infer.main, *args) is None
    assert second[0].stderr.startswith(
        f"error: {tmp_path / 'out.csv'}: another run is writing there (process {os.getpid()} on "
    )


def test_an_infer_that_ended_while_this_one_checked_its_input_is_seen(
    in_batches, trained, news, tmp_path, monkeypatch
):
    def finish(of):
        for suffix in (".csv", ".jsonl"):
            shutil.copy(of.with_suffix(suffix), tmp_path / f"out{suffix}")

    args = ("--run_dir", trained, *args_for(news, tmp_path / "out.csv"), "--max_new_tokens", "5")
    ask_at(monkeypatch, infer, "check_devices", 1, lambda: finish(in_batches))
    with pytest.raises(UserError, match="there are predictions of other settings already"):
        call(infer.main, *args)
    assert (tmp_path / "out.csv").read_bytes() == in_batches.read_bytes()
    monkeypatch.setattr(infer, "is_complete", lambda *_: len(looks) > 0 or looks.append(1))
    looks = []
    monkeypatch.setattr(infer, "infer", lambda *_: 1 / 0)
    assert call(infer.main, *args) is None


def test_an_infer_that_was_killed_before_it_removed_its_parts_does_so_later(
    in_batches, trained, news, tmp_path
):
    for suffix in (".csv", ".jsonl"):
        shutil.copy(in_batches.with_suffix(suffix), tmp_path / f"out{suffix}")
    (tmp_path / "out.part-0.jsonl").touch()
    args = ("--run_dir", trained, *args_for(news, tmp_path / "out.csv", *SMALL))
    assert call(infer.main, *args) is None
    assert {path.name for path in tmp_path.iterdir()} == {"out.csv", "out.jsonl"}


# ---------------------------------------------------------------------- the request itself

LOOP = """
import os, sys, time
import stopping
from stopping import StopRequest
stopping.TOGETHER = float(os.environ.get("TOGETHER", 0))
with StopRequest(None) as stop:
    stop.listen()
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if stop.asked():
            print(stop.reason(), flush=True)
            if "leave" in sys.argv:
                break
"""


def start_loop(*argv, **env):
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *argv],
        cwd=SCRIPTS,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number):
    process = start_loop()
    process.send_signal(number)
    assert process.stdout.readline() == f"{signal.Signals(number).name}\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_signals_that_come_together_are_one_request():
    """Ctrl-C reaches a worker of torchrun from the terminal and from torchrun."""
    process = start_loop("leave", TOGETHER="3600")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert printed in ("SIGINT\n", "SIGTERM\n")


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tiny_model, news, tmp_path):
    """`bash run_train.sh | head`, or a `tee` that Ctrl-C ended: it has an adapter to save."""
    args = train_args(tiny_model, news, tmp_path / "run", "--num_train_epochs", "1")
    command = [sys.executable, str(SCRIPTS / "train.py"), *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("articles "):
            break
    process.stdout.close()
    assert process.wait(timeout=240) == 0
    assert len(updates(tmp_path / "run")) == 3
    assert (tmp_path / "run/adapter_model.safetensors").exists()


def test_the_launchers_file_is_no_first_signal(tmp_path):
    """A scheduler signals the launcher and the script at once: that is one request, not two."""
    file = tmp_path / "stop"
    process = start_loop(STOP_FILE=str(file))
    file.touch()
    assert process.stdout.readline() == "the launcher\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline().startswith("stopping as soon as")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_a_process_that_is_signalled_alone_tells_the_others(tmp_path):
    """The others may be in an evaluation, at whose end alone they hear of each other."""
    signalled, other = (start_loop("leave", STOP_FILE=str(tmp_path / "stop")) for _ in range(2))
    signalled.send_signal(signal.SIGUSR1)
    assert other.communicate(timeout=30)[0] == "another process\n"
    assert signalled.communicate(timeout=30)[0] == "SIGUSR1\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_ignoring_signals_is_not_inherited_from_the_launcher(number):
    code = "import time; from stopping import StopRequest\n"
    code += "with StopRequest(None):\n    print('ready', flush=True); time.sleep(60)"
    ignore = f"trap '' {signal.Signals(number).name[3:]}; exec \"$@\""
    command = ["sh", "-c", ignore, "-", sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=SCRIPTS, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == -number


def test_a_signal_is_taken_where_nobody_reads_what_is_said_of_it():
    """Ctrl-C in a terminal ends a `tee` too."""
    process = start_loop("leave")
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
def test_the_first_process_says_what_will_happen(rank, said):
    process = start_loop("leave", RANK=rank)
    process.send_signal(signal.SIGUSR1)
    printed, complained = process.communicate(timeout=30)
    assert (process.returncode, printed) == (0, "SIGUSR1\n")
    message = "\nstopping as soon as nothing is half done; once more to stop at once\n"
    assert complained == (message if said else "")


def test_time_alone_asks_and_is_no_first_signal():
    with StopRequest(1e-9) as stop:
        stop.listen()
        time.sleep(0.001)
        assert stop.reason() == "--max_time 1e-09"
        os.kill(os.getpid(), signal.SIGUSR1)  # would end this process if it was the second
        assert stop.reason() == "SIGUSR1"
    with StopRequest(1) as stop:
        assert not stop.asked()
    with StopRequest(None) as stop:
        assert not stop.asked()
