"""Loading a base model and its adapter, the same way for training and inference.

Nothing about precision is assumed: what was asked for is checked on the loaded model.
"""

import copy
import functools
import json
import math
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.autograd.function import once_differentiable
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from exit_codes import UserError, note
from run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OWN_FILES_ONLY,
    RUN_CONFIG,
    find_run,
    first_line,
    read_adapter_config,
)

# The first is said by plan.py in its own words, the second by PEFT of PEFT's own calls, the third
# by torch 2.13 of DDP's, the last where a base has moved; that it is the right one, its fingerprint
# has told.
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated")
warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
if not sys.stderr.isatty():  # in a log, the bar of loading would stand before a complaint
    logging.disable_progress_bar()


def nf4_config(compute_dtype: torch.dtype, shardable: bool) -> BitsAndBytesConfig:
    """Return the QLoRA paper's 4-bit storage: NF4 with double quantization (section 3).

    If `shardable`, the same bytes pass for numbers in bf16: FSDP shards floating point alone.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.bfloat16 if shardable else torch.uint8,
    )


def load_base(
    folder: str, device: torch.device, dtype: torch.dtype, nf4: bool, shardable: bool = False
):
    """Return the frozen base in evaluation mode on one device.

    Args:
        folder: a local model folder with safetensors weights.
        device: where all of it goes (never "auto": one process, one device).
        dtype: of all that is not 4-bit, and of the products with 4-bit weights.
        nf4: store the decoder's linear layers in NF4; embeddings, norms and head stay in `dtype`.
        shardable: in main memory, whatever the device, from where FSDP takes a layer at a time: the
            device may have no room for all of them.
    """
    try:
        config = base_config(folder)
        quantized_before = getattr(config, "quantization_config", None) is not None
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            dtype=dtype,
            device_map={"": "cpu" if shardable else device},
            quantization_config=nf4_config(dtype, shardable) if nf4 else None,
            use_safetensors=True,
            **OWN_FILES_ONLY,
        )
    except torch.OutOfMemoryError:  # no fault of the files
        raise
    # Files that do not fit each other are a ValueError or a RuntimeError of transformers.
    except (OSError, SafetensorError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            folder, f"the model cannot be loaded ({first_line(error)})", "check its files"
        ) from None
    if info["missing_keys"]:  # transformers fills them with random values, and goes on
        raise UserError(
            folder,
            f"no weights for {min(info['missing_keys'])} in its files",
            "copy or download it again",
        )
    if nf4:
        try:
            check_nf4(model, dtype)
        except RuntimeError as error:
            problem, advice = "not all of it can be stored in NF4", "give --base_weights bf16"
            if quantized_before:
                problem = "it was quantized before, in another way"
                advice = "give the model that it was made of"
            raise UserError(folder, f"{problem} ({error})", advice) from None
        keep_gradients_on_cpu(model)
        if device.type == "cpu":
            # What is not in NF4 lies in the mapped file, all of which would stay resident for it.
            for parameter in model.parameters():
                if not hasattr(parameter, "quant_state"):
                    parameter.data = parameter.data.clone()
    model.requires_grad_(False)
    return model.eval()


def skeleton(folder: str, dtype: torch.dtype, tell: bool = False):
    """Return the model of a folder as `load_base` does, but without weights, on the meta device.

    If `tell`, a note says which dropout of the base is off.

    Raises:
        UserError: transformers cannot make such a model.
    """
    try:
        config = base_config(folder, tell)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            folder, f"the model cannot be made ({first_line(error)})", "check its config.json"
        ) from None
    return model.requires_grad_(False)


def base_config(folder: str, tell: bool = False):
    """Return the config of a base without the dropout that some were pretrained with.

    The base is frozen: `--lora_dropout` says all that is dropped. If `tell`, a note does too.
    """
    config = AutoConfig.from_pretrained(folder, **OWN_FILES_ONLY)
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # transformers 5.17's choice passes over soft caps
    off = []
    for part in (config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))):
        for name, value in vars(part).items():
            number = type(value) in (int, float) and 0 < value <= 1
            if number and "drop" in name and "classifier" not in name:
                off.append(f"{name} {value}")
                setattr(part, name, 0.0)
    if off and tell:
        note(f"the base's own dropout is off ({', '.join(off)}), --lora_dropout is all there is")
    return config


def check_kind(model, folder: str, nf4: bool, lora: bool, longest: int) -> None:
    """Refuse a base of a kind that this does not work with, before it is loaded.

    Args:
        model: of `skeleton`.
        folder: its name.
        nf4: whether it is to be quantized.
        lora: whether it is to have an adapter.
        longest: tokens of an article with its title.

    Raises:
        UserError: its layers cannot be stored in NF4, LoRA is not made for them here, or it has
            learnt positions for fewer tokens.
    """
    _check_layers(model, folder, nf4, lora)
    _check_positions(model, longest)


def _check_layers(model, folder: str, nf4: bool, lora: bool) -> None:
    if lora and not nf4 and getattr(model.config, "quantization_config", None) is not None:
        raise UserError(folder, "it was quantized before", "give the model that it was made of")
    layers = decoder_linears(model)
    convolutions = any(isinstance(module, Conv1D) for module in model.modules())
    if lora and (convolutions or not layers):
        kind = "Conv1D" if convolutions else "not linear"
        raise UserError(
            folder, f"its layers are {kind}, to which LoRA is not added here", "use another base"
        )
    # bitsandbytes takes the plain kind alone, or what it makes of others has another shape.
    others = {type(layer).__name__ for layer in layers.values()} - {"Linear"}
    if nf4 and (others or convolutions or not layers):
        kind = "Conv1D" if convolutions else min(others, default="other")
        raise UserError(
            folder, f"its {kind} layers cannot be stored in 4 bits", "give --base_weights bf16"
        )
    if nf4 and lora and hasattr(model.config.get_text_config(), "altup_coef_clip"):  # Gemma 3n
        problem = "it clips a weight as it trains, which 4 bits do not allow"
        raise UserError(folder, problem, "give --base_weights bf16")
    if nf4:
        plain = (torch.nn.Embedding, torch.nn.Linear)  # the head among them
        known = {id(p) for m in model.modules() if isinstance(m, plain) for p in m.parameters()}
        rest = {name: p.numel() for name, p in model.named_parameters() if id(p) not in known}
        if (share := sum(rest.values()) / model.num_parameters()) > 0.1:
            note(
                f"{share:.0%} of the weights are in no linear layer, such as "
                f"{max(rest, key=rest.get)}: they are neither stored in 4 bits nor adapted"
            )


def _check_positions(model, longest: int) -> None:
    """Refuse more tokens than there are learned positions; note where computed ones go on beyond
    what the base was trained on."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is None or longest <= most:
        return
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding))
    words = model.get_input_embeddings()
    # Some tables have rows before position 0 (OPT: 2).
    if any(most <= table.num_embeddings <= most + 2 for table in tables if table is not words):
        problem = f"this base has positions for {most:,} tokens, articles with titles {longest:,}"
        raise UserError("--max_length", problem, "give less")
    note(f"the base was made for {most:,} tokens; articles may have {longest:,} with their titles")


