"""Write titles for a file of articles: base alone, base with an adapter, or a merged model.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/infer.py \\
        --run_dir runs/titles --input_file test.csv --output_file predictions.csv

`--run_dir` takes the folder of train.py (adapter on the 4-bit base) or of merge.py. With
`--model_name_or_path` and `--prompt_file` instead, any causal LM answers as it is.
"""

import argparse
import csv
import glob
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from articles import Columns, check_articles, open_articles
from exit_codes import UserError, note, run
from prompting import PROMPTS, Prompt, end_ids, prompt_of_run, read_template
from run_folder import (
    ADAPTER_WEIGHTS,
    RUN_CONFIG,
    check_base,
    check_links,
    check_model_folder,
    commit,
    file_sha256,
    model_fingerprint,
    note_override,
    read_run_config,
    resolve_model_folder,
    versions,
)

WINDOW = 2048  # articles that are sorted by length together; bounds what is kept in memory


@dataclass(frozen=True)
class Title:
    """What a model wrote for one article."""

    title: str  # one line, ready to submit
    raw: str  # the whole continuation
    num_new_tokens: int
    stopped_by: str  # "eos", or "length" where the limit cut it off


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("model").add_argument
    add("--run_dir", help="folder of train.py or merge.py, which says all that follows here")
    add("--model_name_or_path", help="a model as it is; with --run_dir, where its base lies now")
    add("--prompt_file", help="template with {article} (default: the run's, or prompts/fr.txt)")
    add("--apply_chat_template", action=flag, default=None, help="send it as a user's chat turn")
    add("--base_weights", choices=["nf4", "bf16", "fp32"], help="default: nf4, bf16 if merged")
    add = parser.add_argument_group("data").add_argument
    add("--input_file", required=True, help=".csv[.gz], .json[l], .parquet or a Hub dataset id")
    add("--text_column", default="text", help="column of the articles")
    add("--id_column", default="ID", help="column of the IDs; without it, rows count from 0")
    add("--max_length", type=int, help="tokens of prompt and title (default: 1024, or the run's)")
    add = parser.add_argument_group("generation").add_argument
    add("--max_new_tokens", type=int, help="limit of a title (default: 128, or the run's)")
    add("--max_batch_tokens", type=int, default=8192, help="articles together: prompts and titles")
    add = parser.add_argument_group("output").add_argument
    add("--output_file", required=True, help="CSV with ID,titles; a JSONL with details beside it")
    args = parser.parse_args(argv)
    for name in ("max_length", "max_new_tokens", "max_batch_tokens"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name} {value}: give a number above 0")
    if not args.run_dir and not args.model_name_or_path:
        parser.error("give --run_dir, or --model_name_or_path for a model as it is")
    if not args.output_file.endswith(".csv"):
        parser.error(f"--output_file {args.output_file}: give a name that ends in .csv")
    return args


def main(argv=None):
    args = parse_args(argv)
    columns = Columns(text=args.text_column, title=None, id=args.id_column)

    # ------------------------------------------------------------------ check all input first
    source = find_model(args)
    template = read_template(args.prompt_file) if args.prompt_file else None
    output_file = Path(args.output_file)
    if not output_file.absolute().parent.is_dir():
        raise UserError(args.output_file, "there is no such folder", "make it first")
    check_links(output_file.parent.glob(f"{glob.escape(output_file.stem)}.*"))
    checked = check_articles(args.input_file, columns, "test")
    base_folder = resolve_model_folder(source["model"])
    if source["adapter"]:
        check_base(base_folder, source["model"], source["base_fingerprint"], source["run_dir"])
    settings = prompt_settings(args, template, source["prompt"])
    record = {
        "model": source["model"],
        "model_fingerprint": model_fingerprint(base_folder),
        "base_weights": source["weights"],
        "precision": source["precision"],
        "adapter": source["adapter"],
        "adapter_sha256": source["adapter"]
        and file_sha256(Path(source["adapter"], ADAPTER_WEIGHTS)),
        "prompt": settings,
        "max_new_tokens": args.max_new_tokens or settings["max_title_tokens"],
        "max_batch_tokens": args.max_batch_tokens,
        "decoding": "greedy",
        "input": vars(checked),
        "versions": versions(),
        "commit": commit(),
    }
    if is_complete(output_file, record):
        print(f"{args.output_file} is there already, made with the same settings: nothing to do")
        return

    # These take seconds to import, which a complaint about the input should not have to wait for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of optional kernels not installed
    import torch
    from accelerate import Accelerator
    from accelerate.utils import tqdm

    from modeling import attach_adapter, load_base, load_tokenizer

    # ------------------------------------------------------------------ model
    nf4 = source["weights"] == "nf4"
    dtype = torch.bfloat16 if source["precision"] == "bf16" else torch.float32
    # The 4-bit model ran under autocast in training; a merged one should do as it would elsewhere.
    autocast = nf4 and dtype == torch.bfloat16
    accelerator = Accelerator(mixed_precision="bf16" if autocast else "no")
    tokenizer = load_tokenizer(source["run_dir"] or str(base_folder))
    if "ids_sha256" in settings:
        prompt = prompt_of_run(tokenizer, settings, source["run_dir"])
    else:
        prompt = Prompt(tokenizer, **settings)
    model = load_base(str(base_folder), accelerator.device, dtype, nf4)
    if source["adapter"]:
        model = attach_adapter(model, source["adapter"])

    # ------------------------------------------------------------------ write titles
    articles = open_articles(args.input_file, columns, "test")
    rank, world_size = accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first():  # which cuts off a torn last line
        done = read_parts(output_file, record)
    accelerator.wait_for_everyone()  # all have read the parts before one of them grows
    rows = [i for i in range(len(articles)) if i not in done][rank::world_size]
    if done:
        note(f"going on after {len(done):,} titles of an earlier run")
    progress_bar = tqdm(total=len(rows), unit="article")
    with open(part_file(output_file, rank), "a", encoding="utf-8") as part:
        if part.tell() == 0:
            part.write(json.dumps(record) + "\n")
        for start in range(0, len(rows), WINDOW):
            window = rows[start : start + WINDOW]
            chunk = articles[window]
            with accelerator.autocast():
                for index, title in generate_titles(
                    model, prompt, chunk["text"], record["max_new_tokens"], args.max_batch_tokens
                ):
                    row = {"index": window[index], "id": chunk["id"][index]} | asdict(title)
                    part.write(json.dumps(row, ensure_ascii=False) + "\n")
                    progress_bar.update()
                    part.flush()
    progress_bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cut = join_parts(output_file, record, len(articles))
        print(f"done: {len(articles):,} titles in {args.output_file}, {cut:,} cut by the limit")
    accelerator.end_training()


