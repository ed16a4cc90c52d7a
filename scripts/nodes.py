"""Nodes of one job: how long their processes wait for each other, which node is gone, and what the
first process tells all others."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta

from exit_codes import LostNode, UserError, node_name, note
from run_folder import first_line

PREFIX = "manchette/"  # of our keys in the store through which the processes found each other


class Nodes:
    """Knows which nodes were heard of lately. Use it as a context manager around the work.

    Where a run has several nodes, a thread of each process counts up in the store of torch's
    rendezvous, on the first node, every few seconds. Once a collective operation fails within
    `together()`, the first process sees whose count stands still. It saves what can be saved and
    says which node is gone. Whatever ends it, it tells the others to end: they may not have met it.

    Args:
        timeout: seconds after which an operation between processes fails.
    """

    def __init__(self, timeout: float):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.several = self.size > self.local_size
        self.period = min(5.0, timeout / 20)  # seconds between two signs of life
        self.silence = 6 * self.period  # after which a process does not live any more
        self.name = node_name()
        self.names = [None] * self.size
        self.heard = [time.monotonic()] * self.size  # on the first process, of each
        self.answered = time.monotonic()  # by the store
        self.noted = set()
        self.done, self.failed = threading.Event(), False
        self.thread = threading.Thread(target=self._count, daemon=True)
        self.save: Callable[[], str | None] = lambda: None

    def __enter__(self):
        if self.several:
            self.thread.start()
        return self

    def __exit__(self, kind, error, _):
        if not self.several:
            return
        try:
            if kind is not None and issubclass(kind, Exception) and not self.rank:
                with suppress(Exception):  # of a store that is gone: then nobody is left
                    self._store().set(f"{PREFIX}over", "1")
                    # Until the others have seen it: the store goes with this process.
                    time.sleep(2 * self.period)
        finally:
            self.failed = kind is not None
            self.done.set()
            # Were Python to end while the thread talks to the store, it would abort the process:
            # the work would be done, and its node would count as failed all the same. A store that
            # does not answer is not waited for as long as it may take.
            self.thread.join(self.silence)

    @contextmanager
    def together(self):
        """Take a collective operation that fails for a lost node, while signals and the lock of the
        run's folder are still as in the work: what is left is saved here.

        Raises:
            LostNode: in place of what torch raises.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.several or not _of_collective(error):
                raise
            self._give_up(error)

    def on_loss(self, save: Callable[[], str | None]) -> None:
        """Have the first process call `save()` should a node be lost.

        It returns from where the same command will go on, or None if this start got nowhere.
        """
        self.save = save

    def wait_for_all(self, stop_asked: Callable[[], bool]) -> None:
        """Wait until all processes have come to this, for which they may take any time.

        An operation between them would fail after the timeout. This returns early once
        `stop_asked()` is true or, on the first process, a node is lost: the next operation between
        them tells all, or fails.
        """
        if self.size == 1:
            return
        store, keys = self._store(), [f"{PREFIX}here{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], "")
        start, silent = time.monotonic(), 0
        while not store.check(keys) and not stop_asked():
            if start is not None and time.monotonic() - start > 10:
                note("this process is done, and waits for others that are not")
                start = None
            # Only the first process hears of the nodes, and not while its own thread is held up.
            heard = self.several and not self.rank and time.monotonic() - self.answered < 10
            silent = silent + 1 if heard and self.gone() else 0
            if silent == 3:
                break
            time.sleep(self.period / 5)

    def gone(self) -> list[str]:
        """Return the names of the nodes from which nothing was heard lately, on the first process.

        A process that never said its name goes by its rank.
        """
        late = [r for r in range(self.size) if time.monotonic() - self.heard[r] > self.silence]
        return list(dict.fromkeys(self.names[r] or f"process {r}" for r in late))

    def _store(self):
        from torch.distributed import TCPStore

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(minutes=5)  # the first process may have to import torch first
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)

    def _count(self) -> None:
        """Give signs of life; on the first process, look for those of others too."""
        try:
            store = self._store()
        except Exception:  # it was never there, or is gone: nor will the others be found
            if self.rank and not self.done.is_set():
                self._miss_the_first()
                os._exit(1)
            return
        try:
            store.set(f"{PREFIX}name{self.rank}", self.name)
            counts = [0] * self.size
            while not self.done.wait(self.period):
                store.add(f"{PREFIX}count{self.rank}", 1)
                self.answered = time.monotonic()
                if self.rank:
                    if store.check([f"{PREFIX}over"]):
                        break
                    continue
                for rank in range(self.size):
                    count = store.add(f"{PREFIX}count{rank}", 0)
                    if count != counts[rank]:
                        counts[rank], self.heard[rank] = count, time.monotonic()
                        if self.names[rank] is None:
                            self.names[rank] = store.get(f"{PREFIX}name{rank}").decode()
                    if count < 0:  # it is done
                        self.heard[rank] = math.inf
                for name in set(self.gone()) - self.noted:
                    self.noted.add(name)
                    note(f"nothing heard from {name} for {self.silence:.0f} s")
            else:
                if not self.failed:  # else others may wait for it, and are to be told of its node
                    store.set(f"{PREFIX}count{self.rank}", str(-(1 << 40)))
                return
        except Exception:  # whatever a store that is gone makes of it
            self.answered = -math.inf  # which matters only once a collective operation fails
            return
        # The first process has said what there is to say. Beside it, let it end first; the main
        # thread may be in an operation that ends with its timeout, or never.
        if self.rank < self.local_size:
            time.sleep(self.silence)
        os._exit(1)

    def _miss_the_first(self) -> None:
        where, what = os.environ.get("MASTER_ADDR"), "the first process does not answer there"
        print(f"error: {where}: {what}; {self.name} ends too", file=sys.stderr, flush=True)

    def _give_up(self, error) -> None:
        """Say which node is gone, on the first process; end all others, once it has.

        Raises:
            UserError: as said.
        """
        if self.rank:
            # The thread ends this process, unless the store neither answers nor breaks off.
            while time.monotonic() - self.answered < 2 * self.silence:
                time.sleep(self.period)
            self._miss_the_first()
            os._exit(1)
        time.sleep(self.silence + 2 * self.period)  # who is alive is heard of in that time
        names = self.gone()
        resumable = self.save()
        where = ", ".join(names) or "the network between the nodes"
        problem = "gone in the middle of the run" if names else first_line(error)
        if resumable:
            raise LostNode(where, problem, f"the same command goes on {resumable}") from None
        raise UserError(where, problem, "nothing was done since the start; mend it first") from None


