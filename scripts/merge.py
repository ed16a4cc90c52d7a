"""Merge an adapter into its base: an ordinary model folder that needs neither PEFT nor 4-bit.

    python scripts/merge.py --run_dir runs/titles --output_dir runs/titles-merged

The adapter is never added to 4-bit weights, which would be rounded once more. `--base` says to
which weights instead: `dequantised` are those that it was trained against, `original` those from
before the rounding to NF4. Tensors are read, merged and written one by one; no GPU is needed.
"""

import argparse
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from articles import Columns, check_articles, iterate_articles
from exit_codes import UserError, run
from hub import check_hub, push
from model_card import CARD, model_card
from prompting import PROBE, end_ids, load_tokenizer, prompt_of_run
from run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OWN_FILES_ONLY,
    RUN_CONFIG,
    check_adapter,
    check_base,
    check_model_folder,
    check_output_dir,
    file_sha256,
    note_override,
    read_run_config,
    resolve_model_folder,
    versions,
    write_json,
)

MAX_SHARD_BYTES = 1 << 30  # of a weight file that is written; also bounds what is kept in memory


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument_group("model").add_argument
    add("--run_dir", required=True, help="folder of train.py")
    add("--model_name_or_path", help="where the base lies now, if not where the run says")
    add("--base", choices=["dequantised", "original"], help="(default: what was trained against)")
    add = parser.add_argument_group("check").add_argument
    add("--check_file", help="articles to compare logits on (default: the run's validation file)")
    add("--check_rows", type=int, default=4, help="so many of them; 0: no check")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="the merged model's folder, new or empty")
    add("--push_to_hub", metavar="OWNER/NAME", help="at the end, as a private model of the Hub")
    args = parser.parse_args(argv)
    if args.check_rows < 0:
        parser.error(f"--check_rows {args.check_rows}: give a number from 0")
    return args


def main(argv=None):
    args = parse_args(argv)

    # ------------------------------------------------------------------ check all input first
    check_hub(args.push_to_hub)
    run_config = read_run_config(args.run_dir)
    if run_config["kind"] != "adapter" or not Path(args.run_dir, ADAPTER_WEIGHTS).is_file():
        raise UserError(args.run_dir, f"no {ADAPTER_WEIGHTS} to merge", "give a folder of train.py")
    model_name = args.model_name_or_path or run_config["base_model"]
    check_model_folder(model_name, None if args.model_name_or_path else args.run_dir)
    check_adapter(args.run_dir)
    if model_name != run_config["base_model"]:
        note_override("--model_name_or_path", model_name, run_config["base_model"])
    # The adapter fits the weights that it was trained against; after --base_weights bf16, those
    # are the original ones.
    nf4 = run_config["arguments"].get("base_weights") != "bf16"
    args.base = args.base or ("dequantised" if nf4 else "original")
    if args.base == "dequantised" and not nf4:
        raise UserError(
            "--base dequantised", f"{args.run_dir} was not trained in 4 bits", "leave it out"
        )
    adapter_sha256 = file_sha256(Path(args.run_dir, ADAPTER_WEIGHTS))
    if is_merged(args.output_dir, adapter_sha256, args.base):
        print(f"{args.output_dir} is there already, made of the same adapter: nothing to do")
        if args.push_to_hub:
            push(args.output_dir, args.push_to_hub)
        return
    check_output_dir(args.output_dir)
    texts = check_texts(args, run_config)
    base_folder = resolve_model_folder(model_name)
    check_base(base_folder, model_name, run_config["base_fingerprint"], args.run_dir)

    # These take seconds to import, which a complaint about the input should not have to wait for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of optional kernels not installed
    import torch
    from transformers import AutoConfig, GenerationConfig

    bf16 = run_config["arguments"]["mixed_precision"] == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    tokenizer = load_tokenizer(args.run_dir)
    prompt = prompt_of_run(tokenizer, run_config["prompt"], args.run_dir)

    # ------------------------------------------------------------------ merge under another name
    output_dir = Path(args.output_dir).absolute()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=f"{output_dir.name}.partial-", dir=output_dir.parent)
    temporary = Path(partial, "merged")
    temporary.mkdir()
    try:
        merge_adapter(base_folder, Path(args.run_dir), temporary, args.base, dtype)
        config = AutoConfig.from_pretrained(base_folder, **OWN_FILES_ONLY)
        config.dtype, config.use_cache = dtype, True
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # From scratch: what a base repository samples with would make the merged model random,
        # and may be invalid as it stands, so that nobody could save the model again.
        GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=prompt.max_title_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted(end_ids(tokenizer, base_generation_config(base_folder))),
            pad_token_id=tokenizer.eos_token_id,
        ).save_pretrained(temporary)
        run_config |= {
            "kind": "merged",
            "merged_base": args.base,
            "adapter_sha256": adapter_sha256,
            "merge_versions": versions(),
        }
        if texts:
            check = compare_logits(base_folder, nf4, args.run_dir, temporary, prompt, texts, dtype)
            run_config["merge_check"] = check
            print(
                f"logits of {len(texts)} prompts against base + adapter: relative difference "
                f"{check['relative_difference']:.2%}, same next token at "
                f"{check['same_next_token']:.1%} of {check['positions']:,} positions"
            )
        write_json(temporary / RUN_CONFIG, run_config)
        (temporary / CARD).write_text(model_card(run_config), encoding="utf-8")
        os.rename(temporary, output_dir)  # which was checked to be empty, if it is there
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"done: {args.output_dir}, adapter merged into the {args.base} base")
    if args.push_to_hub:
        push(args.output_dir, args.push_to_hub)


