"""Bases of other families than Llama, with random weights, through the scripts as they are.

What is compared with is plain transformers: one article at a time, without padding, by the
attention that is written out (eager). Run: python -m pytest tests/test_families.py
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from conftest import byte_level_tokenizer, call, french_rows, read_csv, train_args, write_csv
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, StoppingCriteriaList

import infer
import merge
import modeling
import packing
import score
import train
from batching import pack, pad_left
from decoding import LineEnd, choose_max_batch_tokens, generate_continuously, greedy
from exit_codes import UserError
from prompting import Example, Prompt, load_tokenizer

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 512}
GEMMA = LLAMA | {"head_dim": 32, "query_pre_attn_scalar": 16}
CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 5.0}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
VISION |= {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "vision_use_head": False}


@dataclass
class Family:
    """A config of transformers, and whether its articles lie in packed rows."""

    config: str
    settings: dict = field(default_factory=lambda: LLAMA)
    packed: bool = True
    options: tuple = ()  # of train.py


FAMILIES = {
    "qwen2, biases": Family("Qwen2Config"),
    "qwen2, a window in one layer": Family(
        "Qwen2Config",
        LLAMA | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        packed=False,
    ),
    "qwen3, norms of queries and keys": Family("Qwen3Config", LLAMA | {"head_dim": 32}),
    "mistral, a window": Family("MistralConfig", LLAMA | {"sliding_window": 16}, packed=False),
    "gemma, scaled embeddings": Family("GemmaConfig", LLAMA | {"head_dim": 32}),
    "gemma2, soft caps": Family("Gemma2Config", GEMMA | CAPS | {"sliding_window": 16}, False),
    "gemma3, windows": Family("Gemma3TextConfig", GEMMA | BOTH | {"sliding_window": 16}, False),
    "gemma3, wide windows": Family("Gemma3TextConfig", GEMMA | BOTH | {"sliding_window": 500}),
    "gemma3, pictures": Family(
        "Gemma3Config",
        {"text_config": GEMMA | BOTH | {"sliding_window": 500}, "vision_config": VISION}
        | {"mm_tokens_per_image": 4, "image_token_index": 5}
        | {"boi_token_index": 6, "eoi_token_index": 7},
    ),
    "gpt_neox, dropout": Family("GPTNeoXConfig", SIZES | {"attention_dropout": 0.3}),
    "opt, learned positions": Family(
        "OPTConfig",
        SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 512},
    ),
    "phi3, fused projections": Family("Phi3Config"),
    "bloom, alibi": Family("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, False),
    "gpt_oss, sinks": Family(
        "GptOssConfig",
        LLAMA
        | {"head_dim": 16, "sliding_window": 16}
        | {"num_local_experts": 2, "num_experts_per_tok": 1},
        packed=False,
    ),
    "glm4_moe, routed experts": Family(
        "Glm4MoeConfig",
        LLAMA
        | {"head_dim": 16, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2},
        options=("--target_modules", "q_proj", "v_proj"),
    ),
    "gpt_neo, its own attention": Family(
        "GPTNeoConfig",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 16}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512},
        packed=False,
    ),
}
WITHOUT_LORA = {
    "gpt2": Family("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "falcon": Family("FalconConfig", SIZES | {"alibi": False, "new_decoder_architecture": False}),
    "mamba": Family("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
}


def tokenizer_for(family: Family):
    """Return the tests' tokenizer, in Qwen2's own class for Qwen2, which no other may stand for."""
    tokenizer = byte_level_tokenizer()
    if family.config != "Qwen2Config":
        return tokenizer
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    merges = [tuple(pair) for pair in bpe["merges"]]
    return transformers.Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges, **ends)


def save(family: Family, folder: Path, **changes) -> Path:
    """Write a random model of a family; norms and biases are random too, for they may get lost."""
    tokenizer = tokenizer_for(family)
    common = {key: getattr(tokenizer, key) for key in ("eos_token_id", "pad_token_id")}
    common |= {"init_std" if family.config == "OPTConfig" else "initializer_range": 0.1}
    common |= {"vocab_size": len(tokenizer)}
    settings = family.settings | changes
    if "text_config" in settings:
        settings |= {"text_config": settings["text_config"] | common}
    config = getattr(transformers, family.config)(**common, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if family.config == "BloomConfig":  # as its weights are: without their prefix
        model = model.base_model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> tuple[Family, Path]:
    family = FAMILIES[request.param]
    return family, save(family, tmp_path_factory.mktemp("base") / "model")


def plain(folder: Path):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def some_ids(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(5, 300, (length,), generator=generator).tolist()


def logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_losses_are_those_of_single_articles(base):
    family, folder = base
    examples = [Example(some_ids(length), length - 5, False) for length in (30, 9, 47)]
    expected, reference = 0.0, plain(folder)
    for example in examples:
        of_title = logits(reference, example.ids)[example.num_prompt_ids - 1 : -1]
        titles = torch.tensor(example.ids[example.num_prompt_ids :])
        expected += torch.nn.functional.cross_entropy(of_title, titles, reduction="sum").item()
    model = modeling.load_base(str(folder), CPU, torch.float32, nf4=False)
    with torch.no_grad():
        assert train.title_loss(model, pad_left(examples, CPU)).item() == pytest.approx(expected)
        assert (packing.use_packed_attention(model, 64) is None) == family.packed
        if family.packed:
            model.train()  # in which the base's own dropout would be on
            assert train.title_loss(model, pack(examples, CPU)).item() == pytest.approx(expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_titles_of_a_batch_are_those_of_plain_generate(base, num_beams):
    family, folder = base
    texts = [row["text"] for row in french_rows(5, seed=5, longest=50)]
    reference, tokenizer = plain(folder), load_tokenizer(str(folder))
    prompt = Prompt(tokenizer, "{article}\nTitre :", False, 160, 12)
    model = modeling.load_base(str(folder), CPU, torch.float32, nf4=False)
    packing.use_packed_attention(model, 160)
    prompts, expected = [prompt.encode(text).ids for text in texts], []
    ends = prompt.ends(reference.generation_config)
    for ids in prompts:
        new = reference.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            generation_config=greedy(ends, 12, num_beams=num_beams),
            stopping_criteria=StoppingCriteriaList([LineEnd(ends, len(ids))]),
        )[0, len(ids) :]
        expected.append(infer.read_title(prompt, ends, ends.cut(new.tolist())))
    assert infer.generate_batch(model, prompt, prompts, infer.Decoding(12, num_beams)) == expected
    if family.packed and num_beams == 1:
        drawn = infer.Decoding(12, num_samples=3, temperature=1e-6)  # as good as greedy
        assert infer.generate_batch(model, prompt, prompts, drawn) == expected


def test_through_all_steps(base, tmp_path, capsys):
    """Train, infer, merge into either base, infer merged, score; in fp32, where all is equal."""
    family, folder = base
    for number, name in enumerate(("train", "validation"), start=1):
        write_csv(tmp_path / f"{name}.csv", french_rows(4, seed=number, longest=30))
    run = tmp_path / "run"
    more = ("--mixed_precision", "no", "--max_grad_norm", "1", "--num_eval_titles", "1")
    more += ("--learning_rate", "0.03", *family.options)
    call(train.main, *train_args(folder, tmp_path, run, *more))
    said = capsys.readouterr().out
    assert ("this model takes no packed rows" in said) != family.packed
    assert ("attention_dropout 0.3" in said) == ("attention_dropout" in family.settings)
    experts = family.config in ("GptOssConfig", "Glm4MoeConfig")
    assert bool(re.search(r"such as model.layers.\d.mlp.experts", said)) == experts
    assert not any("vision" in name for name in load_file(run / "adapter_model.safetensors"))
    bases = ("dequantised", "original")
    for model in ("run", *bases):
        if model != "run":
            options = ("--base", model, "--check_rows", "2")
            call(merge.main, "--run_dir", run, "--output_dir", tmp_path / model, *options)
        files = ("--input_file", tmp_path / "validation.csv")
        output = ("--output_file", tmp_path / f"{model}.csv")
        call(infer.main, "--run_dir", tmp_path / model, *files, *output)
    assert read_csv(tmp_path / "dequantised.csv") == read_csv(tmp_path / "run.csv")

    # By PEFT, on either base, against plain transformers on the merged folders.
    ids = some_ids(40)
    for which in bases:
        model = modeling.load_base(str(folder), CPU, torch.float32, nf4=which == "dequantised")
        if which == "dequantised":
            modeling.dequantize_base(model)
        untuned = logits(model, ids)
        expected = logits(modeling.attach_adapter(model, str(run)), ids)
        assert difference(untuned, expected) > 0.05
        assert difference(logits(plain(tmp_path / which), ids), expected) < 1e-5
        check = json.loads((tmp_path / which / "run_config.json").read_text()).get("merge_check")
        if family.config == "Glm4MoeConfig":  # whose experts' tensors lie one by one in the files
            assert check is None
        else:
            assert (check["relative_difference"] < 1e-5) == (which == "dequantised")
    scored = ["--references", tmp_path / "validation.csv", "--output_dir", tmp_path / "scores"]
    predictions = [tmp_path / f"{model}.csv" for model in ("run", *bases)]
    assert score.main([*map(str, scored), "--predictions", *map(str, predictions)]) == 0


def test_biases_of_routers_stay_in_fp32(tmp_path):
    """Near 8 and close to each other, as in real models, bf16 would make them one number."""
    folder = save(FAMILIES["glm4_moe, routed experts"], tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    [name] = [name for name in weights if "e_score_correction_bias" in name]
    weights[name] = 8 + 0.01 * torch.randn(weights[name].shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_csv(tmp_path / "train.csv", french_rows(4, seed=1, longest=30))
    write_csv(tmp_path / "validation.csv", french_rows(4, seed=2, longest=30))
    more = ("--target_modules", "q_proj", "--max_train_steps", "1", "--num_eval_titles", "0")
    call(train.main, *train_args(folder, tmp_path, tmp_path / "run", *more))
    call(merge.main, "--run_dir", tmp_path / "run", "--output_dir", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[name], weights[name])
    assert merged["model.embed_tokens.weight"].dtype == torch.bfloat16


# ---------------------------------------------------------------------- what cannot be done


EXPERTS = "--target_modules: LoRA is not added here to the experts of this base; name layers that"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt2", (), "{base}: its layers are Conv1D, to which LoRA is not added here; use another"),
        ("falcon", (), "{base}: its FalconLinear layers cannot be stored in 4 bits; give --base_"),
        ("mamba", (), "--target_modules: [PEFT:PeftType.LORA] Module 'out_proj' is incompatible"),
        ("glm4_moe, routed experts", (), EXPERTS),
        ("glm4_moe, routed experts", ("--target_modules", "q_proj", "up_proj"), EXPERTS),
        ("glm4_moe, routed experts", ("--lora_dropout", 0), EXPERTS),
    ],
)
def test_what_lora_is_not_made_for_is_refused_before_it_is_loaded(
    name, options, message, news, tmp_path, monkeypatch
):
    folder = save((WITHOUT_LORA | FAMILIES)[name], tmp_path / "base")
    monkeypatch.setattr(modeling, "load_base", None)
    with pytest.raises(UserError) as error:
        call(train.main, *train_args(folder, news, tmp_path / "run", *options))
    assert str(error.value).startswith(message.format(base=folder))
    assert not (tmp_path / "run").exists()


def test_what_has_no_lora_writes_titles_as_it_is(news, tmp_path):
    folder = save(WITHOUT_LORA["gpt2"], tmp_path / "base")
    files = ("--input_file", news / "test.csv", "--output_file", tmp_path / "out.csv")
    lengths = ("--max_length", "200", "--max_new_tokens", "12")
    arguments = ("--model_name_or_path", folder, *files, *lengths)
    with pytest.raises(UserError, match="its Conv1D layers cannot be stored in 4 bits; give --bas"):
        call(infer.main, *arguments)
    call(infer.main, *arguments, "--base_weights", "fp32")
    assert len(read_csv(tmp_path / "out.csv")) == 9


def test_falcon_goes_through_training_unquantized(news, tmp_path):
    folder = save(WITHOUT_LORA["falcon"], tmp_path / "base")
    more = ("--base_weights", "bf16", "--max_train_steps", "1")
    call(train.main, *train_args(folder, news, tmp_path / "run", *more))
    call(merge.main, "--run_dir", tmp_path / "run", "--output_dir", tmp_path / "merged")
    check = json.loads((tmp_path / "merged/run_config.json").read_text())["merge_check"]
    assert check["relative_difference"] < 0.03


def test_tokens_that_have_no_embedding_are_refused(tiny_model, news, tmp_path):
    """A tokenizer that was extended, beside a model that was not."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    tokenizer = load_tokenizer(str(folder))
    rows = len(plain(folder).get_input_embeddings().weight)
    assert tokenizer.add_tokens([f"<{n}>" for n in range(rows - len(tokenizer))] + ["Titre"])
    tokenizer.save_pretrained(folder)
    refused = f"{folder}: its tokenizer gave the id {rows}, and it has embeddings for {rows}; use"
    files = ("--input_file", news / "test.csv", "--output_file", tmp_path / "titles.csv")
    for arguments in (files, ("--text", "Un article.")):
        with pytest.raises(UserError) as error:
            call(infer.main, "--model_name_or_path", folder, *arguments)
        assert str(error.value).startswith(refused)
    with pytest.raises(UserError) as error:
        call(train.main, *train_args(folder, news, tmp_path / "run"))
    assert str(error.value).startswith(refused)


