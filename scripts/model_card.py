"""The README of a run or merged folder: what the Hub shows of a model, results with intervals too.

It is written from the record of a run folder that somebody else may have made: no value of it gets
to be YAML, Markdown or HTML.
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from articles import HUB_DATASET, SUFFIXES
from exit_codes import UserError, note, printable, writing
from run_folder import (
    ADAPTER_WEIGHTS,
    DEFAULTS_OF_NEWER_ARGUMENTS,
    RUN_CONFIG,
    file_sha256,
    model_fingerprint,
    read_run_config,
    write_json,
)

CARD = "README.md"
RESULTS = "results.json"
PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*")  # means nothing in Markdown
SETTINGS = ("lora_r", "lora_alpha", "lora_dropout", "learning_rate", "warmup_ratio")
SETTINGS += ("cooldown_ratio", "prompt_loss_weight", "max_grad_norm", "num_train_epochs")
SETTINGS += ("max_length", "seed")
SYSTEM_FIGURES = ("rouge", "intervals", "words", "empty", "language", "novel", "flags")


def model_card(run_config: dict, results: dict | None = None, name: str = ".") -> str:
    """Return the README of a run or merged folder.

    Args:
        run_config: the folder's record.
        results: of `write_results`; None before its titles were scored.
        name: what to load it by: a Hub id, or the folder from inside.
    """
    arguments, merged = run_config["arguments"], run_config["kind"] == "merged"
    arguments = DEFAULTS_OF_NEWER_ARGUMENTS | arguments
    rows = "\n".join(f"| {key} | {_quoted(arguments[key])} |" for key in SETTINGS)
    splits = run_config["data"].items()
    data = "\n".join(f"- {_quoted(split)}: {file['rows']:,} rows" for split, file in splits)
    base = printable(run_config["base_model"])
    template, step = run_config["prompt"]["template"], _quoted(run_config["adapter_step"])
    lines = loading_lines(run_config["prompt"], name)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", template + lines)), 0)
    needs = "It needs peft, and its base, which `adapter_config.json` names.\n" * (not merged)
    return f"""---
{metadata(run_config, results, name)}
---

# Titles for French news articles

{"A model with its LoRA adapter merged in" if merged else "A LoRA adapter"}, trained on top of
{_quoted(base, code=True)} (fingerprint {_quoted(run_config["base_fingerprint"])}).

{_results(results)}## Use

{fence}python
{lines}
{fence}

{needs}The text is tokenised as a whole here, and the base is in its own precision: titles may
differ a little from those of infer.py, which puts ids together in pieces.

## Prompt

{fence}
{template}
{fence}

## Data

{data}

## Training

| setting | value |
|--|--|
| articles per update | {_quoted(run_config["articles_per_update"])} |
{rows}

After update {step}; all else is in `{RUN_CONFIG}` and `metrics.jsonl`.

## Limits

Titles may state what the article does not: other numbers, other names, invented quotations. Read
them against the article before they are published. The model has seen one kind of French article,
and of a long one only the beginning ({_quoted(arguments["max_length"])} tokens with prompt and
title). It has the biases of its base and of its articles, and the licences of both apply.
"""


def metadata(run_config: dict, results: dict | None, name: str) -> str:
    """Return the card's YAML, by the Hub's own library."""
    from huggingface_hub import EvalResult, ModelCardData

    merged, base = run_config["kind"] == "merged", printable(run_config["base_model"])
    # The Hub refuses a card that names a folder of somebody's machine as its base.
    elsewhere = name != "." and (Path(base).exists() or not HUB_DATASET.fullmatch(base))
    path = run_config["data"].get("train", {}).get("path")
    hub_dataset = isinstance(path, str) and HUB_DATASET.fullmatch(path)
    evaluations = []
    if results:
        file = printable(Path(results["references"]["path"]).name)
        evaluations = [
            EvalResult(
                task_type="summarization",
                task_name="Titles of French news articles",
                dataset_type="titles",
                dataset_name=f"{file} ({results['rows']:,} rows)",
                metric_type="rouge",
                metric_name=f"{shown} F",
                metric_value=round(results["rouge"]["default"][kind], 4),
            )
            for kind, shown in (("rougeL", "ROUGE-L"), ("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"))
        ]
    data = ModelCardData(
        base_model=None if elsewhere else base,
        language="fr",
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["qlora", "lora", "headline-generation", "summarization", "news"],
        metrics=["rouge"],
        datasets=[path.partition(":")[0]] if hub_dataset and not path.endswith(SUFFIXES) else None,
        model_name="titles" if name == "." else name,
        eval_results=evaluations or None,
    )
    return data.to_yaml().strip()


def loading_lines(prompt: dict, name: str) -> str:
    """Return five lines of Python that load the model and print the title of an article."""
    message = 'prompt.replace("{article}", article)'
    if prompt.get("apply_chat_template"):
        message = f'[{{"role": "user", "content": {message}}}]'
    options = f"max_new_tokens={prompt.get('max_title_tokens', 128)}, do_sample=False"
    return f"""from transformers import pipeline
