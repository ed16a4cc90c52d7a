"""merge.py: base + adapter as an ordinary model. Run: python -m pytest tests/test_merge.py"""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    byte_level_tokenizer,
    call,
    french_rows,
    read_csv,
    save_tiny_model,
    train_args,
    write_csv,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import infer
import merge
import run_folder
import train
from exit_codes import UserError
from run_folder import file_sha256, model_fingerprint

CPU = torch.device("cpu")
TEXTS = [row["text"] for row in french_rows(6, seed=7)]


@pytest.fixture(scope="module", params=["tied", "untied"])
def run_dir(request, tmp_path_factory, news):
    """A trained run, on a base with tied embeddings and on one with a head of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    model = request.getfixturevalue("tiny_model" if request.param == "tied" else "tiny_llama2")
    base = folder / "base"
    shutil.copytree(model, base)
    # What many repositories ship: settings that are only valid together with sampling.
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.9}))
    more = ("--num_train_epochs", "4", "--max_grad_norm", "1")
    call(train.main, *train_args(base, news, folder / "run", *more))
    return folder / "run"


@pytest.fixture(scope="module")
def merged(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    for base in ("dequantised", "original"):
        more = ("--base", base, "--output_dir", folder / base)
        call(merge.main, "--run_dir", run_dir, *more)
    return folder


def trained_model(run_dir):
    """Return what was trained, in fp32: the NF4 base, dequantised, and the adapter beside it.

    In bf16 the rounding of activations, about 1 %, would hide what merging itself does.
    """
    from modeling import attach_adapter, load_base

    base = json.loads((run_dir / "run_config.json").read_text())["base_model"]
    dequantised = load_base(base, CPU, torch.bfloat16, nf4=True).dequantize().float()
    return attach_adapter(dequantised, str(run_dir))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 90).reshape(1, -1)).logits.float()


def error(model, reference) -> float:
    return ((logits(model) - logits(reference)).norm() / logits(reference).norm()).item()


def test_the_dequantised_merge_is_what_was_trained(run_dir, merged):
    from modeling import load_base

    reference = trained_model(run_dir)
    near = error(load_base(str(merged / "dequantised"), CPU, torch.float32, False), reference)
    far = error(load_base(str(merged / "original"), CPU, torch.float32, False), reference)
    assert near < 0.01
    assert far > 3 * near


def test_every_tensor_equals_peft_on_the_dequantised_base(run_dir, merged):
    """By another way: transformers dequantises, PEFT merges in fp32, rounding comes last."""
    expected = trained_model(run_dir).merge_and_unload().state_dict()
    found = load_file(merged / "dequantised/model.safetensors")
    tied = model_is_tied(merged / "dequantised")
    assert found.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-7, atol=1e-6, msg=name)


def test_the_original_merge_leaves_other_tensors_alone(run_dir, merged):
    base = json.loads((run_dir / "run_config.json").read_text())["base_model"]
    before = load_file(f"{base}/model.safetensors")
    after = load_file(merged / "original/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


def test_the_folder_is_an_ordinary_model(merged, run_dir):
    folder = merged / "dequantised"
    config = json.loads((folder / "config.json").read_text())
    base = json.loads((run_dir / "run_config.json").read_text())["base_model"]
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["use_cache"] is True
    base_config = json.loads((run_dir.parent / "base/config.json").read_text())
    assert config["tie_word_embeddings"] == base_config["tie_word_embeddings"]
    assert not [key for key in load_file(folder / "model.safetensors") if "lora" in key]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"] is False
    assert "temperature" not in generation
    assert generation.get("num_beams", 1) == 1
    assert generation["max_new_tokens"] == 24
    assert generation["bos_token_id"] == base_config["bos_token_id"]
    assert generation["pad_token_id"] == base_config["eos_token_id"]
    with open(folder / "model.safetensors", "rb") as stream:  # where tensors begin: at 8 bytes
        assert int.from_bytes(stream.read(8), "little") % 8 == 0
    run_config = json.loads((folder / "run_config.json").read_text())
    assert run_config["kind"] == "merged"
    assert run_config["base_model"] == base
    assert run_config["merge_check"]["relative_difference"] < 0.03  # in bf16
    assert run_config["merge_check"]["positions"] > 50
    assert (folder / "README.md").is_file()
    assert not list(merged.glob("*.tmp"))


def test_plain_transformers_loads_it_without_peft_and_writes_the_same(merged, run_dir, tmp_path):
    """In a fresh process where peft and bitsandbytes cannot be imported, by path alone."""
    from prompting import load_tokenizer, prompt_of_run

    for name in ("peft", "bitsandbytes"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed')")
    folder = merged / "dequantised"
    settings = json.loads((folder / "run_config.json").read_text())["prompt"]
    prompt = prompt_of_run(load_tokenizer(str(folder)), settings, "")
    ids = [prompt.encode(text).ids for text in TEXTS]
    script = f"""
