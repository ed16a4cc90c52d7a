"""Folders of models and of runs: what must be in them, and the record that a run leaves.

A run folder describes itself: whoever has it can infer and merge without the command that made
it. It holds the adapter, the tokenizer, `run_config.json`, `metrics.jsonl`, a model card and
`checkpoints/`. A merged folder is an ordinary model folder, with what the run recorded in its own
`run_config.json`.
"""

import fcntl
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import libraries  # noqa: F401 (what it hides, it hides from all that know of a run)
from exit_codes import UserError, is_first_process, note, printable, writing

RUN_CONFIG = "run_config.json"
METRICS = "metrics.jsonl"
LOCK = ".lock"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"  # of a checkpoint, beside its adapter
# Arguments of train.py that the records of older runs do not have.
DEFAULTS_OF_NEWER_ARGUMENTS = {"prompt_loss_weight": 0.0, "cooldown_ratio": 0.0}
RECORDED = {"arguments": dict, "prompt": dict, "data": dict}
RECORDED |= {"kind": str, "base_model": str, "base_fingerprint": str, "articles_per_update": int}
PROMPT_SETTINGS = {"template": str, "apply_chat_template": bool, "ids_sha256": str}
PROMPT_SETTINGS |= {"max_length": int, "max_title_tokens": int}
# Said, not left out: without the first, transformers asks at the terminal whether to run the code
# that a model brings, and takes a "y" that was meant for something else.
OWN_FILES_ONLY = {"trust_remote_code": False, "local_files_only": True}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
TOKENIZER_FILES += (CHAT_TEMPLATE, "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
GENERATION_CONFIG = "generation_config.json"
SAMPLED_BYTES = 1 << 20  # of each weight file that go into its fingerprint


def check_model_folder(name: str, run_dir: str | None = None) -> None:
    """Refuse, before anything heavy is imported, a name that cannot be a model.

    `run_dir` is the run whose record gives the name, if it was not the user.

    Raises:
        UserError: a path that is not there, or a folder without config or whole safetensors.
    """
    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            if run_dir:
                raise UserError(
                    run_dir,
                    f"its base is not at {name} any more",
                    "say where it lies now with --model_name_or_path",
                )
            raise UserError(name, "there is no such model folder", "check the path")
        return  # owner/name: the Hub's, or its local cache's, to find
    if not (folder / "config.json").is_file():
        raise UserError(name, "no config.json in this folder", "give the folder of a model")
    config = _read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("transformers_weights"):
        raise UserError(
            folder / "config.json",
            "transformers would load the weights that transformers_weights names, unasked",
            "remove that line, and give a file of weights its usual name",
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            name,
            "no *.safetensors weights in this folder",
            "convert the model to safetensors (pickled weights are never loaded)",
        )
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            name,
            "transformers would load the adapter beside this model, or another base, unasked",
            f"remove {ADAPTER_CONFIG}, or give the base and the adapter's run folder",
        )
    for file in weight_files(folder):
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Refuse a file of weights that is cut off or something else, by its header and its size.

    Raises:
        UserError: as said.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(file, "rb"), safe_open(file, framework="np"):
            pass
    except PermissionError as error:  # of which safetensors says that there is no such file
        raise UserError(file, f"cannot be read ({error.strerror})", "ask its owner") from None
    except (OSError, SafetensorError) as error:
        raise UserError(file, f"not whole ({error})", "copy or download it again") from None


def find_run(name: str) -> tuple[str, str | None]:
    """Return the folder of a run, and the checkpoint of it that `name` is; None if it is the run's.

    Raises:
        UserError: it lies among the checkpoints of a run, and is none.
    """
    folder = Path(name).resolve()  # the name may be "."
    run_dir = folder.parent.parent
    if folder.parent.name != "checkpoints" or not (run_dir / RUN_CONFIG).is_file():
        return name, None
    if not (folder.is_dir() and re.fullmatch(r"step-\d+", folder.name)):
        raise UserError(
            name, "no whole checkpoint", f"give a folder step-NNNNNN of {folder.parent}"
        )
    return str(run_dir), name if Path(name).name == folder.name else str(folder)


