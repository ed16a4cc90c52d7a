"""What a training run is about to do, told before its first update."""

import math

from memory import expected_peak_memory, peak_memory

CHECKED_EXACTLY = 25_000  # rows; of larger files, lengths are told from no more than that
BASES = {
    "nf4": "in NF4 with double quantization",
    "nf4-bf16": "dequantized once from NF4 with double quantization",
    "bf16": "as it is: LoRA, not QLoRA",
}


def measure_lengths(prompt, articles) -> dict:
    """Return counts over all rows, in tokens and rows; from evenly spaced rows of large files.

    `first_title_cut` is the index of the first row measured whose title is cut, or None.
    """
    rows = range(0, len(articles), math.ceil(len(articles) / CHECKED_EXACTLY))
    found = {"articles_cut": 0, "titles_cut": 0, "tokens": 0, "title_tokens": 0}
    longest, first_title_cut = 0, None
    for start in range(0, len(rows), 1000):
        indices = list(rows[start : start + 1000])
        chunk = articles[indices]
        examples = map(prompt.encode, chunk["text"], chunk["title"])
        for index, example in zip(indices, examples, strict=True):
            if example.title_cut and first_title_cut is None:
                first_title_cut = index
            found["articles_cut"] += example.article_cut
            found["titles_cut"] += example.title_cut
            found["tokens"] += len(example.ids)
            found["title_tokens"] += example.num_title_ids
            longest = max(longest, len(example.ids))
    scale = len(articles) / len(rows)
    exact = len(rows) == len(articles)
    found = {name: count if exact else round(count * scale) for name, count in found.items()}
    return found | {"longest": longest, "first_title_cut": first_title_cut, "exact": exact}


def describe_plan(
    args,
    accelerator,
    model,
    prompt,
    checked,
    lengths,
    every_n_layers,
    updates,
    updates_per_epoch,
    warmup,
) -> str:
    """Return the lines that are printed before the first update."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(_num_weights(p) for p in model.parameters() if not p.requires_grad)
    about = "" if lengths["exact"] else "about "
    validation = checked["validation"].rows if "validation" in checked else 0
    processes, device = accelerator.num_processes, accelerator.device
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    peak = expected_peak_memory(model, args, device, lengths["longest"], every_n_layers)
    layers = {0: "off", 1: "of every layer"}.get(
        every_n_layers, f"of every {every_n_layers} layers"
    )
    lines = {
        "articles": f"{checked['train'].rows:,} rows for training, {validation:,} for validation; "
        f"{about}{lengths['articles_cut']:,} training articles are cut to "
        f"{prompt.article_budget:,} tokens, {about}{lengths['titles_cut']:,} titles to "
        f"{prompt.max_title_tokens:,}",
        "tokens": f"{about}{lengths['tokens']:,} per epoch, of which {about}"
        f"{lengths['title_tokens']:,} title tokens carry the loss",
        "updates": f"{updates:,} of {batch * accumulation * processes:,} articles ({batch} per "
        f"device x {accumulation} accumulated x {processes} processes), {updates_per_epoch:,} per "
        f"epoch, {warmup:,} to warm up",
        "model": f"{trainable:,} of {trainable + frozen:,} parameters train "
        f"({trainable / (trainable + frozen):.2%}); base {BASES[args.base_weights]}",
        "precision": ("bf16 autocast" if args.mixed_precision == "bf16" else "fp32")
        + f", adapter in fp32, on {device.type}",
        "optimizer": "PagedAdamW32bit, "
        + ("paged" if device.type == "cuda" else "unpaged: there is no GPU to page from"),
        "memory": f"about {peak / 2**30:.1f} GiB expected at the peak, activation checkpointing "
        + layers
        + (f"; {peak_memory(device)} after loading" if device.type == "cuda" else ""),
    }
    return "\n".join(f"{name:10} {text}" for name, text in lines.items())


def _num_weights(parameter) -> int:
    """Return the number of weights of a parameter (in 4-bit storage, two share a byte)."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()
