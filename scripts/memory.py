"""How much memory training takes: expected from shapes and lengths, and as it was."""

import sys

import torch

# Bytes per weight of NF4 with double quantization: blocks of 64, then of 256 (QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAPTER_BYTES = 16  # per weight: itself, its gradient and two AdamW moments, all fp32
LIBRARIES = 900 << 20  # Python and all that training and evaluation import
# On a CPU, glibc keeps the holes that tensors of ever changing sizes leave: 60 updates on real
# articles took 10.6 GiB, where no more than 2.6 were in use at a time.
HOLES = 3.8
LOGIT_BYTES = 10  # per logit: bf16 from the head, fp32 for the loss, fp32 gradient


def expected_peak_memory(model, args, device: torch.device, longest: int) -> int:
    """Return the bytes that a QLoRA run is expected to take at its peak.

    Args:
        model: the base with its adapter; only its shapes are used.
        args: of train.py.
        device: on a CPU the figure is of the whole resident set, libraries included.
        longest: tokens of the longest row.

    What autograd keeps of a token in a layer, counted with saved-tensor hooks on a Llama under
    bf16 autocast: 16 bytes per hidden unit (the norms' inputs in fp32; queries, keys, values and
    attention's output), 6 per unit of the MLP, and of every linear layer's input what LoRA keeps.
    """
    import bitsandbytes

    linear = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    plain = (p for p in model.parameters() if not hasattr(p, "quant_state"))
    frozen = (p for p in plain if not p.requires_grad)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = [layer.in_features * layer.out_features for layer in linear]
    fixed = NF4_BYTES * sum(weights) + sum(p.nbytes for p in frozen) + ADAPTER_BYTES * trainable

    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    wide = max(layer.out_features for layer in linear)
    # A copy in bf16, and for dropout the mask: fp32 on a CPU, one byte on CUDA.
    kept = 2 + (args.lora_dropout > 0) * (4 if device.type == "cpu" else 1)
    per_layer = 16 * hidden + 6 * wide + kept * sum(m.in_features for m in linear) / layers
    if args.mixed_precision == "no":
        per_layer *= 2
    # With checkpointing each layer's input stays, and one layer at a time is computed again.
    per_token = per_layer * layers
    if args.activation_checkpointing:
        per_token = per_layer + 2 * hidden * layers
    tokens = args.per_device_train_batch_size * longest
    titles = args.per_device_train_batch_size * args.max_title_tokens
    moving = per_token * tokens + LOGIT_BYTES * config.vocab_size * titles
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