def check_adapter(run_dir: str, checkpoint: str | None) -> int | None:
    """Refuse the adapter of a run, or of a checkpoint, that is not there or damaged.

    Returns:
        The number of updates that made it, if that was recorded.

    Raises:
        UserError: as said.
    """
    if checkpoint:
        return read_state(Path(checkpoint))["completed_steps"]
    if not Path(run_dir, ADAPTER_WEIGHTS).is_file():
        raise UserError(
            run_dir,
            f"no {ADAPTER_WEIGHTS} in it",
            "let training finish first, or give one of its checkpoints",
        )
    check_safetensors(Path(run_dir, ADAPTER_WEIGHTS))
    if not Path(run_dir, ADAPTER_CONFIG).is_file():
        raise UserError(run_dir, f"no {ADAPTER_CONFIG} in it", "restore the file")
    _read_json(Path(run_dir, ADAPTER_CONFIG))
    return read_run_config(run_dir).get("adapter_step")


def read_adapter_config(adapter_dir: str) -> tuple[Path, dict]:
    """Return what PEFT, or for a checkpoint the record of its run, says of an adapter; in PEFT's
    words, after the file that says it."""
    run_dir, checkpoint = find_run(adapter_dir)
    if checkpoint is None:
        file = Path(adapter_dir, ADAPTER_CONFIG)
        return file, json.loads(file.read_text(encoding="utf-8"))
    names = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    names |= {"target_modules": "target_modules"}
    arguments = read_run_config(run_dir)["arguments"]
    config = {name: arguments.get(argument) for name, argument in names.items()}
    return Path(run_dir, RUN_CONFIG), {"peft_type": "LORA", "task_type": "CAUSAL_LM"} | config


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step-{step:06d}"


def read_state(checkpoint: Path) -> dict:
    """Return the content of a checkpoint's state.json, having checked all of its files.

    Raises:
        UserError: one is missing, torn, or not what was written.
    """
    try:
        content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or sealed(content) != content:
            raise ValueError(f"{STATE} was changed")
        if checkpoint.name != checkpoint_folder(Path(), content["completed_steps"]).name:
            raise ValueError(f"{STATE} is that of update {content['completed_steps']}")
        if content["best_step"] is not None:  # it names a folder
            checkpoint_folder(Path(), content["best_step"])
        for name in (ADAPTER_WEIGHTS, OPTIMIZER):
            if file_sha256(checkpoint / name) != content["files"][name]:
                raise ValueError(f"{name} is torn or was changed")
    except OSError as error:
        problem = f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, TypeError, KeyError) as error:
        problem = str(error)
    else:
        return content
    raise UserError(checkpoint, f"damaged checkpoint ({problem})", "give another one")


def sealed(content: dict) -> dict:
    """Return the content of a state.json with the hash of all else in it."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_links(paths: Iterable[Path]) -> None:
    """Refuse symbolic links where files are written: what they point to would be changed.

    Raises:
        UserError: as said.
    """
    for path in paths:
        if path.is_symlink():
            raise UserError(
                path, "a symbolic link, which may lead anywhere", "put what it names in its place"
            )


def check_output_dir(output_dir: str, own_files: tuple[str, ...] = (LOCK,)) -> None:
    """Refuse a folder that holds anything but `own_files`, or a place that cannot be written.

    Raises:
        UserError: as said.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(output_dir, "this is a file, not a folder", "give another --output_dir")
    # A lock file stays where its run was killed.
    if folder.is_dir() and (others := {p.name for p in folder.iterdir()} - set(own_files)):
        raise UserError(
            output_dir,
            f"the folder is not empty (it holds {sorted(others)[0]})",
            "remove it or give another --output_dir",
        )
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(output_dir, f"{parent} cannot be written", "give another --output_dir")


def read_run_config(run_dir: str) -> dict:
    """Return the record that train.py or merge.py left in a folder.

    Raises:
        UserError: there is none, it is not JSON, or it is the record of something else.
    """
    file = Path(run_dir, RUN_CONFIG)
    if not file.is_file():
        raise UserError(run_dir, f"no {RUN_CONFIG} in it", "give the output folder of train.py")
    record = _read_json(file)
    if not isinstance(record, dict) or not RECORDED.keys() <= record.keys():
        raise UserError(
            str(file), "not the record of a run", "give a folder that train.py or merge.py made"
        )
    for name, kind in RECORDED.items():
        value = record[name]
        fits = isinstance(value, kind)
        if fits and name == "prompt":
            fits = all(type(v) is PROMPT_SETTINGS.get(key) for key, v in value.items())
        if fits and name == "data":
            fits = all(isinstance(v, dict) and type(v.get("rows")) is int for v in value.values())
        if not fits:
            raise UserError(str(file), f"'{name}' holds what no run writes", "restore the file")
    return record


