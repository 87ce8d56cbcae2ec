"""Files on this machine's disk that several processes share, fetch and delete without a server between them.

    own: the only lock, for who writes a file under its name with PART -> renamed -> share: a lock of many, for who reads it
    make_room: the files that nobody has locked go, the longest unused first

Locks are those of flock: they belong to an open file and end with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

PART = ".part"  # behind the name of a shard that is being fetched, and a dot before it


class DiskCache:
    """Shards in the folders of a folder.

    Args:
        folder: of all.
        limit: bytes that the shards may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._has_warned = False

    def make_room(self, size: int) -> None:
        """Delete shards until `size` more bytes fit: those that were not used for the longest, and none that is in use."""
        with _locked(self.folder / ".lock"):
            files = []
            for path in (*self.folder.glob("*/*.tar"), *self.folder.glob(f"*/.*.tar{PART}")):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    files.append((stat.st_mtime_ns, stat.st_size, path))
            excess = sum(one[1] for one in files) + size - self.limit
            for _, freed, path in sorted(files):
                if excess <= 0:
                    return
                held = own(path, create=False)
                if held is not None:
                    path.unlink()
                    os.close(held)
                    excess -= freed
        if excess > 0 and not self._has_warned:
            self._has_warned = True
            logger.warning("%s is %d bytes over its limit of %d: all shards in it are in use", self.folder, excess, self.limit)


def share(path: Path) -> int | None:
    """A descriptor with a shared lock; None where there is no such file."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # deleted before it was locked


def own(path: Path, create: bool = True) -> int | None:
    """A descriptor with the only lock on the file of this name; None where another has one, or there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)  # in use, or renamed or deleted before it was locked
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
