"""predictions.py: the parts that a run leaves, and the two files that they are joined to.

python -m pytest tests/test_predictions.py
"""

import errno
import json
import os

import pytest

import predictions
from exit_codes import UserError, WriteError
from predictions import (
    Parts,
    is_complete,
    is_record,
    own_files,
    part_file,
    part_files,
    same_settings,
    write_line,
)

RECORD = {"model": "m", "max_batch_tokens": None, "input": {"path": "a.csv", "sha256": "5f"}}
OTHER = RECORD | {"model": "m", "decoding": "5 beams"}


def row(index: int, **changes) -> dict:
    title = {"id": f"a{index}", "title": f"Été {index}", "raw": f" Été {index}"}
    return title | {"num_new_tokens": 3, "stopped_by": "eos"} | changes


def write_part(output_file, rank: int, *indices: int, record=RECORD, **changes):
    lines = [record, *({"index": index} | row(index, **changes) for index in indices)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    part_file(output_file, rank).write_text(text, encoding="utf-8")


@pytest.fixture
def output_file(tmp_path):
    return tmp_path / "out.csv"


# ---------------------------------------------------------------------- which files are its own


def test_parts_are_told_from_files_of_like_names(output_file):
    own = [part_file(output_file, rank) for rank in (0, 3, 10, 117)]
    others = ["out.part-one.jsonl", "out.part-1.old.jsonl", "out.part-.jsonl", "out.part-1.csv"]
    others += ["out.part-1x.jsonl", "about.part-1.jsonl", "out2.part-1.jsonl"]
    for file in [*own, *(output_file.with_name(name) for name in others)]:
        file.touch()
    assert part_files(output_file) == part_files(output_file, ranks=8) == sorted(own)


def test_parts_come_in_the_same_order_however_a_folder_lists_them(output_file, monkeypatch):
    listed = [part_file(output_file, rank) for rank in (2, 0, 1)]
    monkeypatch.setattr(type(output_file), "glob", lambda *_: listed)
    assert part_files(output_file) == sorted(listed)


def test_a_name_is_no_pattern(tmp_path):
    output_file = tmp_path / "p[12].csv"
    part_file(tmp_path / "p1.csv", 0).touch()
    assert part_files(output_file) == []
    part_file(output_file, 0).touch()
    assert part_files(output_file) == [part_file(output_file, 0)]


def test_all_that_a_run_writes_and_removes_is_its_own(output_file):
    write_part(output_file, 0, 0)
    names = ["out.csv", "out.jsonl", "out.lock", "out.part-0.jsonl"]
    assert [file.name for file in own_files(output_file)] == names
    with pytest.raises(UserError, match="parts of titles are called so; give another name"):
        own_files(part_file(output_file, 12))


# ---------------------------------------------------------------------- settings


def test_titles_without_their_settings_are_those_of_others(output_file):
    assert not is_complete(output_file, RECORD)
    output_file.write_text("ID,titles\n")  # of another tool
    with pytest.raises(UserError, match=r"out.csv: there are predictions of other settings al"):
        is_complete(output_file, RECORD)
    output_file.with_suffix(".jsonl").write_text(json.dumps(OTHER) + "\n")
    with pytest.raises(UserError, match=r"out.csv: there are predictions of other settings al"):
        is_complete(output_file, RECORD)
    output_file.with_suffix(".jsonl").write_text(json.dumps(RECORD) + "\n")
    assert is_complete(output_file, RECORD)
    output_file.unlink()  # stopped between the two
    assert not is_complete(output_file, RECORD)


@pytest.mark.parametrize(
    "line", ["", "{", "null", "7", "[]", '"input"', "{}", '{"input": 3}', '{"input": []}']
)
def test_a_line_that_is_no_record_has_no_settings(line):
    assert not same_settings(line, RECORD)
    assert is_record(line) == line.startswith('{"input"')


def test_the_tokens_of_a_batch_count_where_they_are_given():
    chosen, given = RECORD | {"max_batch_tokens": 700}, RECORD | {"max_batch_tokens": 800}
    assert same_settings(json.dumps(chosen), RECORD)
    assert not same_settings(json.dumps(chosen), given)
    assert not same_settings(json.dumps(RECORD), given)
    assert same_settings(json.dumps(given), given)


@pytest.mark.parametrize(
    ("written", "taken"), [(700, 700), (None, None), (True, None), ("700", None), (0, None)]
)
def test_tokens_of_a_batch_that_nothing_can_hold_are_not_gone_on_with(output_file, written, taken):
    write_part(output_file, 0, 0, record=RECORD | {"max_batch_tokens": written})
    assert Parts(output_file, RECORD, 2).max_batch_tokens == taken


# ---------------------------------------------------------------------- reading parts


def test_titles_are_found_in_the_parts_of_any_number_of_processes(output_file):
    count = 2 * 130  # more parts than a byte could number
    for rank in range(130):
        write_part(output_file, rank, 259 - rank, rank)
    parts = Parts(output_file, RECORD, count + 1)
    assert parts.num_done == count
    assert parts.done == b"\1" * count + b"\0"
    parts.offsets[0] = 2**40  # nor is a part too long
    assert Parts(output_file, RECORD, count).join() == 0
    lines = output_file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines[1:]] == [row(index) for index in range(count)]
    assert part_files(output_file) == []


