"""One model spread over several processes: FSDP-QLoRA, as accelerate_configs/fsdp.yaml asks for it.

It is FSDP2, which shards tensor by tensor. A layer's 4-bit base, bf16 norms and fp32 adapter keep
their types, so a sharded run computes what one process does. (FSDP1 makes one flat tensor of a
layer; all of it would have to be bf16, the adapter and what AdamW updates included.)
"""

import copy
import os
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

from exit_codes import UserError

# What train.py counts on: key of fsdp_config, what it must be, what it is if nobody says, and why.
SETTINGS = (
    ("version", "2", "1", "a layer's 4-bit base and fp32 adapter would have to be of one type"),
    ("auto_wrap_policy", "transformer_based_wrap", "no_wrap", "all would be all-gathered at once"),
    ("reshard_after_forward", "true", "true", "all layers would stay all-gathered"),
    ("cpu_ram_efficient_loading", "false", "false", "weights would be empty beyond one process"),
    ("offload_params", "false", "false", "that was never tried with 4-bit weights"),
    ("activation_checkpointing", "false", "false", "--activation_checkpointing decides that"),
)


def is_asked_for() -> bool:
    """Return whether `accelerate launch` was given a config of FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_fsdp_config() -> None:
    """Refuse settings of FSDP that this does not work with, by what `accelerate launch` exports.

    Raises:
        UserError: as said.
    """
    for name, wanted, default, reason in SETTINGS if is_asked_for() else ():
        found = os.environ.get(f"FSDP_{name.upper()}", default)
        if found.lower() != wanted:
            key = f"fsdp_{name}"
            raise UserError(
                f"{key} {found}", reason, f"give {wanted}, as accelerate_configs/fsdp.yaml does"
            )


def fsdp_plugin():
    """Return what `Accelerator` takes: nothing is cast, for autocast does it as on one GPU; None
    where nobody asked for FSDP.

    (Left alone, Accelerate would have gradients summed in bf16.)
    """
    if not is_asked_for():
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def enable_fsdp(accelerator, plugin) -> bool:
    """Return whether models are to be sharded, having told Accelerate so on a CPU.

    There it takes processes for data parallel ones whatever the config; torch shards there too.

    Raises:
        UserError: FSDP is asked for and there is nothing to spread a model over.
    """
    from accelerate.utils import DistributedType

    if plugin is None:
        return False
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            "FSDP", "this process was started alone", "start it by accelerate launch or torchrun"
        )
    return True


def layers_of(model) -> list:
    """Return the decoder layers, which FSDP all-gathers one at a time."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def check_shardable(model, folder) -> None:
    """Refuse a model that does not say what its layers are.

    Raises:
        UserError: as said.
    """
    if not layers_of(model):
        raise UserError(
            folder,
            f"{type(model).__name__} does not name its layers, which FSDP would all-gather one "
            "by one",
            "use accelerate_configs/multi_gpu.yaml",
        )