import json, torch, transformers
task, folder = "text-generation", {str(folder)!r}
pipe = transformers.pipeline(task, model=folder, dtype="float32", device="cpu")
model = pipe.model
if {model_is_tied(folder)}:
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
assert isinstance(pipe("Le maire", return_full_text=False)[0]["generated_text"], str)
written = []
for ids in {ids}:
    new = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
    written.append(new[0, len(ids):].tolist())
model.save_pretrained({str(tmp_path / "again")!r})
print(json.dumps(written))
"""
    import os

    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"},
    )
    assert result.returncode == 0, result.stderr
    written = json.loads(result.stdout.splitlines()[-1])
    from modeling import load_base

    model = load_base(str(folder), CPU, torch.float32, nf4=False)
    ours = dict(infer.generate_titles(model, prompt, TEXTS))
    for index, new_ids in enumerate(written):
        assert prompt.decode(new_ids) == ours[index].title


def model_is_tied(folder) -> bool:
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_in_fp32_the_merged_model_writes_the_titles_of_the_adapter(run_dir, tmp_path):
    """In bf16 the rounding of the sum may tip a near tie; in fp32 there is nothing to tip it."""
    from modeling import attach_adapter, load_base
    from prompting import load_tokenizer, prompt_of_run

    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "run_config.json").read_text())
    config["arguments"]["mixed_precision"] = "no"
    (copy / "run_config.json").write_text(json.dumps(config))
    call(merge.main, "--run_dir", copy, "--output_dir", tmp_path / "merged")
    merged_config = json.loads((tmp_path / "merged/run_config.json").read_text())
    assert merged_config["merge_check"]["relative_difference"] < 1e-4
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"
    prompt = prompt_of_run(load_tokenizer(str(copy)), config["prompt"], "")
    base = load_base(config["base_model"], CPU, torch.float32, nf4=True)
    with_adapter = dict(infer.generate_titles(attach_adapter(base, str(copy)), prompt, TEXTS))
    model = load_base(str(tmp_path / "merged"), CPU, torch.float32, nf4=False)
    assert dict(infer.generate_titles(model, prompt, TEXTS)) == with_adapter
    assert len({title.title for title in with_adapter.values()}) > 1


def test_infer_takes_the_merged_folder_either_way(merged, news, tmp_path):
    options = ("--input_file", news / "test.csv")
    for name, flag in (("a", "--run_dir"), ("b", "--model_name_or_path")):
        output = ("--output_file", tmp_path / f"{name}.csv")
        call(infer.main, flag, merged / "dequantised", *options, *output)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    record = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert record["base_weights"] == "bf16"
    assert record["prompt"]["max_length"] == 256
    assert len(read_csv(tmp_path / "a.csv")) == 9


def test_large_models_are_written_in_shards(run_dir, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "MAX_SHARD_BYTES", 100_000)
    call(merge.main, "--run_dir", run_dir, "--output_dir", tmp_path / "m", "--check_rows", "2")
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole = load_file(merged / "dequantised/model.safetensors")
    parts = {}
    for name in files:
        parts |= load_file(tmp_path / "m" / name)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "m" / name).values()) for name in files]
    assert max(sizes) <= 100_000
    for size, after in zip(sizes, files[1:], strict=False):  # none is begun without need
        first = next(name for name, file in index["weight_map"].items() if file == after)
        assert size + whole[first].nbytes > 100_000
    from modeling import load_base

    one = load_base(str(tmp_path / "m"), CPU, torch.bfloat16, False)
    other = load_base(str(merged / "dequantised"), CPU, torch.bfloat16, False)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is not supported here"),
        ({"lora_bias": True}, "lora_bias is not supported here"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported here"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported here"),
        ({"rank_pattern": {"(.*)*x": 8}}, "not numbers above 0 by names of layers"),
        ({"alpha_pattern": {"q_proj": "8"}}, "not numbers above 0 by names of layers"),
        ({"bias": "all"}, "bias is 'all', which is not supported here"),
    ],
)
def test_other_variants_are_refused_and_nothing_is_left(run_dir, tmp_path, change, message):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        call(merge.main, "--run_dir", copy, "--output_dir", tmp_path / "m")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_settings_of_an_adapter_that_are_no_object_are_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "adapter_config.json").write_text("[4]")
    with pytest.raises(UserError, match=r"config.json: peft_type is \[4\], not 'LORA'; merge with"):
        call(merge.main, "--run_dir", run, "--output_dir", tmp_path / "m")


# ---------------------------------------------------------------------- any LoRA on linear layers


def with_adapter(run_dir, folder, tensors, **config):
    """Return a copy of a run whose adapter has other tensors and settings."""
    shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("checkpoints"))
    save_file(tensors, folder / "adapter_model.safetensors")
    recorded = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(recorded | config))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 3}},
        {"alpha_pattern": {"down_proj": 5, "k_proj": 2.5}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    ],
    ids=str,
)
def test_patterns_and_rslora_are_merged_as_peft_does_and_inferred_alike(
    run_dir, tmp_path, settings
):
    from peft import LoraConfig, get_peft_model

    from modeling import adapter_state_dict, attach_adapter, load_base

    run_config = json.loads((run_dir / "run_config.json").read_text())
    recorded = json.loads((run_dir / "adapter_config.json").read_text())
    names = ("r", "lora_alpha", "target_modules")
    config = LoraConfig(**{n: recorded[n] for n in names}, **settings, init_lora_weights=False)
    base = load_base(run_config["base_model"], CPU, torch.float32, nf4=False)
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(0.1)
    tensors = {name: t.clone() for name, t in adapter_state_dict(model).items()}
    run = with_adapter(run_dir, tmp_path / "run", tensors, **settings)
    again = attach_adapter(load_base(run_config["base_model"], CPU, torch.float32, False), run)
    assert torch.equal(logits(again), logits(model))  # what infer.py has
    expected = model.merge_and_unload().state_dict()
    call(
        merge.main,
        *("--run_dir", run, "--output_dir", tmp_path / "m", "--base", "original"),
        *("--check_rows", "0"),
    )
    found = load_file(tmp_path / "m/model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-7, atol=1e-6, msg=name)


@pytest.mark.parametrize("rank", [3, 5])
def test_a_rank_that_the_matrices_do_not_have_is_refused_by_both(run_dir, tmp_path, rank):
    from modeling import attach_adapter, load_base

    tensors = load_file(run_dir / "adapter_model.safetensors")
    run = with_adapter(run_dir, tmp_path / "run", tensors, rank_pattern={"q_proj": rank})
    with pytest.raises(UserError, match="q_proj than its matrices have"):
        call(merge.main, "--run_dir", run, "--output_dir", tmp_path / "m")
    model = json.loads((run / "run_config.json").read_text())["base_model"]
    with pytest.raises(UserError, match="does not fit this base"):
        attach_adapter(load_base(model, CPU, torch.float32, nf4=False), str(run))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_the_head_is_merged_where_it_is_its_own_and_refused_where_tied(run_dir, tmp_path):
    tensors = load_file(run_dir / "adapter_model.safetensors")
    base = json.loads((run_dir / "run_config.json").read_text())["base_model"]
    weights = load_file(f"{base}/model.safetensors")
    tied = "lm_head.weight" not in weights
    vocabulary, width = weights["model.embed_tokens.weight"].shape
    torch.manual_seed(0)
    a, b = torch.randn(4, width) * 0.1, torch.randn(vocabulary, 4) * 0.1
    key = "base_model.model.lm_head.lora_"
    tensors |= {f"{key}A.weight": a, f"{key}B.weight": b}
    targets = json.loads((run_dir / "adapter_config.json").read_text())["target_modules"]
    targets = {"target_modules": [*targets, "lm_head"]}
    run = with_adapter(run_dir, tmp_path / "run", tensors, **targets)
    options = ("--run_dir", run, "--output_dir", tmp_path / "m", "--check_rows", "2")
    if tied:
        with pytest.raises(UserError, match="adapts lm_head, which is the embedding too in this"):
            call(merge.main, *options)
        assert not (tmp_path / "m").exists()
        return
    call(merge.main, *options)
    merged = load_file(tmp_path / "m/model.safetensors")
    expected = weights["lm_head.weight"].float() + 16 / 4 * (b @ a)
    torch.testing.assert_close(merged["lm_head.weight"], expected.bfloat16(), rtol=2**-7, atol=1e-6)
    assert torch.equal(merged["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    check = json.loads((tmp_path / "m/run_config.json").read_text())["merge_check"]
    assert check["relative_difference"] < 0.03


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.q_proj.lora_magnitude_vector", "embed_tokens.base_layer.weight"]
)
def test_matrices_of_other_kinds_are_refused(trained, tmp_path, name):
    """Such as the embeddings, which PEFT saves beside the rest where they were resized."""
    tensors = load_file(trained / "adapter_model.safetensors")
    tensors[f"base_model.model.model.{name}"] = torch.ones(2)
    run = with_adapter(trained, tmp_path / "run", tensors)
    with pytest.raises(UserError, match=f"{name} is no matrix of LoRA on a linear"):
        call(merge.main, "--run_dir", run, "--output_dir", tmp_path / "m")


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    "change",
    [
        {f"{QUERY}B.weight": None},
        {f"{QUERY}B.weight": torch.ones(64, 3)},
        {f"{QUERY}B.weight": torch.ones(65, 4)},
        {f"{QUERY}A.weight": torch.ones(4, 65)},
    ],
    ids=["one alone", "another rank", "more rows", "more columns"],
)
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_matrices_that_do_not_fit_are_refused(trained, tiny_model, tmp_path, change, prefix):
    """Also where the base was saved without its head: its files have shorter names then."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights = {prefix + name.removeprefix("model."): t for name, t in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    tensors = load_file(trained / "adapter_model.safetensors") | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    run = with_adapter(trained, tmp_path / "run", tensors)
    problem = r"does not fit this base at model\S*0.self_attn.q_proj.weight"
    if prefix:
        with pytest.raises(UserError, match=problem):
            merge.check_fit(base, run)
    with pytest.raises(UserError, match=problem):
        merge.Weights(base, run, **BF16)


