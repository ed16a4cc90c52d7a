"""exit_codes.py: what a script answers, and the one line that a complaint is.

python -m pytest tests/test_exit_codes.py
"""

import os
import re
import subprocess
import sys

import pytest
from conftest import SCRIPTS

import exit_codes

CASES = {
    "pass": (0, ""),
    "return 0": (0, ""),
    "return 75": (75, ""),
    "raise UserError('a.csv:3', 'it is empty', 'fill it in')": (
        2,
        "error: a.csv:3: it is empty; fill it in\n",
    ),
    "raise UserError('a.csv', 'no (one\\ntwo\\n three)', 'mend it')": (
        2,
        "error: a.csv: no (one two  three); mend it\n",
    ),
    "raise UserError('a.csv', 'no \\udce9', 'mend it')": (2, "error: a.csv: no \\udce9; mend it\n"),
    "sys.exit()": (0, ""),
    "sys.exit(0)": (0, ""),
    "sys.exit(3)": (3, ""),
    "sys.exit('what went wrong')": (1, "what went wrong\n"),
    "argparse.ArgumentParser(prog='x').parse_args(['--y'])": (
        2,
        "usage: x [-h]\nx: error: unrecognized arguments: --y\n",
    ),
    "argparse.ArgumentParser(prog='x').parse_args(['--help'])": (0, ""),
}


def run(code: str, tmp_path, **environment):
    """Run a script whose main has this code; return it and what EXIT_CODE_FILE then says."""
    script = f"import argparse, sys\nfrom exit_codes import *\ndef main():\n    {code}\nrun(main)\n"
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "EXIT_CODE_FILE")}
    file = tmp_path / "code"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=inherited | {"PYTHONPATH": str(SCRIPTS), "EXIT_CODE_FILE": str(file)} | environment,
        capture_output=True,
        text=True,
    )
    return done, file.read_text() if file.exists() else None


@pytest.mark.parametrize("code", CASES)
def test_codes_and_complaints(tmp_path, code):
    done, written = run(code, tmp_path)
    assert (done.returncode, done.stderr) == CASES[code]
    assert written == f"{done.returncode}\n"


def test_what_a_terminal_cannot_show_ends_nothing(tmp_path):
    done, _ = run(r"print('cœur', 'art\udce9.csv')", tmp_path, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "c\\u0153ur art\\udce9.csv\n", "")


def test_a_bug_is_1_with_its_traceback(tmp_path):
    done, written = run("return {}['key']", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("KeyError: 'key'\n")
    assert written == "1\n"


@pytest.mark.parametrize(
    ("error", "number", "last"),
    [("UserError('a', 'b', 'c')", 2, "error: a: b; c"), ("KeyError", 1, "KeyError")],
)
def test_a_group_of_processes_is_left_as_it_is_after_an_error(tmp_path, error, number, last):
    """Python takes it down with its lock in hand, for which the group's threads may wait."""
    group = f"'gloo', 'file://{tmp_path}/store', world_size=1, rank=0"
    code = f"import atexit, torch; torch.distributed.init_process_group({group}); "
    code += f"atexit.register(print, 'taken down'); raise {error}"
    done, written = run(code, tmp_path)
    assert (done.returncode, written, done.stdout) == (number, f"{number}\n", "")
    assert done.stderr.splitlines()[-1].endswith(last)


def test_a_group_that_is_kept_is_not_taken_down_either(tmp_path):
    """Nor by those who ask for it: what they hold was the last of it, if not for the one kept."""
    group = f"'gloo', 'file://{tmp_path}/store', world_size=1, rank=0"
    code = f"import atexit, torch; torch.distributed.init_process_group({group}); keep_group(); "
    code += "torch.distributed.destroy_process_group(); atexit.register(print, 'taken down'); "
    done, written = run(f"{code}print('done')", tmp_path)
    assert (done.returncode, written, done.stdout, done.stderr) == (0, "0\n", "done\n", "")


@pytest.mark.parametrize("group", [True, False])
def test_a_code_is_told_where_a_complaint_cannot_be(tmp_path, group):
    """With the log on a full disk, the launchers still see that the job is to go on."""
    arguments = f"'gloo', 'file://{tmp_path}/store', world_size=1, rank=0"
    join = f"import torch; torch.distributed.init_process_group({arguments}); " * group
    script = "from exit_codes import *\ndef main():\n    "
    script += f"{join}raise LostNode('a', 'b', 'c')\nrun(main)\n"
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPTS),
        "EXIT_CODE_FILE": str(tmp_path / "code"),
    }
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={k: v for k, v in environment.items() if k != "RANK"},
            stdout=full,
            stderr=full,
        )
    assert (tmp_path / "code").read_text() == "75\n"
    assert done.returncode == 75


