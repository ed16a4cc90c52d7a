"""The share of training that is neither forward, backward, clipping nor optimizer step.

    python tests/benchmarks/overhead.py --model SmolLM2-135M-Instruct --data_file train.csv.gz \\
        --output_file overhead.json

It runs scripts/train.py in this process with a clock around these four, waiting for the GPU where
there is one, and counts from the start of the second update to the end of the last: reading,
tokenizing, packing, logging and all that the loop does between updates is the rest.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import bench_train
from bench_train import machine


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a model, or llama-2-7b or tiny: random weights")
    add("--data_file", help="articles with titles (default: of make_demo.py)")
    add("--updates", type=int, default=8, help="of 4 x 2 articles, after a first one")
    add("--output_file", help="JSON")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    import torch
    from accelerate import Accelerator
    from bitsandbytes.optim import PagedAdamW32bit

    import train
    from run_folder import commit, versions

    inside, ends = {}, []

    def clock(owner, name):
        original = getattr(owner, name)

        def timed(*arguments, **options):
            start = time.perf_counter()
            result = original(*arguments, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if ends:  # after the first update
                inside[name] = inside.get(name, 0) + time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    clock(train, "title_loss")
    clock(Accelerator, "backward")
    clock(Accelerator, "clip_grad_norm_")
    clock(PagedAdamW32bit, "step")
    log_metrics = train.log_metrics

    def logged(*arguments):
        log_metrics(*arguments)
        ends.append(time.perf_counter())

    train.log_metrics = logged
    with tempfile.TemporaryDirectory(prefix="manchette-bench-") as folder:
        bench_train.prepare(args, Path(folder), 8 * (args.updates + 1))
        command = ["--model_name_or_path", args.model, "--train_file", f"{folder}/train.jsonl"]
        command += ["--output_dir", f"{folder}/run", "--num_train_epochs", "1"]
        train.main([*command, "--lora_r", "16", "--lora_dropout", "0"])
    whole = ends[-1] - ends[0]
    share = 1 - sum(inside.values()) / whole
    print(f"{share:.2%} of {whole:.1f} s outside {', '.join(inside)}")
    if args.output_file:
        record = {"command": " ".join(sys.argv), "machine": machine(), "versions": versions()}
        record |= {"commit": commit(), "seconds": whole, "inside": inside, "share_outside": share}
        Path(args.output_file).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
