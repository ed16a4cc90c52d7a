"""How much memory training takes: expected from shapes and lengths, and as it was."""

import math
import sys

import torch

from modeling import decoder_linears

# Bytes per weight of NF4 with double quantization: blocks of 64, then of 256 (QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAPTER_BYTES = 16  # per weight: itself, its gradient and two AdamW moments, all fp32
LIBRARIES = 900 << 20  # Python and all that training and evaluation import
# On a CPU, glibc keeps the holes that tensors of ever changing sizes leave: 60 updates on real
# articles took 10.6 GiB, where no more than 2.6 were in use at a time.
HOLES = 3.8
LOGIT_BYTES = 10  # per logit: bf16 from the head, fp32 for the loss, fp32 gradient


def choose_checkpointing(model, args, device: torch.device, longest: int) -> int:
    """Return N for checkpointing every Nth layer, 0 for none: as asked for, or the least that fits.

    What must fit is the expected peak, into nine tenths of the memory that nobody else has.
    """
    asked = args.activation_checkpointing
    if asked != "auto":
        return int({"none": 0, "full": 1}.get(asked, asked))
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        import psutil  # Accelerate's

        there = psutil.virtual_memory().available
    for every in (0, 4, 2):
        if expected_peak_memory(model, args, device, longest, every) < 0.9 * there:
            return every
    return 1


def expected_peak_memory(
    model, args, device: torch.device, longest: int, every_n_layers: int
) -> int:
    """Return the bytes that a run is expected to take at its peak.

    Args:
        model: the base with its adapter; only its shapes are used.
        args: of train.py.
        device: on a CPU the figure is of the whole resident set, libraries included.
        longest: tokens of the longest article with its title.
        every_n_layers: are checkpointed; 0 for none.

    What autograd keeps of a token in a layer, counted with saved-tensor hooks on a Llama under
    bf16 autocast: 16 bytes per hidden unit (the norms' inputs in fp32; queries, keys, values and
    attention's output), 6 per unit of the MLP, and of every linear layer's input what LoRA keeps.
    """
    linear = [m.get_base_layer() for m in model.modules() if hasattr(m, "lora_A")]
    nf4 = [p for p in model.parameters() if hasattr(p, "quant_state")]
    frozen = (
        p for p in model.parameters() if not p.requires_grad and not hasattr(p, "quant_state")
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = [layer.in_features * layer.out_features for layer in linear]
    fixed = NF4_BYTES * sum(p.quant_state.shape.numel() for p in nf4)
    fixed += sum(p.nbytes for p in frozen) + ADAPTER_BYTES * trainable

    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    wide = max(layer.out_features for layer in decoder_linears(model).values())
    # A copy in bf16, and for dropout the mask: fp32 on a CPU, one byte on CUDA.
    kept = 2 + (args.lora_dropout > 0) * (4 if device.type == "cpu" else 1)
    per_layer = 16 * hidden + 6 * wide + kept * sum(m.in_features for m in linear) / layers
    if args.mixed_precision == "no":
        per_layer *= 2
    # With checkpointing each layer's input stays, and one layer at a time is computed again.
    checkpointed = math.ceil(layers / every_n_layers) if every_n_layers else 0
    per_token = per_layer * (layers - checkpointed) + 2 * hidden * checkpointed
    if every_n_layers == 1:  # else what a layer takes to be computed again was freed just before
        per_token += per_layer
    tokens = args.per_device_train_batch_size * longest
    titles = args.per_device_train_batch_size * args.max_title_tokens
    moving = per_token * tokens + LOGIT_BYTES * config.vocab_size * titles
    if nf4:
        moving += 4 * max(weights)  # the largest layer, dequantized for a product
    if device.type == "cpu":
        return int(fixed + HOLES * moving) + LIBRARIES
    return int(fixed + moving)


def peak_memory(device: torch.device) -> str:
    """Return the peak so far: allocated on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB on the GPU"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.1f} GiB resident"
