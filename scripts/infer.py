"""Write titles for a file of articles: base alone, base with an adapter, or a merged model.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/infer.py \\
        --run_dir runs/titles --input_file test.csv --output_file predictions.csv
    python scripts/infer.py --run_dir runs/titles < article.txt

`--run_dir` takes the folder of train.py (adapter on the 4-bit base), a checkpoint in it, or that of
merge.py. With `--model_name_or_path` and `--prompt_file` instead, any causal LM answers as it is.
Without a file, the title of one article, of `--text` or of standard input, is printed.
"""

import argparse
import copy
import functools
import glob
import itertools
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from articles import Columns, check_articles, open_articles
from exit_codes import (
    STOPPED,
    ArgumentParser,
    UserError,
    is_first_process,
    keep_group,
    note,
    printable,
    run,
    writing,
)
from libraries import quick_imports
from machine import IN_FP32, SLOW_IN_BF16, bf16_pays, check_devices, free_memory
from nodes import Nodes, check_precision, from_main_process, process_group
from predictions import Parts, is_complete, own_files, part_file, part_files, write_line
from prompting import PROMPTS, Prompt, load_tokenizer, prompt_of_run, read_template
from run_folder import (
    ADAPTER_WEIGHTS,
    RUN_CONFIG,
    check_adapter,
    check_base,
    check_links,
    check_model_folder,
    commit,
    file_sha256,
    find_run,
    locked,
    model_fingerprint,
    note_override,
    read_run_config,
    resolve_model_folder,
    tokenizer_sha256,
    versions,
)
from sharding import check_fsdp_config
from stopping import StopRequest

WINDOW = 2048  # articles that are sorted by length together; bounds what is kept in memory
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


@dataclass(frozen=True)
class Title:
    """What a model wrote for one article."""

    title: str  # one line, ready to submit
    raw: str  # the whole continuation
    num_new_tokens: int
    stopped_by: str  # "eos", "line" where its line ended, or "length" where the limit cut it off


@dataclass(frozen=True)
class Decoding:
    """How titles are chosen. No penalty on repetition counts, and so bans, the article's own words,
    as transformers' would."""

    max_new_tokens: int
    num_beams: int = 1
    min_new_tokens: int | None = None
    length_penalty: float | None = None  # of beam search: above 0 favours long titles
    no_repeat_ngram_size: int | None = None  # so many tokens of a title do not come again in it
    num_samples: int = 1  # above 1: drawn, and of these the one most like the others is taken
    temperature: float = 0.5  # at which they are drawn,
    top_k: int = 64  # each token from so many: the long tail holds no good title

    def __str__(self) -> str:
        words = "greedy" if self.num_beams == 1 else f"{self.num_beams} beams"
        if self.num_samples > 1:
            words = f"the most alike of {self.num_samples} drawn at temperature {self.temperature}"
            words += f", top-k {self.top_k}"
        words += f", at least {self.min_new_tokens} tokens" if self.min_new_tokens else ""
        if self.length_penalty is not None:
            words += f", length penalty {self.length_penalty}"
        size = self.no_repeat_ngram_size
        return words if size is None else f"{words}, no {size} tokens twice"

    def options(self) -> dict:
        """Return what `generate_ids` takes, without the limit and the seeds."""
        options = {name: value for name, value in asdict(self).items() if value is not None}
        del options["max_new_tokens"], options["num_samples"]
        if self.num_samples == 1:
            del options["temperature"], options["top_k"]
        return options

    @property
    def room(self) -> int:
        """The tokens that are kept free for what is written of one article."""
        return self.max_new_tokens * self.num_samples


