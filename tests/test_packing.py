"""packing.py: articles in one row do not see each other.

python -m pytest tests/test_packing.py

The row is compared with its articles by themselves, through plain attention.
"""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from batching import pack, pad_left
from exit_codes import UserError
from packing import (
    PACKED,
    never_packed,
    packed_attention,
    padding_changes,
    use_packed_attention,
)
from prompting import Example
from train import title_loss

CPU = torch.device("cpu")
SIZES = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}
MODELS = {
    "llama": LlamaConfig(**(GROUPED | {"num_key_value_heads": 4})),
    "llama, grouped-query heads": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "mistral, a window longer than any article": MistralConfig(**GROUPED, sliding_window=64),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=48, initializer_range=0.2),
    "opt, learned positions": OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2, dropout=0.0
    ),
    "gpt2, learned positions": GPT2Config(
        vocab_size=99,
        n_layer=2,
        n_head=4,
        n_embd=32,
        initializer_range=0.2,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
    ),
}
MAMBA = MambaConfig(vocab_size=99, num_hidden_layers=2, hidden_size=32, state_size=4)


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # it notes the attention


def examples():
    rng = torch.Generator().manual_seed(1)
    lengths = ((20, 5), (3, 1), (33, 9), (2, 2))
    ids = [torch.randint(3, 99, (sum(pair),), generator=rng).tolist() for pair in lengths]
    return [Example(row, prompt, False) for row, (prompt, _) in zip(ids, lengths, strict=True)]


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = sum(title_loss(model, batch) for batch in batches)
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("mode", ["training", "evaluation", "checkpointing"])
def test_loss_and_gradients_are_those_of_single_articles_and_of_padding(family, mode):
    model = make(MODELS[family])
    single = loss_and_gradients(model, [pad_left([example], CPU) for example in examples()])
    padded = loss_and_gradients(model, [pad_left(examples(), CPU)])
    assert use_packed_attention(model, 64) is None
    assert model.config._attn_implementation == PACKED
    model.train(mode != "evaluation")
    if mode == "checkpointing":
        old_name = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    packed = loss_and_gradients(model, [pack(examples(), CPU)])
    assert_same(packed, single)
    assert_same(packed, padded)


@pytest.fixture
def lengths_met(monkeypatch) -> list[int]:
    """The lengths of what sdpa is given for the articles of packed rows."""
    met = []

    def sdpa(module, query, *rest, **kwargs):
        met.append(query.shape[2])
        return sdpa_attention_forward(module, query, *rest, **kwargs)

    monkeypatch.setattr("packing.sdpa_attention_forward", sdpa)
    return met


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_a_cpu_meets_few_lengths_and_computes_the_same(lengths_met, autocast):
    """For each length, oneDNN compiles; what is added to an article must not reach it."""
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    lengths = [1, 31, 32, 33, 50]
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    query = torch.randn(1, 4, sum(lengths), 16, dtype=dtype, requires_grad=True)
    key, value = (
        torch.randn(1, 2, sum(lengths), 16, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
    upstream = torch.randn(1, sum(lengths), 4, 16)

    def through(attention):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = attention()
        gradients = torch.autograd.grad((output * upstream).sum(), (query, key, value))
        return [output, *gradients]

    def packed():
        borders_of_rows = {"cu_seq_lens_q": borders, "max_length_q": max(lengths)}
        return packed_attention(module, query, key, value, None, **borders_of_rows)[0]

    def one_by_one():
        articles = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
        outputs = [sdpa_attention_forward(module, *article, None)[0] for article in articles]
        return torch.cat(outputs, dim=1)

    for found, expected in zip(through(packed), through(one_by_one), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)
    assert lengths_met == [32, 32, 32, 64, 64]


@pytest.mark.parametrize(("dtype", "is_causal"), [("float32", True), ("bfloat16", False)])
def test_nothing_is_added_in_fp32_or_where_an_article_would_see_it(lengths_met, dtype, is_causal):
    row = torch.randn(1, 2, 40, 16, dtype=getattr(torch, dtype))
    module = SimpleNamespace(num_key_value_groups=1, is_causal=is_causal, training=True)
    borders = torch.tensor([0, 7, 40], dtype=torch.int32)
    packed_attention(module, row, row, row, None, cu_seq_lens_q=borders, max_length_q=33)
    assert lengths_met == [7, 33]


def test_without_borders_it_is_ordinary_attention():
    model = make(MODELS["llama, grouped-query heads"])
    ids = torch.randint(3, 99, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, attention_mask=mask, **options)
    logits = model(ids, attention_mask=mask).logits
    assert use_packed_attention(model, 64) is None
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), before)
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)


