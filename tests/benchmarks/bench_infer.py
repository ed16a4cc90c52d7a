"""Titles per second beside two usual ways to write them: the same model and articles, in one run.

    python tests/benchmarks/bench_infer.py --model SmolLM2-135M-Instruct \\
        --data_file validation.csv.gz --rows 200 --rounds 2 --output_file bench.json

Each loop is a process of its own; they take turns (A B C A B C ...). Counted are articles per
second from the first prompt to the last title, in the file if there is one, without the loading of
the model; the peak memory of the whole process, or of the GPU; and how many titles are the same as
the pipeline's. Nobody wins by writing less: the peers end a title with its line too, by infer.py's
own criterion, which a plain `generate` does not. Ours is scripts/infer.py itself.

    ours        infer.py on the model as it is, in bf16
    pipeline    transformers' text-generation pipeline, one article at a time: the report's way
    unsorted    `generate` on padded batches of 8 in the order of the file
    adapter     infer.py with an adapter (of random weights, near zero) on the NF4 base, unmerged

On a GPU, `--model llama-2-7b` makes a model of that shape with random weights, and articles as long
as those of the challenge; `--model tiny` tries the same on a CPU:

    python tests/benchmarks/bench_infer.py --model llama-2-7b --rows 1500 --max_new_tokens 50 \\
        --pipeline_rows 100 --loops ours adapter unsorted pipeline --rounds 2 \\
        --ours "continuous=--engine continuous" --output_file bench_infer_gpu.json
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_train import ROOT, SHAPES, machine, made_up_rows, make_model

PEERS = ("pipeline", "unsorted")
# The memory of a process counts what it had before it became another program, which of a child is
# all of its parent's: this one between them is small.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""
PROMPT_FILE = str(ROOT / "prompts/fr.txt")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a model, or llama-2-7b or tiny: random weights")
    add("--data_file", help="articles (default: of make_demo.py)")
    add("--rows", type=int, default=200, help="the first so many")
    add("--pipeline_rows", type=int, help="of these, for the pipeline (default: all)")
    add("--loops", nargs="*", default=["ours", *PEERS], help="see above")
    add("--rounds", type=int, default=2, help="how often each loop has its turn")
    add("--max_new_tokens", type=int, default=48, help="limit of a title")
    add("--max_length", type=int, default=1024, help="tokens of prompt and title")
    add("--lora_r", type=int, default=16, help="rank of the adapter")
    add("--ours", nargs="*", default=[], metavar="NAME=OPTIONS", help="more loops of infer.py")
    add("--output_file", help="JSON with every figure, written anew after each turn")
    add("--child", help=argparse.SUPPRESS)
    add("--argv", nargs=argparse.REMAINDER, default=[], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.child:
        return run_ours(args) if args.child == "infer" else run_peer(args)
    variants = dict(option.split("=", 1) for option in args.ours)
    loops = args.loops + list(variants)
    with tempfile.TemporaryDirectory(prefix="manchette-bench-") as folder:
        prepare(args, Path(folder))
        if "adapter" in loops:
            make_run(Path(folder, "run"), args.model, args.max_length, args.lora_r)
        runs = {loop: [] for loop in loops}
        for turn in range(args.rounds):
            for loop in loops:
                output = Path(folder, f"{loop}-{turn}.csv")
                command = command_of(args, loop, variants.get(loop, ""), folder, output)
                runs[loop].append(measure(command, output))
                print(f"{loop:12} {describe(runs[loop][-1])}", flush=True)
                if args.output_file:
                    save(args, runs)
    print("\nmedian of the rounds")
    for loop, figures in summarise(runs).items():
        print(f"{loop:12} {describe(figures)}")


def prepare(args, folder: Path) -> None:
    """Write the articles that all loops read, and the model if it is to be made."""
    from articles import Columns, iterate_articles

    if args.model in SHAPES:
        args.model = make_model(folder / "model", SHAPES[args.model])
    if args.data_file:
        columns = Columns(title=None, id=None)
        texts = (row["text"] for row in iterate_articles(args.data_file, columns))
    else:
        texts = (text for text, _ in made_up_rows(args.model))
    with open(folder / "articles.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ID", "text"])
        writer.writerows(zip(range(args.rows), texts, strict=False))


def make_run(folder: Path, model: str, max_length: int, lora_r: int) -> None:
    """Write the folder of a run whose adapter has random weights, as train.py would leave it."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    import train
    from articles import Checked
    from merge import empty_model
    from modeling import decoder_linears
    from prompting import Prompt, load_tokenizer, read_template
    from run_folder import ADAPTER_WEIGHTS, RUN_CONFIG, make_run_config, write_json

    files = ["--train_file", "none", "--output_dir", str(folder), "--max_length", str(max_length)]
    more = ["--lora_r", str(lora_r), "--mixed_precision", "bf16"]
    args = train.parse_args(["--model_name_or_path", model, *files, *more])
    tokenizer = load_tokenizer(model)
    prompt = Prompt(tokenizer, read_template(PROMPT_FILE), False, max_length, args.max_title_tokens)
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    layers, tensors = decoder_linears(empty_model(Path(model), torch.bfloat16)), {}
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        for matrix, shape in (
            ("A", (lora_r, layer.in_features)),
            ("B", (layer.out_features, lora_r)),
        ):
            key = f"base_model.model.{name}.lora_{matrix}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * 0.002
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    LoraConfig(
        task_type="CAUSAL_LM", r=lora_r, lora_alpha=16, target_modules=kinds
    ).save_pretrained(folder)
    checked = {"train": Checked("none", 0, "", True)}
    record = make_run_config(args, prompt, Path(model), checked, 8) | {"adapter_step": 0}
    write_json(folder / RUN_CONFIG, record)