def _read_json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(file, f"not valid JSON ({error})", "restore the file") from None


def share(file: Path) -> None:
    """Let others read a file as they may read what else is written: safetensors keeps its own from
    them, whatever the umask."""
    mask = os.umask(0o077)
    os.umask(mask)
    with suppress(OSError):  # some disks have no modes
        file.chmod(0o666 & ~mask)


def write_json(path: Path, content: dict) -> None:
    """Write JSON under a temporary name, flush and rename it: no reader ever sees half of it, not
    even after a crash of the machine."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # were it a link, what it names would be overwritten
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A file's name need not be UTF-8: what is not stands there as JSON's own escapes.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    flush(temporary)
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide what a run computes."""
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in PACKAGES
    }


def commit() -> str | None:
    """Return the commit of these scripts, marked if files differ from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        answer = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
        return answer.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_tracker(report_to: str) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UserError: as said.
    """
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(
            f"--report_to {report_to}", "it is not installed", f"run: pip install {report_to}"
        )


def make_run_config(
    args, prompt, base_folder: Path, checked: dict, articles_per_update: int
) -> dict:
    """Return the record of a training run: all that infer and merge need, and how it came about."""
    return {
        "kind": "adapter",
        "arguments": vars(args),
        "base_model": args.model_name_or_path,
        "base_fingerprint": model_fingerprint(base_folder),
        "prompt": prompt.settings(),
        "data": {split: vars(file) for split, file in checked.items()},
        "articles_per_update": articles_per_update,
        "versions": versions(),
        "commit": commit(),
    }


def write_run(output_dir: Path, run_config: dict, tokenizer, state: dict) -> None:
    """Write what is known before the first update; keep of older metrics what stays true.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        if (output_dir / ADAPTER_WEIGHTS).exists():  # of a run that ended; it stays until the next
            before = read_run_config(str(output_dir))
            run_config["adapter_step"] = before.get("adapter_step")
            run_config["memory"] = before.get("memory", run_config["memory"])
        write_json(output_dir / RUN_CONFIG, run_config)
        tokenizer.save_pretrained(output_dir)
        metrics = output_dir / METRICS
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        temporary = metrics.with_suffix(".tmp")
        temporary.write_text("".join(line for line in lines if _still_true(line, state)))
        flush(temporary)
        os.replace(temporary, metrics)


def _still_true(line: str, state: dict) -> bool:
    """Return whether a row of metrics.jsonl is of before the state that a run goes on from."""
    if not line.endswith("\n"):  # torn
        return False
    try:
        row = json.loads(line)
        return row["step"] <= state["evaluated_steps" if "eval_loss" in row else "completed_steps"]
    except (ValueError, TypeError, KeyError):  # damaged
        return False


def read_metrics(run_dir: str) -> list[dict]:
    """Return the rows of metrics.jsonl, finite numbers or None; no row of a merged folder.

    A row that is torn or damaged is left out, for what is left can be shown all the same.
    """
    file, rows = Path(run_dir, METRICS), []
    if not file.is_file():
        return rows
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and type(row.get("step")) is int:
                    finite = {k: type(v) in (int, float) and abs(v) < 1e15 for k, v in row.items()}
                    rows.append({k: v if finite[k] else None for k, v in row.items()})
    return [row for row in rows if row["step"] is not None]


def log_metrics(accelerator, output_dir: Path, metrics: dict) -> None:
    """Append a row to metrics.jsonl and hand it to the trackers, on the main process."""
    if accelerator.is_main_process:
        # JSON knows no NaN: what is not a number is null.
        row = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        with (
            writing(output_dir / METRICS, len(line)),
            open(output_dir / METRICS, "a", encoding="utf-8") as stream,
        ):
            stream.write(line)
    accelerator.log(metrics, step=metrics["step"])


def log_titles(accelerator, titles: list[tuple[str, str]], step: int) -> None:
    """Hand written and true titles to the trackers as a table, on the main process."""
    columns = ("written", "true")
    rows = [[printable(title) for title in pair] for pair in titles]
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log_table("eval_titles", columns=list(columns), data=rows, step=step)
        else:  # TensorBoard shows text as Markdown
            cells = [[html.escape(c).replace("|", "&#124;") for c in row] for row in rows]
            lines = [columns, ["--"] * len(columns), *cells]
            text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            tracker.log({"eval_titles": text}, step=step)


def flush(path: Path) -> None:
    """Have a file or folder on the disk before going on, so that a crash cannot lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(file: Path, what: str):
    """Keep a second run away from what this one writes, by a lock on `file`, which goes with it.

    The system drops the lock when the process ends, however it ends. Only the first process takes
    it. Folders that are made for the file and still empty at the end are removed again.

    Raises:
        UserError: another run holds it, or the file cannot be written.
    """
    if not is_first_process():
        yield
        return
    made = [folder for folder in file.absolute().parents if not folder.exists()]
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(file, what)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)
        for folder in made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def _lock(file: Path, what: str) -> int:
    """Return a descriptor that holds the lock of a file, which says who holds it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                what, f"another run is writing there ({holder})", "wait for it, or write elsewhere"
            ) from None
        except OSError as error:  # some network file systems have none
            note(f"no lock on {file} ({error.strerror}); do not start a second run there")
        # The holder may have removed the file after it was opened here: that lock locks nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
                return descriptor
        os.close(descriptor)


def resolve_model_folder(name: str) -> Path:
    """Return the local folder of a model: itself, or the snapshot in the Hub's cache.

    Raises:
        UserError: a Hub id that can be had neither from the Hub nor from its cache.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import constants, snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    others = ["*/*", "consolidated*"]  # the same weights in another format
    try:
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=others)
    except Exception as error:  # gated, unknown, no network: the Hub client says which
        if constants.HF_HUB_OFFLINE:  # it has looked no further than its cache
            raise UserError(
                name,
                "neither a folder here nor in the Hub's cache, and HF_HUB_OFFLINE is set",
                "download it where there is a network, or give --model_name_or_path its folder",
            ) from None
        raise UserError(
            name,
            f"neither a folder here nor a model to be had from the Hub ({first_line(error)})",
            "check the name and your access, or download it and give the folder",
        ) from None
    check_model_folder(folder)  # a download may have broken off, or hold pickles only
    return Path(folder)