def generate_titles(
    model, prompt, articles: list[str], max_new_tokens=None, max_batch_tokens: int = 8192
) -> Iterator[tuple[int, Title]]:
    """Yield `(index in articles, Title)`, longest articles first, by greedy decoding.

    Args:
        model: in evaluation mode, on its device; with or without an adapter.
        prompt: a `prompting.Prompt`.
        articles: their texts.
        max_new_tokens: limit of a title, EOS included (default: what the prompt keeps free).
        max_batch_tokens: a batch holds so many tokens at the most, padding and titles included,
            and at least one article.
    """
    import torch
    from transformers import GenerationConfig

    max_new_tokens = max_new_tokens or prompt.max_title_tokens
    prompts = [prompt.encode(article).ids for article in articles]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    eos = end_ids(prompt.tokenizer, base.generation_config)
    # From scratch: repositories ship sampling, and penalties that count the article's own words.
    # It replaces the model's, from which `generate` would fill whatever is left open.
    base.generation_config = config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(eos),
        pad_token_id=prompt.tokenizer.eos_token_id,  # never seen: masked before, cut off after
        use_cache=True,
    )
    while order:
        longest = len(prompts[order[0]])
        size = max(1, max_batch_tokens // (longest + max_new_tokens))
        batch, order = order[:size], order[size:]
        input_ids = torch.full((len(batch), longest), config.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, index in enumerate(batch):  # padded on the left, whatever the tokenizer's habit
            input_ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        with torch.no_grad():
            output = base.generate(
                input_ids=input_ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=config,
            )
        for index, new_ids in zip(batch, output[:, longest:].tolist(), strict=True):
            end = next((n for n, token in enumerate(new_ids) if token in eos), None)
            yield (
                index,
                Title(
                    title=prompt.decode(new_ids[:end]),
                    raw=prompt.tokenizer.decode(
                        new_ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
                    ),
                    num_new_tokens=len(new_ids) if end is None else end + 1,
                    stopped_by="length" if end is None else "eos",
                ),
            )


def find_model(args) -> dict:
    """Return which weights to load, from the command line and the run folder, without loading.

    Raises:
        UserError: a folder that is neither a run nor a model.
    """
    run_dir, model_name = args.run_dir, args.model_name_or_path
    if not run_dir and Path(model_name, RUN_CONFIG).is_file():  # a merged folder, given as a model
        run_dir, model_name = model_name, None
    if not run_dir:
        check_model_folder(model_name)
        weights = args.base_weights or "nf4"
        return {
            "run_dir": None,
            "model": model_name,
            "adapter": None,
            "weights": weights,
            "precision": "fp32" if weights == "fp32" else "bf16",
            "prompt": None,
            "base_fingerprint": None,
        }
    run_config = read_run_config(run_dir)
    merged = run_config["kind"] == "merged"
    model = run_dir if merged else run_config["base_model"]
    if model_name not in (None, model):
        if merged:
            raise UserError(
                "--model_name_or_path",
                f"{run_dir} is a merged model, which has no base",
                "leave the option out",
            )
        note_override("--model_name_or_path", model_name, model)
        model = model_name
    check_model_folder(model)
    if not merged and not Path(run_dir, ADAPTER_WEIGHTS).is_file():
        raise UserError(run_dir, f"no {ADAPTER_WEIGHTS} in it", "let training finish first")
    precision = "bf16" if run_config["arguments"]["mixed_precision"] == "bf16" else "fp32"
    weights = args.base_weights or (precision if merged else "nf4")
    return {
        "run_dir": run_dir,
        "model": model,
        "adapter": None if merged else run_dir,
        "weights": weights,
        "precision": precision if weights == "nf4" else weights,
        "prompt": run_config["prompt"],
        "base_fingerprint": None if merged else run_config["base_fingerprint"],
    }


def prompt_settings(args, template: str | None, recorded: dict | None) -> dict:
    """Return the arguments of `Prompt`: the run's, unless a flag says otherwise, which is noted."""
    chosen = {
        "template": template,
        "apply_chat_template": args.apply_chat_template,
        "max_length": args.max_length,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if recorded is None:
        defaults = {"template": None, "apply_chat_template": False}
        defaults |= {"max_length": 1024, "max_title_tokens": args.max_new_tokens or 128}
        settings = defaults | chosen
        settings["template"] = settings["template"] or read_template(str(PROMPTS / "fr.txt"))
        return settings
    changed = {name: value for name, value in chosen.items() if value != recorded[name]}
    for name, value in changed.items():
        note_override(f"--{'prompt_file' if name == 'template' else name}", value, recorded[name])
    if changed:
        recorded = {name: value for name, value in recorded.items() if name != "ids_sha256"}
    return recorded | changed


def is_complete(output_file: Path, record: dict) -> bool:
    """Return whether the output is there already, made with these settings.

    Raises:
        UserError: it is there, made with others.
    """
    details = output_file.with_suffix(".jsonl")
    if not output_file.exists() and not details.exists():
        return False
    if details.exists():
        with details.open(encoding="utf-8") as stream:
            if same_settings(stream.readline(), record):
                return output_file.exists()  # not if it was stopped between the two
    raise UserError(
        output_file, "there are predictions of other settings already", "remove or rename them"
    )


def same_settings(line: str, record: dict) -> bool:
    """Return whether titles under this header line go with those of this record.

    Commit and paths may differ: what lies there is compared by its hashes.
    """
    free = {"commit": None, "model": None, "adapter": None}

    def what_counts(settings: dict) -> dict:
        return settings | free | {"input": settings["input"] | {"path": None}}

    try:
        return what_counts(json.loads(line)) == what_counts(record)
    except (ValueError, TypeError, KeyError):
        return False


def part_file(output_file: Path, rank: int) -> Path:
    """Return where a process keeps what it has written so far."""
    return output_file.with_suffix(f".part-{rank}.jsonl")


def part_files(output_file: Path) -> list[Path]:
    """Return the parts that there are, of any number of processes."""
    return sorted(output_file.parent.glob(f"{glob.escape(output_file.stem)}.part-*.jsonl"))


def read_parts(output_file: Path, record: dict) -> dict[int, str]:
    """Return the whole lines of all parts by row index; a torn last line is cut off.

    Raises:
        UserError: a part was made with other settings.
    """
    lines = {}
    for part in part_files(output_file):
        with part.open(encoding="utf-8", newline="\n") as stream:
            content = list(stream)  # lines end in \n alone: titles may hold other separators
        whole = [line for line in content if line.endswith("\n")]
        if whole and not same_settings(whole[0], record):
            raise UserError(
                part, "an unfinished run had other settings", "remove it, or go on with those"
            )
        if whole != content:
            part.write_text("".join(whole), encoding="utf-8")
        lines |= {json.loads(line)["index"]: line for line in whole[1:]}
    return lines


def join_parts(output_file: Path, record: dict, num_articles: int) -> int:
    """Write CSV and JSONL in input order, remove the parts, return how many titles were cut.

    Both appear under their names only when they are whole.
    """
    lines = read_parts(output_file, record)
    if missing := set(range(num_articles)) - lines.keys():
        raise RuntimeError(f"{len(missing)} articles have no title, among them row {min(missing)}")
    details, cut = output_file.with_suffix(".jsonl"), 0
    csv_temporary, jsonl_temporary = (Path(f"{path}.tmp") for path in (output_file, details))
    with (
        csv_temporary.open("w", encoding="utf-8", newline="") as csv_stream,
        jsonl_temporary.open("w", encoding="utf-8") as jsonl_stream,
    ):
        writer = csv.writer(csv_stream, lineterminator="\n")
        writer.writerow(["ID", "titles"])
        jsonl_stream.write(json.dumps(record) + "\n")
        for index in range(num_articles):
            row = json.loads(lines[index])
            writer.writerow([row["id"], row["title"]])
            cut += row["stopped_by"] == "length"
            del row["index"]
            jsonl_stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(jsonl_temporary, details)
    os.replace(csv_temporary, output_file)
    for part in part_files(output_file):
        part.unlink()
    return cut


if __name__ == "__main__":
    run(main)