def command_of(args, loop: str, options: str, folder: str, output: Path) -> list[str]:
    command = [sys.executable, __file__, "--model", args.model]
    command += ["--data_file", f"{folder}/articles.csv", "--output_file", str(output)]
    command += ["--max_new_tokens", str(args.max_new_tokens)]
    command += ["--max_length", str(args.max_length)]
    if loop in PEERS:
        rows = args.pipeline_rows if loop == "pipeline" else None
        return [*command, "--rows", str(rows or args.rows), "--child", loop]
    argv = ["--input_file", f"{folder}/articles.csv", "--output_file", str(output)]
    argv += ["--max_new_tokens", str(args.max_new_tokens)]
    if loop == "adapter":
        argv += ["--run_dir", f"{folder}/run", "--model_name_or_path", args.model]
    else:
        argv += ["--model_name_or_path", args.model, "--base_weights", "bf16"]
        argv += ["--max_length", str(args.max_length)]
    return [*command, "--child", "infer", "--argv", *argv, *options.split()]


def run_measured(command: list[str]) -> tuple[list[str], int]:
    """Run a command; return the lines that it printed and its peak resident memory in bytes."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode:
        raise SystemExit(f"{command} answered {process.returncode}:\n{process.stdout[-3000:]}")
    *lines, peak = process.stdout.splitlines()
    return lines, int(peak)


def measure(command: list[str], output: Path) -> dict:
    """Run a loop as a process of its own and return its figures."""
    start = time.perf_counter()
    lines, peak = run_measured(command)
    figures = json.loads(lines[-1])
    with open(output, encoding="utf-8", newline="") as stream:
        titles = [row["titles"] for row in csv.DictReader(stream)]
    return figures | {
        "articles": len(titles),
        "articles_per_second": len(titles) / figures["seconds"],
        "peak_rss": peak,
        "whole_run_seconds": time.perf_counter() - start,
        "titles": titles,
    }


def report(seconds: float) -> None:
    """Print what a child has measured, as its last line."""
    import torch

    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    print("\n" + json.dumps({"seconds": seconds, "peak_gpu": peak}))


def run_ours(args) -> None:
    """Run infer.py, with a clock that starts when the model is there."""
    import infer

    load, loaded = infer.load, []

    def clocked(*arguments):
        answer = load(*arguments)
        loaded.append(time.perf_counter())
        return answer

    infer.load = clocked
    if infer.main(args.argv):
        raise SystemExit("infer.py did not come to its end")
    report(time.perf_counter() - loaded[0])


def run_peer(args) -> None:
    """Write titles as a user of plain transformers would, for the prompts that infer.py has."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        StoppingCriteriaList,
        pipeline,
    )

    from articles import Columns, iterate_articles
    from decoding import LineEnd
    from prompting import Prompt, load_tokenizer, read_template

    prompt = Prompt(
        load_tokenizer(args.model), read_template(PROMPT_FILE), False, args.max_length, 128
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    ends = prompt.ends(model.generation_config)

    def how(prompt_length: int) -> dict:
        """Return the options of `generate`: greedy, to the end of a line."""
        options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "max_length": None}
        line_end = StoppingCriteriaList([LineEnd(ends, prompt_length)])
        return options | {"stopping_criteria": line_end}

    rows = iterate_articles(args.data_file, Columns(title=None))
    texts = [row["text"] for _, row in zip(range(args.rows), rows, strict=False)]
    start, written = time.perf_counter(), []
    # The text of the ids, so that both read the same words of an article that is cut.
    prompts = [tokenizer.decode(prompt.encode(t).ids, skip_special_tokens=True) for t in texts]
    if args.child == "pipeline":
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        for text in prompts:
            length = len(tokenizer(text).input_ids)
            [answer] = pipe(text, return_full_text=False, **how(length))
            written.append(answer["generated_text"])
    else:
        for first in range(0, len(prompts), 8):
            batch = tokenizer(prompts[first : first + 8], return_tensors="pt", padding=True)
            batch, length = batch.to(device), batch["input_ids"].shape[1]
            new_ids = model.generate(**batch, **how(length))[:, length:]
            written += tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    with open(args.output_file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ID", "titles"])
        for number, text in enumerate(written):
            writer.writerow([number, prompt.decode(tokenizer(text).input_ids) if text else ""])
    report(time.perf_counter() - start)


def summarise(runs: dict) -> dict:
    """Return medians by loop, the ratio to the pipeline, and titles that are the pipeline's."""
    runs = {loop: found for loop, found in runs.items() if found}
    peer = runs.get("pipeline")
    summary = {}
    for loop, found in runs.items():
        speed = statistics.median(run["articles_per_second"] for run in found)
        summary[loop] = {
            "articles": found[0]["articles"],
            "articles_per_second": speed,
            "seconds": statistics.median(run["seconds"] for run in found),
            "peak_rss": max(run["peak_rss"] for run in found),
            "peak_gpu": max((run["peak_gpu"] or 0) for run in found) or None,
        }
        if peer:
            pairs = zip(found[0]["titles"], peer[0]["titles"], strict=False)
            summary[loop] |= {
                "times_the_pipeline": speed
                / statistics.median(run["articles_per_second"] for run in peer),
                "titles_compared": min(len(found[0]["titles"]), len(peer[0]["titles"])),
                "titles_as_the_pipelines": sum(a == b for a, b in pairs),
            }
    return summary


def save(args, runs: dict) -> None:
    from run_folder import commit, versions

    shown = {k: v for k, v in vars(args).items() if k not in ("child", "argv")}
    record = {"command": " ".join(sys.argv), "machine": machine(), "versions": versions()}
    record |= {"commit": commit(), "settings": shown, "loops": summarise(runs)}
    record["runs"] = {
        loop: [{k: v for k, v in run.items() if k != "titles"} for run in found]
        for loop, found in runs.items()
    }
    Path(args.output_file).write_text(json.dumps(record, indent=2) + "\n")


def describe(figures: dict) -> str:
    memory = figures.get("peak_gpu") or figures["peak_rss"]
    text = f"{figures['articles_per_second']:7.2f} articles/s, {figures['seconds']:6.1f} s, "
    text += f"{memory / 2**30:5.1f} GiB"
    if "times_the_pipeline" in figures:
        text += f", {figures['times_the_pipeline']:.2f} x the pipeline, "
        text += f"{figures['titles_as_the_pipelines']} of {figures['titles_compared']} titles alike"
    return text


if __name__ == "__main__":
    main()