def model_fingerprint(folder: Path) -> str:
    """Return a hash that tells one base model from another without reading all of it.

    Of each weight file it takes the size and the first and last megabyte: shapes, dtypes and some
    weights. (A whole 7B is 13.5 GB, half a minute of reading at every start.)
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in filter(Path.is_file, weight_files(folder)):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLED_BYTES))
            stream.seek(max(0, size - SAMPLED_BYTES))
            digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads the weights from; folders may hold copies in other
    formats, and an index of shards that are there no more.

    Raises:
        UserError: an index that is needed, and is none or names other files.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # Such a file may be a pickle, or lie elsewhere: transformers joins path and name.
        wrong = [f for f in files if not f.endswith(".safetensors") or Path(f).name != f]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(index, f"no index of weights ({error})", "restore the file") from None
    if wrong:
        raise UserError(
            index, f"{min(wrong)!r} is no *.safetensors of this folder", "restore the file"
        )
    return [folder / name for name in sorted(files)]


def tokenizer_sha256(folder: Path, base_folder: Path) -> str:
    """Return a hash of what tokenizers read in a folder, which decides how text becomes ids, and of
    a base's generation config, which names what ends a title."""
    digest = hashlib.sha256()
    files = [folder / name for name in TOKENIZER_FILES] + [base_folder / GENERATION_CONFIG]
    for file in filter(Path.is_file, files):
        digest.update(f"{file.name}:{file_sha256(file)}".encode())
    return digest.hexdigest()


def check_base(folder: Path, name: str, expected: str, run_dir: str) -> None:
    """Refuse a base whose fingerprint is not the one that a run recorded.

    Raises:
        UserError: as said.
    """
    if model_fingerprint(folder) != expected:
        raise UserError(
            name,
            f"this is not the base that {run_dir} was trained on",
            "give that one with --model_name_or_path",
        )


def file_sha256(file: Path) -> str:
    """Return the hash of a file's whole content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def note_override(flag: str, used, recorded) -> None:
    """Say that a flag wins over what the run folder says."""
    note(f"{flag} {used!r} overrides {recorded!r} of the run folder")


def first_line(error: Exception) -> str:
    """Return what an error says in its first line, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
