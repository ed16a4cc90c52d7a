"""checkpoints.py: whole or not there. Run: python -m pytest tests/test_checkpoints.py"""

import argparse
import copy
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call, train_args
from safetensors.torch import load_file, save_file
from test_run_folder import RECORD, refusal

import checkpoints
import train
from checkpoints import find_checkpoint
from exit_codes import UserError
from modeling import load_adapter_weights
from run_folder import RUN_CONFIG, write_json

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


def names(output_dir):
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def update(model, optimizer):
    ids = torch.arange(5, 40).reshape(1, -1)
    model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


STATE = checkpoints.first_state() | {"completed_steps": 7, "evaluated_steps": 3}


def save(output_dir, model, optimizer, state=STATE):
    checkpoints.save_checkpoint(output_dir, model, optimizer, state)
    return checkpoints.checkpoint_folder(output_dir, state["completed_steps"])


def test_what_was_saved_goes_on_with_the_same_bits(parts, tmp_path):
    model, optimizer, make = parts
    saved = save(tmp_path, model, optimizer)
    assert saved == tmp_path / "checkpoints/step-000007"
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
    saved = save(tmp_path, model, optimizer)
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
        save(tmp_path, model, optimizer)
    assert names(tmp_path) == ["step-000007.tmp"]
    monkeypatch.undo()
    save(tmp_path, model, optimizer)  # over what was left
    assert names(tmp_path) == ["step-000007"]


def test_a_checkpoint_is_replaced_only_by_a_whole_one(parts, tmp_path, monkeypatch):
    """After going back to an earlier one, later steps are written once more."""
    model, optimizer, _ = parts
    saved = save(tmp_path, model, optimizer)
    before = (saved / "adapter_model.safetensors").read_bytes()

    def die(*_, **__):
        raise OSError("disk full")

    update(model, optimizer)
    monkeypatch.setattr(checkpoints, "save_file", die)
    with pytest.raises(UserError, match="disk full"):
        save(tmp_path, model, optimizer)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    monkeypatch.undo()
    save(tmp_path, model, optimizer)
    assert (saved / "adapter_model.safetensors").read_bytes() != before
    assert names(tmp_path) == ["step-000007"]


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
    saved = save(tmp_path, model, optimizer)
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged checkpoint"):
        checkpoints.load_checkpoint(saved, *make())


def test_a_checkpoint_under_the_name_of_another_is_refused(parts, tmp_path):
    model, optimizer, make = parts
    saved = save(tmp_path, model, optimizer)
    renamed = saved.rename(saved.with_name("step-000009"))
    with pytest.raises(UserError, match=r"state.json is that of update 7"):
        checkpoints.load_checkpoint(renamed, *make())


def test_an_adapter_of_another_shape_is_refused(parts, tmp_path):
    model, optimizer, make = parts
    saved = save(tmp_path, model, optimizer)
    tensors = load_file(saved / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"does not fit this base at {name}"):
        load_adapter_weights(make()[0], saved / "adapter_model.safetensors")


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for name in ("000001", "000002", "000003", "000004", "000005", "1000000", "000009.tmp"):
        (tmp_path / f"checkpoints/step-{name}").mkdir(parents=True)
    checkpoints.rotate_checkpoints(tmp_path, best_step=2, limit=None)
    assert len(names(tmp_path)) == 7
    checkpoints.rotate_checkpoints(tmp_path, best_step=2, limit=2)
    assert names(tmp_path) == ["step-000002", "step-000005", "step-000009.tmp", "step-1000000"]
    checkpoints.rotate_checkpoints(tmp_path, best_step=None, limit=1)
    assert names(tmp_path) == ["step-000009.tmp", "step-1000000"]


def test_state_is_readable_by_a_person(parts, tmp_path):
    model, optimizer, _ = parts
    saved = save(tmp_path, model, optimizer)
    state = json.loads((saved / "state.json").read_text())
    assert {key: state[key] for key in STATE} == STATE
    assert set(state["optimizer"].values()) == {1}  # updates, by parameter


# ---------------------------------------------------------------------- resuming


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    for name in ("step-000002", "step-000010", "step-000003", "step-000011.tmp"):
        checkpoint = folder / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        files = {}
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            (checkpoint / file).write_text(f"{file} of {name}")
            files[file] = checkpoints.file_sha256(checkpoint / file)
        state = checkpoints.first_state() | {"files": files, "optimizer": {}}
        state["completed_steps"] = int(name[5:11])
        write_json(checkpoint / "state.json", checkpoints.sealed(state))
    write_json(folder / RUN_CONFIG, RECORD)
    return folder