def check_dtypes(model, folder) -> None:
    """Refuse types with which FSDP2 fails in the middle, or leaves the base whole on every card.

    All that trains must be of one type, for its gradients travel together; the rest need only be
    of floating point: 4-bit weights are, where `bnb_4bit_quant_storage` made their bytes look so.

    Args:
        model: with its adapter, before `shard`.
        folder: of the base, for the complaint.

    Raises:
        UserError: as said.
    """
    trainable = {str(p.dtype) for p in model.parameters() if p.requires_grad}
    if len(trainable) > 1:
        raise UserError(
            folder,
            f"what trains is of several types ({', '.join(sorted(trainable))}), and FSDP adds up "
            "gradients of one",
            "leave PEFT's autocast_adapter_dtype on",
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise UserError(
                folder,
                f"{name} is stored as {parameter.dtype}, which FSDP would leave whole on every "
                "card",
                "give the model as it was before it was quantized",
            )


def shard(accelerator, model, optimizer, folder):
    """Return base with adapter, sharded, and the prepared optimizer, which updates the shards.

    What is sharded is the model inside of PEFT's wrapper: the wrapper adds nothing to LoRA, and
    `generate` calls what is inside, which has to be what all-gathers weights.

    Args:
        model: PEFT's, in main memory.
        optimizer: over its trainable parameters.
        folder: as in `check_dtypes`.
    """
    check_dtypes(model, folder)
    inner = model.get_base_model()
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:  # Accelerate's takes names that are not there
        plugin.transformer_cls_names_to_wrap = sorted({type(m).__name__ for m in layers_of(inner)})
    for module in inner.modules():
        # A shard is an ordinary tensor: bitsandbytes then asks the layer how to dequantize.
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            module.quant_state = state
    return accelerator.prepare(inner, optimizer)


@contextmanager
def in_step(model):
    """Let each process run a sharded model as often as it needs to; without gradients.

    A layer is all-gathered by all processes, so all must run as often. Before each forward pass
    they ask one another who is running; who has nothing to do any more runs a token until nobody
    does. Any other model is left alone.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    device, under_way = model.device, False

    def others_run(count: int) -> bool:
        running = torch.tensor(count, device=device)
        torch.distributed.all_reduce(running)
        return running.item() > 0

    def before(*_):
        nonlocal under_way
        if under_way:  # or it would take another process's part of a layer for one of its own
            raise RuntimeError("a forward pass failed in this process, and others wait in it")
        under_way = others_run(1)

    def after(*_):
        nonlocal under_way
        under_way = False

    hooks = [model.register_forward_pre_hook(before, prepend=True)]
    hooks.append(model.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    while others_run(0):
        model(input_ids=token, use_cache=False)


class Whole:
    """Adapter and AdamW's state in one piece, in main memory: what checkpoints.py reads and writes.

    Files are those of one process, and a run can go on from them with or without FSDP. All
    processes call each method.

    Args:
        base: `modeling.skeleton` of the base.
        lora_config: of the run.
        sharded: of `shard`.
        adamw: torch's, over the shards.
    """

    def __init__(self, base, lora_config, sharded, adamw):
        import torch
        from peft import get_peft_model

        self.sharded, self.shards_adamw = sharded, adamw
        self.model = get_peft_model(copy.deepcopy(base), lora_config)
        self.adamw = SimpleNamespace(state=defaultdict(dict), get_state_buffer=torch.zeros_like)
        shards = {n: p for n, p in sharded.named_parameters() if p.requires_grad}
        self.pairs = []  # of whole parameter and shard
        for name, shard in shards.items():
            module, _, attribute = name.rpartition(".")
            whole = torch.nn.Parameter(torch.zeros(shard.shape, dtype=shard.dtype))
            setattr(self.model.get_base_model().get_submodule(module), attribute, whole)
            self.pairs.append((whole, shard))

    def gather(self):
        """Return model and optimizer as they are now; the first process's are those to be saved."""
        import torch

        first = torch.distributed.get_rank() == 0
        for whole, shard in self.pairs:
            # One at a time, for on a GPU all of it may be too much.
            state = self.shards_adamw.state.get(shard, {})
            parts = {"weight": shard.detach()}
            parts |= {key: state[key] for key in ("exp_avg", "exp_avg_sq") if state}
            parts = {key: part.full_tensor() for key, part in parts.items()}
            if first:
                whole.data.copy_(parts["weight"])
                if state:
                    self.adamw.state[whole] = {
                        "step": int(state["step"]),
                        "state1": parts["exp_avg"].cpu(),  # by bitsandbytes' names
                        "state2": parts["exp_avg_sq"].cpu(),
                    }
        return self.model, self.adamw

    def scatter(self) -> None:
        """Put what was loaded into model and optimizer here into the shards."""
        import torch
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import distribute_tensor

        # What is in no decoder layer stays all-gathered after a forward pass, such as the trial of
        # packed rows, and the next pass would not see what is loaded into the shards.
        for module in self.sharded.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for whole, shard in self.pairs:
            # Every process has read all of it: nothing travels.
            mesh, placements = shard.device_mesh, shard.placements
            parts = {"weight": whole.detach()} | self.adamw.state[whole]
            step = parts.pop("step", None)
            parts = {
                key: distribute_tensor(part.to(shard.device), mesh, placements, src_data_rank=None)
                for key, part in parts.items()
            }
            with torch.no_grad():
                shard.to_local().copy_(parts["weight"].to_local())
            if step is not None:
                fused = self.shards_adamw.defaults["fused"]
                self.shards_adamw.state[shard] = {
                    "step": torch.tensor(float(step), device=shard.device if fused else "cpu"),
                    "exp_avg": parts["state1"],
                    "exp_avg_sq": parts["state2"],
                }
        self.adamw.state.clear()
