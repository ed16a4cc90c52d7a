"""scripts/hub.py: what is pushed, how, and what is refused before anything is computed.

The Hub is a stand-in that remembers what it is told. python -m pytest tests/test_hub.py
"""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import call, train_args

import merge
import train
from exit_codes import UserError
from hub import check_hub, push
from model_card import model_card
from run_folder import read_run_config


@pytest.fixture
def hub(monkeypatch):
    """A Hub that is reached: `commits` by repository, each a dictionary of files."""
    state = SimpleNamespace(commits=[], created=[], private=True, fails=None)

    class Api:
        def create_repo(self, repo_id, **options):
            if state.fails:
                raise state.fails
            state.created.append((repo_id, options))
            return SimpleNamespace(repo_id=repo_id, __str__=lambda _: repo_id)

        def repo_info(self, repo_id):
            return SimpleNamespace(private=state.private)

        def create_commit(self, repo_id, operations, commit_message):
            files = {}
            for operation in operations:
                with operation.as_file() as stream:
                    files[operation.path_in_repo] = stream.read()
            state.commits.append((repo_id, files))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    return state


@pytest.fixture
def run_dir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/trackers").mkdir()
    for name in ("trackers/events", ".lock", "report.html", "x.tmp", "x.aside"):
        (tmp_path / "run" / name).write_text("not for the Hub")
    (tmp_path / "run/link").symlink_to("/etc/passwd")
    return tmp_path / "run"


def test_a_run_is_pushed_whole_and_private(hub, run_dir, capsys):
    push(str(run_dir), "owner/titles")
    assert hub.created == [("owner/titles", {"private": True, "exist_ok": True})]
    [(name, files)] = hub.commits
    assert name == "owner/titles"
    assert files.keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "run_config.json",
        *(path.name for path in run_dir.iterdir() if path.name.startswith("tokenizer")),
        *(path.name for path in run_dir.glob("*.jinja")),
    }
    weights = (run_dir / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == weights
    card = files["README.md"].decode()
    assert card == model_card(read_run_config(str(run_dir)), None, "owner/titles")
    assert "model='owner/titles', max_new_tokens=24, " in card
    assert "base_model" not in card.split("---")[1]  # it is a folder of this machine
    assert "hf_secret" not in str(files)
    assert "/etc/passwd" not in str(files)
    assert "pushed to" in capsys.readouterr().out


def test_a_card_with_results_is_pushed_under_the_models_name(hub, run_dir, monkeypatch):
    results = {"of": "this adapter"}
    monkeypatch.setattr("hub.results_of", lambda folder: results)
    monkeypatch.setattr("hub.model_card", lambda *arguments: f"card of {arguments[1:]}")
    for found in (None, results):
        (run_dir / "README.md").write_text(f"card of {(found,)}")
        push(str(run_dir), "owner/titles")
        expected = f"card of {(found, 'owner/titles')}"
        assert hub.commits.pop()[1]["README.md"].decode() == expected


def test_an_edited_card_is_pushed_as_it_is(hub, run_dir):
    (run_dir / "README.md").write_text("By hand.")
    push(str(run_dir), "owner/titles")
    assert hub.commits[0][1]["README.md"] == b"By hand."


def test_a_model_that_everybody_sees_is_told(hub, run_dir, capsys):
    hub.private = False
    push(str(run_dir), "owner/titles")
    assert "NOTE: owner/titles was there before, and everybody sees it" in capsys.readouterr().out


def test_a_push_that_fails_says_what_to_do(hub, run_dir):
    hub.fails = OSError("403 Forbidden\nand more")
    with pytest.raises(UserError, match=r"not pushed \(403 Forbidden\); .* is whole: run the same"):
        push(str(run_dir), "owner/titles")


def test_train_and_merge_push_at_their_end_and_only_if_asked(hub, tiny_model, news, tmp_path):
    run_dir, merged = tmp_path / "run", tmp_path / "merged"
    train_options = train_args(tiny_model, news, run_dir, "--max_train_steps", "1")
    call(train.main, *train_options)
    assert hub.commits == []
    # It is no other run for that; nothing is trained again.
    more = ("--resume_from_checkpoint", "latest", "--push_to_hub", "me/adapter")
    call(train.main, *train_options, *more)
    merge_options = ["--run_dir", run_dir, "--output_dir", merged, "--check_rows", 0]
    call(merge.main, *merge_options)
    assert [name for name, _ in hub.commits] == ["me/adapter"]
    call(merge.main, *merge_options, "--push_to_hub", "me/merged")  # it is there already
    merge_options[3] = tmp_path / "again"
    call(merge.main, *merge_options, "--push_to_hub", "me/fresh")
    assert [name for name, _ in hub.commits] == ["me/adapter", "me/merged", "me/fresh"]
    for _, files in hub.commits[1:]:
        assert "model.safetensors" in files
        assert json.loads(files["run_config.json"])["kind"] == "merged"


@pytest.mark.parametrize(
    ("name", "setting", "complaint"),
    [
        ("a/b/c", {}, "no name of a model on the Hub; give OWNER/NAME"),
        ("../x", {}, "no name of a model on the Hub; give OWNER/NAME"),
        ("me/x", {"constants.HF_HUB_OFFLINE": True}, "HF_HUB_OFFLINE is set; unset it, or leave"),
        (
            "me/x",
            {"get_token": lambda: None},
            "no token for the Hub; set HF_TOKEN, or run: hf auth",
        ),
    ],
)
def test_what_cannot_be_pushed_is_refused_at_once(hub, monkeypatch, name, setting, complaint):
    for where, value in setting.items():
        monkeypatch.setattr(f"huggingface_hub.{where}", value)
    with pytest.raises(UserError) as error:
        check_hub(name)
    assert str(error.value).startswith(f"--push_to_hub {name}: {complaint}")
    check_hub(None)


def test_both_scripts_ask_before_anything_is_made(hub, tiny_model, news, tmp_path):
    name = ("--push_to_hub", "a/b/c")
    with pytest.raises(UserError, match="--push_to_hub a/b/c: no name of a model on the Hub"):
        call(train.main, *train_args(tiny_model, news, tmp_path / "run", *name))
    with pytest.raises(UserError, match="--push_to_hub a/b/c: no name of a model on the Hub"):
        call(merge.main, "--run_dir", tmp_path / "none", "--output_dir", tmp_path / "m", *name)
    assert list(tmp_path.iterdir()) == []


def test_no_token_is_an_argument(capsys):
    required = {train: ["--model_name_or_path=m", "--train_file=t"], merge: ["--run_dir=r"]}
    for script, options in required.items():
        options = [*options, "--output_dir=o"]
        script.parse_args(options)
        with pytest.raises(SystemExit):
            script.parse_args([*options, "--hub_token", "hf_secret"])
        expected = "error: unrecognized arguments: --hub_token hf_secret\n"
        assert capsys.readouterr().err.endswith(expected)
