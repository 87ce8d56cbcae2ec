"""A small data folder, and ways in which disks, networks and programs damage one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2v_ds.data.manifest import MANIFEST, Manifest
from t2v_ds.data.shards import ARRAYS, index_path, npy_bytes, raw_members, token_members, write_shard
from t2v_ds.data.validate import Codes

CODES = Codes("t" * 16, 64, 6, 24)
SHARDS, CLIPS = 2, 6  # clips a shard
LARGE = 32  # a side of frames that take more than one short read
Clip = tuple[np.ndarray, str]  # array, caption
Edit = Callable[[Path, str], None]  # of a folder of this kind


def make_clip(i: int, kind: str, version: int = 0, side: int = CODES.grid_size) -> np.ndarray:
    rng = np.random.default_rng([i, version])
    length = 2 + i % 3
    if kind == "tokens":
        return rng.integers(0, CODES.codebook_size, (length, side, side), dtype=np.uint16)
    return rng.integers(0, 256, (length, side, side, 3), dtype=np.uint8)


def build(folder: Path, kind: str, version: int = 0, side: int = CODES.grid_size) -> dict[str, Clip]:
    """Write a folder of clips of 2 to 4 frames; returns what it holds by key."""
    folder.mkdir(parents=True)
    make = token_members if kind == "tokens" else raw_members
    shards, clips = [], {}
    for shard in range(SHARDS):
        samples = []
        for i in range(shard * CLIPS, (shard + 1) * CLIPS):
            array, caption = make_clip(i, kind, version, side), f"caption {i}"
            clips[f"{i:08d}"] = (array, caption)
            samples.append((f"{i:08d}", make(array, caption, [50] * len(array), {"source": "test"})))
        shards.append(write_shard(folder / f"{kind}-{shard:05d}.tar", samples))
    fields: dict[str, Any] = {"image_size": side}
    if kind == "tokens":
        fields = {"image_size": 4 * side, "grid_size": side, "codebook_size": CODES.codebook_size, "tokenizer_id": CODES.tokenizer_id}
    Manifest.build(kind, shards, **fields).save(folder)
    return clips


# --- what is done to the folder --------------------------------------------------------------------------------------


def shard_of(folder: Path, kind: str, number: int = 0) -> Path:
    return folder / f"{kind}-{number:05d}.tar"


def place(path: Path, clip: int, member: str) -> tarfile.TarInfo:
    """Where a member of the clip of this number lies."""
    with tarfile.open(path) as tar:
        return next(info for info in tar.getmembers() if info.name.startswith(f"{clip:08d}.") and info.name.endswith(member))


def with_bytes(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    made = change(data)
    path.write_bytes(data if made is None else made)


def header_edit(member: str, start: int, new: bytes, keep_checksum: bool = False) -> Edit:
    """Put bytes into the header of a member of clip 2, and make the checksum right again."""

    def edit(folder: Path, kind: str) -> None:
        path = shard_of(folder, kind)
        at = place(path, 2, member).offset

        def change(data: bytearray) -> None:
            data[at + start : at + start + len(new)] = new
            if not keep_checksum:
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])

        with_bytes(path, change)

    return edit


def payload_edit(member: str, start: int, new: bytes | None = None) -> Edit:
    """Put bytes into a member of clip 2; None: flip a bit there."""

    def edit(folder: Path, kind: str) -> None:
        path = shard_of(folder, kind)
        at = place(path, 2, member).offset_data + start

        def change(data: bytearray) -> None:
            data[at : at + len(new or b"x")] = new or bytes([data[at] ^ 1])

        with_bytes(path, change)

    return edit


def cut(where: Callable[[Path], int]) -> Edit:
    return lambda folder, kind: os.truncate(shard_of(folder, kind), where(shard_of(folder, kind)))


def rewrite(change: Callable[[list[tuple[tarfile.TarInfo, bytes]], str], None]) -> Edit:
    """Write the first shard again from its members."""

    def edit(folder: Path, kind: str) -> None:
        path = shard_of(folder, kind)
        with tarfile.open(path) as tar:
            members = [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]
        change(members, ARRAYS[kind])
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for info, payload in members:
                info.size = len(payload) if info.isreg() else 0
                tar.addfile(info, io.BytesIO(payload))

    return edit


def replaced(member: str, payload: Callable[[bytes], bytes]) -> Edit:
    """The shard as a writer with this fault would have written it."""

    def change(members: list[tuple[tarfile.TarInfo, bytes]], array: str) -> None:
        for n, (info, old) in enumerate(members):
            if info.name.startswith("00000002.") and info.name.endswith(member):
                members[n] = (info, payload(old))

    return rewrite(change)


def duplicate(members: list[tuple[tarfile.TarInfo, bytes]], array: str) -> None:
    again = [tarfile.TarInfo(info.name) for info, _ in members[2:4]]
    members += [(again[0], members[0][1]), (again[1], members[1][1])]


def without_json(members: list[tuple[tarfile.TarInfo, bytes]], array: str) -> None:
    del members[5]


def as_link(members: list[tuple[tarfile.TarInfo, bytes]], array: str) -> None:
    members[4][0].type, members[4][0].linkname = tarfile.SYMTYPE, "/etc/hostname"


def escaping(members: list[tuple[tarfile.TarInfo, bytes]], array: str) -> None:
    for info, _ in members[4:6]:
        info.name = f"../{info.name}"


def pickled(_: bytes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def other_dtype(payload: bytes) -> bytes:
    return npy_bytes(np.load(io.BytesIO(payload)).astype(np.float32))


def older(folder: Path, kind: str) -> None:
    build(folder / "old", kind, version=1)
    shutil.copyfile(shard_of(folder / "old", kind), shard_of(folder, kind))
    shutil.rmtree(folder / "old")


def joined(folder: Path, kind: str) -> None:
    """`cat a.tar b.tar`, with the members of b under other names."""
    path = shard_of(folder, kind)
    more = path.read_bytes()
    for i in range(CLIPS):
        more = re.sub(rb"0000000%d\." % i, rb"1000000%d." % i, more)
    blocks = bytearray(more)
    with tarfile.open(path) as tar:
        for info in tar.getmembers():
            blocks[info.offset + 148 : info.offset + 156] = b" " * 8
            blocks[info.offset + 148 : info.offset + 156] = b"%06o\0 " % sum(blocks[info.offset : info.offset + 512])
    path.write_bytes(path.read_bytes() + bytes(blocks))


def edit_text(name: str, old: str, new: str) -> Edit:
    def edit(folder: Path, kind: str) -> None:
        path = folder / name.format(kind)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def append(data: bytes) -> Edit:
    return lambda folder, kind: with_bytes(shard_of(folder, kind), lambda old: bytes(old) + data)


@dataclass(frozen=True)
class Fault:
    """A damage and what is expected of us."""

    name: str
    edit: Edit
    ours: str  # "STEP: pattern of the sentence"
    index: str = ""  # pattern of what t2v index says of others' tars; empty: they do not show the damage
    kept: int = 11  # good clips that are left in the index then
    more: int = 0  # clips that the damage adds
    in_tar: bool = True  # others' tars and readers can have it


GARBAGE = bytes(range(1, 256)) * 3
SIZE, SHA, CRC = r"open: has \d+ bytes instead of", "verify: sha256 differs", "read: 00000002 .*checksum differs"
SIZE_OR_CRC = r"(open|read): (has \d+ bytes instead of|00000002 .*checksum differs)"
FAULTS = [
    Fault("cut between two clips", cut(lambda p: place(p, 3, "npy").offset), SIZE, "ends early: it ends at byte", 9),
    Fault("cut inside a header", cut(lambda p: place(p, 3, "npy").offset + 300), SIZE, "ends early: it ends at byte", 9),
    Fault("cut inside a payload", cut(lambda p: place(p, 3, "npy").offset_data + 50), SIZE, "ends early: .*goes beyond", 9),
    Fault("end marker cut off", cut(lambda p: place(p, 5, "json").offset_data + 512), SIZE, "ends early: it ends at byte", 12),
    Fault("empty file", cut(lambda _: 0), "open: has 0 bytes instead of", "ends early: it ends at byte 0", 6),
    Fault("checksum field of a header", header_edit("npy", 150, b"7", True), SHA, "tar_header: .*checksum is wrong"),
    Fault("flipped byte in a header", header_edit("json", 3, b"7", True), SHA, "tar_header: .*checksum is wrong"),
    Fault("flipped byte in an array", payload_edit("npy", 140), CRC),
    Fault("flipped byte in a caption", payload_edit("json", 20), CRC),
    Fault("zeros over a header and what follows", header_edit("npy", 0, bytes(1024), True), CRC, "zeros: .*members behind them"),
    Fault("zeros over a text", payload_edit("json", 0, bytes(60)), CRC, "json: .*not JSON"),
    Fault("size field beyond the file", header_edit("npy", 124, b"00077777777\0"), SHA, "size: .*goes beyond"),
    Fault("size field covers the next member", header_edit("npy", 124, b"00000005000\0"), SHA, "size: .*covers the header of another"),
    Fault("size field not octal", header_edit("npy", 124, b"0000000z700\0"), SHA, "tar_header: .*size that is no number"),
    Fault("a key twice, with other data", rewrite(duplicate), SHA, "duplicate_key: .*00000001 is there twice", 12),
    Fault("a member missing", rewrite(without_json), SIZE_OR_CRC, r"member_missing: .*00000002\.json is missing"),
    Fault("JSON broken", payload_edit("json", 0, b"x"), CRC, "json: .*not JSON"),
    Fault("npy header broken", payload_edit("npy", 12, b"?"), CRC, "npy_header: .*not a .npy file"),
    Fault("a pickled object in the npy", replaced("npy", pickled), SIZE_OR_CRC, "array: .*holds object"),
    Fault("another dtype in the npy", replaced("npy", other_dtype), SIZE_OR_CRC, "array: .*holds float32"),
    Fault("a path that leads out: ../KEY", rewrite(escaping), SHA, r"member_name: .*\.\./00000002"),
    Fault("a symbolic link instead of a file", rewrite(as_link), SIZE_OR_CRC, "not_a_file: .*symbolic link"),
    Fault("bytes behind the end marker", append(GARBAGE), SIZE, "trailing: .*behind the end marker", 12),
    Fault("two tars joined", joined, SIZE, "zeros: .*members behind them", 18, more=6),
    Fault("shard missing", lambda folder, kind: shard_of(folder, kind).unlink(), "open: is missing"),
    Fault("shard of an older run, same size", older, "read: 00000000 .*checksum differs"),
    Fault("index damaged", edit_text("{}-00000.index.json", "caption 1", "caption 7"), "open: is not the one that", in_tar=False),
    Fault("index missing", lambda folder, kind: index_path(shard_of(folder, kind)).unlink(), "open: index .* is missing", in_tar=False),
    Fault("manifest cut", lambda folder, _: os.truncate(folder / MANIFEST, 200), r"open: manifest\.json cannot be read", in_tar=False),
    Fault("number in the manifest", edit_text(MANIFEST, '"total_frames": 36', '"total_frames": 63'), "verify: total_frames", in_tar=False),
]


def with_more(clips: dict[str, Clip], fault: Fault) -> dict[str, Clip]:
    """What a perfect reader would find."""
    return {**clips, **{f"1{key[1:]}": clip for key, clip in list(clips.items())[: fault.more]}}


def copies(root: Path, good: Path, fault: Fault, kind: str) -> Iterator[Path]:
    """Damaged folders, one for each reader."""
    for name in ("webdataset", "ours", "index"):
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        fault.edit(folder, kind)
        yield folder


# --- what happens while a program runs --------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes: the kernel refuses the write as it does on a full disk (RLIMIT_FSIZE, EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def another_user(is_root: bool) -> Iterator[None]:
    """Root may read everything, so permissions are tried as nobody."""
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def while_running(kind: str) -> list[tuple[str, Callable[[Path], None], str, bool]]:
    """(name, what happens to the folder after the first clip was read, what we say, as nobody)."""

    def vanish(folder: Path) -> None:
        shard_of(folder, kind, 1).unlink()

    def shrink(folder: Path) -> None:
        os.truncate(shard_of(folder, kind, 0), 3000)

    def forbid(folder: Path) -> None:
        shard_of(folder, kind, 1).chmod(0)

    return [
        ("a shard vanishes before it is opened", vanish, r"read: .*-00001\.tar cannot be read: No such file", False),
        ("a shard is cut while it is open", shrink, "read: .* is damaged .the shard ends before it", False),
        ("permission is taken away", forbid, r"read: .*-00001\.tar cannot be read: Permission denied", True),
    ]
