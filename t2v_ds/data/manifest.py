"""What a folder of shards says about itself: `manifest.json`.

The manifest is written last, by renaming, so a folder that has one is whole. It holds nothing that depends on the time,
the machine or the path: preparing the same source with the same settings gives the same bytes. (A text encoder that was
named by its folder is a setting.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2v_ds.config import TextConfig
from t2v_ds.config_loader import from_dict, to_dict
from t2v_ds.errors import DataError
from t2v_ds.files import write_atomically

MANIFEST = "manifest.json"
FORMATS = {"raw": "t2v_ds.raw/1", "tokens": "t2v_ds.tokens/1"}
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
STAGES = {"raw": "t2v prepare", "tokens": "t2v tokenize"}  # what makes each kind


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    name: str
    clips: int
    frames: int
    bytes: int
    sha256: str
    index_sha256: str
    chunk: int
    lengths: dict[str, int]  # frames of a clip -> number of such clips


@dataclass(frozen=True)
class StoredText:
    """The text vectors in token shards: what made them, with which settings, and how many numbers one has."""

    identity: str
    settings: TextConfig
    width: int

    def describe(self, truncated: int) -> dict[str, Any]:
        """The fields of a manifest, where `truncated` captions have more tokens than are stored."""
        settings = to_dict(self.settings)
        return {"text_identity": self.identity, "text": settings, "text_width": self.width, "text_truncated": truncated}


@dataclass
class Manifest:
    """`manifest.json` of a folder of raw or token shards."""

    format: str
    kind: str  # "raw" or "tokens"
    total_clips: int
    total_frames: int
    frames_histogram: dict[str, int]  # frames of a clip -> number of such clips
    shards: list[ShardInfo]
    chunks: list[dict[str, Any]]  # each: chunk, clips, frames, shards (names)
    image_size: int = 0  # pixels a side of the frames
    grid_size: int = 0  # codes a side of a frame (tokens)
    codebook_size: int = 0  # (tokens)
    tokenizer_id: str = ""  # the tokenizer that made the codes (tokens)
    text_identity: str = ""  # the text encoder that made the captions' vectors (tokens); empty: none are stored
    text: dict[str, Any] = field(default_factory=dict)  # the settings that it was built with: encoder, tokens, width
    text_width: int = 0  # numbers in each of its vectors
    text_truncated: int = 0  # clips whose captions have more tokens than are stored
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> clips
    source: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def build(cls, kind: str, shards: Sequence[ShardInfo], **fields: Any) -> Manifest:
        """Make the manifest of `shards` (in order); `fields` are the ones that cannot be summed up from them."""
        histogram: Counter[int] = Counter()
        chunks: dict[int, dict[str, Any]] = {}
        for shard in shards:
            histogram.update({int(length): count for length, count in shard.lengths.items()})
            chunk = chunks.setdefault(shard.chunk, {"chunk": shard.chunk, "clips": 0, "frames": 0, "shards": []})
            chunk["clips"] += shard.clips
            chunk["frames"] += shard.frames
            chunk["shards"].append(shard.name)
        return cls(
            format=FORMATS[kind],
            kind=kind,
            total_clips=sum(shard.clips for shard in shards),
            total_frames=sum(shard.frames for shard in shards),
            frames_histogram={str(length): histogram[length] for length in sorted(histogram)},
            shards=list(shards),
            chunks=[chunks[chunk] for chunk in sorted(chunks)],
            **fields,
        )

    @property
    def stored_text(self) -> StoredText | None:
        """The text vectors in the shards, if there are any.

        Raises:
            ConfigError: their encoder's settings are none that are allowed.
        """
        if not self.text_identity:
            return None
        return StoredText(self.text_identity, from_dict(TextConfig, self.text, MANIFEST, "text."), self.text_width)

    def digest(self) -> str:
        """A hash of the content: the same shards in the same order have the same digest."""
        return digest_of(self.shards)

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` into `folder`, whole or not at all."""
        write_atomically(Path(folder) / MANIFEST, self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `manifest.json` holds."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @classmethod
    def load(cls, folder: str | Path, kind: str | None = None) -> Manifest:
        """Read the manifest of `folder`.

        Raises:
            DataError: no folder, no manifest, not a manifest, or not of the `kind` asked for.
        """
        path = Path(folder) / MANIFEST
        stage = STAGES.get(kind or "", "its stage")
        if not Path(folder).is_dir():
            raise DataError(f"data folder {folder} does not exist: make it with {stage}")
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(f"{folder} has no {MANIFEST}: it is not a data folder, or {stage} has not finished; run it again") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): restore it, or make the folder again with {stage}") from error
        found = data.get("kind") if isinstance(data, dict) else None
        if found not in FORMATS or data.get("format") != FORMATS[found]:
            raise DataError(f"{path} is not a manifest that this version reads: expected format {' or '.join(FORMATS.values())}")
        if kind is not None and found != kind:
            raise DataError(
                f"{folder} holds {found.removesuffix('s')} shards, made by {STAGES[found]}; "
                f"expected {kind.removesuffix('s')} shards, made by {stage}"
            )
        try:
            shards = [ShardInfo(**shard) for shard in data["shards"]]
            for shard in shards:
                if not SHARD_NAME.fullmatch(shard.name):  # a path would lead out of the folder
                    raise ValueError(f"shard name {shard.name!r}")
            if data.get("text_identity") and (type(data["text_width"]) is not int or data["text_width"] < 1):
                raise ValueError(f"text_width {data['text_width']!r}")
            return cls(**{**data, "shards": shards})
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}): restore it, or make the folder again with {stage}") from error


def digest_of(shards: Sequence[ShardInfo]) -> str:
    """Hash the names and checksums of `shards`."""
    lines = "".join(f"{shard.name} {shard.sha256} {shard.index_sha256}\n" for shard in shards)
    return hashlib.sha256(lines.encode()).hexdigest()
