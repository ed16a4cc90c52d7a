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
import math
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from articles import Columns, check_articles, open_articles
from exit_codes import STOPPED, UserError, note, run, writing
from machine import check_devices
from prompting import PROMPTS, Prompt, end_ids, load_tokenizer, prompt_of_run, read_template
from run_folder import (
    ADAPTER_WEIGHTS,
    RUN_CONFIG,
    check_adapter,
    check_base,
    check_links,
    check_model_folder,
    commit,
    file_sha256,
    locked,
    model_fingerprint,
    note_override,
    read_run_config,
    resolve_model_folder,
    versions,
)
from stopping import StopRequest

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
    add("--max_time", type=float, help="minutes after which to stop, with exit code 75")
    args = parser.parse_args(argv)
    for name in ("max_length", "max_new_tokens", "max_batch_tokens", "max_time"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name} {value}: give a {'finite ' * (value > 0)}number above 0")
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
        for part in part_files(output_file):  # killed when all but removing them was done
            with writing(part):
                part.unlink(missing_ok=True)
        print(f"{args.output_file} is there already, made with the same settings: nothing to do")
        return None
    check_devices()
    tokenizer = load_tokenizer(source["run_dir"] or str(base_folder))
    if "ids_sha256" in settings:
        prompt = prompt_of_run(tokenizer, settings, source["run_dir"])
    else:
        prompt = Prompt(tokenizer, **settings)

    lock = output_file.with_suffix(".lock")
    with locked(lock, args.output_file), StopRequest(args.max_time) as stop:
        if is_complete(output_file, record):  # by a run that ended since the first look
            return None
        return infer(args, columns, source, base_folder, prompt, record, stop)


def infer(args, columns, source, base_folder, prompt, record, stop):
    """Write the titles that the checked arguments ask for; return STOPPED if `stop` was asked."""
    # These take seconds to import, which a complaint about the input should not have to wait for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of optional kernels not installed
    import torch
    from accelerate import Accelerator
    from accelerate.utils import tqdm

    from modeling import attach_adapter, load_base

    # ------------------------------------------------------------------ model
    nf4 = source["weights"] == "nf4"
    dtype = torch.bfloat16 if source["precision"] == "bf16" else torch.float32
    # The 4-bit model ran under autocast in training; a merged one should do as it would elsewhere.
    autocast = nf4 and dtype == torch.bfloat16
    accelerator = Accelerator(mixed_precision="bf16" if autocast else "no")
    model = load_base(str(base_folder), accelerator.device, dtype, nf4)
    if source["adapter"]:
        model = attach_adapter(model, source["adapter"])

    # ------------------------------------------------------------------ write titles
    articles, output_file = open_articles(args.input_file, columns, "test"), Path(args.output_file)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first():  # which cuts off a torn last line
        parts = Parts(output_file, record, len(articles))
    accelerator.wait_for_everyone()  # all have read the parts before one of them grows
    if parts.num_done:
        note(f"going on after {parts.num_done:,} titles of an earlier run")
    stop.listen()
    progress_bar = tqdm(total=len(articles), initial=parts.num_done, unit="article")
    stopping = False  # which it is not where all titles are there: then little is left to do
    with open(part_file(output_file, rank), "ab", buffering=0) as part:
        if part.tell() == 0:
            write_line(part, record)
        # Windows and their batches are those of the whole file, whatever is done already and
        # however many processes there are: the rounding of a title depends on its batch.
        for start in range(0, len(articles), WINDOW):
            window = range(start, min(start + WINDOW, len(articles)))
            if all(map(parts.is_done, window)):
                continue
            chunk = articles[list(window)]
            prompts = [prompt.encode(article).ids for article in chunk["text"]]
            batches = make_batches(prompts, record["max_new_tokens"], args.max_batch_tokens)
            for number, batch in enumerate(batches):
                missing = {row for row in batch if not parts.is_done(start + row)}
                if number % world_size == rank and missing:
                    with accelerator.autocast():
                        titles = generate_batch(
                            model, prompt, [prompts[row] for row in batch], record["max_new_tokens"]
                        )
                    for row, title in zip(batch, titles, strict=True):
                        if row in missing:
                            line = {"index": start + row, "id": chunk["id"][row]} | asdict(title)
                            write_line(part, line, len(articles) - parts.num_done)
                if accelerator.is_main_process:
                    progress_bar.update(len(missing))  # the others are about as far
                if missing and stop.asked():  # after a batch, so that every start gets on
                    break
            stopping = stop.asked()
            if stopping:
                break
    progress_bar.close()
    if accelerator.reduce(torch.tensor(float(stopping), device=accelerator.device)).item():
        if accelerator.is_main_process:
            done = Parts(output_file, record, len(articles)).num_done
            print(f"stopped after {done:,} of {len(articles):,} titles; the same command goes on")
        accelerator.wait_for_everyone()  # torchrun ends the others once one has ended with 75
        accelerator.end_training()
        return STOPPED
    if accelerator.is_main_process:
        cut = Parts(output_file, record, len(articles)).join()
        print(f"done: {len(articles):,} titles in {args.output_file}, {cut:,} cut by the limit")
    accelerator.wait_for_everyone()  # as at the end of train.py
    accelerator.end_training()
    return None


