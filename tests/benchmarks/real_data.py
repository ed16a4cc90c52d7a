"""Run the report's steps on real articles with a real model, and record what came out.

    python tests/benchmarks/real_data.py --model MODEL --data_dir ../shared/data/inf582 \\
        --output_dir runs/real --train_rows 480 --validation_rows 200 -- --num_train_epochs 1

Train, infer without fine-tuning, with the adapter, merge into either base, infer merged, score:
each the script itself, through `accelerate launch`, timed from outside. What follows `--` goes to
train.py. With `--run_dir`, a run that is there (or one of its checkpoints) is measured, from the
adapter on. `--submissions` writes titles for the challenge's test articles too, which score.py
has nothing to compare with. The record (figures, times, peak memory, versions, commands) is
`record.json` in the output folder; copy it to tests/benchmarks/results/. Articles and titles stay
out of it.
"""

import argparse
import csv
import gzip
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
BASES = ("dequantised", "original")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the base")
    parser.add_argument("--data_dir", required=True, help="with train.csv.gz, validation.csv.gz")
    parser.add_argument("--output_dir", required=True, help="new folder")
    parser.add_argument("--run_dir", help="of train.py, instead of training")
    parser.add_argument("--train_rows", type=int, help="the first so many (default: all)")
    parser.add_argument("--validation_rows", type=int, help="the first so many (default: all)")
    parser.add_argument("--test_rows", type=int, help="the first so many (default: all)")
    parser.add_argument("--prompt_file", default=str(ROOT / "prompts/fr.txt"))
    parser.add_argument("--untuned_prompts", nargs="*", help="without fine-tuning (default: that)")
    what = "options of infer.py with the adapter, beside greedy titles"
    parser.add_argument("--ways", nargs="*", default=(), metavar="NAME=OPTIONS", help=what)
    parser.add_argument("--bases", nargs="*", default=BASES, choices=BASES, help="to merge into")
    parser.add_argument("--submissions", nargs="*", default=(), help="names of systems")
    parser.add_argument("--max_length", default="768")
    parser.add_argument("--config_file", default=str(ROOT / "accelerate_configs/cpu.yaml"))
    parser.add_argument("train_options", nargs="*", help="after --, for train.py")
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.output_dir)
    out.mkdir(parents=True)
    csv.field_size_limit(2**31 - 1)
    train, validation, test = (out / f"{name}.csv" for name in ("train", "validation", "test"))
    if not args.run_dir:
        take(Path(args.data_dir, "train.csv.gz"), train, args.train_rows)
    take(Path(args.data_dir, "validation.csv.gz"), validation, args.validation_rows)
    if args.submissions:
        take(Path(args.data_dir, "test_text.csv.gz"), test, args.test_rows)

    model = ("--model_name_or_path", args.model, "--max_length", args.max_length)
    read = ("--input_file", validation)
    run_dir = Path(args.run_dir) if args.run_dir else out / "run"
    run = ("--run_dir", run_dir)
    if run_dir.parent.name == "checkpoints":  # whose settings and curves are the run's
        run_dir = run_dir.parents[1]
    steps, ways = {}, {}  # what to run, and the options of infer.py by system
    if not args.run_dir:
        steps["train"] = ["train.py", *model, "--train_file", train, "--output_dir", run_dir]
        steps["train"] += ["--prompt_file", args.prompt_file, *args.train_options]
    untuned = [args.prompt_file] if args.untuned_prompts is None else args.untuned_prompts
    for number, file in enumerate(untuned):
        name = f"untuned_{Path(file).stem}" if number else "untuned"
        ways[name] = [*model, "--prompt_file", file]
    ways["adapter"] = [*run]
    for way in args.ways:
        name, options = way.split("=", 1)
        ways[name] = [*run, *options.split()]
    for base in args.bases:
        folder = out / f"{base}-model"
        ways[base] = ["--run_dir", folder]
        merge = ["merge.py", *run, "--output_dir", folder, "--check_file", validation]
        steps[f"merge {base}"] = [*merge, "--base", base]
    for name, way in ways.items():
        steps[f"infer {name}"] = ["infer.py", *way, *read, "--output_file", out / f"{name}.csv"]
    steps["score"] = ["score.py", "--references", validation, "--output_dir", out / "scores"]
    steps["score"] += ["--predictions", *(out / f"{name}.csv" for name in ways), "--baselines"]
    steps["score"] += ["lead1", "first40", "ext-oracle", "--compare_to", "adapter"]
    steps["score"] += ["--runs", run_dir, *(out / f"{base}-model" for base in args.bases)]
    for name in args.submissions:
        output = ("--output_file", out / f"inf582_test_submission_{name}.csv")
        steps[f"submit {name}"] = ["infer.py", *ways[name], "--input_file", test, *output]
    record = {
        "machine": machine(),
        "command": " ".join(["python", "tests/benchmarks/real_data.py", *sys.argv[1:]]),
        "steps": {},
    }
    for name, (script, *argv) in steps.items():
        print(f"== {name}", flush=True)
        record["steps"][name] = timed(args.config_file, script, argv)
        run_config = json.loads((run_dir / "run_config.json").read_text())
        record |= {key: run_config[key] for key in ("versions", "commit", "arguments")}
        for merged in out.glob("*-model/run_config.json"):
            record["merge_check"] = json.loads(merged.read_text())["merge_check"]  # of both bases
        if (out / "scores/scores.json").is_file():
            record["scores"] = json.loads((out / "scores/scores.json").read_text())
        record["metrics"] = [
            json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        ]
        (out / "record.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for name, step in record["steps"].items():
        print(f"{name:18} {step['seconds']:8,.0f} s  {step['peak_rss_gib']:5.1f} GiB resident")


def take(source: Path, target: Path, rows: int | None) -> None:
    """Copy the header and the first rows of a CSV."""
    with (
        gzip.open(source, "rt", encoding="utf-8", newline="") as stream,
        target.open("w", encoding="utf-8", newline="") as out,
    ):
        writer = csv.writer(out)
        for number, row in enumerate(csv.reader(stream)):
            if rows is None or number <= rows:
                writer.writerow(row)


def timed(config_file: str, script: str, argv) -> dict:
    """Run a script to its end and return its seconds and its peak resident memory."""
    cli = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    command = [*cli, "--config_file", config_file, str(SCRIPTS / script), *map(str, argv)]
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{script} failed: {' '.join(command)}")
    return {
        "seconds": round(time.monotonic() - start, 1),
        "peak_rss_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def machine() -> dict:
    """Return what a reader needs to know of the machine to place the times."""
    info = {"platform": platform.platform(), "cores": os.cpu_count()}
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = cpu.read_text().splitlines()
        info["cpu"] = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
        info["avx512_bf16"] = "avx512_bf16" in cpu.read_text()
        info["amx_bf16"] = "amx_bf16" in cpu.read_text()
    import torch

    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


if __name__ == "__main__":
    main()