@pytest.mark.parametrize("error", ["UserError", "LostNode"])
def test_other_processes_wait_for_the_first_to_complain(tmp_path, error):
    """Or it is ended before it has: whatever launched them does so as soon as one is gone."""
    wait = "time.sleep = lambda s: sys.exit(f'waits {s:g} s')"
    code = f"import time; {wait}; raise {error}('a', 'b', 'c')"
    for rank in ("1", "11"):
        done, written = run(code, tmp_path, RANK=rank)
        assert (done.stderr, written) == ("waits 30 s\n", None)
    done, written = run(code, tmp_path, RANK="0")
    assert (done.stderr, written) == ("error: a: b; c\n", f"{done.returncode}\n")


def test_what_only_another_node_meets_is_told_by_its_first_process(tmp_path):
    """No launcher ends it: the first process of all goes on, and would later take that node for
    lost. The job must not begin again for that."""
    at_once = "import exit_codes; exit_codes.PATIENCE = 0.0"
    complaint = f"{at_once}; raise UserError('/models/7b', 'no such folder', 'fetch it')"
    there = {"RANK": "9", "SLURMD_NODENAME": "node2"}
    done, written = run(complaint, tmp_path, **there, LOCAL_RANK="1")
    assert (done.returncode, done.stderr, written) == (2, "", None)
    done, written = run(complaint, tmp_path, **there, LOCAL_RANK="0")
    assert done.stderr == "error: on node2: /models/7b: no such folder; fetch it\n"
    assert (done.returncode, written) == (2, "2\n")
    assert run(LOST, tmp_path)[1] == "2\n"
    # Had the first process met it too, it would have told the code, and the complaint, by now.
    assert run(complaint, tmp_path, **there, LOCAL_RANK="0")[0].stderr == ""
    (tmp_path / "code").write_text("75\n")  # nor does it take the place of what was told before
    assert run(complaint, tmp_path, **there, LOCAL_RANK="0")[1] == "75\n"
    lost = f"{at_once}; {LOST}"
    assert run(lost, tmp_path, **there, LOCAL_RANK="0")[0].stderr == ""


def test_help_shows_defaults(tmp_path):
    code = "p = ArgumentParser('what it does'); add = p.add_argument; add('--rate', default=2e-4, "
    code += "help='of it'); add('--none', help='or not'); add('--names', default=['a', 'b'], "
    code += "nargs='+', help='of layers'); add('--length', default=9, help='default: the run'); "
    code += "add('--share', default='9 %', help='at most'); p.parse_args(['--help'])"
    lines = [" ".join(line.split()) for line in run(code, tmp_path)[0].stdout.splitlines()]
    assert "--rate RATE of it [0.0002]" in lines
    assert "--none NONE or not" in lines
    assert "of layers [a b]" in " ".join(lines)
    assert "--length LENGTH default: the run" in lines
    assert "--share SHARE at most [9 %]" in lines


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
@pytest.mark.parametrize("options", [["--y"], ["--help"]])
def test_a_parser_speaks_once(tmp_path, rank, said, options):
    at_once = "import exit_codes; exit_codes.PATIENCE = 0.0"
    code = f"{at_once}; ArgumentParser('what it does').parse_args({options})"
    done, _ = run(code, tmp_path, RANK=rank)
    assert done.returncode == (0 if options == ["--help"] else 2)
    assert bool(done.stdout + done.stderr) == said
    if options == ["--y"] and said:
        assert done.stderr == "-c: error: unrecognized arguments: --y\n"


