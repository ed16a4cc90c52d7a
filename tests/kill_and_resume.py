"""Kill real runs with SIGKILL at random moments, resume them, and compare how they end.

    python tests/kill_and_resume.py --trials 20 --output_file kill_and_resume.json

Each trial is a training run that is killed three times, once in its updates, once in a save and
once in an evaluation, and then an inference that is killed once. What they leave is compared byte
for byte with that of runs which were left alone. It takes about a minute a trial on 2 cores.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from conftest import ROOT, SCRIPTS, byte_level_tokenizer, french_rows, save_tiny_model, write_csv

MOMENTS = ("training", "save", "evaluation")


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output_file", type=Path, help="JSON with the outcome")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="manchette-kill-") as folder:
        job = Job(Path(folder))
        whole = job.run(Path(folder, "whole"))
        trials = []
        for number in range(args.trials):
            trials.append(job.trial(Path(folder, str(number)), rng))
            differing = dict(trials[-1].pop("ending").items() ^ whole.items())
            trials[-1] |= {"identical": not differing, "differing": sorted(differing)}
            print(f"trial {number + 1}: {json.dumps(trials[-1])}", flush=True)
    result = summarise(trials)
    print(
        f"{result['identical endings']} of {result['trials']} endings identical after "
        f"{result['kills']} kills ({result['in a save']} left half a checkpoint, "
        f"{result['in an evaluation']} an evaluation undone)"
    )
    if args.output_file:
        from run_folder import commit, versions

        record = {
            "command": f"python tests/kill_and_resume.py --trials {args.trials} --seed {args.seed}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": versions(),
            "commit": commit(),
        }
        args.output_file.write_text(json.dumps(record | result, indent=2) + "\n")
    return result


def summarise(trials: list[dict]) -> dict:
    kills = [kill for trial in trials for kill in trial["kills"]]
    return {
        "trials": len(trials),
        "identical endings": sum(trial["identical"] for trial in trials),
        "kills": len(kills),
        "in a save": sum(kill.get("half a checkpoint", False) for kill in kills),
        "in an evaluation": sum(kill.get("evaluation undone", False) for kill in kills),
        "each trial": trials,
    }


class Job:
    """A training with dropout in bf16 on a tiny model, and an inference, as command lines."""

    def __init__(self, folder: Path):
        self.folder = folder
        save_tiny_model(folder / "model", byte_level_tokenizer(), tie=True)
        write_csv(folder / "train.csv", french_rows(88, seed=1))
        write_csv(folder / "validation.csv", french_rows(24, seed=2))
        test = [{k: v for k, v in row.items() if k != "titles"} for row in french_rows(60, seed=3)]
        write_csv(folder / "test.csv", test)

    def train(self, run_dir: Path) -> list[str]:
        """22 updates, a checkpoint every 4 and after each of two epochs."""
        options = {"model_name_or_path": "model", "train_file": "train.csv", "lora_r": 16}
        options |= {"validation_file": "validation.csv", "output_dir": run_dir, "max_length": 256}
        options |= {"max_title_tokens": 24, "learning_rate": 0.01, "num_eval_titles": 8}
        options |= {"mixed_precision": "bf16"}
        options |= {"checkpointing_steps": 4, "save_total_limit": 2}
        options |= {"resume_from_checkpoint": "latest"}
        return self._command("train.py", options)

    def infer(self, run_dir: Path) -> list[str]:
        options = {"run_dir": run_dir, "input_file": "test.csv", "max_batch_tokens": 800}
        return self._command("infer.py", options | {"output_file": f"{run_dir}.csv"})

    def _command(self, script: str, options: dict) -> list[str]:
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, str(SCRIPTS / script), *words]

    def start(self, command: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(self, command: list[str]) -> None:
        process = self.start(command)
        printed = process.communicate()[0].decode()
        if process.returncode != 0:
            raise RuntimeError(f"{command} answered {process.returncode}:\n{printed}")

    def run(self, run_dir: Path) -> dict:
        """Return what a run leaves that nobody kills."""
        self.finish(self.train(run_dir))
        self.finish(self.infer(run_dir))
        return ending(run_dir)

    def trial(self, run_dir: Path, rng: random.Random) -> dict:
        kills = []
        for moment in rng.sample(MOMENTS, len(MOMENTS)):
            kills.append(self.kill_training(run_dir, moment, rng))
        self.finish(self.train(run_dir))
        kills.append(self.kill_inference(run_dir, rng))
        self.finish(self.infer(run_dir))
        return {"kills": kills, "ending": ending(run_dir)}

    def kill_training(self, run_dir: Path, moment: str, rng: random.Random) -> dict:
        """Kill a run at a random one of such moments, if there are any left in it."""
        torn, undone = half_saved(run_dir), not_evaluated(run_dir)
        process = self.start(self.train(run_dir))
        before, more = num_updates(run_dir), rng.randint(1, 5)
        delay = rng.uniform(0, 0.05)
        while process.poll() is None:
            if moment == "training" and num_updates(run_dir) >= before + more:
                break
            if moment == "save" and half_saved(run_dir) - torn:
                delay /= 20  # it is a matter of milliseconds
                break
            if moment == "evaluation" and not_evaluated(run_dir) - undone:
                break
            time.sleep(0.0005)
        time.sleep(delay)
        killed = process.poll() is None
        process.kill()
        process.communicate()
        return {
            "moment": moment,
            "after update": num_updates(run_dir),
            "killed": killed,
            "half a checkpoint": bool(half_saved(run_dir) - torn),
            "evaluation undone": bool(not_evaluated(run_dir) - undone),
        }

    def kill_inference(self, run_dir: Path, rng: random.Random) -> dict:
        process, part = self.start(self.infer(run_dir)), Path(f"{run_dir}.part-0.jsonl")
        wanted, lines = rng.randint(1, 55), 0
        while process.poll() is None and lines < wanted:
            lines = part.read_bytes().count(b"\n") if part.exists() else 0
            time.sleep(0.0005)
        killed = process.poll() is None
        process.kill()
        process.communicate()
        return {"moment": "inference", "after line": lines, "killed": killed}


def num_updates(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"grad_norm") if file.exists() else 0


def half_saved(run_dir: Path) -> set:
    """Return the folders of checkpoints that are being written, or were when a run was killed."""
    found = set()
    for folder in run_dir.glob("checkpoints/step-*.tmp"):
        with suppress(OSError):  # renamed meanwhile
            found.add((folder.name, folder.stat().st_ino))
    return found


def not_evaluated(run_dir: Path) -> set:
    """Return the newest checkpoint if it waits for its evaluation."""
    newest = max(run_dir.glob("checkpoints/step-??????"), default=None)
    try:
        state = json.loads((newest / "state.json").read_text())
    except (OSError, TypeError):  # none yet, or just being replaced
        return set()
    return {newest.name} if state["evaluated_steps"] < state["completed_steps"] else set()


def ending(run_dir: Path) -> dict:
    """Return the hashes of all that a run leaves, but for times and paths."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    hashes = {"metrics": json.dumps(rows)}
    for file in sorted(run_dir.rglob("*")):
        if file.is_file() and file.name not in ("metrics.jsonl", "run_config.json"):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            hashes[str(file.relative_to(run_dir))] = digest
    titles = Path(f"{run_dir}.csv").read_bytes()
    return hashes | {"titles": hashlib.sha256(titles).hexdigest()}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))
    main()
