"""The files that blocks of rows need, fetched ahead by many threads of one process.

    request(urls of a block) -> queue -> threads -> cache folder; the block's future is done when the last of its URLs is
    release(urls of a block) -> a file that no further block needs is deleted

One process does all the downloads of a run: so a URL with several captions is fetched once, a dead link is tried once,
and the rate limit of a host holds for the whole run. A slow link holds up its own block and a thread, nothing else.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Self

from t2v_ds.data.download import Fetcher, cache_path
from t2v_ds.data.gif import RejectedClip

Failures = dict[str, RejectedClip]  # URL -> why it could not be fetched


@dataclass
class _Order:
    """A block that waits for its files."""

    urls: list[str]
    missing: set[str]
    future: Future[Failures] = field(default_factory=Future)


class Prefetcher:
    """Fetches what is requested, each URL once until its last use is released.

    Args:
        fetcher: does the work.
        uses: how many requests will name each URL.
        threads: downloads at a time.
    """

    def __init__(self, fetcher: Fetcher, uses: Counter[str], threads: int) -> None:
        self._fetcher, self._uses = fetcher, uses
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._outcomes: dict[str, RejectedClip | None] = {}
        self._waiting: dict[str, list[_Order]] = {}
        self._lock = threading.Lock()
        self._threads = min(threads, len(uses))
        self._is_open = True
        for _ in range(self._threads):
            # daemon: when the run is interrupted nobody waits for a slow server.
            threading.Thread(target=self._work, daemon=True).start()

    def request(self, urls: Iterable[str]) -> Future[Failures]:
        """Fetch these; the result says which of them failed. An error of this machine's disk is the future's exception."""
        wanted = list(urls)
        with self._lock:
            order = _Order(wanted, {url for url in wanted if url not in self._outcomes})
            for url in wanted:
                if url in order.missing:
                    if url not in self._waiting:
                        self._waiting[url] = []
                        self._queue.put(url)
                    self._waiting[url].append(order)
            if not order.missing:
                order.future.set_result(self._failures(wanted))
        return order.future

    def release(self, urls: Iterable[str]) -> None:
        """A block that requested these is finished."""
        for url in urls:
            self._uses[url] -= 1
            if self._uses[url] <= 0:
                with self._lock:
                    self._outcomes.pop(url, None)
                cache_path(self._fetcher.folder, url).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        for _thread in range(self._threads):
            self._queue.put(None)

    def _failures(self, urls: list[str]) -> Failures:
        return {url: outcome for url in urls if (outcome := self._outcomes[url]) is not None}

    def _work(self) -> None:
        while (url := self._queue.get()) is not None and self._is_open:
            outcome: RejectedClip | None = None
            error: BaseException | None = None
            try:
                self._fetcher.fetch(url)
            except RejectedClip as rejected:
                outcome = rejected
            except BaseException as problem:
                error = problem
            with self._lock:
                self._outcomes[url] = outcome
                for order in self._waiting.pop(url):
                    order.missing.discard(url)
                    if order.future.done():
                        continue
                    if error is not None:
                        order.future.set_exception(error)
                    elif not order.missing:
                        order.future.set_result(self._failures(order.urls))
