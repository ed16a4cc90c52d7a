"""scripts/model_card.py: what the Hub is shown of a model, and how to load it.

python -m pytest tests/test_model_card.py
"""

import ast
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import call, read_csv, train_args
from test_run_folder import RECORD

import infer
import merge
import score
import train
from exit_codes import UserError, printable
from model_card import model_card, own_system, results_of
from run_folder import read_run_config

FIGURES = {
    "rouge": {"default": {"rouge1": 0.3, "rouge2": 0.1, "rougeL": 0.21684, "rougeLsum": 0.2}},
    "intervals": {"default": {"rouge1": [0.2, 0.4], "rouge2": [0, 0.2], "rougeL": [0.2, 0.23]}},
}
RESULTS = FIGURES | {
    "references": {"path": "data/valid.csv"},
    "rows": 50,
    "words": {"mean": 30.25},
    "language": {"french": 0.9},
    "flags": {"looping": 5, "cut": None, "repeated": 0, "numbers": 1, "names": 2, "quotations": 0},
    "baselines": {"lead1": FIGURES},
}


def test_the_card_tells_the_run():
    names = ("lora_alpha", "lora_dropout", "warmup_ratio", "max_grad_norm")
    names += ("num_train_epochs", "max_length", "seed")
    record = copy.deepcopy(RECORD) | {"adapter_step": 17}
    record["arguments"] |= {name: f"value of {name}" for name in names}
    card = model_card(record)
    assert card.startswith("---\nbase_model: model\nlanguage: fr\nlibrary_name: peft\n")
    assert "## Results" not in card
    for text in ("0123456789abcdef", "```\n{article}\n```", "- train: 8 rows", "After update 17;"):
        assert text in card
    for name in names:
        assert f"| {name} | value of {name} |" in card
    assert "library_name: transformers" in model_card(record | {"kind": "merged"})


@pytest.mark.parametrize(
    "hostile",
    [
        "a\n---\n\n# Pwned\n",
        "a\nlicense: other\ntags: [pwned]",
        "a'\": {b: c} # d",
        "` | <script>alert(1)</script> [pwned](javascript:alert(1)) |\n| a | b |",
        "a\x1b[2J\u202e\x85b\u2028c",
        "- !!python/object/apply:os.system ['true']",
        "",
    ],
)
def test_no_value_of_a_record_gets_to_be_yaml_markdown_or_html(hostile):
    names = ("lora_alpha", "lora_dropout", "warmup_ratio", "max_grad_norm")
    names += ("num_train_epochs", "max_length", "seed")
    harmless = copy.deepcopy(RECORD) | {"adapter_step": 17}
    harmless["arguments"] |= dict.fromkeys(names, 1)
    record = copy.deepcopy(harmless)
    record["arguments"] |= dict.fromkeys(record["arguments"], hostile)
    record |= {"base_model": hostile, "base_fingerprint": hostile, "adapter_step": hostile}
    record |= {"articles_per_update": hostile, "data": {hostile: {"rows": 8}}}
    record["prompt"] = {"template": f"{{article}}\n```\n# Pwned\n````\n{hostile}"}
    card, expected = model_card(record), model_card(harmless)

    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front).keys() == yaml.safe_load(expected.split("---\n", 2)[1]).keys()
    assert yaml.safe_load(front)["base_model"] == printable(hostile)
    start, between, prompt, after = body.split("`````\n")  # a longer fence than the template's
    assert prompt == record["prompt"]["template"] + "\n"
    before, code = start.split("`````python\n")
    statements = ast.parse(code).body
    assert len(statements) == len(code.splitlines()) == 5
    assert ast.literal_eval(statements[1].value) == record["prompt"]["template"]
    plain_start, *plain = expected.split("---\n", 2)[2].split("```\n")
    pairs = (before, plain_start.split("```python\n")[0]), (between, plain[0]), (after, plain[2])
    for found, wanted in pairs:
        assert found.count("\n") == wanted.count("\n")
        assert found.count("|") == wanted.count("|")
        outside = "".join(found.split("`")[::2])  # of code spans, where nothing is Markdown
        assert "<" not in outside
        assert "](" not in outside
        assert found.count("`") % 2 == 0
        headings = [line for line in wanted.splitlines() if line.startswith("#")]
        assert [line for line in found.splitlines() if line.startswith("#")] == headings


