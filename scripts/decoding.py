"""From prompts to new ids: the batch as a whole, its memory, and transformers' continuous batching.

Nothing here knows of articles or files. The prompts of a batch are read one after the other in
packed rows, which attend to themselves alone, where a padded batch computes the square of its
longest row for each. Then all are continued together, ROUND tokens at a time; after each round
those that have ended leave the batch.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields

import torch
import torch.nn.functional as F
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

import packing
from exit_codes import LoneError, UserError, note
from machine import free_memory
from prompting import Ends
from run_folder import first_line

ROUND = 16  # new tokens between two looks at who has ended
PREFILL_TOKENS = 4096  # of prompts that are read in one packed row
# Tokens of a batch beyond which it was no faster on 2 cores; for a GPU, a guess.
MOST_BATCH_TOKENS = {"cpu": 16_384, "cuda": 131_072}
LEAST_BATCH_TOKENS = 1024
PAGE = 256  # tokens of a page of continuous batching's cache, in transformers 5.17 and 5.24 alike


@torch.no_grad()
def generate_ids(
    model,
    prompts: list[list[int]],
    ends: Ends,
    max_new_tokens: int,
    seeds: list[list[int]] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    **options,
) -> list[list[int]]:
    """Return what the model writes after each prompt, up to what ends it, that included.

    Args:
        model: without PEFT's wrapper, in evaluation mode. If its attention is `packing.PACKED`, the
            prompts are read in packed rows.
        prompts: ids, at least one for each.
        ends: what ends a title.
        max_new_tokens: limit of each.
        seeds: the same number for each prompt. Instead of what is likeliest, one continuation is
            drawn for each seed, and those of a prompt are returned one after the other.
        temperature, top_k: how they are drawn, see `Draw`.
        options: of `GenerationConfig`: num_beams, min_new_tokens, length_penalty, and
            no_repeat_ngram_size, which here is of the new tokens alone.
    """
    # From scratch: repositories ship sampling, and penalties that count the article's own words.
    # It replaces the model's, from which `generate` would fill whatever is left open.
    model.generation_config = greedy(ends, max_new_tokens)
    sequence, mask = pad_left(prompts, ends.pad_id, model.device)
    longest, rows, written = sequence.shape[1], list(range(len(prompts))), {}
    line_end = LineEnd(ends, longest)
    in_rounds = options.get("num_beams", 1) == 1 and keeps_plain_cache(model)
    cache = prefill(model, prompts, 0 if seeds else max_new_tokens) if in_rounds else None
    min_new_tokens = options.pop("min_new_tokens", None) or 0
    size, processors = options.pop("no_repeat_ngram_size", None), LogitsProcessorList()
    if size:
        processors.append(OfNewTokens(NoRepeatNGramLogitsProcessor(size), longest))
    if seeds:
        per_prompt = len(seeds[0])
        sequence, mask = (t.repeat_interleave(per_prompt, dim=0) for t in (sequence, mask))
        rows = list(range(len(sequence)))
        if in_rounds and cache.layers[0].is_initialized:
            # The last id of a prompt is read with what continues it.
            room = max_new_tokens + 1
            cache.layers = [SharedLayer(layer, per_prompt, room) for layer in cache.layers]
        flat = [seed for those in seeds for seed in those]
        draw = Draw(temperature, top_k, flat, longest, max_new_tokens)
        processors.append(draw)
    while rows:
        done = sequence.shape[1] - longest
        steps = min(ROUND, max_new_tokens - done) if in_rounds else max_new_tokens
        at_least = min(min_new_tokens - done, steps)
        sequence = model.generate(
            input_ids=sequence,
            attention_mask=mask,
            generation_config=greedy(
                ends, steps, **options, min_new_tokens=at_least if at_least > 0 else None
            ),
            logits_processor=processors,
            synced_gpus=False,  # under FSDP, `sharding.in_step` keeps the processes together
            stopping_criteria=StoppingCriteriaList([line_end]),
            **({cache_name(model): cache} if in_rounds else {}),
        )
        new_ids = [ends.cut(ids) for ids in sequence[:, longest:].tolist()]
        over = not in_rounds or sequence.shape[1] - longest >= max_new_tokens
        keep = [n for n, ids in enumerate(new_ids) if not (over or ends.ended(ids))]
        written |= {row: ids for n, (row, ids) in enumerate(zip(rows, new_ids, strict=True))}
        if len(keep) < len(rows):
            rows = [rows[n] for n in keep]
            if seeds:
                draw.keep(keep)
            kept = torch.tensor(keep, dtype=torch.long, device=model.device)
            sequence, mask = sequence[kept], mask[kept]
            if in_rounds and keep:
                cache.batch_select_indices(kept)
        mask = F.pad(mask, (0, sequence.shape[1] - mask.shape[1]), value=1)
    return [written[row] for row in range(len(written))]


def greedy(ends: Ends, max_new_tokens: int, **options) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends.ids),
        pad_token_id=ends.pad_id,  # never seen: masked before, cut off after
        **({"num_beams": 1} | options),
    )


def pad_left(prompts: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 [prompts, longest]: all end in the last column, whatever the
    tokenizer's habit."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class OfNewTokens(LogitsProcessor):
    """Shows another processor the new tokens alone, lest it count those of the article."""

    def __init__(self, processor: LogitsProcessor, prompt_length: int):
        self.processor, self.prompt_length = processor, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.processor(input_ids[:, self.prompt_length :], scores)


class Draw(LogitsProcessor):
    """Makes the greatest score that of a token drawn at a temperature from the `top_k` likeliest,
    by Gumbel noise.

    The noise of each row is made beforehand from a seed of its own, on a CPU: what it draws depends
    neither on its company nor on the device.
    """

    def __init__(self, temperature: float, top_k: int, seeds: list[int], prompt_length: int, steps):
        self.prompt_length = prompt_length
        self.noise = torch.empty(len(seeds), steps, top_k)
        for row, seed in zip(self.noise, seeds, strict=True):
            row.exponential_(generator=torch.Generator().manual_seed(seed))
        self.noise.log_().mul_(-temperature)

    def keep(self, rows: list[int]) -> None:
        self.noise = self.noise[rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found, tokens = scores.topk(min(self.noise.shape[2], scores.shape[1]))
        noise = self.noise[:, input_ids.shape[1] - self.prompt_length, : found.shape[1]]
        found = found + noise.to(found.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, found)


class LineEnd(StoppingCriteria):
    """Stops a row at the end of a title's line: nothing after it would get into the title."""

    def __init__(self, ends: Ends, prompt_length: int):
        self.ends, self.prompt_length, self.kinds = ends, prompt_length, None

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        if self.kinds is None:
            kinds = bytearray(self.ends.kinds + b"\0")  # the last: of other ids
            self.kinds = torch.frombuffer(kinds, dtype=torch.uint8).to(input_ids.device)
        new_ids = input_ids[:, self.prompt_length :]
        # Ids beyond the tokenizer's, of a vocabulary that was rounded up, are no text.
        kinds = self.kinds[new_ids.clamp(max=len(self.kinds) - 1)]
        has_text = (kinds & Ends.TEXT).cumsum(1) > 0
        begun = F.pad(has_text, (1, 0))[:, :-1]  # before the token
        ends_line = ((kinds & Ends.BREAK) > 0) & begun | ((kinds & Ends.BREAK_AFTER_TEXT) > 0)
        return ends_line.any(1)


