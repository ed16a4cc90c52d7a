"""batching.py: order, dealing and padding. Run: python -m pytest tests/test_batching.py"""

import dataclasses
import itertools
import random

import pytest
import torch

from batching import (
    ARTICLE_LABELS,
    IGNORED,
    deal,
    dropout_seed,
    epoch_order,
    learn_articles_too,
    pack,
    pad_left,
)
from prompting import Example

CPU = torch.device("cpu")


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Return examples whose ids are all different, so that they can be told apart."""
    rng, ids = random.Random(seed), itertools.count(10)
    examples = []
    for _ in range(count):
        prompt, title = rng.randint(1, 30), rng.randint(1, 9)
        examples.append(Example([next(ids) for _ in range(prompt + title)], prompt, False))
    return examples


def test_an_epoch_has_every_row_once_in_an_order_of_its_own():
    orders = [epoch_order(101, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(101)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(101, 1, 1).tolist() == orders[3]
    torch.manual_seed(99)  # whatever happened before
    assert epoch_order(101, 0, 0).tolist() == orders[0]


def test_dropout_seeds_differ_by_seed_step_and_rank():
    seeds = {dropout_seed(s, t, r) for s in range(3) for t in range(50) for r in range(8)}
    assert len(seeds) == 3 * 50 * 8


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_dealing_gives_each_article_once_and_as_many_rounds_to_all(
    count, micro_batch_size, world_size
):
    examples = make_examples(count)
    hands = [deal(examples, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(hand) for hand in hands}) == 1
    dealt = [example for hand in hands for micro_batch in hand for example in micro_batch]
    with_loss = [tuple(example.ids) for example in dealt if example.num_title_ids]
    assert sorted(with_loss) == sorted(tuple(example.ids) for example in examples)
    for micro_batch in itertools.chain(*hands):
        assert 1 <= len(micro_batch) <= micro_batch_size
    # As few rounds as there can be.
    assert len(hands[0]) == -(-count // (micro_batch_size * world_size))


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_micro_batch_gets_its_share_of_long_articles(world_size):
    examples = make_examples(64)
    hands = [deal(examples, 4, rank, world_size) for rank in range(world_size)]
    totals = [sum(len(e.ids) for e in batch) for hand in hands for batch in hand]
    assert len(totals) == 16
    assert max(totals) - min(totals) < max(len(example.ids) for example in examples)
    assert max(totals) < 1.2 * sum(totals) / len(totals)


def test_a_packed_row_has_every_article_once_and_no_padding():
    ids_and_prompts = (([5, 6, 7, 0], 2), ([0, 8], 1), ([9] * 3, 3))
    batch = pack([Example(ids, prompt, False) for ids, prompt in ids_and_prompts], CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0, 8, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 4, 6, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    # The id 0 is a label where it is a title's, and the third, a dealt dummy, has none.
    assert batch["logits_to_keep"].tolist() == [1, 2, 4]
    assert batch["labels"].tolist() == [7, 0, 8]


def test_of_long_articles_so_many_tokens_are_learnt_that_stand_for_all():
    long = Example(list(range(1000)), 950, False, article=range(0, 940))
    short = Example(list(range(60)), 50, False, article=range(10, 45))
    bare = Example(list(range(9)), 5, False, article=range(0))
    drawn = [learn_articles_too([long, short, bare], 0.1, 7, step) for step in (3, 4)]
    for example, article in zip(drawn[0], (range(1, 940), range(10, 45), range(0)), strict=True):
        assert list(example.article_labels) == sorted(set(example.article_labels) & set(article))
        assert len(example.article_labels) == min(ARTICLE_LABELS, len(article))
        whole = len(example.article_labels) * example.article_weight
        assert whole == pytest.approx(0.1 * len(article))
    assert drawn[0] == learn_articles_too([long, short, bare], 0.1, 7, 3)
    assert drawn[0][0].article_labels != drawn[1][0].article_labels
    reseeded = learn_articles_too([long, short, bare], 0.1, 8, 3)
    assert drawn[0][0].article_labels != reseeded[0].article_labels
    assert drawn[1][0].article_labels != reseeded[0].article_labels  # nor by their sum
    # In 60 updates, each token of the article had its turn.
    turns = (learn_articles_too([long], 0.1, 7, step)[0].article_labels for step in range(60))
    assert set().union(*turns) == set(range(1, 940))


def test_what_is_learnt_of_an_article_is_among_the_labels_with_its_weight():
    some = Example([5, 6, 7, 0], 3, False, article=range(1, 3), article_labels=(1, 2))
    some = dataclasses.replace(some, article_weight=0.5)
    batch = pack([Example([9, 8], 1, False), some], CPU)
    assert batch["input_ids"].tolist() == [[9, 8, 5, 6, 7, 0]]
    assert batch["logits_to_keep"].tolist() == [0, 2, 3, 4]
    assert batch["labels"].tolist() == [8, 6, 7, 0]
    assert batch["weights"].tolist() == [1.0, 0.5, 0.5, 1.0]
    assert batch["of_titles"].tolist() == [True, False, False, True]


def test_padding_is_on_the_left_and_made_from_lengths():
    ids_and_prompts = (([5, 6, 7, 0], 2), ([0, 8], 1), ([9] * 6, 6))
    examples = [Example(ids, prompt, False) for ids, prompt in ids_and_prompts]
    batch = pad_left(examples, CPU)
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6, 7, 0], [0, 0, 0, 0, 0, 8], [9] * 6]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [1] * 6]
    assert batch["position_ids"].tolist() == [
        [0, 0, 0, 1, 2, 3],
        [0, 0, 0, 0, 0, 1],
        [0, 1, 2, 3, 4, 5],
    ]
    # The id 0 is a label where it is a title's, and the third row, a dealt dummy, has none.
    assert batch["labels"].tolist() == [[7, 0], [IGNORED, 8], [IGNORED, IGNORED]]


def test_a_batch_without_titles_has_a_loss_of_zero_and_gradients_of_zero():
    batch = pad_left([Example([1, 2, 3], 3, False)], CPU)
    assert batch["labels"].tolist() == [[IGNORED]]
    logits = torch.randn(1, 7, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        logits, batch["labels"][0], ignore_index=IGNORED, reduction="sum"
    )
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_left_padding_changes_no_logit_whatever_the_positions_are(family):
    """Rotary positions would forgive positions that count the padding; learned ones do not."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    if family == "llama":
        config = LlamaConfig(**sizes, intermediate_size=48, initializer_range=0.2)
    else:
        config = GPT2Config(vocab_size=99, n_layer=2, n_head=2, n_embd=32, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    examples = [Example([11, 12, 13, 14, 15, 16, 17], 4, False), Example([21, 22, 23], 1, False)]
    batch = pad_left(examples, CPU)
    batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    for row, example in enumerate(examples):
        alone = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
        count = example.num_title_ids
        found, expected = logits[row, -count:], alone[-count - 1 : -1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
