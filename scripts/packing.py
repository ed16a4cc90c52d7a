"""Attention over a packed row: several articles one after the other, none of which sees another.

A packed row computes nothing for padding (on a CPU in bf16, attention for a few tokens). Articles
are kept apart by their lengths, which reach every layer as keyword arguments; there is no mask,
whose size is the square of the row's.

A model that reads packed rows attends by `packed_attention` when it writes too: then without their
lengths, for one new token of each sequence, by `attention_of_one_token` on a CPU and
`attention_of_continuations` where several titles of an article share what was read. Training needs
neither of the two.
"""

import itertools
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from exit_codes import UserError
from run_folder import first_line

PACKED = "packed"  # its name among transformers' kinds of attention
# Largest relative difference of bf16 logits between a packed row and separate rows: roundings of 32
# random layers come to 0.03, wrong positions to 1.
FAR = 0.2
ROUNDING = 1e-5  # the same of fp32 logits, where nothing but the order of sums may change
LEAKED = 0.01  # the same of bf16 logits of a row with one padding and with another
# On a CPU, oneDNN compiles its products in bf16 for each length of an article, which takes longer
# than the attention of a short one. Lengths are rounded up to a multiple of this.
LENGTH_STEP = 32
NOT_MADE_FOR_IT = (ValueError, TypeError, RuntimeError, LookupError)  # what models raise then


def packed_attention(module, query, key, value, attention_mask, **kwargs):
    """Return what `sdpa_attention_forward` does, for each article of a packed row by itself.

    Args:
        module: the attention layer.
        query, key, value: [1, heads or key/value heads, length of the row, head size].
        attention_mask: None for a packed row.
        kwargs: `cu_seq_lens_q`, int32 [articles + 1], the borders of the articles in the row, and
            `max_length_q`, the longest of them, as in transformers' FlashAttentionKwargs. Without
            them, as in generation, this is ordinary attention.

    Returns:
        [1, length of the row, heads, head size], None.
    """
    borders = kwargs.pop("cu_seq_lens_q", None)
    longest = kwargs.pop("max_length_q", None)
    for name in ("cu_seq_lens_k", "max_length_k"):
        kwargs.pop(name, None)
    for name in ("softcap", "s_aux", "position_bias"):  # some releases of sdpa pass over these
        if kwargs.get(name) is not None:
            raise ValueError(f"packed attention knows no {name}")
    if isinstance(key, Shared):
        return attention_of_continuations(query, key, value, attention_mask, kwargs.get("scaling"))
    if borders is None:
        plain = attention_mask is None or attention_mask.dtype == torch.bool
        if query.shape[2] == 1 and query.device.type == "cpu" and plain:
            return attention_of_one_token(query, key, value, attention_mask, kwargs.get("scaling"))
        key, value = key.to(query.dtype), value.to(query.dtype)  # of a cache in fp32
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None:
        raise ValueError("it brings a mask of its own")
    window = kwargs.get("sliding_window")  # which no article here is longer than
    if window and longest > window:
        raise ValueError(f"an article of {longest} tokens is longer than the window of {window}")
    if query.is_cuda and query.dtype != torch.float32 and not kwargs.get("dropout"):
        from torch.nn.attention.varlen import varlen_attn

        groups = getattr(module, "num_key_value_groups", 1)
        rows = [
            t[0].transpose(0, 1) for t in (query, repeat_kv(key, groups), repeat_kv(value, groups))
        ]
        lengths = (borders, borders, longest, longest)
        causal = {"window_size": (-1, 0), "scale": kwargs.get("scaling")}
        return varlen_attn(*rows, *lengths, **causal)[None], None
    # Split, not sliced: the gradient of a slice has the size of the row, once for each article.
    lengths = borders.diff().tolist()
    articles = [t.split(lengths, dim=2) for t in (query, key, value)]
    in_bf16 = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    # What is added comes after the article, which sees nothing of it if the attention is causal.
    if query.device.type == "cpu" and in_bf16 and getattr(module, "is_causal", True):
        articles = [_rounded_up(parts) for parts in articles]
    outputs = []
    for length, *article in zip(lengths, *articles, strict=True):
        output, _ = sdpa_attention_forward(module, *article, None, **kwargs)
        outputs.append(output[:, :length])
    return torch.cat(outputs, dim=1), None


def _rounded_up(articles) -> tuple:
    """Return [1, heads, length, head size] of each article with zeros up to a `LENGTH_STEP`.

    They are parts of one row again: small blocks of each article's own, some of which backward
    needs and some not, would leave holes in a CPU's memory, 2 GiB for 8 articles of SmolLM2.
    """
    _, heads, _, size = articles[0].shape
    zeros = articles[0].new_zeros(1, heads, LENGTH_STEP, size)
    parts, lengths = [], []
    for article in articles:
        length, missing = article.shape[2], -article.shape[2] % LENGTH_STEP
        parts += [article, zeros[:, :, :missing]]
        lengths.append(length + missing)
    return torch.cat(parts, dim=2).split(lengths, dim=2)