def merge_adapter(base_folder: Path, adapter_dir: Path, output_dir: Path, base: str, dtype) -> None:
    """Write the safetensors of base + adapter, tensor by tensor.

    Of each adapted layer W + (alpha / r) B A is computed in fp32 and rounded once, to `dtype`
    (LoRA, arXiv 2106.09685, section 4.1). Layers that were 4-bit in training are first rounded to
    NF4 and back if `base` is "dequantised", adapted or not: the adapter has learnt to live with it.

    Raises:
        UserError: a kind of adapter, or a layer of it, that this cannot merge.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    lora = load_file(adapter_dir / ADAPTER_WEIGHTS)
    scaling = lora_scaling(adapter_dir)
    quantized = quantized_weights(base_folder) if base == "dequantised" else set()
    # Where each tensor lies, and how large it becomes: the number of shards is in their names.
    sources, shapes = {}, {}
    for file in weight_files(base_folder):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - this is no dict
                shape = torch.Size(stream.get_slice(name).get_shape())
                sources[name] = (file, shape.numel() * dtype.itemsize)
                shapes[name] = shape
    adapted = {key.split(".lora_A.")[0] for key in lora if ".lora_A." in key}
    targets = {name.removeprefix("base_model.model.") + ".weight": name for name in adapted}
    if missing := (targets.keys() | quantized) - sources.keys():
        raise UserError(
            base_folder, f"no tensor {min(missing)} in its files", "merge with peft instead"
        )
    for name, target in sorted(targets.items()):
        a, b = (lora[f"{target}.lora_{matrix}.weight"].shape for matrix in "AB")
        if (b[0], a[1]) != shapes[name]:
            raise UserError(
                adapter_dir / ADAPTER_WEIGHTS,
                f"does not fit this base at {name}",
                "give the base it was trained on",
            )
    shards, filled = [[]], 0
    for name, (_, size) in sources.items():
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        merged = {}
        for name in names:
            with safe_open(sources[name][0], framework="pt") as stream:
                weight = stream.get_tensor(name)
            if weight.is_floating_point():
                weight = weight.to(dtype)
            if name in quantized:
                weight = round_to_nf4(weight.to(device)).cpu()
            if name in targets:
                a = lora[f"{targets[name]}.lora_A.weight"].float()  # [r, in]
                b = lora[f"{targets[name]}.lora_B.weight"].float()  # [out, r]
                weight = (weight.float() + scaling * (b @ a)).to(dtype)
            merged[name] = weight.contiguous()
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        save_file(merged, output_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(size for _, size in sources.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(output_dir / "model.safetensors.index.json", index)


def is_merged(output_dir: str, adapter_sha256: str, base: str) -> bool:
    """Return whether this adapter has been merged into this kind of base there before."""
    if not Path(output_dir, RUN_CONFIG).is_file():
        return False
    run_config = read_run_config(output_dir)
    found = (run_config.get("adapter_sha256"), run_config.get("merged_base"))
    return found == (adapter_sha256, base)


def weight_files(base_folder: Path) -> list[Path]:
    """Return the files that transformers reads; repositories may hold copies in other formats."""
    index = base_folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [base_folder / name for name in sorted(set(weight_map.values()))]
    return [base_folder / "model.safetensors"]


def base_generation_config(base_folder: Path):
    """Return the base's generation config, for the ends that it knows; None if it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base_folder, local_files_only=True)
    except OSError:
        return None


def lora_scaling(adapter_dir: Path) -> float:
    """Return alpha / r of a plain LoRA adapter.

    Raises:
        UserError: a variant whose product is scaled or composed in another way.
    """
    config = json.loads((adapter_dir / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise UserError(
                adapter_dir / ADAPTER_CONFIG,
                f"{name} is not supported here",
                "merge with peft's merge_and_unload instead",
            )
    return config["lora_alpha"] / config["r"]


def quantized_weights(base_folder: Path) -> set[str]:
    """Return the names of the weights that `modeling.load_base` holds in NF4."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from modeling import decoder_linears

    config = AutoConfig.from_pretrained(base_folder, **OWN_FILES_ONLY)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {f"{name}.weight" for name in decoder_linears(model)}


def round_to_nf4(weight):
    """Return a weight as a forward pass sees it after storage in NF4 with double quantization."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)


def compare_logits(base_folder, nf4, adapter_dir, merged_folder, prompt, texts, dtype) -> dict:
    """Return how far the merged model's logits are from those of base and adapter in training."""
    import torch

    from modeling import attach_adapter, load_base

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def logits(model):
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            ids = (torch.tensor([prompt.encode(text).ids], device=device) for text in texts)
            return torch.cat([model(input_ids=i, use_cache=False).logits[0].float() for i in ids])

    # One after the other, so that only one of the two is in memory.
    model = attach_adapter(load_base(str(base_folder), device, dtype, nf4), adapter_dir)
    reference = logits(model)
    del model
    merged = logits(load_base(str(merged_folder), device, dtype, nf4=False))
    return {
        "relative_difference": ((merged - reference).norm() / reference.norm()).item(),
        "same_next_token": (merged.argmax(-1) == reference.argmax(-1)).float().mean().item(),
        "positions": len(reference),
    }


def check_texts(args, run_config: dict) -> list[str]:
    """Return the articles to compare on: rows of a file, or a French sentence if there is none."""
    recorded = run_config["data"].get("validation", {}).get("path", "")
    file = args.check_file or (recorded if Path(recorded).is_file() else None)
    if args.check_rows == 0:
        return []
    if file is None:
        return [PROBE]
    columns = Columns(text=run_config["arguments"]["text_column"], title=None, id=None)
    if args.check_file:
        check_articles(file, columns)
    rows = zip(range(args.check_rows), iterate_articles(file, columns), strict=False)
    return [article["text"] for _, article in rows]


if __name__ == "__main__":
    run(main)