def find(run_dir, which, record=RECORD, resume_anyway=False):
    args = argparse.Namespace(output_dir=str(run_dir), resume_from_checkpoint=which)
    args.resume_anyway = resume_anyway
    return find_checkpoint(args, record)


def test_the_checkpoint_asked_for_is_found(run_dir, capsys, monkeypatch):
    folder = run_dir / "checkpoints"
    assert find(run_dir, None) is None
    assert capsys.readouterr().out == ""
    assert find(run_dir, "latest") == folder / "step-000010"
    assert capsys.readouterr().out == f"NOTE: resuming from {folder / 'step-000010'}\n"
    assert find(run_dir, str(folder / "step-000002")) == folder / "step-000002"
    monkeypatch.chdir(run_dir)
    assert find(run_dir, "checkpoints/step-000002") == Path("checkpoints/step-000002")


def test_latest_begins_at_the_start_where_there_is_nothing_yet(run_dir, tmp_path, capsys):
    shutil.rmtree(run_dir / "checkpoints")
    assert find(run_dir, "latest") is None
    assert capsys.readouterr().out == (
        "NOTE: resuming from the start, for there is no whole checkpoint yet\n"
    )
    killed_early = tmp_path / "killed"
    killed_early.mkdir()
    (killed_early / f"{RUN_CONFIG}.tmp").touch()
    for folder in (tmp_path / "new", killed_early):
        assert find(folder, "latest") is None
        assert capsys.readouterr().out == f"NOTE: no run in {folder} to resume yet; starting one\n"


def test_latest_does_not_begin_in_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert refusal(find, tmp_path, "latest") == (
        f"{tmp_path}: the folder is not empty (it holds thesis.tex); remove it or give another "
        "--output_dir"
    )


def test_complaints_about_a_checkpoint(run_dir, tmp_path):
    folder = run_dir / "checkpoints"
    elsewhere = tmp_path / "step-000002"
    elsewhere.mkdir()
    for which in (folder / "step-000009", elsewhere, folder, run_dir):
        assert refusal(find, run_dir, str(which)) == (
            f"{which}: no checkpoint of this run; give one of {folder}"
        )
    which = str(folder / "step-000002")
    assert (
        refusal(find, tmp_path / "new", which) == f"{which}: no run in {tmp_path / 'new'}; omit it"
    )


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"arguments": {"lora_r": 8}}, "lora_r 4, now 8"),
        ({"arguments": {"new_option": 1}}, "new_option None, now 1"),
        ({"base_fingerprint": "f"}, "base_fingerprint '0123456789abcdef', now 'f'"),
        ({"articles_per_update": 16}, "articles_per_update 8, now 16"),
        (
            {"prompt": {"template": "x {article}"}},
            "prompt {'template': '{article}', 'ids_sha256': 'a'}, now {'template': 'x {article}', "
            "'ids_sha256': 'a'}",
        ),
        (
            {"data": {"train": {"path": "train.csv", "sha256": "c"}}},
            "data {'train': 'b'}, now {'train': 'c'}",
        ),
    ],
)
def test_a_run_with_other_settings_is_resumed_only_anyway(run_dir, change, difference, capsys):
    record = copy.deepcopy(RECORD)
    for key, value in change.items():
        record[key] = record[key] | value if isinstance(value, dict) else value
    for which in ("latest", str(run_dir / "checkpoints/step-000002")):
        with pytest.raises(UserError) as error:
            find(run_dir, which, record)
        assert str(error.value) == (
            f"{run_dir}: this run was made with other settings ({difference}); give the same ones, "
            "or another --output_dir, or --resume_anyway"
        )
        capsys.readouterr()
        assert find(run_dir, which, record, resume_anyway=True) is not None
        assert f"NOTE: going on with other settings: {difference}\n" in capsys.readouterr().out


def test_all_differences_are_told_and_what_changes_no_result_is_free(run_dir):
    record = copy.deepcopy(RECORD)
    record["base_model"], record["commit"] = "elsewhere/model", "f00"
    record["arguments"] |= {"per_device_train_batch_size": 8, "train_file": "/data/train.csv"}
    record["arguments"] |= {"output_dir": "other", "gradient_accumulation_steps": 1}
    record["arguments"] |= {"activation_checkpointing": "full"}  # as after a full memory
    record["data"]["train"]["path"] = "/data/train.csv"
    assert find(run_dir, "latest", record) == run_dir / "checkpoints/step-000010"
    record["arguments"] |= {"lora_r": 8, "learning_rate": 0.02}
    assert "(lora_r 4, now 8; learning_rate 0.01, now 0.02)" in refusal(
        find, run_dir, "latest", record
    )


