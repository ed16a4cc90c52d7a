"""How much memory training takes: expected before anything is loaded, and as it was.

What is expected is counted: the largest micro-batch of the run goes forward and backward through
the model with torch's fake tensors, which have shapes and no content, and what lives at a time is
added up. That takes no memory and, for a 7B, some seconds for each layout that is looked at.
"""

import copy
import functools
import logging
import os
import sys
import weakref
from contextlib import suppress

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batching import MicroBatchSize, pack, pad_left
from exit_codes import UserError
from machine import free_memory, resident_memory
from modeling import checkpoint_layers, decoder_linears, fuse_lora
from packing import PACKED
from prompting import Example
from sharding import layers_of

# A model that does not go through, such as one with experts, is told of by plan.py.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
WAYS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}  # QLoRA paper, figure 1
# Bytes per weight of NF4 with double quantization: blocks of 64, then of 256 (QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
MOMENTS = 8  # bytes of AdamW's two, in fp32, per weight that trains
# On a CPU what counts is the resident set. Beside what it is when the plan is made, and what is in
# use, there are what libraries have yet to load, the kernels that libraries.py lets them keep, and
# holes that glibc leaves between tensors which come and go.
# Fitted to runs of SmolLM2-135M on 2 cores (tests/benchmarks/README.md).
CPU_EXTRA = int(0.25 * 2**30)
HOLES = 1.4  # times what is in use
UNTUNED_HOLES = 1.6  # where glibc is not told what scripts/launch.sh tells it
# In what layers of a kind may differ: their place, and whether they are checkpointed.
NOT_OF_A_KIND = {"layer_idx", "gradient_checkpointing", "activation_checkpointing"}


def plan_memory(
    base,
    lora_config,
    args,
    device,
    size: MicroBatchSize,
    shards: int = 1,
    room: int | None = None,
    resident: int | None = None,
) -> dict:
    """Return which layers to checkpoint, and what training will take, for run_config.json.

    Args:
        base: `modeling.skeleton` of the base.
        lora_config: of the run.
        args: of train.py.
        device: a torch.device, where the run is going to be.
        size: of `plan.largest_micro_batch`.
        shards: processes that the model is spread over; what is told is that of each.
        room: bytes that there were for all of it; None: those that there are now.
        resident: bytes that this process took at that time; None: those that it takes now.

    Returns:
        `device`: its type; `shards`: as given.
        `checkpointed_every`: N for every Nth layer, 0 for none; as asked for, or the least with
        which all that is still to come fits into nine tenths of the memory that is free.
        `estimate`: the peak expected of each of WAYS, in bytes, None where the model does not go
        through this; `this_run`: that of this run.
    """

    @functools.cache  # QLoRA differs from LoRA in the base's weights only
    def traced(full: bool, every: int):
        return trace(base, lora_config, args, device, size, full, every, shards)

    def peak(way: str, every: int) -> int | None:
        return expected_peak(traced(way == "full", every), base, device, way, shards, resident)

    room = free_memory(device) if room is None else room
    resident = resident_memory(device) if resident is None else resident
    way = "qlora" if args.base_weights == "nf4" else "lora"  # dequantized, it is as large as that
    asked = args.activation_checkpointing
    choices = (0, 4, 2, 1) if asked == "auto" else (int({"none": 0, "full": 1}.get(asked, asked)),)
    if not base.supports_gradient_checkpointing:  # as transformers calls it
        if choices[-1] and asked != "auto":
            problem = "transformers knows none for this model"
            raise UserError(f"--activation_checkpointing {asked}", problem, "leave it out")
        choices = (0,)
    for every in choices:
        found = peak(way, every)
        if found is not None and found - resident < 0.9 * room:
            break
    estimate = {other: found if other == way else peak(other, every) for other in WAYS}
    record = {"device": device.type, "shards": shards, "checkpointed_every": every}
    return record | {"estimate": estimate, "this_run": found}