@pytest.mark.parametrize(
    ("rank", "node", "waits"), [(1, "0", 1), (0, "0", 0), (1, "1", 0), (1, None, 0)]
)
def test_who_stops_waits_for_the_first_to_leave_its_code(tmp_path, rank, node, waits):
    """torchrun ends that too, maybe before it has, and the launcher would take it for a bug."""
    env = {"RANK": str(rank)} | ({"GROUP_RANK": node} if node else {})
    code = "import time; time.sleep = lambda s: print(f'waits {s:g} s'); return STOPPED"
    done, written = run(code, tmp_path, **env)
    assert (done.returncode, done.stdout) == (75, "waits 30 s\n" * waits)
    assert written == (None if rank else "75\n")


def test_an_old_python_is_told_at_once():
    code = "import sys; sys.version_info = (3, 10); import exit_codes"
    env = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python 3.11 or newer is needed, this is ")


def test_a_process_waits_with_its_complaint_of_an_option_too(tmp_path):
    """Or torchrun ends the first one before it has spoken."""
    wait = "import time; time.sleep = lambda s: print(f'waits {s:g} s')"
    code = f"{wait}; ArgumentParser('x').parse_args(['--y'])"
    done, written = run(code, tmp_path, RANK="1")
    assert (done.returncode, done.stdout, done.stderr, written) == (2, "waits 30 s\n", "", None)


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False), ("11", False)])
def test_only_the_first_process_complains(tmp_path, rank, printed):
    at_once = "import exit_codes; exit_codes.PATIENCE = 0.0"
    done, written = run(f"{at_once}; raise UserError('a', 'b', 'c')", tmp_path, RANK=rank)
    assert done.stderr == ("error: a: b; c\n" if printed else "")
    assert done.returncode == 2
    assert written == ("2\n" if printed else None)
    done, written = run("raise WriteError('a', 'b', 'c')", tmp_path, RANK=rank)  # its own
    assert (done.stderr, written) == ("error: a: b; c\n", "2\n")


def test_an_error_of_the_disk_is_a_complaint_that_names_file_and_room(tmp_path):
    code = "open('/dev/full', 'w', buffering=1).write('x' * 3000 + chr(10))"
    done, written = run(f"with writing('a.csv', 3_001): {code}", tmp_path)
    assert re.fullmatch(
        r"error: a\.csv: cannot be written \(No space left on device: 3,001 bytes needed, [\d,]+ "
        r"free\); mend that and run the same command again\n",
        done.stderr,
    )
    assert (done.returncode, written) == (2, "2\n")
    done, _ = run(f"with writing('a.csv'): {code}", tmp_path)
    assert done.stderr == (
        "error: a.csv: cannot be written (No space left on device); mend that and run the same "
        "command again\n"
    )


@pytest.mark.parametrize("at_once", ["", "1"])
def test_a_reader_that_goes_changes_nothing(at_once):
    """As `| head` does once it has what it wants. Without a buffer, that is met while printing."""
    read, write = os.pipe()
    os.close(read)
    script = "from exit_codes import *\ndef main():\n    print('a')\n    return 75\nrun(main)\n"
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS), "PYTHONUNBUFFERED": at_once}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={k: v for k, v in environment.items() if k != "RANK"},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (75, "")


