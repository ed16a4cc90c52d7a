"""articles.py: the files that are read, and every way in which one is refused.

python -m pytest tests/test_articles.py
"""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SCRIPTS, french_rows

import articles
from articles import Columns, check_articles, iterate_articles, open_articles
from exit_codes import UserError, WriteError

ROWS = [
    {"ID": "007", "text": 'Un « mot »,\r\nun autre,\n"cité".', "titles": "L'été à l'Élysée"},
    {"ID": "1e3", "text": "  Des blancs  ", "titles": "null"},
    {"ID": "NA", "text": unicodedata.normalize("NFD", "élève décomposé"), "titles": "NA"},
    {"ID": "nan", "text": "null", "titles": "nan"},
    {"ID": "None", "text": "\u2028 émoji 👩‍👩‍👧‍👦 \u00a0 \\n {article}", "titles": "None"},
    {"ID": "-0", "text": "1.50", "titles": "007"},
]
READ = [{"id": row["ID"], "text": row["text"], "title": row["titles"]} for row in ROWS]
FORMATS = ["csv", "csv.gz", "CSV", "CSV.GZ", "json", "indented.json", "jsonl", "parquet"]
FORMATS += [
    "bom.csv",
    "crlf.csv",
    "blank.csv",
    "quoted.csv",
    "bom.json",
    "blank.jsonl",
    "bom.jsonl",
]


def csv_text(rows: list[dict], **options) -> str:
    stream = io.StringIO()
    options = {"lineterminator": "\n", "extrasaction": "ignore"} | options
    writer = csv.DictWriter(stream, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, rows: list[dict]) -> str:
    """Write rows in the format, and with the peculiarity, that a file's name tells."""
    kind = path.name.split(".", 1)[1].lower()
    if kind.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
        return str(path)
    crlf = {"lineterminator": "\r\n"} if "crlf" in kind else {}
    quoting = {"quoting": csv.QUOTE_ALL} if "quoted" in kind else {}
    text = csv_text(rows, **crlf, **quoting)
    if "jsonl" in kind:
        text = json_lines(rows)
    elif "json" in kind:
        text = json.dumps(rows, indent=1 if "indented" in kind else None)
    text = "\ufeff" + text if "bom" in kind else text
    text = text + "\n\n\n" if "blank" in kind else text
    data = text.encode()
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    return str(path)


def read(path: str, columns: Columns = Columns()) -> list[dict]:  # noqa: B008 (it is frozen)
    return list(iterate_articles(path, columns))


def refusal(path, columns: Columns = Columns(), **options) -> str:  # noqa: B008
    """Return what check_articles complains about, without the path that it begins with."""
    with pytest.raises(UserError) as error:
        check_articles(str(path), columns, **options)
    complaint = str(error.value)
    assert complaint.startswith(str(path))
    assert "\n" not in complaint
    assert len(complaint) < len(str(path)) + 400
    return complaint.removeprefix(str(path))


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / f"a.{name}", ROWS)
    assert read(path) == READ
    checked = check_articles(path, Columns())
    assert (checked.path, checked.rows, checked.has_ids) == (path, 6, True)
    assert checked.sha256 == check_articles(write(tmp_path / "b.csv", ROWS), Columns()).sha256


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_without_ids_the_row_index_is_the_id(tmp_path, name):
    rows = [{"text": row["text"], "titles": row["titles"]} for row in ROWS]
    path = write(tmp_path / name, rows)
    assert [row["id"] for row in read(path)] == ["0", "1", "2", "3", "4", "5"]
    assert not check_articles(path, Columns()).has_ids
    ignored = write(tmp_path / f"b{name}", ROWS)
    assert [row["id"] for row in read(ignored, Columns(id=None))] == ["0", "1", "2", "3", "4", "5"]


