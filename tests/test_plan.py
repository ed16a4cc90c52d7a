"""plan.py: what is said before anything is loaded. Run: pytest tests/test_plan.py"""

import argparse
from array import array

import pytest
from conftest import byte_level_tokenizer, french_rows

import plan
from batching import ARTICLE_LABELS, MicroBatchSize, deal, epoch_order
from prompting import Example, Prompt


class Rows:
    """A dataset of French rows as `open_articles` gives it: columns of chosen rows."""

    def __init__(self, count):
        self.rows = french_rows(count, seed=11)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, chosen):
        rows = [self.rows[index] for index in chosen]
        return {"text": [row["text"] for row in rows], "title": [row["titles"] for row in rows]}


def test_lengths_are_counted_exactly():
    prompt = Prompt(byte_level_tokenizer(), "{article}\nTitre :", False, 120, 20)
    rows = Rows(50)
    examples = [prompt.encode(row["text"], row["titles"]) for row in rows.rows]
    assert plan.measure_lengths(prompt, rows) == {
        "articles_cut": sum(example.article_cut for example in examples),
        "titles_cut": sum(example.title_cut for example in examples),
        "tokens": sum(len(example.ids) for example in examples),
        "title_tokens": sum(example.num_title_ids for example in examples),
        "row_tokens": array("I", [len(example.ids) for example in examples]),
        "row_titles": array("I", [example.num_title_ids for example in examples]),
        "first_title_cut": next(i for i, example in enumerate(examples) if example.title_cut),
        "largest_id": max(max(example.ids) for example in examples),
        "exact": True,
    }
    assert any(example.article_cut for example in examples)
    assert any(example.title_cut for example in examples)


def test_of_a_large_file_evenly_spaced_rows_are_counted(monkeypatch):
    monkeypatch.setattr(plan, "CHECKED_EXACTLY", 60)
    prompt = Prompt(byte_level_tokenizer(), "{article}\nTitre :", False, 120, 20)
    rows = Rows(300)
    estimated = plan.measure_lengths(prompt, rows)
    monkeypatch.setattr(plan, "CHECKED_EXACTLY", 300)
    exact = plan.measure_lengths(prompt, rows)
    assert not estimated["exact"]
    assert exact["exact"]
    assert estimated["tokens"] == pytest.approx(exact["tokens"], rel=0.15)
    assert estimated["title_tokens"] == pytest.approx(exact["title_tokens"], rel=0.15)


def arguments(**changes):
    values = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    values |= {"num_train_epochs": 2, "seed": 7, "prompt_loss_weight": 0.0}
    return argparse.Namespace(**values | changes)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("updates", [1, 5, 1000])
@pytest.mark.parametrize("padded", [False, True])
def test_the_largest_micro_batch_is_one_of_those_to_come(world_size, updates, padded):
    """Dealt out here as train.py does it, of every process, until the last update."""
    tokens = array("I", [20 + 13 * row % 97 for row in range(50)])
    titles = array("I", [1 + row % 11 for row in range(50)])
    lengths = {"row_tokens": tokens, "row_titles": titles}
    examples = [Example([0] * t, t - n, False) for t, n in zip(tokens, titles, strict=True)]
    size, found = 3 * 2 * world_size, []
    for step in range(min(updates, 2 * -(-50 // size))):
        epoch, update = divmod(step, -(-50 // size))
        rows = epoch_order(50, 7, epoch)[update * size : (update + 1) * size].tolist()
        for rank in range(world_size):
            for micro_batch in deal([examples[row] for row in rows], 3, rank, world_size):
                sizes = [[len(e.ids) for e in micro_batch]]
                sizes += [[e.num_title_ids for e in micro_batch]]
                count = len(micro_batch)
                if padded:
                    found.append((count * max(sizes[0]), count * max(sizes[1]), count))
                else:
                    found.append((sum(sizes[0]), sum(sizes[1]), 0))
    largest = plan.largest_micro_batch(lengths, arguments(), world_size, updates, padded)
    assert largest == max(found)


def test_the_largest_micro_batch_counts_what_is_learnt_of_articles():
    lengths = {"row_tokens": array("I", [900, 40]), "row_titles": array("I", [30, 10])}
    once = arguments(per_device_train_batch_size=2, gradient_accumulation_steps=1)
    assert plan.largest_micro_batch(lengths, once, 1, 1) == MicroBatchSize(940, 40)
    once.prompt_loss_weight = 0.1
    assert plan.largest_micro_batch(lengths, once, 1, 1) == MicroBatchSize(
        940, 40 + ARTICLE_LABELS + 30
    )


def test_the_largest_padded_micro_batch_counts_its_padding():
    lengths = {"row_tokens": array("I", [900, 40]), "row_titles": array("I", [10, 30])}
    args = arguments(per_device_train_batch_size=2, gradient_accumulation_steps=1)
    assert plan.largest_micro_batch(lengths, args, 1, 1, padded=True) == MicroBatchSize(1800, 60, 2)


def test_the_time_to_come_goes_by_tokens():
    """100 tokens a second, 5,000 an epoch of 10 updates, 14 of 20 still to come: 7,000 tokens."""
    recent = [{"tokens": 150, "seconds": 1.0}, {"tokens": 50, "seconds": 1.0}]
    told = plan.describe_time(recent, {"tokens": 5000}, 6, (20, 10, 1, 0))
    assert "about 70 s for the 14 updates to come" in told
    assert "(100 tokens/s in the last 2)" in told
    told = plan.describe_time(recent, {"tokens": 200_000}, 6, (20, 10, 1, 0))
    assert "about 47 min for" in told
    told = plan.describe_time(recent, {"tokens": 5_000_000}, 6, (20, 10, 1, 0))
    assert "about 19 h 27 min for" in told