@pytest.mark.parametrize("closed", ["1", "2"])
def test_there_may_be_no_stream_at_all(tmp_path, closed):
    """What is told to it does not go to the other one, nor into the file that is opened next."""
    body = "print('a line'); file = open('file', 'w'); os.write(2, b'by number'); "
    body += "bar = tqdm.tqdm(range(2)); list(bar); raise UserError('a', 'b', 'c')"
    script = f"import tqdm\nfrom exit_codes import *\ndef main():\n    {body}\nrun(main)\n"
    command = ["sh", "-c", f'exec "$@" {closed}>&-', "-", sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ("a line\n" if closed == "2" else "")
    assert done.stderr.endswith("error: a: b; c\n") == (closed == "1")
    assert (tmp_path / "file").read_text() == ""


def test_lines_may_lose_their_reader_too():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as stream:
        exit_codes.Unread(stream).writelines(["a\n", "b\n"])


def test_another_broken_pipe_is_a_bug(tmp_path):
    done, _ = run("raise BrokenPipeError", tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "BrokenPipeError")


def test_ctrl_c_before_there_is_anything_to_lose_is_quiet(tmp_path):
    done, written = run("raise KeyboardInterrupt", tmp_path)
    assert (done.returncode, done.stderr, written) == (130, "", "130\n")


def test_a_bug_does_not_overwrite_what_another_process_told(tmp_path):
    (tmp_path / "code").write_text("2\n")
    assert run("raise KeyError", tmp_path)[1] == "2\n"
    assert run("return 75", tmp_path)[1] == "75\n"
    (tmp_path / "code").write_text("")
    assert run("raise KeyError", tmp_path)[1] == "1\n"


@pytest.mark.parametrize(
    ("code", "rank", "over"),
    [
        ("raise LostNode('a', 'b', 'c')", "0", True),
        ("return STOPPED", "0", True),
        ("raise KeyError", "0", True),
        ("return None", "0", False),
        ("raise LoneError('a', 'b', 'c')", "2", False),
    ],
)
def test_the_launchers_are_told_once_the_first_process_has_failed(tmp_path, code, rank, over):
    """From then on they need not wait for other nodes long. What another process told may be long
    before: the first one still has to find out, and to save."""
    _, written = run(code, tmp_path, RANK=rank)
    assert written
    assert (tmp_path / "code.over").exists() == over


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise UserError('a', 'b \\x1b', 'c')", "error: a: b \\x1b; c"),
        (
            "ArgumentParser('x').parse_args(['--y\\udce9'])",
            "-c: error: unrecognized arguments: --y\\udce9",
        ),
        ("sys.exit('no such thing')", "no such thing"),
        ("return STOPPED", "stopped; the same command goes on"),
        ("raise KeyError", None),
    ],
)
def test_what_one_of_several_said_is_left_for_the_launchers(tmp_path, code, said):
    file = tmp_path / "code.said"
    run(code, tmp_path, RANK="0", WORLD_SIZE="1")  # torchrun has nothing to say then
    assert not file.exists()
    (tmp_path / "code").unlink()
    done, _ = run(code, tmp_path, RANK="0", WORLD_SIZE="2")
    assert done.returncode
    assert (file.read_text() if file.exists() else None) == (said and f"{said}\n")


def test_what_gives_way_leaves_what_another_said(tmp_path):
    run("raise WriteError('b', 'full', 'mend it')", tmp_path, RANK="1", WORLD_SIZE="2")
    run(LOST, tmp_path, RANK="0", WORLD_SIZE="2")
    assert (tmp_path / "code.said").read_text() == "error: b: full; mend it\n"


def test_a_code_that_cannot_be_left_hides_no_complaint(tmp_path):
    file = str(tmp_path / "none/code")
    done, _ = run("raise UserError('a', 'b', 'c')", tmp_path, EXIT_CODE_FILE=file)
    assert (done.returncode, done.stderr) == (2, "error: a: b; c\n")


def test_no_file_is_written_where_none_is_asked_for(tmp_path):
    done, written = run("raise UserError('a', 'b', 'c')", tmp_path, EXIT_CODE_FILE="")
    assert (done.returncode, written) == (2, None)
    assert not list(tmp_path.iterdir())


def test_the_codes_are_those_that_the_launchers_and_slurm_know():
    codes = exit_codes.DONE, exit_codes.BUG, exit_codes.USER_ERROR, exit_codes.STOPPED
    assert codes == (0, 1, 2, os.EX_TEMPFAIL)


LOST = "raise LostNode('node2', 'gone', 'the same command goes on')"


def test_a_lost_node_is_to_be_continued_unless_it_said_why_it_went(tmp_path):
    done, written = run(LOST, tmp_path)
    assert (done.returncode, written) == (75, "75\n")
    assert done.stderr == "error: node2: gone; the same command goes on\n"
    run("raise WriteError('b', 'full', 'mend it')", tmp_path, RANK="1")
    done, written = run(LOST, tmp_path)
    assert (done.returncode, written) == (75, "2\n")
