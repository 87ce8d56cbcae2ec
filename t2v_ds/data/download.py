"""A URL -> a file in a cache folder: bounded in size and time, tried again, never half-written.

    url -> cached? -> done
        -> the host's turn (rate limit, Retry-After) -> ask -> temporary file (type, size and length checked as it grows) -> rename
        -> not whole, busy or silent: again, as long as retries and time are left

A fault of this machine's disk is an error, never a rejected clip.
"""

from __future__ import annotations

import datetime
import email.utils
import hashlib
import http.client
import os
import threading
import time
import urllib.error
import urllib.parse
from collections import defaultdict
from pathlib import Path

from t2v_ds.config import DownloadConfig
from t2v_ds.data.gif import RejectedClip, parse_gif
from t2v_ds.data.transport import RefusedAddress, open_url
from t2v_ds.files import DiskError, disk_errors

_BACKOFF_S = 0.5  # before the first retry; doubled for each further one
_RETRY_STATUS = (408, 425, 429)  # and all of 5xx
_PIECE = 1 << 16
_MAGIC = (b"GIF87a", b"GIF89a")


class _Temporary(Exception):
    """This attempt failed; another may not. Holds the seconds that the server asks to wait, if it does."""

    def __init__(self, problem: str, wait_s: float | None = None) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


def cache_path(folder: Path, url: str) -> Path:
    """Where the download of `url` is kept."""
    name = hashlib.sha256(url.encode()).hexdigest()[:40]
    return folder / name[:2] / f"{name}.gif"


class _Hosts:
    """When each host may be asked next, for all threads."""

    def __init__(self, per_second: float) -> None:
        self._gap = 1 / per_second if per_second else 0.0
        self._next: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def wait(self, host: str) -> None:
        """Wait for this caller's turn."""
        while True:
            with self._lock:
                now = time.monotonic()
                pause = self._next[host] - now
                if pause <= 0:
                    self._next[host] = now + self._gap
                    return
            time.sleep(pause)  # and look again: the host may have been held, or another was faster

    def hold(self, host: str, seconds: float) -> None:
        """Ask this host nothing for so long."""
        with self._lock:
            self._next[host] = max(self._next[host], time.monotonic() + seconds)


class Fetcher:
    """Downloads into one cache folder; safe to use from many threads.

    Args:
        folder: the cache.
        config: limits.
    """

    def __init__(self, folder: Path, config: DownloadConfig) -> None:
        self.folder, self.config = folder, config
        self._hosts = _Hosts(config.per_host)

    def fetch(self, url: str) -> Path:
        """Download `url` unless it is there already; returns the file's path.

        Raises:
            RejectedClip: "dead_link" (an answer such as 404), "download_failed" (after the retries), "too_large" or
                "not_a_gif".
            OSError: the file cannot be written here.
        """
        path = cache_path(self.folder, url)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        host = urllib.parse.urlsplit(url).netloc
        self._hosts.wait(host)
        deadline = time.monotonic() + self.config.total_s
        failures = 0
        while True:
            try:
                self._attempt(url, path, deadline)
                return path
            except DiskError as error:
                raise error.error from None
            except _Temporary as error:
                # A server that says when to come back is obeyed for as long as there is time; that is no failure of the clip.
                failures += error.wait_s is None
                pause = _BACKOFF_S * 2 ** (failures - 1) if error.wait_s is None else error.wait_s
                if failures > self.config.retries or time.monotonic() + pause >= deadline:
                    asked = f", which asks to wait {error.wait_s:.0f} s" if error.wait_s else ""
                    raise RejectedClip("download_failed", f"{error}{asked}") from error
                if error.wait_s is None:
                    time.sleep(pause)
                else:
                    self._hosts.hold(host, pause)
            self._hosts.wait(host)

    def read(self, url: str) -> bytes:
        """What `url` holds; raises as `fetch` does."""
        try:
            return self.fetch(url).read_bytes()
        except FileNotFoundError:  # the same part runs twice, and the other process had no more use for it
            return self.fetch(url).read_bytes()

    def _attempt(self, url: str, path: Path, deadline: float) -> None:
        """Download once; turns what can go wrong into `RejectedClip` or `_Temporary`."""
        try:
            self._download(url, path, deadline)
        except RefusedAddress as error:
            raise RejectedClip("download_failed", str(error)) from error
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"HTTP {error.code}" + (", redirected too often" if 300 <= error.code < 400 else "")
            if error.code in _RETRY_STATUS or error.code >= 500:
                raise _Temporary(problem, _retry_after(error.headers.get("Retry-After"))) from error
            raise RejectedClip("dead_link" if error.code >= 400 else "download_failed", problem) from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, RefusedAddress):
                raise RejectedClip("download_failed", str(reason)) from error
            raise _Temporary(f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)) from error

    def _download(self, url: str, path: Path, deadline: float) -> None:
        config = self.config
        # Threads of one process may fetch the same URL; the process and thread in the name keep them apart.
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with open_url(url, config.timeout_s, deadline, config.allow_private) as response:
                expected = response.length
                if expected is not None and expected > config.max_bytes:
                    raise RejectedClip("too_large", f"{expected} bytes; at most {config.max_bytes}")
                size = self._save(response, temporary)
                if expected is not None and size != expected:
                    raise ConnectionError(f"the connection closed after {size} of {expected} bytes")
                if expected is None and not response.chunked:
                    _check_whole(temporary)
            with disk_errors():
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _save(self, response: http.client.HTTPResponse, temporary: Path) -> int:
        """Write the body to a file as it comes; returns its bytes."""
        size, head = 0, b""
        with disk_errors():
            file = temporary.open("wb")
        with file:
            # read1 returns what has arrived: a time-out then means no byte for that long, not a slow piece.
            while piece := response.read1(_PIECE):
                size += len(piece)
                if size > self.config.max_bytes:
                    raise RejectedClip("too_large", f"more than {self.config.max_bytes} bytes")
                if len(head) < len(_MAGIC[0]):
                    head += piece[:16]
                    if not any(head.startswith(magic) or magic.startswith(head) for magic in _MAGIC):
                        kind = response.headers.get("Content-Type", "no type")
                        raise RejectedClip("not_a_gif", f"the answer, called {kind}, begins with {head[:16]!r}")
                with disk_errors():
                    file.write(piece)
            with disk_errors():
                file.flush()
                os.fsync(file.fileno())
        return size


def _check_whole(path: Path) -> None:
    """Where the server did not say how long the file is, only the file can tell that it was cut."""
    try:
        parse_gif(path.read_bytes())
    except RejectedClip as rejected:
        if rejected.reason == "truncated":
            raise ConnectionError("the connection closed inside the GIF") from rejected


def _retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date; None if there is none."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
