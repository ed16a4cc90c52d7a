"""Tell how good titles become with the articles that a run has seen: ROUGE-L at each checkpoint.

    python tests/benchmarks/learning_curve.py --run_dir runs/titles --validation_file V.csv \\
        --validation_rows 200 --output_dir runs/titles-curve -- --max_batch_tokens 8192

`infer.py` writes titles of so many evenly spaced articles with the untuned base and with each
checkpoint, through `accelerate launch`; `score.py` scores them all. The run may have ended, been
stopped, or still be going on. The same command again goes on where it was, with the checkpoints
that there are then. What follows `--` goes to infer.py. The record (figures, times, versions) is
`record.json` in the output folder; articles and titles stay out of it.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from real_data import ROOT, SCRIPTS, machine, timed

sys.path.append(str(SCRIPTS))

from articles import Columns, check_articles, evenly_spaced, open_articles
from exit_codes import UserError, run
from run_folder import commit, read_metrics, read_run_config, versions

BASELINES = ("lead1", "first40")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run_dir", required=True, help="of train.py")
    add("--validation_file", required=True, help="articles with their titles")
    add("--validation_rows", type=int, help="so many of them, evenly spaced (default: all)")
    add("--output_dir", required=True, help="new, or of the same command before")
    add("--steps", type=int, nargs="+", help="of the checkpoints (default: all that there are)")
    add("--model_name_or_path", help="where the base lies now, if not where the run says")
    add("--config_file", default=str(ROOT / "accelerate_configs/cpu.yaml"))
    add("infer_options", nargs="*", help="after --, for infer.py")
    return parser.parse_args()


def main():
    args = parse_args()
    run_config, out = read_run_config(args.run_dir), Path(args.output_dir)
    folders = Path(args.run_dir, "checkpoints").glob("step-*")  # some may be half written
    checkpoints = {int(p.name[5:]): p for p in folders if p.name[5:].isdecimal()}
    steps = sorted(args.steps or checkpoints)
    if missing := set(steps) - checkpoints.keys():
        raise UserError(args.run_dir, f"no checkpoint of update {min(missing)}", "see --steps")
    if not steps:
        raise UserError(args.run_dir, "no checkpoint in it yet", "wait for one")
    out.mkdir(parents=True, exist_ok=True)
    names = run_config["arguments"]
    columns = Columns(text=names["text_column"], title=names["title_column"], id=None)
    rows = out / "validation.csv"
    count = take_evenly(args.validation_file, columns, args.validation_rows, rows)
    curve = [{"step": step, "articles": articles_seen(run_config, step)} for step in (0, *steps)]
    record_file = out / "record.json"
    before = json.loads(record_file.read_text()) if record_file.is_file() else {}
    record = {
        "machine": machine(),
        "command": " ".join(["python", "tests/benchmarks/learning_curve.py", *sys.argv[1:]]),
        "run": {key: run_config[key] for key in ("arguments", "versions", "commit")},
        "versions": versions(),
        "commit": commit(),
        "validation": {"path": args.validation_file, "rows": count},
        "curve": curve,
    }

    # ------------------------------------------------------------------ titles
    predictions = []
    for point in curve:
        step, file = point["step"], out / f"step-{point['step']:06d}.csv"
        model = ["--run_dir", checkpoints[step]] if step else untuned(run_config, out)
        if args.model_name_or_path:
            model += ["--model_name_or_path", args.model_name_or_path]
        there = file.exists()
        print(f"== {file.stem}", flush=True)
        output = ("--input_file", rows, "--output_file", file, *args.infer_options)
        took = timed(args.config_file, "infer.py", [*model, *output])
        told = {p["step"]: p for p in before.get("curve", [])}.get(step, {})
        # Of titles that were there already, the time that an earlier start took.
        point["infer"] = told.get("infer") if there else took
        predictions.append(f"{point['articles']}={file}")

    # ------------------------------------------------------------------ scores
    options = ["--references", rows, "--predictions", *predictions, "--baselines", *BASELINES]
    timed(args.config_file, "score.py", [*options, "--output_dir", out / "scores"])
    scores = json.loads((out / "scores/scores.json").read_text())
    metrics = read_metrics(args.run_dir)
    for point, earlier in zip(curve, [None, *curve], strict=False):
        point |= losses(metrics, earlier["step"] if earlier else 0, point["step"])
        point |= figures(scores["predictions"][str(point["articles"])])
    record["baselines"] = {name: figures(scores["predictions"][name]) for name in BASELINES}
    record["true titles"] = {"words": scores["references"]["words"]["mean"]}
    record["bootstrap"] = scores["bootstrap"]
    record_file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(table(record))


def take_evenly(source: str, columns: Columns, count: int | None, target: Path) -> int:
    """Write so many evenly spaced rows of a file, or all, as a CSV with IDs; return how many."""
    check_articles(source, columns, "validation")
    articles = open_articles(source, columns, "validation")
    chosen = evenly_spaced(len(articles), count or len(articles))
    found = articles[chosen]
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ID", "text", "titles"])
        writer.writerows(zip(chosen, found["text"], found["title"], strict=True))
    return len(chosen)


def articles_seen(run_config: dict, step: int) -> int:
    """Return how many articles a run has trained on after so many updates: the last one of each
    epoch may have fewer than the others."""
    rows, size = run_config["data"]["train"]["rows"], run_config["articles_per_update"]
    epoch, update = divmod(step, -(-rows // size))
    return epoch * rows + update * size


def untuned(run_config: dict, out: Path) -> list:
    """Return the options of infer.py for the run's base, prompted as the run is."""
    prompt, arguments = run_config["prompt"], run_config["arguments"]
    file = out / "prompt.txt"
    file.write_text(prompt["template"], encoding="utf-8")
    plain = {"bf16": "bf16", "no": "fp32"}[arguments["mixed_precision"]]
    weights = plain if arguments["base_weights"] == "bf16" else "nf4"
    options = ["--model_name_or_path", run_config["base_model"], "--prompt_file", file]
    options += ["--base_weights", weights, "--max_length", prompt["max_length"]]
    options += ["--max_new_tokens", prompt["max_title_tokens"]]
    return options + ["--apply_chat_template"] * prompt["apply_chat_template"]


