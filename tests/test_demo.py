"""The first thing a new user runs, whole. Run: python -m pytest tests/test_demo.py

`bash run_train.sh && bash run_infer.sh` as they stand, on the demo at its full size (a few minutes
on 2 cores), written elsewhere and without installing anything.
"""

import json
import os
import subprocess

import numpy
import pytest
from conftest import ROOT, read_csv

from intervals import Bootstrap
from title_figures import measure


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    places = {"DEMO": "demo", "RUN_DIR": "run", "OUTPUT_DIR": "out"}
    env = os.environ | {name: str(folder / path) for name, path in places.items()}
    # Beside other workers, its share of the cores: threads that find none free keep each other
    # waiting, and those that spin while they wait take the cores from the tests beside.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1)
    env |= {"SETUP": "0", "OMP_NUM_THREADS": str(max(1, os.cpu_count() // workers))}
    env |= {"OMP_WAIT_POLICY": "passive"}
    for launcher in ("run_train.sh", "run_infer.sh"):
        result = subprocess.run(
            ["bash", str(ROOT / launcher)], env=env, cwd=folder, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


def test_the_table_tells_the_reports_story(demo):
    folder, printed = demo
    scores = json.loads((folder / "out/scores.json").read_text())["predictions"]
    rouge = {name: system["rouge"]["default"]["rougeL"] for name, system in scores.items()}
    print(rouge)
    assert rouge["adapter"] >= 2 * rouge["untuned"]
    assert rouge["adapter"] > 0.4
    assert abs(rouge["merged"] - rouge["adapter"]) <= 0.01
    # Merging rounds to bf16, by which a title may take another turn, for better or worse. That is
    # chance, and no more; nor are logits far apart.
    merge_check = json.loads((folder / "out/merged/run_config.json").read_text())["merge_check"]
    assert merge_check["relative_difference"] < 0.03

    def titles(file):
        return [row["titles"] for row in read_csv(folder / file)]

    systems = {name: titles(f"out/{name}.csv") for name in ("adapter", "merged")}
    assert sum(a == b for a, b in zip(*systems.values(), strict=True)) >= 375
    figures, _, _ = measure(titles("demo/test_titles.csv"), systems, {})
    by_row = [figures[name].rouge["default"]["rougeL"] for name in systems]
    assert Bootstrap(numpy.stack(by_row)).compare(0, 1)["p"] > 0.01
    for name, value in rouge.items():
        assert any(
            line.startswith(name) and f"{value:.4f}" in line for line in printed.splitlines()
        )


def test_both_launchers_leave_a_report(demo):
    folder, printed = demo
    assert printed.splitlines()[-1] == f"report: {folder / 'out/report.html'}"
    assert (
        "<h1>Titles for 500 articles, by 6 systems</h1>" in (folder / "out/report.html").read_text()
    )
    assert "<h1>Training of run</h1>" in (folder / "run/report.html").read_text()
    scores = json.loads((folder / "out/scores.json").read_text())["predictions"]
    for name, place in (("adapter", "run"), ("merged", "out/merged")):
        card = (folder / place / "README.md").read_text()
        low, high = scores[name]["intervals"]["default"]["rougeL"]
        assert f"({low:.4f} to {high:.4f}) |" in card


def test_each_system_has_titled_every_held_out_article(demo):
    folder, _ = demo
    ids = [row["ID"] for row in read_csv(folder / "demo/test.csv")]
    for name in ("untuned", "adapter", "merged"):
        assert [row["ID"] for row in read_csv(folder / f"out/{name}.csv")] == ids
    # Held out: no article is in two splits. (A title may be: two strikes may have one headline.)
    trained_on = {row["text"] for row in read_csv(folder / "demo/train.csv")}
    assert len(trained_on) == 2000
    assert not trained_on & {row["text"] for row in read_csv(folder / "demo/test.csv")}


def test_running_again_does_nothing_over(demo):
    folder, _ = demo
    env = os.environ | {"SETUP": "0", "DEMO": str(folder / "demo"), "RUN_DIR": str(folder / "run")}
    adapter = folder / "run/adapter_model.safetensors"
    before = adapter.read_bytes()
    again = subprocess.run(
        ["bash", str(ROOT / "run_train.sh")], env=env, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "the demo is there already" in again.stdout
    assert "resuming from" in again.stdout
    assert "loss" not in again.stderr  # as the progress bar has it after each update
    assert adapter.read_bytes() == before