def check_ids(model, folder: str, largest_id: int) -> None:
    """Refuse ids of a tokenizer that the model has no embeddings for: a GPU would stop at them
    without a word of the reason.

    Raises:
        UserError: as said.
    """
    rows = len(model.get_input_embeddings().weight)
    if largest_id >= rows:
        problem = f"its tokenizer gave the id {largest_id:,}, and it has embeddings for {rows:,}"
        raise UserError(folder, problem, "use the tokenizer that it was trained with")


def decoder_linears(model) -> dict[str, torch.nn.Module]:
    """Return the linear layers but the head by name: what is 4-bit, and what LoRA may adapt."""
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: layer for name, layer in layers.items() if layer is not head}


def check_nf4(model, compute_dtype: torch.dtype) -> None:
    """Raise unless every linear layer but the head is NF4, doubly quantized, with this dtype.

    `BitsAndBytesConfig` swallows misspelt options and falls back to FP4 without double
    quantization, so the loaded layers are asked.
    """
    import bitsandbytes

    layers = decoder_linears(model)
    for name, layer in layers.items():
        if not isinstance(layer, bitsandbytes.nn.Linear4bit):
            raise RuntimeError(f"{name} is {type(layer).__name__}, not Linear4bit")
        state = layer.weight.quant_state
        found = (state.quant_type, state.nested, layer.compute_dtype)
        if found != ("nf4", True, compute_dtype):
            raise RuntimeError(f"{name} has (type, nested, compute dtype) {found}")
    if not layers:
        raise RuntimeError("no layer of this model was quantized")


