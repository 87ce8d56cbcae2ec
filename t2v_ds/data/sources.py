"""Where clips come from: a folder of GIFs, a TSV of URLs (TGIF), or moving shapes drawn on the fly.

    PrepareConfig -> open_source -> Source: row i -> Clip (frames, durations, caption, provenance) or RejectedClip

A source is small and picklable: worker processes get a copy and load the rows that they are told to. Row i is the same
clip in every process and every run; `describe()` says which source it is, so that a restart cannot mix two.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from t2v_ds.config import PrepareConfig
from t2v_ds.data.download import Fetcher
from t2v_ds.data.gif import RejectedClip, decode_gif
from t2v_ds.data.moving_shapes import draw_clip, held_out_combinations
from t2v_ds.data.tsv import Row, file_rows, url_rows
from t2v_ds.errors import ConfigError, DataError, nearest

MOVING_SHAPES = "moving-shapes"
_LARGEST_FILE = 256 * 2**20  # bytes of a GIF of a folder; read whole


@dataclass(frozen=True)
class Clip:
    """One clip of a source: frames [T, S, S, 3] uint8, T durations in milliseconds, its caption and where it is from."""

    frames: np.ndarray
    durations_ms: list[int]
    caption: str
    provenance: dict[str, Any]


class Source(Protocol):
    """Numbered clips; picklable."""

    @property
    def name(self) -> str:
        """Of the kind of source."""

    @property
    def is_drawn(self) -> bool:
        """Are the clips drawn by chance? Then two that are equal are no mistake, and none is rejected as a duplicate."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The name of row `i` in the shards: unique, without dots."""

    def where(self, i: int) -> str:
        """The file or URL of row `i`, for the list of rejected clips."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source; another source never describes itself the same."""

    def urls(self, rows: range) -> list[str]:
        """What must be downloaded before the rows are loaded."""

    def fetcher(self, config: PrepareConfig) -> Fetcher:
        """Downloads it."""

    def set_failures(self, failures: Mapping[str, RejectedClip]) -> None:
        """Tell which of the URLs of the rows that are loaded next could not be fetched."""

    def load(self, i: int, config: PrepareConfig) -> Clip:
        """Load row `i`; RejectedClip if it is no clip for the data set."""


def open_source(config: PrepareConfig) -> Source:
    """Open the source that `config.source` names.

    Raises:
        DataError: unknown or missing source, a folder without GIFs, or a bad row in a TSV (with file and line).
        ConfigError: `captions` given for a source that has its own.
    """
    path = Path(config.source)
    if config.captions and not path.is_dir() and (config.source == MOVING_SHAPES or path.is_file()):
        raise ConfigError(f"setting 'captions' is '{config.captions}', but source '{config.source}' has captions of its own: leave it out")
    if config.source == MOVING_SHAPES:
        return MovingShapesSource(config.clips, config.seed)
    if path.is_dir():
        return open_folder(path, config.captions)
    if path.is_file():
        return UrlSource(url_rows(path), config.download.max_bytes)
    if not config.source:
        raise DataError(f"no source was given: name a folder of GIFs, a TSV of 'url TAB caption', or '{MOVING_SHAPES}'")
    hint = f" ({nearest(config.source, [MOVING_SHAPES])})" if "mov" in config.source or "shape" in config.source else ""
    raise DataError(f"source '{config.source}' does not exist: it is neither a folder of GIFs, nor a TSV file, nor '{MOVING_SHAPES}'{hint}")


class _Rows:
    """What the sources share: names of rows, files of somebody else's making, and nothing to fetch."""

    is_drawn = False

    def key(self, i: int) -> str:
        """See `Source`."""
        return f"{i:08d}"

    def urls(self, rows: range) -> list[str]:
        """See `Source`."""
        return []

    def fetcher(self, config: PrepareConfig) -> Fetcher:
        """See `Source`."""
        # A part has a folder of its own: no other part deletes a file that it is about to read.
        folder = f"part-{config.part.replace('/', '-of-')}" if config.part else "all"
        return Fetcher(Path(config.out) / "downloads" / folder, config.download)

    def set_failures(self, failures: Mapping[str, RejectedClip]) -> None:
        """See `Source`."""


@dataclass(frozen=True)
class MovingShapesSource(_Rows):
    """Captioned shapes that move, drawn from (seed, row)."""

    is_drawn = True
    clips: int
    seed: int
    name: str = MOVING_SHAPES

    def __len__(self) -> int:
        return self.clips

    def where(self, i: int) -> str:
        """See `Source`."""
        return f"{self.name} {i}"

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        # The first clip stands for the drawing: a run begun with an older version of it is not continued with this one.
        probe = hashlib.sha256(draw_clip(0, self.seed, 32, 4, 4)[0].tobytes()).hexdigest()
        held_out = held_out_combinations()
        return {"name": self.name, "rows": self.clips, "seed": self.seed, "digest": probe, "held_out": held_out}

    def load(self, i: int, config: PrepareConfig) -> Clip:
        """See `Source`."""
        frames, durations, caption, attributes = draw_clip(i, self.seed, config.image_size, config.min_frames, config.max_frames)
        return Clip(frames, durations, caption, {"source": self.name, "index": i, "seed": self.seed, "attributes": attributes})


