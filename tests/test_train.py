"""train.py: what it computes and what it leaves. Run: python -m pytest tests/test_train.py"""

import ast
import contextlib
import html
import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import SCRIPTS, call, french_rows, train_args, write_csv

import train
from exit_codes import STOPPED, UserError
from model_card import model_card

EXACT = ("--lora_dropout", "0", "--mixed_precision", "no", "--num_train_epochs", "1")
EXACT += ("--seed", "7")  # not the default: what is drawn goes by what was asked for


def metrics(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def updates(run_dir) -> list[dict]:
    return [row for row in metrics(run_dir) if "loss" in row]


def adapter(run_dir) -> dict:
    from safetensors.torch import load_file

    return load_file(run_dir / "adapter_model.safetensors")


def difference(one: dict, other: dict) -> float:
    """Return the relative difference of two adapters, all matrices together."""
    assert one.keys() == other.keys()
    assert one
    squares = sum(((one[k] - other[k]).double() ** 2).sum() for k in one)
    return math.sqrt(squares / sum((one[k].double() ** 2).sum() for k in one))


# ---------------------------------------------------------------------- the folder


def test_run_folder_has_exactly_these_files(trained):
    found = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    expected = {"adapter_model.safetensors", "adapter_config.json", "run_config.json"}
    expected |= {"metrics.jsonl", "README.md"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for step in ("000003", "000006"):  # 22 rows, 8 an update: a checkpoint after each epoch
        for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json"):
            expected.add(f"checkpoints/step-{step}/{name}")
    assert found == expected


def test_run_config_describes_the_run(trained, tiny_model, news):
    config = json.loads((trained / "run_config.json").read_text())
    assert config["base_model"] == str(tiny_model)
    assert config["arguments"]["lora_r"] == 4
    assert config["prompt"]["template"] == (SCRIPTS.parent / "prompts/fr.txt").read_text().rstrip()
    assert config["data"]["train"]["rows"] == 22
    assert config["versions"].keys() >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert "[INST]" not in config["prompt"]["template"]
    lora = json.loads((trained / "adapter_config.json").read_text())
    assert [lora[name] for name in ("r", "lora_alpha", "lora_dropout")] == [4, 16, 0.1]


def test_checkpoints_hold_the_adapter_and_not_the_base(trained):
    from safetensors import safe_open

    for file in (trained / "checkpoints").rglob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            keys = list(stream.keys())
        assert keys
        assert all("lora_" in key for key in keys)


@pytest.fixture
def best_is_step_3(monkeypatch):
    """Let the first epoch be judged the best, whatever training does."""
    original = train.evaluate

    def evaluate(*arguments):
        assert original(*arguments)
        state = arguments[-2]
        state |= {"best_step": min(3, state["completed_steps"]), "best_value": 0.0}
        return True

    monkeypatch.setattr(train, "evaluate", evaluate)


def test_the_best_checkpoint_is_what_the_folder_holds(best_is_step_3, tiny_model, news, tmp_path):
    from safetensors.torch import load_file

    call(train.main, *train_args(tiny_model, news, tmp_path / "run"))
    checkpoints = tmp_path / "run/checkpoints"
    best = load_file(checkpoints / "step-000003/adapter_model.safetensors")
    last = load_file(checkpoints / "step-000006/adapter_model.safetensors")
    assert difference(adapter(tmp_path / "run"), best) == 0
    assert difference(adapter(tmp_path / "run"), last) > 0.01
    assert json.loads((tmp_path / "run/run_config.json").read_text())["adapter_step"] == 3


def test_save_total_limit_keeps_the_newest_and_the_best(best_is_step_3, tiny_model, news, tmp_path):
    more = ("--checkpointing_steps", "1", "--save_total_limit", "1")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step-000003", "step-000006"}


@pytest.mark.parametrize(("metric", "choose"), [("loss", min), ("rougeL", max)])
def test_best_is_the_lowest_loss_or_the_highest_rouge(tiny_model, news, tmp_path, metric, choose):
    more = ("--metric_for_best_model", metric, "--checkpointing_steps", "1")
    more += ("--num_eval_titles", "7")
    more += ("--learning_rate", "0.1", "--num_train_epochs", "3")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    values = {r["step"]: r[f"eval_{metric}"] for r in metrics(tmp_path / "run") if "eval_loss" in r}
    assert len(values) == 9
    best = choose(values, key=values.get)  # the first, if several are equal
    assert json.loads((tmp_path / "run/run_config.json").read_text())["adapter_step"] == best


# ---------------------------------------------------------------------- numbers that decide


def test_updates_count_the_tail_and_every_row_once(trained):
    rows = updates(trained)
    assert [row["articles"] for row in rows] == [8, 8, 6, 8, 8, 6]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows[2::3]] == [1, 2]
    tokens = [row["tokens"] for row in rows]
    assert sum(tokens[:3]) == sum(tokens[3:])
    assert tokens[:3] != tokens[3:]  # each epoch has an order of its own


def test_learning_rate_warms_up_from_a_first_update_that_counts(tiny_model, news, tmp_path):
    more = ("--warmup_ratio", "0.5", "--learning_rate", "1e-3")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    found = [row["learning_rate"] for row in updates(tmp_path / "run")]
    assert found == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3, 1e-3])


def test_no_warm_up_is_constant_from_the_start(tiny_model, news, tmp_path):
    more = ("--warmup_ratio", "0", "--learning_rate", "1e-3", "--max_train_steps", "2")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    assert [row["learning_rate"] for row in updates(tmp_path / "run")] == [1e-3, 1e-3]


def test_a_cooldown_ends_a_constant_rate_and_goes_on_where_it_was_stopped(
    tiny_model, news, tmp_path, capsys
):
    more = ("--warmup_ratio", "0.05", "--cooldown_ratio", "0.5", "--learning_rate", "3e-3")
    args = train_args(tiny_model, news, tmp_path / "run", *more, "--checkpointing_steps", "2")
    call(train.main, *args)
    assert ", 1 to warm up, 3 to cool down" in capsys.readouterr().out
    rates = [3e-3, 3e-3, 3e-3, 2.25e-3, 1.5e-3, 0.75e-3]
    assert [row["learning_rate"] for row in updates(tmp_path / "run")] == pytest.approx(rates)
    whole = (tmp_path / "run/adapter_model.safetensors").read_bytes()
    fourth = tmp_path / "run/checkpoints/step-000004"
    call(train.main, *args, "--resume_from_checkpoint", str(fourth))
    assert [row["learning_rate"] for row in updates(tmp_path / "run")] == pytest.approx(rates)
    assert (tmp_path / "run/adapter_model.safetensors").read_bytes() == whole


