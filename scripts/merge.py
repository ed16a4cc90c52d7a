"""Merge an adapter into its base: an ordinary model folder that needs neither PEFT nor 4-bit.

    python scripts/merge.py --run_dir runs/titles --output_dir runs/titles-merged

The adapter is never added to 4-bit weights, which would be rounded once more. `--base` says to
which weights instead: `dequantised` are those that it was trained against, `original` those from
before the rounding to NF4. Tensors are read, merged and written one by one, in memory for one of
them; no GPU is needed.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from articles import Columns, check_articles, iterate_articles
from exit_codes import ArgumentParser, UserError, note, run, writing
from hub import check_hub, push
from libraries import quick_imports
from model_card import CARD, model_card
from prompting import PROBE, end_ids, load_tokenizer, prompt_of_run
from run_folder import (
    ADAPTER_WEIGHTS,
    OWN_FILES_ONLY,
    RUN_CONFIG,
    check_adapter,
    check_base,
    check_model_folder,
    check_output_dir,
    file_sha256,
    find_run,
    first_line,
    flush,
    note_override,
    read_adapter_config,
    read_run_config,
    resolve_model_folder,
    versions,
    weight_files,
    write_json,
)

# Of safetensors' types: bytes of a number.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
BYTES = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_SHARD_BYTES = 4 << 30  # of a weight file that is written
CHECK_POSITIONS = 64  # at the end of each prompt, where titles begin: whose logits are compared


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--run_dir", required=True, help="folder of train.py, or a checkpoint in it")
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
    run_dir, checkpoint = find_run(args.run_dir)
    adapter_dir = checkpoint or run_dir
    run_config = read_run_config(run_dir)
    if run_config["kind"] != "adapter":
        raise UserError(args.run_dir, f"no {ADAPTER_WEIGHTS} to merge", "give a folder of train.py")
    model_name = args.model_name_or_path or run_config["base_model"]
    check_model_folder(model_name, None if args.model_name_or_path else run_dir)
    adapter_step = check_adapter(run_dir, checkpoint)
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
    adapter_sha256 = file_sha256(Path(adapter_dir, ADAPTER_WEIGHTS))
    if is_merged(args.output_dir, adapter_sha256, args.base):
        print(f"{args.output_dir} is there already, made of the same adapter: nothing to do")
        if args.push_to_hub:
            push(args.output_dir, args.push_to_hub)
        return
    check_output_dir(args.output_dir, own_files=())
    if os.path.ismount(args.output_dir):
        raise UserError(
            args.output_dir, "another file system begins here", "give a folder within it"
        )
    texts = check_texts(args, run_config)
    base_folder = resolve_model_folder(model_name)
    check_base(base_folder, model_name, run_config["base_fingerprint"], run_dir)
    check_fit(base_folder, Path(adapter_dir))

    # These take seconds to import, which a complaint about the input should not have to wait for.
    with quick_imports():
        import torch
        from transformers import AutoConfig, GenerationConfig

        from modeling import lora_arguments

    try:
        lora_arguments(adapter_dir)
    except ValueError as error:
        file, _ = read_adapter_config(adapter_dir)
        raise UserError(file, str(error), "merge with peft's merge_and_unload") from None
    bf16 = run_config["arguments"]["mixed_precision"] == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    tokenizer = load_tokenizer(run_dir)
    prompt = prompt_of_run(tokenizer, run_config["prompt"], run_dir)

    # ------------------------------------------------------------------ merge under another name
    output_dir = Path(args.output_dir).resolve()  # it may be a link
    weights = Weights(base_folder, Path(adapter_dir), dtype, nf4)
    with partial_folder(output_dir) as temporary:
        # In the files' first bytes, so that `model_fingerprint` tells this model from others.
        weights.write(temporary, args.base, {"merged": f"{adapter_sha256} {args.base}"})
        with writing(args.output_dir):
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
            "adapter_step": adapter_step,
            "merge_versions": versions(),
        }
        unknown = {n for n, _ in weights.model.named_parameters()} - weights.stored.keys()
        if texts and unknown:  # transformers has other names for them once they are loaded
            note(f"no check: {min(unknown)} has another name in the base's files")
        elif texts:
            prompts = [example.ids for example in prompt.encode_all(texts)]
            check = try_check(weights, temporary, args.base, prompts, tokenizer.eos_token_id)
            if check:
                run_config["merge_check"] = check.pop(args.base)
                others = {f"{base}_base": found for base, found in check.items()}
                run_config["merge_check"] |= others
                describe_check(run_config["merge_check"], args.base, len(texts))
        config = AutoConfig.from_pretrained(base_folder, **OWN_FILES_ONLY)
        config.dtype, config.use_cache = dtype, True
        with writing(args.output_dir):
            write_json(temporary / RUN_CONFIG, run_config)
            (temporary / CARD).write_text(model_card(run_config), encoding="utf-8")
            config.save_pretrained(temporary)  # last, see `partial_folder`
            os.rename(temporary, output_dir)  # which was checked to be empty, if it is there
    print(f"done: {args.output_dir}, adapter merged into the {args.base} base")
    if args.push_to_hub:
        push(args.output_dir, args.push_to_hub)


@contextmanager
def partial_folder(output_dir: Path):
    """Give a folder to write to, beside the one that it becomes, and remove what is left of it.

    It lies in another, whose name says what it is. Even where this process is killed, what is left
    is no model, for config.json comes last. SIGTERM ends a merge as Ctrl-C and an error do: with
    nothing left.
    """
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with writing(output_dir):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(prefix=f"{output_dir.name}.partial-", dir=output_dir.parent)
    temporary = Path(partial, "merged")
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def check_fit(base_folder: Path, adapter_dir: Path) -> None:
    """Refuse an adapter that this cannot merge, or of another base, by its names and shapes.

    Raises:
        UserError: as said.
    """
    file, config = read_adapter_config(str(adapter_dir))
    for name in ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save"):
        if isinstance(config, dict) and config.get(name):
            raise UserError(
                file,
                f"{name} is not supported here",
                "merge with peft's merge_and_unload instead",
            )
    if json.loads((base_folder / "config.json").read_bytes()).get("quantization_config"):
        raise UserError(
            base_folder, "its files are quantized already", "merge with peft's merge_and_unload"
        )
    lora = shapes_in([adapter_dir / ADAPTER_WEIGHTS])
    for name in sorted(lora):
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UserError(
                adapter_dir / ADAPTER_WEIGHTS,
                f"{name} is no matrix of LoRA on a linear layer",
                "merge with peft's merge_and_unload instead",
            )
    base = shapes_in(weight_files(base_folder))
    for layer, key in sorted(adapted_layers(lora).items()):
        name = f"{layer}.weight"
        # Where it has another name in the files, `Weights` looks again.
        check_shapes(lora, key, base.get(name), adapter_dir / ADAPTER_WEIGHTS, name)


def check_shapes(lora, key: str, shape: tuple[int, ...] | None, file: Path, name: str) -> None:
    """Refuse two matrices that do not fit each other, or a weight of this shape if it is known."""
    a, b = (lora.get(f"{key}.lora_{matrix}.weight", (0, 0)) for matrix in "AB")
    if a[0] != b[1] or (b[0], a[1]) != (shape or (b[0], a[1])):
        problem = f"does not fit this base at {name}"
        raise UserError(file, problem, "give the base it was trained on")


def shapes_in(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors by name, which takes no reading of them."""
    from safetensors import safe_open

    shapes = {}
    for file in files:
        with safe_open(file, framework="np") as stream:
            names = stream.keys()
            shapes |= {name: tuple(stream.get_slice(name).get_shape()) for name in names}
    return shapes


