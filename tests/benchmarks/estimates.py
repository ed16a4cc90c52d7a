"""How far the memory and time that train.py expects are from what it then takes.

    python tests/benchmarks/estimates.py --model SmolLM2-135M-Instruct --data_file train.csv.gz \\
        --output_file estimates.json

Each setting is a run of scripts/train.py of its own; its record has both peaks, its output the time
that it told after a few updates. Full fine-tuning, which train.py tells of but does not do, is done
here: the same micro-batches and loss, all weights in fp32. `--model llama-2-7b` makes a model of
that shape for a GPU, as bench_train.py does.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_train
from bench_train import ROOT, machine

SETTINGS = {
    "nf4, 4 x 2": "",
    "nf4, 1 x 8": "--per_device_train_batch_size 1 --gradient_accumulation_steps 8",
    "nf4, 8 x 1": "--per_device_train_batch_size 8 --gradient_accumulation_steps 1",
    "nf4, dropout 0.1, rank 64": "--lora_dropout 0.1 --lora_r 64",
    "nf4, every 2 layers": "--activation_checkpointing 2",
    "nf4, every layer": "--activation_checkpointing full",
    "nf4-bf16, 4 x 2": "--base_weights nf4-bf16",
    "bf16, 4 x 2": "--base_weights bf16",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a model, or llama-2-7b or tiny: random weights")
    add("--data_file", help="articles with titles (default: of make_demo.py)")
    add("--updates", type=int, default=24, help="of each run")
    add("--only", nargs="*", default=[*SETTINGS, "full"], help="names of settings")
    add("--output_file", help="JSON with every figure, written anew after each run")
    add("--full", nargs=2, metavar=("MODEL", "ROWS"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.full:
        train_all_weights(*args.full)
        return
    runs = {}
    with tempfile.TemporaryDirectory(prefix="manchette-bench-") as folder:
        bench_train.prepare(args, Path(folder), 8 * args.updates)
        rows = f"{folder}/train.jsonl"
        for number, name in enumerate(args.only):
            if name == "full":
                command = [sys.executable, __file__, "--full", args.model, rows, "--model", "-"]
                measured = json.loads(output_of(command).splitlines()[-1])
                runs[name] = {"expected": runs["bf16, 4 x 2"]["ways"]["full"], "took": measured}
            else:
                runs[name] = run(args, SETTINGS[name], rows, Path(folder, str(number)))
            print(describe(name, runs[name]), flush=True)
            if args.output_file:
                save(args, runs)


def run(args, options: str, rows: str, output_dir: Path) -> dict:
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--train_file", rows]
    command += ["--model_name_or_path", args.model, "--output_dir", str(output_dir)]
    command += ["--num_train_epochs", "1", "--lora_r", "16", "--lora_dropout", "0"]
    command += ["--mixed_precision", "bf16", "--activation_checkpointing", "none"]
    command += options.split()
    printed = output_of(command)
    memory = json.loads((output_dir / "run_config.json").read_text())["memory"]
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    updates = [json.loads(line) for line in lines]
    told = re.search(r"about (?:(\d+) h )?(\d+) (min|s) for the ([\d,]+) updates to come", printed)
    left = updates[-int(told[4].replace(",", "")) :]
    expected = (int(told[1] or 0) * 60 + int(told[2])) * (60 if told[3] == "min" else 1)
    return {
        "expected": memory["this_run"],
        "took": memory["measured_peak"],
        "ways": memory["estimate"],
        "expected_seconds": expected,
        "took_seconds": sum(update["seconds"] for update in left),
    }


def output_of(command: list[str]) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"{command} answered {answer.returncode}:\n{answer.stderr[-3000:]}")
    return answer.stdout


def train_all_weights(model: str, rows: str) -> None:
    """Do what the estimate of full fine-tuning is of, and print its peak."""
    import torch
    from bitsandbytes.optim import PagedAdamW32bit

    from articles import Columns, iterate_articles
    from batching import deal, epoch_order, pack
    from memory import peak_memory
    from modeling import load_base
    from packing import use_packed_attention
    from prompting import PROMPTS, Prompt, load_tokenizer, read_template
    from train import title_loss

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    prompt = Prompt(load_tokenizer(model), read_template(str(PROMPTS / "fr.txt")), False, 1024, 128)
    base = load_base(model, device, torch.float32, nf4=False).requires_grad_(True).train()
    assert use_packed_attention(base, 1024) is None
    optimizer = PagedAdamW32bit(base.parameters(), lr=1e-5)
    examples = [prompt.encode(r["text"], r["title"]) for r in iterate_articles(rows, Columns())]
    order = epoch_order(len(examples), 42, 0).tolist()
    for start in range(0, len(order), 8):
        for micro_batch in deal([examples[row] for row in order[start : start + 8]], 4):
            with torch.autocast(device.type, torch.bfloat16):
                loss = title_loss(base, pack(micro_batch, device))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(peak_memory(device))


def describe(name: str, run: dict) -> str:
    expected, took = run["expected"] / 2**30, run["took"] / 2**30
    text = f"{name:28} {expected:6.2f} GiB expected, {took:6.2f} taken, {expected / took - 1:+.1%}"
    if "took_seconds" in run:
        ratio = run["expected_seconds"] / run["took_seconds"] - 1
        text += (
            f"; {run['expected_seconds']} s expected, {run['took_seconds']:.0f} taken, {ratio:+.1%}"
        )
    return text


def save(args, runs: dict) -> None:
    from run_folder import commit, versions

    record = {"command": " ".join(sys.argv), "machine": machine(), "versions": versions()}
    record |= {"commit": commit(), "runs": runs}
    Path(args.output_file).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
