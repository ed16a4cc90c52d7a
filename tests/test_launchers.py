"""The launchers, configs, prompts and README. Run: python -m pytest tests/test_launchers.py"""

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SCRIPTS, cpu_nodes_config, launcher_options

import infer
import train
from exit_codes import STOPPED, UserError

LAUNCHERS = ("run_train.sh", "run_infer.sh")
FAKE_ACCELERATE = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["CALLS"], "a") as stream:
    stream.write(json.dumps(sys.argv[1:]) + "\\n")
if file := os.environ.get("TUNABLES_FILE"):
    open(file, "w").write(os.environ.get("GLIBC_TUNABLES", "none"))
calls = sum(1 for _ in open(os.environ["CALLS"]))
if calls == int(os.environ.get("AT_CALL", 1)):
    if said := os.environ.get("SAYS"):
        open(os.environ["EXIT_CODE_FILE"] + ".said", "w").write(said + "\\n")
        print("25 lines", file=sys.stderr)
    if code := os.environ.get("FAIL_WITH"):
        open(os.environ["EXIT_CODE_FILE"], "w").write(code)
        sys.exit(1)
    if code := os.environ.get("DIE_WITH"):
        sys.exit(int(code))
if os.path.exists(os.environ["STOP_FILE"]):
    open(os.environ["EXIT_CODE_FILE"], "w").write("75\\n")
    sys.exit(1)
open(os.environ["EXIT_CODE_FILE"], "w").write("0\\n")
if calls == int(os.environ.get("ASK_AFTER_CALL", 0)):
    open(os.environ["STOP_FILE"], "w").write("another process")
"""
FAKE_PYTHON = """#!/bin/bash
words="$(printf '%q ' "$@")"
printf '%s\\n' "${words% }" >> "$PYTHON_CALLS"
case "$*" in "${SIGNAL_IN:-none} "*) kill -USR1 $PPID; exec sleep 600 ;; esac
"""


@pytest.fixture
def launch(tmp_path):
    """Return a function that runs a launcher with stand-ins for accelerate and python."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in (("accelerate", FAKE_ACCELERATE), ("python", FAKE_PYTHON)):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)

    def run(launcher, *argv, code=0, cwd=ROOT, **env):
        calls, python_calls = tmp_path / "calls", tmp_path / "python_calls"
        for file in (calls, python_calls):
            file.write_text("")
        env |= {"PATH": f"{bin_dir}:{os.environ['PATH']}", "SETUP": "0"}
        env |= {"CALLS": str(calls), "PYTHON_CALLS": str(python_calls)}
        env.setdefault("OUTPUT_DIR", str(tmp_path / "out"))
        result = subprocess.run(
            ["bash", str(launcher), *argv],
            cwd=cwd,
            env=os.environ | env,
            capture_output=True,
            text=True,
        )
        assert result.returncode == code, result.stderr
        run.errors = result.stderr
        launched = [json.loads(line) for line in calls.read_text().splitlines()]
        return launched, python_calls.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("config", "env", "expected"),
    [
        ("cpu", {}, "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"),
        ("cpu", {"GLIBC_TUNABLES": ""}, ""),
        ("single_gpu", {}, "none"),
    ],
)
def test_on_a_cpu_freed_memory_is_used_again(launch, tmp_path, config, env, expected):
    env = {"ACCELERATE_CONFIG": f"accelerate_configs/{config}.yaml"} | env
    launch("run_train.sh", TUNABLES_FILE=str(tmp_path / "tunables"), **env)
    assert (tmp_path / "tunables").read_text() == expected


def parsed(argv, script):
    """Return what the script itself makes of a call of accelerate."""
    assert argv[:3] == ["launch", "--quiet", "--config_file"]
    assert (ROOT / argv[3]).is_file()
    assert argv[4] == f"scripts/{script.__name__}.py"
    return script.parse_args(argv[5:])


def check(config="cpu") -> str:
    """Return the call of python that comes before all others."""
    return f"scripts/machine.py --config_file accelerate_configs/{config}.yaml"


REAL = {"MODEL": "m", "TRAIN_FILE": "t t.csv", "VALIDATION_FILE": "v.csv", "RUN_DIR": "runs/x"}
REAL |= {"INPUT_FILE": "i.csv"}