def cache_name(model) -> str:
    """Return what the model's forward calls its cache: transformers has renamed it since 5.17."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def keeps_plain_cache(model) -> bool:
    """Return whether keys and values of all tokens are kept, so that rows can leave a batch."""
    if not model._supports_default_dynamic_cache():
        return False
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def can_share_prompts(model) -> bool:
    """Return whether several titles can be drawn of a prompt whose keys are kept once.

    It is tried, for some models look into keys and values on their way from the cache to attention.
    """
    if model.config.get_text_config()._attn_implementation != packing.PACKED:
        return False
    if not keeps_plain_cache(model):
        return False
    before, free = model.generation_config, Ends(frozenset({0}), 0, b"")
    try:
        generate_ids(model, [[7, 8, 9], [7, 8]], free, 2, [[0, 1]] * 2, temperature=1.0, top_k=2)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.generation_config = before
    return True


class RoomyLayer(DynamicLayer):
    """A layer of a cache with room for `room` new tokens.

    Its own would copy all that there is, of each sequence, whenever one more token is written.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def hold(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Take tensors of [sequences, key/value heads, tokens and room, head size]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.stored = keys, values
        self.keys, self.values = (t[:, :, :length] for t in self.stored)

    def update(self, key_states, value_states, *args, **kwargs):
        start, new = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[2]
        if start == 0 or end > self.stored[0].shape[2]:
            dtype = self.keys.dtype if start else key_states.dtype
            size = end + self.room
            stored = [t.new_zeros(*t.shape[:2], size, t.shape[3], dtype=dtype) for t in new]
            if start:
                stored[0][:, :, :start], stored[1][:, :, :start] = self.keys, self.values
        else:
            stored = self.stored
        for target, source in zip(stored, new, strict=True):
            target[:, :, start:end] = source
        self.hold(*stored, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if length := self.get_seq_length():
            self.hold(*(t[indices] for t in self.stored), length)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError  # nothing here repeats sequences, and its own forgets the room


class SharedLayer(RoomyLayer):
    """A layer of a cache of which several sequences continue each prompt, whose keys are kept once.

    Its keys and values are `packing.Shared`, for the attention there.
    """

    def __init__(self, read: RoomyLayer, per_prompt: int, room: int):
        super().__init__(room)
        self.prompts = read.keys, read.values
        self.lazy_initialization(*self.prompts)
        sequences = len(read.keys) * per_prompt
        self.slots = torch.arange(sequences, device=read.keys.device)
        self.per_prompt = per_prompt
        sizes = (sequences, read.keys.shape[1], room)
        self.hold(*(t.new_zeros(*sizes, t.shape[3]) for t in self.prompts), 0)

    def get_seq_length(self, *_) -> int:
        return self.prompts[0].shape[2] + self.keys.shape[2]

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        for target, source in zip(self.stored, (key_states, value_states), strict=True):
            target[:, :, start:end] = source
        self.hold(*self.stored, end)
        parts = zip(self.prompts, (self.keys, self.values), strict=True)
        return tuple(packing.Shared(*both, self.slots, self.per_prompt) for both in parts)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        slots, length = self.slots[indices], self.keys.shape[2]
        # Prompts that nobody continues any more are let go of.
        going_on, prompts = torch.unique(slots // self.per_prompt, return_inverse=True)
        if len(going_on) < len(self.prompts[0]):
            self.prompts = tuple(t[going_on] for t in self.prompts)
        self.slots = prompts * self.per_prompt + slots % self.per_prompt
        self.hold(*(t[indices] for t in self.stored), length)

    reorder_cache = batch_select_indices


def cache_dtype(model) -> torch.dtype:
    return torch.float32 if model.device.type == "cpu" else model.dtype


def prefill(model, prompts: list[list[int]], room: int) -> DynamicCache:
    """Return the keys and values of all prompts but their last ids, padded on the left.

    On a CPU they are in fp32, which `packing.attention_of_one_token` would copy them to each time.
    `generate` goes on from there: it reads the last ids, whose logits are the first that exist.
    Without packed attention, the cache is empty, and `generate` reads the padded prompts itself.
    """
    config = model.config.get_text_config(decoder=True)
    whole = DynamicCache(config=config)
    whole.layers = [RoomyLayer(room) for _ in whole.layers]
    if config._attn_implementation != packing.PACKED or min(map(len, prompts)) < 2:
        return whole
    longest, row = max(map(len, prompts)) - 1, 0
    while row < len(prompts):
        together = [prompts[row][:-1]]
        while row + len(together) < len(prompts):
            candidate = prompts[row + len(together)][:-1]
            if sum(map(len, together)) + len(candidate) > PREFILL_TOKENS:
                break
            together.append(candidate)
        cache = DynamicCache(config=config)
        packed = packing.packed_row(together, model.device)
        model(**packed, use_cache=True, logits_to_keep=1, **{cache_name(model): cache})
        for layer, target in zip(cache.layers, whole.layers, strict=True):
            read = layer.keys, layer.values
            if row == 0:
                size = len(prompts), read[0].shape[1], longest + room
                kept = [t.new_zeros(*size, t.shape[-1], dtype=cache_dtype(model)) for t in read]
                target.hold(*kept, longest)
            for stored, states in zip((target.keys, target.values), read, strict=True):
                start = 0
                for n, ids in enumerate(together, start=row):
                    stored[n, :, longest - len(ids) :] = states[0, :, start : start + len(ids)]
                    start += len(ids)
            layer.keys = layer.values = None  # as soon as they are copied
        row += len(together)
    return whole


# ---------------------------------------------------------------------- memory


def choose_max_batch_tokens(model, num_beams: int = 1) -> int:
    """Return how many tokens of prompts and titles together the free memory has room for.

    A token takes its keys and values and, while the prompts are read, its activations. A power of
    two, so that a little more or less free memory makes no other batches, whose roundings differ.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "per_layer_config", None) or [config]

    def largest(name: str) -> int:
        """Return the largest number of that name over the layers, 0 if the config has none."""
        found = [getattr(layer, name, None) or 0 for layer in layers]
        return max(max(n) if isinstance(n, list | tuple) else n for n in found)

    attention_heads = largest("num_attention_heads") or 1  # some have no attention
    size = largest("head_dim") or config.hidden_size // attention_heads
    heads = largest("num_key_value_heads") or attention_heads
    kept = 2 * config.num_hidden_layers * heads * size * cache_dtype(model).itemsize
    wide = largest("intermediate_size") or 4 * config.hidden_size
    moving = (8 * config.hidden_size + 3 * wide) * model.dtype.itemsize
    fits = int(0.6 * free_memory(model.device) / (num_beams * kept + moving))
    most = MOST_BATCH_TOKENS.get(model.device.type, 16_384)
    return max(LEAST_BATCH_TOKENS, min(most, 1 << max(0, fits.bit_length() - 1)))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is of memory, which on a CPU has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_halves(generate: Callable[[list[int]], list], batch: list[int], size_of, too_large: dict):
    """Return `generate(batch)`, or that of its halves where the batch does not fit into memory.

    A size that did not fit once is not tried again, but halved at once.

    Args:
        batch: of what; a single one is not halved.
        size_of: gives the tokens of a batch.
        too_large: what is remembered from batch to batch; empty at first.

    Raises:
        LoneError: not even a batch of one fits.
    """
    tokens = size_of(batch)
    if len(batch) == 1 or tokens < too_large.get("tokens", sys.maxsize):
        try:
            return generate(batch)
        except RuntimeError as error:  # as torch.OutOfMemoryError is, too
            if not is_out_of_memory(error):
                raise
        # Out of the except clause, or the error would keep what it must let go of.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            raise LoneError(
                "memory",
                f"not enough for one article with its title ({tokens:,} tokens)",
                "lower --max_length, --max_new_tokens or --num_samples, or give --base_weights nf4",
            )
        if not too_large:
            note(
                f"{len(batch):,} articles together ({tokens:,} tokens) do not fit into memory; "
                "such batches are halved. Roundings go with the batch: give --max_batch_tokens "
                f"{tokens // 2:,} for titles that do not depend on what memory is free"
            )
        too_large["tokens"] = tokens
    middle = (len(batch) + 1) // 2
    halves = (batch[:middle], batch[middle:])
    return [t for half in halves for t in in_halves(generate, half, size_of, too_large)]


# ---------------------------------------------------------------------- continuous batching


def generate_continuously(
    model,
    requests: dict[str, list[int]],
    ends: Ends,
    max_new_tokens: int,
    max_batch_tokens: int,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, list[int]]]:
    """Yield the name of each request and its new ids, as they end, by transformers' own engine.

    As many requests are under way as `max_batch_tokens` has room for. Once `stop_asked()` is true,
    no more begin, and those under way are waited for. The engine logs errors and returns what it
    has; here they are errors.

    Args:
        requests: prompts by name.

    Raises:
        LoneError: requests that failed or never came back, by name.
    """
    blocks = {name: -(-(len(ids) + max_new_tokens) // PAGE) for name, ids in requests.items()}
    num_blocks = max(max_batch_tokens // PAGE, *blocks.values())
    # All that decides memory is set: by default, the cache takes most of what the machine has.
    # Without flash attention each forward attends to all requests through one mask.
    settings = {"num_blocks": num_blocks + 1, "max_batch_tokens": min(max_batch_tokens, 1024)}
    settings |= {"allow_block_sharing": False, "auto_switch_to_flash": False}
    known = {field.name for field in fields(ContinuousBatchingConfig)}  # the last is new
    settings = {name: value for name, value in settings.items() if name in known}
    waiting, under_way, failed = list(requests)[::-1], set(), {}
    with ExitStack() as stack:
        stack.enter_context(sdpa_attention(model))
        engine = model.continuous_batching_context_manager(
            generation_config=greedy(ends, max_new_tokens),
            continuous_batching_config=ContinuousBatchingConfig(**settings),
            timeout=60.0,
        )
        try:
            manager = stack.enter_context(engine)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, AttributeError, RuntimeError) as error:
            problem = f"it does not know this model's layers ({first_line(error)})"
            raise UserError("--engine continuous", problem, "leave it out") from None
        while waiting or under_way:
            if stop_asked():
                waiting.clear()
            while waiting:
                room = num_blocks - sum(blocks[name] for name in under_way)
                if blocks[waiting[-1]] > room:
                    break
                under_way.add(name := waiting.pop())
                manager.add_request(
                    requests[name],
                    request_id=name,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=sorted(ends.ids),
                )
            if not under_way:  # asked to stop
                break
            result = manager.get_result(timeout=1)
            if result is None:
                if manager.is_running():
                    continue
                break
            if not result.is_finished():
                continue
            under_way.discard(result.request_id)
            ids = ends.cut(result.generated_tokens)
            if result.error is not None:
                failed[result.request_id] = result.error
            elif len(ids) < max_new_tokens and not ends.ended(ids):
                failed[result.request_id] = "it ended neither by EOS nor by its length"
            else:
                yield result.request_id, ids
    missing = [*under_way, *waiting]
    if failed or missing:
        names = sorted(failed) + sorted(missing)
        reason = next(iter(failed.values()), "the engine ended without them")
        raise LoneError(
            "--engine continuous",
            f"no title for {len(names):,} of {len(requests):,} articles ({', '.join(names[:20])}"
            f"{', ...' if len(names) > 20 else ''}: {reason})",
            ("run the same command again, or " * (len(names) < len(requests)))
            + "use --engine batched",
        )


@contextmanager
def sdpa_attention(model):
    """Set the attention that continuous batching knows, and the one of before afterwards.

    Raises:
        UserError: this model has none such.
    """
    before = model.config._attn_implementation
    try:
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            raise ValueError("soft caps, which sdpa of some releases passes over, as of Gemma 2")
        model.set_attn_implementation("sdpa")
    except ValueError:
        raise UserError(
            "--engine continuous", "it does not know this model's attention", "leave it out"
        ) from None
    try:
        yield
    finally:
        model.set_attn_implementation(before)