def adapted_layers(lora) -> dict[str, str]:
    """Return how an adapter's keys begin, by the name of the layer in the base."""
    keys = {key.split(".lora_")[0] for key in lora}
    return {key.removeprefix("base_model.model."): key for key in keys}


@dataclass
class Weights:
    """The tensors of base and adapter, read when they are asked for and then let go of.

    Args:
        base_folder: with safetensors.
        adapter_dir: a run folder or a checkpoint that `check_fit` has passed.
        dtype: of all that is computed and written.
        nf4: whether the run trained against weights rounded to NF4.

    Raises:
        UserError: a layer that was 4-bit in training has no tensor of its own in the files.
    """

    base_folder: Path
    adapter_dir: Path
    dtype: object
    nf4: bool

    def __post_init__(self):
        import torch

        from modeling import decoder_linears, lora_arguments, lora_rank

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.files = {}
        for file in weight_files(self.base_folder):
            self.files |= dict.fromkeys(shapes_in([file]), file)
        self.arguments = lora_arguments(str(self.adapter_dir))
        adapter = self.adapter_dir / ADAPTER_WEIGHTS
        lora = shapes_in([adapter])
        self.layers = adapted_layers(lora)
        self.model = empty_model(self.base_folder, self.dtype)
        self.tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.stored = stored_names(self.model, self.tensors, self.files)
        self.loaded = {stored: name for name, stored in self.stored.items()}
        # What transformers keeps in fp32 whatever it is asked for, such as biases of routers.
        patterns = [p.replace("*", ".*") for p in self.model._get_dtype_plan(self.dtype)]
        self.in_fp32 = re.compile("|".join(patterns) or r"(?!)")  # (?!) matches nothing
        linear = {n for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear)}
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        tied = head is not None and head.weight is embedding.weight
        for layer in sorted(self.layers):
            if layer not in linear or (tied and self.model.get_submodule(layer) is head):
                kind = "the embedding too" if layer in linear else "no linear layer"
                raise UserError(
                    adapter,
                    f"it adapts {layer}, which is {kind} in this base",
                    "merge with peft's merge_and_unload instead",
                )
            self._require(f"{layer}.weight")
            shape = tuple(self.model.get_submodule(layer).weight.shape)
            check_shapes(lora, self.layers[layer], shape, adapter, f"{layer}.weight")
            rank = lora[f"{self.layers[layer]}.lora_A.weight"][0]
            if rank != lora_rank(self.arguments, layer):
                raise UserError(
                    read_adapter_config(str(self.adapter_dir))[0],
                    f"says another rank of {layer} than its matrices have",
                    "restore the file",
                )
        quantized = decoder_linears(self.model) if self.nf4 else {}
        self.quantized = {self._require(f"{name}.weight") for name in sorted(quantized)}

    def _require(self, name: str) -> str:
        """Return what the files call a parameter; refuse one that they do not have as it is."""
        if name not in self.stored:
            problem = f"no tensor {name} in its files"
            raise UserError(self.base_folder, problem, "merge with peft instead")
        return self.stored[name]

    def base(self, name: str, dequantised: bool):
        """Return a tensor of the base, rounded to NF4 and back if it was 4-bit in training.

        Tensors go by their names in the base's files, here and in `merged`.
        """
        weight = read_tensor(self.files[name], name).to(self.device)
        if weight.is_floating_point():
            weight = weight.to(self._dtype(name))
        return round_to_nf4(weight) if dequantised and name in self.quantized else weight

    def lora(self, layer: str):
        """Return A [r, in], B [out, r], both fp32, and the scaling of an adapted layer; or None."""
        from modeling import lora_scaling

        if layer not in self.layers:
            return None
        file, key = self.adapter_dir / ADAPTER_WEIGHTS, self.layers[layer]
        a, b = (
            read_tensor(file, f"{key}.lora_{matrix}.weight").float().to(self.device)
            for matrix in "AB"
        )
        return a, b, lora_scaling(self.arguments, layer, len(a))

    def merged(self, name: str, base: str):
        """Return a tensor of base + adapter.

        Of each adapted layer W + scaling B A is computed in fp32, from W as it was in training, and
        rounded once (LoRA, arXiv 2106.09685, section 4.1). Layers that were 4-bit in training are
        first rounded to NF4 and back if `base` is "dequantised", adapted or not: the adapter has
        learnt to live with it.
        """
        import torch

        weight = self.base(name, base == "dequantised")
        layer = self.loaded.get(name, name).removesuffix(".weight")
        if (lora := self.lora(layer)) is not None:
            a, b, scaling = lora
            with torch.autocast(self.device.type, enabled=False):  # in which the check runs
                product = b @ a
            product.mul_(scaling).add_(weight)  # in place: it may be large
            weight = product.to(weight.dtype)
        return weight

    def write(self, folder: Path, base: str, metadata: dict[str, str]) -> None:
        """Write all tensors of base + adapter, in shards, each tensor as soon as it is computed.

        `metadata` goes into each file's header.

        Raises:
            UserError: the disk is full.
        """
        shapes, shards, filled = {}, [[]], 0
        for file in dict.fromkeys(self.files.values()):
            shapes |= shapes_in([file])
        sizes = {name: self._header(name, shapes[name], 0)[1] for name in self.files}
        for name, size in sizes.items():
            if shards[-1] and filled + size > MAX_SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else file
            weight_map |= dict.fromkeys(names, file)
            header, end = {"__metadata__": {"format": "pt"} | metadata}, 0
            for name in names:
                header[name], end = self._header(name, shapes[name], end)
            header = json.dumps(header).encode()
            header += b" " * (-len(header) % 8)
            with (
                writing(folder / file, 8 + len(header) + end),
                open(folder / file, "wb", buffering=0) as stream,
            ):
                stream.write(len(header).to_bytes(8, "little") + header)
                for name in names:
                    write_tensor(stream, self.merged(name, base))
                flush(folder / file)  # a network disk may say only now that it is full
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            with writing(folder):
                write_json(folder / "model.safetensors.index.json", index)

    def _dtype(self, name: str):
        """Return the type that a tensor of floating point has in training."""
        import torch

        loaded = self.loaded.get(name, name)
        if self.in_fp32.search(loaded):
            return torch.float32
        known = loaded in self.tensors and self.tensors[loaded].is_floating_point()
        return self.tensors[loaded].dtype if known else self.dtype

    def _header(self, name: str, shape: tuple[int, ...], start: int) -> tuple[dict, int]:
        """Return what a safetensors file says of a tensor, and where its bytes end."""
        dtype = stored_dtype(self.files[name], name)
        if dtype not in BYTES:
            raise UserError(self.files[name], f"{name} is {dtype}", "convert the base to BF16")
        if dtype in FLOATS:
            dtype = {2: "BF16", 4: "F32", 8: "F64"}[self._dtype(name).itemsize]
        end = start + math.prod(shape) * BYTES[dtype]
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}, end