def test_warm_up_and_cooldown_share_the_updates(capsys):
    more = ("--warmup_ratio", "0.6", "--cooldown_ratio", "0.5")
    with pytest.raises(SystemExit):
        train.parse_args([*map(str, train_args("m", Path("d"), "run", *more))])
    expected = "--cooldown_ratio 0.5: give less, or lower --warmup_ratio\n"
    assert capsys.readouterr().err.endswith(expected)


@pytest.fixture(scope="module")
def one_by_one(tiny_model, news, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("split") / "1x8"
    more = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    call(train.main, *train_args(tiny_model, news, run_dir, *EXACT, *more))
    return run_dir


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_any_split_of_an_update_trains_the_same(
    one_by_one, tiny_model, news, tmp_path, batch, accumulation
):
    more = ("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *EXACT, *more))
    for row, other in zip(updates(tmp_path / "run"), updates(one_by_one), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["title_tokens"] == other["title_tokens"]
    assert difference(adapter(tmp_path / "run"), adapter(one_by_one)) < 1e-3


def test_activation_checkpointing_changes_nothing(
    one_by_one, tiny_model, news, tmp_path, monkeypatch
):
    import modeling

    original, asked = modeling.checkpoint_layers, []

    def checkpoint_layers(base, every):
        asked.append(every)
        return original(base, every)

    monkeypatch.setattr(modeling, "checkpoint_layers", checkpoint_layers)  # not that of the plan
    more = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    more += ("--activation_checkpointing", "full")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *EXACT, *more))
    assert asked == [1]
    assert difference(adapter(tmp_path / "run"), adapter(one_by_one)) < 1e-5
    [one], [other] = (
        [row for row in metrics(folder) if "eval_loss" in row]
        for folder in (tmp_path / "run", one_by_one)
    )
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
    assert one["eval_rougeL"] == other["eval_rougeL"]


def test_a_base_dequantized_once_trains_the_same_bits(trained, tiny_model, news, tmp_path, capsys):
    """And its adapter infers and merges as one of the 4-bit base, which it is."""
    import infer
    import merge

    run_dir = tmp_path / "run"
    call(train.main, *train_args(tiny_model, news, run_dir, "--base_weights", "nf4-bf16"))
    assert "base dequantized once from NF4" in capsys.readouterr().out
    name = "adapter_model.safetensors"
    assert (run_dir / name).read_bytes() == (trained / name).read_bytes()
    assert infer.find_model(infer_args(run_dir, news, tmp_path))["weights"] == "nf4"
    call(merge.main, "--run_dir", run_dir, "--output_dir", tmp_path / "merged", "--check_rows", 2)
    merged = json.loads((tmp_path / "merged/run_config.json").read_text())
    assert merged["merged_base"] == "dequantised"


def infer_args(run_dir, news, tmp_path):
    import infer

    files = ("--input_file", news / "test.csv", "--output_file", tmp_path / "out.csv")
    return infer.parse_args([str(word) for word in ("--run_dir", run_dir, *files)])


def test_plain_lora_trains_infers_and_merges_the_original_base(
    trained, tiny_model, news, tmp_path, capsys
):
    import infer
    import merge

    run_dir = tmp_path / "run"
    call(train.main, *train_args(tiny_model, news, run_dir, "--base_weights", "bf16"))
    assert "base as it is: LoRA, not QLoRA" in capsys.readouterr().out
    assert difference(adapter(run_dir), adapter(trained)) > 0
    assert infer.find_model(infer_args(run_dir, news, tmp_path))["weights"] == "bf16"
    files = ("--input_file", news / "test.csv", "--output_file", tmp_path / "out.csv")
    call(infer.main, "--run_dir", run_dir, *files)
    options = ("--output_dir", tmp_path / "x", "--base", "dequantised")
    with pytest.raises(UserError) as error:
        call(merge.main, "--run_dir", run_dir, *options)
    assert str(error.value) == (
        f"--base dequantised: {run_dir} was not trained in 4 bits; leave it out"
    )
    call(merge.main, "--run_dir", run_dir, "--output_dir", tmp_path / "merged", "--check_rows", 2)
    merged = json.loads((tmp_path / "merged/run_config.json").read_text())
    assert merged["merged_base"] == "original"
    assert merged["merge_check"]["relative_difference"] < 0.03
    call(infer.main, "--run_dir", tmp_path / "merged", *files[:3], tmp_path / "merged.csv")


@pytest.mark.parametrize("when", ["0", "-1", "some", ""])
def test_checkpointing_has_no_other_values(when, capsys):
    given = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]
    with pytest.raises(SystemExit):
        train.parse_args([*given, f"--activation_checkpointing={when}"])
    assert f"--activation_checkpointing {when}: give auto, none, full or" in capsys.readouterr().err


def test_what_is_set_in_the_environment_changes_nothing(
    one_by_one, tiny_model, news, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    more = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *EXACT, *more))
    assert difference(adapter(tmp_path / "run"), adapter(one_by_one)) == 0


def test_same_seed_same_bytes_other_seed_other_bytes(trained, tiny_model, news, tmp_path):
    call(train.main, *train_args(tiny_model, news, tmp_path / "again"))
    call(train.main, *train_args(tiny_model, news, tmp_path / "other", "--seed", "1"))
    content = (trained / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == content
    assert (tmp_path / "other/adapter_model.safetensors").read_bytes() != content


def test_resumed_in_the_middle_of_an_epoch_ends_with_the_same_bytes(
    trained, tiny_model, news, tmp_path
):
    """With dropout and bf16; `tests/test_checkpoints.py` has what is refused."""
    steps = ("--checkpointing_steps", "2")
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    call(train.main, *train_args(tiny_model, news, whole, *steps))
    shutil.copytree(whole, halted)
    found = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert found == [f"step-00000{n}" for n in (2, 3, 4, 6)]  # at the end of an epoch, too
    for name in ("step-000006", "step-000004"):
        for file in (halted / "checkpoints" / name).iterdir():
            file.unlink()
        (halted / "checkpoints" / name).rmdir()
    (halted / "adapter_model.safetensors").unlink()
    latest = ("--resume_from_checkpoint", halted / "checkpoints/step-000002")
    call(train.main, *train_args(tiny_model, news, halted, *steps, *latest))
    for name in ("adapter_model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (halted / name).read_bytes() == (whole / name).read_bytes()
    without_time = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in metrics(run)]
        for run in (whole, halted)
    ]
    assert without_time[0] == without_time[1]


