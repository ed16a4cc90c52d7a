"""checkpoints.py: whole or not there. Run: python -m pytest tests/test_checkpoints.py"""

import json
import shutil

import pytest
import torch
from conftest import call, train_args
from safetensors.torch import load_file, save_file

import checkpoints
import train
from exit_codes import UserError

CPU = torch.device("cpu")


@pytest.fixture
def parts(tiny_model):
    """A 4-bit model with LoRA and its optimizer, after one update."""
    from bitsandbytes.optim import PagedAdamW32bit
    from peft import LoraConfig, get_peft_model

    from modeling import load_base

    def make():
        base = load_base(str(tiny_model), CPU, torch.bfloat16, nf4=True)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        return model, PagedAdamW32bit([p for p in model.parameters() if p.requires_grad], lr=0.01)

    model, optimizer = make()
    update(model, optimizer)
    return model, optimizer, make


def update(model, optimizer):
    ids = torch.arange(5, 40).reshape(1, -1)
    model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


STATE = {"completed_steps": 7, "best_step": 3, "best_value": 1.5}


def test_what_was_saved_goes_on_with_the_same_bits(parts, tmp_path):
    model, optimizer, make = parts
    saved = checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)
    assert saved == tmp_path / "step-000007"
    other_model, other_optimizer = make()
    assert checkpoints.load_checkpoint(saved, other_model, other_optimizer) == STATE
    for _ in range(2):
        update(model, optimizer)
        update(other_model, other_optimizer)
    pairs = zip(model.parameters(), other_model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    trainable = [p for p in other_model.parameters() if p.requires_grad]
    assert len(trainable) == 28


def test_the_optimizers_own_buffers_are_filled(parts, tmp_path, monkeypatch):
    """They are what bitsandbytes pages on a GPU; a tensor of ours would never be paged again."""
    model, optimizer, make = parts
    saved = checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)
    other_model, other = make()
    made, original = [], other.get_state_buffer

    def get_state_buffer(parameter, dtype=torch.float32):
        made.append(original(parameter, dtype))
        return made[-1]

    monkeypatch.setattr(other, "get_state_buffer", get_state_buffer)
    checkpoints.load_checkpoint(saved, other_model, other)
    held = {id(s[key]) for s in other.state.values() for key in ("state1", "state2")}
    assert len(held) == 56
    assert held == {id(buffer) for buffer in made}


def test_a_folder_appears_only_when_it_is_whole(parts, tmp_path, monkeypatch):
    model, optimizer, _ = parts

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007.tmp"]
    monkeypatch.undo()
    checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)  # over what was left
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_a_checkpoint_is_replaced_only_by_a_whole_one(parts, tmp_path, monkeypatch):
    """After going back to an earlier one, later steps are written once more."""
    model, optimizer, _ = parts
    saved = checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)
    before = (saved / "adapter_model.safetensors").read_bytes()

    def die(*_, **__):
        raise OSError("disk full")

    update(model, optimizer)
    monkeypatch.setattr(checkpoints, "save_file", die)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    monkeypatch.undo()
    checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)
    assert (saved / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_an_unfinished_folder_is_not_the_latest(tiny_model, news, tmp_path, capsys):
    run_dir = tmp_path / "run"
    more = ("--checkpointing_steps", "1", "--max_train_steps", "2")
    call(train.main, *train_args(tiny_model, news, run_dir, *more))
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / "step-000009.tmp")
    capsys.readouterr()
    call(
        train.main,
        *train_args(tiny_model, news, run_dir, *more, "--resume_from_checkpoint", "latest"),
    )
    assert f"resuming from {folder / 'step-000002'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "optimizer.safetensors", "state.json"]
)
def test_a_torn_file_is_refused(parts, tmp_path, file):
    model, optimizer, make = parts
    saved = checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"unusable checkpoint|cannot be read"):
        checkpoints.load_checkpoint(saved, *make())


def test_an_adapter_of_another_shape_is_refused(parts, tmp_path):
    model, optimizer, make = parts
    saved = checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)
    tensors = load_file(saved / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"does not fit this base at {name}"):
        checkpoints.load_checkpoint(saved, *make())


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-000009.tmp").mkdir()
    checkpoints.rotate_checkpoints(tmp_path, best_step=2, save_total_limit=None)
    assert len(list(tmp_path.iterdir())) == 7
    checkpoints.rotate_checkpoints(tmp_path, best_step=2, save_total_limit=2)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step-000002", "step-000005", "step-000006", "step-000009.tmp"]


def test_state_is_readable_by_a_person(parts, tmp_path):
    model, optimizer, _ = parts
    saved = checkpoints.save_checkpoint(tmp_path, model, optimizer, STATE)
    state = json.loads((saved / "state.json").read_text())
    assert {key: state[key] for key in STATE} == STATE
    assert set(state["optimizer"].values()) == {1}  # updates, by parameter