def losses(metrics: list[dict], after: int, step: int) -> dict:
    """Return a run's own losses at an update, as far as it noted them: the mean of the training
    losses since the point before, by title token, and the loss of its own validation file."""
    rows = [row for row in metrics if row.get("loss") is not None and after < row["step"] <= step]
    tokens = sum(row["title_tokens"] for row in rows)
    mean = sum(row["loss"] * row["title_tokens"] for row in rows) / tokens if tokens else None
    own = [row["eval_loss"] for row in metrics if "eval_loss" in row and row["step"] == step]
    return {"train_loss": mean, "eval_loss": own[-1] if own else None}


def figures(system: dict) -> dict:
    return {
        "rougeL": system["rouge"]["default"]["rougeL"],
        "interval": system["intervals"]["default"]["rougeL"],
        "rougeL_unicode": system["rouge"]["unicode"]["rougeL"],
        "words": system["words"]["mean"],
        "french": system["language"]["french"],
        "flags": system["flags"],
    }


def table(record: dict) -> str:
    head = ("articles", "update", "train", "eval", "R-L", "95 %", "words", "French", "loops", "cut")
    rows = [head]
    points = [(f"{p['articles']:,}", f"{p['step']:,}", p) for p in record["curve"]]
    points += [(name, "", point) for name, point in record["baselines"].items()]
    for name, step, point in points:
        of_run = [point.get(key) for key in ("train_loss", "eval_loss")]
        interval, flags = point["interval"], point["flags"]
        row = [name, step, *("" if value is None else f"{value:.3f}" for value in of_run)]
        row += [f"{point['rougeL']:.4f}"]
        row += ["{:.4f}-{:.4f}".format(*interval) if interval else ""]
        row += [
            f"{point['words']:.1f}",
            "" if point["french"] is None else f"{point['french']:.1%}",
        ]
        row += ["" if flags[key] is None else f"{flags[key]}" for key in ("looping", "cut")]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
    run(main)