def test_what_padding_changes_is_read_one_by_one(news, tmp_path, capsys):
    """BART's decoder counts positions from the first column of a padded row."""
    sizes = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "is_decoder": True}
    folder = save(Family("BartConfig", sizes | {"decoder_ffn_dim": 128}), tmp_path / "base")
    run, more = tmp_path / "run", ("--max_train_steps", "1", "--mixed_precision", "no")
    refused = r"--per_device_train_batch_size 4: .* says something else of padded ones; give 1, and"
    with pytest.raises(UserError, match=refused):
        call(train.main, *train_args(folder, news, run, *more))
    call(train.main, *train_args(folder, news, run, *more, "--per_device_train_batch_size", "1"))
    files = ("--run_dir", run, "--input_file", news / "test.csv")
    call(infer.main, *files, "--output_file", tmp_path / "titles.csv")
    assert "prompts are read one by one, for it says something" in capsys.readouterr().out
    call(infer.main, *files, "--output_file", tmp_path / "one.csv", "--max_batch_tokens", "1")
    assert read_csv(tmp_path / "titles.csv") == read_csv(tmp_path / "one.csv")


G3N = LLAMA | BOTH | {"intermediate_size": [128, 256], "num_kv_shared_layers": 0}


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (
            "Gemma3nTextConfig",
            G3N | {"head_dim": 16, "vocab_size_per_layer_input": 400, "laurel_rank": 8},
            "it clips a weight as it trains, which 4 bits do not allow; give --base_weights bf16",
        ),
        (
            "ZambaConfig",
            SIZES
            | {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2}
            | {"intermediate_size": 128, "n_mamba_heads": 2},
            "not all of it can be stored in NF4 (model.layers.2.shared_transf",
        ),
        (
            "RwkvConfig",
            {"hidden_size": 64, "num_hidden_layers": 2},
            "a few tokens do not go through it (",
        ),
    ],
)
def test_what_cannot_be_stored_in_4_bits_is_refused(config, settings, message, news, tmp_path):
    folder = save(Family(config, settings), tmp_path / "base")
    one = ("--per_device_train_batch_size", "1")  # RWKV reads token by token, in the estimate too
    with pytest.raises(UserError) as error:
        call(train.main, *train_args(folder, news, tmp_path / "run", *one))
    assert str(error.value).startswith(f"{folder}: {message}")


