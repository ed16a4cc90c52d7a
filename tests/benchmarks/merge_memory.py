"""The peak memory of a merge, on a model of random weights as large as one likes.

    python tests/benchmarks/merge_memory.py --model llama-2-7b --folder FOLDER --output_file m.json

The model (13.5 GB) and an adapter are written file by file into a new folder, merged there by
scripts/merge.py, and removed. Recorded are the peak resident memory of the merge, its time, and
the largest tensor; `merge.py` has to stay below 2 GB and what that one takes.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from bench_infer import make_run, run_measured
from bench_train import ROOT, SHAPES, machine

SHAPES |= {  # TinyLlama's
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    | {"num_attention_heads": 32, "num_key_value_heads": 4},
}
SHARD_BYTES = 1 << 30


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=list(SHAPES), required=True, help="shape")
    add("--folder", required=True, help="new, on a disk with room for two such models")
    add("--lora_r", type=int, default=64, help="rank of the adapter")
    add("--base", nargs="*", default=["dequantised", "original"], help="one merge each")
    add("--check_rows", type=int, default=1, help="prompts whose logits are compared; 0: none")
    add("--output_file", help="JSON with every figure")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    folder = Path(args.folder)
    folder.mkdir(parents=True)
    try:
        size, largest = write_model(folder / "model", SHAPES[args.model])
        make_run(folder / "run", str(folder / "model"), 1024, args.lora_r)
        record = {"command": " ".join(sys.argv), "machine": machine(), **versions_and_commit()}
        record |= {"settings": vars(args), "model_bytes": size, "largest_tensor_bytes": largest}
        record["merges"] = {}
        for base in args.base:
            record["merges"][base] = measure(folder, base, args.check_rows)
            shutil.rmtree(folder / "merged")
            print(base, json.dumps(record["merges"][base]), flush=True)
            if args.output_file:
                Path(args.output_file).write_text(json.dumps(record, indent=2) + "\n")
    finally:
        shutil.rmtree(folder)


def write_model(folder: Path, shape: dict) -> tuple[int, int]:
    """Write a Llama with random weights in bf16, a file at a time; return its bytes and those of
    its largest tensor."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from make_demo import make_tokenizer, pretraining_documents

    tokenizer = make_tokenizer(folder, list(pretraining_documents(0)))
    config = LlamaConfig(**shape, max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.save_pretrained(folder)
    with init_empty_weights():
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    shards, filled = [[]], 0
    for name, dims in shapes.items():
        if filled + 2 * dims.numel() > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * dims.numel()
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for number, names in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        tensors = {
            name: (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16()
            for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    sizes = [2 * dims.numel() for dims in shapes.values()]
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes), max(sizes)


def versions_and_commit() -> dict:
    from run_folder import commit, versions

    return {"versions": versions(), "commit": commit()}


def measure(folder: Path, base: str, check_rows: int) -> dict:
    command = [sys.executable, str(ROOT / "scripts/merge.py"), "--run_dir", str(folder / "run")]
    command += ["--output_dir", str(folder / "merged"), "--base", base]
    command += ["--check_rows", str(check_rows)]
    start = time.monotonic()
    _, peak = run_measured(command)
    merged = json.loads((folder / "merged/run_config.json").read_text())
    return {
        "seconds": round(time.monotonic() - start, 1),
        "peak_rss": peak,
        "merge_check": merged.get("merge_check"),
    }


if __name__ == "__main__":
    main()
