"""memory.py: what training is to take, and what it took. Run: pytest tests/test_memory.py"""

import argparse
import functools

import pytest
import torch
from conftest import byte_level_tokenizer, save_tiny_model

import machine
import memory
from batching import MicroBatchSize, deal, pack, pad_left
from exit_codes import UserError
from modeling import check_targets, checkpoint_layers, fuse_lora, load_base, skeleton
from packing import PACKED, use_packed_attention
from prompting import Example
from train import title_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MICRO_BATCH = MicroBatchSize(tokens=1024, labels=64)
RESIDENT = 300 << 20


def lora(base, dropout=0.0, r=16):
    from peft import LoraConfig

    targets = check_targets(base, ["all-linear"])
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_dropout=dropout, target_modules=targets)


def arguments(**changes):
    values = {"base_weights": "nf4", "mixed_precision": "bf16", "activation_checkpointing": "auto"}
    values["gradient_accumulation_steps"] = 1
    return argparse.Namespace(**values | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide and deep enough for what autograd keeps of its layers to count."""
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    return save_tiny_model(tmp_path_factory.mktemp("wide"), byte_level_tokenizer(), **shape)


@pytest.fixture(scope="module")
def base(folder):
    return skeleton(str(folder), torch.bfloat16)


def expected(
    base,
    way="qlora",
    every=0,
    device=CUDA,
    dropout=0.0,
    r=16,
    size=MICRO_BATCH,
    shards=1,
    **changes,
):
    config, args = lora(base, dropout, r), arguments(**changes)
    found = memory.trace(base, config, args, device, size, way == "full", every, shards)
    return memory.expected_peak(found, base, device, way, shards, RESIDENT * (device == CPU))


TRACE = memory.trace


@functools.cache
def traced(base, dropout, r, of_args, *rest):
    # Has only what the key has: if `trace` read more, it would fail.
    names = ("mixed_precision", "gradient_accumulation_steps")
    args = argparse.Namespace(**dict(zip(names, of_args, strict=True)))
    return TRACE(base, lora(base, dropout, r), args, *rest)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """Tests ask for the same passes again and again, and each takes a second or more."""

    def trace(base, config, args, *rest):
        of_args = args.mixed_precision, args.gradient_accumulation_steps
        return traced(base, config.lora_dropout, config.r, of_args, *rest)

    monkeypatch.setattr(memory, "trace", trace)


@pytest.mark.parametrize("way", list(memory.WAYS))
@pytest.mark.parametrize(
    ("every", "dropout", "precision"),
    [(0, 0.0, "bf16"), (1, 0.0, "bf16"), (2, 0.0, "bf16"), (0, 0.1, "bf16"), (0, 0.0, "no")],
)
def test_what_is_expected_is_what_the_same_micro_batch_takes(
    folder, base, way, every, dropout, precision
):
    """The model with its weights, on several articles, counted by the same means. (On a CPU; asked
    for a GPU, where neither holes nor libraries are added.)"""
    from peft import get_peft_model

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    dtype = torch.float32 if way == "full" else dtype
    model = load_base(str(folder), CPU, dtype, nf4=way == "qlora")
    assert use_packed_attention(model, 1024) is None
    if way == "full":
        model.requires_grad_(True)
    else:
        model = get_peft_model(model, lora(model, dropout))
        fuse_lora(model)
    checkpoint_layers(model, every)
    model.train()
    examples = [Example([5] * length, length - 16, False) for length in (300, 250, 244, 230)]
    with memory._Count(model) as count:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = title_loss(model, pack(examples, CPU))
        loss.backward()
    base = base if precision == "bf16" else skeleton(str(folder), torch.float32)
    found = expected(base, way, every, dropout=dropout, mixed_precision=precision)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linears = [p for p in model.parameters() if hasattr(p, "quant_state")]
    fixed = sum(p.nbytes for p in model.parameters() if not hasattr(p, "quant_state"))
    fixed += memory.NF4_BYTES * sum(torch.Size(p.quant_state.shape).numel() for p in linears)
    fixed += memory.MOMENTS * trainable
    assert found - fixed == pytest.approx(count.peak, rel=0.05)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("soft_caps", [False, True])  # whose scores have the square of a row
def test_what_is_expected_of_padded_rows_is_what_they_take(every, soft_caps):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
    config = Gemma2Config(**shape, head_dim=64) if soft_caps else LlamaConfig(**shape)

    def adapted(device):
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return base.requires_grad_(False)

    model = adapted("cpu")
    model = get_peft_model(model, lora(model))
    fuse_lora(model)
    checkpoint_layers(model, every)
    examples = [Example([5] * length, length - 16, False) for length in (300, 250, 244, 230)]
    with memory._Count(model.train()) as count:
        with torch.autocast("cpu", torch.bfloat16):
            loss = title_loss(model, pad_left(examples, CPU))
        loss.backward()
    base = adapted("meta")
    found = expected(base, "lora", every, size=MicroBatchSize(4 * 300, 4 * 16, padded_rows=4))
    fixed = sum(p.nbytes + memory.MOMENTS * p.requires_grad * p.numel() for p in model.parameters())
    assert found - fixed == pytest.approx(count.peak, rel=0.05)
    packed = expected(base, "lora", every)
    assert packed is None if soft_caps else packed < found


@pytest.mark.parametrize("way", ["full", "qlora"])
def test_gradients_of_micro_batches_before_are_counted(folder, base, way):
    """Of a second micro-batch, with those of the first in place."""
    from peft import get_peft_model

    model = load_base(
        str(folder), CPU, torch.float32 if way == "full" else torch.bfloat16, nf4=False
    )
    assert use_packed_attention(model, 1024) is None
    if way == "full":
        model.requires_grad_(True)
    else:
        model = get_peft_model(model, lora(model, r=64))
        fuse_lora(model)
    batch = pack([Example([5] * 256, 192, False)] * 4, CPU)
    peaks = []
    with memory._Count(model.train()) as count:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = title_loss(model, batch)
            loss.backward()
            peaks.append(count.peak)
            del loss
    size = MicroBatchSize(1024, 256)
    once, again = (
        expected(base, way, r=64, size=size, gradient_accumulation_steps=n) for n in (1, 2)
    )
    assert again - once == pytest.approx(peaks[1] - peaks[0], rel=0.1)
    assert again > once


@pytest.mark.parametrize(
    ("num_layers", "every", "full", "dropout", "shards", "size", "earlier"),
    [
        (8, 0, False, 0.1, 1, MicroBatchSize(512, 64), 1),
        (8, 0, True, 0.0, 1, MicroBatchSize(16, 8), 1),  # gradients outgrow activations
        (9, 0, True, 0.0, 1, MicroBatchSize(512, 64, padded_rows=2), 2),
        (9, 1, False, 0.0, 2, MicroBatchSize(16, 8), 1),  # autocast's copies of the adapter do
        (17, 2, False, 0.0, 1, MicroBatchSize(64, 8), 1),
    ],
)
def test_a_few_layers_tell_of_all(num_layers, every, full, dropout, shards, size, earlier):
    base = many_layers(num_layers)
    args = arguments(gradient_accumulation_steps=earlier)
    setup = (base, lora(base, dropout, r=64), args, CPU, size, full, every, shards)
    traced = []

    def in_use(model, *rest, original=memory._in_use, **more):
        traced.append(len(model.get_decoder().layers))
        return original(model, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_in_use", in_use)
        model, *found = TRACE(*setup)
        patch.setattr(memory, "alike", lambda model: False)
        whole, *counted = TRACE(*setup)
    assert found == counted
    assert sum(traced[:2]) < num_layers
    assert traced[2:] == [num_layers]
    assert [p.shape for p in model.parameters()] == [p.shape for p in whole.parameters()]


def many_layers(number: int, layer_types=None):
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": number}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
    config = Qwen2Config(**shape, tie_word_embeddings=True, layer_types=layer_types)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return base.requires_grad_(False)


def test_layers_are_alike_in_kind_and_shape():
    assert memory.alike(many_layers(3))
    assert not memory.alike(many_layers(4, ["full_attention", "sliding_attention"] * 2))
    other = many_layers(3)
    other.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 64, device="meta")
    assert not memory.alike(other)
    other = many_layers(3)
    other.model.layers[1].self_attn.scaling = 1.0
    assert not memory.alike(other)
    other = many_layers(3)
    other._no_split_modules = None
    assert not memory.alike(other)


def test_layers_of_which_some_have_an_adapter_are_all_traced():
    from peft import LoraConfig, get_peft_model

    base, args = many_layers(9), arguments()
    some = LoraConfig(task_type="CAUSAL_LM", r=64, target_modules=["layers.7.mlp.up_proj"])
    setup = (some, args, CPU, MICRO_BATCH, False, 0, 1)
    _, *found = TRACE(base, *setup)
    base.set_attn_implementation(PACKED)
    model = get_peft_model(base, some)
    fuse_lora(model)
    assert found == list(memory._in_use(model.train(), args, "cpu", MICRO_BATCH, 1))


def test_layers_without_a_border_are_all_traced(monkeypatch):
    base = many_layers(9)
    setup = (base, lora(base), arguments(), CPU, MICRO_BATCH, False, 0, 1)
    _, *found = TRACE(*setup)
    monkeypatch.setattr(memory, "_call_after_backward", lambda layer, function: None)
    _, *counted = TRACE(*setup)
    assert found == counted


def test_the_expected_peak_grows_with_what_it_should(base):
    whole = expected(base)
    assert expected(base, every=1) < expected(base, every=2) < whole
    assert whole < expected(base, "lora") < expected(base, "full")
    assert whole < expected(base, dropout=0.1)
    assert whole < expected(base, size=MicroBatchSize(2048, 64))
    assert whole < expected(base, device=CPU)


def test_a_shard_is_a_share_of_what_is_really_stored(folder, base):
    """Weights, gradients and moments are divided; scales of 4-bit blocks are on every card."""
    from peft import get_peft_model

    model = load_base(str(folder), CPU, torch.bfloat16, nf4=True, shardable=True)
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    model = get_peft_model(model, lora(model))
    stored = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    divided = (expected(base, shards=2) - expected(base, shards=4)) * 4
    assert divided == pytest.approx(stored + (4 + memory.MOMENTS) * trained, rel=1e-4)
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    numbers = sum(state.shape.numel() for state in states)
    assert scales == pytest.approx((memory.NF4_BYTES - 0.5) * numbers, rel=0.05)
    assert expected(base, shards=4) < expected(base)


def test_gradients_of_shards_never_add_up(base):
    """Of ever more shards there remain two layers, with gradients, and what is in none."""
    layer = sum(p.numel() for p in base.model.layers[0].parameters())
    others = sum(p.numel() for p in base.parameters()) - 4 * layer
    left = expected(base, "full", size=MicroBatchSize(16, 4), shards=10**9)
    fixed = 2 * 8 * layer + 4 * others
    assert fixed < left < fixed + 4 * 4 * layer


def test_a_7b_takes_seconds_and_no_memory(tmp_path):
    """Published peaks of Llama-2-7B in 4 bits with everything checkpointed are 5 to 9 GB."""
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    before = memory.peak_memory(CPU)
    base = skeleton(str(tmp_path), torch.bfloat16)
    assert 5 * 2**30 < expected(base, every=1, size=MicroBatchSize(4096, 200)) < 7 * 2**30
    assert memory.peak_memory(CPU) - before < 2**30


def plan(base, device=CPU, **changes):
    args = arguments(**changes)
    resident = RESIDENT * (device == CPU)
    return memory.plan_memory(base, lora(base), args, device, MICRO_BATCH, resident=resident)


@pytest.mark.parametrize(("asked", "every"), [("none", 0), ("full", 1), ("3", 3)])
def test_checkpointing_is_as_asked_for(base, asked, every, monkeypatch):
    monkeypatch.setattr(memory, "trace", TRACE)  # or one record of it was compared with itself
    record = plan(base, activation_checkpointing=asked)
    assert record["checkpointed_every"] == every
    assert record["this_run"] == record["estimate"]["qlora"] == expected(base, "qlora", every, CPU)


@pytest.mark.parametrize("every", [0, 4, 2, 1])
def test_checkpointing_is_the_least_that_fits(base, every, monkeypatch):
    room = 1.001 * expected(base, every=every) / 0.9 if every != 1 else 0
    monkeypatch.setattr(memory, "free_memory", lambda device: room)
    assert plan(base, CUDA)["checkpointed_every"] == every


def test_checkpointing_begins_with_the_last_tenth_of_the_memory(base, monkeypatch):
    room = 0.999 * expected(base) / 0.9
    monkeypatch.setattr(memory, "free_memory", lambda device: room)
    assert plan(base, CUDA)["checkpointed_every"] == 4


def test_what_this_process_has_already_is_told_and_not_asked_for_again(base, monkeypatch):
    """The libraries alone: torch's build with CUDA takes 0.3 GiB more than the one without."""
    room = 1.001 * (expected(base, device=CPU) - RESIDENT) / 0.9
    monkeypatch.setattr(memory, "free_memory", lambda device: room)
    record = plan(base)
    assert record["checkpointed_every"] == 0
    monkeypatch.setattr(memory, "resident_memory", lambda device: RESIDENT + 12345)
    later = memory.plan_memory(base, lora(base), arguments(), CPU, MICRO_BATCH)
    assert later["this_run"] == record["this_run"] + 12345
    block = bytearray(2**28)
    block[:: 1 << 12] = bytes([1]) * len(block[:: 1 << 12])
    before = machine.resident_memory(CPU)
    del block
    assert before - machine.resident_memory(CPU) > 2**27
    assert machine.resident_memory(CUDA) == 0


def test_tied_weights_are_counted_once(tmp_path):
    folder = save_tiny_model(tmp_path / "tied", byte_level_tokenizer(), tie=True)
    base = skeleton(str(folder), torch.bfloat16)
    model, *_ = memory.trace(base, lora(base), arguments(), CPU, MICRO_BATCH, True, 0, 1)
    assert model.num_parameters() == base.num_parameters()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embeddings.weight


def test_adamw_keeps_as_many_bytes_of_each_number_as_are_counted():
    from bitsandbytes.optim import PagedAdamW32bit

    weights = torch.nn.Parameter(torch.ones(100_000))
    weights.grad = torch.ones_like(weights)
    optimizer = PagedAdamW32bit([weights])
    optimizer.step()
    kept = sum(s.nbytes for s in optimizer.state[weights].values() if isinstance(s, torch.Tensor))
    assert memory.MOMENTS * len(weights) == kept


@pytest.mark.parametrize(
    ("weights", "way"), [("nf4", "qlora"), ("nf4-bf16", "lora"), ("bf16", "lora")]
)
def test_the_run_is_one_of_the_ways(base, weights, way):
    record = plan(base, base_weights=weights, activation_checkpointing="none")
    assert record["this_run"] == record["estimate"][way]


def test_a_model_without_checkpointing_has_none(folder, monkeypatch):
    base = skeleton(str(folder), torch.bfloat16)
    monkeypatch.setattr(type(base), "supports_gradient_checkpointing", False)
    monkeypatch.setattr(memory, "free_memory", lambda _: 1 << 20)
    assert plan(base)["checkpointed_every"] == 0
    assert plan(base, activation_checkpointing="none")["checkpointed_every"] == 0
    with pytest.raises(UserError, match="--activation_checkpointing 2: transformers knows "):
        plan(base, activation_checkpointing="2")


def test_a_model_that_needs_content_has_no_estimate(folder, monkeypatch):
    """And is checkpointed whole, to be safe."""
    base = skeleton(str(folder), torch.bfloat16)  # one that no other test has traced
    forward = type(base).forward

    def looks_at_its_input(self, input_ids, **kwargs):
        return forward(self, input_ids + input_ids.max().item(), **kwargs)

    monkeypatch.setattr(type(base), "forward", looks_at_its_input)
    record = plan(base)
    assert record["checkpointed_every"] == 1
    assert record["this_run"] is None
    assert set(record["estimate"].values()) == {None}


def test_what_is_counted_is_what_lives_at_a_time():
    """16 bytes, then 40 beside them, then 40 after the first 16 are gone; a view takes nothing."""
    model = torch.nn.Linear(1, 1)
    with memory._Count(model) as count:
        first = torch.zeros(4)
        second = torch.zeros(10)
        assert count.now == 56
        view = second[2:].view(2, 4)
        del first
        third = torch.zeros(3)
        assert count.now == 52
        del second, third
        assert count.now == 40
        del view
    assert (count.now, count.peak) == (0, 56)


def test_peak_memory_is_what_this_process_took():
    before = memory.peak_memory(CPU)
    block = bytearray(before + 2**29)
    block[:: 1 << 12] = bytes([1]) * len(block[:: 1 << 12])
    assert memory.peak_memory(CPU) - before > 2**28
    assert memory.describe_peak(CPU) == f"{memory.peak_memory(CPU) / 2**30:.1f} GiB resident"


def test_a_micro_batch_without_loss_is_the_shortest_article():
    examples = [Example([1] * length, length - 2, False) for length in (9, 5, 7)]
    hands = [deal(examples, 1, rank, 2) for rank in range(2)]
    assert [len(hand) for hand in hands] == [2, 2]
    spare = [e for hand in hands for (e,) in hand if e.num_title_ids == 0]
    assert [len(example.ids) for example in spare] == [5]