def test_an_article_longer_than_the_models_window_is_no_silent_mistake():
    model = make(MistralConfig(**GROUPED, sliding_window=41))
    assert use_packed_attention(model, 42)
    assert use_packed_attention(model, 41) is None
    with pytest.raises(ValueError, match="an article of 42 tokens is longer than the window of 41"):
        title_loss(model, pack(examples(), CPU))


def test_a_base_whose_logits_are_not_finite_is_refused():
    model = make(MODELS["llama"])
    model.model.layers[1].mlp.up_proj.weight.data[0] = torch.nan
    model.config.name_or_path = "/models/7b"
    with pytest.raises(UserError, match="/models/7b: its logits are not finite: its weights are"):
        use_packed_attention(model, 64)


def test_a_window_of_0_is_none():
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    config = Qwen2MoeConfig(**GROUPED, **experts, shared_expert_intermediate_size=16)
    assert config.sliding_window == 0
    model = make(config)
    assert use_packed_attention(model, 64) is None
    title_loss(model, pack(examples(), CPU))


FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG = {"max_position_embeddings": 64, "original_max_position_embeddings": 32, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config",
    [
        Phi3Config(**GROUPED, **LONG, rope_parameters={"rope_type": "longrope", **FACTORS}),
        LlamaConfig(
            **GROUPED,
            max_position_embeddings=32,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0},
        ),
    ],
    ids=["longrope", "dynamic"],
)
def test_positions_that_go_by_the_longest_article_are_not_packed(config):
    """They would be those of the row in one place, and of the batch in another."""
    assert never_packed(config, 33).startswith("articles beyond 32 tokens change the positions of")
    assert never_packed(config, 32) is None