def test_resuming_never_writes_into_a_folder_of_something_else(tiny_model, news, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("mine")
    more = ("--resume_from_checkpoint", "latest")
    with pytest.raises(UserError, match="the folder is not empty"):
        call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))


def test_resuming_before_there_is_a_run_starts_one(tiny_model, news, tmp_path, capsys):
    more = ("--resume_from_checkpoint", "latest", "--max_train_steps", "1")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    assert "to resume yet; starting one" in capsys.readouterr().out
    assert len(updates(tmp_path / "run")) == 1


def test_a_best_by_another_evaluation_is_forgotten(tiny_model, news, tmp_path, capsys):
    """Values of two kinds do not compare: no loss is below 0, as minus a ROUGE-L is."""
    run_dir, resume = tmp_path / "run", ("--resume_from_checkpoint", "latest", "--resume_anyway")
    more = ("--num_train_epochs", 1, "--metric_for_best_model", "rougeL", "--num_eval_titles", 1)
    call(train.main, *train_args(tiny_model, news, run_dir, *more))
    more = ("--num_train_epochs", 3, "--num_eval_titles", 1, "--save_total_limit", 9)
    call(train.main, *train_args(tiny_model, news, run_dir, *more, *resume))
    assert "with another evaluation, the best is chosen anew" in capsys.readouterr().out
    losses = [row for row in metrics(run_dir) if "eval_loss" in row]
    best = min(losses, key=lambda row: row["eval_loss"])  # that of before was evaluated again
    assert len(losses) == 3
    record = json.loads((run_dir / "run_config.json").read_text())
    assert record["adapter_step"] == best["step"]
    for checkpoint in (run_dir / "checkpoints").iterdir():
        assert json.loads((checkpoint / "state.json").read_text())["best_value"] > 0
    call(train.main, *train_args(tiny_model, news, run_dir, *more, *resume))
    assert "chosen anew" not in capsys.readouterr().out


def test_whoever_may_read_a_folder_may_read_all_of_the_run(trained):
    modes = {path: path.stat().st_mode & 0o777 for path in trained.rglob("*") if path.is_file()}
    assert set(modes.values()) == {modes[trained / "run_config.json"]}


def test_a_resumed_optimizer_keeps_the_buffers_that_bitsandbytes_made(
    tiny_model, news, tmp_path, monkeypatch
):
    """`prepare` copies an optimizer's state, which would unpage it on a GPU."""
    import bitsandbytes.optim

    made, optimizers = [], []

    class Spy(bitsandbytes.optim.PagedAdamW32bit):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            optimizers.append(self)

        def get_state_buffer(self, *args, **kwargs):
            made.append(super().get_state_buffer(*args, **kwargs))
            return made[-1]

    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW32bit", Spy)
    more = ("--checkpointing_steps", "2", "--max_train_steps", "3")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    made.clear()
    resume = ("--resume_from_checkpoint", tmp_path / "run/checkpoints/step-000002")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more, *resume))
    states = optimizers[1].state.values()
    held = {id(state[key]) for state in states for key in ("state1", "state2")}
    assert len(held) == 56
    assert held == {id(buffer) for buffer in made}


TWO_UPDATES = ("--checkpointing_steps", "1", "--max_train_steps", "2")