def trace(base, lora_config, args, device, size, full: bool, every: int, shards: int):
    """Return the model without its weights, the bytes beside them that live at a time in a forward
    and backward pass, and those of them that were there before it; None if it does not go through.
    """

    def prepared(number: int | None):
        """Return the model of the run, with so many of its layers, or all."""
        model = copy.deepcopy(base)
        if number is not None:
            keep_layers(model, number)
        if not size.padded_rows:
            model.set_attn_implementation(PACKED)
        if full:
            model.float().requires_grad_(True)
        else:
            model = get_peft_model(model, lora_config)
            fuse_lora(model)
        checkpoint_layers(model, every)
        return model.train()

    kinds = dict.fromkeys((device.type, "cpu"))  # the shapes are the same on both
    period, num_layers = every or 1, len(layers_of(base))
    # Of many layers that are alike, a few are enough: each period more adds the same to what lives
    # in the forward pass, and soon after it (where gradients do not grow faster than activations
    # go) or at the end (where they do). The last layer has no other's activations beside it in the
    # backward pass, so two periods come before the border between these two.
    few = 3 * period + num_layers % period
    more = (num_layers - few) // period

    def of_a_few(kind: str) -> tuple[int, int]:
        shorter = (prepared(number) for number in (few, few + period))
        found = [_in_use(model, args, kind, size, shards, border=period) for model in shorter]
        # An error here, if a backward pass did not come to the border, is one of those below.
        forward, backward, end, stay = (a + (b - a) * more for a, b in zip(*found, strict=True))
        return max(forward, backward, end), stay

    for kind in kinds:
        with suppress(Exception):  # whatever a model does that cannot be done without content
            model = prepared(None)
            if alike(model) and 2 * few + period < num_layers:
                with suppress(Exception):
                    return model, *of_a_few(kind)
            return model, *_in_use(model, args, kind, size, shards)
    return None


def alike(model) -> bool:
    """Return whether the decoder layers of a model are in one list, and of one kind."""
    layers, config = layers_of(model), model.config.get_text_config(decoder=True)

    def signature(layer):
        shapes = [(name, p.shape, p.dtype) for name, p in layer.named_parameters()]
        settings = [
            (name, key, value)
            for name, module in layer.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and key not in NOT_OF_A_KIND
        ]
        return type(layer), *shapes, *settings

    lists = [module for module in model.modules() if _is_list_of(module, layers)]
    one_type = len(set(getattr(config, "layer_types", None) or ())) < 2
    return len(lists) == 1 and one_type and len({signature(layer) for layer in layers}) == 1


def keep_layers(model, number: int) -> None:
    """Leave so many decoder layers of a model whose layers are `alike`."""
    layers = layers_of(model)
    for module in list(model.modules()):
        if _is_list_of(module, layers):
            del module[number:]
    model.config.get_text_config(decoder=True).num_hidden_layers = number


def _is_list_of(module, layers) -> bool:
    return isinstance(module, torch.nn.ModuleList) and list(module) == layers


def expected_peak(traced, base, device, way: str, shards: int, resident: int) -> int | None:
    """Return the bytes that training in one of WAYS takes at its peak; see `plan_memory`.

    On a GPU they are those allocated there; on a CPU, the whole resident set. What AdamW updates
    is in fp32: all weights in full fine-tuning, else the adapter's.

    Args:
        traced: of `trace`, with all weights training or with LoRA beside them.
        resident: as in `plan_memory`.
    """
    if traced is None:
        return None
    model, in_use, stay = traced
    fixed = sum(p.nbytes + MOMENTS * p.requires_grad * p.numel() for p in model.parameters())
    if way == "qlora":
        weights = [layer.weight for layer in decoder_linears(base).values()]
        fixed -= sum((weight.itemsize - NF4_BYTES) * weight.numel() for weight in weights)
        # The largest is dequantized for a product, by two steps.
        in_use += 2 * max(weight.numel() for weight in weights) * base.dtype.itemsize
    if shards > 1:
        fixed = _per_shard(model, way, shards)
    if device.type == "cpu":
        tuned = "tcache_count=0" in os.environ.get("GLIBC_TUNABLES", "")
        holes = HOLES if tuned else UNTUNED_HOLES
        return int(resident + CPU_EXTRA + fixed + stay + holes * (in_use - stay))
    return int(fixed + in_use)


