"""plan.py, memory.py: what is said before the first update. Run: pytest tests/test_plan.py"""

import argparse

import pytest
import torch
from conftest import byte_level_tokenizer, french_rows, save_tiny_model

import memory
import plan
from prompting import Prompt

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
        "longest": max(len(example.ids) for example in examples),
        "first_title_cut": next(i for i, example in enumerate(examples) if example.title_cut),
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
    values = {"lora_dropout": 0.0, "mixed_precision": "bf16", "activation_checkpointing": "auto"}
    values |= {"per_device_train_batch_size": 4, "max_title_tokens": 64} | changes
    return argparse.Namespace(**values)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide and deep enough for what autograd keeps of its layers to count."""
    from peft import LoraConfig, get_peft_model

    from modeling import load_base
    from packing import use_packed_attention

    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    folder = save_tiny_model(tmp_path_factory.mktemp("wide"), byte_level_tokenizer(), **shape)
    base = load_base(str(folder), CPU, torch.bfloat16, nf4=True)
    assert use_packed_attention(base, 512)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=0.1, target_modules="all-linear")
    return get_peft_model(base, config).train()


def saved_bytes(model, length) -> int:
    """Return the bytes that autograd keeps of a training forward of 4 rows, weights left out."""
    from batching import pack
    from prompting import Example
    from train import title_loss

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    examples = [Example([5] * length, length - 64, False) for _ in range(4)]
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        title_loss(model, pack(examples, CPU))
    return sum(seen.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_token_takes_is_what_autograd_keeps(model, dropout):
    """Two lengths, so that all that does not grow with the tokens drops out of the difference."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    for layer in model.modules():
        if hasattr(layer, "lora_dropout"):
            for name in layer.lora_dropout:
                kind = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
                layer.lora_dropout[name] = kind
    counted = (saved_bytes(model, 512) - saved_bytes(model, 256)) / (4 * 256)
    args = arguments(lora_dropout=dropout)
    expected = [memory.expected_peak_memory(model, args, CPU, n, 0) for n in (256, 512)]
    per_token = (expected[1] - expected[0]) / memory.HOLES / (4 * 256)
    assert per_token == pytest.approx(counted, rel=0.1)


def test_the_expected_peak_grows_with_what_it_should(model):
    def expected(device=CUDA, longest=512, every=0, **changes):
        return memory.expected_peak_memory(model, arguments(**changes), device, longest, every)

    assert expected(every=1) < expected(every=2) < expected(every=4) < expected()
    assert expected() < expected(lora_dropout=0.1)
    assert expected() < expected(longest=1024)
    assert expected() < expected(per_device_train_batch_size=8)
    assert expected() < expected(mixed_precision="no")
    assert expected() < expected(device=CPU)


def test_peak_memory_is_what_this_process_took():
    import re

    before = float(re.fullmatch(r"([\d.]+) GiB resident", memory.peak_memory(CPU))[1])
    block = bytearray(int((before + 0.5) * 2**30))
    block[:: 1 << 12] = bytes([1]) * len(block[:: 1 << 12])
    after = float(memory.peak_memory(CPU).split()[0])
    assert after - before > 0.3


@pytest.mark.parametrize(("asked", "every"), [("none", 0), ("full", 1), ("3", 3)])
def test_checkpointing_is_as_asked_for(model, asked, every):
    args = arguments(activation_checkpointing=asked)
    assert memory.choose_checkpointing(model, args, CPU, 512) == every


@pytest.mark.parametrize("every", [0, 4, 2, 1])
def test_checkpointing_is_the_least_that_fits(model, every, monkeypatch):
    import psutil

    needed = memory.expected_peak_memory(model, arguments(), CPU, 512, every)
    there = argparse.Namespace(available=1.01 * needed / 0.9 if every != 1 else 0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    assert memory.choose_checkpointing(model, arguments(), CPU, 512) == every
