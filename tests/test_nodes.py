"""Two nodes: network namespaces of this machine. Run: python -m pytest tests/test_nodes.py

What stands in for sbatch, srun and scontrol does with run_train.sh what SLURM's own would do: from
there on, all is real, from the launcher to the processes that talk through a virtual cable.
"""

import argparse
import contextlib
import fcntl
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, cpu_nodes_config, launcher_options
from torch.distributed import DistError

from exit_codes import UserError
from nodes import Nodes
from run_folder import LOCK

SBATCH = """
import os, pathlib, shutil, subprocess, sys
folder, nodes = pathlib.Path({folder!r}), {nodes!r}
count = dict(zip(sys.argv[1::2], sys.argv[2::2]))["--nodes"]
script, options = sys.argv[3], sys.argv[4:]
assert "\\n#SBATCH --signal=B:USR1@300 " in open(script).read()
shutil.copy(script, folder / "slurm_script")
env = os.environ | {{"SLURM_JOB_ID": "17", "SLURM_NNODES": count, "SLURM_NODEID": "0"}}
env |= {{"SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}}
env |= {{"SLURM_SUBMIT_DIR": os.getcwd()}}
requeued, lives = folder / "requeued", 0
while True:
    requeued.unlink(missing_ok=True)
    env["SLURM_RESTART_COUNT"] = str(lives)
    command = ["ip", "netns", "exec", nodes[0], "bash", folder / "slurm_script", *options]
    with open(folder / f"log{{lives}}", "w") as log:
        batch = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        (folder / f"batch{{lives}}").write_text(str(batch.pid))
        code = batch.wait()
    (folder / f"code{{lives}}").write_text(str(code))
    lives += 1
    if not requeued.exists():
        sys.exit(code)
"""
SRUN = """
import os, signal, subprocess, sys, time
nodes = {nodes!r}
at = next(n for n, word in enumerate(sys.argv[1:], 1) if not word.startswith("-"))
wanted = {{"--ntasks-per-node=1", "--cpus-per-task=1", "--export=ALL", "--kill-on-bad-exit=0"}}
assert wanted | {{"--wait=0"}} <= set(sys.argv[1:at]), sys.argv
ordinary = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

def as_slurmstepd_does():
    os.setsid()
    for number in ordinary:
        signal.signal(number, signal.SIG_DFL)

tasks = []
for number, node in enumerate(nodes):
    env = os.environ | {{"SLURM_NODEID": str(number), "SLURM_PROCID": str(number)}}
    env |= {{"SLURM_STEP_ID": "0", "SLURMD_NODENAME": f"node{{number + 1}}"}}
    env |= {{"GLOO_SOCKET_IFNAME": "veth0"}}  # this machine's name is no address of a node
    command = ["ip", "netns", "exec", node, *sys.argv[at:]]
    tasks.append(subprocess.Popen(command, env=env, preexec_fn=as_slurmstepd_does))
for number in ordinary:
    signal.signal(number, lambda number, _: [os.killpg(t.pid, number) for t in tasks])
codes = [task.wait() for task in tasks]
if -signal.SIGKILL in codes:
    time.sleep(600)  # until SLURM has noticed that the node is gone
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import pathlib, sys
if sys.argv[1:] == ["show", "hostnames", "node[1-2]"]:
    print("10.77.17.1\\n10.77.17.2")
else:
    assert sys.argv[1:] == ["requeue", "17"], sys.argv
    pathlib.Path({folder!r}, "requeued").touch()
"""


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def kill_all_on(namespace: str) -> None:
    for pid in map(int, ip("netns", "pids", namespace).split()):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def nodes():
    """The names of two network namespaces with a cable between them."""
    names = [f"manchette-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ends = ("veth0", "netns", names[0]), ("veth0", "netns", names[1])
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.17.{number}/24", "dev", "veth0")
            for link in ("lo", "veth0"):
                ip("-n", name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here ({getattr(error, 'stderr', error)})")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class Job:
    """`sbatch --nodes 2 run_train.sh`, and what is to be seen of it. Kills what is left of it."""

    def __init__(self, folder: Path, nodes, model, news, *options):
        self.folder, self.nodes, self.run_dir = folder, nodes, folder / "run"
        (folder / "bin").mkdir(parents=True)
        for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
            text = text.format(folder=str(folder), nodes=nodes)
            (folder / "bin" / name).write_text(f"#!{sys.executable}\n{text}")
            (folder / "bin" / name).chmod(0o755)
        settings = {"MODEL": model, "TRAIN_FILE": news / "train.csv", "RUN_DIR": self.run_dir}
        settings |= {"ACCELERATE_CONFIG": cpu_nodes_config(folder), "SETUP": 0, "NODE_PATIENCE": 5}
        settings["PATH"] = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["sbatch", "--nodes", "2", "run_train.sh", *launcher_options(news), *options],
            cwd=ROOT,
            env=os.environ | {name: str(value) for name, value in settings.items()},
            executable=folder / "bin/sbatch",
            process_group=0,
        )

    def wait_for_updates(self, count: int):
        while self.num_updates() < count:
            assert self.process.poll() is None, self.log(0)
            time.sleep(0.005)

    def num_updates(self) -> int:
        file = self.run_dir / "metrics.jsonl"
        return file.read_text().count("grad_norm") if file.exists() else 0

    def lives(self) -> int:
        return len(list(self.folder.glob("batch*")))

    def wait_for_life(self, number: int):
        """Wait until the launcher was started so many times, and its training goes on."""
        while self.lives() < number:
            assert self.process.poll() is None, self.log(number - 2)
            time.sleep(0.01)
        self.wait_for_updates(self.num_updates() + 1)

    def log(self, life: int) -> str:
        return (self.folder / f"log{life}").read_text()

    def codes(self) -> list[int]:
        try:
            self.process.wait(timeout=240)
        except subprocess.TimeoutExpired:
            pytest.fail(f"life {self.lives()} does not end:\n{self.log(self.lives() - 1)}")
        return [int((self.folder / f"code{n}").read_text()) for n in range(self.lives())]

    def close(self):
        self.process.kill()
        for node in self.nodes:
            kill_all_on(node)
        self.process.wait()
        left = list(ROOT.glob("slurm-17.*"))
        for file in left:
            file.unlink()
        assert not left  # of the launcher's


@pytest.fixture
def submit(nodes, tiny_model, news, tmp_path):
    """Return a function that submits a job of two nodes."""
    jobs = []

    def start(name, *options):
        jobs.append(Job(tmp_path / name, nodes, tiny_model, news, *map(str, options)))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


def ending(run_dir: Path) -> dict:
    """Return all that a run leaves, but for times and paths."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": [{k: v for k, v in row.items() if k != "seconds"} for row in rows]}
    for file in run_dir.rglob("*"):
        if file.suffix in (".safetensors", ".json") and file.name != "run_config.json":
            found[str(file.relative_to(run_dir))] = file.read_bytes()
    return found


class SlowStore:
    """What a process asks of the rendezvous' store, over a slow network."""

    def __init__(self):
        self.written = []

    def set(self, *_):
        time.sleep(0.3)
        self.written.append(threading.current_thread())

    def add(self, *_):
        return 1

    def check(self, _):
        return False


def test_the_last_sign_of_life_is_given_before_the_process_may_end(monkeypatch):
    """A process that ends while a thread of it talks to the store is aborted."""
    for variable, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(variable, str(value))
    store = SlowStore()
    monkeypatch.setattr(Nodes, "_store", lambda self: store)
    with Nodes(timeout=20) as at_work:
        pass
    assert store.written == [at_work.thread] * 2  # its name, and that it is done
    assert not at_work.thread.is_alive()


LONG = ("--num_train_epochs", 30, "--checkpointing_steps", 1000, "--save_total_limit", 1)
LONG += ("--max_train_steps", 50, "--ddp_timeout", 30)


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_that_fails_does_not_count_as_done(monkeypatch, fails):
    """Those who wait for it are to be told of its node."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UserError) if fails else contextlib.nullcontext(), Nodes(timeout=2):
        while not store.check(["manchette/count1"]):
            time.sleep(0.01)
        if fails:
            raise UserError("/models/7b", "no such folder", "fetch it")
    count = store.add("manchette/count1", 0)
    assert count > 0 if fails else count < 0


@pytest.mark.parametrize("script", ["train", "infer"])
def test_what_is_left_is_saved_as_in_the_work(script, tmp_path, monkeypatch):
    """No other run may begin in the folder yet, and a signal must not end this process."""
    from torch.distributed import TCPStore

    module, seen = importlib.import_module(script), []
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    source = inspect.getsource(module.main)
    managers = re.search(r"with \((.*?)\n    \):\n", source, re.DOTALL)[1]
    args = argparse.Namespace(ddp_timeout=2, max_time=None, output_dir=tmp_path, output_file="out")
    lock = tmp_path / LOCK
    names = vars(module) | {"args": args, "lock": lock, "seen": seen, "DistError": DistError}
    names |= {"look": lambda: seen.append((lock.exists(), signal.getsignal(signal.SIGTERM)))}
    work = f"with ({managers}):\n    stop.listen()\n    nodes.on_loss(look)\n"
    gone = "process 1: gone in the middle of the run; nothing was done since the start"
    with pytest.raises(UserError, match=gone):
        exec(work + "    raise DistError('Connection closed by peer')", names)
    [(locked, handler)] = seen
    assert locked
    assert handler is not signal.SIG_DFL
    assert not lock.exists()
    assert store.check(["manchette/over"])


@pytest.mark.parametrize(
    ("nodes", "error"), [(2, RuntimeError("shapes")), (1, DistError("Connection closed"))]
)
def test_errors_that_tell_of_no_node_are_left_as_they_are(monkeypatch, nodes, error):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 // nodes))
    with pytest.raises(type(error)) as caught, Nodes(2).together():
        raise error
    assert caught.value is error


def test_what_only_the_first_process_meets_ends_the_job(submit, tmp_path):
    """Long before the timeout, after which the others would find out by themselves."""
    run_dir = tmp_path / "job" / "run"
    run_dir.mkdir(parents=True)
    with (run_dir / LOCK).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        job = submit("job", "--ddp_timeout", 3600)
        assert job.codes() == [2], job.log(0)
    log = job.log(0)
    complaint = log.splitlines()[-1]
    assert "another run is writing there" in complaint
    # Where it arose, and again below torchrun's words on how its processes ended.
    assert log.count("error: ") == log.count(complaint) == 2


def test_a_job_of_two_nodes_that_loses_one_ends_with_the_bytes_of_another(submit, nodes):
    """Its first life ends before its time limit, its second with the second node's."""
    undisturbed = submit("undisturbed", *LONG)
    assert undisturbed.codes() == [0], undisturbed.log(0)
    assert undisturbed.log(0).count("4 per device x 2 accumulated x 2 processes") == 1
    job = submit("job", *LONG)
    job.wait_for_updates(2)
    (ROOT / "slurm-17.code.LosTHy").touch()  # of a node that is lost nothing is cleared up
    os.kill(int((job.folder / "batch0").read_text()), signal.SIGUSR1)  # as B: says
    job.wait_for_life(2)
    kill_all_on(nodes[1])
    assert job.codes() == [75, 75, 0], job.log(job.lives() - 1)
    assert "with a checkpoint; the same command" in job.log(0)
    told = re.findall(r"^error: (.*)$", job.log(1), re.MULTILINE)
    assert len(told) == 2, job.log(1)
    assert told[0] == told[1]
    assert re.fullmatch(
        r"node2: gone in the middle of the run; the same command goes on after update \d+", told[0]
    )
    assert ending(job.run_dir) == ending(undisturbed.run_dir)