def test_train_launcher_passes_variables_and_options(launch):
    config = {"ACCELERATE_CONFIG": "accelerate_configs/single_gpu.yaml"}
    [argv], python = launch(ROOT / "run_train.sh", "--lora_r", "8", **REAL, **config)
    args = parsed(argv, train)
    assert argv[3] == "accelerate_configs/single_gpu.yaml"
    assert (args.model_name_or_path, args.train_file) == ("m", "t t.csv")
    assert (args.validation_file, args.output_dir, args.lora_r) == ("v.csv", "runs/x", 8)
    assert args.learning_rate == 2e-4  # a real model trains with the report's settings
    assert args.activation_checkpointing == "auto"
    assert python == [check("single_gpu"), "scripts/score.py --runs runs/x --output_dir runs/x"]


def test_train_launcher_makes_the_demo_only_for_the_demo(launch):
    [argv], python = launch(ROOT / "run_train.sh")
    args = parsed(argv, train)
    assert args.model_name_or_path == "demo/model"
    assert (args.train_file, args.validation_file) == ("demo/train.csv", "demo/validation.csv")
    assert args.output_dir == "runs/demo"
    report = "scripts/score.py --runs runs/demo --output_dir runs/demo"
    assert python == [check(), "scripts/make_demo.py --output_dir demo", report]


def test_options_win_over_those_of_the_demo(launch):
    [argv], _ = launch(ROOT / "run_train.sh")
    assert parsed(argv, train).learning_rate == 2e-3
    [argv], _ = launch(ROOT / "run_train.sh", "--learning_rate", "1e-3")
    args = parsed(argv, train)
    assert (args.learning_rate, args.max_length) == (1e-3, 256)  # and what is not given stays
    calls, _ = launch(ROOT / "run_infer.sh", "--max_length", "128")
    for args in (parsed(argv, infer) for argv in calls):
        assert (args.max_length, args.max_new_tokens) == (128, 48)


def test_infer_launcher_goes_through_the_reports_steps(launch, tmp_path):
    settings = {"MODEL": "m", "RUN_DIR": "r", "INPUT_FILE": "i.csv", "REFERENCES": "v.csv"}
    calls, python = launch(ROOT / "run_infer.sh", "--max_new_tokens", "9", **settings)
    untuned, adapter, merged = (parsed(argv, infer) for argv in calls)
    assert (untuned.model_name_or_path, untuned.run_dir) == ("m", None)
    assert untuned.prompt_file == "prompts/fr.txt"
    assert (adapter.run_dir, adapter.model_name_or_path) == ("r", None)
    assert merged.run_dir == str(tmp_path / "out/merged")
    assert {call.input_file for call in (untuned, adapter, merged)} == {"i.csv"}
    assert {call.max_new_tokens for call in (untuned, adapter, merged)} == {9}
    outputs = [call.output_file for call in (untuned, adapter, merged)]
    assert outputs == [str(tmp_path / f"out/{n}.csv") for n in ("untuned", "adapter", "merged")]
    assert python[0] == check()
    merge_argv, score_argv = (shlex.split(line) for line in python[1:])
    import merge
    import score

    assert merge_argv[0] == "scripts/merge.py"
    assert merge.parse_args(merge_argv[1:]).run_dir == "r"
    assert score_argv[0] == "scripts/score.py"
    args = score.parse_args(score_argv[1:])
    assert args.predictions == outputs
    assert (args.references, args.articles) == ("v.csv", "i.csv")
    assert args.baselines == ["lead1", "first40", "ext-oracle"]
    assert args.runs == ["r", str(tmp_path / "out/merged")]
    assert (args.text_column, args.id_column) == ("text", "ID")
    assert args.output_dir == str(tmp_path / "out")


def test_infer_launcher_without_references_reports_without_scores(launch):
    import score

    _, python = launch(ROOT / "run_infer.sh", **REAL)
    assert [line.split()[0] for line in python[1:]] == ["scripts/merge.py", "scripts/score.py"]
    args = score.parse_args(shlex.split(python[2])[1:])
    assert (args.references, args.articles) == (None, "i.csv")
    assert args.baselines == ["lead1", "first40"]  # the oracle needs the true titles


@pytest.mark.parametrize("options", [["--text_column", "the body"], ["--text_column=the body"]])
def test_names_of_columns_reach_the_scores_too(launch, options):
    import score

    calls, python = launch(ROOT / "run_infer.sh", *options, "--id_column", "guid", **REAL)
    args = score.parse_args(shlex.split(python[2])[1:])
    assert (args.text_column, args.id_column) == ("the body", "guid")
    assert parsed(calls[0], infer).text_column == "the body"


