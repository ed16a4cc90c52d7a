"""merge.py: base + adapter as an ordinary model. Run: python -m pytest tests/test_merge.py"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import byte_level_tokenizer, call, french_rows, read_csv, save_tiny_model, train_args
from safetensors.torch import load_file, save_file

import infer
import merge
import train
from exit_codes import UserError

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
    from modeling import load_base

    one = load_base(str(tmp_path / "m"), CPU, torch.bfloat16, False)
    other = load_base(str(merged / "dequantised"), CPU, torch.bfloat16, False)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rslora": True}, "use_rslora is not supported here"),
        ({"use_dora": True}, "use_dora is not supported here"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is not supported here"),
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
    config = json.loads((run_dir / "run_config.json").read_text())
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    from run_folder import model_fingerprint

    config |= {"base_model": str(base), "base_fingerprint": model_fingerprint(base)}
    (copy / "run_config.json").write_text(json.dumps(config))
    call(merge.main, "--run_dir", copy, "--output_dir", tmp_path / "m", "--check_rows", "0")
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


def test_through_accelerate_launch(run_script, run_dir, tmp_path):
    arguments = ("--run_dir", run_dir, "--output_dir", tmp_path / "m")
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