@pytest.fixture(scope="module")
def two_updates(tiny_model, news, tmp_path_factory):
    """The run folder of TWO_UPDATES, of which tests take a copy to go on with."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    call(train.main, *train_args(tiny_model, news, run_dir, *TWO_UPDATES))
    return run_dir


def test_resuming_with_another_split_is_noted(two_updates, tiny_model, news, tmp_path, capsys):
    run_dir, more = shutil.copytree(two_updates, tmp_path / "run"), TWO_UPDATES
    split = ("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1")
    latest = ("--resume_from_checkpoint", "latest")
    record = json.loads((run_dir / "run_config.json").read_text())
    record["memory"] |= {"measured_peak": 1 << 50, "device": "cuda"}
    (run_dir / "run_config.json").write_text(json.dumps(record))
    call(train.main, *train_args(tiny_model, news, run_dir, *more, *split, *latest))
    assert "NOTE: updates are split in another way now" in capsys.readouterr().out
    # No update was left to do: what there is about memory is of those that were done.
    assert json.loads((run_dir / "run_config.json").read_text())["memory"] == record["memory"]


def test_trackers_are_given_numbers_that_they_can_plot(tmp_path):
    given = ("--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o")
    values = train.tracked(train.parse_args([*given, "--target_modules", "q_proj", "v_proj"]))
    assert (values["learning_rate"], values["lora_r"]) == (2e-4, 64)
    assert values["apply_chat_template"] is False
    assert values["max_time"] == "None"  # TensorBoard knows no other
    assert values["target_modules"] == "['q_proj', 'v_proj']"


def test_resuming_with_other_settings_is_refused(trained, tiny_model, news):
    more = ("--resume_from_checkpoint", "latest", "--learning_rate", "0.02")
    with pytest.raises(Exception, match=r"learning_rate 0\.01, now 0\.02"):
        call(train.main, *train_args(tiny_model, news, trained, *more))


# ---------------------------------------------------------------------- against a plain reference


@pytest.fixture(scope="module")
def loaded(tiny_model):
    """The tiny model in NF4 with an adapter that is not zero, in fp32, and its prompt."""
    import torch
    from peft import LoraConfig, get_peft_model

    from modeling import load_base
    from prompting import Prompt, load_tokenizer

    torch.manual_seed(0)
    base = load_base(str(tiny_model), torch.device("cpu"), torch.float32, nf4=True)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    prompt = Prompt(load_tokenizer(str(tiny_model)), "Article : {article}\nTitre :", False, 256, 24)
    return get_peft_model(base, config), prompt


def reference_loss(model, examples):
    """Right-padded, all logits, labels as transformers takes them: the textbook way."""
    import torch
    import torch.nn.functional as F

    total = 0
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        labels = ids[0, 1:].clone()
        labels[: example.num_prompt_ids - 1] = -100
        total = total + F.cross_entropy(logits, labels, reduction="sum")
    return total


@pytest.mark.parametrize("name", ["pack", "pad_left"])
def test_loss_and_gradients_equal_the_textbook_way(loaded, name):
    import torch

    import batching
    from packing import use_packed_attention

    model, prompt = loaded
    model.set_attn_implementation("sdpa")
    make_batch = getattr(batching, name)
    if name == "pack":
        assert use_packed_attention(model, 300) is None
    rows = french_rows(5, seed=4)
    examples = [prompt.encode(row["text"], row["titles"]) for row in rows]
    assert len({len(example.ids) for example in examples}) > 2
    gradients = []
    for loss in (
        train.title_loss(model, make_batch(examples, torch.device("cpu"))),
        reference_loss(model, examples),
    ):
        model.zero_grad()
        loss.backward()
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        gradients.append({n: p.grad.clone() for n, p in trained})
    assert difference(*gradients) < 1e-5
    assert all(gradient.any() for gradient in gradients[0].values())


def test_loss_on_articles_is_the_textbooks_with_weights(loaded):
    """All tokens of articles are drawn here: none has more than ARTICLE_LABELS."""
    import torch
    import torch.nn.functional as F

    from batching import ARTICLE_LABELS, learn_articles_too, pack
    from packing import use_packed_attention

    model, prompt = loaded
    model.set_attn_implementation("sdpa")
    assert use_packed_attention(model, 300) is None
    rows = french_rows(5, seed=4)
    examples = [prompt.encode(row["text"], row["titles"]) for row in rows]
    assert 5 < min(len(e.article) for e in examples) <= max(len(e.article) for e in examples)
    assert max(len(example.article) for example in examples) <= ARTICLE_LABELS
    expected = torch.zeros(())
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        weights = torch.full_like(losses, 0.25)
        weights[: example.article.start - 1] = 0
        weights[example.article.stop - 1 : example.num_prompt_ids - 1] = 0
        weights[example.num_prompt_ids - 1 :] = 1
        expected = expected + (losses * weights).sum()
        shown = prompt.tokenizer.decode(example.ids[example.article.start : example.article.stop])
        assert "Article" not in shown
        assert "Titre" not in shown
    gradients, device = [], torch.device("cpu")
    found = train.title_loss(model, pack(learn_articles_too(examples, 0.25, 42, 3), device))
    # What is logged is of titles alone.
    assert found.item() == pytest.approx(train.title_loss(model, pack(examples, device)).item())
    for loss in (found, expected):
        model.zero_grad()
        loss.backward()
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        gradients.append({n: p.grad.clone() for n, p in trained})
    assert difference(*gradients) < 1e-5


def test_loss_on_articles_does_not_depend_on_the_split_and_resumes(
    one_by_one, tiny_model, news, tmp_path, monkeypatch
):
    monkeypatch.setattr("batching.ARTICLE_LABELS", 8)
    more = (*EXACT, "--prompt_loss_weight", "0.1", "--checkpointing_steps", "2")
    split = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    call(train.main, *train_args(tiny_model, news, tmp_path / "one", *more))
    call(train.main, *train_args(tiny_model, news, tmp_path / "other", *more, *split))
    assert difference(adapter(tmp_path / "one"), adapter(tmp_path / "other")) < 1e-3
    whole = adapter(tmp_path / "one")
    again = ("--resume_from_checkpoint", tmp_path / "one/checkpoints/step-000002")
    call(train.main, *train_args(tiny_model, news, tmp_path / "one", *more, *again))
    assert difference(adapter(tmp_path / "one"), whole) == 0
    assert difference(adapter(one_by_one), whole) > 0.01


def test_loss_on_articles_needs_packed_rows(tiny_model, news, tmp_path, monkeypatch):
    monkeypatch.setattr("packing.use_packed_attention", lambda *_: "why")
    args = train_args(tiny_model, news, tmp_path / "run", "--prompt_loss_weight", "0.1")
    with pytest.raises(UserError, match="--prompt_loss_weight: this model takes no packed rows"):
        call(train.main, *args)


def test_a_run_that_turns_out_to_be_padded_is_planned_again(
    tiny_model, news, tmp_path, monkeypatch, capsys
):
    """There was room for packed rows, and is none for padded ones, but with checkpointing."""

    def planned(name: str) -> dict:
        call(train.main, *train_args(tiny_model, news, tmp_path / name, "--max_train_steps", "1"))
        return json.loads((tmp_path / name / "run_config.json").read_text())["memory"]

    monkeypatch.setattr(train, "resident_memory", lambda _: 0)
    packed = planned("packed")
    monkeypatch.setattr("packing.use_packed_attention", lambda *_: "why")
    monkeypatch.setattr(train, "free_memory", lambda _: (packed["this_run"] + 1024) / 0.9)
    memory = planned("padded")
    assert packed["checkpointed_every"] == 0 < memory["checkpointed_every"]
    said = capsys.readouterr().out
    assert "activation checkpointing off" in said
    told = "this model takes no packed rows (why); shorter articles of a micro-batch are padded: "
    assert f"NOTE: {told}about " in said


@pytest.mark.parametrize("name", ["prompt_loss_weight", "cooldown_ratio"])
def test_a_run_from_before_there_was_an_argument_goes_on(
    two_updates, tiny_model, news, tmp_path, name
):
    run_dir, more = shutil.copytree(two_updates, tmp_path / "run"), TWO_UPDATES
    record = json.loads((run_dir / "run_config.json").read_text())
    del record["arguments"][name]
    (run_dir / "run_config.json").write_text(json.dumps(record))
    first = ("--resume_from_checkpoint", run_dir / "checkpoints/step-000001")
    call(train.main, *train_args(tiny_model, news, run_dir, *more, *first))
    record = json.loads((run_dir / "run_config.json").read_text())
    assert record["arguments"].pop(name) == 0
    assert f"| {name} | 0.0 |" in model_card(record)


def test_what_is_drawn_goes_by_the_seed_and_the_update(tiny_model, news, tmp_path, monkeypatch):
    """And not by the update's place in its epoch: each epoch has masks and tokens of its own."""
    import batching

    original_seed, original_learn = batching.dropout_seed, batching.learn_articles_too
    seeds, learnt = [], []

    def dropout_seed(*arguments):
        seeds.append(arguments)
        return original_seed(*arguments)

    def learn_articles_too(examples, weight, seed, step):
        learnt.append((weight, seed, step))
        return original_learn(examples, weight, seed, step)

    monkeypatch.setattr(batching, "dropout_seed", dropout_seed)
    monkeypatch.setattr(batching, "learn_articles_too", learn_articles_too)
    more = ("--seed", "7", "--prompt_loss_weight", "0.1", "--max_train_steps", "4")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    assert seeds == [(7, step, 0) for step in range(4)]  # of 3 updates an epoch
    assert learnt == [(0.1, 7, step) for step in range(4)]