def test_a_layer_whose_weights_lie_in_the_files_by_no_name_is_refused(
    trained, tiny_model, tmp_path
):
    """Or the merged model would be without it, and nobody would know."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["other"] = weights.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    merge.check_fit(base, trained)
    for nf4 in (True, False):
        with pytest.raises(UserError, match=r"no tensor \S*0.self_attn.q_proj.weight in its files"):
            merge.Weights(base, trained, torch.bfloat16, nf4)


def test_a_layer_without_an_adapter_is_rounded_too_where_it_was_4_bit(
    trained, tiny_model, tmp_path
):
    tensors = load_file(trained / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "q_proj" in name}
    run = with_adapter(trained, tmp_path / "run", tensors, target_modules=["q_proj"])
    weights = merge.Weights(tiny_model, run, **BF16)
    for name, tensor in load_file(tiny_model / "model.safetensors").items():
        expected = merge.round_to_nf4(tensor) if "_proj" in name else tensor
        for base, before in (("dequantised", expected), ("original", tensor)):
            same = torch.equal(weights.merged(name, base), before)
            assert same != ("q_proj" in name), (name, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_rounded_once_whatever_the_adapter_is_stored_in(
    trained, tiny_model, tmp_path, dtype
):
    tensors = load_file(trained / "adapter_model.safetensors")
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    run = with_adapter(trained, tmp_path / "run", tensors)
    weights = merge.Weights(tiny_model, run, **BF16)
    for name, tensor in load_file(tiny_model / "model.safetensors").items():
        if "_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (tensors[f"{key}.lora_{matrix}.weight"].float() for matrix in "AB")
            expected = (tensor.float() + 16 / 4 * (b @ a)).bfloat16()
            assert torch.equal(weights.merged(name, "original"), expected)


def in_shards(base, weights):
    """Write the weights of a base into two files and an index in place of one."""
    (base / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def of_base(run, base):
    """Make a base pass for the one that a run was trained on."""
    record = json.loads((run / "run_config.json").read_text())
    record |= {"base_model": str(base), "base_fingerprint": model_fingerprint(base)}
    (run / "run_config.json").write_text(json.dumps(record))


def test_a_base_in_shards_with_tensors_of_other_types(trained, tiny_model, tmp_path):
    """Floating point becomes bf16, as in training; numbers of positions, for one, stay."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "generation_config.json").unlink()
    weights = load_file(base / "model.safetensors")
    positions = {"model.position_ids": torch.arange(1000, 1300)}
    more = {"model.layers.0.rotary.inv_freq": torch.rand(16, dtype=torch.float64)}
    norm = {"model.norm.weight": weights["model.norm.weight"].half() + 0.001}
    everything = weights | positions | more | norm
    in_shards(base, everything)
    shapes = merge.shapes_in(run_folder.weight_files(base))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in everything.items()}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    run = shutil.copytree(trained, tmp_path / "run")
    of_base(run, base)
    options = ("--run_dir", run, "--output_dir", tmp_path / "m", "--base", "original")
    call(merge.main, *options, "--check_rows", "1")
    found = load_file(tmp_path / "m/model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in (weights | more | norm).items()}
    assert found.keys() == rounded.keys() | positions.keys()
    for name, tensor in (rounded | positions).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor) != ("_proj" in name), name
    assert json.loads((tmp_path / "m/config.json").read_text())["use_cache"] is True
    check = json.loads((tmp_path / "m/run_config.json").read_text())["merge_check"]
    assert check["dequantised_base"]["relative_difference"] < check["relative_difference"]