def tear(file):
    file.write_bytes(file.read_bytes()[:-3])


def change(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a torn adapter": (
        "adapter_model.safetensors",
        tear,
        "adapter_model.safetensors is torn or was changed",
    ),
    "a changed optimizer": (
        "optimizer.safetensors",
        change,
        "optimizer.safetensors is torn or was changed",
    ),
    "no optimizer": (
        "optimizer.safetensors",
        Path.unlink,
        "optimizer.safetensors: No such file or directory",
    ),
    "a changed number": (
        "state.json",
        lambda file: file.write_text(
            file.read_text().replace('completed_steps": 10', 'completed_steps": 1')
        ),
        "state.json was changed",
    ),
    "no object": (
        "state.json",
        lambda file: file.write_text("[]"),
        "state.json was changed",
    ),
    "a torn state": (
        "state.json",
        lambda file: file.write_text('{"a": '),
        "Expecting value: line 1 column 7 (char 6)",
    ),
    "no state": ("state.json", Path.unlink, "state.json: No such file or directory"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(run_dir, what, capsys):
    name, damage, problem = DAMAGES[what]
    newest = run_dir / "checkpoints/step-000010"
    damage(newest / name)
    assert find(run_dir, "latest") == run_dir / "checkpoints/step-000003"
    assert capsys.readouterr().out == (
        f"NOTE: {newest}: damaged checkpoint ({problem}); the checkpoint before it is used\n"
        f"NOTE: resuming from {run_dir / 'checkpoints/step-000003'}\n"
    )
    assert refusal(find, run_dir, str(newest)) == (
        f"{newest}: damaged checkpoint ({problem}); give another one"
    )


def test_where_all_are_damaged_the_run_begins_again(run_dir, capsys):
    for folder in (run_dir / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    assert find(run_dir, "latest") is None
    assert capsys.readouterr().out.endswith(
        "NOTE: resuming from the start, for there is no whole checkpoint yet\n"
    )


def test_after_a_damaged_checkpoint_the_run_ends_with_the_same_bytes(
    trained, tiny_model, news, tmp_path, capsys
):
    """Nor does the damaged one count for --save_total_limit, which would remove the good ones."""
    run_dir = tmp_path / "run"
    args = train_args(tiny_model, news, run_dir, "--save_total_limit", "1")
    call(train.main, *args)
    shutil.copytree(run_dir / "checkpoints/step-000006", run_dir / "checkpoints/step-000009")
    tear(run_dir / "checkpoints/step-000009/optimizer.safetensors")
    shutil.copytree(
        trained / "checkpoints/step-000003", run_dir / "checkpoints/step-000003", dirs_exist_ok=True
    )
    tear(run_dir / "checkpoints/step-000006/adapter_model.safetensors")
    (run_dir / "adapter_model.safetensors").unlink()
    capsys.readouterr()
    call(train.main, *args, "--resume_from_checkpoint", "latest")
    printed = capsys.readouterr().out
    assert f"NOTE: resuming from {run_dir / 'checkpoints/step-000003'}" in printed
    assert f"{run_dir / 'checkpoints/step-000009'} was written after that; kept as" in printed
    assert names(run_dir) == ["step-000006", "step-000006.aside", "step-000009.aside"]
    assert not (run_dir / "adapter_model.safetensors.aside").exists()  # there was none
    for file in ("adapter_model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (run_dir / file).read_bytes() == (trained / file).read_bytes()


def test_a_run_that_goes_back_has_no_adapter_until_it_ends(tiny_model, news, tmp_path):
    """The one of before is not that of the settings and of the steps that the folder tells now."""
    run_dir = tmp_path / "run"
    args = train_args(tiny_model, news, run_dir, "--checkpointing_steps", "2")
    call(train.main, *args)
    before = (run_dir / "adapter_model.safetensors").read_bytes()
    back = ("--resume_from_checkpoint", run_dir / "checkpoints/step-000004")
    other = ("--resume_anyway", "--learning_rate", "0.001")
    assert call(train.main, *args, *back, *other, "--max_time", "0.0001") == 75
    assert not (run_dir / "adapter_model.safetensors").exists()
    assert (run_dir / "adapter_model.safetensors.aside").read_bytes() == before
    call(train.main, *args, *other, "--resume_from_checkpoint", "latest")
    assert (run_dir / "adapter_model.safetensors").read_bytes() != before


def test_a_damaged_best_checkpoint_is_no_longer_the_best(parts, tmp_path, capsys):
    model, optimizer, make = parts
    best = save(tmp_path, model, optimizer, STATE | {"completed_steps": 3})
    saved = save(tmp_path, model, optimizer, STATE | {"best_step": 3, "best_value": 1.5})
    state = checkpoints.load_checkpoint(saved, *make())
    assert (state["best_step"], state["best_value"]) == (3, 1.5)
    tear(best / "optimizer.safetensors")
    state = checkpoints.load_checkpoint(saved, *make())
    assert (state["best_step"], state["best_value"]) == (None, None)
    assert "it was the best, which is chosen anew from here on" in capsys.readouterr().out
    with pytest.raises(UserError, match="damaged checkpoint"):
        checkpoints.save_adapter(model, STATE | {"best_step": 3}, 1, tmp_path)


EVALUATION = {"metric_for_best_model": "loss", "base_weights": "nf4", "mixed_precision": "bf16"}
EVALUATION |= {"num_eval_titles": 32}


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ({}, {"learning_rate": 0.5}, True),
        ({}, {"num_eval_titles": 8}, True),  # a loss is of all rows
        ({"metric_for_best_model": "rougeL"}, {"num_eval_titles": 8}, False),
        ({}, {"metric_for_best_model": "rougeL"}, False),
        ({}, {"base_weights": "bf16"}, False),
        ({}, {"mixed_precision": "no"}, False),
        ({}, {"prompt": {"template": "x {article}"}}, False),
        ({}, {"base_fingerprint": "f"}, False),
        ({}, {"data": {"validation": {"sha256": "c"}}}, False),
        ({}, {"data": {"train": {"sha256": "c"}, "validation": {"sha256": "v"}}}, True),
    ],
)
def test_values_of_the_best_compare_where_they_are_of_one_evaluation(before, now, same):
    record = copy.deepcopy(RECORD)
    record["data"]["validation"] = {"sha256": "v"}
    record["arguments"] |= EVALUATION | before
    other = copy.deepcopy(record)
    for key, value in now.items():
        (other if key in other else other["arguments"])[key] = value
    assert (checkpoints._evaluation(record) == checkpoints._evaluation(other)) == same


def test_giving_up_sets_all_counts_back(parts, tmp_path, monkeypatch):
    """Or a run that goes on would not give up again, or miss an evaluation, or name a lost best."""
    model, optimizer, _ = parts
    monkeypatch.setattr(checkpoints, "from_main_process", lambda _, do, *arguments: do(*arguments))
    state = STATE | {"completed_steps": 9, "evaluated_steps": 8, "skipped_steps": 6}
    state |= {"skipped_in_a_row": 5, "best_step": 8, "best_value": 1.5}
    with pytest.raises(UserError, match="of updates 5 to 9 is not finite"):
        checkpoints.give_up(None, tmp_path, model, optimizer, state)
    assert names(tmp_path) == ["step-000004"]
    saved = json.loads((tmp_path / "checkpoints/step-000004/state.json").read_text())
    expected = {"completed_steps": 4, "evaluated_steps": 4, "skipped_steps": 1}
    expected |= {"skipped_in_a_row": 0, "best_step": 4, "best_value": 1.5}
    assert {name: saved[name] for name in state} == expected


@pytest.mark.parametrize(
    ("completed", "first_step", "sharded", "told", "newest"),
    [
        (7, 5, False, "after update 7", "step-000007"),
        (7, 3, True, "after update 5", "step-000005"),  # its other shards are gone
        (7, 5, True, None, "step-000005"),
        (5, 5, False, None, "step-000005"),
        (7, 7, False, None, "step-000005"),
    ],
)
def test_what_is_left_of_a_run_is_what_came_after_its_start(
    parts, tmp_path, completed, first_step, sharded, told, newest
):
    model, optimizer, _ = parts
    save(tmp_path, model, optimizer, STATE | {"completed_steps": 5})
    what = (model, optimizer, STATE | {"completed_steps": completed}, first_step, sharded)
    assert checkpoints.save_what_is_left(tmp_path, *what) == told
    assert names(tmp_path)[-1] == newest


@pytest.mark.parametrize(
    "name",
    [
        "max_train_steps",
        "num_train_epochs",
        "warmup_ratio",
        "cooldown_ratio",
        "seed",
        "mixed_precision",
        "lora_alpha",
        "lora_dropout",
        "max_grad_norm",
        "max_length",
        "checkpointing_steps",
        "metric_for_best_model",
    ],
)
def test_what_changes_a_result_is_not_free(run_dir, name):
    record = copy.deepcopy(RECORD)
    record["arguments"][name] = "other"
    assert f"{name} " in refusal(find, run_dir, "latest", record)


def test_every_checkpoint_of_after_is_set_aside(run_dir):
    """The very next, too: were the run stopped before it, `latest` would be one of another run."""
    (run_dir / "adapter_model.safetensors").touch()
    checkpoints.set_later_ones_aside(run_dir, 2, False)
    kept = ["step-000002", "step-000003.aside", "step-000010.aside", "step-000011.tmp"]
    assert names(run_dir) == kept
    assert (run_dir / "adapter_model.safetensors").exists()
    checkpoints.set_later_ones_aside(run_dir, 2, True)
    assert names(run_dir) == kept
    assert not (run_dir / "adapter_model.safetensors").exists()


def test_an_evaluation_is_recorded_in_the_checkpoint(parts, tmp_path):
    model, optimizer, make = parts
    saved = save(tmp_path, model, optimizer)
    outcome = {"evaluated_steps": 7, "best_step": 7, "best_value": 0.25}
    checkpoints.record_evaluation(tmp_path, STATE | outcome, None)
    assert checkpoints.load_checkpoint(saved, *make()) == STATE | outcome
    assert names(tmp_path) == ["step-000007"]
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


# ---------------------------------------------------------------------- a disk that is full


@pytest.fixture
def file_size_limit():
    """Return a function that lets no file grow beyond so many bytes; Python ignores SIGXFSZ."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_leaves_the_earlier_checkpoint(parts, tmp_path, file_size_limit, file):
    model, optimizer, _ = parts
    saved = save(tmp_path, model, optimizer)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert len(before["adapter_model.safetensors"]) < len(before["optimizer.safetensors"])
    file_size_limit(len(before[file]) - 1)
    with pytest.raises(UserError) as error:
        save(tmp_path, model, optimizer, STATE | {"completed_steps": 9})
    torn = tmp_path / "checkpoints/step-000009.tmp" / file
    needed = sum(tensor.nbytes for tensor in load_file(saved / file).values())
    pattern = (
        f"{torn}: cannot be written (Error while serializing: I/O error: File too large (os error "
        f"27): {needed:,} bytes needed, "
    )
    assert str(error.value).startswith(pattern)
    assert str(error.value).endswith(" free); mend that and run the same command again")
    assert names(tmp_path) == ["step-000007"]  # the torn one has made room
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_disk_that_fills_up_later_leaves_it_too(parts, tmp_path, monkeypatch):
    model, optimizer, _ = parts
    save(tmp_path, model, optimizer)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_json", "flush"):
        monkeypatch.setattr(checkpoints, name, full)
        with pytest.raises(UserError) as error:
            save(tmp_path, model, optimizer, STATE | {"completed_steps": 9})
        assert str(error.value) == (
            f"{tmp_path / 'checkpoints/step-000009'}: cannot be written (No space left on device); "
            "mend that and run the same command again"
        )
        assert names(tmp_path) == ["step-000007"]
        monkeypatch.undo()


def test_an_adapter_is_whole_or_not_there(parts, tmp_path, file_size_limit):
    model, _, _ = parts
    names = ("lora_r", "lora_alpha", "lora_dropout", "learning_rate", "warmup_ratio")
    names += ("max_grad_norm", "num_train_epochs", "max_length", "seed")
    write_json(tmp_path / RUN_CONFIG, RECORD | {"arguments": dict.fromkeys(names, 1), "memory": {}})
    file_size_limit(20_000)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: cannot be written \(.*bytes"):
        checkpoints.save_adapter(model, STATE, 1, tmp_path)
    file_size_limit(-1)
    assert [path.name for path in tmp_path.iterdir()] == [RUN_CONFIG]
    checkpoints.save_adapter(model, STATE, 1, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        RUN_CONFIG,
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
