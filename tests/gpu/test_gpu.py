"""What only a GPU shows: paging, bf16 on CUDA, memory. Run: python -m pytest -m gpu tests/gpu"""

import json

import pytest
import torch
from conftest import byte_level_tokenizer, call, read_csv, save_tiny_model, train_args

import infer
import merge
import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]
CUDA = torch.device("cuda", 0)
# Wide enough for states of 1e5 elements and more, which bitsandbytes pages.
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
WIDE |= {"num_key_value_heads": 4, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    return save_tiny_model(folder, byte_level_tokenizer(), **(WIDE | {"initializer_range": 0.02}))


@pytest.fixture
def ieee_products():
    """Products in fp32 without tf32, which a training run turns on for the whole process."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield
    matmul.fp32_precision = before


@pytest.fixture
def spied_optimizers(monkeypatch):
    """The optimizers that train.py makes, to look at their states afterwards."""
    import bitsandbytes.optim

    made = []

    class Spy(bitsandbytes.optim.PagedAdamW32bit):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW32bit", Spy)
    return made


def paged(optimizer) -> dict[bool, set[bool]]:
    """Return, for large and for small parameters, whether their states are paged."""
    found = {True: set(), False: set()}
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            found[parameter.numel() >= 1e5].add(getattr(state[key], "is_paged", False))
    return found


def test_large_optimizer_states_are_paged_and_paged_again_after_resume(
    wide_model, news, tmp_path, spied_optimizers, capsys
):
    more = ("--lora_r", "128", "--checkpointing_steps", "2", "--save_total_limit", "9")
    call(train.main, *train_args(wide_model, news, tmp_path / "run", *more))
    assert "PagedAdamW32bit, paged" in capsys.readouterr().out
    assert paged(spied_optimizers[0])[True] == {True}
    assert paged(spied_optimizers[0])[False] <= {False}
    resume = ("--resume_from_checkpoint", tmp_path / "run/checkpoints/step-000002")
    call(train.main, *train_args(wide_model, news, tmp_path / "run", *more, *resume))
    assert paged(spied_optimizers[1])[True] == {True}


def test_the_base_takes_a_quarter_of_its_bf16_bytes(wide_model):
    from memory import NF4_BYTES
    from modeling import load_base

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_base(str(wide_model), CUDA, torch.bfloat16, nf4=True)
    taken = torch.cuda.memory_allocated() - before
    linear = [p for p in model.parameters() if hasattr(p, "quant_state")]
    weights = sum(torch.Size(p.quant_state.shape).numel() for p in linear)
    others = sum(p.nbytes for p in model.parameters() if not hasattr(p, "quant_state"))
    assert taken == pytest.approx(NF4_BYTES * weights + others, rel=0.05)


def test_trains_infers_and_merges_on_the_gpu(wide_model, news, tmp_path, capsys):
    run_dir = tmp_path / "run"
    call(train.main, *train_args(wide_model, news, run_dir, "--num_train_epochs", "4"))
    output = capsys.readouterr().out
    assert "bf16 autocast, adapter in fp32, on cuda" in output
    assert "GiB on the GPU" in output
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    call(merge.main, "--run_dir", run_dir, "--output_dir", tmp_path / "merged")
    check = json.loads((tmp_path / "merged/run_config.json").read_text())["merge_check"]
    assert check["relative_difference"] < 0.03
    for name in ("run", "merged"):
        output = ("--output_file", tmp_path / f"{name}.csv")
        source = ("--run_dir", tmp_path / name, "--input_file", news / "test.csv")
        call(infer.main, *source, *output)
        assert len(read_csv(tmp_path / f"{name}.csv")) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_packed_rows_and_continuous_batching_on_the_gpu(wide_model, dtype, ieee_products):
    """In fp32 all write the same; in bf16, whose packed rows take another kernel, most of it."""
    from conftest import french_rows

    from modeling import load_base
    from packing import use_packed_attention
    from prompting import Prompt, load_tokenizer

    model = load_base(str(wide_model), CUDA, dtype, nf4=False)
    prompt = Prompt(load_tokenizer(str(wide_model)), "{article}\nTitre :", False, 200, 40)
    articles = [row["text"] for row in french_rows(12, seed=5)]
    padded = dict(infer.generate_titles(model, prompt, articles))
    assert use_packed_attention(model, 300) is None
    packed = dict(infer.generate_titles(model, prompt, articles))
    prompts = {row: prompt.encode(article).ids for row, article in enumerate(articles)}
    rest = (infer.Decoding(40), [f"a{row}" for row in prompts], 2048, lambda: False)
    continuous = dict(infer.write_continuously(model, prompt, prompts, *rest))
    assert padded.keys() == packed.keys() == continuous.keys() == prompts.keys()
    drawn = infer.Decoding(40, num_samples=3, temperature=1e-6)  # as good as greedy
    shared = dict(infer.write_batch(model, prompt, prompts, drawn, {}))
    assert padded.keys() == shared.keys()
    if dtype == torch.float32:
        assert padded == packed == continuous == shared
    else:
        # Of a random model, the first tokens: a near tie that tips changes all that follows.
        assert sum(padded[row].title[:3] == packed[row].title[:3] for row in padded) >= 9


def test_a_batch_that_does_not_fit_on_the_gpu_is_halved(
    wide_model, tmp_path, capsys, ieee_products
):
    """Of articles so long that the weights are the smaller part of what they take."""
    from conftest import french_rows, write_csv

    rows = [row for row in french_rows(200, seed=3, longest=160) if len(row["text"]) > 500][:64]
    write_csv(tmp_path / "test.csv", rows)
    options = ("--model_name_or_path", wide_model, "--input_file", tmp_path / "test.csv")
    options += ("--base_weights", "fp32", "--max_batch_tokens", "100000", "--max_new_tokens", "8")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call(infer.main, *options, "--output_file", tmp_path / "roomy.csv")
    taken, all_of_it = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
    assert taken > 4 * (wide_model / "model.safetensors").stat().st_size  # which is in bf16
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.7 * taken / all_of_it)
    try:
        call(infer.main, *options, "--output_file", tmp_path / "tight.csv")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "do not fit into memory" in capsys.readouterr().out
    assert read_csv(tmp_path / "tight.csv") == read_csv(tmp_path / "roomy.csv")


def test_rounding_to_nf4_agrees_on_gpu_and_cpu(wide_model):
    """An adapter that was trained on a GPU can be merged on a laptop. (Not to the last bit: the
    mean that double quantization subtracts is summed in another order.)"""
    from safetensors.torch import load_file

    tensors = load_file(wide_model / "model.safetensors")
    names = [name for name in tensors if name.endswith("_proj.weight")]
    assert names
    for name in names:
        on_cpu = merge.round_to_nf4(tensors[name]).float()
        on_gpu = merge.round_to_nf4(tensors[name].cuda()).cpu().float()
        assert (on_gpu - on_cpu).norm() < 1e-3 * on_cpu.norm(), name


def test_logits_of_all_positions_never_exist(wide_model):
    """The peak of a long prompt with a short title stays below the logits' own size."""
    from batching import pack
    from modeling import load_base
    from packing import use_packed_attention
    from prompting import Example

    model = load_base(str(wide_model), CUDA, torch.bfloat16, nf4=True)
    model.resize_token_embeddings(200_000)
    assert use_packed_attention(model, 300) is None
    example = Example([5] * 1000, 990, False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        train.title_loss(model, pack([example], CUDA))
    assert torch.cuda.max_memory_allocated() - before < 1000 * 200_000 * 2


def test_packed_rows_on_the_gpu_are_those_of_single_articles(wide_model):
    """Through variable-length attention, in bf16: losses and gradients up to its rounding."""
    from peft import LoraConfig, get_peft_model

    from batching import pack
    from modeling import load_base
    from packing import use_packed_attention
    from prompting import Example

    torch.manual_seed(0)
    base = load_base(str(wide_model), CUDA, torch.bfloat16, nf4=True)
    assert use_packed_attention(base, 300) is None
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config)
    lengths = (300, 17, 120, 64)
    ids = [torch.randint(3, 300, (length,)).tolist() for length in lengths]
    examples = [Example(row, len(row) - 9, False) for row in ids]
    results = []
    for batches in ([examples], [[example] for example in examples]):
        model.zero_grad()
        losses = []
        for batch in batches:
            with torch.autocast("cuda", torch.bfloat16):
                losses.append(train.title_loss(model, pack(batch, CUDA)))
            losses[-1].backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((sum(losses).item(), gradient))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert (results[0][1] - results[1][1]).norm() < 0.02 * results[1][1].norm()


@pytest.mark.parametrize(
    ("base_weights", "dropout"), [("nf4", 0.0), ("nf4", 0.1), ("bf16", 0.0), ("bf16", 0.1)]
)
def test_what_is_expected_of_a_micro_batch_is_what_it_takes(tmp_path, base_weights, dropout):
    """Two layers as wide as those of Llama-2-7B. It prints what autograd keeps (pytest -rP)."""
    import argparse
    from collections import Counter

    from peft import LoraConfig, get_peft_model

    import memory
    from batching import MicroBatchSize, pack
    from modeling import fuse_lora, load_base, skeleton
    from packing import PACKED, use_packed_attention
    from prompting import Example

    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 32, "num_hidden_layers": 2}
    folder = save_tiny_model(tmp_path, byte_level_tokenizer(), **shape)
    lora = {"r": 16, "lora_dropout": dropout, "target_modules": "all-linear"}
    config = LoraConfig(task_type="CAUSAL_LM", **lora)
    examples = [Example([5] * length, length - 50, False) for length in (800, 700, 500, 400)]

    weightless = skeleton(str(folder), torch.bfloat16)
    weightless.set_attn_implementation(PACKED)
    counted = get_peft_model(weightless, config)
    fuse_lora(counted)
    args = argparse.Namespace(mixed_precision="bf16", gradient_accumulation_steps=1)
    expected, _ = memory._in_use(counted.train(), args, "cuda", MicroBatchSize(2400, 200), 1)

    model = load_base(str(folder), CUDA, torch.bfloat16, nf4=base_weights == "nf4")
    assert use_packed_attention(model, 1024) is None
    model = get_peft_model(model, config)
    fuse_lora(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    batch, kept = pack(examples, CUDA), {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            what = (tuple(tensor.shape), str(tensor.dtype), tensor.untyped_storage().nbytes())
            kept[tensor.untyped_storage().data_ptr()] = what
        return tensor

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cuda", torch.bfloat16), hooks:
        loss = train.title_loss(model.train(), batch)
    after_forward = torch.cuda.memory_allocated() - before
    loss.backward()
    taken = torch.cuda.max_memory_allocated() - before
    if base_weights == "nf4":
        expected += 2 * 4096 * 11008 * 2  # as `expected_peak` adds for products
    table = "\n".join(f"{n} x {what}" for what, n in Counter(kept.values()).most_common())
    print(f"{expected:,} counted, {taken:,} taken, {after_forward:,} after forward\n{table}")
    assert expected == pytest.approx(taken, rel=0.15)
