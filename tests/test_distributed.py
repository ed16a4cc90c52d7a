"""Two processes do what one does. Run: python -m pytest tests/test_distributed.py

Real processes on this machine, over gloo, as `accelerate launch` starts them with
accelerate_configs/multi_gpu.yaml. (On two nodes: tests/test_nodes.py.)
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCRIPTS, call, read_csv, train_args
from test_families import FAMILIES, save
from test_train import EXACT, adapter, difference, metrics, updates

import infer
import train
from exit_codes import STOPPED


def run_on(processes: int, script: str, *argv) -> str:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs/multi_gpu.yaml")]
    command += ["--num_processes", str(processes), str(SCRIPTS / script), *map(str, argv)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        timeout=300,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def runs(tiny_model, rows_17, tmp_path_factory):
    """The same training by one process and by two, and what the latter printed.

    The rate rises and falls, and the two compute their layers again in the backward pass.
    """
    folder = tmp_path_factory.mktemp("processes")
    for processes, batch, layers in ((1, 4, "none"), (2, 2, "full")):
        more = (*EXACT, "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", 2)
        more += ("--warmup_ratio", 0.5, "--cooldown_ratio", 0.3)
        more += ("--activation_checkpointing", layers)
        args = train_args(tiny_model, rows_17, folder / str(processes), *more)
        if processes == 1:
            call(train.main, *args)
        else:
            printed = run_on(processes, "train.py", *args)
    return folder, printed


def test_two_processes_train_the_same_adapter(runs):
    folder, printed = runs
    assert "2 per device x 2 accumulated x 2 processes" in printed
    assert [row["articles"] for row in updates(folder / "2")] == [8, 8, 1]
    assert [row["learning_rate"] for row in updates(folder / "2")] == [0.005, 0.01, 0.005]
    for one, two in zip(updates(folder / "1"), updates(folder / "2"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        for name in ("learning_rate", "title_tokens", "tokens", "articles"):
            assert two[name] == one[name]
    assert difference(adapter(folder / "2"), adapter(folder / "1")) < 1e-3


def test_two_processes_evaluate_each_row_once(runs):
    folder, printed = runs
    one, two = ([r for r in metrics(folder / n) if "eval_loss" in r] for n in ("1", "2"))
    assert len(one) == len(two) == 1
    assert two[0]["eval_loss"] == pytest.approx(one[0]["eval_loss"], rel=1e-4)
    assert two[0]["eval_rougeL"] == pytest.approx(one[0]["eval_rougeL"], rel=1e-4)
    assert printed.count("written:") == 3


def test_two_processes_write_one_file_with_the_bytes_of_one(runs, rows_17, tmp_path):
    folder, _ = runs
    common = ("--run_dir", folder / "2", "--input_file", rows_17 / "validation.csv")
    common += ("--base_weights", "fp32")
    call(infer.main, *common, "--output_file", tmp_path / "1.csv")
    run_on(2, "infer.py", *common, "--output_file", tmp_path / "2.csv")
    assert (tmp_path / "2.csv").read_bytes() == (tmp_path / "1.csv").read_bytes()
    assert (tmp_path / "2.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    assert [row["ID"] for row in read_csv(tmp_path / "2.csv")] == [f"a{n}" for n in range(7)]
    assert {path.name for path in tmp_path.iterdir()} == {"1.csv", "1.jsonl", "2.csv", "2.jsonl"}


LATE = """
import os, runpy, sys, time
time.sleep({first} if os.environ["RANK"] == "0" else {second})
sys.argv, sys.path[0] = {argv!r}, {scripts!r}
runpy.run_path({argv[0]!r}, run_name="__main__")
"""


@pytest.mark.parametrize(("first", "second"), [(2, 0), (0, 2)])
def test_a_complaint_is_printed_once(tiny_model, rows_17, tmp_path, first, second):
    """Whichever process comes to it first."""
    args = train_args(tiny_model, rows_17, tmp_path / "run", "--train_file", "none.csv")
    argv = [str(SCRIPTS / "train.py"), *map(str, args)]
    late = tmp_path / "late.py"
    late.write_text(LATE.format(first=first, second=second, argv=argv, scripts=str(SCRIPTS)))
    with pytest.raises(AssertionError) as caught:
        run_on(2, late)
    assert str(caught.value).count("error: none.csv: there is no such file; check the path") == 1


PROBE = """
import json, os, sys
sys.path.insert(0, {scripts!r})
import torch, train
import batching, checkpoints
rank, seeds = os.environ["RANK"], []
original, original_save = batching.dropout_seed, train.title_loss

