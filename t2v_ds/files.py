"""Files and folders that are seen whole or not at all, also when the process is killed or the machine dies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, force it to disk, then rename it: readers see all of it or none."""
    # The temporary name is fixed, so one left by a killed run is overwritten by the next and not left for ever.
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename_durably(temporary, path)


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


def remove_folder(folder: Path) -> None:
    """Delete a folder so that readers see it whole or not at all: rename first, then delete."""
    doomed = folder.with_name(f"{folder.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