def stored_names(model, tensors: dict, files) -> dict[str, str]:
    """Return what files of a base call the tensors of its model, without those that transformers
    makes of several. It has other names for some families' once they are loaded.

    Args:
        model: without weights.
        tensors: its parameters and buffers by name.
        files: names of what is in the files.
    """
    from transformers.core_model_loading import revert_weight_conversion

    saved = {id(t): name for name, t in revert_weight_conversion(model, tensors).items()}
    prefix = f"{model.base_model_prefix}."  # missing where a model was saved without its head
    stored = {}
    for name, tensor in tensors.items():
        others = (name, saved.get(id(tensor)), name.removeprefix(prefix))
        if found := next((other for other in others if other in files), None):
            stored[name] = found
    return stored


def stored_dtype(file: Path, name: str) -> str:
    from safetensors import safe_open

    with safe_open(file, framework="np") as stream:
        return stream.get_slice(name).get_dtype()


def read_tensor(file: Path, name: str):
    """Return a tensor of a file. The file is mapped anew for each: what is mapped counts as this
    process's memory until then."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        return stream.get_tensor(name).clone()


def write_tensor(stream, tensor) -> None:
    import torch

    content = memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    while content:
        content = content[stream.write(content) :]


def is_merged(output_dir: str, adapter_sha256: str, base: str) -> bool:
    """Return whether this adapter has been merged into this kind of base there before."""
    if not Path(output_dir, RUN_CONFIG).is_file():
        return False
    run_config = read_run_config(output_dir)
    found = (run_config.get("adapter_sha256"), run_config.get("merged_base"))
    return found == (adapter_sha256, base)


def base_generation_config(base_folder: Path):
    """Return the base's generation config, for the ends that it knows; None if it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(base_folder, local_files_only=True)
    except OSError:
        return None