@pytest.mark.parametrize(
    ("asked", "in_silicon", "precision"),
    [(None, True, "bf16"), (None, False, "no"), ("bf16", False, "bf16"), ("no", True, "no")],
)
def test_bf16_unless_the_cpu_is_slow_in_it(
    asked, in_silicon, precision, tiny_model, news, tmp_path, monkeypatch, capsys
):
    """The report's bf16 where nobody says otherwise; without instructions for it, minutes become
    hours."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": in_silicon})
    args = train_args(tiny_model, news, tmp_path / "run", "--max_train_steps", "1")
    start = args.index("--mixed_precision")
    args[start : start + 2] = ["--mixed_precision", asked] if asked else []
    call(train.main, *args)
    run_config = json.loads((tmp_path / "run/run_config.json").read_text())
    assert run_config["arguments"]["mixed_precision"] == precision
    printed = capsys.readouterr().out
    assert ("precision  bf16 autocast" in printed) == (precision == "bf16")
    told = None
    if not in_silicon:
        told = "a run with --mixed_precision no is faster"
        if asked is None:
            told = "all but 4-bit weights is in fp32 (see --mixed_precision)"
    notes = [line for line in printed.splitlines() if "this CPU" in line]
    assert notes == ([f"NOTE: this CPU multiplies bf16 slowly; {told}"] if told else [])


@pytest.mark.parametrize("in_silicon", [True, False])
def test_a_run_keeps_its_precision_on_another_cpu(
    in_silicon, tiny_model, news, tmp_path, monkeypatch, capsys
):
    """A job that was put back into the queue may go on elsewhere."""
    args = train_args(tiny_model, news, tmp_path / "run", "--resume_from_checkpoint", "latest")
    start = args.index("--mixed_precision")
    del args[start : start + 2]
    for number, found in enumerate((in_silicon, not in_silicon), start=1):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda found=found: {"bf16": found})
        assert call(train.main, *args, "--max_time", "1e-9") == STOPPED
        run_config = json.loads((tmp_path / "run/run_config.json").read_text())
        assert run_config["arguments"]["mixed_precision"] == ("bf16" if in_silicon else "no")
        assert len(updates(tmp_path / "run")) == number
        assert ("this CPU multiplies bf16 slowly" in capsys.readouterr().out) == (not found)


def test_processes_on_cpus_of_both_kinds_are_told_to_agree(tiny_model, news, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, "no"])
    problem = "--mixed_precision: some of the processes have a CPU that is slow in bf16, and some"
    with pytest.raises(UserError, match=problem):
        call(train.main, *train_args(tiny_model, news, tmp_path / "run"))


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_autocast_is_on_in_training_and_in_evaluation(
    precision, tiny_model, news, tmp_path, monkeypatch
):
    import torch

    original, seen = train.title_loss, set()

    def title_loss(model, batch):
        seen.add((model.training, torch.is_autocast_enabled("cpu")))
        return original(model, batch)

    monkeypatch.setattr(train, "title_loss", title_loss)
    more = ("--mixed_precision", precision, "--max_train_steps", "1")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    on = precision == "bf16"
    assert seen == {(True, on), (False, on)}


def test_the_next_articles_are_read_before_an_update_is_waited_for(
    tiny_model, news, tmp_path, monkeypatch
):
    """A step comes after the wait for loss and gradient: the next articles are there by then."""
    from bitsandbytes.optim import PagedAdamW32bit

    from prompting import Prompt

    original_loss, original_encode = train.title_loss, Prompt.encode_all
    original_step, read, at_loss, at_step = PagedAdamW32bit.step, [], [], []

    def encode_all(self, articles, titles):
        read.extend(articles)
        return original_encode(self, articles, titles)

    def title_loss(model, batch):
        at_loss.append(len(read))
        return original_loss(model, batch)

    def step(self, *arguments, **options):
        at_step.append(len(read))
        return original_step(self, *arguments, **options)

    monkeypatch.setattr(Prompt, "encode_all", encode_all)
    monkeypatch.setattr(train, "title_loss", title_loss)
    monkeypatch.setattr(PagedAdamW32bit, "step", step)
    one = ("--max_train_steps", "3", "--per_device_train_batch_size", "8")
    one += ("--gradient_accumulation_steps", "1")
    args = train_args(tiny_model, news, tmp_path / "run", *one)
    del args[args.index("--validation_file") : args.index("--validation_file") + 2]
    call(train.main, *args)
    sizes = [row["articles"] for row in updates(tmp_path / "run")]
    found = [after - before for before, after in zip(at_loss, at_step, strict=True)]
    assert found == [*sizes[1:], 0]
    assert at_loss[1:] == at_step[:-1]  # and nothing is read twice


@pytest.mark.parametrize("name", ["pack", "pad_left"])
def test_logits_are_made_for_titles_only(loaded, name):
    import torch

    import batching
    from packing import use_packed_attention

    model, prompt = loaded
    model.set_attn_implementation("sdpa")
    if name == "pack":
        assert use_packed_attention(model, 300) is None
    examples = [prompt.encode(row["text"], row["titles"]) for row in french_rows(4, longest=200)]
    shapes = []
    head = model.get_base_model().lm_head
    hook = head.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    train.title_loss(model, getattr(batching, name)(examples, torch.device("cpu")))
    hook.remove()
    titles = [example.num_title_ids for example in examples]
    expected = {"pack": (1, sum(titles)), "pad_left": (4, max(titles))}[name]
    assert shapes == [torch.Size([*expected, head.out_features])]
    assert max(titles) < max(len(example.ids) for example in examples) / 2


def test_logged_figures_equal_an_offline_recomputation(one_by_one, tiny_model, news):
    """The first update's loss and gradient norm, from the LoRA that the seed gives."""
    import torch
    from accelerate.utils import set_seed
    from peft import LoraConfig, get_peft_model

    from articles import Columns, iterate_articles
    from batching import epoch_order
    from modeling import load_base
    from prompting import Prompt, load_tokenizer, read_template

    set_seed(7)
    base = load_base(str(tiny_model), torch.device("cpu"), torch.float32, nf4=True)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base, config)
    template = read_template(str(SCRIPTS.parent / "prompts/fr.txt"))
    prompt = Prompt(load_tokenizer(str(tiny_model)), template, False, 256, 24)
    rows = list(iterate_articles(str(news / "train.csv"), Columns(id=None)))
    chosen = [rows[i] for i in epoch_order(22, 7, 0)[:8].tolist()]
    examples = [prompt.encode(row["text"], row["title"]) for row in chosen]
    num_title_tokens = sum(example.num_title_ids for example in examples)
    loss = reference_loss(model, examples) / num_title_tokens
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm()
    logged = updates(one_by_one)[0]
    assert logged["title_tokens"] == num_title_tokens
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_evaluation_loss_is_per_title_token_of_all_rows(trained, news):
    """Recomputed from the saved adapter, one row at a time, under the same autocast."""
    import torch

    from articles import Columns, iterate_articles
    from modeling import attach_adapter, load_base
    from prompting import load_tokenizer, prompt_of_run

    config = json.loads((trained / "run_config.json").read_text())
    base = load_base(config["base_model"], torch.device("cpu"), torch.bfloat16, nf4=True)
    model = attach_adapter(base, str(trained))
    prompt = prompt_of_run(load_tokenizer(str(trained)), config["prompt"], "")
    rows = iterate_articles(str(news / "validation.csv"), Columns(id=None))
    examples = [prompt.encode(row["text"], row["title"]) for row in rows]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = sum(reference_loss(model, [example]).float() for example in examples)
    loss /= sum(example.num_title_ids for example in examples)
    best = min(row["eval_loss"] for row in metrics(trained) if "eval_loss" in row)
    assert loss.item() == pytest.approx(best, rel=5e-3)  # bf16: padding changes the rounding


