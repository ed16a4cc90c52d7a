"""Training speed and memory beside TRL: the same model, rows, updates and LoRA, in one run.

    python tests/benchmarks/bench_train.py --model SmolLM2-135M-Instruct --data_file train.csv.gz \\
        --updates 8 --rounds 2 --output_file bench.json

Each loop is a process of its own; they take turns (A B C A B C ...), so that what else the machine
does meets all of them. Counted are real tokens, without padding, per second of updates after the
first `--warmup_updates`; the peak memory of the whole process, or of the GPU; and each update's
loss, for nobody wins by computing something else. Ours is scripts/train.py itself. The peer is
TRL's SFTTrainer on the same ids in the same order, with its adapter in fp32 as ours is:

    trl        its defaults, with max_length=None, which cuts nothing (the rows are cut already)
    trl_best   padding-free, without activation checkpointing
    unsloth    its own model, adapter and patched SFTTrainer, with its defaults (where installed)

On a GPU, `--model llama-2-7b` makes a model of that shape with random weights, and rows as long as
those of the challenge; `--model tiny` tries the same on a CPU:

    python tests/benchmarks/bench_train.py --model llama-2-7b --updates 100 --rounds 2 \\
        --ours "nf4-bf16=--base_weights nf4-bf16" "no dropout=--lora_dropout 0" \\
        "smallest=--activation_checkpointing full" --output_file bench_gpu.json
"""

import argparse
import csv
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# As the launchers do on a CPU, for all loops alike: each takes less memory by it.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a model, or llama-2-7b or tiny: random weights")
    add("--data_file", help="articles with titles (default: of make_demo.py)")
    add("--loops", nargs="*", default=["ours", "trl", "trl_best"], help="ours: train.py's defaults")
    add("--updates", type=int, default=8, help="that are timed")
    add("--warmup_updates", type=int, default=2, help="before them")
    add("--rounds", type=int, default=2, help="how often each loop has its turn")
    add("--max_length", type=int, default=1024, help="tokens")
    add("--lora_r", type=int, default=16, help="rank")
    add("--lora_dropout", type=float, default=0.1, help="of all loops")
    add("--per_device_train_batch_size", type=int, default=4, help="of all loops")
    add("--gradient_accumulation_steps", type=int, default=2, help="of all loops")
    add("--ours", nargs="*", default=[], metavar="NAME=OPTIONS", help="more loops of train.py")
    add("--output_file", help="JSON with every figure, written anew after each turn")
    add("--make", metavar="FOLDER", help="write the model and 1,500 articles there, no more")
    add("--child", help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.child:
        run_peer(args)
        return
    if args.make:
        make(args.model, Path(args.make), 1500)
        return
    variants = dict(option.split("=", 1) for option in args.ours)
    loops = args.loops + list(variants)
    with tempfile.TemporaryDirectory(prefix="manchette-bench-") as folder:
        rows = (args.updates + args.warmup_updates) * articles_per_update(args)
        prepare(args, Path(folder), rows)
        runs = {loop: [] for loop in loops}
        for turn in range(args.rounds):
            for loop in loops:
                output = Path(folder, f"{loop}-{turn}")
                if loop in PEERS:
                    command = peer_command(args, loop, folder, output)
                else:
                    command = our_command(args, variants.get(loop, ""), folder, output)
                runs[loop].append(measure(command, output, args.warmup_updates))
                print(f"{loop:12} {describe(runs[loop][-1])}", flush=True)
                if args.output_file:
                    save(args, runs)
    print_table({loop: summarise(found) for loop, found in runs.items()})


def save(args, runs: dict) -> None:
    from run_folder import commit

    record = {"command": " ".join(sys.argv), "machine": machine(), "versions": all_versions()}
    record |= {"commit": commit(), "settings": vars(args)}
    record["loops"] = {loop: summarise(found) for loop, found in runs.items() if found}
    text = json.dumps(record | {"runs": runs}, indent=2)
    Path(args.output_file).write_text(text + "\n")


def articles_per_update(args) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


PEERS = ("trl", "trl_best", "unsloth")
SHAPES = {
    "llama-2-7b": {},  # what LlamaConfig is by default
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4},
}