def dequantize_base(model) -> None:
    """Replace each NF4 layer by an ordinary one with the weights that it multiplies by.

    A forward pass dequantizes them each time, so this computes the same, bit by bit, in less time
    and with four times the memory.
    """
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in decoder_linears(model).items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        with torch.device("meta"):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight = torch.nn.Parameter(weight.to(layer.compute_dtype), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain.train(layer.training))
    # What else asks whether the model is quantized would go by these.
    model.is_quantized = model.is_loaded_in_4bit = False
    model.quantization_method = model.hf_quantizer = None
    del model.config.quantization_config


def checkpoint_layers(model, every_n_layers: int) -> None:
    """Keep of every Nth layer its input alone, and compute it again in the backward pass; 0: none.

    Non-reentrant: the reentrant kind gives no gradient to LoRA below a frozen embedding.
    """
    if every_n_layers:
        # Its name before transformers 5.18.
        old_name = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", old_name)
        enable({"use_reentrant": False}, every_n_layers=every_n_layers)


def fuse_lora(model) -> None:
    """Replace PEFT's forward of each adapted layer by one that adds LoRA in its second product.

    PEFT's own forward pass goes over an output of the base four times more: to copy it where the
    base is 4-bit, to write B A x, to scale that, and to add the two; its backward pass scales the
    gradient, and copies inputs to the adapter's fp32, which autocast rounds to the same bf16 again.
    Here the sum is rounded once where it was three times, and dropout's factor goes into it; it is
    the same but for that.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = functools.partial(_lora_forward, module)


def _lora_forward(layer, x: torch.Tensor) -> torch.Tensor:
    """Return W x + scaling B A dropout(x), for `x` of [..., in]."""
    (name,) = layer.active_adapters
    output = layer.base_layer(x)
    dropout, a, scaling = layer.lora_dropout[name], layer.lora_A[name], layer.scaling[name]
    if dropout.training and getattr(dropout, "p", 0.0):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        low = DroppedProduct.apply(x, a.weight.to(x.dtype), dropout.p)
        scaling = scaling / (1 - dropout.p)  # here, where it costs nothing
    else:
        low = a(x)
    b = layer.lora_B[name].weight
    total = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), b.t(), alpha=scaling)
    return total.unflatten(0, output.shape[:-1])


class DroppedProduct(torch.autograd.Function):
    """A (m * x) with a new m of zeros, in a share p, and ones: dropout but for its 1 / (1 - p).

    For the gradients `x` and m are kept, not m * x. Layers share one `x` (those of queries, keys
    and values; gate and up), which is kept once where it needs no cast, and a byte a number for
    each layer's own m.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, a: torch.Tensor, p: float) -> torch.Tensor:
        """Return [..., rank] for `x` of [..., in] and `a` of [rank, in], of the same type."""
        # The same random numbers as those of torch's own dropout, on a CPU.
        m = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
        m = m.view(torch.uint8)  # by which CPUs multiply faster
        ctx.save_for_backward(x, a, m)
        return F.linear(x * m, a)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        x, a, m = ctx.saved_tensors
        grad_of_x = (grad @ a).mul_(m) if ctx.needs_input_grad[0] else None
        return grad_of_x, grad.flatten(0, -2).t() @ (x * m).flatten(0, -2), None


