"""Predictions on disk: a part for each process while titles are written, CSV and JSONL at the end.

A run that was stopped finds its titles in the parts, whatever the number of processes. Every file
begins with, or has beside it, the settings that its titles were made with.
"""

import csv
import glob
import json
import os
import re
from array import array
from contextlib import ExitStack
from pathlib import Path

from exit_codes import UserError, writing

PART = re.compile(r"\.part-[0-9]+$")  # ends the stem of a part's name


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

    Commit and paths may differ: what lies there is compared by its hashes. So may the precision,
    which depends on the machine where adapter and kind of weights are the same, and the tokens of a
    batch where the record leaves them open.
    """
    free = dict.fromkeys(("commit", "model", "adapter", "adapter_step", "precision"))
    if record.get("max_batch_tokens") is None:
        free["max_batch_tokens"] = None

    def what_counts(settings: dict) -> dict:
        return settings | free | {"input": settings["input"] | {"path": None}}

    try:
        return what_counts(json.loads(line)) == what_counts(record)
    except (ValueError, TypeError, KeyError):
        return False


def is_record(line: str | bytes) -> bool:
    """Return whether a line is what a file of titles begins with."""
    try:
        return "input" in dict(json.loads(line))
    except (ValueError, TypeError):
        return False


def part_file(output_file: Path, rank: int) -> Path:
    """Return where a process keeps what it has written so far."""
    return output_file.with_suffix(f".part-{rank}.jsonl")


def part_files(output_file: Path, ranks: int = 0) -> list[Path]:
    """Return the parts that there are, of any number of processes.

    Those of the first `ranks` are looked for by name too: what another node has just made, the
    listing of a network disk may not yet have.
    """
    found = set(output_file.parent.glob(f"{glob.escape(output_file.stem)}.part-*.jsonl"))
    found |= {file for rank in range(ranks) if (file := part_file(output_file, rank)).exists()}
    return sorted(file for file in found if PART.search(file.stem))


def own_files(output_file: Path) -> list[Path]:
    """Return the files that are written, and removed, on the way to an output file and at its end,
    among those that there are.

    Raises:
        UserError: it has the name of another one's part.
    """
    if PART.search(output_file.stem):
        raise UserError(output_file, "parts of titles are called so", "give another name")
    details = output_file.with_suffix(".jsonl")
    return [output_file, details, output_file.with_suffix(".lock"), *part_files(output_file)]


def write_line(part, content: dict, num_left: int = 1) -> None:
    """Append one of `num_left` lines of JSON to a part, an unbuffered file in binary mode.

    Raises:
        UserError: the disk is full, or cannot be written for another reason.
    """
    line = (json.dumps(content, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    with writing(part.name, num_left * len(line)):
        while line:
            line = line[part.write(line) :]


class Parts:
    """What the parts of an output file hold so far: where the line of each article stands.

    A torn last line is cut off, and so are settings that nothing was written with. Memory does not
    grow with the titles, only by 10 bytes an article.

    Raises:
        UserError: a part was made with other settings, or is damaged.
    """

    def __init__(self, output_file: Path, record: dict, num_articles: int, ranks: int = 0):
        self.output_file, self.record = output_file, record
        self.files = part_files(output_file, ranks)
        self.offsets = array("q", [-1]) * num_articles  # of the lines in their files
        self.numbers = array("h", [0]) * num_articles  # of the files
        self.max_batch_tokens = None  # that an earlier start has chosen
        for number, file in enumerate(self.files):
            end = 0
            with file.open("rb") as stream:
                for line in stream:
                    if not line.endswith(b"\n"):  # torn
                        break
                    if end:
                        index = self._index(file, line)
                        self.offsets[index], self.numbers[index] = end, number
                    elif same_settings(line, record):
                        chosen = json.loads(line).get("max_batch_tokens")
                        if type(chosen) is int and chosen > 0:
                            self.max_batch_tokens = chosen
                    elif stream.readline().endswith(b"\n") or not is_record(line):
                        raise UserError(
                            file,
                            "an unfinished run had other settings",
                            "remove it, or go on with those",
                        )
                    else:
                        break
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

    @property
    def done(self) -> bytes:
        """Which articles are done, 1 or 0 for each."""
        return bytes(offset >= 0 for offset in self.offsets)

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
