"""Checkpoints: adapter, optimizer and a few numbers; never the base, never a pickle.

A checkpoint is a folder `step-000123` that appears under its name only when it is complete. Its
state.json holds the hashes of its files and one of itself, so that a damaged one is known as such.
There are no random states in it: order and dropout are functions of (seed, update, process).
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from exit_codes import UserError, note, writing
from model_card import CARD, RESULTS, model_card, results_of
from modeling import adapter_state_dict, load_adapter_weights
from nodes import from_main_process
from run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DEFAULTS_OF_NEWER_ARGUMENTS,
    LOCK,
    METRICS,
    OPTIMIZER,
    RUN_CONFIG,
    STATE,
    check_output_dir,
    checkpoint_folder,
    file_sha256,
    flush,
    read_run_config,
    read_state,
    sealed,
    share,
    write_json,
)

UNFINISHED, ASIDE = ".tmp", ".aside"  # endings of folders that are no checkpoints


def first_state() -> dict:
    """Return the state of a run before its first update."""
    return {
        "completed_steps": 0,  # updates
        "evaluated_steps": 0,  # how many there were when it was last evaluated
        "skipped_steps": 0,  # of the completed ones, for their loss or gradient was not finite
        "skipped_in_a_row": 0,  # the last of them
        "best_step": None,
        "best_value": None,  # lower is better
    }


def save_checkpoint(output_dir: Path, model, optimizer, state: dict) -> None:
    """Write `checkpoints/step-NNNNNN` for `state["completed_steps"]`.

    It is written beside under a temporary name, flushed to the disk and renamed: whatever stops
    the process, a folder named step-* is whole. What metrics.jsonl has of before is flushed first.

    Raises:
        UserError: the disk is full, or cannot be written for another reason.
    """
    final = checkpoint_folder(output_dir, state["completed_steps"])
    temporary = final.with_name(final.name + UNFINISHED)
    numbers, moments = _optimizer_state(model, optimizer)
    with writing(final):
        if (metrics := output_dir / METRICS).exists():
            flush(metrics)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        _save_tensors(adapter_state_dict(model), temporary / ADAPTER_WEIGHTS)
        _save_tensors(moments, temporary / OPTIMIZER)
        with writing(final):
            files = {name: file_sha256(temporary / name) for name in (ADAPTER_WEIGHTS, OPTIMIZER)}
            write_json(temporary / STATE, sealed(state | {"optimizer": numbers, "files": files}))
            for path in (*temporary.iterdir(), temporary):
                flush(path)
            replaced = final.with_name(final.name + ".old" + UNFINISHED)
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():  # after going back to an earlier checkpoint
                os.rename(final, replaced)
            os.rename(temporary, final)
            flush(final.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, its room is needed
        raise


def record_evaluation(output_dir: Path, state: dict, save_total_limit: int | None) -> None:
    """Write the outcome of an evaluation into the newest checkpoint, then remove what is too old.

    Raises:
        UserError: the file cannot be written.
    """
    newest = checkpoint_folder(output_dir, state["completed_steps"])
    with writing(newest / STATE):
        content = json.loads((newest / STATE).read_text(encoding="utf-8"))
        write_json(newest / STATE, sealed(content | state))
    rotate_checkpoints(output_dir, state["best_step"], save_total_limit)


def rotate_checkpoints(output_dir: Path, best_step: int | None, limit: int | None) -> None:
    """Remove all but the newest `limit` checkpoints and the best one."""
    for old in _checkpoints(output_dir)[: -limit if limit else 0]:
        if best_step is None or old != checkpoint_folder(output_dir, best_step):
            with writing(old):
                shutil.rmtree(old)


def find_checkpoint(args, run_config: dict) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` asks for; None to begin at the start.

    `latest` is the newest that is whole.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or the run was made with other
            settings and `--resume_anyway` is not given.
    """
    if not args.resume_from_checkpoint:
        return None
    if not Path(args.output_dir, RUN_CONFIG).is_file():
        if args.resume_from_checkpoint != "latest":
            raise UserError(args.resume_from_checkpoint, f"no run in {args.output_dir}", "omit it")
        check_output_dir(args.output_dir, own_files=(LOCK, f"{RUN_CONFIG}{UNFINISHED}"))
        note(f"no run in {args.output_dir} to resume yet; starting one")
        return None
    recorded = read_run_config(args.output_dir)
    if differences := "; ".join(_differences(recorded, run_config)):
        if not args.resume_anyway:
            raise UserError(
                args.output_dir,
                f"this run was made with other settings ({differences})",
                "give the same ones, or another --output_dir, or --resume_anyway",
            )
        note(f"going on with other settings: {differences}")
    before, now = recorded["arguments"], run_config["arguments"]
    split = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if now["lora_dropout"] and any(before[name] != now[name] for name in split):
        note("updates are split in another way now, which changes dropout; the bits will differ")
    checkpoints = _checkpoints(Path(args.output_dir))
    if args.resume_from_checkpoint != "latest":
        checkpoint = Path(args.resume_from_checkpoint)
        if checkpoint.resolve() not in [path.resolve() for path in checkpoints]:
            folder = Path(args.output_dir, "checkpoints")
            raise UserError(checkpoint, "no checkpoint of this run", f"give one of {folder}")
        read_state(checkpoint)
        return checkpoint
    for checkpoint in reversed(checkpoints):
        try:
            read_state(checkpoint)
        except UserError as error:
            where, problem, _ = error.parts
            note(f"{where}: {problem}; the checkpoint before it is used")
            continue
        note(f"resuming from {checkpoint}")
        return checkpoint
    note("resuming from the start, for there is no whole checkpoint yet")
    return None