SAMPLES_HELP = "above 1: so many are drawn; the one most like the others by ROUGE-L is written"
WEIGHTS = ["nf4", "nf4-bf16", "bf16", "fp32"]
ENGINE_HELP = "continuous: transformers' own, on whose timing roundings depend"


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("model").add_argument
    add("--run_dir", help="folder of train.py or merge.py, or a checkpoint: says all else here")
    add("--model_name_or_path", help="a model as it is; with --run_dir, where its base lies now")
    add("--prompt_file", help="template with {article} (default: the run's, or prompts/fr.txt)")
    add("--apply_chat_template", action=flag, default=None, help="send it as a user's chat turn")
    add("--base_weights", choices=WEIGHTS, help="default: as trained or merged, or nf4")
    add = parser.add_argument_group("data").add_argument
    add("--input_file", help=".csv[.gz], .json[l], .parquet or a Hub dataset id")
    add("--text", help="one article instead (without either: standard input)")
    add("--text_column", default="text", help="column of the articles")
    add("--id_column", default="ID", help="column of the IDs; without it, rows count from 0")
    add("--max_length", type=int, help="tokens of prompt and title (default: 1024, or the run's)")
    add = parser.add_argument_group("generation").add_argument
    add("--max_new_tokens", type=int, help="limit of a title (default: 128, or the run's)")
    add("--min_new_tokens", type=int, help="no EOS before so many")
    add("--num_beams", type=int, default=1, help="of beam search; 1: greedy")
    add("--length_penalty", type=float, help="of beam search: above 0 favours long titles")
    add("--no_repeat_ngram_size", type=int, help="so many tokens do not come twice in a title")
    add("--num_samples", type=int, default=1, help=SAMPLES_HELP)
    add("--temperature", type=float, help="at which they are drawn (default: 0.5)")
    add("--max_batch_tokens", type=int, help="together, titles included (default: by free memory)")
    add("--engine", choices=["batched", "continuous"], default="batched", help=ENGINE_HELP)
    add = parser.add_argument_group("output").add_argument
    add("--output_file", help="CSV with ID,titles; a JSONL with details beside it")
    add("--max_time", type=float, help="minutes after which to stop, with exit code 75")
    add("--ddp_timeout", type=float, default=1800, help="seconds processes wait for each other")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if name == "length_penalty":
            if value is not None and not math.isfinite(value):
                parser.error(f"--{name} {value}: give a finite number")
        elif type(value) in (int, float) and not 0 < value < math.inf:
            parser.error(f"--{name} {value}: give a {'finite ' * (value > 0)}number above 0")
    if not args.run_dir and not args.model_name_or_path:
        parser.error("give --run_dir, or --model_name_or_path for a model as it is")
    if args.num_beams == 1 and args.length_penalty is not None:
        parser.error("--length_penalty: it weighs beams; give --num_beams above 1, or leave it out")
    if args.num_samples == 1 and args.temperature is not None:
        parser.error("--temperature: titles are drawn with --num_samples above 1; or leave it out")
    if args.num_samples > 1 and args.num_beams > 1:
        parser.error("--num_samples: it is for titles without --num_beams; leave one of them out")
    limit = args.max_new_tokens
    if limit and args.min_new_tokens and args.min_new_tokens > limit:
        parser.error(f"--min_new_tokens {args.min_new_tokens}: above --max_new_tokens {limit}")
    if args.engine == "continuous":
        for name in ("num_beams", "min_new_tokens", "no_repeat_ngram_size", "num_samples"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--engine continuous: it knows no --{name}; leave one of them out")
    if args.input_file:
        if args.text is not None:
            parser.error("--text: give it or --input_file, not both")
        if not args.output_file:
            parser.error("--input_file: give --output_file too, the titles' CSV")
        if not args.output_file.endswith(".csv"):
            parser.error(f"--output_file {args.output_file}: give a name that ends in .csv")
        return args
    for name in ("output_file", "max_time", "max_batch_tokens"):
        if getattr(args, name) is not None:
            parser.error(f"--{name}: give --input_file too; the title of one article is printed")
    if args.engine == "continuous":
        parser.error("--engine continuous: give --input_file too; it is for many articles")
    if args.text is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("give --input_file, --text, or one article on standard input")
    if args.text is None and os.environ.get("WORLD_SIZE", "1") != "1":
        parser.error("standard input: only one process can read it; give --text or --input_file")
    return args


def main(argv=None):
    args = parse_args(argv)
    columns = Columns(text=args.text_column, title=None, id=args.id_column)

    # ------------------------------------------------------------------ check all input first
    if not args.input_file:
        return write_one(args)
    source = find_model(args)
    template = read_template(args.prompt_file) if args.prompt_file else None
    output_file = Path(args.output_file)
    if not output_file.absolute().parent.is_dir():
        raise UserError(args.output_file, "there is no such folder", "make it first")
    if Path(args.input_file).resolve() in map(Path.resolve, own_files(output_file)):
        raise UserError(args.input_file, "the titles' own files are called so", "rename one")
    check_links(output_file.parent.glob(f"{glob.escape(output_file.stem)}.*"))
    checked = check_articles(args.input_file, columns, "test")
    base_folder = find_base(source)
    settings = prompt_settings(args, template, source["prompt"])
    decoding = decoding_of(args, settings)
    record = {
        "model": source["model"],
        "model_fingerprint": model_fingerprint(base_folder),
        "base_weights": source["weights"],
        "precision": source["precision"],
        "adapter": source["adapter"],
        "adapter_sha256": source["adapter"]
        and file_sha256(Path(source["adapter"], ADAPTER_WEIGHTS)),
        "adapter_step": source["adapter_step"],
        "prompt": settings,
        "tokenizer_sha256": tokenizer_sha256(Path(source["run_dir"] or base_folder), base_folder),
        "max_new_tokens": decoding.max_new_tokens,
        "max_batch_tokens": args.max_batch_tokens,  # None: what an earlier start has chosen
        "decoding": str(decoding),
        "engine": args.engine,
        "input": vars(checked),
        "versions": versions(),
        "commit": commit(),
    }
    if is_complete(output_file, record):
        for part in part_files(output_file):  # killed when all but removing them was done
            with writing(part):
                part.unlink(missing_ok=True)
        if is_first_process():
            print(
                f"{args.output_file} is there already, made with the same settings: nothing to do"
            )
        return None
    check_devices()
    check_fsdp_config()
    prompt = make_prompt(source, base_folder, settings)

    lock = output_file.with_suffix(".lock")
    with (
        Nodes(args.ddp_timeout) as nodes,
        locked(lock, args.output_file),
        StopRequest(args.max_time) as stop,
        nodes.together(),
    ):
        if is_complete(output_file, record):  # by a run that ended since the first look
            return None
        return infer(args, columns, source, base_folder, prompt, decoding, record, stop, nodes)


def write_one(args) -> None:
    """Print the title of one article on standard output, and all else on standard error."""
    standard_output = sys.stdout
    with redirect_stdout(sys.stderr):
        source = find_model(args)
        template = read_template(args.prompt_file) if args.prompt_file else None
        where, text = "--text", args.text
        if text is None:
            where = "standard input"
            try:
                text = sys.stdin.buffer.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(where, f"not UTF-8 ({error})", "convert it") from None
        elif any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(where, "not UTF-8", "convert it")
        if not text.strip():
            raise UserError(where, "there is no article in it", "give its text")
        base_folder = find_base(source)
        settings = prompt_settings(args, template, source["prompt"])
        decoding = decoding_of(args, settings)
        check_devices()
        prompt = make_prompt(source, base_folder, settings)
        accelerator, model, _ = load(source, base_folder, prompt, decoding, args.ddp_timeout)
        from modeling import check_ids

        ids = prompt.encode(text).ids
        check_ids(model, source["model"], max(ids))
        with accelerator.autocast():
            [(_, title)] = write_batch(model, prompt, {0: ids}, decoding, too_large={})
        if title.stopped_by == "length":
            note(f"cut after {decoding.max_new_tokens} tokens, see --max_new_tokens")
    if is_first_process():
        print(printable(title.title), file=standard_output, flush=True)
    accelerator.end_training()


def infer(args, columns, source, base_folder, prompt, decoding, record, stop, nodes):
    """Write the titles that the checked arguments ask for; return STOPPED if `stop` was asked."""
    loaded = load(source, base_folder, prompt, decoding, args.ddp_timeout)
    accelerator, model, one_by_one = loaded
    record["precision"] = source["precision"]  # which is that of this machine by now
    import torch
    from accelerate.utils import tqdm

    from decoding import choose_max_batch_tokens
    from modeling import check_ids

    # ------------------------------------------------------------------ write titles
    articles, output_file = open_articles(args.input_file, columns, "test"), Path(args.output_file)
    rank, world_size = accelerator.process_index, accelerator.num_processes

    def read_parts() -> tuple[bytes, int | None]:
        parts = Parts(output_file, record, len(articles))  # which cuts off a torn last line
        return parts.done, parts.max_batch_tokens

    # On one process: all must deal out the same, and parts may grow once they are read.
    done, chosen = from_main_process(accelerator, read_parts)
    num_done = sum(done)
    if record["max_batch_tokens"] is None:
        # Batches decide on roundings: an earlier start has chosen for all that come after it, and
        # the process with the least memory for all others.
        chosen = chosen or choose_max_batch_tokens(model, decoding.num_beams)
        chosen = torch.tensor([chosen], device=accelerator.device)
        record["max_batch_tokens"] = accelerator.gather(chosen).min().item()
    most = 1 if one_by_one else record["max_batch_tokens"]
    if num_done:
        note(f"going on after {num_done:,} titles of an earlier run")
    stop.listen()

    # Lines are written as they come: should a node be lost, those of the others are not.
    def num_bytes() -> int:
        return sum(file.stat().st_size for file in part_files(output_file))

    before = num_bytes()
    nodes.on_loss(lambda: "after the titles that are there" if num_bytes() > before else None)
    progress_bar = tqdm(
        total=len(articles),
        initial=num_done,
        unit=" articles",
        bar_format=BAR,
        disable=not accelerator.is_main_process,
    )
    stopping = False  # not where all titles are there: then only joining their parts is left
    too_large = {}  # what did not fit into memory
    turn = 0
    with open(part_file(output_file, rank), "ab", buffering=0) as part:
        if part.tell() == 0:
            write_line(part, record)
        # Windows and their batches are those of the whole file, whatever is done already and
        # however many processes there are: the rounding of a title depends on its batch.
        for start in range(0, len(articles), WINDOW):
            window = range(start, min(start + WINDOW, len(articles)))
            if all(done[start : window.stop]):
                continue
            chunk = articles[list(window)]
            prompts = [example.ids for example in prompt.encode_all(chunk["text"])]
            check_ids(model, source["model"], max(map(max, prompts)))
            batches = make_batches(prompts, decoding.room, most)
            if args.engine == "continuous":  # all that is missing is one batch, of every process
                left = [row for batch in batches for row in batch if not done[start + row]]
                batches = [left[n::world_size] for n in range(world_size)]
            for batch in batches:
                missing = {row for row in batch if not done[start + row]}
                # In turn, for the first batches are the longest.
                turn += bool(missing)
                if not missing or turn % world_size != rank:
                    if accelerator.is_main_process:
                        progress_bar.update(len(missing))  # the others are about as far
                    continue
                batch = {row: prompts[row] for row in batch}
                with accelerator.autocast():
                    if args.engine == "batched":
                        titles = write_batch(model, prompt, batch, decoding, too_large)
                    else:
                        titles = write_continuously(
                            model, prompt, batch, decoding, chunk["id"], most, stop.asked
                        )
                    for row, title in titles:
                        if row in missing:
                            line = {"index": start + row, "id": chunk["id"][row]} | asdict(title)
                            write_line(part, line, len(articles) - num_done)
                            progress_bar.update(accelerator.is_main_process)
                if stop.asked():  # after a batch, so that every start gets on
                    break
            stopping = stop.asked()
            if stopping:
                break
    progress_bar.close()
    nodes.wait_for_all(stop.asked)  # as long as it takes: some have slower GPUs, or more to write
    if accelerator.reduce(torch.tensor(float(stopping), device=accelerator.device)).item():
        if accelerator.is_main_process:
            written = Parts(output_file, record, len(articles), world_size).num_done
            done = f"{written:,} of {len(articles):,} titles"
            by = stop.reason() or "another process"
            print(f"stopped by {by} after {done}; the same command goes on")
        accelerator.wait_for_everyone()  # torchrun ends the others once one has ended with 75
        accelerator.end_training()
        return STOPPED
    if accelerator.is_main_process:
        cut = Parts(output_file, record, len(articles), world_size).join()
        print(f"done: {len(articles):,} titles in {args.output_file}, {cut:,} cut by the limit")
    accelerator.wait_for_everyone()  # as at the end of train.py
    accelerator.end_training()
    return None


def generate_titles(
    model,
    prompt,
    articles: list[str],
    max_batch_tokens: int = 8192,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Title]]:
    """Yield `(index in articles, Title)`, longest articles first.

    Args:
        model: in evaluation mode, on its device; with or without an adapter.
        prompt: a `prompting.Prompt`.
        articles: their texts.
        max_batch_tokens: as in `make_batches`.
        stop_asked: looked at before each batch; once true, no more come.
    """
    decoding = Decoding(prompt.max_title_tokens)
    prompts = [example.ids for example in prompt.encode_all(articles)]
    too_large = {}
    for batch in make_batches(prompts, decoding.max_new_tokens, max_batch_tokens):
        if stop_asked():
            return
        batch = {row: prompts[row] for row in batch}
        yield from write_batch(model, prompt, batch, decoding, too_large)


