"""The launchers under SLURM itself: a cluster of two nodes, which are network namespaces.

Needs its programs and root: apt-get install slurm-wlm munge iproute2 (tried with 22.05.8).
Run: python -m pytest tests/test_slurm.py, about 5 minutes
"""

import copy
import csv
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, cpu_nodes_config, french_rows, launcher_options, write_csv
from test_nodes import LONG, ending, kill_all_on, nodes  # noqa: F401  # a fixture

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "nsenter", "unshare")
MISSING = [name for name in PROGRAMS if not shutil.which(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

CONF = """
ClusterName=manchette
SlurmctldHost=node1(10.77.17.1)
SlurmUser=root
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName=node1 NodeAddr=10.77.17.1 CPUs=8 RealMemory=40000 Gres=gpu:1
NodeName=node2 NodeAddr=10.77.17.2 CPUs=8 RealMemory=40000 Gres=gpu:1
PartitionName=gpu Nodes=node1,node2 Default=YES State=UP
"""


class Cluster:
    """Two nodes, of which the first is also where jobs are submitted and scheduled."""

    def __init__(self, folder: Path, namespaces):
        self.folder, self.namespaces = folder, namespaces

    def start(self):
        folder = self.folder
        for name in ("state", "node1", "node2"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(CONF.format(folder=folder))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # or slurmd may not start
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.17.1 node1\n10.77.17.2 node2\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.on("node1", "munged", "--force", f"--socket={folder}/munge.sock", *files)
        self.start_node("node1")
        self.start_node("node2")
        self.on("node1", "slurmctld")
        end = time.monotonic() + 60
        while self.ask("sinfo", "-h", "-o", "%t %D") != "idle 2":
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)

    def on(self, node: str, *command, **more):
        """Run a command on a node, whose name it finds there, and those of the others."""
        prepared = f'mount --bind {self.folder}/hosts /etc/hosts; hostname {node}; exec "$@"'
        namespace = f"/run/netns/{self.namespaces[int(node[-1]) - 1]}"
        enter = ["nsenter", f"--net={namespace}", "unshare", "--mount", "--uts", "sh", "-c"]
        more.setdefault("stderr", subprocess.DEVNULL)
        more["env"] = os.environ | more.get("env", {}) | {"SLURM_CONF": self.folder / "slurm.conf"}
        return subprocess.run([*enter, prepared, "sh", *command], check=True, timeout=60, **more)

    def ask(self, *command, **more) -> str:
        result = self.on("node1", *command, stdout=subprocess.PIPE, text=True, **more)
        return result.stdout.strip()

    def start_node(self, node: str):
        self.on(node, "slurmd", "-N", node)

    def close(self):
        for namespace in self.namespaces:
            kill_all_on(namespace)


@pytest.fixture(scope="module")
def cluster(nodes, tmp_path_factory):  # noqa: F811
    found = Cluster(tmp_path_factory.mktemp("slurm"), nodes)
    try:
        found.start()
        yield found
    finally:
        found.close()


class Job:
    """A launcher that was submitted; `array`, such as 1-2: with those tasks, a job each."""

    def __init__(
        self, cluster, folder: Path, launcher, settings: dict, *options, num_nodes=2, array=""
    ):
        self.cluster, self.folder = cluster, folder
        folder.mkdir(parents=True, exist_ok=True)
        one = num_nodes == 1
        config = "accelerate_configs/cpu.yaml" if one else cpu_nodes_config(folder)
        settings |= {"ACCELERATE_CONFIG": config, "SETUP": 0, "NODE_PATIENCE": 5}
        settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings["OMP_NUM_THREADS"] = 1  # both nodes have the same processors
        sbatch = ["sbatch", "--parsable", "--nodes", str(num_nodes), "--cpus-per-task", "1"]
        sbatch += ["--array", array] if array else []
        log = folder / ("%a/log" if array else "log")
        self.number = cluster.ask(
            *[*sbatch, "--output", log, launcher, *map(str, options)],
            cwd=ROOT,
            env={name: str(value) for name, value in settings.items()},
        )

    def task(self, number: int):
        """Return a task of an array, of which each has a folder of its own."""
        task = copy.copy(self)
        task.number, task.folder = f"{self.number}_{number}", self.folder / str(number)
        return task

    def state(self) -> dict[str, str]:
        told = self.cluster.ask("scontrol", "show", "job", self.number, "--oneliner")
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait_for(self, condition, seconds: float):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{self.state()}\n{self.log()}"
            time.sleep(0.2)

    def wait_for_updates(self, count: int):
        file = self.folder / "run/metrics.jsonl"
        self.wait_for(
            lambda: file.exists() and file.read_text().count("grad_norm") >= count, seconds=60
        )

    def start_again(self, restarts: int):
        """Wait until it is back in the queue, where SLURM would let it stay two minutes: nodes take
        no job that was given back in the same second."""
        self.wait_for(lambda: self.state()["JobState"] == "PENDING", seconds=120)
        assert self.state()["Restarts"] == str(restarts)
        self.cluster.ask("scontrol", "update", f"jobid={self.number}", "StartTime=now+3")

    def end(self) -> tuple[str, str]:
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.state()["JobState"] in states, seconds=180)
        assert not list(ROOT.glob(f"slurm-{self.number}.*"))  # nothing of the launcher's stays
        return self.state()["JobState"], self.state()["ExitCode"]


@pytest.fixture
def train(cluster, tiny_model, news, tmp_path):
    """Return a function that submits a training of two nodes."""

    def submit(name, *options):
        settings = {"MODEL": tiny_model, "TRAIN_FILE": news / "train.csv"}
        settings["RUN_DIR"] = tmp_path / name / "run"
        options = (*launcher_options(news), *options)
        return Job(cluster, tmp_path / name, "run_train.sh", settings, *options)

    return submit


def test_a_job_that_is_stopped_and_loses_a_node_ends_with_the_bytes_of_another(train, cluster):
    undisturbed = train("undisturbed", *LONG)
    assert undisturbed.end() == ("COMPLETED", "0:0"), undisturbed.log()
    assert undisturbed.log().count("4 per device x 2 accumulated x 2 processes") == 1

    job = train("job", *LONG)
    job.wait_for_updates(2)
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)  # as before the time limit
    job.start_again(restarts=1)
    assert "with a checkpoint; the same command" in job.log()
    job.wait_for_updates(8)
    kill_all_on(cluster.namespaces[1])
    # Long before SLURM itself has noticed, the first node is free for other jobs.
    job.wait_for(lambda: job.state()["JobState"] != "RUNNING", seconds=60)
    assert "node2" not in cluster.ask("sinfo", "-h", "-N", "-t", "down", "-o", "%N")
    assert "error: node2: gone in the middle of the run; the same command goes on" in job.log()
    cluster.start_node("node2")
    job.start_again(restarts=2)
    assert job.end() == ("COMPLETED", "0:0"), job.log()
    assert ending(job.folder / "run") == ending(undisturbed.folder / "run")