def test_columns_have_the_names_that_are_asked_for(tmp_path):
    rows = [{"corps": "Un texte", "titre": "Un titre", "n": "x", "text": "autre", "titles": ""}]
    path = write(tmp_path / "a.csv", rows)
    columns = Columns(text="corps", title="titre", id="n")
    assert read(path, columns) == [{"id": "x", "text": "Un texte", "title": "Un titre"}]
    assert check_articles(path, columns).rows == 1
    assert read(path, Columns(text="corps", title=None)) == [
        {"id": "0", "text": "Un texte", "title": ""}
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_numbers_are_good_ids(tmp_path, name):
    rows = [{"text": "a", "titles": "b", "ID": number} for number in (0, 7, -1, 2**60)]
    path = write(tmp_path / name, rows)
    assert check_articles(path, Columns()).has_ids
    assert [row["id"] for row in read(path)] == ["0", "7", "-1", str(2**60)]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.json", "a.jsonl", "a.parquet"])
def test_a_field_of_two_megabytes_is_read(tmp_path, name):
    text = "élu, « oui » \n" * 150_000
    path = write(tmp_path / name, [{"text": text, "titles": "b"}] * 2)
    assert check_articles(path, Columns()).rows == 2
    assert [row["text"] for row in read(path)] == [text, text]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_json_array_is_read_right_whatever_the_borders_of_the_buffer(
    tmp_path, monkeypatch, chunk, ascii_only
):
    monkeypatch.setattr(articles, "CHUNK", chunk)
    rows = ROWS + [{**row, "ID": f"x{row['ID']}", "extra": [1.5, {"a": None}]} for row in ROWS]
    text = (
        " \n" + json.dumps(rows, ensure_ascii=ascii_only).replace("}, {", "}\r\n\t ,\n\n{") + " \n"
    )
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    expected = [{"id": r["ID"], "text": r["text"], "title": r["titles"]} for r in rows]
    assert read(str(tmp_path / "a.json")) == expected


def test_a_long_element_is_not_decoded_anew_for_every_piece_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(articles, "CHUNK", 16)
    decode, tries = json.JSONDecoder.raw_decode, []

    def counted(*given):
        tries.append(1)
        assert len(tries) < 25
        return decode(*given)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted)
    text = "élu " * 50_000
    (tmp_path / "a.json").write_text(json.dumps([{"text": text, "titles": "b"}]), encoding="utf-8")
    assert read(str(tmp_path / "a.json")) == [{"id": "0", "text": text, "title": "b"}]


# ---------------------------------------------------------------------- open_articles


