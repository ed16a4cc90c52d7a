"""Articles and titles in files: what is read and what is refused.

Every row is checked before any model is loaded, and nothing is repaired: a row that cannot be
used is named by file and row. Files are streamed: what memory holds of them does not grow with
their rows, but for the IDs, which are remembered while a file is checked.
"""

import csv
import gzip
import hashlib
import json
import re
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exit_codes import UserError, WriteError, note

SUFFIXES = (".csv", ".csv.gz", ".json", ".jsonl", ".parquet")
HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name or owner/name:split
CHUNK = 1 << 16  # characters of a JSON array that are read at a time
JSON_SPACE = re.compile(r"[ \t\n\r]*")
BLANK = object()  # a line with nothing on it
SLOW = 5  # seconds; what takes longer over a file says so
csv.field_size_limit(2**31 - 1)  # characters; the default refuses articles of more than 128 KiB


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read. None: not wanted. The ID is optional in every file."""

    text: str | None = "text"
    title: str | None = "titles"
    id: str | None = "ID"

    @property
    def required(self) -> list[str]:
        return [name for name in (self.text, self.title) if name is not None]


@dataclass(frozen=True)
class Checked:
    """What `check_articles` found in a file."""

    path: str
    rows: int
    sha256: str  # of all columns that are read, so that a resumed run can tell its data changed
    has_ids: bool  # False: an ID is the row's index


def check_articles(
    path: str, columns: Columns, split: str = "train", empty_titles: bool = False, survey=None
) -> Checked:
    """Read a whole file once and refuse it at the first row that cannot be used.

    `split` is the split of a Hub dataset that names none. `empty_titles` lets empty titles pass
    (a model may well predict one). `survey`, a `hygiene.Survey`, is shown every row that passes.

    Raises:
        UserError: the file or the Hub dataset cannot be read, has no row, lacks a column or has
            one twice, or a row holds an empty field, an ID that stood before, or broken text.
    """
    digest, rows, ids, start = hashlib.sha256(), 0, set(), time.perf_counter()
    for row, fields in _numbered_rows(path, columns, split):
        where = f"{path}:{row}"
        for name in columns.required:
            if not fields[name].strip() and not (empty_titles and name == columns.title):
                raise UserError(
                    where, f"the column '{name}' is empty", "fill it in or remove the row"
                )
        identity = fields.get(columns.id)
        if identity is not None and not identity.strip():
            raise UserError(where, f"the column '{columns.id}' is empty", "fill it in")
        if "\r" in (identity or ""):  # which the csv module leaves unquoted, and reads as a new row
            raise UserError(where, f"the column '{columns.id}' has a line break", "remove it")
        if rows and (identity is not None) != bool(ids):
            raise UserError(where, f"only some rows have the column '{columns.id}'", "fill it in")
        if identity is not None:
            if identity in ids:
                raise UserError(
                    where, f"{columns.id} {_shown(identity)} is there twice", "make it unique"
                )
            ids.add(identity)
        if survey is not None:
            survey.add(row, fields[columns.text], fields[columns.title])
        digest.update(json.dumps(list(fields.values())).encode())
        rows += 1
    if rows == 0:
        raise UserError(path, "the file has no rows", "give a file with at least one article")
    if columns.id not in (None, "ID") and not ids:  # asked for by name, so a slip in it is one
        raise UserError(path, f"no column '{columns.id}'", "correct the name of the ID column")
    _note_time(path, rows, "checked", start)
    return Checked(path, rows, digest.hexdigest(), bool(ids))


def iterate_articles(path: str, columns: Columns, split: str = "train") -> Iterator[dict]:
    """Yield `{"id", "text", "title"}` of each row in file order.

    Where the file has no IDs, the ID is the row's index from 0, as in the challenge's test file.
    """
    for index, (_, fields) in enumerate(_numbered_rows(path, columns, split)):
        yield {
            "id": fields.get(columns.id, str(index)),
            "text": fields.get(columns.text, ""),
            "title": fields.get(columns.title, ""),
        }


def open_articles(path: str, columns: Columns, split: str = "train"):
    """Return the rows of `iterate_articles` as a memory-mapped `datasets.Dataset`.

    Its Arrow file lies in a temporary folder, and has no name any more once it is written, so that
    on a local disk it goes with the process however that ends: a cache that outlives the run can
    only be stale. It takes about as much disk as the text; `TMPDIR` says where. Its pages count as
    resident once read, but the kernel takes them back when memory is short.

    Raises:
        WriteError: there is no room for it.
    """
    import pyarrow
    from datasets import Dataset

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="manchette-", ignore_cleanup_errors=True) as folder:
        file = str(Path(folder, "articles.arrow"))
        # Written here and not by `Dataset.from_generator`, which takes twice as long.
        schema = pyarrow.schema({name: pyarrow.large_string() for name in ("id", "text", "title")})
        try:
            with pyarrow.ipc.new_stream(file, schema) as stream:
                for rows in _batches(iterate_articles(path, columns, split)):
                    stream.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))
        except OSError as error:
            raise WriteError(  # each process has a copy of its own, and one may be too much
                Path(folder).parent,
                f"no room for a copy of {path} ({error})",
                "free some, or set TMPDIR to another disk",
            ) from None
        dataset = Dataset.from_file(file)
    _note_time(path, len(dataset), "copied for random access", start)
    return dataset


def evenly_spaced(rows: int, most: int) -> list[int]:
    """Return the indices of all rows, or of `most` of them, spread evenly."""
    count = min(rows, most)
    return [number * rows // count for number in range(count)]


def _batches(rows: Iterator[dict]) -> Iterator[list[dict]]:
    """Yield the rows in lists that are bounded in memory: an article may have megabytes."""
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += len(row["text"])
        if len(batch) == 1000 or characters > 1 << 24:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _note_time(path: str, rows: int, what: str, start: float) -> None:
    if (seconds := time.perf_counter() - start) >= SLOW:
        note(f"{path}: {rows:,} rows {what} in {seconds:.0f} s")


def _numbered_rows(path: str, columns: Columns, split: str) -> Iterator[tuple[int, dict]]:
    """Yield each row's number, as a spreadsheet or an editor shows it, and its wanted fields."""
    file = Path(path)
    if file.is_file():
        suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s)), None)
        if suffix is None:
            raise UserError(path, "unknown kind of file", f"give one of {', '.join(SUFFIXES)}")
        rows = {"csv": _csv_rows, "gz": _csv_rows, "parquet": _parquet_rows}.get(
            suffix.rpartition(".")[2], _json_rows
        )(path)
    elif HUB_DATASET.fullmatch(path) and not file.exists() and not path.endswith(SUFFIXES):
        rows = _hub_rows(path, split)
    elif file.is_dir():
        raise UserError(path, "this is a folder, not a file", "give a file of articles")
    else:
        raise UserError(path, "there is no such file", "check the path")

    for row, fields in rows:
        where = f"{path}:{row}"
        for name in columns.required:
            if name not in fields:
                raise UserError(
                    where,
                    f"no column '{name}' among {', '.join(map(_shown, fields)) or 'none'}",
                    "rename it in the file or name it on the command line",
                )
        wanted = {name: fields[name] for name in columns.required}
        if columns.id in fields:
            wanted[columns.id] = fields[columns.id]
        for name, value in wanted.items():
            if name == columns.id and type(value) is int:
                wanted[name] = str(value)
            elif not isinstance(value, str):
                raise UserError(
                    where,
                    f"the column '{name}' holds {_shown(value)}, not text",
                    "make it a string",
                )
            elif "\0" in value:
                raise UserError(where, f"the column '{name}' holds a NUL byte", "remove it")
            try:
                wanted[name].encode()
            except UnicodeEncodeError:
                raise UserError(
                    where, f"the column '{name}' is not UTF-8", "convert the file to UTF-8"
                ) from None
        yield row, wanted