def test_a_tensor_that_is_larger_than_a_file_should_be_has_one_of_its_own(
    trained, tiny_model, tmp_path, monkeypatch
):
    """As embeddings of many words may be; the first one too, and no file is without tensors."""
    monkeypatch.setattr(merge, "MAX_SHARD_BYTES", 1)
    weights = merge.Weights(tiny_model, trained, **BF16)
    weights.write(tmp_path, "original", {})
    held = []
    for file in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            held.append(list(stream.keys()))
            assert stream.metadata() == {"format": "pt"}  # which some readers ask for
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # where tensors begin
    assert held == [[name] for name in weights.files]


def test_weights_of_8_bits_are_refused(trained, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight is F8_E4M3; convert the base to BF16"):
        merge.Weights(base, trained, **BF16).write(tmp_path, "original", {})


def test_the_check_has_the_logits_of_the_models_it_stands_for(run_dir, merged, monkeypatch):
    """It runs them module by module, without ever loading one."""
    from decoding import pad_left
    from modeling import attach_adapter, load_base

    base = json.loads((run_dir / "run_config.json").read_text())["base_model"]
    weights = merge.Weights(base_folder=merge.Path(base), adapter_dir=run_dir, **BF16)
    prompts = [list(range(5, 90)), list(range(30, 60)), list(range(9, 100))]
    found = {
        which: merge.compare_logits(weights, merged / which, which, prompts, 0)
        for which in ("dequantised", "original")
    }
    ids, mask = pad_left(prompts, 0, CPU)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        models = {"reference": attach_adapter(load_base(base, CPU, torch.bfloat16, True), run_dir)}
        for which in found:
            models[which] = load_base(str(merged / which), CPU, torch.bfloat16, nf4=False)
        last = {
            name: model(input_ids=ids, attention_mask=mask).logits[:, -64:][mask[:, -64:].bool()]
            for name, model in models.items()
        }
    for which in ("dequantised", "original"):
        difference = (last[which].float() - last["reference"].float()).norm()
        expected = (difference / last["reference"].float().norm()).item()
        # As the written files have it, and as it is worked out for the base that is not written.
        same = (last[which].argmax(-1) == last["reference"].argmax(-1)).float().mean().item()
        for answer in found.values():
            assert answer[which]["relative_difference"] == pytest.approx(expected, rel=1e-4)
            assert answer[which]["same_next_token"] == pytest.approx(same, abs=0.02)
            assert answer[which]["positions"] == 64 + 30 + 64
    assert all(p.is_meta for p in weights.model.parameters())  # in memory for one of them at most


def test_the_check_of_plain_lora_is_of_the_one_base_that_there_is(run_dir, merged):
    base = json.loads((run_dir / "run_config.json").read_text())["base_model"]
    weights = merge.Weights(merge.Path(base), run_dir, torch.bfloat16, nf4=False)
    found = merge.compare_logits(weights, merged / "original", "original", [[5, 6, 7]], 0)
    assert found.keys() == {"original"}
    assert found["original"]["relative_difference"] < 0.03


def test_an_adapter_that_is_not_finite_is_told_as_such(trained, tmp_path, capsys):
    tensors = load_file(trained / "adapter_model.safetensors")
    tensors[f"{QUERY}A.weight"][0, 0] = math.nan
    run = with_adapter(trained, tmp_path / "run", tensors)
    call(merge.main, "--run_dir", run, "--output_dir", tmp_path / "m", "--check_rows", "1")
    assert "(the logits of base and adapter are not finite)" in capsys.readouterr().out
    assert "merge_check" not in json.loads((tmp_path / "m/run_config.json").read_text())


BF16 = {"dtype": torch.bfloat16, "nf4": True}


def test_a_tensor_is_written_whole_however_little_is_taken_at_a_time():
    """Linux takes 2 GiB at most in one call, and a large model's embedding has more."""
    taken = []

    class Stream:
        def write(self, content):
            taken.append(bytes(content[:7]))
            return len(taken[-1])

    tensor = torch.arange(60, dtype=torch.bfloat16).reshape(5, 12)
    merge.write_tensor(Stream(), tensor)
    assert b"".join(taken) == tensor.view(torch.uint8).numpy().tobytes()


def test_a_merge_gives_back_what_it_has_changed_of_the_process(tmp_path):
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, merge.partial_folder(tmp_path / "m"):
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM  # what a shell says of it
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list(tmp_path.iterdir())


def test_the_check_of_both_bases_is_printed_and_kept(run_dir, tmp_path, capsys):
    call(merge.main, "--run_dir", run_dir, "--output_dir", tmp_path / "m", "--check_rows", "2")
    printed = capsys.readouterr().out
    assert "logits of 2 prompts, dequantised base, against base + adapter: relative" in printed
    assert "logits of 2 prompts, original base, against base + adapter: relative" in printed
    record = json.loads((tmp_path / "m/run_config.json").read_text())
    check, other = record["merge_check"], record["merge_check"]["original_base"]
    assert check["relative_difference"] < other["relative_difference"]
    assert check.keys() == other.keys() | {"original_base"}
    assert record["merge_versions"] == run_folder.versions()
    lines = printed.splitlines()
    for line, found in zip(lines[:2], (check, other), strict=True):
        assert line.endswith(
            f"base + adapter: relative difference {100 * found['relative_difference']:.2f}%, same "
            f"next token at {100 * found['same_next_token']:.1f}% of {found['positions']} positions"
        )
    assert lines[2:] == [f"done: {tmp_path}/m, adapter merged into the dequantised base"]


def test_a_sentence_that_stands_in_for_articles_is_counted_as_one(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    record = json.loads((run / "run_config.json").read_text())
    record["data"]["validation"]["path"] = "/gone/validation.csv"
    (run / "run_config.json").write_text(json.dumps(record))
    call(merge.main, "--run_dir", run, "--output_dir", tmp_path / "m")
    assert "logits of 1 prompts, dequantised base" in capsys.readouterr().out


def test_a_base_that_lies_elsewhere_now_is_taken_and_told(trained, tiny_model, tmp_path, capsys):
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    given = ("--run_dir", trained, "--check_rows", "0", "--model_name_or_path")
    call(merge.main, *given, moved, "--output_dir", tmp_path / "m")
    said = f"NOTE: --model_name_or_path '{moved}' overrides '{tiny_model}' of the run folder\n"
    assert said in capsys.readouterr().out
    call(merge.main, *given, tiny_model, "--output_dir", tmp_path / "same")
    assert "overrides" not in capsys.readouterr().out
    with pytest.raises(UserError) as error:  # it is the name that is wrong, and not the run's
        call(merge.main, *given, tmp_path / "none", "--output_dir", tmp_path / "n")
    assert str(error.value) == f"{tmp_path}/none: there is no such model folder; check the path"


def test_which_articles_are_compared(tmp_path, capsys):
    rows = [{"corps": f"Un article {n}.", "text": "Un autre."} for n in range(4)]
    own = write_csv(tmp_path / "own.csv", rows)
    given = write_csv(tmp_path / "given.csv", rows[::-1])
    record = {"data": {"validation": {"path": str(own)}}, "arguments": {"text_column": "corps"}}

    def texts(check_rows, check_file=None):
        args = SimpleNamespace(check_rows=check_rows, check_file=check_file and str(check_file))
        return merge.check_texts(args, record)

    assert texts(2) == ["Un article 0.", "Un article 1."]
    assert texts(2, given) == ["Un article 3.", "Un article 2."]
    assert texts(9) == [row["corps"] for row in rows]
    assert texts(0, given) == []
    write_csv(given, [*rows, {"corps": " ", "text": ""}])  # a file that is given has to be right
    with pytest.raises(UserError, match=r"given.csv:6: the column 'corps' is empty"):
        texts(2, given)
    write_csv(own, [{"text": "Un autre."}])  # which the run's own need not be any more
    assert texts(2) == [merge.PROBE]
    assert "own.csv:2: no column 'corps' among 'text'; " in capsys.readouterr().out
    own.unlink()
    assert texts(2) == [merge.PROBE]


@pytest.mark.parametrize("fails", [True, False])
def test_a_check_that_a_model_does_not_go_through_costs_no_merge(
    trained, tmp_path, monkeypatch, capsys, fails
):
    def compare(*_):
        if fails:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        found = {"dequantised": math.nan, "original": 0.1}
        return {base: {"relative_difference": value} for base, value in found.items()}

    monkeypatch.setattr(merge, "compare_logits", compare)
    call(merge.main, "--run_dir", trained, "--output_dir", tmp_path / "m", "--check_rows", "1")
    why = "no check: this model does not run one layer at a time (Cannot copy out of meta tensor; n"
    why = why if fails else "the merged model's logits are not finite: look at its titles"
    assert f"NOTE: {why}" in capsys.readouterr().out
    assert "merge_check" not in json.loads((tmp_path / "m/run_config.json").read_text())
    assert (tmp_path / "m/config.json").is_file()


def test_models_of_two_adapters_can_be_told_apart_by_what_is_read_of_them(
    trained, tmp_path, monkeypatch
):
    """Of a large file only its ends are, where an adapter of some layers changes nothing."""
    tensors = load_file(trained / "adapter_model.safetensors")
    other = with_adapter(trained, tmp_path / "other", {k: 2 * v for k, v in tensors.items()})
    found = set()
    for run, options in ((trained, ()), (other, ()), (trained, ("--base", "original"))):
        folder = tmp_path / str(len(found))
        call(merge.main, "--run_dir", run, "--output_dir", folder, "--check_rows", "0", *options)
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "SAMPLED_BYTES", 150)
            found.add(run_folder.model_fingerprint(folder))
    assert len(found) == 3


def test_where_a_merged_model_may_go(trained, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    options = ("--run_dir", trained, "--check_rows", "0", "--output_dir")
    call(merge.main, *options, tmp_path / "link")
    assert (tmp_path / "scratch/config.json").is_file()
    call(merge.main, *options, tmp_path / "new/deep/model")
    folder, ordinary = tmp_path / "new/deep/model", tmp_path / "new"
    assert folder.stat().st_mode == ordinary.stat().st_mode  # others may read it
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked/.lock").touch()  # nothing could take this folder's place
    with pytest.raises(UserError, match=r"the folder is not empty \(it holds .lock\)"):
        call(merge.main, *options, tmp_path / "locked")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: True)
        with pytest.raises(UserError, match="another file system begins here; give a folder with"):
            call(merge.main, *options, tmp_path / "volume")
    write = merge.Weights.write

    def overtaken(self, folder, *rest):
        write(self, folder, *rest)
        shutil.copytree(folder, tmp_path / "m")

    monkeypatch.setattr(merge.Weights, "write", overtaken)
    with pytest.raises(UserError, match=r"m: cannot be written \(Directory not empty\)"):
        call(merge.main, *options, tmp_path / "m")
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (merge, "flush"),
        (merge, "write_json"),
        (merge, "write_json of an index"),
        (merge.Path, "write_text"),
        (transformers.PreTrainedTokenizerBase, "save_pretrained"),
        (transformers.GenerationConfig, "save_pretrained"),
    ],
)
def test_a_disk_that_fills_up_is_one_line_whatever_is_written(
    trained, tmp_path, monkeypatch, where, name
):
    def full(*_, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if name.endswith(" of an index"):
        monkeypatch.setattr(merge, "MAX_SHARD_BYTES", 100_000)
    monkeypatch.setattr(where, name.split()[0], full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device"):
        call(merge.main, "--run_dir", trained, "--output_dir", tmp_path / "m", "--check_rows", "0")
    assert not list(tmp_path.iterdir())


def test_a_base_that_was_quantized_before_is_refused(trained, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its files are quantized already; merge with peft's merge"):
        merge.check_fit(base, trained)


def test_no_config_stands_beside_weights_before_all_is_done(trained, tmp_path, monkeypatch):
    card, seen = merge.model_card, []

    def look(run_config):
        seen.append({path.name for path in tmp_path.rglob("*")})
        return card(run_config)

    monkeypatch.setattr(merge, "model_card", look)
    call(merge.main, "--run_dir", trained, "--output_dir", tmp_path / "m", "--check_rows", "1")
    assert "model.safetensors" in seen[0]
    assert "config.json" not in seen[0]
    assert any(name.startswith("m.partial-") for name in seen[0])  # whose it is, if it stays
    assert (tmp_path / "m/config.json").is_file()


INTERRUPTED = """
import sys, time
import merge
write, count = merge.write_tensor, [0]

def slowly(stream, tensor):
    write(stream, tensor)
    count[0] += 1
    if count[0] == 5:
        print("half way", flush=True)
        time.sleep(60)

merge.write_tensor = slowly
merge.run(merge.main)
"""


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_an_interrupted_merge_leaves_nothing_that_looks_like_a_model(
    trained, tmp_path, signal_name
):
    import os
    import signal

    from conftest import SCRIPTS

    from run_folder import check_model_folder

    command = [sys.executable, "-c", INTERRUPTED, "--run_dir", str(trained)]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "m")],
        cwd=SCRIPTS,
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert any("half way" in line for line in process.stdout)
    process.send_signal(getattr(signal, signal_name))
    process.communicate(timeout=60)
    assert process.returncode != 0
    left = list(tmp_path.rglob("*"))
    if signal_name != "SIGKILL":
        assert left == []
    assert not (tmp_path / "m").exists()
    for folder in (path for path in left if path.is_dir()):
        with pytest.raises(UserError):
            check_model_folder(str(folder))
    call(merge.main, "--run_dir", trained, "--output_dir", tmp_path / "m", "--check_rows", "0")
    check_model_folder(str(tmp_path / "m"))


def test_merging_again_does_nothing_and_another_adapter_is_refused(
    run_dir, merged, tmp_path, capsys
):
    before = (merged / "dequantised/model.safetensors").stat().st_mtime_ns
    output = ("--output_dir", merged / "dequantised")
    call(merge.main, "--run_dir", run_dir, *output)
    assert "made of the same adapter: nothing to do" in capsys.readouterr().out
    assert (merged / "dequantised/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="the folder is not empty"):
        call(merge.main, "--run_dir", run_dir, *output, "--base", "original")
    other = tmp_path / "retrained"
    shutil.copytree(run_dir, other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({k: v + 0.01 for k, v in tensors.items()}, other / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the folder is not empty"):
        call(merge.main, "--run_dir", other, *output)


def test_copies_of_the_weights_in_other_formats_are_left_out(run_dir, merged, tmp_path):
    """Some repositories hold the same weights once more, under other names."""
    base = tmp_path / "base"
    shutil.copytree(run_dir.parent / "base", base)
    save_file({"layers.0.wq": torch.ones(4)}, base / "consolidated.safetensors")
    options = ("--model_name_or_path", base, "--check_rows", "0")
    call(merge.main, "--run_dir", run_dir, "--output_dir", tmp_path / "m", *options)
    assert [path.name for path in (tmp_path / "m").glob("*.safetensors")] == ["model.safetensors"]
    found = load_file(tmp_path / "m/model.safetensors")
    assert found.keys() == load_file(merged / "dequantised/model.safetensors").keys()


def test_a_chat_models_own_ends_of_turn_are_kept(run_dir, tmp_path):
    base = run_dir.parent / "base/generation_config.json"
    before = base.read_text()
    base.write_text(json.dumps(json.loads(before) | {"eos_token_id": [2, 7]}))
    try:
        call(merge.main, "--run_dir", run_dir, "--output_dir", tmp_path / "m", "--check_rows", "0")
    finally:
        base.write_text(before)
    generation = json.loads((tmp_path / "m/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7]


def test_a_folder_beside_is_never_touched(run_dir, tmp_path):
    (tmp_path / "m.tmp").mkdir()
    (tmp_path / "m.tmp/mine").write_text("kept")
    call(merge.main, "--run_dir", run_dir, "--output_dir", tmp_path / "m", "--check_rows", "0")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "m.tmp"}
    assert (tmp_path / "m.tmp/mine").read_text() == "kept"


def test_a_checkpoint_is_merged_as_the_run_would_be(run_dir, merged, tmp_path):
    step = json.loads((run_dir / "run_config.json").read_text())["adapter_step"]
    steps = sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").iterdir())
    other = next(s for s in steps if s != step)
    for which in (step, other):
        checkpoint = run_dir / f"checkpoints/step-{which:06d}"
        output = ("--output_dir", tmp_path / str(which), "--base", "dequantised")
        call(merge.main, "--run_dir", checkpoint, *output)
        record = json.loads((tmp_path / f"{which}/run_config.json").read_text())
        assert (record["kind"], record["adapter_step"]) == ("merged", which)
        assert record["adapter_sha256"] == file_sha256(checkpoint / "adapter_model.safetensors")
        assert record["merge_check"]["relative_difference"] < 0.03
        assert f"After update {which};" in (tmp_path / f"{which}/README.md").read_text()
    files = [tmp_path / str(step), tmp_path / str(other), merged / "dequantised"]
    same, changed, expected = (load_file(folder / "model.safetensors") for folder in files)
    assert all(torch.equal(same[name], expected[name]) for name in expected)
    assert not all(torch.equal(changed[name], expected[name]) for name in expected)


def test_a_checkpoint_of_a_run_that_has_no_adapter_yet(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / name).unlink()
    checkpoint = min((run / "checkpoints").iterdir())
    call(merge.main, "--run_dir", checkpoint, "--output_dir", tmp_path / "m", "--check_rows", "1")
    record = json.loads((tmp_path / "m/run_config.json").read_text())
    assert record["adapter_sha256"] == file_sha256(checkpoint / "adapter_model.safetensors")


def test_through_accelerate_launch(run_script, trained, tmp_path):
    arguments = ("--run_dir", trained, "--output_dir", tmp_path / "m")
    result = run_script("merge.py", *arguments, launch=True, cwd=tmp_path)
    assert "relative difference" in result.stdout
    assert (tmp_path / "m/model.safetensors").is_file()


def test_bad_input_is_one_line_and_exit_code_2(run_script, run_dir, tiny_llama2, tmp_path):
    other = save_tiny_model(tmp_path / "other", byte_level_tokenizer(), seed=3)
    cases = [
        (
            ("--run_dir", tmp_path / "none", "--output_dir", tmp_path / "m"),
            f"error: {tmp_path}/none: no run_config.json in it; give the output folder of train.py",
        ),
        (
            ("--run_dir", run_dir, "--output_dir", other),
            f"error: {other}: the folder is not empty (it holds chat_template.jinja); remove it "
            "or give another --output_dir",
        ),
        (
            ("--run_dir", run_dir, "--output_dir", tmp_path / "m", "--model_name_or_path", other),
            f"error: {other}: this is not the base that {run_dir} was trained on; give that one "
            "with --model_name_or_path",
        ),
    ]
    for arguments, message in cases:
        result = run_script("merge.py", *arguments, code=2)
        assert result.stderr == message + "\n"
        assert not (tmp_path / "m").exists()
