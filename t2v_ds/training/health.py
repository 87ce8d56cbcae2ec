"""What keeps a long run honest: stop signals, a policy for non-finite losses, and a watchdog for hangs.

This module imports neither torch nor DeepSpeed, so that `install_stop_signals` can run before those slow imports:
a preemption signal that arrives during them must set the flag, not kill the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

from t2v_ds.errors import UserError

logger = logging.getLogger(__name__)

WATCHDOG_EXIT_CODE = 3
MAX_SKIPPED_IN_A_ROW = 20
MAX_NAMED_RANKS = 16
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_stop_signal: int | None = None


class StopRequested(SystemExit):
    """Raised after a stop signal once the checkpoint is safe; uncaught, it ends the process with code 0."""

    def __init__(self, step: int) -> None:
        super().__init__(0)
        self.step = step


def install_stop_signals() -> None:
    """From now on SIGTERM and SIGUSR1 set a flag (see `stop_requested`) instead of ending the process."""
    for number in STOP_SIGNALS:
        signal.signal(number, _remember)


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Within it stop signals set the flag; after it they do what they did before. Nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    install_stop_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _remember(number: int, frame: FrameType | None) -> None:
    global _stop_signal
    _stop_signal = number


def stop_requested() -> bool:
    """Has this process received a stop signal?"""
    return _stop_signal is not None


class NonFinitePolicy:
    """Counts optimizer steps that were skipped because a loss or gradient was not finite."""

    def __init__(self, limit: int = MAX_SKIPPED_IN_A_ROW) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def applied(self) -> None:
        """A step went well."""
        self.in_a_row = 0

    def skipped(self, step: int, culprits: list[str]) -> None:
        """Count a skipped step.

        Args:
            step: the optimizer step, counted from 1.
            culprits: names of the losses that were not finite on any rank; empty: only gradients were not.

        Raises:
            UserError: `limit` steps in a row were skipped.
        """
        self.total += 1
        self.in_a_row += 1
        what = "loss " + ", ".join(f"'{name}'" for name in culprits) if culprits else "the gradient"
        logger.warning("step %d skipped: %s is not finite (%d in a row)", step, what, self.in_a_row)
        if self.in_a_row >= self.limit:
            raise UserError(
                f"training stopped at step {step}: {what} was not finite in {self.in_a_row} steps in a row; "
                "lower train.learning_rate, set train.precision=fp32, or check the data, then run again to resume"
            )


class Noticeboard(Protocol):
    """Where every rank posts what it does, for the others to read; it must work while ranks hang in a collective."""

    def post(self, text: str) -> None:
        """Replace what this rank has posted."""

    def read(self) -> dict[int, str]:
        """What each of the other ranks has posted last; those that have not are not in it."""


class Watchdog:
    """A thread that ends the process, naming rank, step and phase, when no `beat` came for `limit_s` seconds.

    A hang in a collective cannot be interrupted from Python, so the process is ended without clean-up; the launcher
    then ends the other ranks. As a rank that hangs makes all others wait for it, what they last said is named as well.
    """

    def __init__(self, limit_s: float, rank: int, end: Callable[[int], None] = os._exit, board: Noticeboard | None = None) -> None:
        self.limit_s = limit_s
        self.rank = rank
        self._end, self._board = end, board
        self._beat = (time.monotonic(), 0, "start")
        self._post_every_s = min(10.0, limit_s / 8)
        self._posted_at, self._posts = -math.inf, 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.limit_s > 0:
            self.beat(0, "start")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """Say that the rank is alive and enters `phase` of `step`."""
        self._beat = (time.monotonic(), step, phase)

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.limit_s / 8)):
            since, step, phase = self._beat
            waited = time.monotonic() - since
            if waited > self.limit_s:
                logger.critical(
                    "rank %d hangs at step %d (%s): nothing happened for %.0f s (train.watchdog_s is %g); ending the process%s",
                    self.rank, step, phase, waited, self.limit_s, self._others(),
                )  # fmt: skip
                faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
                logging.shutdown()
                self._end(WATCHDOG_EXIT_CODE)
                return
            if self._board is not None and time.monotonic() - self._posted_at >= self._post_every_s:
                self._posted_at, self._posts = time.monotonic(), self._posts + 1  # counted, so that each post is another
                self._board.post(f"{self._posts} step {step} ({phase})")

    def _others(self) -> str:
        """What the other ranks do, those first that have fallen silent: a stopped process or a lost node says nothing itself."""
        if self._board is None:
            return ""
        before = self._board.read()
        time.sleep(2.5 * self._post_every_s)
        after = self._board.read()
        silent = [rank for rank in before if after.get(rank) == before[rank]]
        said = [f"rank {rank} is silent since {before[rank].partition(' ')[2]}" for rank in silent]
        said += [f"rank {rank} is at {text.partition(' ')[2]}" for rank, text in after.items() if rank not in silent]
        return "".join(f"; {one}" for one in said[:MAX_NAMED_RANKS])