def _shown(value) -> str:
    """Return a value as a complaint quotes it: a whole article would hide what is wrong."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _open_text(path: str):
    # surrogateescape lets a broken byte reach its row, which is then named in the complaint.
    opener = gzip.open if path.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_rows(path: str) -> Iterator[tuple[int, dict]]:
    """Rows are counted as a spreadsheet does: the header is row 1."""
    row = 0
    try:
        with _open_text(path) as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            row = 1
            _refuse_doubled(f"{path}:1", header)
            if len(header) == 1 and (found := next((d for d in ";\t|" if d in header[0]), None)):
                raise UserError(
                    f"{path}:1", f"columns separated by {found!r}", "separate them by commas"
                )
            for row, fields in enumerate(reader, start=2):
                if not fields:  # a blank line, as at the end of many files
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"{path}:{row}",
                        f"{len(fields)} fields where the header has {len(header)}",
                        "quote the fields that hold commas or newlines",
                    )
                yield row, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}:{row + 1}", f"not valid CSV ({error})", "mend the quotes"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(path, f"cannot be read ({error})", "check the file") from None


def _refuse_doubled(where: str, names: list[str]) -> None:
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(where, f"doubled column {_shown(doubled[0])}", "rename one")


def _json_rows(path: str) -> Iterator[tuple[int, dict]]:
    """JSON Lines, or one array of objects; counted by line or by element from 1."""
    row = 0
    try:
        with _open_text(path) as stream:
            while (first := stream.read(1)).isspace():
                pass
            if first == "[":
                records = _json_array(stream)
            else:
                stream.seek(0)
                records = (json.loads(line) if line.strip() else BLANK for line in stream)
            for row, record in enumerate(records, start=1):
                if record is BLANK:
                    continue
                if not isinstance(record, dict):
                    raise UserError(f"{path}:{row}", "not a JSON object", 'write {"text": ...}')
                yield row, record
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({getattr(error, 'msg', error)})"
        raise UserError(f"{path}:{row + 1}", problem, "mend it") from None
    except OSError as error:
        raise UserError(path, f"cannot be read ({error})", "check the file") from None


def _json_array(stream) -> Iterator:
    """Yield the elements of an array whose `[` has been read, a piece of the file at a time."""
    decoder, buffer, start = json.JSONDecoder(), "", 0

    def next_character() -> str:
        nonlocal buffer, start
        while (start := JSON_SPACE.match(buffer, start).end()) == len(buffer):
            buffer, start = stream.read(CHUNK), 0
            if not buffer:
                return ""
        return buffer[start]

    ended = next_character() == "]"
    while not ended:
        next_character()
        while True:
            try:
                element, start = decoder.raw_decode(buffer, start)
                break
            except json.JSONDecodeError as error:  # wrong, or only cut off by the buffer's end?
                cut = error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated")
                more = stream.read(max(CHUNK, len(buffer) - start)) if cut else ""
                if not more:
                    raise
                buffer, start = buffer[start:] + more, 0
        yield element
        if (separator := next_character()) not in ("]", ","):
            raise json.JSONDecodeError("Expecting ',' delimiter", buffer, start)
        ended = separator == "]"
        start += separator == ","
    start += 1
    if next_character():
        raise json.JSONDecodeError("Extra data", buffer, start)


def _parquet_rows(path: str) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        # Memory-mapped: else pyarrow reads a whole row group at once, often the whole file.
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            _refuse_doubled(path, names)
            for batch in file.iter_batches(batch_size=256):
                for values in zip(*batch.columns, strict=True):
                    row += 1
                    yield row, {n: v.as_py() for n, v in zip(names, values, strict=True)}
    except UnicodeDecodeError:
        raise UserError(f"{path}:{row}", "not UTF-8", "convert the file to UTF-8") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(path, f"cannot be read ({error})", "check the file") from None


def _hub_rows(path: str, split: str) -> Iterator[tuple[int, dict]]:
    from datasets import load_dataset

    name, _, named_split = path.partition(":")
    try:
        dataset = load_dataset(name, split=named_split or split)
    except Exception as error:  # the Hub client has a dozen kinds of refusal, offline among them
        raise UserError(
            path,
            f"neither a file here nor a dataset to be had from the Hub ({error})",
            "check the name, or download it and give the file",
        ) from None
    yield from enumerate(dataset, start=1)