def _per_shard(model, way: str, shards: int) -> float:
    """Return the bytes beside activations that one process has under FSDP.

    Its share of weights, gradients and moments; the scales of 4-bit blocks, which are not sharded;
    two layers all-gathered, for the next is fetched while one is at work, with gradients on their
    way; and all that is in no layer, such as embeddings and head.
    """
    head = model.get_output_embeddings()

    def sizes(module) -> tuple[float, float, int]:
        """Return the bytes of weights that are sharded, of scales, and the number that trains."""
        parameters = list(module.parameters())
        size, scales = sum(p.nbytes for p in parameters), 0.0
        for layer in module.modules() if way == "qlora" else ():
            frozen = isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad
            if frozen and layer is not head:
                size -= (layer.weight.itemsize - 0.5) * layer.weight.numel()
                scales += (NF4_BYTES - 0.5) * layer.weight.numel()
        return size, scales, sum(p.numel() for p in parameters if p.requires_grad)

    size, scales, trained = sizes(model)
    layers = [sizes(layer) for layer in layers_of(model)]
    together = 2 * max(s + 4 * t for s, _, t in layers) + size - sum(s for s, _, _ in layers)
    return (size + (4 + MOMENTS) * trained) / shards + scales + together


def _in_use(
    model, args, kind: str, size: MicroBatchSize, shards: int, border: int | None = None
) -> tuple[int, ...]:
    """Return the bytes beside the weights that live at a time, in a forward and backward pass, and
    those of them that were there before it: gradients, to which it adds.

    With the index of a layer as `border`, there are three numbers for the first: in the forward
    pass, in the backward pass until it has gone through that layer, and from then on. Without
    gradients, which are given away as soon as they exist, where there are `shards`.
    """
    rows, num_prompt_ids = size.padded_rows or 1, size.tokens - size.labels
    examples = [Example([0] * (size.tokens // rows), num_prompt_ids // rows, False)] * rows
    batch = (pad_left if size.padded_rows else pack)(examples, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):  # those on meta, until they are moved
        model.to_empty(device=kind)
        model.tie_weights()  # anew: tied ones have become two
        trainable = [p for p in model.parameters() if p.requires_grad]
        for parameter in trainable if shards > 1 else ():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        # Not by `packing.send`: memory of fake tensors cannot be pinned.
        batch = {k: v.to(kind) if torch.is_tensor(v) else v for k, v in batch.items()}
        if kind == "cpu":  # attention would ask for the borders' values, and rounds up little
            batch.pop("cu_seq_lens_q", None)
        with _Count(model) as count:
            if border is not None:
                _call_after_backward(layers_of(model)[border], count.reset_peak)
            if args.gradient_accumulation_steps > 1 and shards == 1:
                for parameter in trainable:
                    parameter.grad = torch.empty_like(parameter)  # of micro-batches before
            stay = count.now
            with torch.autocast(kind, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                labels = batch.pop("labels").flatten()  # as in `title_loss` of train.py
                logits = model(**batch, use_cache=False).logits.flatten(0, -2)
                loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            if border is not None:
                count.reset_peak()
            loss.backward()
    return *count.peaks, count.peak, stay


def _call_after_backward(layer, function) -> None:
    """Call a function once the backward pass has gone through a layer."""

    def hook(_, args, kwargs):
        handle.remove()  # before a checkpointed layer is computed again
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        hidden.register_hook(lambda _: function())

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)


class _Count(TorchDispatchMode):
    """Counts the bytes of all storages that come to be and are not freed, but a model's own."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.peaks = []  # before each `reset_peak`
        weights = [*model.parameters(), *model.buffers()]
        self.living = {weight.untyped_storage()._cdata: 0 for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.living:
                    self.living[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def reset_peak(self) -> None:
        self.peaks.append(self.peak)
        self.peak = self.now

    def _freed(self, key: int) -> None:
        self.now -= self.living.pop(key)


def peak_memory(device: torch.device) -> int:
    """Return the peak so far in bytes: allocated on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_peak(device: torch.device) -> str:
    """Return `peak_memory` in words; of a GPU, what torch had reserved for it too."""
    peak = f"{peak_memory(device) / 2**30:.1f} GiB"
    if device.type != "cuda":
        return f"{peak} resident"
    return f"{peak} on the GPU, {torch.cuda.max_memory_reserved(device) / 2**30:.1f} with the gaps"
