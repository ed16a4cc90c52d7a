"""What a training run is about to do, told before anything is loaded."""

import math
from array import array

from articles import evenly_spaced
from batching import ARTICLE_LABELS, MicroBatchSize, epoch_order, split_update
from memory import WAYS

CHECKED_EXACTLY = 25_000  # rows; of larger files, lengths are told from no more than that
SETTLING = 5  # updates that take longer: memory is new, and so are kernels for their lengths
PACE = 5  # updates after these, from whose pace the time is told
BASES = {
    "nf4": "in NF4 with double quantization",
    "nf4-bf16": "dequantized once from NF4 with double quantization",
    "bf16": "as it is: LoRA, not QLoRA",
}


def measure_lengths(prompt, articles) -> dict:
    """Return counts over all rows, in tokens and rows; from evenly spaced rows of large files.

    `row_tokens` and `row_titles` are those of each row measured, `largest_id` that of all of them;
    `first_title_cut` is the index of the first of them whose title is cut, or None.
    """
    rows = evenly_spaced(len(articles), CHECKED_EXACTLY)
    found = {"articles_cut": 0, "titles_cut": 0}
    row_tokens, row_titles, first_title_cut, largest_id = array("I"), array("I"), None, 0
    for start in range(0, len(rows), 1000):
        indices = rows[start : start + 1000]
        chunk = articles[indices]
        examples = prompt.encode_all(chunk["text"], chunk["title"])
        for index, example in zip(indices, examples, strict=True):
            if example.title_cut and first_title_cut is None:
                first_title_cut = index
            found["articles_cut"] += example.article_cut
            found["titles_cut"] += example.title_cut
            row_tokens.append(len(example.ids))
            row_titles.append(example.num_title_ids)
            largest_id = max(largest_id, *example.ids)
    found |= {"tokens": sum(row_tokens), "title_tokens": sum(row_titles)}
    scale = len(articles) / len(rows)
    exact = len(rows) == len(articles)
    found = {name: count if exact else round(count * scale) for name, count in found.items()}
    found |= {"row_tokens": row_tokens, "row_titles": row_titles}
    found |= {"first_title_cut": first_title_cut, "largest_id": largest_id}
    return found | {"exact": exact}


def largest_micro_batch(
    lengths: dict, args, num_processes: int, updates: int, padded: bool = False
) -> MicroBatchSize:
    """Return the size of the run's largest micro-batch, whose rows are `padded` or packed.

    It is found by dealing out the rows of `measure_lengths` as training will. (Of a large file they
    are a part, from which as many updates are made as there are rows for.)
    """
    tokens, titles = lengths["row_tokens"], lengths["row_titles"]
    if args.prompt_loss_weight:
        pairs = zip(tokens, titles, strict=True)
        titles = [title + min(ARTICLE_LABELS, length - title) for length, title in pairs]
    size = args.per_device_train_batch_size
    update_size = size * args.gradient_accumulation_steps * num_processes
    updates_per_epoch = math.ceil(len(tokens) / update_size)
    largest = MicroBatchSize(0, 0)
    for step in range(min(updates, updates_per_epoch * args.num_train_epochs)):
        epoch, update = divmod(step, updates_per_epoch)
        order = epoch_order(len(tokens), args.seed, epoch)
        rows = order[update * update_size : (update + 1) * update_size].tolist()
        for mine in split_update([tokens[row] for row in rows], size, num_processes):
            mine = [rows[index] for index in mine]
            if not mine:  # it gets the shortest article, without loss
                continue
            sizes, labels = [tokens[row] for row in mine], [titles[row] for row in mine]
            if padded:
                n = len(mine)
                found = MicroBatchSize(n * max(sizes), n * max(labels), padded_rows=n)
            else:
                found = MicroBatchSize(sum(sizes), sum(labels))
            largest = max(largest, found)
    return largest