CALLS = [("run_train.sh", "1"), *(("run_infer.sh", call) for call in "123")]


@pytest.mark.parametrize(("launcher", "call"), CALLS)
@pytest.mark.parametrize("code", [2, 75])
def test_the_scripts_exit_code_comes_through_accelerate(launch, launcher, call, code):
    calls, _ = launch(ROOT / launcher, code=code, FAIL_WITH=str(code), AT_CALL=call, **REAL)
    assert len(calls) == int(call)


def test_what_one_of_several_processes_said_comes_last(launch):
    told = {"SAYS": "error: a: b; c", "FAIL_WITH": "2"}
    launch(ROOT / "run_infer.sh", code=2, AT_CALL="2", **told, **REAL)
    assert launch.errors.endswith("25 lines\nerror: a: b; c\n")
    launch(ROOT / "run_train.sh", code=2, FAIL_WITH="2", **REAL)
    assert launch.errors == ""


@pytest.mark.parametrize(("launcher", "call"), CALLS)
def test_a_script_that_died_without_a_word_is_a_bug(launch, launcher, call):
    calls, _ = launch(ROOT / launcher, code=1, DIE_WITH="137", AT_CALL=call, **REAL)
    assert len(calls) == int(call)


def test_a_rank_that_died_after_another_was_done_is_a_bug(launch):
    """The first process wrote 0 and the second was killed: accelerate answers 1."""
    launch(ROOT / "run_train.sh", code=1, FAIL_WITH="0", **REAL)


def test_a_process_that_was_signalled_when_all_was_done_does_not_stop_the_next_step(launch):
    calls, _ = launch(ROOT / "run_infer.sh", ASK_AFTER_CALL="1", **REAL)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("launcher", "missing"),
    [("run_train.sh", "TRAIN_FILE"), ("run_train.sh", "RUN_DIR")]
    + [("run_infer.sh", name) for name in ("RUN_DIR", "INPUT_FILE", "OUTPUT_DIR")],
)
def test_a_real_model_never_meets_the_demos_files(launch, launcher, missing):
    calls, python = launch(ROOT / launcher, code=2, **(REAL | {"OUTPUT_DIR": "o", missing: ""}))
    assert (calls, python) == ([], [])


@pytest.mark.parametrize(
    ("launcher", "option"),
    [
        ("run_train.sh", "--output_dir=other"),
        ("run_infer.sh", "--run_dir other"),
        ("run_infer.sh", "--input_file other.csv"),
        ("run_infer.sh", "--output_file=other.csv"),
    ],
)
def test_what_several_steps_need_goes_by_a_variable(launch, launcher, option):
    name = option.replace("=", " ").split()[0]
    with pytest.raises(AssertionError, match=f"error: {name}: other steps need it too; set the"):
        launch(ROOT / launcher, *option.split(), **REAL)


def test_training_without_validation(launch):
    [argv], _ = launch(ROOT / "run_train.sh", **(REAL | {"VALIDATION_FILE": ""}))
    assert parsed(argv, train).validation_file is None


