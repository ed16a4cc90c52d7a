"""modeling.py: what is loaded is what was asked. Run: python -m pytest tests/test_modeling.py"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer, save_tiny_model

import modeling
from exit_codes import UserError
from prompting import Prompt, load_tokenizer

CPU = torch.device("cpu")
MAPPED = Path("/proc/self/maps")


def with_lora(base, **changes):
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes
    return get_peft_model(base, LoraConfig(**options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_base_is_nf4_with_the_asked_compute_dtype(tiny_model, dtype):
    from bitsandbytes.nn import Linear4bit

    model = modeling.load_base(str(tiny_model), CPU, dtype, nf4=True)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, dtype)
        assert state.dtype == dtype
    assert not isinstance(model.lm_head, Linear4bit)
    others = [p for p in model.parameters() if not hasattr(p, "quant_state")]
    assert {p.dtype for p in others} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.skipif(not MAPPED.exists(), reason="only Linux lists the files that are mapped")
def test_the_file_of_weights_does_not_stay_mapped_for_those_that_are_not_in_nf4(
    tiny_model, tmp_path
):
    """With all that was read of it: 13 GB of a 7B."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    model = modeling.load_base(str(folder), CPU, torch.bfloat16, nf4=True)
    assert f"{folder}/" not in MAPPED.read_text()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "wrong",
    [
        {"bnb_4bit_quant_typ": "nf4"},  # misspelt: swallowed, and FP4 is the default
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},  # single
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},  # fp32 compute
    ],
)
def test_a_config_that_is_not_what_it_says_is_caught(tiny_model, monkeypatch, wrong):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, **wrong)
    monkeypatch.setattr(modeling, "nf4_config", lambda *_: config)
    with pytest.raises(UserError, match="type, nested, compute dtype"):
        modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)


def test_a_model_that_was_not_quantized_is_caught(tiny_model, monkeypatch):
    monkeypatch.setattr(modeling, "nf4_config", lambda *_: None)
    with pytest.raises(UserError, match=r"stored in NF4 .*not Linear4bit.; give --base_weights bf"):
        modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)


def test_a_base_that_was_quantized_in_another_way_is_refused(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    fp4 = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=fp4)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"quantized before, in another way .*'fp4'.*; give"):
        modeling.load_base(str(tmp_path), CPU, torch.bfloat16, nf4=True)
    weightless = modeling.skeleton(str(tmp_path), torch.bfloat16)
    with pytest.raises(UserError, match="7b: it was quantized before; give the model that it was"):
        modeling.check_kind(weightless, "7b", nf4=False, lora=True, longest=9)
    modeling.check_kind(weightless, "7b", nf4=False, lora=False, longest=9)  # titles, as it is


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_projj", "proj"])
def test_a_target_that_is_no_decoder_layer_is_refused(tiny_model, target):
    model = modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)
    assert modeling.check_targets(model, ["all-linear"]) == "all-linear"
    assert modeling.check_targets(model, ["q_proj", "mlp.up_proj"]) == ["q_proj", "mlp.up_proj"]
    message = rf"--target_modules {target}: no linear layer .* down_proj, gate_proj, k_proj"
    with pytest.raises(UserError, match=message):
        modeling.check_targets(model, ["q_proj", target])


def lora_gradients(model):
    torch.manual_seed(0)
    model.train()
    model.zero_grad()
    ids = torch.arange(3, 60).reshape(1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def evaluate_once(model):
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(3, 60).reshape(1, -1), use_cache=False)


def test_gradients_are_the_same_after_an_evaluation(tiny_model):
    """On CPUs with AVX512-BF16, bitsandbytes' evaluation forward would break them for good."""
    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True))
    before = lora_gradients(model)
    evaluate_once(model)
    after = lora_gradients(model)
    assert len(before) == 28
    for name, gradient in before.items():
        assert gradient.any(), name
        assert torch.equal(gradient, after[name]), name


def test_the_workaround_is_what_keeps_them(tiny_model, monkeypatch):
    """Fails when bitsandbytes has mended it: then `keep_gradients_on_cpu` can go."""
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    monkeypatch.setattr(modeling, "keep_gradients_on_cpu", lambda model: None)
    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True))
    before = lora_gradients(model)
    evaluate_once(model)
    after = lora_gradients(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)


# Rank 4 of 64 x 64: what is added is as large as what the base says.
LARGE = {"lora_alpha": 64, "lora_dropout": 0.2}