@pytest.mark.parametrize("name", ["a.csv.gz", "a.json", "a.parquet"])
def test_the_dataset_has_the_same_rows_and_is_memory_mapped(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    dataset = open_articles(path, Columns())
    assert list(dataset) == READ
    assert {of.dtype for of in dataset.features.values()} == {"large_string"}  # beyond 2 GiB too
    assert dataset[[3, 1]]["id"] == ["nan", "1e3"]
    assert len(dataset.cache_files) == 1
    file = Path(dataset.cache_files[0]["filename"])
    assert f"{file} (deleted)\n" in Path("/proc/self/maps").read_text()
    assert not file.parent.exists()


def test_a_full_disk_is_a_complaint(tmp_path, monkeypatch):
    import resource
    import tempfile

    path = write(tmp_path / "a.csv", french_rows(2000))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(WriteError) as caught:  # told by whichever process meets it
            open_articles(path, Columns())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    complaint = str(caught.value)
    assert complaint.startswith(f"{temporary}: no room for a copy of {path} (")
    assert complaint.endswith("File too large); free some, or set TMPDIR to another disk")


def test_rows_are_copied_in_batches_of_bounded_size():
    small, large = ({"text": "a" * size} for size in (10, 9 << 20))
    sizes = [len(batch) for batch in articles._batches([small] * 2500)]
    assert sizes == [1000, 1000, 500]
    assert [len(batch) for batch in articles._batches([large] * 5)] == [2, 2, 1]
    assert list(articles._batches([])) == []


def test_a_file_that_takes_its_time_is_told_with_its_rows(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.csv", french_rows(1234))
    check_articles(path, Columns())
    open_articles(path, Columns())
    assert capsys.readouterr().out == ""
    ticks = iter([0, 7, 10, 22])
    monkeypatch.setattr(articles, "time", SimpleNamespace(perf_counter=ticks.__next__))
    check_articles(path, Columns())
    open_articles(path, Columns())
    assert capsys.readouterr().out.splitlines() == [
        f"NOTE: {path}: 1,234 rows checked in 7 s",
        f"NOTE: {path}: 1,234 rows copied for random access in 12 s",
    ]


def test_a_changed_file_of_the_same_name_is_read_anew(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    status = os.stat(path)
    before, sha256 = open_articles(path, Columns()), check_articles(path, Columns()).sha256
    Path(path).write_text(
        Path(path).read_text().replace("Élysée", "Elysée").replace("1.50", "15.0")
    )
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_articles(path, Columns())["title"][0] == "L'été à l'Elysée"
    assert before["title"][0] == "L'été à l'Élysée"
    assert check_articles(path, Columns()).sha256 != sha256


def test_nothing_is_left_of_the_dataset_and_nothing_stale_is_used_by_another_process(tmp_path):
    """Not even by a process that has no time to tidy up."""
    code = (
        "import os, sys; from articles import *; d = open_articles(sys.argv[1], Columns()); "
        "print(d['title'][0], flush=True); os._exit(0)"
    )
    temporary, home = tmp_path / "tmp", tmp_path / "home"
    temporary.mkdir()
    for title in ("Premier", "Second"):
        path = write(tmp_path / "a.csv", [{"text": "a", "titles": title}])
        done = subprocess.run(
            [sys.executable, "-c", code, path],
            env=os.environ
            | {"PYTHONPATH": str(SCRIPTS), "TMPDIR": str(temporary), "HF_HOME": str(home)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{title}\n"
        assert not list(temporary.iterdir())
        assert not list(home.rglob("*.arrow"))


def test_the_hash_tells_other_content(tmp_path):
    def sha256(rows, columns=Columns()):  # noqa: B008
        return check_articles(write(tmp_path / "a.jsonl", rows), columns).sha256

    found = [sha256(ROWS), sha256(ROWS[::-1]), sha256(ROWS[:-1])]
    for name in ROWS[0]:
        found.append(sha256([*ROWS[:-1], {**ROWS[-1], name: "autre"}]))
    found.append(sha256([{"text": "ab", "titles": "c"}]))
    found.append(sha256([{"text": "a", "titles": "bc"}]))
    assert len(set(found)) == len(found)
    other_id = [*ROWS[:-1], {**ROWS[-1], "ID": "autre", "unread": "x"}]
    assert sha256(other_id, Columns(id=None)) == sha256(ROWS, Columns(id=None))


# ---------------------------------------------------------------------- what is refused

HEADER = "ID,text,titles\n"
BAD_CSV = {
    "empty file": ("", ": the file has no rows; give a file with at least one article"),
    "header only": (HEADER, ": the file has no rows; give a file with at least one article"),
    "missing column": (
        "ID,text,titre\n1,a,b\n",
        ":2: no column 'titles' among 'ID', 'text', 'titre'; rename it in the file or name it on "
        "the command line",
    ),
    "no header": (
        f"1,{'a' * 500},b\n2,c,d\n",
        f":2: no column 'text' among '1', '{'a' * 56}..., 'b'; rename it in the file or name it on "
        "the command line",
    ),
    "doubled column": ("text,titles,text\na,b,c\n", ":1: doubled column 'text'; rename one"),
    "too many fields": (
        f"{HEADER}1,a,b\n2,a,b,c\n",
        ":3: 4 fields where the header has 3; quote the fields that hold commas or newlines",
    ),
    "too few fields": (
        f'{HEADER}1,"a\n\na",b\n\n2,a\n',
        ":4: 2 fields where the header has 3; quote the fields that hold commas or newlines",
    ),
    "unbalanced quote": (
        f'{HEADER}1,a,b\n2,"a,b\n3,a,b\n',
        ":3: not valid CSV (unexpected end of data); mend the quotes",
    ),
    "unbalanced quote in the first row": (
        f'{HEADER}1,"a,b\n',
        ":2: not valid CSV (unexpected end of data); mend the quotes",
    ),
    "unbalanced quote in the header": (
        'ID,"text,titles\n1,a,b\n',
        ":1: not valid CSV (unexpected end of data); mend the quotes",
    ),
    "stray quote": (
        f'{HEADER}1,a,b\n2,"a"a,b\n',
        ":3: not valid CSV (',' expected after '\"'); mend the quotes",
    ),
    "latin-1": (
        f"{HEADER}1,été,b\n2,a,b\n".encode() + b"3,\xe9t\xe9,b\n",
        ":4: the column 'text' is not UTF-8; convert the file to UTF-8",
    ),
    "NUL": (f"{HEADER}1,a,b\n2,a\0a,b\n", ":3: the column 'text' holds a NUL byte; remove it"),
    "empty article": (
        f"{HEADER}1,a,b\n2,,b\n",
        ":3: the column 'text' is empty; fill it in or remove the row",
    ),
    "blank article": (
        f'{HEADER}1,"\n \u00a0\t",b\n',
        ":2: the column 'text' is empty; fill it in or remove the row",
    ),
    "empty title": (
        f"{HEADER}1,a,b\n2,a,\n",
        ":3: the column 'titles' is empty; fill it in or remove the row",
    ),
    "blank title": (
        f"{HEADER}1,a,b\n2,a, \n",
        ":3: the column 'titles' is empty; fill it in or remove the row",
    ),
    "doubled ID": (f"{HEADER}1,a,b\n2,a,b\n1,a,b\n", ":4: ID '1' is there twice; make it unique"),
    "empty ID": (f"{HEADER}1,a,b\n,a,b\n", ":3: the column 'ID' is empty; fill it in"),
    "blank ID": (f"{HEADER}1,a,b\n \t,a,b\n", ":3: the column 'ID' is empty; fill it in"),
    "semicolons": (
        "ID;text;titles\n1;a;b\n",
        ":1: columns separated by ';'; separate them by commas",
    ),
    "tabs": (
        "ID\ttext\ttitles\n1\ta\tb\n",
        ":1: columns separated by '\\t'; separate them by commas",
    ),
    "bars": ("ID|text|titles\n1|a|b\n", ":1: columns separated by '|'; separate them by commas"),
}
BAD_LINES = {
    "empty file": ("", ": the file has no rows; give a file with at least one article"),
    "blank lines": ("\n \n", ": the file has no rows; give a file with at least one article"),
    "broken line": (
        '{"text": "a", "titles": "b"}\n\n{"text": "a", "titles": b"}\n',
        ":3: not valid JSON (Expecting value); mend it",
    ),
    "line cut off": (
        '{"text": "a", "ti',
        ":1: not valid JSON (Unterminated string starting at); mend it",
    ),
    "string": ('"a"\n', ':1: not a JSON object; write {"text": ...}'),
    "list": (
        '{"text": "a", "titles": "b"}\n["a", "b"]\n',
        ':2: not a JSON object; write {"text": ...}',
    ),
    "null": ("null\n", ':1: not a JSON object; write {"text": ...}'),
    "too deep": (
        '{"text": ' + "[" * 100_000,
        ":1: not valid JSON (maximum recursion depth exceeded while decoding a JSON array from a "
        "unicode string); mend it",
    ),
    "missing column": (
        '{"text": "a", "titles": "b"}\n{"text": "a"}\n',
        ":2: no column 'titles' among 'text'; rename it in the file or name it on the command line",
    ),
    "no column": (
        "{}",
        ":1: no column 'text' among none; rename it in the file or name it on the command line",
    ),
    "number": (
        '{"text": 3.5, "titles": "b"}',
        ":1: the column 'text' holds 3.5, not text; make it a string",
    ),
    "null title": (
        '{"text": "a", "titles": null}',
        ":1: the column 'titles' holds None, not text; make it a string",
    ),
    "long list": (
        '{"text": "a", "titles": ' + json.dumps(["é" * 9] * 999) + "}",
        f":1: the column 'titles' holds {repr(['é' * 9] * 9)[:57]}..., not text; make it a string",
    ),
    "truth as ID": (
        '{"text": "a", "titles": "b", "ID": true}',
        ":1: the column 'ID' holds True, not text; make it a string",
    ),
    "half a character": (
        '{"text": "a", "titles": "b"}\n{"text": "a", "titles": "\\ud83d"}',
        ":2: the column 'titles' is not UTF-8; convert the file to UTF-8",
    ),
    "latin-1": (
        b'{"text": "a", "titles": "b"}\n{"text": "a", "titles": "\xe9"}',
        ":2: the column 'titles' is not UTF-8; convert the file to UTF-8",
    ),
    "NUL": (
        '{"text": "a\\u0000", "titles": "b"}',
        ":1: the column 'text' holds a NUL byte; remove it",
    ),
    "line break in an ID": (
        '{"text": "a", "titles": "b", "ID": "7\\r"}',
        ":1: the column 'ID' has a line break; remove it",
    ),
    "same ID as number and text": (
        '{"text": "a", "titles": "b", "ID": 7}\n{"text": "a", "titles": "b", "ID": "7"}',
        ":2: ID '7' is there twice; make it unique",
    ),
    "IDs at first": (
        '{"text": "a", "titles": "b", "ID": 7}\n{"text": "a", "titles": "b"}',
        ":2: only some rows have the column 'ID'; fill it in",
    ),
    "IDs later": (
        '{"text": "a", "titles": "b"}\n{"text": "a", "titles": "b", "ID": 7}',
        ":2: only some rows have the column 'ID'; fill it in",
    ),
}
GOOD = '{"text": "a", "titles": "b"}'
BAD_ARRAYS = {
    "no element": ("[ ]", ": the file has no rows; give a file with at least one article"),
    "no end": (f"[{GOOD}, ", ":2: not valid JSON (Expecting value); mend it"),
    "no bracket": (f"[{GOOD}", ":2: not valid JSON (Expecting ',' delimiter); mend it"),
    "only a bracket": ("[", ":1: not valid JSON (Expecting value); mend it"),
    "no comma": (f"[{GOOD} {GOOD}]", ":2: not valid JSON (Expecting ',' delimiter); mend it"),
    "comma at the end": (f"[{GOOD},]", ":2: not valid JSON (Expecting value); mend it"),
    "two commas": (f"[{GOOD},,{GOOD}]", ":2: not valid JSON (Expecting value); mend it"),
    "more after the end": (f"[{GOOD}] {GOOD}", ":2: not valid JSON (Extra data); mend it"),
    "broken element": (
        f'[{GOOD}, {{"text" "a"}}, {GOOD}]',
        ":2: not valid JSON (Expecting ':' delimiter); mend it",
    ),
    "open string": (
        f'[{GOOD}, {{"text": "a}}]',
        ":2: not valid JSON (Unterminated string starting at); mend it",
    ),
    "JSON in a string": (
        f"[{json.dumps(GOOD)}]",
        ':1: not a JSON object; write {"text": ...}',
    ),
    "number": (f"[{GOOD}, 12]", ':2: not a JSON object; write {"text": ...}'),
    "latin-1": (
        f'[{GOOD}, {{"text": "a", "titles": "'.encode() + b'\xe9"}]',
        ":2: the column 'titles' is not UTF-8; convert the file to UTF-8",
    ),
    "empty title": (
        f'[{GOOD}, {{"text": "a", "titles": " "}}]',
        ":2: the column 'titles' is empty; fill it in or remove the row",
    ),
}
BAD = [
    pytest.param(name, *bad, id=f"{name}, {what}")
    for name, table in (("a.csv", BAD_CSV), ("a.jsonl", BAD_LINES), ("a.json", BAD_ARRAYS))
    for what, bad in table.items()
]


@pytest.mark.parametrize(("name", "content", "complaint"), BAD)
def test_complaints_about_a_text_file(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(path) == complaint


def test_a_broken_array_of_many_elements_is_refused_without_reading_on(tmp_path, monkeypatch):
    monkeypatch.setattr(articles, "CHUNK", 64)
    path = tmp_path / "a.json"
    path.write_text(f'[{GOOD}, {{"text": a}}, {", ".join([GOOD] * 100_000)}]')
    tracemalloc.start()
    assert refusal(path) == ":2: not valid JSON (Expecting value); mend it"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 10


def test_empty_titles_pass_where_they_are_allowed(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": "a", "titles": ""}, {"text": "b", "titles": " "}])
    assert check_articles(path, Columns(), empty_titles=True).rows == 2
    path = write(tmp_path / "b.csv", [{"text": "", "titles": ""}])
    assert refusal(path, empty_titles=True) == (
        ":2: the column 'text' is empty; fill it in or remove the row"
    )


@pytest.mark.parametrize(
    ("column", "complaint"),
    [
        ([1, 2], ":1: the column 'titles' holds 1, not text; make it a string"),
        (["a", None], ":2: the column 'titles' holds None, not text; make it a string"),
        ([b"a", b"b"], ":1: the column 'titles' holds b'a', not text; make it a string"),
        (["a", ""], ":2: the column 'titles' is empty; fill it in or remove the row"),
    ],
)
def test_complaints_about_the_fields_of_a_parquet_file(tmp_path, column, complaint):
    rows = [{"text": "a", "titles": value} for value in column]
    assert refusal(write(tmp_path / "a.parquet", rows)) == complaint


def test_complaints_about_parquet_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"

    def save(arrays, names=("text", "titles")):
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names=list(names)), path)

    latin1 = pyarrow.array([b"a", b"\xe9t\xe9"], type=pyarrow.binary()).view(pyarrow.string())
    good = pyarrow.array(["a", "b"])
    save([latin1, good])
    assert refusal(path) == ":2: not UTF-8; convert the file to UTF-8"
    save([good, good, good], ("text", "titles", "text"))
    assert refusal(path) == ": doubled column 'text'; rename one"
    save([good, good], ("text", "titre"))
    assert refusal(path) == (
        ":1: no column 'titles' among 'text', 'titre'; rename it in the file or name it on the "
        "command line"
    )
    save([good[:0], good[:0]])
    assert refusal(path) == ": the file has no rows; give a file with at least one article"
    save([good, good])
    data = path.read_bytes()
    for broken in (b"", b"text,titles\na,b\n", data[:-9], data[: len(data) // 2]):
        path.write_bytes(broken)
        complaint = refusal(path)
        assert complaint.startswith(": cannot be read (Parquet ")
        assert complaint.endswith("); check the file")


def test_complaints_about_gzip_files(tmp_path):
    path = tmp_path / "a.csv.gz"
    data = gzip.compress(csv_text(french_rows(300)).encode())
    path.write_bytes(data[:-20])
    assert refusal(path) == (
        ": cannot be read (Compressed file ended before the end-of-stream marker was reached); "
        "check the file"
    )
    path.write_bytes(data[:2000] + b"\xff" * 20 + data[2020:])
    assert refusal(path).startswith(": cannot be read (")
    path.write_text(csv_text(french_rows(3)))
    assert refusal(path) == ": cannot be read (Not a gzipped file (b'ID')); check the file"


def test_complaints_about_paths(tmp_path):
    assert refusal(tmp_path / "none.csv") == ": there is no such file; check the path"
    assert refusal("data/none.csv") == ": there is no such file; check the path"
    assert refusal("none") == ": there is no such file; check the path"
    assert refusal("data/more/none") == ": there is no such file; check the path"
    assert refusal(tmp_path) == ": this is a folder, not a file; give a file of articles"
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    assert refusal(tmp_path / "a.xlsx") == (
        ": unknown kind of file; give one of .csv, .csv.gz, .json, .jsonl, .parquet"
    )


def test_a_folder_that_is_called_as_a_dataset_is_asked_of_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/news").mkdir(parents=True)
    assert refusal("data/news") == ": this is a folder, not a file; give a file of articles"


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_a_file_that_cannot_be_read_is_a_complaint(tmp_path, name):
    (tmp_path / name).symlink_to("/proc/self/mem")  # whose first page nobody may read
    complaint = refusal(tmp_path / name)
    assert complaint.startswith(": cannot be read (")
    assert complaint.endswith("); check the file")


@pytest.mark.parametrize("path", ["owner/name", "owner/name:test", "data/articles.txt"])
def test_a_hub_dataset_out_of_reach_is_refused_at_once(path, monkeypatch):
    import datasets  # noqa: F401 (whose import may do as it likes)

    def wait(seconds):
        raise AssertionError(f"it waits for {seconds} s, to ask once more")

    monkeypatch.setattr(time, "sleep", wait)
    complaint = refusal(path)
    assert complaint.startswith(
        ": neither a file here nor a dataset to be had from the Hub (Couldn't reach "
        f"'{path.partition(':')[0]}' on the Hub ("
    )
    assert complaint.endswith("); check the name, or download it and give the file")


def test_a_hub_dataset_is_read_in_the_split_that_it_names(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [{"text": "a", "titles": f"{name} {split}", "ID": 3}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert check_articles("owner/name", Columns(), "validation").rows == 1
    assert read("owner/name:test")[0] == {"id": "3", "text": "a", "title": "owner/name test"}
    assert list(open_articles("owner/name", Columns(), "other")) == [
        {"id": "3", "text": "a", "title": "owner/name other"}
    ]
    assert asked == [("owner/name", split) for split in ("validation", "test", "other")]


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.json", "a.jsonl", "a.parquet"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, name):
    peaks = []
    for count in (2000, 20_000):
        text = "Le maire d'Orléans inaugure une école. " * (40 if name == "a.json" else 10)
        rows = [{"text": f"{n} {text}", "titles": f"Titre {n}"} for n in range(count)]
        path = write(tmp_path / f"{count}.{name}", rows)
        del rows
        tracemalloc.start()
        assert check_articles(path, Columns()).rows == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000, peaks


def test_a_parquet_file_of_one_row_group_is_not_read_whole(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": os.urandom(500).hex(), "titles": "a"} for _ in range(30_000)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    del rows, table
    before, peak = pyarrow.total_allocated_bytes(), 0
    for number, _ in enumerate(iterate_articles(str(tmp_path / "a.parquet"), Columns())):
        if number % 100 == 0:
            peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert 0 < peak < (tmp_path / "a.parquet").stat().st_size / 3


@pytest.mark.parametrize("rows", [1, 20, 31, 32, 33, 63, 64, 1001])
def test_some_of_many_rows_are_spread_over_all_of_them(rows):
    found = articles.evenly_spaced(rows, 32)
    assert len(found) == min(rows, 32)
    assert found[0] == 0
    gaps = {b - a for a, b in zip(found, [*found[1:], rows], strict=True)}
    assert gaps <= {max(1, rows // 32), max(1, -(-rows // 32))}
    assert articles.evenly_spaced(rows, 0) == []
