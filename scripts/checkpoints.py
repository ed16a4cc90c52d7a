"""Checkpoints: adapter, optimizer and a few numbers; never the base, never a pickle.

A checkpoint is a folder `step-000123` that appears under its name only when it is complete.
There are no random states in it: order and dropout are functions of (seed, update, process).
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from exit_codes import UserError
from modeling import adapter_state_dict, load_adapter_weights
from run_folder import ADAPTER_WEIGHTS, RUN_CONFIG, model_card, read_run_config, write_json

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def save_checkpoint(folder: Path, model, optimizer, state: dict) -> Path:
    """Write `folder/step-NNNNNN` for `state["completed_steps"]` and return it.

    It is written beside under a temporary name, flushed to the disk and renamed: whatever stops
    the process, a folder named step-* is whole.
    """
    final = folder / _name(state["completed_steps"])
    temporary = folder / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_on_cpu(adapter_state_dict(model)), temporary / ADAPTER_WEIGHTS)
    tensors, numbers = _optimizer_state(model, optimizer)
    save_file(_on_cpu(tensors), temporary / OPTIMIZER)
    content = json.dumps(state | {"optimizer": numbers}, indent=2)
    (temporary / STATE).write_text(content + "\n", encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    replaced = folder / f"{final.name}.old.tmp"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # after going back to an earlier checkpoint
        os.rename(final, replaced)
    os.rename(temporary, final)
    _flush(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def load_checkpoint(checkpoint: Path, model, optimizer) -> dict:
    """Put a checkpoint into a fresh model and optimizer and return its state.

    Raises:
        UserError: a file of it is missing, broken or of another model.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / OPTIMIZER)
        if checkpoint.name != _name(state["completed_steps"]):
            raise ValueError(f"{STATE} is that of update {state['completed_steps']}")
        if state["best_step"] is not None:  # it names a folder
            _name(state["best_step"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(checkpoint, f"unusable checkpoint ({error})", "give another one") from None
    load_adapter_weights(model, checkpoint / ADAPTER_WEIGHTS)
    numbers = state.pop("optimizer")
    for name, parameter in _trainable(model):
        if name not in numbers:  # nothing has been stepped yet
            continue
        moments = {k: tensors[f"{name}.{k}"] for k in ("state1", "state2")}
        for key, moment in moments.items():
            # A buffer of the optimizer's own making is paged where the first one was.
            buffer = optimizer.get_state_buffer(parameter)
            buffer.copy_(moment)
            moments[key] = buffer
        optimizer.state[parameter] = {"step": numbers[name]} | moments
    return state


def rotate_checkpoints(folder: Path, best_step: int | None, save_total_limit: int | None) -> None:
    """Remove all but the newest `save_total_limit` checkpoints and the best one."""
    steps = sorted(p for p in folder.glob("step-*") if p.suffix != ".tmp")
    for old in steps[: -save_total_limit if save_total_limit else 0]:
        if best_step is None or old.name != _name(best_step):
            shutil.rmtree(old)


def save_adapter(model, state: dict, output_dir: Path) -> None:
    """Write the run's adapter: that of the best checkpoint, or the last where none was judged."""
    if state["best_step"] not in (None, state["completed_steps"]):
        best = output_dir / "checkpoints" / _name(state["best_step"])
        load_adapter_weights(model, best / ADAPTER_WEIGHTS)
    model.save_pretrained(output_dir, save_embedding_layers=False)
    run_config = read_run_config(str(output_dir))
    run_config["adapter_step"] = state["best_step"] or state["completed_steps"]
    write_json(output_dir / RUN_CONFIG, run_config)
    (output_dir / "README.md").write_text(model_card(run_config), encoding="utf-8")


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _trainable(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _optimizer_state(model, optimizer) -> tuple[dict, dict]:
    """Return AdamW's moments and step counts by parameter name (its own state goes by position)."""
    tensors, numbers = {}, {}
    for name, parameter in _trainable(model):
        state = optimizer.state[parameter]
        if not state:  # every update so far was skipped
            continue
        numbers[name] = state["step"]
        tensors |= {f"{name}.{key}": state[key] for key in ("state1", "state2")}
    return tensors, numbers


def _on_cpu(tensors: dict) -> dict:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