def from_main_process(accelerator, do, *arguments):
    """Return what `do(*arguments)` returns on the main process, while all wait.

    Raises:
        UserError: that of the main process, on all.
    """
    from accelerate.utils import broadcast_object_list

    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = do(*arguments)
        except UserError as error:
            answer[1] = error.parts
    result, complaint = broadcast_object_list(answer)
    if complaint is not None:
        accelerator.wait_for_everyone()  # the run ends here too: as at the end of train.py
        raise UserError(*complaint)
    return result


def check_precision(flag: str, precision: str, advice: str) -> None:
    """Refuse, on all processes, that the CPUs of several nodes have led to several precisions.

    Raises:
        UserError: as said.
    """
    from accelerate.utils import gather_object

    if len(set(gather_object([precision]))) > 1:
        problem = "some of the processes have a CPU that is slow in bf16, and some have not"
        raise UserError(flag, problem, advice)


def process_group(timeout: float) -> list:
    """Return what `Accelerator` takes as `kwargs_handlers` for this timeout in seconds.

    Gradients are kept where DDP exchanges them, not a second time, unless they are set to None. No
    buffer has to agree.
    """
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    return [
        InitProcessGroupKwargs(timeout=timedelta(seconds=min(timeout, 1e9))),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
    ]


def _of_collective(error) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error).lower()