def empty_model(base_folder: Path, dtype):
    """Return the base without weights, in evaluation mode; the few buffers that it computes itself
    are there."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base_folder, **OWN_FILES_ONLY)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
    model.tie_weights()
    return model.eval()


def round_to_nf4(weight):
    """Return a weight as a forward pass sees it after storage in NF4 with double quantization."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)


def compare_logits(
    weights: Weights, merged_folder: Path, base: str, prompts: list[list[int]], pad_id: int
) -> dict[str, dict]:
    """Return how far logits of the merged model are from those of base and adapter in training, by
    base: of the one that was written, as it lies there, and of the other that might have been.

    The models run layer by layer, on all prompts together, with one module's weights in memory.
    """
    import torch

    from decoding import pad_left

    model, written = weights.model, {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(weights.device))
    for file in weight_files(merged_folder):
        written |= dict.fromkeys(shapes_in([file]), file)
    bases = ("dequantised", "original") if weights.nf4 else ("original",)
    stored = weights.stored
    sources = {None: lambda name: weights.base(stored[name], weights.nf4)}
    sources |= {
        which: lambda name, which=which: weights.merged(stored[name], which) for which in bases
    }
    sources[base] = lambda name: read_tensor(written[stored[name]], stored[name]).to(weights.device)
    ids, mask = pad_left(prompts, pad_id, weights.device)
    keep = min(CHECK_POSITIONS, ids.shape[1])
    counted = mask[:, -keep:].bool()

    def logits(source, lora):
        with streamed(model, source, lora), torch.no_grad():
            bf16 = weights.dtype == torch.bfloat16
            with torch.autocast(weights.device.type, torch.bfloat16, enabled=bf16):
                output = model(
                    input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep
                )
            return output.logits[:, -keep:][counted].float()

    reference = logits(sources.pop(None), weights.lora)
    if not reference.isfinite().all():
        raise ValueError("the logits of base and adapter are not finite")
    found = {}
    for which, source in sources.items():
        merged = logits(source, lambda layer: None)
        same = (merged.argmax(-1) == reference.argmax(-1)).float().mean()
        found[which] = {
            "relative_difference": ((merged - reference).norm() / reference.norm()).item(),
            "same_next_token": same.item(),
            "positions": len(reference),
        }
    return found