def test_a_torn_last_line_is_cut_off(output_file):
    write_part(output_file, 0, 4, 1)
    part, whole = part_file(output_file, 0), part_file(output_file, 0).read_bytes()
    for torn in (b'{"index": 2, "id', json.dumps({"index": 2} | row(2)).encode(), b"\xc3"):
        part.write_bytes(whole + torn)
        parts = Parts(output_file, RECORD, 5)
        assert parts.done == bytes([0, 1, 0, 0, 1])
        assert part.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        *("{", "null", "3", "[]", "{}", '{"id": "a1"}', "\ufffd"),
        *(f'{{"index": {index}}}' for index in ("-1", "3", "true", "null", '"1"', "1.0", "[1]")),
    ],
)
def test_a_line_of_no_title_is_refused(output_file, line):
    write_part(output_file, 0, 1)
    with part_file(output_file, 0).open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")
    before = part_file(output_file, 0).read_bytes()
    with pytest.raises(UserError) as error:
        Parts(output_file, RECORD, 3)
    assert str(error.value) == (
        f"{part_file(output_file, 0)}: this is not a file of titles; remove it"
    )
    assert part_file(output_file, 0).read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "Le maire a dit oui."}\n',  # one article, and no titles of other settings
        '{"text": "Le maire a dit oui."}\n{"tex',
        "\n",
        json.dumps(OTHER) + "\n" + json.dumps({"index": 0} | row(0)) + "\n",
        json.dumps(OTHER) + "\n" + "{\n",
    ],
)
def test_a_file_that_may_be_of_worth_is_left_as_it_is(output_file, content):
    part_file(output_file, 1).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="an unfinished run had other settings; remove it, or go o"):
        Parts(output_file, RECORD, 3)
    assert part_file(output_file, 1).read_text(encoding="utf-8") == content


@pytest.mark.parametrize("torn", ["", '{"index": 0, "ti'])
def test_settings_that_nothing_was_written_with_are_forgotten(output_file, torn):
    part_file(output_file, 0).write_text(json.dumps(OTHER) + "\n" + torn)
    assert Parts(output_file, RECORD, 3).num_done == 0
    assert part_file(output_file, 0).read_bytes() == b""


# ---------------------------------------------------------------------- joining them


def test_files_are_joined_in_the_order_of_the_articles(output_file):
    write_part(output_file, 0, 2, 0, title="Été, «\u00a0oui\u00a0»", stopped_by="length")
    write_part(output_file, 1, 1, title='a "b"')
    record = RECORD | {"max_batch_tokens": 512, "model": "modèle"}
    parts = Parts(output_file, RECORD, 3)
    parts.record = record
    assert parts.join() == 2
    assert output_file.read_bytes().decode() == (
        'ID,titles\na0,"Été, «\u00a0oui\u00a0»"\na1,"a ""b"""\na2,"Été, «\u00a0oui\u00a0»"\n'
    )
    text = output_file.with_suffix(".jsonl").read_bytes().decode()
    first, *rows = map(json.loads, text.splitlines())
    assert first == record
    assert [list(line) for line in rows] == [list(row(0))] * 3
    assert "Été" in text  # as people read it
    assert {path.name for path in output_file.parent.iterdir()} == {"out.csv", "out.jsonl"}


