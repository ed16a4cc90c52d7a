"""Which articles make an update, how they are dealt out, and the tensors of a micro-batch.

Nothing here keeps state: the order is a function of seed and epoch, so a resumed run, or one on
another number of processes whose updates are as large, sees the same articles in the same update.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch

import packing
from prompting import Example

IGNORED = -100  # cross_entropy's ignore_index
ARTICLE_LABELS = 256  # tokens of an article that carry loss in one update, where they do at all


class MicroBatchSize(NamedTuple):
    """What the memory of a micro-batch goes by; both counts are those of all its rows together."""

    tokens: int  # with padding, if there is any
    labels: int  # those of them that carry loss, and so have logits
    padded_rows: int = 0  # 0: the articles are packed into one row


@functools.lru_cache(maxsize=2)  # asked for at every update
def epoch_order(num_articles: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order of all rows in one epoch, int64 of shape [num_articles]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_articles, generator=generator)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return what to seed torch with before an update, so that nothing depends on the past."""
    return (seed * 1_000_003 + step) * 1_009 + rank


def learn_articles_too(examples: list[Example], weight: float, seed: int, step: int):
    """Return the examples of an update with a random part of each article's tokens to be learnt.

    Loss on what is read, beside what is to be written (arXiv 2405.14394): a base that knows little
    French learns more of it from an article than from its title. No more than ARTICLE_LABELS tokens
    of an article are drawn, so that their logits need not exist for the whole of it; each stands
    for all that were not, so the expected gradient is that of all tokens, of the given weight.

    Args:
        weight: of a token of the article; that of a title's token is 1.
        seed, step: of the run, and of the update: they decide what is drawn.
    """
    generator, drawn = torch.Generator().manual_seed(seed * 1_000_003 + step), []
    for example in examples:
        places = [place for place in example.article if place > 0]  # nothing predicts the first id
        chosen = torch.randperm(len(places), generator=generator)[:ARTICLE_LABELS].sort().values
        each = weight * len(places) / max(1, len(chosen))
        labels = tuple(places[index] for index in chosen.tolist())
        drawn.append(replace(example, article_labels=labels, article_weight=each))
    return drawn


def deal(examples: list[Example], micro_batch_size: int, rank: int = 0, world_size: int = 1):
    """Return this process's micro-batches of one update, as many on every process.

    The gradient of an update does not depend on how it is split, but for dropout, whose masks go
    with the micro-batches. A process that would have a micro-batch less gets one that carries no
    loss.
    """
    split = split_update([len(e.ids) for e in examples], micro_batch_size, world_size)
    # Without labels: its process takes part in the collective operations all the same.
    spare = min(examples, key=lambda example: len(example.ids))
    nothing = [Example(spare.ids, len(spare.ids), False)]
    return [[examples[i] for i in mine] or nothing for mine in split[rank::world_size]]


def split_update(lengths: list[int], micro_batch_size: int, world_size: int) -> list[list[int]]:
    """Return the micro-batches of an update, of all processes in turn, as indices of its articles.

    Each gets its share of long and of short articles, so that none needs more memory or time than
    it must.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    count = math.ceil(len(lengths) / (micro_batch_size * world_size)) * world_size
    micro_batches = [[] for _ in range(count)]
    for number, index in enumerate(by_length):
        turn, place = divmod(number, count)  # to and fro: who got the longest gets the shortest
        micro_batches[place if turn % 2 == 0 else count - 1 - place].append(index)
    return micro_batches


def pack(examples: list[Example], device: torch.device) -> dict:
    """Return a micro-batch as one packed row, without any padding.

    Logits are asked for where they predict a title's token alone, or one that is learnt too: the
    tensor [length, vocabulary] never exists. Where a title begins is known from lengths, never from
    a pad id, which may well be the EOS that the model has to learn.

    Returns:
        `packing.packed_row` of the ids; `logits_to_keep` and `labels`, int64 [title tokens]:
        indices in the row, and the tokens that come after them. Where tokens of articles are learnt
        too, they are among them; `weights`, float32 of that shape, says how much each label counts,
        and `of_titles`, bool, which are a title's.
    """
    row = packing.packed_row([example.ids for example in examples], torch.device("cpu"))
    keep, labels, weights, of_titles, start = [], [], [], [], 0
    for example in examples:
        places = [*example.article_labels, *range(example.num_prompt_ids, len(example.ids))]
        keep.extend(start + position - 1 for position in places)
        labels.extend(example.ids[position] for position in places)
        of_article, of_title = len(example.article_labels), example.num_title_ids
        weights += [example.article_weight] * of_article + [1.0] * of_title
        of_titles += [False] * of_article + [True] * of_title
        start += len(example.ids)
    row["logits_to_keep"] = torch.tensor(keep, dtype=torch.long)
    row["labels"] = torch.tensor(labels, dtype=torch.long)
    if any(example.article_labels for example in examples):
        row["weights"] = torch.tensor(weights)
        row["of_titles"] = torch.tensor(of_titles)
    return packing.send(row, device)


def pad_left(examples: list[Example], device: torch.device) -> dict:
    """Return a micro-batch whose rows all end in the last column, for models that cannot be packed.

    Returns:
        `input_ids`, `attention_mask`, `position_ids`: int64 [batch, length]; `labels`: int64
        [batch, longest title], IGNORED where a shorter title's row still shows its prompt;
        `logits_to_keep`: int64 [longest title], the columns that predict them.
    """
    length = max(len(example.ids) for example in examples)
    num_labels = max(1, *(example.num_title_ids for example in examples))
    shape = (len(examples), length)
    input_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    labels = torch.full((len(examples), num_labels), IGNORED)
    for row, example in enumerate(examples):
        ids, titles = torch.tensor(example.ids), example.num_title_ids
        input_ids[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = 1
        positions[row, length - len(ids) :] = torch.arange(len(ids))
        labels[row, num_labels - titles :] = ids[len(ids) - titles :]
    batch = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    batch |= {"labels": labels, "logits_to_keep": torch.arange(length - 1 - num_labels, length - 1)}
    return packing.send(batch, device)