@pytest.fixture
def record():
    names = ("lora_alpha", "warmup_ratio", "max_grad_norm", "num_train_epochs", "max_length")
    made = copy.deepcopy(RECORD) | {"adapter_step": 17}
    made["arguments"] |= dict.fromkeys((*names, "seed"), 1)
    return made


def test_results_are_metadata_and_a_table(record):
    from huggingface_hub import ModelCard

    card = model_card(record, RESULTS, "owner/titles")
    data = ModelCard(card).data
    assert data.model_name == "owner/titles"
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found == {"ROUGE-L F": 0.2168, "ROUGE-1 F": 0.3, "ROUGE-2 F": 0.1}
    assert {result.dataset_name for result in data.eval_results} == {"valid.csv (50 rows)"}
    figures = "0.3000 (0.2000 to 0.4000) | 0.1000 (0.0000 to 0.2000) | 0.2168 (0.2000 to 0.2300) |"
    assert f"| this model | {figures}\n| lead1 | {figures}\n" in card
    assert (
        "30.2 words on average, 90.0% in French, 10.0% in a loop, 0.0% said twice, 2.0% with"
        in card
    )
    assert "cut by the limit" not in card  # it is not known
    assert "model='owner/titles'" in card


@pytest.mark.parametrize(
    ("base", "named"), [("owner/base", "owner/base"), ("/models/base", None), ("base", None)]
)
def test_on_the_hub_a_base_is_named_only_if_it_is_there(record, base, named):
    from huggingface_hub import ModelCard

    record["base_model"] = base
    assert ModelCard(model_card(record, None, "owner/titles")).data.base_model == named
    assert ModelCard(model_card(record)).data.base_model == base  # as long as it lies here


def test_the_data_is_named_only_if_the_hub_has_it(record):
    from huggingface_hub import ModelCard

    assert ModelCard(model_card(record)).data.datasets is None
    record["data"]["train"]["path"] = "data/train.csv"
    assert ModelCard(model_card(record)).data.datasets is None
    record["data"]["train"]["path"] = "owner/news:train"
    assert ModelCard(model_card(record)).data.datasets == ["owner/news"]


# --- Scores in the folder, and the lines that load it ---------------------------------------------


@pytest.fixture(scope="module")
def scored(trained, tmp_path_factory, news):
    """Folders of a run and of its merged model, with the scores of their own titles."""
    folder = tmp_path_factory.mktemp("scored")
    run_dir, merged = folder / "run", folder / "merged"
    shutil.copytree(trained, run_dir)
    call(merge.main, "--run_dir", run_dir, "--output_dir", merged, "--check_rows", 0)
    for name, place in (("adapter", run_dir), ("merged", merged)):
        output = folder / f"{name}.csv"
        call(
            infer.main,
            *("--run_dir", place, "--input_file", news / "validation.csv", "--output_file", output),
        )
    score_again(folder, news)
    return folder


def score_again(folder, news, *more):
    call(
        score.main,
        *("--references", news / "validation.csv", "--baselines", "lead1", "--output_dir", folder),
        *("--predictions", f"other={news / 'validation.csv'}", folder / "merged.csv"),
        *(folder / "adapter.csv", "--runs", folder / "run", folder / "merged", *more),
    )


