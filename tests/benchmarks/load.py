"""Measure what a large file costs before the first update and the first title.

    python tests/benchmarks/load.py --output_dir runs/load

make_demo.py invents corpora of 10,000 and of 1,000,000 articles, and a model that is hardly
trained (or `--model`, a folder). On each corpus train.py makes `--updates` updates, and infer.py is
stopped at its first titles. The record (seconds, peak memory, disk, and the median tokens per
second of the updates after the first) is `record.json` in the output folder; copy it to
tests/benchmarks/results/. It takes about 3 GB of disk, most of which is freed at the end.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from real_data import SCRIPTS, machine

# An update and a title on a CPU take little beside what is measured, so the model may be small.
MODEL = ("--train_rows", 1, "--validation_rows", 1, "--test_rows", 1, "--pretraining_steps", 1)
EVERY = 0.05  # seconds between two looks at a process


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", required=True, help="new folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--updates", type=int, default=1)
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.output_dir)
    out.mkdir(parents=True)
    make("--output_dir", out / "small", *MODEL)
    # Rows are cut short: the memory of one update must not hide what the file takes.
    model = ("--model_name_or_path", args.model or out / "small/model", "--max_length", 256)
    record = {
        "machine": machine(),
        "command": " ".join(["python", "tests/benchmarks/load.py", *sys.argv[1:]]),
        "units": "seconds from the start of the process; MiB; anonymous memory is what the kernel "
        f"cannot take back, sampled every {EVERY} s; temporary is disk under TMPDIR",
        "corpora": {},
    }
    for rows in args.rows:
        corpus, run = out / f"{rows}", out / f"run-{rows}"
        make("--output_dir", corpus, "--train_rows", rows, "--no-model")
        file, titles = corpus / "train.csv", out / f"titles-{rows}.csv"
        metrics, part = run / "metrics.jsonl", out / f"titles-{rows}.part-0.jsonl"
        train = ["train.py", *model, "--train_file", file, "--output_dir", run]
        infer = ["infer.py", *model, "--input_file", file, "--output_file", titles]
        record["corpora"][f"{rows}"] = {
            "file_mib": round(file.stat().st_size / 2**20),
            "train": measure(
                out, [*train, "--max_train_steps", args.updates], lambda m=metrics: lines(m) > 0
            ),
            # The first line of a part is its settings.
            "infer": measure(out, infer, lambda p=part: lines(p) > 1, stop=True),
        }
        updates = [json.loads(line) for line in metrics.read_text().splitlines()][1:]
        if updates:
            pace = statistics.median(update["tokens"] / update["seconds"] for update in updates)
            record["corpora"][f"{rows}"]["train"]["tokens_per_second"] = round(pace, 1)
        run_config = json.loads((run / "run_config.json").read_text())
        record |= {key: run_config[key] for key in ("versions", "commit")}
        (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(corpus)
    print(json.dumps(record["corpora"], indent=1))


def make(*options) -> None:
    command = [sys.executable, SCRIPTS / "make_demo.py", *options]
    subprocess.run(list(map(str, command)), check=True)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # files here are renamed and removed
            total += file.stat().st_size
    return total


def measure(out: Path, script: list, has_begun, stop: bool = False) -> dict:
    """Run a script and return its figures; end it when `has_begun()` is true if `stop`."""
    name, *argv = map(str, script)
    print(f"== {name} {' '.join(argv)}", flush=True)
    temporary, log = out / "tmp", out / "log.txt"
    temporary.mkdir()
    start, begun, anonymous, disk = time.monotonic(), None, 0, 0
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / name), *argv],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(temporary.resolve()), "HF_HUB_OFFLINE": "1"},
        )
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        if found := re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
            anonymous = max(anonymous, int(found[1]))
        disk = max(disk, size(temporary))
        if begun is None and has_begun():
            begun = time.monotonic() - start
            if stop:
                process.send_signal(signal.SIGTERM)
        time.sleep(EVERY)
    shutil.rmtree(temporary)
    said = log.read_text()
    if begun is None or (status and not stop):
        sys.exit(f"{name} failed:\n{said}")
    figures = {"first_update" if name == "train.py" else "first_title": round(begun, 1)}
    for step, pattern in (("check", "checked"), ("copy", "copied for random access")):
        found = re.search(rf"rows {pattern} in (\d+) s", said)
        figures[step] = int(found[1]) if found else "below 5, not said"
    return figures | {
        "peak_rss_mib": round(usage.ru_maxrss / 1024),
        "peak_anonymous_mib": round(anonymous / 1024),
        "temporary_mib": round(disk / 2**20),
    }


if __name__ == "__main__":
    main()