prompt = {prompt["template"]!r}
article = "Le texte d'un article."
write = pipeline("text-generation", model={name!r}, {options})
print(write({message}, return_full_text=False)[0]["generated_text"])"""


def _results(results: dict | None) -> str:
    if not results:
        return ""
    lines = ["## Results", ""]
    file = _quoted(Path(results["references"]["path"]).name, code=True)
    lines += [f"ROUGE F of {results['rows']:,} titles against those of {file}, with 95 % bootstrap"]
    lines += ["intervals over the articles; rouge_score's own tokenizer, no stemmer:", ""]
    lines += ["| | ROUGE-1 | ROUGE-2 | ROUGE-L |", "|--|--:|--:|--:|"]
    shown = {"this model": results} | results["baselines"]
    for name, system in shown.items():
        cells = []
        for kind in ("rouge1", "rouge2", "rougeL"):
            interval = system["intervals"]["default"][kind]
            bounds = "" if interval is None else " ({:.4f} to {:.4f})".format(*interval)
            cells.append(f"{system['rouge']['default'][kind]:.4f}{bounds}")
        lines.append(f"| {_quoted(name)} | {' | '.join(cells)} |")
    words, french = results["words"], results["language"]["french"]
    told = [f"{words['mean']:.1f} words on average"]
    told += [] if french is None else [f"{french:.1%} in French"]
    names = {"looping": "in a loop", "cut": "cut by the limit", "repeated": "said twice"}
    names |= {f: f"with {f} that the article has not" for f in ("numbers", "names", "quotations")}
    for flag, meaning in names.items():
        count = results["flags"][flag]
        told += [] if count is None else [f"{count / results['rows']:.1%} {meaning}"]
    return "\n".join([*lines, "", f"Of these titles: {', '.join(told)}.", "", ""])


def _quoted(value, code: bool = False) -> str:
    """Return a value for a line of Markdown: plain words as they are, all else as code."""
    text = printable(str(value)).replace("`", "'").replace("|", "¦")  # these would end a code span
    return text if not code and PLAIN.fullmatch(text.replace(" ", "_")) else f"`{text}`"


def write_results(folder: str, run_config: dict, scores: dict, details: dict) -> None:
    """Write the scores of a folder's own titles into it: results.json, and its card.

    Its own are those of which infer.py noted this adapter, or this merged model, by its hash. A
    card that somebody has edited is left as it is.
    """
    own = own_hash(Path(folder), run_config)
    name = own_system(own, run_config, details)
    if name is None or "references" not in scores:
        return
    try:
        model_card(run_config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            Path(folder, RUN_CONFIG), f"no card can be made of it ({error!r})", "restore the file"
        ) from None
    results = {"of": own, "references": scores["references"], "rows": scores["rows"]}
    results |= {key: scores["predictions"][name][key] for key in SYSTEM_FIGURES}
    results["baselines"] = {
        name: {key: system[key] for key in ("rouge", "intervals")}
        for name, system in scores["predictions"].items()
        if "baseline" in system
    }
    results |= {"bootstrap": scores["bootstrap"], "versions": scores["versions"]}
    if not os.access(folder, os.W_OK):
        note(f"{folder} cannot be written: its card stays without the results")
        return
    card = Path(folder, CARD)
    before = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    ours = before in (None, model_card(run_config), model_card(run_config, results_of(folder)))
    write_json(Path(folder, RESULTS), results)
    if ours:
        write_card(Path(folder), model_card(run_config, results))
    else:
        note(f"{card} was edited, and stays as it is; the results are in {RESULTS}")


def results_of(folder: str, of: str | None = None) -> dict | None:
    """Return what `write_results` left in a folder, if a card can be made of it; and, if the hash
    of an adapter is given, if they are that one's."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        results = json.loads(Path(folder, RESULTS).read_text(encoding="utf-8"))
        model_card(read_run_config(folder), results)
        if of in (None, results["of"]):
            return results
    return None


def write_card(folder: Path, card: str) -> None:
    """Write a card under a temporary name and rename it."""
    temporary = folder / f"{CARD}.tmp"
    with writing(folder / CARD):
        temporary.unlink(missing_ok=True)  # were it a link, what it names would be overwritten
        temporary.write_text(card, encoding="utf-8")
        os.replace(temporary, folder / CARD)


def own_hash(folder: Path, run_config: dict) -> str | None:
    """Return the hash by which infer.py notes a folder's model; None without a model."""
    if run_config["kind"] == "merged":
        return model_fingerprint(folder) if (folder / "config.json").is_file() else None
    weights = folder / ADAPTER_WEIGHTS
    return file_sha256(weights) if weights.is_file() else None


def own_system(own: str | None, run_config: dict, details: dict) -> str | None:
    """Return the name of the predictions that were made with the model of that hash."""
    merged = run_config["kind"] == "merged"
    key = "model_fingerprint" if merged else "adapter_sha256"
    for name, found in details.items():
        record = found["record"] if found else {}
        # infer.py notes an adapter's base too, which may be a merged model.
        if own is not None and record.get(key) == own and not (merged and record.get("adapter")):
            return name
    return None