def test_more_tokens_than_learned_positions_are_refused(news, tmp_path, capsys):
    short = {"max_position_embeddings": 128}
    folder = save(FAMILIES["opt, learned positions"], tmp_path / "opt", **short)
    message = "--max_length: this base has positions for 128 tokens, articles with titles 256; give"
    with pytest.raises(UserError, match=message):
        call(train.main, *train_args(folder, news, tmp_path / "run"))
    files = ("--input_file", news / "test.csv", "--output_file", tmp_path / "out.csv")
    with pytest.raises(UserError, match=message):
        call(infer.main, "--model_name_or_path", folder, *files, "--max_length", "256")
    call(train.main, *train_args(folder, news, tmp_path / "run", "--max_length", "128"))
    with pytest.raises(UserError, match="positions for 128 tokens, articles with titles 132; give"):
        call(infer.main, "--run_dir", tmp_path / "run", *files, "--max_new_tokens", "28")
    rotary = save(FAMILIES["qwen3, norms of queries and keys"], tmp_path / "qwen3", **short)
    capsys.readouterr()
    weightless = modeling.skeleton(str(rotary), torch.float32)
    modeling.check_kind(weightless, "qwen3", nf4=False, lora=True, longest=256)
    assert "made for 128 tokens; articles may have 256 with their titles" in capsys.readouterr().out