def try_check(*arguments) -> dict[str, dict] | None:
    """Return what `compare_logits` does, or None and a note where it cannot be done: a model may
    use a module's weights without calling it, and has none then."""
    try:
        found = compare_logits(*arguments)
    except Exception as error:  # whatever its code makes of that; the merge is done without
        note(f"no check: this model does not run one layer at a time ({first_line(error)})")
        return None
    if all(math.isfinite(check["relative_difference"]) for check in found.values()):
        return found
    note("the merged model's logits are not finite: look at its titles")
    return None


def describe_check(check: dict, base: str, rows: int) -> None:
    other = {"dequantised": "original", "original": "dequantised"}[base]
    for which, found in ((base, check), (other, check.get(f"{other}_base"))):
        if found:
            print(
                f"logits of {rows} prompts, {which} base, against base + adapter: relative "
                f"difference {found['relative_difference']:.2%}, same next token at "
                f"{found['same_next_token']:.1%} of {found['positions']:,} positions"
            )


@contextmanager
def streamed(model, source: Callable, lora: Callable):
    """Let a model without weights run: each module gets its own from `source(name)` when it is
    called, and its LoRA from `lora(layer)`, and loses them afterwards.

    Tensors that are tied are one: they are asked for under the name that comes first.
    """
    import torch
    import torch.nn.functional as F

    names = {id(p): name for name, p in model.named_parameters()}
    hooks = []

    def stream(module_name, module):
        own = dict(module.named_parameters(recurse=False))

        def fill(*_):
            for key, empty in own.items():
                weight = source(names[id(empty)])
                setattr(module, key, torch.nn.Parameter(weight, requires_grad=False))

        def empty_again(_, inputs, output):
            for key, empty in own.items():
                setattr(module, key, empty)
            if (matrices := lora(module_name)) is None:
                return output
            a, b, scaling = matrices
            return output + F.linear(F.linear(inputs[0], a), b) * scaling  # as PEFT, in autocast

        if own:
            hooks.append(module.register_forward_pre_hook(fill))
            hooks.append(module.register_forward_hook(empty_again))

    for module_name, module in model.named_modules():
        stream(module_name, module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    try:
        return [article["text"] for _, article in rows]
    except UserError as error:
        if args.check_file:
            raise
        note(f"{error}; a sentence is compared instead")  # nobody has asked for this file
        return [PROBE]


if __name__ == "__main__":
    run(main)