def test_a_mask_of_the_models_own_is_not_lost():
    model = make(MODELS["llama"])
    assert use_packed_attention(model, 64) is None
    batch = pack(examples(), CPU)
    length = batch["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="it brings a mask of its own"):
        model(**{k: v for k, v in batch.items() if k != "labels"} | {"attention_mask": mask})


@pytest.mark.parametrize(
    "config",
    [
        MAMBA,
        Gemma2Config(**GROUPED, head_dim=8),  # whose soft caps sdpa does not know
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_cannot_is_found_out_and_left_as_it_was(config):
    model = make(config)
    before = model.config._attn_implementation
    assert use_packed_attention(model, 64)
    assert model.config._attn_implementation == before
    assert loss_and_gradients(model, [pad_left(examples()[:1], CPU)])[0] > 0


def test_a_model_that_lets_articles_see_each_other_is_found_out(monkeypatch):
    """One that loses the borders on their way to its layers."""
    model = make(MODELS["llama"])
    forward = model.forward

    def forgetful(*args, cu_seq_lens_q=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forgetful)
    assert use_packed_attention(model, 64) == "its articles see each other"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_leak_is_one_too(monkeypatch, dtype):
    """Far below what is allowed between a packed row and separate ones."""
    model = make(MODELS["llama"]).to(dtype)
    forward = model.forward

    def leaky(input_ids, **kwargs):
        output = forward(input_ids, **kwargs)
        output.logits = output.logits * (1 + 0.01 * (input_ids[0, 0] - 7))
        return output

    monkeypatch.setattr(model, "forward", leaky)
    assert use_packed_attention(model, 64) == "its articles see each other"


def test_a_model_that_goes_on_counting_positions_is_found_out(monkeypatch):
    """One with learned positions that loses those of the row on their way."""
    model = make(MODELS["gpt2, learned positions"])
    forward = model.forward

    def forgetful(*args, position_ids=None, **kwargs):
        if position_ids is not None:
            position_ids = torch.arange(position_ids.shape[1])[None]
        return forward(*args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(model, "forward", forgetful)
    assert "something else of articles in one row" in use_packed_attention(model, 64)


# ---------------------------------------------------------------------- padded rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [*MODELS.values(), MAMBA], ids=lambda config: config.model_type)
def test_padding_changes_nothing_where_masks_are_heeded(config, dtype):
    assert not padding_changes(make(config).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        RwkvConfig(vocab_size=99, num_hidden_layers=2, hidden_size=32),  # reads on
        RecurrentGemmaConfig(**GROUPED | {"num_hidden_layers": 3}, attention_window_size=16),
        BartConfig(vocab_size=99, d_model=32, decoder_layers=2, is_decoder=True),  # counts on
    ],
    ids=lambda config: config.model_type,
)
def test_padding_that_changes_what_a_model_says_is_found_out(config, dtype):
    model = make(config).to(dtype)
    assert use_packed_attention(model, 64)
    assert padding_changes(model)


def test_models_that_few_tokens_do_not_go_through_are_refused(monkeypatch):
    model = make(MODELS["llama"])
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(UserError, match=r"a few tokens do not go through it .*; use another base"):
        use_packed_attention(model, 64)
    model = make(MODELS["llama"])
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, logits_to_keep, **kw: forward(*args, **kw))
    with pytest.raises(UserError, match="it gives logits of all tokens, where those of titles"):
        padding_changes(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_go_by_the_number_of_rows_do_not_matter(monkeypatch, dtype):
    """Those of bitsandbytes for few rows round more than others; in a deep model that adds up."""
    model = make(MODELS["llama"]).to(dtype)
    linear = torch.nn.functional.linear

    def rough(x, weight, bias=None):
        rows = x.numel() // x.shape[-1]
        if 1 < rows < 16:
            x = x.to(torch.float8_e4m3fn).to(x.dtype)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", rough)
    assert use_packed_attention(model, 64) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_of_one_token_is_that_of_sdpa(dtype, heads, scaling):
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 1, 8, generator=rng).to(dtype)
    key = torch.randn(3, 2, 11, 8, generator=rng).to(dtype)
    value = torch.randn(3, 2, 11, 5, generator=rng).to(dtype)
    mask = torch.ones(3, 1, 1, 11, dtype=torch.bool)
    mask[1, ..., :4] = False
    module = SimpleNamespace(num_key_value_groups=heads // 2, is_causal=True)
    for given in (None, mask):
        one, _ = packed_attention(module, query, key, value, given, scaling=scaling)
        expected, _ = sdpa_attention_forward(module, query, key, value, given, scaling=scaling)
        assert one.shape == expected.shape == (3, 1, heads, 5)
        assert one.dtype == dtype
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(one, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_one_token_tells_large_products_apart_in_bf16(autocast):
    """A bias of the keys, as Qwen2 has it: bf16 rounds its products with queries by whole units."""
    rng = torch.Generator().manual_seed(0)
    query = (1 + torch.randn(1, 2, 1, 64, generator=rng)).bfloat16()
    key = (40 + torch.randn(1, 2, 30, 64, generator=rng)).bfloat16()
    value = torch.randn(1, 2, 30, 64, generator=rng).bfloat16()
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double()
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one, _ = packed_attention(SimpleNamespace(), query, key, value, None)
    assert (query.double() @ key.double().transpose(2, 3) / 8).abs().min() > 128
    assert (one.transpose(1, 2) - exact).norm() < 0.01 * exact.norm()