def test_chunks_are_not_packed(tmp_path):
    """Their borders would be those of the row; the trial is too short to see it."""
    folder = save(FAMILIES["qwen3, norms of queries and keys"], tmp_path / "base")
    model = modeling.load_base(str(folder), CPU, torch.float32, nf4=False)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert packing.use_packed_attention(model, 64)


def test_continuous_batching_refuses_attention_that_it_does_not_know(tmp_path):
    folder = save(FAMILIES["gemma2, soft caps"], tmp_path / "base")
    model = modeling.load_base(str(folder), CPU, torch.float32, nf4=False)
    prompt = Prompt(load_tokenizer(str(folder)), "{article}\nTitre :", False, 160, 12)
    ends, before = prompt.ends(model.generation_config), model.config._attn_implementation
    with pytest.raises(UserError, match="--engine continuous: it does not know this model's att"):
        next(generate_continuously(model, {"a": some_ids(9)}, ends, 4, 256))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["lfm2", "gpt_neox, dropout"])
def test_continuous_batching_refuses_layers_that_it_does_not_know(tmp_path, name):
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    family = FAMILIES.get(name) or Family("Lfm2Config", LLAMA | layers)
    model = modeling.load_base(str(save(family, tmp_path / "base")), CPU, torch.float32, nf4=False)
    ends = Prompt(byte_level_tokenizer(), "{article}", False, 160, 12).ends(None)
    told = None
    try:
        next(generate_continuously(model, {"a": some_ids(9)}, ends, 4, 256))
    except UserError as error:
        told = str(error)
    if told is None and name != "lfm2":
        pytest.skip("the engine of this release of transformers knows it")
    assert told.startswith("--engine continuous: ")
    assert "run the same command again" not in told


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("MambaConfig", WITHOUT_LORA["mamba"].settings),
        ("RwkvConfig", {"hidden_size": 64, "num_hidden_layers": 2}),
        ("Gemma4TextConfig", LLAMA | BOTH | {"head_dim": 16, "global_head_dim": 32}),
        ("Gemma3nTextConfig", G3N),
    ],
)
def test_tokens_of_a_batch_are_chosen_for_any_kind_of_layers(config, settings):
    if not hasattr(transformers, config):
        pytest.skip("this release of transformers does not have it")
    config = getattr(transformers, config)(**settings | {"vocab_size": 400})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    assert choose_max_batch_tokens(model) >= 1024