def test_nothing_is_joined_while_titles_are_missing(output_file):
    write_part(output_file, 0, 0, 2)
    with pytest.raises(RuntimeError, match="among them row 1"):
        Parts(output_file, RECORD, 3).join()
    assert [path.name for path in output_file.parent.iterdir()] == ["out.part-0.jsonl"]


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_run_that_is_killed_while_it_joins_goes_on_from_the_parts(
    output_file, monkeypatch, renamed
):
    """Before a file has its name, between the two, and before the parts are removed."""
    write_part(output_file, 0, 0, 2)
    write_part(output_file, 1, 1)
    calls, replace = [], os.replace

    class Killed(BaseException):
        pass

    def until_killed(*paths):
        if len(calls) == renamed:
            raise Killed
        calls.append(replace(*paths))

    def killed_at_the_parts(path, missing_ok=False):
        if path.suffix == ".jsonl":
            raise Killed

    monkeypatch.setattr(predictions.os, "replace", until_killed)
    if renamed == 2:
        monkeypatch.setattr(type(output_file), "unlink", killed_at_the_parts)
    with pytest.raises(Killed):
        Parts(output_file, RECORD, 3).join()
    monkeypatch.undo()
    assert is_complete(output_file, RECORD) == (renamed == 2)
    assert Parts(output_file, RECORD, 3).join() == 0
    assert is_complete(output_file, RECORD)
    assert output_file.read_text(encoding="utf-8").count("\n") == 4
    assert len(list(output_file.parent.iterdir())) == 2


def test_files_are_on_the_disk_before_they_have_their_names(output_file, monkeypatch):
    """Else a machine that goes down might leave empty ones, which look finished."""
    write_part(output_file, 0, *range(50))
    synced, named, replace = {}, [], os.replace

    def fsync(descriptor):
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def note(source, target):
        status = os.stat(source)
        named.append(synced.get(status.st_ino) == status.st_size > 0)
        replace(source, target)

    monkeypatch.setattr(predictions.os, "fsync", fsync)
    monkeypatch.setattr(predictions.os, "replace", note)
    Parts(output_file, RECORD, 50).join()
    assert named == [True, True]


def test_a_disk_without_room_for_both_files_keeps_only_the_parts(output_file, monkeypatch):
    write_part(output_file, 0, *range(50))
    before = part_file(output_file, 0).read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(predictions.os, "fsync", full)
    with pytest.raises(WriteError) as error:
        Parts(output_file, RECORD, 50).join()
    assert str(error.value).startswith(f"{output_file}: cannot be written (")
    assert f": {2 * len(before):,} bytes needed, " in str(error.value)
    assert [path.name for path in output_file.parent.iterdir()] == ["out.part-0.jsonl"]
    assert part_file(output_file, 0).read_bytes() == before


# ---------------------------------------------------------------------- writing a line


class Part:
    """A file on a disk that takes a few bytes at a time, and has room for so many."""

    def __init__(self, name, room=10**6):
        self.name, self.room, self.content = str(name), room, b""

    def write(self, data):
        if len(self.content) >= self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.content += data[:7]
        return len(data[:7])


def test_a_line_is_written_to_its_end(output_file):
    part, contents = Part(output_file), [{"title": "Où ? « Ici »\u2028…" * 9}, {"index": 1}]
    for content in contents:
        write_line(part, content)
    assert part.content.endswith(b"\n")
    assert [json.loads(line) for line in part.content.split(b"\n")[:-1]] == contents


def test_names_of_files_that_are_not_utf_8_can_be_written_down(output_file):
    part, record = Part(output_file), {"input": {"path": os.fsdecode(b"\xe9t\xe9.csv")}}
    write_line(part, record)
    assert json.loads(part.content) == record
    assert same_settings(part.content, record)


def test_a_full_disk_is_told_with_what_all_lines_will_need(output_file):
    content = {"title": "é" * 10}
    size = len(json.dumps(content, ensure_ascii=False).encode()) + 1
    with pytest.raises(WriteError) as error:
        write_line(Part(output_file, room=14), content, num_left=2000)
    assert f"({os.strerror(errno.ENOSPC)}: {2000 * size:,} bytes needed, " in str(error.value)