@dataclass(frozen=True)
class FolderSource(_Rows):
    """GIF files of a folder."""

    root: str
    rows: Sequence[Row]
    captions: str  # "tsv" or "file names"
    name: str = "folder"

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        """See `Source`."""
        return self.rows[i].location

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        digest = hashlib.sha256()
        for row in self.rows:  # sizes and not the content: a restart must not read everything again to find out
            path = Path(self.root, row.location)
            size = path.stat().st_size if path.is_file() else -1
            digest.update(f"{row.location}\t{row.caption}\t{size}\n".encode("utf-8", "surrogateescape"))
        return {"name": self.name, "rows": len(self.rows), "captions": self.captions, "digest": digest.hexdigest()}

    def load(self, i: int, config: PrepareConfig) -> Clip:
        """See `Source`."""
        row = self.rows[i]
        path = Path(self.root, row.location)
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise RejectedClip("too_large", f"{path.stat().st_size} bytes; at most {_LARGEST_FILE}")
            if not path.is_file():  # reading a pipe would wait for ever
                raise RejectedClip("missing_file", "not a regular file")
            data = path.read_bytes()
        except OSError as error:
            raise RejectedClip("missing_file", error.strerror or str(error)) from error
        return _decode(data, row, config, {"source": self.name, "file": row.location})


@dataclass
class UrlSource(_Rows):
    """GIFs named by URL, which lie in OUT/downloads until the last block that needs them is finished."""

    rows: Sequence[Row]
    max_bytes: int
    name: str = "urls"
    _failures: Mapping[str, RejectedClip] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, i: int) -> str:
        """See `Source`."""
        return self.rows[i].location

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        lines = "".join(f"{row.location}\t{row.caption}\n" for row in self.rows)
        digest = hashlib.sha256(lines.encode()).hexdigest()
        return {"name": self.name, "rows": len(self.rows), "max_bytes": self.max_bytes, "digest": digest}

    def urls(self, rows: range) -> list[str]:
        """See `Source`."""
        return list(dict.fromkeys(self.rows[i].location for i in rows if self.rows[i].caption))

    def set_failures(self, failures: Mapping[str, RejectedClip]) -> None:
        """See `Source`."""
        self._failures = failures

    def load(self, i: int, config: PrepareConfig) -> Clip:
        """See `Source`."""
        row = self.rows[i]
        _check_caption(row)
        if row.location in self._failures:
            failed = self._failures[row.location]
            raise RejectedClip(failed.reason, failed.detail)
        data = self.fetcher(config).read(row.location)
        return _decode(data, row, config, {"source": self.name, "url": row.location, "row": i})


def _check_caption(row: Row) -> None:
    if not row.caption:
        raise RejectedClip("empty_caption", row.problem or "the caption is empty")


def _decode(data: bytes, row: Row, config: PrepareConfig, provenance: dict[str, Any]) -> Clip:
    _check_caption(row)
    gif = decode_gif(
        data, config.max_frames, size=config.image_size, min_frames=config.min_frames, require_trailer=config.require_trailer
    )  # fmt: skip
    provenance |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "width": gif.width, "height": gif.height}
    return Clip(gif.frames, gif.durations_ms, row.caption, provenance)


def open_folder(root: Path, captions: str = "") -> FolderSource:
    """All GIFs under `root`, sorted by path, with the captions of a TSV or of their names.

    With a TSV, a file that it does not name is rejected as without a caption, a file that it names and is not there as
    missing, and a file that it names twice is two clips.
    """
    files = _gif_files(root)
    table = _captions_path(root, captions)
    if table is None:
        if not files:
            raise DataError(f"folder {root} holds no .gif file")
        return FolderSource(str(root), [Row(name, caption_of_name(name), "the file name holds no word") for name in files], "file names")
    named = file_rows(table)
    if not files and not named:
        raise DataError(f"folder {root} holds no .gif file")
    if named and not any(Path(root, row.location).is_file() for row in named):
        raise DataError(
            f"captions file {table} names none of the {len(files)} GIFs in {root}: its first column holds paths inside that folder"
        )
    listed = {row.location for row in named}
    unlisted = [Row(name, "", f"{table.name} has no caption for it") for name in files if name not in listed]
    return FolderSource(str(root), sorted([*named, *unlisted], key=lambda row: row.location), "tsv")  # stable: order of the TSV


def _gif_files(root: Path) -> list[str]:
    found = []
    for folder, _, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        found += [(inside / name).as_posix() for name in names if name.lower().endswith(".gif")]
    return sorted(found)


def _captions_path(root: Path, captions: str) -> Path | None:
    if captions:
        if not Path(captions).is_file():
            raise DataError(f"captions file {captions} does not exist")
        return Path(captions)
    absolute = root.absolute()
    for path in (absolute / "captions.tsv", absolute.with_name(f"{absolute.name}.tsv")):
        if path.is_file():
            return path
    return None


def caption_of_name(name: str) -> str:
    """A caption from a file's name: separators become spaces, digits go.

    >>> caption_of_name("pets/cat_jumps-2.gif")
    'cat jumps'
    """
    return " ".join(re.sub(r"(?:[\d_]|[^\w'])+", " ", PurePosixPath(name).stem).split())