def dropout_seed(*args):
    seeds.append(original(*args))
    return seeds[-1]

def title_loss(model, batch):
    probe["model"] = model
    return original_save(model, batch)

probe = {{}}
batching.dropout_seed, train.title_loss = dropout_seed, title_loss
train.main({argv!r})
lora = {{n.removeprefix("module."): p for n, p in probe["model"].named_parameters() if "lora" in n}}
digest = sum(float(p.double().abs().sum()) for p in lora.values())
with open({out!r} + rank, "w") as stream:
    json.dump({{"seeds": seeds, "digest": digest, "count": len(lora)}}, stream)
os._exit(0)  # at its own end, Python may not get the group of processes down
"""


def test_dropout_differs_between_processes_and_adapters_stay_equal(tiny_model, rows_17, tmp_path):
    more = ("--lora_dropout", "0.5", "--num_train_epochs", "1")
    args = train_args(tiny_model, rows_17, tmp_path / "run", *more)
    del args[args.index("--validation_file") : args.index("--validation_file") + 2]
    script = tmp_path / "probe.py"
    out = str(tmp_path / "rank")
    script.write_text(PROBE.format(scripts=str(SCRIPTS), argv=args, out=out))
    processes = start_two(script)
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert len(ranks[0]["seeds"]) == len(updates(tmp_path / "run")) > 0
    assert not set(ranks[0]["seeds"]) & set(ranks[1]["seeds"])
    assert ranks[0]["count"] == 28
    assert ranks[0]["digest"] == ranks[1]["digest"]


def test_layers_that_no_text_goes_through_hold_nobody_up(rows_17, tmp_path):
    """LoRA on layers of these names is on those of a vision tower too, which get no gradient."""
    model = save(FAMILIES["gemma3, pictures"], tmp_path / "model")

    def args(name, batch):
        more = (*EXACT, "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", 2)
        more += ("--num_eval_titles", 0, "--base_weights", "bf16")
        more += ("--target_modules", "q_proj", "v_proj")
        return train_args(model, rows_17, tmp_path / name, *more)

    processes = start_two("train.py", *args("two", 2))
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    call(train.main, *args("one", 4))
    assert any("vision" in name for name in adapter(tmp_path / "two"))
    assert difference(adapter(tmp_path / "two"), adapter(tmp_path / "one")) < 1e-4


# ---------------------------------------------------------------------- stopping and resuming


def start_two(script, *argv, **env):
    """Start two processes without torchrun, so that each can be signalled by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | env
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / script), *map(str, argv)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for_lines(file, count, processes):
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert all(process.poll() is None for process in processes), [
            process.communicate() for process in processes
        ]
        time.sleep(0.01)