def test_each_folder_gets_the_scores_of_its_own_titles(scored):
    scores = json.loads((scored / "scores.json").read_text(encoding="utf-8"))
    for name, folder in (("adapter", scored / "run"), ("merged", scored / "merged")):
        results = results_of(str(folder))
        assert results["rouge"] == scores["predictions"][name]["rouge"]
        assert results["baselines"].keys() == {"lead1"}
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert card == model_card(read_run_config(str(folder)), results)
        assert f"{results['rouge']['default']['rougeL']:.4f}" in card
    assert "library_name: transformers" in card


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_cards_five_lines_load_the_model(scored, news, tmp_path, kind):
    folder = scored / ("run" if kind == "adapter" else kind)
    card = (folder / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"^```python\n(.*?)^```$", card, re.M | re.S)[1]
    assert len(lines.splitlines()) == 5
    # Then more articles, by what the lines have made.
    rows = read_csv(news / "validation.csv")
    more = f"""
import json
for article in {[row["text"] for row in rows]!r}:
    prompts = prompt.replace("{{article}}", article)
    print(json.dumps(write(prompts, return_full_text=False)[0]["generated_text"]))
print(json.dumps(any("lora_B" in name for name, _ in write.model.named_parameters())))
"""
    done = subprocess.run(
        [sys.executable, "-c", lines + more], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *written, lora = done.stdout.splitlines()[-len(rows) - 1 :]
    assert json.loads(lora) == (kind == "adapter")
    output = tmp_path / "titles.csv"
    call(
        infer.main,
        *("--run_dir", folder, "--base_weights", "bf16", "--output_file", output),
        *("--input_file", news / "validation.csv"),
    )
    details = output.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()[1:]
    raw = [json.loads(line)["raw"] for line in details]
    same = sum(a == json.loads(b) for a, b in zip(raw, written, strict=True))
    assert same >= len(rows) - 2  # the border to the article may be tokenized in another way


def test_an_edited_card_stays(scored, news, capsys):
    card = scored / "merged/README.md"
    before = card.read_text(encoding="utf-8")
    card.write_text(before + "By hand.\n", encoding="utf-8")
    (scored / "merged/results.json").unlink()
    score_again(scored, news)
    assert card.read_text(encoding="utf-8") == before + "By hand.\n"
    assert (
        f"NOTE: {card} was edited, and stays as it is; the results are in"
        in capsys.readouterr().out
    )
    assert results_of(str(scored / "merged")) is not None
    card.write_text(before, encoding="utf-8")
    score_again(scored, news, "--baselines", "first3")
    assert "| first3 |" in card.read_text(encoding="utf-8")


def test_results_stay_as_long_as_the_adapter_does(scored, tiny_model, news, tmp_path):
    shutil.copytree(scored / "run", tmp_path / "run")
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    again = train_args(tiny_model, news, tmp_path / "run", "--resume_from_checkpoint", "latest")
    call(train.main, *again)  # there is nothing left to do
    assert (tmp_path / "run/README.md").read_text(encoding="utf-8") == card
    results = results_of(str(tmp_path / "run"))
    assert results is not None
    for wrong in ({"of": "another"}, {"rouge": {}}, {"rows": "many"}):
        (tmp_path / "run/results.json").write_text(json.dumps(results | wrong))
        call(train.main, *again)
        written = (tmp_path / "run/README.md").read_text(encoding="utf-8")
        assert written == model_card(read_run_config(str(tmp_path / "run")))
        assert not (tmp_path / "run/results.json").exists()


def test_titles_of_no_adapter_are_not_those_of_a_folder_without_one():
    untuned = {"untuned": {"record": {"adapter_sha256": None}}}
    assert own_system(None, {"kind": "adapter"}, untuned) is None


def test_titles_of_another_adapter_are_nobodys_results(scored, trained, tmp_path):
    for name in ("run", "merged"):
        shutil.copytree(scored / name, tmp_path / name)
    weights = tmp_path / "run/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    card = model_card(read_run_config(str(tmp_path / "run")))
    (tmp_path / "run/README.md").write_text(card, encoding="utf-8")
    (tmp_path / "run/results.json").unlink()
    for file in ("adapter.csv", "adapter.jsonl", "merged.csv", "merged.jsonl"):
        shutil.copy(scored / file, tmp_path)
    score_again(tmp_path, Path(read_run_config(str(trained))["data"]["train"]["path"]).parent)
    assert (tmp_path / "run/README.md").read_text(encoding="utf-8") == card
    assert not (tmp_path / "run/results.json").exists()


def test_a_record_that_no_card_can_be_made_of_is_refused(scored, news, tmp_path):
    for name in ("run", "merged"):
        shutil.copytree(scored / name, tmp_path / name)
    for file in ("adapter.csv", "adapter.jsonl", "merged.csv", "merged.jsonl"):
        shutil.copy(scored / file, tmp_path)
    config = read_run_config(str(tmp_path / "run"))
    del config["arguments"]["seed"]
    (tmp_path / "run/run_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no card can be made of it \(KeyError\('seed'\)\)"):
        score_again(tmp_path, news)
