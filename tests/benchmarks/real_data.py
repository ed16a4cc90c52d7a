"""Run the report's steps on real articles with a real model, and record what came out.

    python tests/benchmarks/real_data.py --model MODEL --data_dir ../shared/data/inf582 \\
        --output_dir runs/real --train_rows 480 --validation_rows 200 -- --num_train_epochs 1

Train, infer without fine-tuning, with the adapter, merge into either base, infer merged, score:
each the script itself, through `accelerate launch`, timed from outside. What follows `--` goes to
train.py. With `--run_dir`, a run that is there is measured, from the adapter on. The
record (figures, times, peak memory, versions, commands) is `record.json` in the output folder;
copy it to tests/benchmarks/results/. Articles and titles stay out of it.
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
    parser.add_argument("--run_dir", help="of train.py; no training, nothing without fine-tuning")
    parser.add_argument("--train_rows", type=int, help="the first so many (default: all)")
    parser.add_argument("--validation_rows", type=int, help="the first so many (default: all)")
    parser.add_argument("--prompt_file", default=str(ROOT / "prompts/fr.txt"))
    parser.add_argument("--max_length", default="768")
    parser.add_argument("--config_file", default=str(ROOT / "accelerate_configs/cpu.yaml"))
    parser.add_argument("train_options", nargs="*", help="after --, for train.py")
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.output_dir)
    out.mkdir(parents=True)
    csv.field_size_limit(2**31 - 1)
    train, validation = out / "train.csv", out / "validation.csv"
    if not args.run_dir:
        take(Path(args.data_dir, "train.csv.gz"), train, args.train_rows)
    take(Path(args.data_dir, "validation.csv.gz"), validation, args.validation_rows)

    prompt = ("--prompt_file", args.prompt_file, "--max_length", args.max_length)
    model = ("--model_name_or_path", args.model)
    read = ("--input_file", validation)
    run_dir = Path(args.run_dir) if args.run_dir else out / "run"
    run = ("--run_dir", run_dir)
    first = ["train.py", *model, "--train_file", train, "--output_dir", run_dir, *prompt]
    steps = {"train": first + args.train_options}
    predictions = [out / f"{name}.csv" for name in ("untuned", "adapter", *BASES)]
    steps["infer untuned"] = ["infer.py", *model, *prompt, *read, "--output_file", predictions[0]]
    if args.run_dir:
        del steps["train"], steps["infer untuned"], predictions[0]
    steps["infer adapter"] = ["infer.py", *run, *read, "--output_file", out / "adapter.csv"]
    for base in BASES:
        folder = out / f"{base}-model"
        merge = ["merge.py", *run, "--output_dir", folder, "--check_file", validation]
        steps[f"merge {base}"] = [*merge, "--base", base]
        output = ("--output_file", out / f"{base}.csv")
        steps[f"infer {base}"] = ["infer.py", "--run_dir", folder, *read, *output]
    steps["score"] = ["score.py", "--references", validation, "--output_dir", out / "scores"]
    steps["score"] += ["--predictions", *predictions, "--baselines", "lead1", "first40"]
    steps["score"] += ["ext-oracle", "--compare_to", "adapter"]
    steps["score"] += ["--runs", run_dir, *(out / f"{base}-model" for base in BASES)]
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
        if (merged := out / f"{BASES[0]}-model/run_config.json").is_file():
            record["merge_check"] = json.loads(merged.read_text())["merge_check"]  # of both bases
        if (out / "scores/scores.json").is_file():
            record["scores"] = json.loads((out / "scores/scores.json").read_text())
        record["metrics"] = [
            json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        ]
        (out / "record.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for name, step in record["steps"].items():
        print(f"{name:14} {step['seconds']:8,.0f} s  {step['peak_rss_gib']:5.1f} GiB resident")


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