# In fp32 roundings grow over the layers, but a power of two, as 1 / (1 - 0.5) is, adds none.
@pytest.mark.parametrize(
    ("nf4", "dtype", "dropout", "rtol"),
    [
        (True, torch.float32, 0.5, 1e-4),
        (False, torch.float32, 0.5, 1e-4),
        (False, torch.float64, 0.2, 1e-9),
    ],
)
def test_lora_in_one_product_is_pefts(tiny_model, nf4, dtype, dropout, rtol):
    model = modeling.load_base(str(tiny_model), CPU, torch.float32, nf4)
    model = with_lora(model, **LARGE | {"lora_dropout": dropout})
    if dtype == torch.float64:  # which bitsandbytes does not know
        model.double()
    ids = torch.arange(3, 60).reshape(3, -1)

    def run():
        torch.manual_seed(0)  # of dropout
        model.train().zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        logits.logsumexp(-1).square().sum().backward()
        trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return trained | {"logits": logits.detach()}

    expected = run()
    with torch.no_grad(), model.disable_adapter():
        alone = model(input_ids=ids, use_cache=False).logits
    assert (expected["logits"] - alone).norm() > 0.1 * alone.norm()
    modeling.fuse_lora(model)
    found = run()
    assert len(found) == 29
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        atol = 0.1 * rtol * scale
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=name)


def test_dropout_is_kept_as_a_byte_for_each_number(tiny_model):
    """Beside what is kept without dropout; the copies of an input would be another 4 bytes."""
    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.float32, True), **LARGE)
    modeling.fuse_lora(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(500, 64, requires_grad=True)

    def kept() -> int:
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x).sum().backward()
        return sum(sizes.values())

    with_dropout = kept()
    layer.lora_dropout["default"].p = 0.0
    assert with_dropout - kept() == x.numel()


def test_in_bf16_its_sum_is_rounded_once(tiny_model):
    """Of one layer: over several, in which roundings grow, luck decides who is closer."""
    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, False), **LARGE)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").eval()
    x = torch.randn(500, 64, generator=torch.manual_seed(0)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        of_base, low = layer.base_layer(x), layer.lora_A["default"](x)
        of_peft = layer(x)
        modeling.fuse_lora(model)
        found = layer(x)
    b = layer.lora_B["default"].weight.bfloat16().double()
    exact = of_base.double() + layer.scaling["default"] * low.double() @ b.T
    error, error_of_peft = ((y.double() - exact).norm() for y in (found, of_peft))
    assert 0 < error < 1.001 * (exact.bfloat16().double() - exact).norm()
    assert error < error_of_peft


def test_dropout_under_autocast_is_exact_but_for_bf16(tiny_model):
    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, False), **LARGE)
    modeling.fuse_lora(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").train()
    generator = torch.manual_seed(0)
    x = torch.randn(500, 64, generator=generator).bfloat16().requires_grad_()
    gradient = torch.randn(500, 128, generator=generator).bfloat16()
    matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    found.backward(gradient)

    torch.manual_seed(1)
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(0.8).double() / 0.8
    exact = [t.detach().double().requires_grad_() for t in (x, *matrices)]
    low = (exact[0] * kept) @ exact[1].T
    base = exact[0] @ layer.base_layer.weight.double().T
    expected = base + layer.scaling["default"] * low @ exact[2].T
    expected.backward(gradient.double())
    assert {matrix.grad.dtype for matrix in matrices} == {torch.float32}
    pairs = [
        (found, expected),
        *((t.grad, e.grad) for t, e in zip((x, *matrices), exact, strict=True)),
    ]
    for number, (rounded, whole) in enumerate(pairs):
        assert (rounded.double() - whole).norm() < 0.01 * whole.norm(), number


def test_a_layer_that_is_computed_again_drops_the_same(tiny_model):
    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, True), **LARGE)
    modeling.fuse_lora(model)
    expected = lora_gradients(model)
    modeling.checkpoint_layers(model, 1)
    for name, gradient in lora_gradients(model).items():
        assert gradient.any(), name
        assert torch.equal(gradient, expected[name]), name


def test_an_adapter_rounded_once_says_the_same_as_one_that_autocast_rounds(tiny_model):
    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, True), **LARGE)
    modeling.fuse_lora(model.eval())
    ids = torch.arange(3, 60).reshape(3, -1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids, use_cache=False).logits
        modeling.round_lora(model, torch.bfloat16)
        found = model(input_ids=ids, use_cache=False).logits
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    assert {p.dtype for p in lora} == {torch.bfloat16}
    assert torch.equal(found, expected)


