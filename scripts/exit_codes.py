"""What an exit code of the scripts means, and how a complaint reaches the user: in one line."""

import os
import sys
import unicodedata
from pathlib import Path

DONE = 0
BUG = 1  # what Python itself returns after a traceback
USER_ERROR = 2  # the user must change something; nothing was written
STOPPED = 75  # reserved: stopped with a complete checkpoint, to be run again (EX_TEMPFAIL)


class UserError(Exception):
    """Something that the user must change, told as `where: what is wrong; what to do`."""

    def __init__(self, where, problem: str, advice: str):
        super().__init__(f"{where}: {problem}; {advice}")


def printable(text: str) -> str:
    """Return text as a terminal may show it: what data or a model wrote can hold escape sequences
    that move the cursor, and marks that turn the reading direction around."""
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text
    )


def note(text: str) -> None:
    """Print what the user may want to know but need not act on; once, whatever the processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"NOTE: {printable(text)}", flush=True)


def run(main) -> None:
    """Call `main()` and end the process with its exit code, a `UserError` as one line on stderr.

    `accelerate launch` answers 1 whatever its script returned, so the code is also written to the
    file that the environment variable EXIT_CODE_FILE names; the launchers pass it on from there.
    Under several processes every rank meets the same complaint and only the first one prints it.
    """
    code = BUG
    try:
        code = main() or DONE
    except UserError as error:
        code = USER_ERROR
        if os.environ.get("RANK", "0") == "0":
            # What it quotes, such as the error of a library, may have lines; a complaint has one.
            print("error:", printable(" ".join(str(error).split("\n"))), file=sys.stderr)
    except SystemExit as exit_request:  # argparse: 0 after --help, 2 after a complaint of its own
        code = exit_request.code or DONE
        if isinstance(code, str):  # sys.exit("what went wrong")
            print(code, file=sys.stderr)
            code = BUG
    finally:
        if file := os.environ.get("EXIT_CODE_FILE"):
            Path(file).write_text(f"{code}\n")
    sys.exit(code)
