"""Files and folders that are seen whole or not at all, also when the process is killed or the machine dies."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from t2v_ds.errors import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or what the user may have of it
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class DiskError(Exception):
    """A file could not be written here, for the reason `error`: neither the source nor the network is to blame."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """An OSError inside becomes a DiskError: around what writes here, where others are errors of somebody else."""
    try:
        yield
    except OSError as error:
        raise DiskError(error) from error


def is_url(location: str | Path) -> bool:
    """Whether this is a URL (s3://, gs://, https://, file://, ...) and not a path."""
    return "://" in str(location)


def require_writable(flag: str, path: str | Path, folder: bool = False) -> None:
    """Raise ConfigError unless a file (or `folder`) can be made at `path`, as its nearest folder that exists tells; makes nothing."""
    path = Path(path)
    try:
        if not folder and path.is_dir():
            raise ConfigError(f"{flag} is {str(path)!r}, which is a folder; allowed: a file name")
        if folder and path.exists() and not path.is_dir():
            raise ConfigError(f"{flag} is {str(path)!r}, which is a file; allowed: a folder")
        nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        probe = nearest / f".{path.name}.tmp"  # as `write_atomically` names it: too long a name is found, too
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        what = "folder" if folder else "file"
        raise ConfigError(f"{flag} is {str(path)!r}, where no {what} can be made: {error.strerror or error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, force it to disk, then rename it: readers see all of it or none."""
    # The temporary name is fixed, so one left by a killed run is overwritten by the next and not left for ever.
    temporary = path.with_name(f".{path.name}.tmp")
    _write_durably(temporary, data)
    rename_durably(temporary, path)


def create_once(path: Path, data: bytes) -> bool:
    """Write a file that is not there yet, whole or not at all; False, and nothing changes, where another process was faster."""
    temporary = own_name(path)
    _write_durably(temporary, data)
    try:
        os.link(temporary, path)  # unlike a renaming, it fails where the name is taken
    except OSError:
        if not path.exists():
            raise
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def own_name(path: Path) -> Path:
    """A temporary name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left in a folder under temporary names; call where no process writes into it."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def rename_durably(source: Path, target: Path) -> None:
    """`os.replace`, and wait until the directory that names it is on disk."""
    os.replace(source, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Force what a file holds, or the names that a folder holds, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def code_digest() -> str:
    """16 hex digits that name the Python sources of this package: what is trained by other code may be trained otherwise."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.relative_to(Path(__file__).parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def remove_folder(folder: Path) -> None:
    """Delete a folder so that readers see it whole or not at all: rename first, then delete."""
    doomed = folder.with_name(f"{folder.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