def make_batches(prompts: list[list[int]], room: int, max_batch_tokens: int) -> list[list[int]]:
    """Return the indices of the prompts in batches, from long to short.

    Each gets `room` tokens for its title, or for all that are drawn. A batch holds
    `max_batch_tokens` tokens at the most, padding and titles included, and at least one article.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = []
    while order:
        size = max(1, max_batch_tokens // (len(prompts[order[0]]) + room))
        batches.append(order[:size])
        order = order[size:]
    return batches


def write_batch(
    model, prompt, batch: dict[int, list[int]], decoding: Decoding, too_large: dict
) -> Iterator[tuple[int, Title]]:
    """Yield row and title of each prompt in a batch, written together as far as memory allows.

    Where it does not, the batch is halved (`decoding.in_halves`). In fp32 that changes no title. In
    bf16 the roundings of a title go with its company, so that a run that met a full memory and one
    that did not may differ in a few titles; `--max_batch_tokens` decides it for both.
    """
    from decoding import in_halves

    def generate(rows: list[int]) -> list[tuple[int, Title]]:
        titles = generate_batch(model, prompt, [batch[row] for row in rows], decoding)
        return list(zip(rows, titles, strict=True))

    def size_of(rows: list[int]) -> int:
        return len(rows) * (max(len(batch[row]) for row in rows) + decoding.room)

    yield from in_halves(generate, list(batch), size_of, too_large)


def generate_batch(model, prompt, prompts: list[list[int]], decoding: Decoding) -> list[Title]:
    """Return a title for each prompt, by decoding all of them together."""
    from decoding import generate_ids

    base = without_peft(model)
    ends = prompt.ends(base.generation_config)
    options, count = decoding.options(), decoding.num_samples
    if count > 1:
        # Of the article itself, so that what is drawn goes neither with its place nor with others.
        first = [zlib.crc32(str(ids).encode()) for ids in prompts]
        options["seeds"] = [[seed + number for number in range(count)] for seed in first]
    new_ids = generate_ids(base, prompts, ends, decoding.max_new_tokens, **options)
    titles = [read_title(prompt, ends, ids) for ids in new_ids]
    if count == 1:
        return titles
    return [most_alike(titles[n : n + count]) for n in range(0, len(titles), count)]


def most_alike(titles: list[Title]) -> Title:
    """Return the title whose ROUGE-L with the others is highest; the first, if several are equal.

    Were each of the others in turn the true title, it would score best on average: minimum Bayes
    risk decoding (Kumar and Byrne 2004; with samples, arXiv 2108.04718). By the tokenizer of
    published scores, or where its a to z find nothing in them, by words of any script.
    """
    from rouge_score.rouge_scorer import RougeScorer

    from title_figures import import_rouge

    for tokenizer in import_rouge()[1].values():
        once = copy.copy(tokenizer)  # for each title, where the scorer would for each pair
        once.tokenize = functools.cache(tokenizer.tokenize)
        scorer, alike = RougeScorer(["rougeL"], tokenizer=once), [0.0] * len(titles)
        for (n, one), (m, other) in itertools.combinations(enumerate(titles), 2):
            score = scorer.score(one.title, other.title)["rougeL"].fmeasure
            alike[n] += score
            alike[m] += score
        if any(alike):
            break
    return titles[alike.index(max(alike))]


def write_continuously(
    model, prompt, batch: dict[int, list[int]], decoding: Decoding, names, most, stop_asked
) -> Iterator[tuple[int, Title]]:
    """Yield row and title of each prompt as it ends, by transformers' continuous batching.

    `names` are the articles' IDs by row, in which a complaint tells of what failed; `most` is the
    number of tokens that are under way at a time. The engine's thread knows of no autocast.
    """
    from decoding import generate_continuously

    base = without_peft(model)
    ends, rows = prompt.ends(base.generation_config), {names[row]: row for row in batch}
    requests = {names[row]: ids for row, ids in batch.items()}
    limit = decoding.max_new_tokens
    for name, ids in generate_continuously(base, requests, ends, limit, most, stop_asked):
        yield rows[name], read_title(prompt, ends, ids)


def without_peft(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_title(prompt, ends, new_ids: list[int]) -> Title:
    """Return the title in what `ends.cut` left of a model's new ids."""
    by_eos = new_ids[-1] in ends.ids
    text_ids = new_ids[:-1] if by_eos else new_ids
    return Title(
        title=prompt.decode(text_ids),
        raw=prompt.tokenizer.decode(
            text_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        num_new_tokens=len(new_ids),
        stopped_by="eos" if by_eos else "line" if ends.ended(new_ids) else "length",
    )


def load(source: dict, base_folder: Path, prompt, decoding: Decoding, timeout: float):
    """Return the accelerator, on its device the model that `find_model` found, and whether that one
    is to read its prompts one by one.

    A CPU that is slow in bf16 computes with a 4-bit base in fp32, and `source` says so then.
    """
    # These take seconds to import, which a complaint about the input should not have to wait for.
    with quick_imports():
        import torch
        from accelerate import Accelerator

        from decoding import can_share_prompts
        from modeling import (
            attach_adapter,
            check_kind,
            dequantize_base,
            fuse_lora,
            load_base,
            round_lora,
            skeleton,
        )
        from packing import padding_changes, use_packed_attention

    nf4 = source["weights"] in ("nf4", "nf4-bf16")
    dtype = torch.bfloat16 if source["precision"] == "bf16" else torch.float32
    notes = []  # told once nothing is left to complain of
    if dtype == torch.bfloat16 and not bf16_pays():
        if source["weights"] == "nf4":
            dtype, source["precision"], advice = torch.float32, "fp32", IN_FP32
        else:  # in bf16 as it was made or asked for: unasked, it does not take twice the memory
            advice = f"--base_weights {'nf4' if nf4 else 'fp32'} is faster"
        notes.append(f"{SLOW_IN_BF16}; {advice}")
    # As in training, which runs under autocast; a merged model should do as it would elsewhere.
    autocast = dtype == torch.bfloat16 and (nf4 or bool(source["adapter"]))
    accelerator = Accelerator(
        mixed_precision="bf16" if autocast else "no", kwargs_handlers=process_group(timeout)
    )
    keep_group()
    check_precision("--base_weights nf4", source["precision"], "give nf4-bf16 or fp32")
    longest = prompt.max_length - prompt.max_title_tokens + decoding.max_new_tokens
    weightless = skeleton(str(base_folder), dtype)
    check_kind(weightless, source["model"], nf4, bool(source["adapter"]), longest)
    model = load_base(str(base_folder), accelerator.device, dtype, nf4)
    if nf4:
        shapes = (p.quant_state.shape for p in model.parameters() if hasattr(p, "quant_state"))
        size = sum(map(math.prod, shapes)) * dtype.itemsize
        # On a CPU, each product dequantizes its layer: doing it once gives the same bits. (CUDA has
        # kernels for a few rows that round otherwise, so there it has to be asked for.)
        roomy = accelerator.device.type == "cpu" and size < free_memory(accelerator.device) / 2
        if source["weights"] == "nf4-bf16" or roomy:
            dequantize_base(model)
            notes.append(f"4-bit weights dequantized once, to {size / 2**30:.1f} GiB: faster")
    one_by_one = False
    if why_not := use_packed_attention(model, longest):
        prompts = "shorter prompts of a batch are padded"
        if one_by_one := padding_changes(model):
            prompts = "prompts are read one by one, for it says something else of padded ones"
        note(f"this model takes no packed rows ({why_not}); {prompts}")
    if decoding.num_samples > 1 and not can_share_prompts(model):  # copies would take the memory
        what = "titles of this model cannot share what it has read"
        raise UserError("--num_samples", what, "leave it out")
    if source["adapter"]:
        model = attach_adapter(model, source["adapter"])
        fuse_lora(model)
        if autocast:  # which would round the adapter for each token, to the same bits
            round_lora(model, dtype)
    for text in notes:
        note(text)
    return accelerator, model, one_by_one


def find_base(source: dict) -> Path:
    """Return the folder of the weights, checked to be those that the adapter was trained on."""
    folder = resolve_model_folder(source["model"])
    if source["adapter"]:
        check_base(folder, source["model"], source["base_fingerprint"], source["run_dir"])
    return folder


def make_prompt(source: dict, base_folder: Path, settings: dict) -> Prompt:
    """Return the prompt of these settings, which are checked if they are a run's own."""
    tokenizer = load_tokenizer(source["run_dir"] or str(base_folder))
    if "ids_sha256" in settings:
        return prompt_of_run(tokenizer, settings, source["run_dir"])
    return Prompt(tokenizer, **settings)


def decoding_of(args, settings: dict) -> Decoding:
    limit = args.max_new_tokens or settings["max_title_tokens"]
    if limit != settings["max_title_tokens"]:
        note_override("--max_new_tokens", limit, settings["max_title_tokens"])
    if args.min_new_tokens and args.min_new_tokens > limit:
        problem = f"above the {limit:,} tokens that a title may have"
        raise UserError(f"--min_new_tokens {args.min_new_tokens}", problem, "give less")
    names = ("num_beams", "min_new_tokens", "length_penalty", "no_repeat_ngram_size")
    chosen = {name: getattr(args, name) for name in (*names, "num_samples", "temperature")}
    return Decoding(limit, **{name: value for name, value in chosen.items() if value is not None})


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
            "adapter_step": None,
            "weights": weights,
            "precision": "fp32" if weights == "fp32" else "bf16",
            "prompt": None,
            "base_fingerprint": None,
        }
    run_dir, checkpoint = find_run(run_dir)
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
    adapter_step = None if merged else check_adapter(run_dir, checkpoint)
    precision = "bf16" if run_config["arguments"]["mixed_precision"] == "bf16" else "fp32"
    # What nf4 and nf4-bf16 trained on is the same, and the former takes a quarter of the memory.
    plain = merged or run_config["arguments"].get("base_weights") == "bf16"
    recorded = precision if plain else "nf4"
    weights = args.base_weights or recorded
    if weights.removesuffix("-bf16") != recorded:  # nf4-bf16 are the same numbers
        note_override("--base_weights", weights, recorded)
    return {
        "run_dir": run_dir,
        "model": model,
        "adapter": None if merged else checkpoint or run_dir,
        "adapter_step": adapter_step,
        "weights": weights,
        "precision": precision if weights in ("nf4", "nf4-bf16") else weights,
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


if __name__ == "__main__":
    run(main)