def prepare(args, folder: Path, rows: int) -> None:
    """Write the rows that all loops read, and the model if it is to be made."""
    from articles import Columns, iterate_articles

    if args.model in SHAPES:
        args.model = make_model(folder / "model", SHAPES[args.model])
    if args.data_file:
        source = ((r["text"], r["title"]) for r in iterate_articles(args.data_file, Columns()))
    else:
        source = made_up_rows(args.model)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as stream:
        taken = list(itertools.islice(source, rows))
        if len(taken) < rows:
            raise SystemExit(f"{args.data_file} has {len(taken)} of the {rows} articles asked for")
        for text, title in taken:
            stream.write(json.dumps({"text": text, "titles": title}) + "\n")


def make(shape: str, folder: Path, rows: int) -> None:
    """Write a model of random weights, and so many articles, as other starts read them."""
    folder.mkdir(parents=True, exist_ok=True)
    articles = itertools.islice(made_up_rows(make_model(folder / "model", SHAPES[shape])), rows)
    with open(folder / "articles.csv.part", "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ID", "text", "titles"])
        writer.writerows((number, *article) for number, article in enumerate(articles))
    Path(stream.name).rename(folder / "articles.csv")


def make_model(folder: Path, shape: dict) -> str:
    """Write a Llama with random weights: neither speed nor memory depends on their values."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from make_demo import make_tokenizer, pretraining_documents

    tokenizer = make_tokenizer(folder, list(pretraining_documents(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        config = LlamaConfig(**shape, max_position_embeddings=4096)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
    return str(folder)


def made_up_rows(model: str):
    """Yield articles and titles as long as the challenge's are for Llama-2: 570 and 50 tokens."""
    from make_demo import make_article
    from prompting import load_tokenizer

    tokenizer, rng = load_tokenizer(model), random.Random(0)
    for row in itertools.count():
        pieces = [make_article(0, "train", 100 * row + number) for number in range(40)]
        lengths = (min(900, rng.lognormvariate(6.25, 0.45)), rng.uniform(30, 70))
        texts = (" ".join(piece[name] for piece in pieces) for name in ("text", "titles"))
        cut = (tokenizer(t).input_ids[: int(n)] for t, n in zip(texts, lengths, strict=True))
        yield tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in cut)


def our_command(args, options: str, folder: str, output: Path) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts/train.py")]
    command += ["--model_name_or_path", args.model, "--train_file", f"{folder}/train.jsonl"]
    command += ["--output_dir", str(output), "--num_train_epochs", "1", "--warmup_ratio", "0"]
    command += ["--mixed_precision", "bf16"]
    for name in ("max_length", "lora_r", "lora_dropout"):
        command += [f"--{name}", str(getattr(args, name))]
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        command += [f"--{name}", str(getattr(args, name))]
    return command + options.split()


def peer_command(args, loop: str, folder: str, output: Path) -> list[str]:
    command = [sys.executable, __file__, "--child", loop, "--folder", str(output)]
    command += ["--model", args.model, "--data_file", f"{folder}/train.jsonl"]
    for name in ("max_length", "lora_r", "lora_dropout", "per_device_train_batch_size"):
        command += [f"--{name}", str(getattr(args, name))]
    return [*command, "--gradient_accumulation_steps", str(args.gradient_accumulation_steps)]