def test_clipping_bounds_the_norm_that_adamw_sees(tiny_model, news, tmp_path, monkeypatch):
    import bitsandbytes.optim

    norms = []

    class Spy(bitsandbytes.optim.PagedAdamW32bit):
        def step(self, closure=None):
            squares = [p.grad.double().norm() ** 2 for g in self.param_groups for p in g["params"]]
            norms.append(math.sqrt(sum(squares)))
            return super().step(closure)

    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW32bit", Spy)
    run_dir = tmp_path / "run"
    more = ("--max_grad_norm", "0.05", "--num_train_epochs", "1")
    call(train.main, *train_args(tiny_model, news, run_dir, *more))
    logged = [row["grad_norm"] for row in updates(run_dir)]
    assert all(norm > 0.05 for norm in logged)  # before clipping
    assert norms == pytest.approx([0.05] * 3, rel=1e-3)  # after


# ---------------------------------------------------------------------- the method in the file


def test_only_lora_trains_and_the_optimizer_holds_exactly_that(
    tiny_model, news, tmp_path, monkeypatch
):
    import bitsandbytes.optim
    import peft

    seen = {}
    original_get, original_adamw = peft.get_peft_model, bitsandbytes.optim.PagedAdamW32bit

    def get_peft_model(*args, **kwargs):
        seen["model"] = original_get(*args, **kwargs)
        return seen["model"]

    def adamw(params, **kwargs):
        seen["optimizer"] = original_adamw(params, **kwargs)
        return seen["optimizer"]

    monkeypatch.setattr(peft, "get_peft_model", get_peft_model)
    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW32bit", adamw)
    more = ("--max_train_steps", "1", "--activation_checkpointing", "full")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    [group] = seen["optimizer"].param_groups
    assert group["weight_decay"] == 0  # bitsandbytes' default is not
    trainable = {id(p): n for n, p in seen["model"].named_parameters() if p.requires_grad}
    held = {id(p) for group in seen["optimizer"].param_groups for p in group["params"]}
    assert held == trainable.keys()
    assert all("lora_" in name for name in trainable.values())
    assert len(trainable) == 2 * 2 * 7  # A and B, 2 layers, 7 linear layers in each
    assert all(p.grad is None for p in seen["model"].parameters())  # after the update
    # Embeddings and norms stay in bf16, LoRA is fp32, the rest is 4-bit: nothing is copied up.
    for name, parameter in seen["model"].named_parameters():
        expected = "float32" if "lora_" in name else "uint8" if "base_layer" in name else "bfloat16"
        assert str(parameter.dtype) == f"torch.{expected}", name
    assert seen["model"].config.use_cache is True


def test_generation_in_training_equals_that_of_the_saved_adapter(trained, tiny_model, news, capsys):
    """Evaluation runs in evaluation mode, with the cache, after activation checkpointing."""
    import torch

    from articles import Columns, iterate_articles
    from infer import generate_titles
    from modeling import attach_adapter, load_base
    from prompting import load_tokenizer, prompt_of_run

    config = json.loads((trained / "run_config.json").read_text())
    base = load_base(config["base_model"], torch.device("cpu"), torch.bfloat16, nf4=True)
    prompt = prompt_of_run(load_tokenizer(str(trained)), config["prompt"], "")
    texts = [r["text"] for r in iterate_articles(str(news / "validation.csv"), Columns(id=None))]
    with torch.autocast("cpu", torch.bfloat16):
        model = attach_adapter(base, str(trained))
        titles = dict(generate_titles(model, prompt, texts[:6:2]))
    rerun = trained.parent / "rerun"
    capsys.readouterr()
    call(train.main, *train_args(tiny_model, news, rerun, "--activation_checkpointing", "full"))
    printed = re.findall(r"written: (.*)", capsys.readouterr().out)
    step = config["adapter_step"]
    shown = printed[:3] if step == 3 else printed[3:]
    assert [titles[i].title for i in range(3)] == shown


def test_the_loop_can_be_read_in_one_file():
    source = (SCRIPTS / "train.py").read_text()
    tree = ast.parse(source)
    assert "scripts/train.py" in ast.get_docstring(tree)
    train = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    loop = next(n for n in train.body if isinstance(n, ast.For) and n.target.id == "step")
    assert loop.end_lineno - loop.lineno < 90
    fence = [n for n, line in enumerate(source.splitlines()) if line.startswith("        # ------")]
    assert len(fence) == 2
    assert fence[1] - fence[0] < 40
    order = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert order[:3] == ["parse_args", "main", "train"]