def test_both_stop_after_the_same_update_whichever_is_asked(tiny_model, rows_17, tmp_path):
    """And what two began, one may end: with the same figures up to rounding."""
    two = (*EXACT, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    one = (*EXACT, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    run_dir, latest = tmp_path / "run", ("--resume_from_checkpoint", "latest")
    epochs = ("--num_train_epochs", 5, "--num_eval_titles", 1)
    call(train.main, *train_args(tiny_model, rows_17, tmp_path / "whole", *one, *epochs))
    args = train_args(tiny_model, rows_17, run_dir, *two, *epochs)
    place = args.index("--validation_file")  # an evaluation would tell the other process, too
    processes = start_two("train.py", *args[:place], *args[place + 2 :])
    wait_for_lines(run_dir / "metrics.jsonl", 1, processes)
    processes[1].send_signal(signal.SIGUSR1)
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [STOPPED, STOPPED], printed
    assert "stopped by another process after update" in printed[0][0]
    step = len(updates(run_dir))
    assert 1 <= step < 15
    assert (run_dir / f"checkpoints/step-{step:06d}/state.json").exists()
    latest += ("--resume_anyway",)  # with the validation file
    call(train.main, *train_args(tiny_model, rows_17, run_dir, *one, *epochs, *latest))
    for whole, parted in zip(updates(tmp_path / "whole"), updates(run_dir), strict=True):
        assert parted["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        for name in ("step", "learning_rate", "title_tokens", "tokens", "articles"):
            assert parted[name] == whole[name]
    assert difference(adapter(run_dir), adapter(tmp_path / "whole")) < 1e-2


def check_that_one_process_goes_on(folder, args, common) -> None:
    """It ends what several have begun in out.csv, with the bytes of one that does it all."""
    assert not (folder / "out.csv").exists()
    call(infer.main, *args)
    call(infer.main, *common, "--output_file", folder / "whole.csv")
    for suffix in ("csv", "jsonl"):
        whole = (folder / f"whole.{suffix}").read_bytes()
        assert (folder / f"out.{suffix}").read_bytes() == whole


def test_both_stop_writing_titles_and_one_goes_on_with_the_same_bytes(
    runs, rows_17, tiny_model, tmp_path
):
    stop_file = tmp_path / "stop"
    common = ("--run_dir", runs[0] / "2", "--input_file", rows_17 / "train.csv")
    common += ("--max_batch_tokens", 200)
    args = (*common, "--output_file", tmp_path / "out.csv")
    processes = start_two("infer.py", *args, STOP_FILE=str(stop_file))
    wait_for_lines(tmp_path / "out.part-0.jsonl", 2, processes)
    stop_file.touch()
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [STOPPED, STOPPED], printed
    check_that_one_process_goes_on(tmp_path, args, common)


def test_titles_go_on_after_a_lost_node_with_the_same_bytes(runs, rows_17, tmp_path):
    """Each process as if on a node of its own. The one that is left ends its share first."""
    common = ("--run_dir", runs[0] / "2", "--input_file", rows_17 / "train.csv")
    common += ("--max_batch_tokens", 200)
    args = (*common, "--output_file", tmp_path / "out.csv", "--ddp_timeout", 20)
    first, second = start_two("infer.py", *args, LOCAL_WORLD_SIZE="1", SLURMD_NODENAME="node2")
    wait_for_lines(tmp_path / "out.part-1.jsonl", 2, (first, second))
    second.kill()
    second.communicate()
    printed = first.communicate(timeout=240)
    assert first.returncode == STOPPED, printed
    told = printed[1].splitlines()[-1]
    assert told.endswith(
        ": gone in the middle of the run; the same command goes on after the titles that are there"
    )
    # Whoever is lost within its first seconds has not yet said its name.
    assert told.startswith(("error: node2: ", "error: process 1: "))
    check_that_one_process_goes_on(tmp_path, args, common)


SLOW = """
import os, sys, time
sys.argv[0] = "infer.py"
import exit_codes, infer
original = infer.generate_batch

def generate_batch(*args):
    if os.environ["RANK"] == "1":
        time.sleep(7)
    return original(*args)

infer.generate_batch = generate_batch
exit_codes.run(infer.main)
"""


def test_who_is_done_waits_for_the_slower_one_beyond_the_timeout(runs, rows_17, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(SLOW)
    common = ("--run_dir", runs[0] / "2", "--input_file", rows_17 / "validation.csv")
    common += ("--max_batch_tokens", 400)
    args = (*common, "--output_file", tmp_path / "out.csv", "--ddp_timeout", 10)
    path = f"{SCRIPTS}:{os.environ['PYTHONPATH']}"
    processes = start_two(str(probe), *args, PYTHONPATH=path)
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    call(infer.main, *common, "--output_file", tmp_path / "whole.csv")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


SHORT_SIGHTED = """
import os, sys
sys.argv[0] = "train.py"
import checkpoints, exit_codes, train
original = checkpoints.find_checkpoint

def find_checkpoint(*args):
    found = original(*args)
    return found.with_name("step-000001") if os.environ["RANK"] == "1" else found

checkpoints.find_checkpoint = find_checkpoint
exit_codes.run(train.main)
"""


def test_all_go_on_from_the_checkpoint_that_the_first_process_finds(tiny_model, rows_17, tmp_path):
    """On a disk of several nodes, another may not see it yet."""
    probe, run_dir = tmp_path / "probe.py", tmp_path / "run"
    probe.write_text(SHORT_SIGHTED)
    more = (*EXACT, "--checkpointing_steps", 1, "--save_total_limit", 9, "--num_eval_titles", 1)
    one = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    two = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    call(train.main, *train_args(tiny_model, rows_17, run_dir, *more, *one))
    whole = adapter(run_dir)
    shutil.rmtree(run_dir / "checkpoints/step-000003")
    args = train_args(tiny_model, rows_17, run_dir, *more, *two)
    args += ["--resume_from_checkpoint", "latest"]
    path = f"{SCRIPTS}:{os.environ['PYTHONPATH']}"
    processes = start_two(str(probe), *args, PYTHONPATH=path)
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "resuming from" in printed[0][0]
    assert (run_dir / "checkpoints/step-000003").exists()
    assert difference(adapter(run_dir), whole) < 1e-3


def test_a_complaint_of_the_first_process_ends_all(tiny_model, rows_17, tmp_path):
    """Of a checkpoint that cannot be written, which only the first process writes."""
    run_dir = tmp_path / "run"
    code = "import sys; sys.argv[0] = 'train.py'; import checkpoints, exit_codes, train\n"
    code += "def full(*_): raise OSError(28, 'No space left on device')\n"
    code += "checkpoints.flush, exit_codes.PATIENCE = full, 1.0\nexit_codes.run(train.main)"
    probe = tmp_path / "probe.py"
    probe.write_text(code)
    args = train_args(tiny_model, rows_17, run_dir, "--num_train_epochs", 1)
    processes = start_two(str(probe), *args, PYTHONPATH=f"{SCRIPTS}:{os.environ['PYTHONPATH']}")
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], printed
    errors = [errors for _, errors in printed]
    assert errors[0].endswith(
        f"error: {run_dir / 'checkpoints/step-000002'}: cannot be written (No space left on "
        "device); mend that and run the same command again\n"
    )
    assert "error:" not in errors[1]
    assert not any("Traceback" in text for text in errors)


SPOILED = """
import os, sys
sys.argv[0] = "train.py"
import exit_codes, train
original, calls = train.title_loss, []

def title_loss(model, batch):
    loss = original(model, batch)
    if model.training and os.environ["RANK"] == "1":
        calls.append(1)
        if len(calls) in (1, 2):  # both micro-batches of the first update
            loss = loss * float("inf")
    return loss

train.title_loss = title_loss
exit_codes.run(train.main)
"""


def test_all_skip_an_update_that_is_not_finite_in_one(tiny_model, rows_17, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(SPOILED)
    more = (*EXACT, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2)
    run_dir, path = tmp_path / "run", f"{SCRIPTS}:{os.environ['PYTHONPATH']}"
    args = train_args(tiny_model, rows_17, run_dir, *more)
    processes = start_two(str(probe), *args, PYTHONPATH=path)
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert [row["skipped"] for row in updates(run_dir)] == [True, False, False]
    assert printed[0][0].count("NOTE: update 1 skipped, its loss or gradient is not finite") == 1
    assert "NOTE" not in printed[1][0]
    tensors = adapter(run_dir)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
