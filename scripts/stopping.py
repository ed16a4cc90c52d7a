"""Stopping when asked to: by a signal, by a time limit, or by a file that others make."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from exit_codes import is_first_process

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TOGETHER = 1.0  # seconds in which signals are one request: a terminal and torchrun both send Ctrl-C


class StopRequest:
    """Knows whether this process was asked to stop. Use it as a context manager.

    From `listen()` on, a first SIGTERM, SIGINT or SIGUSR1 only asks: the script looks at `asked()`
    where nothing is half done. A second one ends the process at once. The file that STOP_FILE names
    asks as well: the launchers make it, for `accelerate launch` passes SIGUSR1 on to nobody. That
    is no first signal: a scheduler that signals all processes signals the launcher too. A process
    that is signalled alone makes it too, for others far from where they would hear of it.

    Args:
        max_time: minutes from now on after which it counts as asked; None for no limit.
    """

    def __init__(self, max_time: float | None):
        self.max_time = max_time
        self.start = time.monotonic()
        self.file = os.environ.get("STOP_FILE")
        self.signal = None  # that asked
        self.when = None  # time of that signal
        self.handlers = {}  # of before

    def __enter__(self):
        # The launchers' `accelerate` ignores signals, which is inherited. Until `listen()`, they
        # should do here what they do elsewhere: end a process that has nothing to save.
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def listen(self) -> None:
        """Take signals as requests from now on."""
        for number in SIGNALS:
            self.handlers[number] = signal.signal(number, self._handle)

    def asked(self) -> bool:
        """Return whether to stop as soon as nothing is half done."""
        return self.reason() is not None

    def asked_by_others(self) -> bool:
        """Return whether it was more than the time limit that asked."""
        return self.reason(time_counts=False) is not None

    def reason(self, time_counts: bool = True) -> str | None:
        """Return who asked, or None."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if self.file:
            with suppress(OSError):  # nobody made it
                return Path(self.file).read_text() or "the launcher"
        limited = time_counts and self.max_time is not None
        if limited and time.monotonic() - self.start >= 60 * self.max_time:
            return f"--max_time {self.max_time:g}"
        return None

    def _handle(self, number, _) -> None:
        if self.signal is not None:
            if time.monotonic() - self.when < TOGETHER:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal, self.when = number, time.monotonic()
        if self.file:
            with suppress(OSError):  # they hear of it later, then
                Path(self.file).write_text("another process")
        if is_first_process():  # print() may have been what the signal interrupted
            message = b"\nstopping as soon as nothing is half done; once more to stop at once\n"
            with suppress(OSError):  # nobody reads it any more
                os.write(2, message)