def save_adapter(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def test_an_adapter_comes_back_bit_by_bit(tiny_model, tmp_path):
    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)).eval()
    folder = save_adapter(model, tmp_path / "adapter")
    base = modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)
    again = modeling.attach_adapter(base, folder)
    ids = torch.arange(3, 60).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    expected = modeling.adapter_state_dict(model)
    found = modeling.adapter_state_dict(again)
    assert expected.keys() == found.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert not any(p.requires_grad for p in again.parameters())


def test_an_adapter_with_a_wrong_key_is_refused(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True))
    folder = save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "layers.1" in key and "q_proj.lora_B" in key)
    tensors[key.replace("q_proj", "wrong")] = tensors.pop(key)
    save_file(tensors, file)
    base = modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)
    with pytest.raises(UserError, match=r"does not fit this base at base_model\.model\.model"):
        modeling.attach_adapter(base, folder)


def test_an_adapter_of_a_wider_base_is_refused(tiny_model, tmp_path):
    wide = save_tiny_model(tmp_path / "wide", byte_level_tokenizer(), hidden_size=128)
    model = with_lora(modeling.load_base(str(wide), CPU, torch.bfloat16, nf4=True))
    folder = save_adapter(model, tmp_path / "adapter")
    base = modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)
    with pytest.raises(UserError, match="does not fit this base"):
        modeling.attach_adapter(base, folder)


def test_a_truncated_adapter_is_refused(tiny_model, tmp_path):
    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True))
    folder = save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    base = modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)
    with pytest.raises(UserError, match="cannot be read"):
        modeling.attach_adapter(base, folder)


def test_an_adapter_that_changes_nothing_is_noted(tiny_model, tmp_path, capsys):
    base = modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)
    folder = save_adapter(with_lora(base, init_lora_weights=True), tmp_path / "fresh")
    base = modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)
    modeling.attach_adapter(base, folder)
    assert "changes nothing (every lora_B is zero)" in capsys.readouterr().out


def test_another_kind_of_adapter_is_refused(tiny_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    base = modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=False)
    with pytest.raises(UserError, match="peft_type is 'IA3', not 'LORA'"):
        modeling.attach_adapter(base, str(tmp_path))


def test_truncated_weights_and_missing_tokenizers_are_told_in_one_line(tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="the model cannot be loaded"):
        modeling.load_base(str(folder), CPU, torch.bfloat16, nf4=True)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"no usable tokenizer \(.*; add its files"):
        load_tokenizer(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="no tokenizer in this folder; add its files"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "nope"}, "the model cannot be loaded"),
        # As where one of several files is missing: transformers would make up a random layer.
        ({"num_hidden_layers": 3}, r"no weights for model\.layers\.2\.input_layernorm\.weight in"),
    ],
)
def test_a_config_that_does_not_fit_is_told_in_one_line(tiny_model, tmp_path, change, complaint):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=complaint) as error:
        modeling.load_base(str(folder), CPU, torch.bfloat16, nf4=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("autocast", [True, False])
def test_generation_works_in_and_out_of_autocast(tiny_model, autocast):
    from infer import generate_titles

    model = with_lora(modeling.load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)).eval()
    prompt = Prompt(load_tokenizer(str(tiny_model)), "{article}\nTitre :", False, 128, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        titles = list(generate_titles(model, prompt, ["Le maire de Nîmes", "Un but"]))
    assert sorted(index for index, _ in titles) == [0, 1]
    assert all(1 <= title.num_new_tokens <= 8 for _, title in titles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_base_dequantized_once_computes_the_same_bits(tiny_model, dtype):
    """Logits, and the gradients of LoRA in every layer."""
    from peft import LoraConfig, get_peft_model

    results = []
    for once in (False, True):
        base = modeling.load_base(str(tiny_model), CPU, dtype, nf4=True)
        if once:
            modeling.dequantize_base(base)
            linear = modeling.decoder_linears(base).values()
            assert {type(layer) for layer in linear} == {torch.nn.Linear}
            assert {layer.weight.dtype for layer in linear} == {dtype}
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, config).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=torch.arange(5, 60)[None], use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for _, p in trained)
        results.append({n: p.grad for n, p in trained} | {"logits": logits})
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
        assert tensor.any(), name