def attention_of_one_token(query, key, value, attention_mask, scaling: float | None):
    """Return the attention of a single new token to all tokens of its sequence, as `sdpa` does.

    `sdpa` takes longer for it on a CPU (tests/benchmarks/README.md): its blocks are made for many
    queries. Heads that share keys are taken together, so nothing is repeated. All is in fp32, as
    inside of `sdpa`: bf16 would round a product of query and key beyond 32, as SmolLM2 has some, by
    up to an eighth, and is slower for so few rows.

    Args:
        query: [sequences, heads, 1, head size].
        key, value: [sequences, key/value heads, tokens, head size], best in fp32 already.
        attention_mask: bool [sequences, 1, 1, tokens], or None.
        scaling: of the products of queries and keys; None: by the root of the head size.

    Returns:
        [sequences, 1, heads, head size of the values] of the query's type, None.
    """
    grouped = query.reshape(*key.shape[:2], -1, query.shape[-1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        scores = (grouped.float() * scaling) @ key.float().transpose(2, 3)
        if attention_mask is not None:
            scores.masked_fill_(~attention_mask, -torch.inf)
        output = scores.softmax(-1) @ value.float()
    return output.to(query.dtype).reshape(*query.shape[:3], -1).transpose(1, 2), None


@dataclass(frozen=True)
class Shared:
    """Keys, or values, of sequences that continue fewer prompts, each kept once.

    Attributes:
        prompt: [prompts, key/value heads, tokens of a prompt, head size].
        own: [sequences, key/value heads, tokens of a continuation, head size].
        slots: int64 [sequences]; the sequence in slot s continues the prompt s // `per_prompt`.
        per_prompt: the most sequences of a prompt.
    """

    prompt: torch.Tensor
    own: torch.Tensor
    slots: torch.Tensor
    per_prompt: int

    def by_prompt(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [prompts, heads, per_prompt x n, m] of [sequences, heads, n, m]; 0 if missing."""
        heads, n, m = rows.shape[1:]
        full = rows.new_zeros(len(self.prompt) * self.per_prompt, heads, n, m)
        full[self.slots] = rows
        full = full.reshape(len(self.prompt), self.per_prompt, heads, n, m).transpose(1, 2)
        return full.reshape(len(self.prompt), heads, self.per_prompt * n, m)

    def by_sequence(self, full: torch.Tensor, n: int) -> torch.Tensor:
        """Return [sequences, heads, n, m] of what `by_prompt` returns."""
        prompts, heads, _, m = full.shape
        rows = full.reshape(prompts, heads, self.per_prompt, n, m).transpose(1, 2)
        return rows.reshape(-1, heads, n, m)[self.slots]


def attention_of_continuations(query, key: Shared, value: Shared, attention_mask, scaling):
    """Return the attention of a new token of each sequence to its prompt and to what is its own.

    Keys of a prompt are read once for all that continue it, where copies would be read for each.

    Args:
        query: [sequences, heads, 1, head size].
        attention_mask: bool [sequences, 1, 1, tokens of prompt and own], or None.
        scaling: as of `attention_of_one_token`.

    Returns:
        [sequences, 1, heads, head size of the values] of the query's type, None.
    """
    heads, length = key.own.shape[1], key.prompt.shape[2]
    grouped = query.reshape(len(query), heads, -1, query.shape[-1])
    group, dtype = grouped.shape[2], key.own.dtype
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        grouped = (grouped.float() * scaling).to(dtype)
        to_prompt = products_in_fp32(key.by_prompt(grouped), key.prompt.transpose(2, 3))
        to_own = products_in_fp32(grouped, key.own.transpose(2, 3))
        scores = torch.cat([key.by_sequence(to_prompt, group), to_own], dim=3)
        if attention_mask is not None:
            scores.masked_fill_(~attention_mask, -torch.inf)
        of_prompt, of_own = scores.softmax(-1).to(dtype).tensor_split([length], dim=3)
        output = value.by_sequence(value.by_prompt(of_prompt) @ value.prompt, group)
        output = output + of_own @ value.own
    return output.to(query.dtype).reshape(*query.shape[:3], -1).transpose(1, 2), None


def products_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b of [x, y, n, m] and [x, y, m, k] in fp32, of whatever type they are."""
    if a.dtype == torch.float32:
        return a @ b
    flat = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)  # on CUDA alone
    return flat.unflatten(0, a.shape[:2])


def no_mask_or_sdpas(*args, attention_mask=None, **kwargs):
    """Return no mask for a packed row, and in generation that of `sdpa`."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, no_mask_or_sdpas)


def never_packed(config, longest: int) -> str | None:
    """Return why models of a config cannot read packed rows, where it says so itself."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window and window < longest:  # some write 0 for none
        return f"its attention has a window of {window:,} tokens"
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kind {min(others)}"  # whose chunks would be of the row
    for rope in _rope_parameters(config):
        trained = rope.get("original_max_position_embeddings")
        trained = trained or getattr(config, "max_position_embeddings", None) or longest
        if rope.get("rope_type") in ("longrope", "dynamic") and trained < longest:
            return f"articles beyond {trained:,} tokens change the positions of the others"
    return None


def _rope_parameters(config) -> list[dict]:
    """Return what a config says of rotary positions, of all layers and of each kind of them."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found, *(part for part in found.values() if isinstance(part, dict))]


def use_packed_attention(model, longest: int) -> str | None:
    """Let a model read packed rows of articles of up to `longest` tokens; return why not, or None.

    It is tried, for a model may ignore the borders: what it says of the second of two articles must
    be what it says of that one in a row of its own, and must not change with the first: not by a
    bit, or in fp32 by more than a rounding, for experts take the tokens of a row together. (There
    are as many tokens in both batches: kernels for 4-bit weights go by their number, and round
    otherwise.)
    """
    if why := never_packed(model.config, longest):
        return why
    first, other, second = list(range(7, 17)), list(range(8, 18)), list(range(20, 30))
    before = model.config._attn_implementation

    apart = _must_read(model, {"input_ids": torch.tensor([first, second])})
    if not apart.isfinite().all():
        problem = "its logits are not finite: its weights are damaged, or too large for their type"
        raise UserError(model.config.name_or_path, problem, "check its files")
    why = "it has an attention of its own"  # under which a mask has the square of the row
    try:
        model.set_attn_implementation(PACKED)
        rows = [packed_row([article, second], torch.device("cpu")) for article in (first, other)]
        packed = [_last_logits(model, row) for row in rows]
        far, leaked = _difference(packed[0], apart), _difference(packed[1], packed[0])
        if not leaked <= (ROUNDING if model.dtype == torch.float32 else 0.0):
            why = "its articles see each other"
        elif not far < FAR:
            why = f"it says something else of articles in one row, by {far:.0%}"
        elif model.config._attn_implementation == PACKED:
            return None
    except torch.OutOfMemoryError:
        raise
    except NOT_MADE_FOR_IT as error:
        why = " ".join(str(error).split())[:80] or type(error).__name__
    model.set_attn_implementation(before)
    return why


def padding_changes(model) -> bool:
    """Return whether a model that reads no packed rows says something else of an article that is
    padded on the left: some read on over a mask, or count positions from the first column.

    It is tried.

    Raises:
        UserError: the model does not go through.
    """
    long, short = list(range(4, 30)), list(range(20, 30))
    columns = len(long) - len(short)
    padding = torch.tensor([[1] * len(long), [0] * columns + [1] * len(short)])
    positions = (padding.cumsum(1) - 1).clamp(min=0)

    def padded_by(pad_id: int) -> torch.Tensor:
        ids = torch.tensor([long, [pad_id] * columns + short])
        batch = {"input_ids": ids, "attention_mask": padding, "position_ids": positions}
        return _must_read(model, batch)

    apart = _must_read(model, {"input_ids": torch.tensor([short, short])})
    padded, otherwise = padded_by(0), padded_by(5)
    most = ROUNDING if model.dtype == torch.float32 else LEAKED
    return not (_difference(padded, apart) < FAR and _difference(otherwise, padded) <= most)


def _must_read(model, batch: dict) -> torch.Tensor:
    """Return what `_last_logits` does, or refuse the model."""
    try:
        return _last_logits(model, batch)
    except torch.OutOfMemoryError:
        raise
    except NOT_MADE_FOR_IT as error:
        problem = f"a few tokens do not go through it ({first_line(error)})"
        raise UserError(model.config.name_or_path, problem, "use another base") from None


def _last_logits(model, batch: dict) -> torch.Tensor:
    """Return what a model says after a batch's last row, float32 [vocabulary].

    Raises:
        UserError: it has not said it of that column alone.
    """
    batch = send(batch, model.device)
    last = torch.tensor([batch["input_ids"].shape[1] - 1], device=model.device)
    with torch.no_grad():
        logits = model(**batch, use_cache=False, logits_to_keep=last).logits
    if logits.shape[1] != 1:
        problem = "it gives logits of all tokens, where those of titles are asked for"
        raise UserError(model.config.name_or_path, problem, "use another base")
    return logits[-1, -1].float()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def packed_row(articles: list[list[int]], device: torch.device) -> dict:
    """Return the arguments of a model for the ids of articles in one packed row.

    Returns:
        `input_ids` and `position_ids`, int64 [1, length of the row], the latter beginning at 0
        with each article; `cu_seq_lens_q` and `_k`, int32 [articles + 1]; `max_length_q` and `_k`.
    """
    lengths = list(map(len, articles))
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    row = {
        "input_ids": torch.tensor([list(itertools.chain(*articles))]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return send(row, device)


def send(batch: dict, device: torch.device) -> dict:
    """Return a batch with its tensors on a device, without waiting for a busy GPU."""

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        # Without pinning, a copy waits until the GPU has done all that it was asked before.
        pinned = value.pin_memory() if device.type == "cuda" else value
        return pinned.to(device, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}