def test_a_job_that_is_cancelled_saves_and_stays_out(train):
    job = train("job", *LONG)
    job.wait_for_updates(2)
    job.cluster.ask("scancel", job.number)
    assert job.end()[0] == "CANCELLED"
    job.wait_for(lambda: "with a checkpoint; the same command" in job.log(), seconds=30)
    assert list((job.folder / "run/checkpoints").iterdir())


def test_a_job_with_bad_input_fails_with_its_code(train, tmp_path):
    job = train("job", "--validation_file", tmp_path / "none.csv")
    assert job.end() == ("FAILED", "2:0"), job.log()
    told = re.findall("^error: .*", job.log(), re.MULTILINE)
    assert told == [told[0], job.log().splitlines()[-1]], job.log()


def test_a_task_of_an_array_requeues_itself_alone(cluster, tiny_model, news, tmp_path):
    """Of a launcher as edited for an array: each task has a run of its own."""
    edited = tmp_path / "run_train.sh"
    text = (ROOT / "run_train.sh").read_text()
    run_dir = 'RUN_DIR="${RUN_DIR:-}"'
    assert run_dir in text
    edited.write_text(text.replace(run_dir, 'RUN_DIR="$RUNS/$SLURM_ARRAY_TASK_ID/run"'))
    for number in "12":
        (tmp_path / "array" / number).mkdir(parents=True)  # sbatch makes none for a log
    settings = {"MODEL": tiny_model, "TRAIN_FILE": news / "train.csv", "RUNS": tmp_path / "array"}
    options = [*launcher_options(news), *LONG]
    job = Job(cluster, tmp_path / "array", edited, settings, *options, num_nodes=1, array="1-2")
    first, second = job.task(1), job.task(2)
    first.wait_for_updates(2)
    cluster.ask("scancel", "--batch", "--signal=USR1", first.number)
    first.start_again(restarts=1)
    assert [task.end() for task in (first, second)] == [("COMPLETED", "0:0")] * 2, first.log()
    assert second.state()["Restarts"] == "0"
    assert ending(first.folder / "run") == ending(second.folder / "run")


def test_titles_of_two_nodes_are_those_of_one(cluster, trained, tiny_model, tmp_path):
    rows = french_rows(60, seed=3)
    write_csv(tmp_path / "test.csv", [{"ID": n, "text": r["text"]} for n, r in enumerate(rows)])
    found = []
    for num_nodes in (1, 2):
        folder = tmp_path / f"nodes{num_nodes}"
        settings = {"MODEL": tiny_model, "RUN_DIR": trained, "INPUT_FILE": tmp_path / "test.csv"}
        settings["OUTPUT_DIR"] = folder / "titles"
        options = ["--max_length", 256, "--max_new_tokens", 24]
        job = Job(cluster, folder, "run_infer.sh", settings, *options, num_nodes=num_nodes)
        assert job.end() == ("COMPLETED", "0:0"), job.log()
        files = [folder / f"titles/{name}.csv" for name in ("untuned", "adapter", "merged")]
        found.append([file.read_bytes() for file in files])
        assert [len(list(csv.reader(file.open()))) for file in files] == [61] * 3
    assert found[0] == found[1]
