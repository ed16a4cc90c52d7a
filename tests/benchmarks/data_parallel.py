"""Data parallel training: one process against two, measured, and what gradients cost, computed.

    python tests/benchmarks/data_parallel.py --model SmolLM2-135M-Instruct \\
        --data_file train.csv.gz --output_file data_parallel_cpu.json
    python tests/benchmarks/data_parallel.py --computed

The first trains the same updates of 8 articles with one process of one thread and with two of one
thread each, through `accelerate launch` (gloo). The second prints what a ring all-reduce of the
adapter's gradients takes for Llama-2-7B of rank 64, by bandwidth alone: 2 (n - 1) / n times their
bytes over the slowest link, none of it hidden behind the backward pass, no latency.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_train
from bench_train import ROOT, machine

# Bytes per second and direction of the slowest link between neighbours of the ring.
LINKS = {"NVLink, 300 GB/s": 300e9, "InfiniBand or PCIe 4.0 x16, 25 GB/s": 25e9}
LINKS |= {"Ethernet of 25 Gb/s": 25e9 / 8, "Ethernet of 10 Gb/s": 10e9 / 8}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--computed", action="store_true", help="print the table instead of measuring")
    add("--tokens_per_second", type=float, default=2500, help="assumed of each GPU, in the table")
    add("--tokens", type=float, default=8 * 700, help="assumed of each GPU's share of an update")
    add("--model", help="folder of a model")
    add("--data_file", help="articles with titles (default: of make_demo.py)")
    add("--updates", type=int, default=3, help="that are timed, after a first one")
    add("--output_file", help="JSON")
    args = parser.parse_args(argv)
    if not args.computed and not args.model:
        parser.error("--model: give it, or --computed")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.computed:
        print(computed_table(args.tokens_per_second, args.tokens))
        return
    from run_folder import commit, versions

    with tempfile.TemporaryDirectory(prefix="manchette-bench-") as folder:
        bench_train.prepare(args, Path(folder), 8 * (args.updates + 1))
        runs = {processes: measure(args, Path(folder), processes) for processes in (1, 2)}
    speedup = runs[2]["tokens_per_second"] / runs[1]["tokens_per_second"]
    record = {"command": " ".join(sys.argv), "machine": machine(), "versions": versions()}
    record |= {"commit": commit(), "runs": runs, "speedup": speedup, "efficiency": speedup / 2}
    print(json.dumps(record, indent=2))
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(record, indent=2) + "\n")


def measure(args, folder: Path, processes: int) -> dict:
    """Return tokens/s of the updates after the first, and the losses."""
    kind = "MULTI_GPU" if processes > 1 else '"NO"'
    config = f"distributed_type: {kind}\nuse_cpu: true\n"
    config += f"compute_environment: LOCAL_MACHINE\nnum_processes: {processes}\n"
    (folder / "config.yaml").write_text(config)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    command += ["--config_file", str(folder / "config.yaml"), str(ROOT / "scripts/train.py")]
    command += ["--model_name_or_path", args.model, "--train_file", str(folder / "train.jsonl")]
    command += ["--output_dir", str(folder / f"run{processes}"), "--num_train_epochs", "1"]
    command += ["--lora_r", "16", "--lora_dropout", "0"]
    command += ["--gradient_accumulation_steps", str(2 // processes)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, check=True)
    lines = (folder / f"run{processes}/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "grad_norm" in row]
    timed = rows[1:]
    return {
        "tokens_per_second": sum(r["tokens"] for r in timed) / sum(r["seconds"] for r in timed),
        "seconds": [row["seconds"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "mean_seconds": statistics.mean(row["seconds"] for row in timed),
        "losses": [row["loss"] for row in rows],
    }


def computed_table(tokens_per_second: float, tokens: float) -> str:
    """Return the cost of communication as a table in Markdown."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):  # LlamaConfig is Llama-2-7B's by default
        base = LlamaForCausalLM(LlamaConfig())
        model = get_peft_model(base, LoraConfig(r=64, target_modules="all-linear"))
    size = 4 * model.get_nb_trainable_parameters()[0]  # gradients in fp32, as the adapter is
    update = tokens / tokens_per_second
    lines = [
        f"{size / 1e6:,.0f} MB of gradients; an update takes {update:.2f} s without communication "
        f"({tokens:,.0f} tokens per GPU at {tokens_per_second:,.0f} tokens/s).\n",
        "| slowest link | 8 GPUs | longer by | 64 GPUs | longer by |",
        "|--|--:|--:|--:|--:|",
    ]
    for link, speed in LINKS.items():
        seconds = [2 * (n - 1) / n * size / speed for n in (8, 64)]
        cells = (f"{s * 1e3:,.0f} ms | {s / update:.1%}" for s in seconds)
        lines.append(f"| {link} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