def test_a_run_below_a_folder_called_checkpoints_is_scored(launch):
    _, python = launch(ROOT / "run_infer.sh", **(REAL | {"RUN_DIR": "old/checkpoints/titles"}))
    assert "--runs old/checkpoints/titles " in python[-1]
    settings = REAL | {"RUN_DIR": "old/checkpoints/titles/checkpoints/step-000003"}
    _, python = launch(ROOT / "run_infer.sh", **settings)
    assert "--runs old/checkpoints/titles " in python[-1]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_link_and_a_posix_shell_do(launch, launcher, tmp_path):
    (tmp_path / "link").symlink_to(ROOT / launcher)
    calls, _ = launch(tmp_path / "link", cwd=tmp_path, POSIXLY_CORRECT="1", **REAL)
    assert len(calls) == (1 if launcher == "run_train.sh" else 3)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_runs_as_the_copy_that_sbatch_spools(launch, launcher, tmp_path):
    spooled = tmp_path / "spool/slurm_script"
    spooled.parent.mkdir()
    shutil.copy(ROOT / launcher, spooled)
    calls, _ = launch(spooled, cwd=tmp_path, SLURM_SUBMIT_DIR=str(ROOT), **REAL)
    assert calls
    # And submitted from elsewhere, it says so.
    elsewhere = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", spooled], env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 2
    line = f"error: {tmp_path}: not the repository; submit the job from its root\n"
    assert (done.stdout, done.stderr) == ("", line)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_help_is_that_of_the_script_and_nothing_else_runs(launch, launcher, tmp_path):
    for option in ("--help", "-h"):
        assert launch(ROOT / launcher, option) == ([], [])
    assert not (tmp_path / "out").exists()
    done = subprocess.run(["bash", ROOT / launcher, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count("options:") == 1
    assert "--max_length" in done.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_reads_as_agreed(launcher):
    text = (ROOT / launcher).read_text()
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100
    assert "set -euo pipefail" in lines
    assert sum("launch scripts/" in line for line in lines if not line.startswith("#")) == 1
    assert len(re.findall(r"^# --- ", text, re.MULTILINE)) == 4  # and the header: five blocks
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert len(directives) >= 5
    assert all(" # " in line for line in directives)
    assert subprocess.run(["bash", "-n", ROOT / launcher], check=False).returncode == 0
    assert os.access(ROOT / launcher, os.X_OK)


# ---------------------------------------------------------------------- stopping and SLURM


def wait_until(condition, process=None):
    """Wait for what a launcher's script does, but not for ever, and not once the launcher is over
    if that is its `process`."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("it does not come")


def answer_signals():
    """As a shell does. What started the tests may ignore some, as nohup does, which is inherited,
    and which bash never takes back."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def spool(launcher: str, tmp_path: Path) -> Path:
    """Copy a launcher as sbatch does, and return the copy, which SLURM starts.

    What stands in for scontrol, in `tmp_path / "bin"`, notes what it is told.
    """
    scontrol, spooled = tmp_path / "bin/scontrol", tmp_path / "spool/slurm_script"
    for folder in (scontrol.parent, spooled.parent):
        folder.mkdir(exist_ok=True)
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    scontrol.chmod(0o755)
    shutil.copy(ROOT / launcher, spooled)
    return spooled


@pytest.fixture
def job(tiny_model, news, tmp_path):
    """Return a function that starts run_train.sh as sbatch would: a copy, spooled elsewhere."""
    bin_dir, spooled = tmp_path / "bin", spool("run_train.sh", tmp_path)
    # sbatch reads the directives of the script that it is given.
    assert "#SBATCH --signal=B:USR1@300 " in spooled.read_text()
    assert "#SBATCH --requeue " in spooled.read_text()
    (tmp_path / "tmp").mkdir()
    processes = []

    def start(*more, **env):
        settings = {"MODEL": tiny_model, "TRAIN_FILE": news / "train.csv", "SETUP": 0}
        settings |= {"VALIDATION_FILE": news / "validation.csv", "RUN_DIR": tmp_path / "run"}
        settings |= {"SLURM_JOB_ID": 17, "SLURM_SUBMIT_DIR": ROOT, "TMPDIR": tmp_path / "tmp"}
        settings |= {"PATH": f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        options = launcher_options(news)
        processes.append(
            subprocess.Popen(
                ["bash", spooled, *options, *more],
                cwd=tmp_path,
                process_group=0,  # as a terminal's shell starts it
                preexec_fn=answer_signals,
                env=os.environ | {k: str(v) for k, v in (settings | env).items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
    # Nothing of ours stays in the temporary folder. (Python itself may be at its own.)
    assert not list((tmp_path / "tmp").glob("tmp.*"))


def updates_done(run_dir):
    file = run_dir / "metrics.jsonl"
    return file.read_text().count("grad_norm") if file.exists() else 0


def test_a_job_out_of_time_saves_requeues_itself_and_ends_with_the_same_bytes(
    job, trained, tmp_path
):
    run_dir, requests = tmp_path / "run", tmp_path / "scontrol"
    done = 0
    for restart in range(3):  # up to its own limit, up to SLURM's, and to the end
        limit = ("--max_time", "0.0001") if restart == 0 else ()
        process = job(*limit, SLURM_RESTART_COUNT=restart)
        if restart == 1:
            wait_until(lambda before=done: updates_done(run_dir) > before, process)
            process.send_signal(signal.SIGUSR1)  # to the batch shell alone, as B: says
        printed, complained = process.communicate(timeout=300)
        if restart and process.returncode == 0:  # the signal may have come after the last update
            break
        assert process.returncode == STOPPED, complained
        assert "with a checkpoint" in printed
        assert ("--max_time" in printed) == (restart == 0)  # nobody else has asked
        done = updates_done(run_dir)
        assert requests.read_text() == "requeue 17\n" * (restart + 1)
    assert process.returncode == 0
    for name in ("adapter_model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (run_dir / name).read_bytes() == (trained / name).read_bytes()
    assert updates_done(run_dir) == 6


def test_a_cancelled_job_saves_and_stays_out_of_the_queue(job, tmp_path):
    process = job("--num_train_epochs", "50")
    wait_until(lambda: updates_done(tmp_path / "run") > 0, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == STOPPED
    assert not (tmp_path / "scontrol").exists()
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


def test_outside_slurm_nothing_is_requeued(launch, tmp_path):
    """Though the same copy of the launcher was asked by nobody, and would requeue a job."""
    spooled = spool("run_train.sh", tmp_path)
    settings = REAL | {"SLURM_SUBMIT_DIR": str(ROOT), "FAIL_WITH": str(STOPPED)}
    launch(spooled, code=STOPPED, **settings, SLURM_JOB_ID="")
    assert not (tmp_path / "scontrol").exists()
    launch(spooled, code=STOPPED, **settings, SLURM_JOB_ID="17")
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"


def processes_of(pid):
    """Return a process and all that it has started, and so on."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in processes_of(int(child)))]


@pytest.mark.parametrize("outermost_first", [True, False])
def test_a_job_whose_processes_are_all_signalled_saves_before_its_launcher_ends(
    job, tmp_path, outermost_first
):
    """As schedulers do for a job that is cancelled, preempted or out of time."""
    process = job("--num_train_epochs", "50")
    wait_until(lambda: updates_done(tmp_path / "run") > 0, process)
    pids = processes_of(process.pid)
    assert len(pids) == 3  # the launcher, accelerate, the script
    for pid in pids if outermost_first else reversed(pids):
        os.kill(pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == STOPPED
    assert "with a checkpoint" in printed
    assert not (tmp_path / "scontrol").exists()


def test_a_signal_between_two_scripts_is_not_lost(launch, tmp_path):
    """It ends the merge that it comes in; what would come after that never begins."""
    spooled = spool("run_infer.sh", tmp_path)
    settings = {
        "SIGNAL_IN": "scripts/merge.py",
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    launched, python = launch(spooled, code=STOPPED, **settings)
    assert len(launched) == 2
    assert [call.split()[0] for call in python] == ["scripts/machine.py", "scripts/merge.py"]
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    # A task of an array goes back alone; a launcher that is not the job itself puts nothing back.
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    launch(spooled, code=STOPPED, **settings, **array)
    launch("run_infer.sh", code=STOPPED, **settings)
    assert (tmp_path / "scontrol").read_text() == "requeue 17\nrequeue 17_3\n"


def gone(pid):
    """Return whether a process is dead; it may be there still, as a zombie that nobody reaps."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def ending(pid):
    """Return whether SIGUSR2, by which the launcher ends all, waits for a process to go on."""
    pending = re.search(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)[1]
    return bool(int(pending, 16) & 1 << (signal.SIGUSR2 - 1))


def test_a_second_signal_to_the_launcher_ends_its_processes(job, tmp_path):
    """At once: in the middle of an update, of which there is no trace then."""
    process = job("--num_train_epochs", "50", "--per_device_train_batch_size", "2000")
    lock = tmp_path / "run/.lock"
    wait_until(lambda: lock.exists() and lock.read_text().endswith("\n"), process)
    trainer = int(re.search(r"process (\d+) on", lock.read_text())[1])
    os.kill(trainer, signal.SIGSTOP)  # or it might be done with its update by then
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: list((tmp_path / "tmp").glob("*.stop")), process)
    process.send_signal(signal.SIGHUP)  # as a terminal that is closed: it counts as one
    time.sleep(2.1)
    assert not ending(trainer)
    process.send_signal(signal.SIGINT)
    # The kernel itself lets it go on, and so end, once the others of its group are gone.
    wait_until(lambda: gone(trainer) or ending(trainer))
    with contextlib.suppress(ProcessLookupError):
        os.kill(trainer, signal.SIGCONT)
    process.communicate(timeout=300)
    assert process.returncode == 130
    wait_until(lambda: gone(trainer))  # it dies a moment after what it holds is closed
    assert not (tmp_path / "run/checkpoints").exists()


def test_ctrl_c_in_a_terminal_asks_once(job, tmp_path):
    """A terminal sends it to the whole foreground group; the script must not count two."""
    process = job("--num_train_epochs", "50")
    wait_until(lambda: updates_done(tmp_path / "run") > 0, process)
    os.killpg(process.pid, signal.SIGINT)
    printed, told = process.communicate(timeout=300)
    assert process.returncode == STOPPED
    assert told.count("stopping as soon as nothing is half done; once more to stop at once\n") == 1
    assert "with a checkpoint" in printed


# ---------------------------------------------------------------------- setting up

FAKE_VENV = """#!/bin/sh
# Stands in for python3 and for the python of an environment; $INSTALLED is made by its pip.
[ "$1" != -c ] || exec [ ! -e "${0%/*}/old" ]
echo "$0 $*" >> "$LOG"
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/pip ;;
  "-m pip install"*) touch "$INSTALLED" ;;
  -*) cat > /dev/null; [ -e "$INSTALLED" ] ;;
esac
"""


@pytest.fixture
def set_up(tmp_path):
    """Return a function that sources setup.sh in an empty folder and returns what it ran."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in ("python3", "python"):
        (bin_dir / name).write_text(FAKE_VENV)
        (bin_dir / name).chmod(0o755)

    def run(code=0, **env):
        log = tmp_path / "log"
        log.write_text("")
        command = f"set -euo pipefail; source {SCRIPTS}/setup.sh a.txt b.txt; command -v python"
        env |= {"PATH": f"{bin_dir}:/usr/bin:/bin", "LOG": str(log)}
        env |= {"INSTALLED": str(tmp_path / "installed")}
        result = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert result.returncode == code, result.stderr
        calls = [line.replace(f"{tmp_path}/", "") for line in log.read_text().splitlines()]
        told = result.stderr if code else result.stdout.splitlines()[-1]
        return calls, told.replace(f"{tmp_path}/", "")

    return run


def test_set_up_makes_an_environment_and_installs_once(set_up):
    calls, python = set_up()
    assert python == ".venv/bin/python"
    assert calls == [
        "bin/python3 -m venv .venv",
        ".venv/bin/python - a.txt b.txt",
        ".venv/bin/python -m pip install --quiet --no-compile -r a.txt -r b.txt",
    ]
    assert set_up() == ([".venv/bin/python - a.txt b.txt"], ".venv/bin/python")


@pytest.mark.parametrize("of", ["another machine", "another time"])
def test_set_up_refuses_an_environment_whose_python_is_gone_or_old(set_up, tmp_path, of):
    """Else what is called python then is the system's, and is installed into."""
    set_up()
    (tmp_path / ".venv/bin/old").touch()
    if of == "another machine":
        (tmp_path / ".venv/bin/python").unlink()
        (tmp_path / ".venv/bin/python").symlink_to("gone")
    calls, told = set_up(code=2)
    assert calls == []
    assert told.startswith("error: .venv: its Python is gone or older than 3.11; remove it, or act")


def test_set_up_refuses_an_old_python(set_up, tmp_path):
    (tmp_path / "bin/old").touch()
    calls, told = set_up(code=2, CONDA_PREFIX="/somewhere")
    assert (calls, told) == ([], "error: bin/python: not Python 3.11 or newer; put one on PATH\n")


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_set_up_uses_the_active_environment(set_up, variable):
    calls, python = set_up(**{variable: "/somewhere"})
    assert python == "bin/python"
    assert [call.split()[0] for call in calls] == ["bin/python", "bin/python"]


def test_set_up_can_be_left_out(set_up):
    assert set_up(SETUP="0") == ([], "bin/python")


@pytest.mark.parametrize(
    ("line", "satisfied"),
    [("pytest>=1 # why", True), ("pytest>=1000", False), ("no-such-package", False), ("# x", True)],
)
def test_what_is_installed_is_checked_against_the_bounds(tmp_path, line, satisfied):
    text = (SCRIPTS / "setup.sh").read_text()
    check = re.search(r"<<'CHECK'\n(.*?)CHECK", text, re.DOTALL)[1]
    (tmp_path / "requirements.txt").write_text(line + "\n")
    import sys

    command = [sys.executable, "-c", check, str(tmp_path / "requirements.txt")]
    result = subprocess.run(command, capture_output=True, check=False)
    assert (result.returncode == 0) == satisfied


# ---------------------------------------------------------------------- configs and prompts

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_there_are_the_configs_that_the_readme_names():
    names = {"cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp"}
    assert {path.stem for path in CONFIGS} == names


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
@pytest.mark.parametrize(
    ("config", "needed"), [("cpu", 0), ("single_gpu", 1), ("multi_gpu", 2), ("fsdp", 2)]
)
def test_a_config_is_refused_where_its_gpus_are_missing(monkeypatch, config, needed, gpus):
    import machine

    monkeypatch.setattr("torch.accelerator.device_count", lambda: gpus)
    file = str(ROOT / f"accelerate_configs/{config}.yaml")
    if gpus >= needed:
        assert machine.main(["--config_file", file]) is None
        return
    with pytest.raises(UserError) as error:
        machine.main(["--config_file", file])
    asked = {1: "a GPU", 2: "2 GPUs"}[needed]
    there, advice = (
        ("is 1", "set num_processes to 1")
        if gpus
        else ("is none", "use accelerate_configs/cpu.yaml")
    )
    complaint = f"{file}: the config asks for {asked} and there {there}; {advice}"
    assert str(error.value) == complaint


@pytest.mark.parametrize(
    ("processes", "allowed", "told"),
    [(1, 8, 8), (3, 8, 2), (9, 8, 1), (1, 64, 64)],
)
def test_there_are_as_many_threads_as_a_job_has_cores_of_a_machine(
    tmp_path, monkeypatch, capsys, processes, allowed, told
):
    import machine

    config = yaml.safe_load((ROOT / "accelerate_configs/cpu.yaml").read_text())
    config |= {"num_processes": processes, "distributed_type": "MULTI_GPU"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 64)  # of two threads each
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2 * allowed)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.main(["--config_file", str(tmp_path / "config.yaml")])
    assert capsys.readouterr().out == f"--num_cpu_threads_per_process {told}\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    machine.main(["--config_file", str(tmp_path / "config.yaml")])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("variables", "gpus", "refused"),
    [
        ({}, 0, False),  # plain python: nobody asked for a GPU
        ({"ACCELERATE_USE_CPU": "True"}, 0, False),
        ({"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}, 0, False),
        ({"ACCELERATE_USE_CPU": "False"}, 0, True),
        ({"ACCELERATE_USE_CPU": "False"}, 1, False),
        ({"LOCAL_WORLD_SIZE": "2"}, 0, True),
        ({"LOCAL_WORLD_SIZE": "2"}, 1, True),
        ({"LOCAL_WORLD_SIZE": "2"}, 2, False),
    ],
)
def test_processes_are_refused_where_their_gpus_are_missing(monkeypatch, variables, gpus, refused):
    import machine

    for name in ("ACCELERATE_USE_CPU", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: gpus)
    with pytest.raises(UserError) if refused else contextlib.nullcontext():
        machine.check_devices()


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    import machine

    monkeypatch.setattr("psutil.virtual_memory", lambda: argparse.Namespace(available=3 << 30))
    monkeypatch.setattr(machine, "OWN_GROUPS", Path("/none"))  # whose limit may be lower
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu = argparse.Namespace(type="cpu")
    assert machine.free_memory(cpu) == 3 << 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert machine.free_memory(cpu) == 1 << 30


@pytest.mark.parametrize("hosts", ["node7\nnode9", ""])
def test_in_a_job_of_several_nodes_srun_starts_accelerate_on_each(launch, tmp_path, hosts):
    """Each with its own number, the first one's address and a port of the job's."""
    stubs = {"scontrol": f"echo '{hosts}'", "srun": f'printf "%s\\n" "$*" >> {tmp_path}/srun'}
    # What is known on a node alone must not have been filled in where srun is called.
    stubs["srun"] += """
while [[ "$1" == -* ]]; do shift; done
for id in 0 1; do SLURM_NODEID=$id "$@" || code=$?; done
exit "${code:-0}"
"""
    stubs["python"] = f'case "$*" in *machine.py*) exec {sys.executable} "$@";; esac'
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    config = str(cpu_nodes_config(tmp_path))
    settings = REAL | {"ACCELERATE_CONFIG": config, "SLURM_NODEID": "0"}
    settings |= {"SLURM_JOB_ID": "50007", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7,9]"}
    settings |= {"SLURM_CPUS_PER_TASK": "8"}
    if not hosts:
        launched, _ = launch(ROOT / "run_train.sh", code=2, **settings)
        assert launched == []
        return
    launched, _ = launch(ROOT / "run_train.sh", "--lora_r", "8", **settings)
    assert (
        (tmp_path / "srun")
        .read_text()
        .startswith(
            "--ntasks=2 --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0 --wait=0 "
            "--cpus-per-task=8 bash -c "
        )
    )
    assert len(launched) == 2
    for number, argv in enumerate(launched):
        script = argv.index("scripts/train.py")
        assert argv[:script] == [
            *("launch", "--quiet", "--config_file", config),
            *("--machine_rank", str(number), "--num_machines", "2", "--num_processes", "2"),
            *("--main_process_ip", "node7", "--main_process_port", "20007"),
        ]
        assert train.parse_args(argv[script + 1 :]).lora_r == 8
    assert not list(ROOT.glob("slurm-50007.*"))


def test_full_shared_memory_is_refused_where_several_gpus_need_it(monkeypatch, tmp_path):
    import machine

    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: argparse.Namespace(free=1000))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    machine.check_devices()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError) as error:
        machine.check_devices()
    assert str(error.value) == (
        f"{tmp_path}: full, and the processes exchange gradients through it; make room there; a "
        "container gets more by --ipc=host or --shm-size=1g"
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_describes_the_machine_only_and_accelerate_takes_it(config):
    from accelerate.commands.config.config_args import load_config_from_file

    settings = yaml.safe_load(config.read_text())
    loaded = load_config_from_file(str(config))
    for key, value in settings.items():
        assert getattr(loaded.to_dict().get(key), "value", loaded.to_dict().get(key)) == value
    # Precision and accumulation belong to the script, which passes them to Accelerate itself.
    arguments = vars(
        train.parse_args(["--model_name_or_path=m", "--train_file=t", "--output_dir=o"])
    )
    assert not settings.keys() & arguments.keys()
    lines = list(map(str.lstrip, config.read_text().splitlines()))
    for before, line in zip(["", *lines], lines, strict=False):
        assert line.startswith("#") or before.startswith("#"), f"no comment over {line}"
    assert len(settings) <= 10


PROMPTS = sorted((ROOT / "prompts").glob("*.txt"))


def test_there_are_the_prompts_that_the_readme_names():
    names = {f"{language}{form}" for language in ("fr", "en") for form in ("", "_llama2", "_chat")}
    assert {path.stem for path in PROMPTS} == names


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda path: path.stem)
def test_prompt_has_the_article_once_and_its_form(prompt):
    from prompting import read_template

    template = read_template(str(prompt))
    assert ("[INST]" in template) == template.endswith("[/INST]") == ("llama2" in prompt.stem)
    assert "<s>" not in template  # BOS comes as an id


# ---------------------------------------------------------------------- README


def readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_every_command_of_the_readme_is_one_that_its_script_takes():
    found = set()
    for words in readme_commands():
        scripts = [word for word in words if re.fullmatch(r"scripts/\w+\.py", word)]
        if not scripts:
            continue
        name = scripts[0].removeprefix("scripts/").removesuffix(".py")
        found.add(name)
        importlib.import_module(name).parse_args(words[words.index(scripts[0]) + 1 :])
        for word in words:
            if word.startswith(("accelerate_configs/", "prompts/")):
                assert (ROOT / word).is_file(), word
    assert found >= {"train", "infer", "merge", "score"}


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:scripts|prompts|tests|accelerate_configs)/[\w./-]+)`", text))
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path


def test_nothing_else_lies_at_the_top():
    git = ["git", "-C", str(ROOT), "ls-files"]
    listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in listed}
    expected = {"scripts", "accelerate_configs", "prompts", "requirements.txt", "run_train.sh"}
    expected |= {"run_infer.sh", "tests", "README.md", "LICENSE", ".gitignore", "pyproject.toml"}
    assert top == expected | {".ci"}
    assert SCRIPTS.is_dir()