def leaves_unused(model) -> bool:
    """Return whether some of what trains gets no gradient from any text, such as LoRA on layers
    that look at pictures. It is tried, on two tokens."""
    model.train()  # some models pass a layer by only then
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    return unused


def round_lora(model, dtype: torch.dtype) -> None:
    """Store the matrices of an adapter that is trained no more in `dtype`."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def adapted_skeleton(model, lora_config: LoraConfig):
    """Return a copy of a model of `skeleton` with an adapter.

    Raises:
        UserError: PEFT adds no such adapter to it.
    """
    try:
        adapted = get_peft_model(copy.deepcopy(model), copy.deepcopy(lora_config))
        experts = any(isinstance(module, ParamWrapper) for module in adapted.modules())
    except ValueError as error:
        experts = "ParamWrapper" in str(error) or "fused" in str(error)
        if not experts:
            raise UserError("--target_modules", first_line(error), "name others") from None
    if experts:
        raise UserError(
            "--target_modules",
            "LoRA is not added here to the experts of this base",
            "name layers that are in none, such as q_proj k_proj v_proj o_proj",
        )
    return adapted


def check_targets(model, target_modules: list[str]) -> str | list[str]:
    """Return the names as `LoraConfig` takes them; refuse one that no layer but the head has.

    That excludes head and embeddings: where a model ties the two, LoRA on the one would be merged
    into the other as well. "all-linear" are those of the language model, where there are others
    such as a vision tower's, through which no title's gradient goes.

    Raises:
        UserError: as said.
    """
    layers = decoder_linears(model)
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    if target_modules == ["all-linear"]:
        if model.config.get_text_config(decoder=True) is model.config:
            return "all-linear"
        of_text = set(model.get_decoder().modules())
        return [name for name, layer in layers.items() if layer in of_text]
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise UserError(
                f"--target_modules {target}",
                "no linear layer of the decoder has this name",
                f"give all-linear, or some of {', '.join(kinds)}",
            )
    return target_modules


def keep_gradients_on_cpu(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    Since 0.49, the first forward in evaluation mode repacks the weight there for a faster
    kernel, and every later forward, training included, goes through that kernel, which autograd
    does not see: gradients of lower layers are silently wrong from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def attach_adapter(base, adapter_dir: str):
    """Return `base` with the adapter of a run, or of a checkpoint, frozen and in evaluation mode.

    Raises:
        UserError: the folder has no readable adapter, or one made for another base.
    """
    try:
        arguments = lora_arguments(adapter_dir)
        if (targets := arguments["target_modules"]) == "all-linear":
            arguments["target_modules"] = check_targets(base, [targets])
        model = get_peft_model(base, LoraConfig(**arguments))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        file = RUN_CONFIG if find_run(adapter_dir)[1] else ADAPTER_CONFIG
        raise UserError(adapter_dir, f"no usable {file} ({error})", "give a run folder") from None
    load_adapter_weights(model, Path(adapter_dir, ADAPTER_WEIGHTS))
    if all(not p.any() for n, p in model.named_parameters() if "lora_B" in n):
        note(f"the adapter in {adapter_dir} changes nothing (every lora_B is zero)")
    model.requires_grad_(False)
    return model.eval()


def load_adapter_weights(model, file: Path) -> None:
    """Fill the LoRA matrices of `model` from a file that must fit them name for name.

    PEFT only warns of missing keys, and the adapter then does nothing.

    Raises:
        UserError: unreadable file, or other names or shapes than the model's.
    """
    expected = {k: v.shape for k, v in adapter_state_dict(model).items()}
    try:
        with safe_open(file, framework="pt") as stream:
            keys = stream.keys()
            found = {key: torch.Size(stream.get_slice(key).get_shape()) for key in keys}
        if found == expected:
            set_peft_model_state_dict(model, load_file(file))
            return
    except (OSError, SafetensorError) as error:
        raise UserError(file, f"cannot be read ({error})", "restore the file") from None
    wrong = sorted(expected.items() ^ found.items())[0][0]
    raise UserError(file, f"does not fit this base at {wrong}", "give the base it was trained on")


def adapter_state_dict(model) -> dict[str, torch.Tensor]:
    """Return the LoRA matrices alone (PEFT would ask the Hub about embeddings by default)."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def lora_arguments(adapter_dir: str) -> dict:
    """Return the settings of an adapter on linear layers that decide what it computes: numbers and
    names of layers. Others name files, modules to import, or models, and no train.py sets them.

    Raises:
        ValueError: this is another kind of adapter, or one with other settings.
    """
    _, recorded = read_adapter_config(adapter_dir)
    if not isinstance(recorded, dict) or recorded.get("peft_type") != "LORA":
        found = recorded.get("peft_type") if isinstance(recorded, dict) else recorded
        raise ValueError(f"peft_type is {found!r}, not 'LORA'")
    chosen = {"task_type", "r", "lora_alpha", "lora_dropout", "target_modules"}
    chosen |= {"use_rslora", "rank_pattern", "alpha_pattern"}
    # How the matrices began does not matter, for they are loaded, unless the base became another by
    # it (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA); nor where the base lay.
    began = recorded.get("init_lora_weights", True)
    if type(began) is not bool and began not in ("gaussian", "orthogonal", "eva"):
        raise ValueError(f"init_lora_weights is {began!r}, which is not supported here")
    past = {"init_lora_weights", "inference_mode", "base_model_name_or_path", "revision"}
    past |= {"peft_version"}
    default = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    for name in sorted(default.keys() - chosen - past - {"peft_type", "auto_mapping"}):
        # PEFT leaves None, empty or false for what is not asked for.
        if (recorded.get(name, default[name]) or None) != (default[name] or None):
            raise ValueError(f"{name} is {recorded[name]!r}, which is not supported here")
    targets = recorded.get("target_modules")
    if not isinstance(targets, list):  # a string would be a regular expression
        raise ValueError(f"target_modules is {targets!r}, not a list of names")
    for name, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        pattern = recorded.get(name) or {}
        plain = isinstance(pattern, dict) and all(
            re.fullmatch(r"[\w.]+", key) and type(value) in kinds and value > 0
            for key, value in pattern.items()
        )
        if not plain:  # PEFT takes the names for regular expressions
            raise ValueError(f"{name} is {pattern!r}, not numbers above 0 by names of layers")
    alpha = recorded.get("lora_alpha", default["lora_alpha"])
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha is {alpha!r}, not a number")
    if type(recorded.get("use_rslora", False)) is not bool:
        raise ValueError(f"use_rslora is {recorded['use_rslora']!r}, not true or false")
    arguments = {"lora_alpha": alpha} | {name: recorded[name] for name in chosen & recorded.keys()}
    if targets == ["all-linear"]:  # as train.py records it
        arguments["target_modules"] = "all-linear"
    return arguments


def lora_rank(arguments: dict, layer: str) -> int:
    """Return the rank of a layer, by its name in the base, in what `lora_arguments` gave."""
    from peft.utils.other import get_pattern_key

    pattern = arguments.get("rank_pattern") or {}
    return pattern.get(get_pattern_key(pattern.keys(), layer), arguments.get("r", LoraConfig.r))


def lora_scaling(arguments: dict, layer: str, rank: int) -> float:
    """Return what the product B A of a layer is multiplied by: alpha / r, or alpha / sqrt(r) of
    rank-stabilized LoRA (arXiv 2312.03732).

    Args:
        arguments: of `lora_arguments`.
        layer: its name in the base.
        rank: of its matrices.
    """
    from peft.utils.other import get_pattern_key

    pattern = arguments.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), layer), arguments["lora_alpha"])
    return alpha / (math.sqrt(rank) if arguments.get("use_rslora") else rank)
