"""What an exit code of the scripts means, and how a complaint reaches the user: in one line."""

import argparse
import errno
import os
import platform
import shutil
import sys
import time
import traceback
import unicodedata
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  # before what older ones know nothing of
    print("error: Python 3.11 or newer is needed, this is", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

DONE = 0
BUG = 1  # what Python itself returns after a traceback
USER_ERROR = 2  # the user must change something
STOPPED = 75  # when asked, or by a lost node: run the same command again (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C before there was anything to lose, as a shell has it
PATIENCE = 30.0  # seconds that the first process has to tell what all of them have met
KEPT = []  # see keep_group


class UserError(Exception):
    """Something that the user must change, told as `where: what is wrong; what to do`."""

    def __init__(self, where, problem: str, advice: str):
        super().__init__(f"{where}: {problem}; {advice}")
        self.parts = (str(where), problem, advice)


class LoneError(UserError):
    """What one process of several may meet alone, such as a full memory."""


class LostNode(UserError):
    """Another node that does not answer any more. The same command may find all in order."""


class WriteError(LoneError):
    """A file that cannot be written."""


class HelpFormatter(argparse.RawTextHelpFormatter):
    """Shows the default of each option that has one and says nothing of it itself."""

    def _get_help_string(self, action) -> str:
        default = action.default
        if isinstance(default, bool) or default in (None, argparse.SUPPRESS):
            return action.help
        if default == [] or "default" in action.help:
            return action.help
        shown = " ".join(default) if isinstance(default, list) else default
        return f"{action.help} [{str(shown).replace('%', '%%')}]"


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, for it shows no usage, of the first process alone.

    The SystemExit of a complaint has it as a note.

    Args:
        description: of the script, shown by --help with the line breaks that it has.
    """

    def __init__(self, description: str):
        super().__init__(
            usage=argparse.SUPPRESS, description=description, formatter_class=HelpFormatter
        )

    def exit(self, status=0, message=None):
        try:
            super().exit(status, message)
        except SystemExit as exit_request:
            if message:
                exit_request.add_note(message.rstrip("\n"))
            raise

    def _print_message(self, message, file=None) -> None:
        if is_first_process():
            super()._print_message(message, file)


class Unread:
    """A stream that may lose its reader: `| head`, a `tee` that Ctrl-C ends too, or a terminal.

    A training must not end for that, before it has saved. What is written then goes nowhere.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def writelines(self, lines) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def close_for_good(self) -> None:
        """Let what is still buffered, and all to come, go nowhere."""
        with _nowhere() as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def _try(self, action, *arguments) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.close_for_good()


def is_first_process() -> bool:
    """Return whether this is the only process, or the first of those that were launched."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """Return text as a terminal may show it: what data or a model wrote can hold escape sequences
    that move the cursor, and marks that turn the reading direction around."""
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text
    )


def note(text: str) -> None:
    """Print what the user may want to know but need not act on; once, whatever the processes."""
    if is_first_process():
        print(f"NOTE: {printable(text)}", flush=True)


@contextmanager
def writing(path, needed: int | None = None):
    """Tell an error of the file system as a complaint: which file, and how many bytes it needs.

    Raises:
        WriteError: an OSError inside, such as a full disk, a quota or a limit on a file's size.
    """
    try:
        yield
    except OSError as error:
        problem = error.strerror or str(error)
        if needed is not None:
            folder = next(p for p in (Path(path), *Path(path).absolute().parents) if p.is_dir())
            free = shutil.disk_usage(folder).free
            problem += f": {needed:,} bytes needed, {free:,} free"
        raise WriteError(
            path, f"cannot be written ({problem})", "mend that and run the same command again"
        ) from None


def run(main) -> None:
    """Call `main()` and end the process with its exit code, a `UserError` as one line on stderr.

    `accelerate launch` answers 1 whatever its script returned, so the code is also written to the
    file that the environment variable EXIT_CODE_FILE names; the launchers pass it on from there.
    With `.over` at its end, that is the name of a file which says that the first process has ended
    with another code than 0. What one of several processes complains of, or that it has stopped, is
    in the file with `.said`, for the launchers to tell it again: torchrun has 25 lines follow it.
    Under several processes most ranks meet the same complaint and only the first one tells it; nor
    do others tell their code, for they may merely have lost the first one. What launched them ends
    all as soon as one has ended, so the others wait to be ended: the first one may be slower. If
    only processes of another node have met it, such as a model that is not there, nothing ends
    them: then the first one of that node tells it.
    """
    streams = sys.stdout, sys.stderr
    for stream in streams:  # of a title or a file's name, it may not be able to show all
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # Who was started without one gets one that goes nowhere, in place of the file opened next.
    sys.stdout, sys.stderr = (Unread(stream or _nowhere()) for stream in streams)
    code, tell, lost, late = BUG, is_first_process(), False, False
    complaint = ""
    try:
        code = main() or DONE
        beside_the_first = os.environ.get("GROUP_RANK") == "0" and not is_first_process()
        if code == STOPPED and beside_the_first:
            # torchrun ends all of a node once one has ended. The first has yet to leave its code.
            _is_left_to_itself()
    except UserError as error:
        lost = isinstance(error, LostNode)  # which may have said itself why it went
        code = STOPPED if lost else USER_ERROR
        tell = tell or isinstance(error, LoneError)
        if not tell and _is_left_to_itself() and not lost:
            tell = late = _speaks_for_its_node(code)
        # What the frames hold goes now: a progress bar prints itself once more when it does.
        traceback.clear_frames(error.__traceback__)
        if tell:
            # What it quotes, such as the error of a library, may have lines; a complaint has one.
            complaint = f"on {node_name()}: " * late + " ".join(str(error).split("\n"))
            complaint = f"error: {printable(complaint)}"
            with suppress(OSError):  # the code says what it can
                print(complaint, file=sys.stderr)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as exit_request:  # argparse: 0 after --help, 2 after a complaint of its own
        code = exit_request.code or DONE
        complaint = "".join(getattr(exit_request, "__notes__", ()))
        if code and not tell:
            _is_left_to_itself()
        if isinstance(code, str):  # sys.exit("what went wrong")
            print(complaint := code, file=sys.stderr)
            code = BUG
    except Exception:
        sys.excepthook(*sys.exc_info())  # which says of which process it is
    finally:  # whether or not the complaint could be printed
        if tell and (file := os.environ.get("EXIT_CODE_FILE")):
            if code == STOPPED and not complaint:
                complaint = "stopped; the same command goes on"
            _leave_code(Path(file), code, complaint, gives_way=lost or late or code == BUG)
            if code != DONE and is_first_process():
                with suppress(OSError):
                    Path(f"{file}.over").touch()
        _flush_streams()  # or Python's last flush may be what fails
        _leave_group(code)
        sys.stdout, sys.stderr = streams
    sys.exit(code)


def node_name() -> str:
    """Return what the scheduler calls this machine, or what it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _nowhere():
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk
            stream.close_for_good()
        except ValueError:  # closed
            pass


def _is_left_to_itself() -> bool:
    """Wait to be ended by SIGTERM, as the first process has complained; return whether nobody has
    in that time. Ctrl-C ends the wait."""
    with suppress(KeyboardInterrupt):
        time.sleep(PATIENCE)
        return True
    return False


def _speaks_for_its_node(code: int) -> bool:
    """Return whether this is the first process of another node than the first, and the launchers
    have not been told the code by now, as they have if the first process has met the same."""
    if os.environ.get("LOCAL_RANK") != "0":
        return False
    file = os.environ.get("EXIT_CODE_FILE")
    return not file or not Path(file).exists() or Path(file).read_text() != f"{code}\n"


def keep_group() -> None:
    """Keep the group of this process and others, if any, to the end, which `run` then makes short.

    Whoever lets go of it last, such as DDP when the model goes, waits for gloo's threads with
    Python's lock in hand. Those may wait for that lock, and neither would ever go on.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        KEPT.append(torch.distributed.group.WORLD)


def _leave_group(code: int) -> None:
    """End the process at once where Python would have to take a group of processes down."""
    distributed = sys.modules.get("torch.distributed")
    if KEPT or getattr(distributed, "is_initialized", bool)():  # which torch may be built without
        os._exit(code)


def _leave_code(file: Path, code: int, complaint: str, gives_way: bool) -> None:
    """Write a code for the launchers, unless it gives way and another process has told one; and of
    several processes the complaint."""
    with suppress(OSError):  # a full disk is what may have to be told
        if not gives_way or not file.exists() or not file.read_text():
            file.write_text(f"{code}\n")
            if complaint and os.environ.get("WORLD_SIZE", "1") != "1":
                said = Path(f"{file}.said")
                said.write_text(f"{complaint}\n", encoding="utf-8", errors="backslashreplace")
