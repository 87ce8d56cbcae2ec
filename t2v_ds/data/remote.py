"""Data folders anywhere: a path is used as it is; what lies at a URL comes into a folder on this machine, a shard when it is needed.

    URL -> manifest.json -> *.index.json (checked) -> CACHE/NAME-DIGEST/        eagerly
        path(shard) -> there? else: room for it (the longest unused go) -> .SHARD.part -> size, sha256 -> SHARD, locked while in use

The folder's name holds a digest of the manifest, so a shard in it is the right one for ever. All processes of a machine can share a
cache: whoever writes a shard has it locked (flock), and a lock ends with its process, so a kill leaves nothing that blocks; what it
had fetched is used by the next. Shards in use are locked as well, and never deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from t2v_ds.data.disk_cache import PART, DiskCache, own, share
from t2v_ds.data.manifest import MANIFEST, Manifest
from t2v_ds.data.shards import index_path
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.files import DiskError, disk_errors, is_url, sync

logger = logging.getLogger(__name__)

T = TypeVar("T")
_CHUNK = 2**20  # bytes read at a time
_LONGEST_WAIT_S = 30.0
_POLL_S = 0.02
_FETCHES = 16  # indexes at a time
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError, IsADirectoryError)  # trying again does not help
_BUGS = (TypeError, AttributeError, NameError, AssertionError)


class LocalFolder:
    """A folder on this machine; nothing is copied.

    Attributes:
        folder: where manifest and indexes lie.
        location: as the user wrote it.
        open_limit: how many shards may be in use at a time; None: all.
    """

    open_limit: int | None = None

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.location = Path(folder), str(folder)

    def path(self, name: str, size: int, sha256: str) -> Path:
        """Where a shard is; whether it is whole is for the reader to check."""
        return self.folder / name

    def release(self, name: str) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def open_folder(
    location: str | Path, cache_dir: str | Path = "", cache_bytes: int = 2**40, retries: int = 5, backoff_s: float = 0.5
) -> LocalFolder | CachedFolder:
    """A data folder at a path or a URL.

    Args:
        location: a path, or a URL of any scheme that fsspec knows; its package finds the credentials as it does elsewhere.
        cache_dir: for what lies at URLs; a disk of this machine.
        cache_bytes: that the shards in `cache_dir` may take, all data folders together.
        retries: further attempts after the first, for each file.
        backoff_s: seconds before the second attempt, doubled before each further one.

    Raises:
        ConfigError: no cache is given, or it is smaller than a shard.
        DataError: the package of the scheme is missing, or manifest or indexes cannot be fetched or are damaged.
    """
    if not is_url(location):
        return LocalFolder(location)
    return CachedFolder(str(location), cache_dir, cache_bytes, retries, backoff_s)


class CachedFolder:
    """A data folder at a URL, with the shards that were used last on this machine; safe to use from many threads. See `open_folder`.

    Attributes: as of `LocalFolder`; `open_limit` is how many of the largest shards fit the cache.
    """

    def __init__(self, url: str, cache_dir: str | Path, cache_bytes: int, retries: int, backoff_s: float) -> None:
        if not cache_dir:
            raise ConfigError(f"no folder is given to keep {url} in: set cache.folder to one on a disk of this machine")
        self.location, self._cache = url, DiskCache(Path(cache_dir), cache_bytes)
        self._retries, self._backoff_s = retries, backoff_s
        self._files, self._root = _file_system(url)
        data = self._retried(lambda: self._files.cat_file(f"{self._root}/{MANIFEST}"), MANIFEST)
        name = re.sub(r"[^\w.-]", "_", self._root.rstrip("/").rpartition("/")[2]) or "data"
        digest = hashlib.sha256(f"{url.rstrip('/')}\0".encode() + data).hexdigest()
        self.folder = self._cache.folder / f"{name}-{digest[:16]}"
        self._held: dict[str, int] = {}  # name -> descriptor that holds the lock
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"setting 'cache.folder' is {cache_dir}, which cannot be made ({error.strerror}); allowed: a folder"
            ) from error
        if not (self.folder / MANIFEST).is_file() or (self.folder / MANIFEST).read_bytes() != data:
            _write(self.folder / MANIFEST, data)
        manifest = Manifest.load(self.folder)
        largest = max((shard.bytes for shard in manifest.shards), default=0)
        if cache_bytes < largest:
            raise ConfigError(f"setting 'cache.max_bytes' is {cache_bytes}; allowed: at least {largest}, the largest shard of {url}")
        self.open_limit: int | None = max(1, cache_bytes // max(1, largest))
        with ThreadPoolExecutor(_FETCHES) as executor:
            list(executor.map(lambda shard: self._fetch_index(shard.name, shard.index_sha256), manifest.shards))

    def path(self, name: str, size: int, sha256: str) -> Path:
        """A whole shard on this machine, which stays there until it is released.

        Raises:
            DataError: it is missing, cannot be fetched, or is not the one of this size and checksum.
            OSError: it cannot be written here.
        """
        path = self.folder / name
        with self._lock:
            if name in self._held:
                return path
        held = self._take(path, size, sha256)
        with self._lock:
            if name in self._held:
                os.close(held)  # another thread was faster
            else:
                self._held[name] = held
        return path

    def release(self, name: str) -> None:
        """A shard is not in use any more; one that is not held is left alone."""
        with self._lock:
            held = self._held.pop(name, None)
        if held is not None:
            os.close(held)

    def close(self) -> None:
        """Release everything."""
        with self._lock:
            names = list(self._held)
        for name in names:
            self.release(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fetch(self, name: str) -> Path:
        """A small file of the folder that is no shard (such as `tokenizer/config.json`), fetched if it is not here yet.

        Raises:
            DataError: it is missing or cannot be fetched. Whether it is the right one is for the reader to check.
        """
        path = self.folder / name
        if not path.is_file():
            data = self._retried(lambda: self._files.cat_file(f"{self._root}/{name}"), name)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, data)
        return path

    def _fetch_index(self, shard: str, sha256: str) -> None:
        path = index_path(self.folder / shard)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return

        def fetch() -> bytes:
            data: bytes = self._files.cat_file(f"{self._root}/{path.name}")
            if hashlib.sha256(data).hexdigest() != sha256:
                raise _WrongBytes(f"it is not the one that {MANIFEST} names: its checksum differs")
            return data

        _write(path, self._retried(fetch, path.name))

    def _retried(self, attempt: Callable[[], T], name: str) -> T:
        """`attempt()`, again after a while where it fails in a way that may pass."""
        for number in range(self._retries + 1):
            try:
                return attempt()
            except DiskError as error:
                raise error.error from error
            except _FINAL as error:
                what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
                raise DataError(f"{self.location}/{name} {what}: check the URL and who may read it") from error
            except _BUGS:
                raise
            except Exception as error:  # each file system has exceptions of its own
                if number == self._retries:
                    kind = "" if isinstance(error, _WrongBytes) else f"{type(error).__name__}: "
                    what = " ".join(f"{kind}{error}".split())
                    raise DataError(f"{self.location}/{name} could not be fetched in {number + 1} attempts; the last: {what}") from error
                delay = min(self._backoff_s * 2**number, _LONGEST_WAIT_S)
                logger.warning("%s/%s: %s; trying again in %g s", self.location, name, error, delay)
                time.sleep(delay)
        raise AssertionError("not reached")

    def _take(self, path: Path, size: int, sha256: str) -> int:
        """A descriptor with a shared lock on a whole shard, which is fetched if it is not here."""
        while True:
            held = share(path)
            if held is not None:
                if os.fstat(held).st_size == size:
                    with contextlib.suppress(PermissionError):  # the file of another user
                        os.utime(held)  # the time of the last use, for `make_room`
                    return held
                logger.warning("%s does not have %d bytes: it is fetched again", path, size)
                path.unlink(missing_ok=True)
                os.close(held)
            part = own(path.with_name(f".{path.name}{PART}"))
            if part is None or path.exists():  # another thread or process is fetching it, or has just done so
                if part is not None:
                    path.with_name(f".{path.name}{PART}").unlink()
                    os.close(part)
                time.sleep(_POLL_S)
                continue
            with os.fdopen(part, "r+b") as file:
                try:
                    self._cache.make_room(size - os.fstat(part).st_size)
                    self._retried(lambda: self._fetch(path, file, size, sha256), path.name)
                    os.replace(path.with_name(f".{path.name}{PART}"), path)
                    sync(path.parent)
                finally:
                    fcntl.flock(file, fcntl.LOCK_UN)  # closing does not, where a process was forked meanwhile

    def _fetch(self, path: Path, part: Any, size: int, sha256: str) -> None:
        """Fetch what is missing of a shard, and check it; what has arrived stays for the next attempt unless it is wrong."""
        digest = hashlib.sha256()
        part.seek(0)
        while data := part.read(_CHUNK):
            digest.update(data)
        with self._files.open(f"{self._root}/{path.name}", "rb") as source:
            if part.tell():
                try:
                    source.seek(part.tell())
                except (ValueError, NotImplementedError, OSError):  # a server that gives whole files only
                    part.seek(0)
                    part.truncate()
                    digest = hashlib.sha256()
            while data := source.read(_CHUNK):
                with disk_errors():
                    part.write(data)
                digest.update(data)
                if part.tell() > size:
                    break
        with disk_errors():
            part.flush()
            os.fsync(part.fileno())
        if part.tell() < size:
            raise EOFError(f"it ended after {part.tell()} of {size} bytes")
        if digest.hexdigest() != sha256 or part.tell() != size:
            part.seek(0)
            part.truncate()
            raise _WrongBytes(f"its size or sha256 is not what {MANIFEST} says")


class _WrongBytes(Exception):
    pass


def _file_system(url: str) -> tuple[Any, str]:
    """What fsspec has for a URL, and the path in it."""
    import fsspec  # not for everyone who reads a folder of this machine

    try:
        files, root = fsspec.core.url_to_fs(url.rstrip("/"))
        return files, str(root)
    except ImportError as error:
        raise DataError(f"data folder {url} needs a package that is not installed: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise DataError(f"data folder {url} cannot be read ({error}); allowed: a path, s3://, gs://, https://, ...") from error


def _write(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all, where others may write the same; its bytes are checked whenever it is used."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