def load_checkpoint(checkpoint: Path, model, optimizer, run_config: dict | None = None) -> dict:
    """Put a checkpoint into a fresh model and optimizer and return its state.

    Where the run's new `run_config` asks for another evaluation than before, no best is known yet.

    Raises:
        UserError: a file of it is damaged, or of another model.
    """
    content = read_state(checkpoint)
    try:
        tensors = load_file(checkpoint / OPTIMIZER)
    except SafetensorError as error:
        raise UserError(checkpoint, f"damaged checkpoint ({error})", "give another one") from None
    load_adapter_weights(model, checkpoint / ADAPTER_WEIGHTS)
    numbers = content["optimizer"]
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
    state = {name: content[name] for name in first_state()}
    if state["best_step"] not in (None, state["completed_steps"]):
        try:
            read_state(checkpoint_folder(checkpoint.parent.parent, state["best_step"]))
        except UserError as error:
            where, problem, _ = error.parts
            note(f"{where}: {problem}; it was the best, which is chosen anew from here on")
            state |= {"best_step": None, "best_value": None}
    if run_config and state["best_step"] is not None:
        recorded = read_run_config(str(checkpoint.parent.parent))
        if _evaluation(recorded) != _evaluation(run_config):
            note("with another evaluation, the best is chosen anew from here on")
            # This adapter is evaluated again: by that, the checkpoint forgets the other best too.
            evaluated = min(state["evaluated_steps"], state["completed_steps"] - 1)
            state |= {"best_step": None, "best_value": None, "evaluated_steps": evaluated}
    return state


def _evaluation(run_config: dict) -> list:
    """Return what of a run decides its figure of an adapter."""
    arguments = DEFAULTS_OF_NEWER_ARGUMENTS | run_config["arguments"]
    names = ["metric_for_best_model", "base_weights", "mixed_precision"]
    names += ["num_eval_titles"] * (arguments.get(names[0]) == "rougeL")
    validation = run_config["data"].get("validation", {}).get("sha256")
    settings = [run_config["prompt"], run_config["base_fingerprint"], validation]
    return [arguments.get(name) for name in names] + settings


def set_later_ones_aside(output_dir: Path, completed_steps: int, unfinished: bool) -> None:
    """Rename checkpoints of after the state that a run goes on from: its own will come again.

    So is the adapter of a run that is `unfinished` again.

    Raises:
        UserError: the folder cannot be written.
    """
    later_ones = [p for p in _checkpoints(output_dir) if _step(p) > completed_steps]
    if unfinished and (adapter := output_dir / ADAPTER_WEIGHTS).exists():
        later_ones.append(adapter)
    for later in later_ones:
        aside = later.with_name(later.name + ASIDE)
        with writing(aside):
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(later, aside)
        note(f"{later} was written after that; kept as {aside.name}")


def give_up(accelerator, output_dir: Path, model, optimizer, state: dict) -> None:
    """Save the state of the last update that was not skipped, and complain.

    The weights are still those; set back are the counts, so that a resumed run tries again.

    Raises:
        UserError: always.
    """
    completed = state["completed_steps"]
    good = completed - state["skipped_in_a_row"]
    from_main_process(accelerator, set_later_ones_aside, output_dir, good, True)
    advice = "lower --learning_rate, or look at these articles"
    if good:
        state = state | {
            "completed_steps": good,
            "evaluated_steps": min(good, state["evaluated_steps"]),
            "skipped_steps": state["skipped_steps"] - state["skipped_in_a_row"],
            "skipped_in_a_row": 0,
            "best_step": state["best_step"] and min(good, state["best_step"]),
        }
        from_main_process(accelerator, save_checkpoint, output_dir, model, optimizer, state)
        advice += f"; {checkpoint_folder(output_dir, good)} is as before, for --resume_anyway"
    updates = f"updates {good + 1:,} to {completed:,}"
    raise UserError(output_dir, f"the loss or gradient of {updates} is not finite", advice)