def generate_titles(
    model,
    prompt,
    articles: list[str],
    max_new_tokens: int | None = None,
    max_batch_tokens: int = 8192,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Title]]:
    """Yield `(index in articles, Title)`, longest articles first.

    Args:
        model: in evaluation mode, on its device; with or without an adapter.
        prompt: a `prompting.Prompt`.
        articles: their texts.
        max_new_tokens: limit of a title, EOS included (default: what the prompt keeps free).
        max_batch_tokens: as in `make_batches`.
        stop_asked: looked at before each batch; once true, no more come.
    """
    max_new_tokens = max_new_tokens or prompt.max_title_tokens
    prompts = [prompt.encode(article).ids for article in articles]
    for batch in make_batches(prompts, max_new_tokens, max_batch_tokens):
        if stop_asked():
            return
        titles = generate_batch(model, prompt, [prompts[row] for row in batch], max_new_tokens)
        yield from zip(batch, titles, strict=True)


def make_batches(
    prompts: list[list[int]], max_new_tokens: int, max_batch_tokens: int
) -> list[list[int]]:
    """Return the indices of the prompts in batches, from long to short.

    A batch holds `max_batch_tokens` tokens at the most, padding and titles included, and at least
    one article.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = []
    while order:
        size = max(1, max_batch_tokens // (len(prompts[order[0]]) + max_new_tokens))
        batches.append(order[:size])
        order = order[size:]
    return batches


def generate_batch(model, prompt, prompts: list[list[int]], max_new_tokens: int) -> list[Title]:
    """Return a title for each prompt, by greedy decoding of all of them together."""
    import torch
    from transformers import GenerationConfig

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
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), config.pad_token_id)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):  # padded on the left, whatever the tokenizer's habit
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    with torch.no_grad():
        output = base.generate(
            input_ids=input_ids.to(base.device),
            attention_mask=mask.to(base.device),
            generation_config=config,
        )
    titles = []
    for new_ids in output[:, longest:].tolist():
        end = next((n for n, token in enumerate(new_ids) if token in eos), None)
        titles.append(
            Title(
                title=prompt.decode(new_ids[:end]),
                raw=prompt.tokenizer.decode(
                    new_ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
                ),
                num_new_tokens=len(new_ids) if end is None else end + 1,
                stopped_by="length" if end is None else "eos",
            )
        )
    return titles


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
        check_model_folder(model_name)
        note_override("--model_name_or_path", model_name, model)
        model = model_name
    check_model_folder(model, None if merged or model_name else run_dir)
    if not merged:
        if not Path(run_dir, ADAPTER_WEIGHTS).is_file():
            raise UserError(run_dir, f"no {ADAPTER_WEIGHTS} in it", "let training finish first")
        check_adapter(run_dir)
    precision = "bf16" if run_config["arguments"]["mixed_precision"] == "bf16" else "fp32"
    # What nf4 and nf4-bf16 trained on is the same, and the former takes a quarter of the memory.
    plain = merged or run_config["arguments"].get("base_weights") == "bf16"
    weights = args.base_weights or (precision if plain else "nf4")
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


def write_line(part, content: dict, num_left: int = 1) -> None:
    """Append one of `num_left` lines of JSON to a part, an unbuffered file in binary mode.

    Raises:
        UserError: the disk is full, or cannot be written for another reason.
    """
    line = (json.dumps(content, ensure_ascii=False) + "\n").encode()
    with writing(part.name, num_left * len(line)):
        while line:
            line = line[part.write(line) :]


class Parts:
    """What the parts of an output file hold so far: where the line of each article stands.

    A torn last line is cut off. Memory does not grow with the titles, only by 10 bytes an article.

    Raises:
        UserError: a part was made with other settings, or is damaged.
    """

    def __init__(self, output_file: Path, record: dict, num_articles: int):
        self.output_file, self.record = output_file, record
        self.files = part_files(output_file)
        self.offsets = array("q", [-1]) * num_articles  # of the lines in their files
        self.numbers = array("h", [0]) * num_articles  # of the files
        for number, file in enumerate(self.files):
            end = 0
            with file.open("rb") as stream:
                for line in stream:
                    if not line.endswith(b"\n"):  # torn
                        break
                    if end:
                        index = self._index(file, line)
                        self.offsets[index], self.numbers[index] = end, number
                    elif not same_settings(line, record):
                        raise UserError(
                            file,
                            "an unfinished run had other settings",
                            "remove it, or go on with those",
                        )
                    end += len(line)
            if end < file.stat().st_size:
                os.truncate(file, end)  # which, unlike writing it anew, needs no room
        self.num_done = num_articles - self.offsets.count(-1)

    def _index(self, file: Path, line: bytes) -> int:
        try:
            index = json.loads(line)["index"]
            if type(index) is int and 0 <= index < len(self.offsets):
                return index
        except (ValueError, TypeError, KeyError):
            pass
        raise UserError(file, "this is not a file of titles", "remove it")

    def is_done(self, index: int) -> bool:
        return self.offsets[index] >= 0

    def join(self) -> int:
        """Write CSV and JSONL in input order, remove the parts, return how many titles were cut.

        Both appear under their names only when they are whole.

        Raises:
            UserError: the disk is full, or cannot be written for another reason.
        """
        if -1 in self.offsets:
            missing = self.offsets.index(-1)
            raise RuntimeError(f"articles have no title, among them row {missing}")
        details, cut = self.output_file.with_suffix(".jsonl"), 0
        csv_temporary, jsonl_temporary = (Path(f"{p}.tmp") for p in (self.output_file, details))
        needed = sum(file.stat().st_size for file in self.files)
        with ExitStack() as stack:
            parts = [stack.enter_context(file.open("rb")) for file in self.files]
            # Removed again where the disk is full, for their room is needed.
            stack.callback(csv_temporary.unlink, missing_ok=True)
            stack.callback(jsonl_temporary.unlink, missing_ok=True)
            stack.enter_context(writing(self.output_file, 2 * needed))
            csv_stream = stack.enter_context(csv_temporary.open("w", encoding="utf-8", newline=""))
            jsonl_stream = stack.enter_context(jsonl_temporary.open("w", encoding="utf-8"))
            writer = csv.writer(csv_stream, lineterminator="\n")
            writer.writerow(["ID", "titles"])
            jsonl_stream.write(json.dumps(self.record) + "\n")
            for offset, number in zip(self.offsets, self.numbers, strict=True):
                parts[number].seek(offset)
                row = json.loads(parts[number].readline())
                writer.writerow([row["id"], row["title"]])
                cut += row["stopped_by"] == "length"
                del row["index"]
                jsonl_stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            for stream in (csv_stream, jsonl_stream):
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(jsonl_temporary, details)
            os.replace(csv_temporary, self.output_file)
        for file in self.files:
            file.unlink(missing_ok=True)
        return cut


if __name__ == "__main__":
    run(main)
