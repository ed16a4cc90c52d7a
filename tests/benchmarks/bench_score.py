"""Measure score.py on many titles: seconds, and the memory of all its processes together.

    python tests/benchmarks/bench_score.py --articles_file valid.csv.gz --output_dir runs/scores

The articles are repeated until there are enough rows; each system titles each by 30 of its words,
from its first, second, ... on. The record is `record.json` in the output folder; copy it to
tests/benchmarks/results/.
"""

import argparse
import contextlib
import csv
import gzip
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from real_data import SCRIPTS, machine

WORDS = 30
EVERY = 0.1  # seconds between two looks at the processes


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--articles_file", required=True, help="a .csv.gz with text, titles")
    parser.add_argument("--output_dir", required=True, help="new folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_500, 100_000])
    parser.add_argument("--systems", type=int, nargs="+", default=[5, 2], help="for each --rows")
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.output_dir)
    out.mkdir(parents=True)
    csv.field_size_limit(2**31 - 1)
    with gzip.open(args.articles_file, "rt", encoding="utf-8-sig", newline="") as stream:
        articles = list(csv.DictReader(stream))
    packages = ("evaluate", "rouge_score", "scipy", "numpy", "py3langid")
    record = {
        "machine": machine(),
        "command": " ".join(["python", "tests/benchmarks/bench_score.py", *sys.argv[1:]]),
        "units": f"seconds; MiB, shared pages counted once, of all processes, every {EVERY} s",
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "commit": ask_commit(),
        "rows": {},
    }
    for rows, count in zip(args.rows, args.systems, strict=True):
        folder = out / str(rows)
        folder.mkdir()
        write(folder / "references.csv", ["text", "titles"], rows, articles, reference)
        systems = []
        for start in range(count):
            systems.append(folder / f"from_word_{start + 1}.csv")
            write(systems[-1], ["ID", "titles"], rows, articles, words_from(start))
        command = ["score.py", "--references", folder / "references.csv", "--predictions"]
        command += [*systems, "--output_dir", folder / "out"]
        size = (folder / "references.csv").stat().st_size
        figures = {"systems": count, "file_mib": round(size / 2**20)}
        record["rows"][rows] = figures | measure(command)
        record["rows"][rows]["report_mib"] = round(
            (folder / "out/report.html").stat().st_size / 2**20, 1
        )
        (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(folder)
    print(json.dumps(record["rows"], indent=1))


def ask_commit() -> str:
    code = "import run_folder; print(run_folder.commit())"
    return subprocess.check_output([sys.executable, "-c", code], cwd=SCRIPTS, text=True).strip()


def write(path: Path, header: list, rows: int, articles: list, make) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(make(row, articles[row % len(articles)]) for row in range(rows))


def reference(row: int, article: dict) -> list:
    return [article["text"], article["titles"]]


def words_from(start: int):
    return lambda row, article: [row, " ".join(article["text"].split()[start : start + WORDS])]


def measure(command: list) -> dict:
    """Run score.py to its end and return its seconds and its peak memory."""
    name, *argv = map(str, command)
    start, peak = time.monotonic(), 0
    process = psutil.Popen(
        [sys.executable, str(SCRIPTS / name), *argv], env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    while process.poll() is None:
        total = 0
        for each in [process, *children(process)]:
            with contextlib.suppress(psutil.Error):  # it has ended since
                total += each.memory_full_info().pss
        peak = max(peak, total)
        time.sleep(EVERY)
    if process.returncode:
        sys.exit(f"{name} failed: {process.returncode}")
    return {"seconds": round(time.monotonic() - start, 1), "peak_mib": round(peak / 2**20)}


def children(process) -> list:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