METHOD = ("load_base(", "LoraConfig(", "get_peft_model(", "PagedAdamW32bit(", "clip_grad_norm_(")
METHOD += ("accelerator.autocast()", "no_sync(model)", "accelerator.backward(", "warmup_ratio *")
METHOD += ('matmul.fp32_precision = "tf32"', "optimizer.step()", "gradient_accumulation_steps\n")


@pytest.mark.parametrize("name", METHOD)
def test_the_method_is_called_by_name_in_train(name):
    assert name in (SCRIPTS / "train.py").read_text()


def test_tf32_is_on_after_a_run(trained):
    import torch

    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_an_update_that_is_not_finite_is_skipped_and_said(
    tiny_model, news, tmp_path, monkeypatch, capsys
):
    """Even the very first, of which a checkpoint is saved at once."""
    from safetensors.torch import load_file

    original, calls = train.title_loss, []

    def title_loss(model, batch):
        calls.append(1)
        factor = float("inf") if len(calls) == 2 else 1.0  # in the first of 3 updates
        return original(model, batch) * factor

    monkeypatch.setattr(train, "title_loss", title_loss)
    more = ("--checkpointing_steps", "1", "--max_train_steps", "3")
    args = train_args(tiny_model, news, tmp_path / "run", *more)
    del args[args.index("--validation_file") : args.index("--validation_file") + 2]
    call(train.main, *args)
    assert [row["skipped"] for row in updates(tmp_path / "run")] == [True, False, False]
    assert "NOTE: update 1 skipped, its loss or gradient is not finite" in capsys.readouterr().out
    steps = [
        load_file(tmp_path / f"run/checkpoints/step-00000{n}/adapter_model.safetensors")
        for n in (1, 2, 3)
    ]
    assert not any(tensor.any() for name, tensor in steps[0].items() if "lora_B" in name)
    assert all(tensor.isfinite().all() for step in steps for tensor in step.values())
    assert difference(steps[1], steps[2]) > 0
    # And the run can go on from there.
    latest = ("--resume_from_checkpoint", tmp_path / "run/checkpoints/step-000001")
    monkeypatch.setattr(train, "title_loss", original)
    call(train.main, *args, *latest)
    assert [row["skipped"] for row in updates(tmp_path / "run")] == [True, False, False]


def test_the_legacy_tf32_switch_is_nowhere():
    # Mixing it with fp32_precision is an error in torch >= 2.9.
    sources = list(SCRIPTS.glob("*.py"))
    assert len(sources) > 5
    assert not [path for path in sources if "allow_tf32" in path.read_text()]


# ---------------------------------------------------------------------- what the user sees


@pytest.fixture(scope="module")
def one_update(tiny_model, news, tmp_path_factory):
    """A run folder after a single update, and what was printed."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        call(train.main, *train_args(tiny_model, news, run_dir, "--max_train_steps", "1"))
    return run_dir, printed.getvalue()


@pytest.fixture
def plan(tiny_model, news, tmp_path, capsys, monkeypatch):
    """Return a function that returns the plan of a run, which ends where the base is loaded."""

    def load(*_):
        raise UserError("base", "not now", "wait")

    def of_run(*more):
        with pytest.raises(UserError, match="base: not now"):
            call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
        return capsys.readouterr().out

    monkeypatch.setattr("modeling.load_base", load)
    return of_run


def test_plan_says_what_is_about_to_happen(one_update):
    run_dir, plan = one_update
    assert "22 rows for training, 7 for validation" in plan
    assert re.search(r"\d+ training articles are cut to \d+ tokens", plan)
    total = sum(row["title_tokens"] for row in updates(run_dir))
    per_epoch = int(re.search(r"of which ([\d,]+) title tokens", plan)[1].replace(",", ""))
    assert per_epoch > total > 0
    assert "1 of 8 articles (4 per device x 2 accumulated x 1 processes), 3 per epoch" in plan
    assert "PagedAdamW32bit, unpaged: there is no GPU to page from" in plan
    assert re.search(r"[\d,]+ of [\d,]+ parameters train", plan)
    gib = r"[\d.]+ GiB"
    memory = (
        rf"about {gib} expected at the peak, .* \(full fine-tuning {gib}, LoRA {gib}, QLoRA {gib}"
    )
    assert re.search(memory, plan)
    assert "bf16 autocast" in plan


def test_the_plan_comes_before_anything_is_loaded(plan):
    assert "GiB expected at the peak" in plan()


def test_the_time_to_come_is_told_after_ten_updates(tiny_model, news, tmp_path, capsys):
    more = ("--per_device_train_batch_size", "1", "--num_train_epochs", "1")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    told = re.findall(r"about \d+ s for the (\d+) updates to come", capsys.readouterr().out)
    assert told == [str(11 - 10)]


def test_the_record_has_the_memory_that_was_expected_and_taken(trained):
    memory = json.loads((trained / "run_config.json").read_text())["memory"]
    assert memory["device"] == "cpu"
    assert memory["this_run"] == memory["estimate"]["qlora"]
    assert memory["measured_peak"] > 2**28


def test_plan_counts_equal_what_an_epoch_trains_on(plan, trained):
    rows = updates(trained)[:3]
    assert rows[-1]["epoch"] == 1
    found = re.search(r"tokens +([\d,]+) per epoch, of which ([\d,]+) title tokens", plan())
    assert int(found[1].replace(",", "")) == sum(row["tokens"] for row in rows)
    assert int(found[2].replace(",", "")) == sum(row["title_tokens"] for row in rows)


def test_the_prompt_is_a_chat_turn_where_it_is_asked_for(plan):
    """Whose marks take tokens from the article's budget."""
    cut = [
        re.search(r"are cut to (\d+) tokens", plan(*more))[1]
        for more in ((), ["--apply_chat_template"])
    ]
    assert int(cut[1]) < int(cut[0])


def test_the_layers_named_are_those_adapted(plan):
    rank, width, layers = 4, 64, 2
    told = f"model      {2 * rank * width * layers:,} of "
    assert told in plan("--target_modules", "q_proj")


def test_plan_says_how_many_updates_there_will_be(plan):
    assert "updates    6 of 8 articles" in plan("--max_train_steps", "1000")