def measure(command: list[str], output: Path, warmup: int) -> dict:
    """Run a loop as a process of its own and return its figures."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} answered {process.returncode}:\n{printed[-3000:]}")
    lines = (output / "metrics.jsonl").read_text().splitlines()
    updates = [row for row in map(json.loads, lines) if "tokens" in row]
    timed = updates[warmup:]
    on_gpu = re.search(r"peak memory ([\d.]+) GiB on the GPU", printed)
    return {
        "tokens_per_second": sum(u["tokens"] for u in timed) / sum(u["seconds"] for u in timed),
        "peak_rss": usage.ru_maxrss * 1024,
        "peak_gpu": float(on_gpu[1]) * 2**30 if on_gpu else None,
        "losses": [update["loss"] for update in updates],
        "tokens": [update["tokens"] for update in updates],
        "seconds": [update["seconds"] for update in updates],
        "whole_run_seconds": time.perf_counter() - start,
    }


def run_peer(args) -> None:
    """Train with SFTTrainer on the ids that train.py would use, in its order."""
    os.environ["TORCHDYNAMO_DISABLE"] = "0"  # libraries.py sets it, and a peer may compile
    if args.child == "unsloth":
        from unsloth import FastLanguageModel  # before the others: it patches them
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from articles import Columns, iterate_articles
    from batching import epoch_order
    from memory import describe_peak
    from modeling import decoder_linears, load_base
    from prompting import PROMPTS, Prompt, load_tokenizer, read_template

    tokenizer = load_tokenizer(args.model)
    template = read_template(str(PROMPTS / "fr.txt"))
    prompt = Prompt(tokenizer, template, False, args.max_length, 128)
    rows = list(iterate_articles(args.data_file, Columns(id=None)))
    examples = [prompt.encode(row["text"], row["title"]) for row in rows]
    examples = [examples[index] for index in epoch_order(len(rows), 42, 0).tolist()]
    size = articles_per_update(args)
    tokens = [
        sum(len(example.ids) for example in examples[start : start + size])
        for start in range(0, len(examples), size)
    ]
    masks = [[0] * e.num_prompt_ids + [1] * e.num_title_ids for e in examples]
    data = Dataset.from_dict({"input_ids": [e.ids for e in examples], "completion_mask": masks})

    class Clock(TrainerCallback):
        """Writes what train.py writes of each update."""

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, _, state, *__, **___):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.start

        def on_log(self, _, state, *__, logs, **___):
            if "loss" in logs:
                row = {"step": state.global_step, "loss": logs["loss"], "seconds": self.seconds}
                row["tokens"] = tokens[state.global_step - 1]
                with open(output / "metrics.jsonl", "a") as stream:
                    stream.write(json.dumps(row) + "\n")

    output = Path(args.folder)
    output.mkdir()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    lora = {"r": args.lora_r, "lora_alpha": 16, "lora_dropout": args.lora_dropout}
    more, peft = {}, {}
    if args.child == "trl_best":
        more = {"padding_free": True, "gradient_checkpointing": False}
    if args.child == "unsloth":
        model, _ = FastLanguageModel.from_pretrained(
            args.model, max_seq_length=args.max_length, dtype=torch.bfloat16, load_in_4bit=True
        )
        kinds = {name.rpartition(".")[2] for name in decoder_linears(model)}
        model = FastLanguageModel.get_peft_model(model, target_modules=sorted(kinds), **lora)
    else:
        model = load_base(args.model, device, torch.bfloat16, nf4=True)
        peft["peft_config"] = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora)
    config = SFTConfig(
        output_dir=str(output / "trl"),
        max_length=None,
        completion_only_loss=True,  # by default for pairs of texts, but not for ids
        num_train_epochs=1,
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0.3,
        weight_decay=0.0,
        optim="paged_adamw_32bit",
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=device.type == "cpu",
        seed=42,
        **more,
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Clock()],
        **peft,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL rounds a 4-bit model's adapter to bf16
            parameter.data = parameter.data.float()
    trainer.train()
    print(f"peak memory {describe_peak(device)}")  # as train.py does


def summarise(runs: list[dict]) -> dict:
    return {
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        "peak_rss": max(run["peak_rss"] for run in runs),
        "peak_gpu": max((run["peak_gpu"] or 0) for run in runs) or None,
    }


def describe(run: dict) -> str:
    memory = run.get("peak_gpu") or run["peak_rss"]
    losses = run.get("losses", [])
    ends = f", loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else ""
    return f"{run['tokens_per_second']:9,.0f} tokens/s, {memory / 2**30:5.1f} GiB{ends}"


def print_table(loops: dict) -> None:
    fastest_peer = {name: f["tokens_per_second"] for name, f in loops.items() if name in PEERS}
    print("\nmedian of the rounds, and how many times the speed of each peer")
    for name, figures in loops.items():
        ratios = (f"{figures['tokens_per_second'] / v:.2f} x {k}" for k, v in fastest_peer.items())
        print(f"{name:12} {describe(figures)}, {', '.join(ratios)}")


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )


def all_versions() -> dict:
    import importlib.metadata

    from run_folder import versions

    found = versions() | {"trl": importlib.metadata.version("trl")}
    with suppress(importlib.metadata.PackageNotFoundError):
        found["unsloth"] = importlib.metadata.version("unsloth")
    return found


if __name__ == "__main__":
    main()