def save_what_is_left(
    output_dir: Path, model, optimizer, state: dict, first_step: int, sharded: bool
) -> str | None:
    """Save the last update, on one process, for the others may be gone; return where that leads.

    None if nothing was saved since the start, `first_step`: the same command would come no further.
    Where the optimizer is sharded, its other shards are not to be had: older checkpoints count.

    Raises:
        UserError: the folder cannot be written.
    """
    completed = state["completed_steps"]
    missing = not checkpoint_folder(output_dir, completed).exists()
    if missing and not sharded and completed > first_step:
        save_checkpoint(output_dir, model, optimizer, state)
    newest = max(map(_step, _checkpoints(output_dir)), default=0)
    return f"after update {newest:,}" if newest > first_step else None


def save_adapter(model, state: dict, peak: int | None, output_dir: Path) -> None:
    """Write the run's adapter: that of the best checkpoint, or the last where none was judged.

    Into the run's record goes `peak`, the bytes that training took; None: what is there stays.

    Raises:
        UserError: the best checkpoint is damaged, or the folder cannot be written.
    """
    if state["best_step"] not in (None, state["completed_steps"]):
        best = checkpoint_folder(output_dir, state["best_step"])
        read_state(best)
        load_adapter_weights(model, best / ADAPTER_WEIGHTS)
    run_config = read_run_config(str(output_dir))
    run_config["adapter_step"] = state["best_step"] or state["completed_steps"]
    if peak is not None:
        run_config["memory"]["measured_peak"] = peak
    # First where nothing looks for it: under its own name, the adapter is always whole.
    temporary = output_dir / f"adapter{UNFINISHED}"
    tensors = adapter_state_dict(model)
    try:
        with writing(output_dir / ADAPTER_WEIGHTS, _num_bytes(tensors)), _safetensors_errors():
            model.save_pretrained(temporary, save_embedding_layers=False)
            # PEFT keeps the names in a set, whose order differs from one process to the next.
            config = json.loads((temporary / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            config["target_modules"] = sorted(config["target_modules"])
            # And takes where the base lay for its name, in the Hub's cache of this machine.
            config["base_model_name_or_path"] = run_config["base_model"]
            write_json(temporary / ADAPTER_CONFIG, config)
            share(temporary / ADAPTER_WEIGHTS)
            for path in temporary.iterdir():
                flush(path)
            # Of the same adapter, saved again, what is known of its titles stays true.
            results = results_of(str(output_dir), file_sha256(temporary / ADAPTER_WEIGHTS))
            if results is None:
                (output_dir / RESULTS).unlink(missing_ok=True)
            (temporary / CARD).write_text(model_card(run_config, results), encoding="utf-8")
            write_json(output_dir / RUN_CONFIG, run_config)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == ADAPTER_WEIGHTS):
                os.replace(path, output_dir / path.name)  # the weights last: then all is there
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    folders = (output_dir / "checkpoints").glob("step-*")
    return sorted((p for p in folders if p.name.removeprefix("step-").isdecimal()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _differences(recorded: dict, current: dict) -> list[str]:
    """Return what would make a resumed run another run."""
    free = ("output_dir", "resume_from_checkpoint", "resume_anyway", "max_time", "report_to")
    free += ("save_total_limit", "per_device_train_batch_size", "gradient_accumulation_steps")
    free += ("push_to_hub", "ddp_timeout", "activation_checkpointing")
    # Of these, the contents are compared.
    free += ("train_file", "validation_file", "prompt_file", "model_name_or_path")
    before = DEFAULTS_OF_NEWER_ARGUMENTS | recorded["arguments"]
    before = {k: v for k, v in before.items() if k not in free}
    after = {k: v for k, v in current["arguments"].items() if k not in free}
    for key in ("base_fingerprint", "prompt", "articles_per_update"):
        before[key], after[key] = recorded[key], current[key]
    for which, record in ((before, recorded), (after, current)):
        which["data"] = {split: file["sha256"] for split, file in record["data"].items()}
    return [f"{k} {before.get(k)!r}, now {v!r}" for k, v in after.items() if before.get(k) != v]


def _trainable(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _optimizer_state(model, optimizer) -> tuple[dict, dict]:
    """Return AdamW's step counts and moments by parameter name (its own state goes by position)."""
    tensors, numbers = {}, {}
    for name, parameter in _trainable(model):
        state = optimizer.state[parameter]
        if not state:  # every update so far was skipped
            continue
        numbers[name] = state["step"]
        tensors |= {f"{name}.{key}": state[key] for key in ("state1", "state2")}
    return numbers, tensors


def _save_tensors(tensors: dict, file: Path) -> None:
    with writing(file, _num_bytes(tensors)), _safetensors_errors():
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
        share(file)


def _num_bytes(tensors: dict) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@contextmanager
def _safetensors_errors():
    """The library has an exception of its own for what the system says."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from None