def describe_plan(args, accelerator, adapted, prompt, checked, lengths, schedule, memory) -> str:
    """Return the lines that are printed before anything is loaded.

    Args:
        adapted: `modeling.adapted_skeleton` of the base.
        checked: by split, what `check_articles` returned.
        lengths: of `measure_lengths`, for the training articles.
        schedule: the numbers of updates, of updates per epoch, and of those to warm up and to cool
            down.
        memory: of `plan_memory`.
    """
    trainable, parameters = adapted.get_nb_trainable_parameters()
    about = "" if lengths["exact"] else "about "
    validation = checked["validation"].rows if "validation" in checked else 0
    processes, device = accelerator.num_processes, accelerator.device
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    updates, updates_per_epoch, warmup, cooldown = schedule
    weight, articles = args.prompt_loss_weight, ""
    if weight:
        drawn = f"up to {ARTICLE_LABELS} of each article"
        articles = f", and {drawn}, for all of them at weight {weight:g}"
    lines = {
        "articles": f"{checked['train'].rows:,} rows for training, {validation:,} for validation; "
        f"{about}{lengths['articles_cut']:,} training articles are cut to "
        f"{prompt.article_budget:,} tokens, {about}{lengths['titles_cut']:,} titles to "
        f"{prompt.max_title_tokens:,}",
        "tokens": f"{about}{lengths['tokens']:,} per epoch, of which {about}"
        f"{lengths['title_tokens']:,} title tokens carry the loss{articles}",
        "updates": f"{updates:,} of {batch * accumulation * processes:,} articles ({batch} per "
        f"device x {accumulation} accumulated x {processes} processes), {updates_per_epoch:,} per "
        f"epoch, {warmup:,} to warm up" + (f", {cooldown:,} to cool down" if cooldown else ""),
        "model": f"{trainable:,} of {parameters:,} parameters train "
        f"({trainable / parameters:.2%}); base {BASES[args.base_weights]}",
        "precision": ("bf16 autocast" if args.mixed_precision == "bf16" else "fp32")
        + f", adapter in fp32, on {device.type}",
        "optimizer": _describe_optimizer(accelerator),
        "memory": describe_memory(memory),
    }
    return "\n".join(f"{name:10} {text}" for name, text in lines.items())


def _describe_optimizer(accelerator) -> str:
    if accelerator.distributed_type == "FSDP":
        return (
            "torch's AdamW, by the rule of PagedAdamW32bit, which cannot be sharded; its states "
            f"and all weights are spread over {accelerator.num_processes:,} processes"
        )
    on_gpu = accelerator.device.type == "cuda"
    return f"PagedAdamW32bit, {'paged' if on_gpu else 'unpaged: there is no GPU to page from'}"


def describe_memory(memory: dict) -> str:
    if memory["this_run"] is None:
        return "no peak to tell: this model does not go through without weights"
    every = memory["checkpointed_every"]
    layers = {0: "off", 1: "of every layer"}.get(every, f"of every {every} layers")
    each = f" of each of {memory['shards']:,} processes" if memory["shards"] > 1 else ""
    ways = (f"{WAYS[way]} {_gib(peak)}" for way, peak in memory["estimate"].items())
    padded = " with padding" if memory.get("padded") else ""
    return (
        f"about {_gib(memory['this_run'])} expected at the peak{each}{padded}, activation "
        f"checkpointing {layers} ({', '.join(ways)})"
    )


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / 2**30:.1f} GiB"


def describe_time(recent, lengths: dict, step: int, schedule) -> str:
    """Return how long the updates after `step` will take at the pace of the recent ones.

    Args:
        recent: their rows for metrics.jsonl.
        lengths, schedule: as in `describe_plan`.
    """
    updates, updates_per_epoch, *_ = schedule
    pace = sum(row["tokens"] for row in recent) / sum(row["seconds"] for row in recent)
    # By tokens, for articles differ; an epoch that is left early has its share of them.
    tokens = lengths["tokens"] * (updates - step) / updates_per_epoch
    seconds = tokens / pace
    minutes = round(seconds / 60)
    if minutes >= 60:
        duration = f"{minutes // 60} h {minutes % 60} min"
    else:
        duration = f"{minutes} min" if minutes >= 10 else f"{seconds:.0f} s"
    return (
        f"{'time':10} about {duration} for the {updates - step:,} updates to come, evaluations "
        f"apart ({pace:,.0f} tokens/s in the last {len(recent)})"
    )