def test_three_titles_are_shown_beside_the_true_ones(one_update):
    from title_figures import rouge_means

    run_dir, output = one_update
    true = [row["titles"] for row in french_rows(7, seed=2)]
    assert re.findall(r"true: +(.*)", output) == true[:6:2]
    means = rouge_means(re.findall(r"written: (.*)", output), true[:6:2])
    [row] = [row for row in metrics(run_dir) if "eval_rougeL" in row]
    assert row["eval_rougeL"] == pytest.approx(means["default"]["rougeL"])
    assert re.search(r"eval_loss \d\.\d+, eval_rougeL 0\.\d+", output)


def test_tensorboard_gets_figures_and_titles_at_each_evaluation(tiny_model, news, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ("--report_to", "tensorboard", "--max_train_steps", "2", "--checkpointing_steps", "1")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    read = events.EventAccumulator(str(tmp_path / "run/trackers/manchette")).Reload()
    logged = read.Tensors("eval_titles/text_summary")
    assert [event.step for event in logged] == [1, 2]
    true = [row["titles"] for row in french_rows(7, seed=2)][:6:2]
    for event in logged:
        lines = event.tensor_proto.string_val[0].decode().splitlines()
        assert lines[:2] == ["| written | true |", "| -- | -- |"]
        assert [
            html.unescape(line.split(" | ")[1].removesuffix(" |")) for line in lines[2:]
        ] == true
    for figure in ("loss", "learning_rate", "eval_loss"):
        assert [event.step for event in read.Scalars(figure)] == [1, 2]


def test_tensorboard_forgets_updates_that_are_repeated(tiny_model, news, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ("--report_to", "tensorboard", "--max_train_steps", "3", "--checkpointing_steps", "1")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more))
    back = ("--resume_from_checkpoint", tmp_path / "run/checkpoints/step-000001")
    call(train.main, *train_args(tiny_model, news, tmp_path / "run", *more, *back))
    read = events.EventAccumulator(str(tmp_path / "run/trackers/manchette")).Reload()
    for figure in ("loss", "eval_loss"):
        assert [event.step for event in read.Scalars(figure)] == [1, 2, 3]


def test_without_validation_the_last_state_is_kept(tiny_model, news, tmp_path):
    run_dir = tmp_path / "run"
    args = train_args(tiny_model, news, run_dir)
    del args[args.index("--validation_file") : args.index("--validation_file") + 2]
    call(train.main, *args)
    assert json.loads((run_dir / "run_config.json").read_text())["adapter_step"] == 6
    assert not [row for row in metrics(run_dir) if "eval_loss" in row]


def test_through_accelerate_launch(run_script, tiny_model, news, tmp_path):
    args = train_args(tiny_model, news, tmp_path / "run", "--max_train_steps", "2")
    result = run_script("train.py", *args, launch=True, cwd=tmp_path)
    assert "done:" in result.stdout
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    # No warning of our own making, above all no deprecated call.
    assert "FutureWarning" not in result.stderr


# ---------------------------------------------------------------------- complaints


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train_file", "none.csv"], "error: none.csv: there is no such file; check the path"),
        (
            ["--text_column", "article"],
            "error: {news}/train.csv:2: no column 'article' among 'ID', 'text', 'titles'; "
            "rename it in the file or name it on the command line",
        ),
        (
            ["--prompt_file", "{tmp}/prompt.txt"],
            "error: {tmp}/prompt.txt: {{article}} stands there 0 times; write it once, where the "
            "article goes",
        ),
        (
            ["--output_dir", "{tmp}"],
            "error: {tmp}: the folder is not empty (it holds empty_title.csv); remove it or give "
            "another --output_dir",
        ),
        (
            ["--train_file", "{tmp}/empty_title.csv"],
            "error: {tmp}/empty_title.csv:4: the column 'titles' is empty; fill it in or remove "
            "the row",
        ),
        (
            ["--model_name_or_path", "./nowhere"],
            "error: ./nowhere: there is no such model folder; check the path",
        ),
        (["--lora_r", "0"], "train.py: error: --lora_r 0: give a number above 0"),
        (
            ["--lora_dropout", "1"],
            "train.py: error: --lora_dropout 1.0: give a number from 0 to below 1",
        ),
        (
            ["--metric_for_best_model", "rougeL", "--num_eval_titles", "0"],
            "train.py: error: --metric_for_best_model rougeL: needs --num_eval_titles above 0",
        ),
        (
            ["--seed", "4294967296"],
            "train.py: error: --seed 4294967296: give a number from 0 to below 2**32",
        ),
        (
            ["--report_to", "wandb"],
            "error: --report_to wandb: it is not installed; run: pip install wandb",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run_script, tiny_model, news, tmp_path, change, message
):
    rows = french_rows(5)
    rows[2]["titles"] = "  "
    write_csv(tmp_path / "empty_title.csv", rows)
    (tmp_path / "prompt.txt").write_text("Titre :")
    places = {"tmp": tmp_path, "news": news}
    args = train_args(tiny_model, news, tmp_path / "run", *(c.format(**places) for c in change))
    result = run_script("train.py", *args, code=2, cwd=tmp_path)
    assert result.stderr == message.format(**places) + "\n"
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


def test_complaints_and_help_do_not_wait_for_torch(run_script, tiny_model, news, tmp_path):
    """Without torch to import at all, both still come: that is how fast they are."""
    broken = tmp_path / "site/torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise SystemExit('torch was imported')")
    path = {"PYTHONPATH": f"{broken.parent}:{os.environ['PYTHONPATH']}"}
    assert "--max_grad_norm" in run_script("train.py", "--help", **path).stdout
    args = train_args(tiny_model, news, tmp_path / "run", "--train_file", "none.csv")
    assert "no such file" in run_script("train.py", *args, code=2, **path).stderr


def test_defaults_are_the_reports():
    args = train.parse_args(["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"])
    assert (args.num_train_epochs, args.per_device_train_batch_size) == (2, 4)
    assert (args.gradient_accumulation_steps, args.learning_rate) == (2, 2e-4)
    assert (args.warmup_ratio, args.max_grad_norm) == (0.03, 0.3)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (64, 16, 0.1)
    assert args.target_modules == ["all-linear"]
    assert (args.max_length, args.max_title_tokens, args.base_weights) == (1024, 128, "nf4")
    assert Path(args.prompt_file).is_file()
