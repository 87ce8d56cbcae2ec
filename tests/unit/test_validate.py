"""Damage is noticed, whatever it is; tars of others are indexed without their bad clips; nothing is lost without a word."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_ds import cli
from t2v_ds.config import IndexConfig
from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.data.manifest import MANIFEST, Manifest
from t2v_ds.data.scan import scan_shard
from t2v_ds.data.shards import index_path, npy_bytes
from t2v_ds.data.tar import Damage, Member, walk
from t2v_ds.data.validate import QUARANTINE, index_folder, verify_folder
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.kernels import clips as native
from tests import fault_cases as cases
from tests.bench import faults

Pair = tuple[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    for kind in ("tokens", "raw"):
        cases.build(root / kind, kind)
    return root


def clips_of(kind: str) -> dict[str, cases.Clip]:
    return {f"{i:08d}": (cases.make_clip(i, kind), f"caption {i}") for i in range(cases.SHARDS * cases.CLIPS)}


def check(outcome: faults.Outcome, expected: str) -> None:
    step, _, pattern = expected.partition(": ")
    assert re.fullmatch(step, outcome.step), outcome
    assert re.search(pattern, outcome.sentence), outcome


# --- the fault table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokens", "raw"])
def test_a_folder_without_damage_is_read_and_indexed_whole(good: Path, tmp_path: Path, kind: str) -> None:
    clips = clips_of(kind)
    assert faults.by_us(good / kind, kind, clips) == faults.Outcome("", "", 12, 0)
    assert faults.by_webdataset(good / kind, kind, clips) == faults.Outcome("", "", 12, 0)
    shutil.copytree(good / kind, tmp_path / "x")
    assert faults.by_index(tmp_path / "x", kind, clips) == faults.Outcome("", "", 12, 0)
    for path in (good / kind).glob("*.index.json"):  # the same bytes as if we had written the shard
        assert (tmp_path / "x" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["tokens", "raw"])
@pytest.mark.parametrize("fault", cases.FAULTS, ids=lambda fault: fault.name)
def test_damage_is_noticed_and_never_delivered(fault: cases.Fault, good: Path, tmp_path: Path, kind: str) -> None:
    clips = clips_of(kind)
    _, ours, others = cases.copies(tmp_path, good / kind, fault, kind)
    outcome = faults.by_us(ours, kind, clips)
    check(outcome, fault.ours)
    assert outcome.wrong == 0
    if fault.index:
        outcome = faults.by_index(others, kind, cases.with_more(clips, fault))
        check(outcome, f"index: {fault.index}")
        assert (outcome.good, outcome.wrong) == (fault.kept, 0)


@pytest.mark.parametrize("at", range(3))
def test_what_happens_while_a_program_reads_is_an_error_with_a_sentence(at: int, good: Path, tmp_path: Path) -> None:
    _, happens, expected, as_nobody = cases.while_running("tokens")[at]
    shutil.copytree(good / "tokens", tmp_path / "x")
    outcome = faults.running(faults.by_us, tmp_path / "x", "tokens", clips_of("tokens"), happens, as_nobody)
    check(outcome, expected)
    assert outcome.wrong == 0


def test_a_disk_that_fills_leaves_no_shard(tmp_path: Path) -> None:
    _, outcome = faults.disk_full(tmp_path, "raw")
    check(outcome, "write: File too large; no shard and no index is left")


@pytest.mark.parametrize("way", ["pread", "python"])
def test_short_reads_are_read_on(way: str, tmp_path: Path) -> None:
    assert native.available()
    cases.build(tmp_path / "large", "tokens", side=cases.LARGE)
    library = faults.compile_short_reads(tmp_path)
    good, wrong, outcome, calls = faults.short_reads(tmp_path / "large", "tokens", "by_us", library, T2V_CLIPS=way)
    assert (good, wrong, outcome) == (12, 0, ": ")
    assert calls > 12


# --- the tar reader ---------------------------------------------------------------------------------------------------


def walked(data: bytes) -> list[Member | Damage]:
    return list(walk(io.BytesIO(data), len(data)))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_formats_of_headers_are_read(tar_format: int) -> None:
    members = {"a.json": b"{}", "ü" * 40 + ".npy": bytes(1000), "folder/" + "b" * 90 + ".txt": b"x" * 512, "c": b""}
    if tar_format != tarfile.USTAR_FORMAT:
        members["d" * 300] = b"long name"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(payload), 1.5  # a PAX header for the fraction
            tar.addfile(info, io.BytesIO(payload))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = walked(buffer.getvalue())
    assert [(one.name, one.payload) for one in found if isinstance(one, Member)] == [*members.items(), ("folder/", b"")]
    assert len(found) == len(members) + 1
    for one in found:
        assert isinstance(one, Member)
        assert buffer.getvalue()[one.offset : one.offset + len(one.payload)] == one.payload


def test_every_cut_and_every_flipped_byte_of_a_header_is_damage(good: Path) -> None:
    data = (good / "tokens" / "tokens-00000.tar").read_bytes()
    whole = walked(data)
    assert not any(isinstance(one, Damage) for one in whole)
    end = next(place for place in range(0, len(data), 512) if not any(data[place:]))
    for size in [*range(0, end + 1024, 100), end, end + 512]:
        *members, last = walked(data[:size])
        assert isinstance(last, Damage)
        assert last.is_cut
        assert members == whole[: len(members)]
    assert walked(data[: end + 1024]) == whole
    at = whole[2].offset - 512  # type: ignore[union-attr]
    for byte in range(512):
        broken = bytearray(data)
        broken[at + byte] ^= 1
        damage = [one for one in walked(bytes(broken)) if isinstance(one, Damage)]
        assert len(damage) == 1
        assert damage[0].reason == "tar_header"
        assert (damage[0].offset, damage[0].size) == (at, 1024)


def test_what_pax_headers_must_not_say_is_damage() -> None:
    def tar(payload: bytes, kind: bytes = b"x") -> bytes:
        parts = []
        for name, type_, body in (("pax", kind, payload), ("a.json", b"0", b"{}"), ("b.json", b"0", b"{}")):
            info = tarfile.TarInfo(name)
            info.type, info.size = type_, len(body)
            parts.append(info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512))
        return b"".join(parts) + bytes(1024)

    assert [one.name for one in walked(tar(b"17 path=new.json\n"))] == ["new.json", "b.json"]
    assert [one.name for one in walked(tar(b"13 mtime=1.5\n", b"g"))] == ["a.json", "b.json"]
    for payload, kind in ((b"99 path=a\n", b"x"), (b"nonsense\n", b"x"), (b"10 size=x\n", b"x"), (b"17 path=new.json\n", b"g"),
                          (b"22 GNU.sparse.major=1\n", b"x"), (b"9 path=ab", b"x"), (b"10 path=\xff\xff\n"[:-1], b"x")):  # fmt: skip
        found = walked(tar(payload, kind))
        assert isinstance(found[0], Damage), payload
        assert [one.name for one in found[1:]] in (["a.json", "b.json"], ["b.json"])


def test_random_damage_is_an_answer_and_not_a_crash(good: Path, tmp_path: Path) -> None:
    data = (good / "tokens" / "tokens-00000.tar").read_bytes()
    clips, rng, path = clips_of("tokens"), np.random.default_rng(0), tmp_path / "x.tar"
    lost = 0
    for _ in range(300):
        broken = bytearray(data[: rng.integers(1, len(data)) if rng.random() < 0.2 else None])
        for place in rng.integers(0, len(broken), rng.integers(1, 40)):
            length = int(rng.choice([1, 8, 600]))
            broken[place : place + length] = bytes(length) if rng.random() < 0.3 else rng.bytes(length)
        path.write_bytes(broken)
        scan = scan_shard(path, "tokens")
        lost += len(scan.clips) < cases.CLIPS
        assert len(scan.clips) == cases.CLIPS or scan.bad  # what is lost is told
        assert {clip["key"] for clip in scan.clips} <= set(clips)
    assert lost > 200


# --- folders of others ------------------------------------------------------------------------------------------------


def foreign(folder: Path, change: Callable[[dict[str, bytes], int], Any] = lambda members, i: None, clips: int = 20) -> IndexConfig:
    """A tar as another program writes it: numpy.save, PAX headers; `change` may change the members of each clip."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "shard_0.tar", "w") as tar:
        for i in range(clips):
            array = cases.make_clip(i, "raw")
            buffer = io.BytesIO()
            np.save(buffer, array)
            text = {"caption": f"é {i}", "durations_ms": [40] * len(array), "provenance": {}, "more": 1}
            members = {"json": json.dumps(text).encode(), "frames.npy": buffer.getvalue(), "jpg": b"not ours"}
            change(members, i)
            for name, payload in members.items():
                info = tarfile.TarInfo(f"./k{i}.{name}")
                info.size, info.mtime = len(payload), 1.5
                tar.addfile(info, io.BytesIO(payload))
    return IndexConfig(data=str(folder), max_bad_share=0)


def quarantine(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / QUARANTINE).read_text().splitlines()]


def test_tars_of_others_are_indexed_and_read(tmp_path: Path) -> None:
    config = foreign(tmp_path)
    indexed = index_folder(config)
    assert (indexed.manifest.total_clips, indexed.manifest.image_size, indexed.manifest.rejected) == (20, 6, {})
    assert quarantine(tmp_path) == []
    with ShardDataset(tmp_path, "raw") as dataset:
        for i in range(20):
            clip = dataset.read(i)
            assert (clip["frames"] == cases.make_clip(i, "raw")).all()
            assert (clip["key"], clip["caption"], clip["durations_ms"]) == (f"k{i}", f"é {i}", [40] * len(clip["frames"]))
        some = dataset.read_frames(np.array([3, 7]), [np.array([1]), np.array([0, 2])], Buffer())
        assert (some[0] == cases.make_clip(3, "raw")[1]).all()
        assert (some[1:] == cases.make_clip(7, "raw")[[0, 2]]).all()
    assert verify_folder(tmp_path)[1] == []
    with pytest.raises(ConfigError, match=r"has a manifest\.json: check it with t2v verify.*again=true"):
        index_folder(config)


def text_with(**fields: Any) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        text = {**json.loads(members["json"]), **fields}
        members["json"] = json.dumps({key: value for key, value in text.items() if value is not None}).encode()

    return change


def array_as(make: Callable[[np.ndarray], bytes]) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members["frames.npy"] = make(np.load(io.BytesIO(members["frames.npy"])))

    return change


def npy_version_2(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(2, 0))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        (text_with(caption=" "), "caption", "k5.json has no caption"),
        (text_with(caption=7), "caption", "k5.json has no caption"),
        (text_with(durations_ms=[1]), "json_fields", '"durations_ms" of 4 whole numbers'),
        (text_with(durations_ms=[1, 2, 3, 4.5]), "json_fields", '"durations_ms" of 4 whole numbers'),
        (text_with(provenance=None), "json_fields", '"provenance"'),
        (text_with(frames=9), "json_fields", '"frames" that are not 4'),
        (lambda members: members.update(json=b"[1]"), "json", "not a JSON object"),
        (lambda members: members.update(json=b'{"caption": NaN}'), "json", "NaN is not JSON"),
        (lambda members: members.update(json=b"[" * 4000), "json", "not JSON"),
        (lambda members: members.update(json='{"caption": "x"}'.encode("utf-16")), "json", "not JSON"),
        (lambda members: members.update({"frames.npy": members["frames.npy"] + b"x"}), "array_size", "takes 560"),
        (lambda members: members.update({"frames.npy": members["frames.npy"][:-1]}), "array_size", "has 559 bytes"),
        (array_as(npy_version_2), "npy_header", r"format 2\.0; allowed: 1\.0"),
        (array_as(lambda a: npy_bytes(a).replace(b"'descr': ", b"'descr':  ").replace(b"}  ", b"} ")), "npy_header", "as numpy writes it"),
        (array_as(lambda a: npy_bytes(a.astype(">u2"))), "array", r"holds >u2 .*allowed: uint8 \[T, S, S, 3\]"),
        (array_as(lambda a: npy_bytes(a[..., :2])), "array", r"\[4, 6, 6, 2\]"),
        (array_as(lambda a: npy_bytes(a[:, :5])), "array", r"\[4, 5, 6, 3\]"),
        (array_as(lambda a: npy_bytes(a[:0])), "array", r"\[0, 6, 6, 3\]"),
        (array_as(lambda a: npy_bytes(a[:, :4, :4])), "side", "are 4 a side; the others are 6"),
    ],
)  # fmt: skip
def test_a_bad_clip_is_listed_with_its_reason(change: Callable[[dict[str, bytes]], Any], reason: str, detail: str, tmp_path: Path) -> None:
    config = foreign(tmp_path, lambda members, i: change(members) if i == 5 else None)
    with pytest.raises(DataError, match=rf"1 of 20 clips of .* are bad; allowed: max_bad_share=0 .*most often {reason} \(1\), such as: "):
        index_folder(config)
    [listed] = quarantine(tmp_path)
    assert (listed["shard"], listed["key"], listed["reason"]) == ("shard_0.tar", "k5", reason)
    assert re.search(detail, listed["detail"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [QUARANTINE, "shard_0.tar"]  # nothing else was written
    indexed = index_folder(dataclasses.replace(config, max_bad_share=0.06))
    assert indexed.quarantined == {reason: 1}
    assert indexed.manifest.rejected == {f"quarantined_{reason}": 1}
    with ShardDataset(tmp_path, "raw") as dataset:
        assert [dataset.key(i) for i in range(19)] == [f"k{i}" for i in range(20) if i != 5]
        assert all(dataset.read(i) for i in range(19))


@pytest.mark.parametrize(
    ("name", "reason", "key", "kept"),
    [
        ("k19.json", "duplicate_member", "k19", 19),
        ("folder/k20.json", "member_name", "folder/k20.json", 20),
        ("k20/../../x.json", "member_name", "k20/../../x.json", 20),
        ("/k20.json", "member_name", "/k20.json", 20),
        ("README", "member_name", "README", 20),
        ("k20.json", "member_missing", "k20", 20),
        ("k3.json", "duplicate_key", "k3", 20),
        ("k19.txt", "", "", 20),
    ],
)
def test_a_member_that_belongs_to_no_clip_is_listed(name: str, reason: str, key: str, kept: int, tmp_path: Path) -> None:
    config = foreign(tmp_path)
    with tarfile.open(tmp_path / "shard_0.tar", "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    indexed = index_folder(dataclasses.replace(config, max_bad_share=0.1))
    assert [(one["reason"], one["key"]) for one in quarantine(tmp_path)] == [(reason, key)] * bool(reason)
    assert indexed.manifest.total_clips == kept


def test_bytes_count_as_well_as_clips(tmp_path: Path) -> None:
    """One piece of damage may hide many clips."""
    config = foreign(tmp_path)
    path = tmp_path / "shard_0.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        start, end = (tar.getmember(f"./k{i}.json").offset for i in (4, 12))
    path.write_bytes(data[:start] + b"x" * (end - start) + data[end:])
    share = (end - start) / len(data)
    assert share > 0.2  # though it is one of 13 clips that can be told
    with pytest.raises(DataError, match=f"1 of 13 clips.*found {share:.2g}"):
        index_folder(dataclasses.replace(config, max_bad_share=share - 0.01))
    assert index_folder(dataclasses.replace(config, max_bad_share=share + 0.01)).manifest.total_clips == 12


def test_a_cut_shard_is_an_error_at_any_threshold(tmp_path: Path) -> None:
    config = dataclasses.replace(foreign(tmp_path), max_bad_share=1)
    with tarfile.open(tmp_path / "shard_0.tar") as tar:
        place = tar.getmember("./k4.frames.npy").offset_data
    os.truncate(tmp_path / "shard_0.tar", place + 10)
    with pytest.raises(DataError, match=r"shard_0\.tar ends early: .*how many clips are lost cannot be told: .*accept_cut=true"):
        index_folder(config)
    assert index_folder(dataclasses.replace(config, accept_cut=True)).manifest.total_clips == 4


def test_tars_in_a_folder_that_is_read_only_are_linked_into_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = foreign(tmp_path / "theirs")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "theirs")
    with pytest.raises(DataError, match=r"theirs cannot be written, .*link the tars into a new folder"):
        index_folder(config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shard_0.tar").symlink_to(tmp_path / "theirs" / "shard_0.tar")
    index_folder(dataclasses.replace(config, data=str(tmp_path / "mine")))
    with ShardDataset(tmp_path / "mine", "raw") as dataset:
        assert dataset.read(19)["caption"] == "é 19"
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["shard_0.tar"]


def test_folders_that_hold_no_clips_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        index_folder(IndexConfig(data=str(tmp_path / "nowhere")))
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(DataError, match=r"holds no \.tar files; unpack a\.tar\.gz"):
        index_folder(IndexConfig(data=str(tmp_path)))
    (tmp_path / "a b.tar").touch()
    with pytest.raises(DataError, match=r"a b\.tar has a name that is not allowed"):
        index_folder(IndexConfig(data=str(tmp_path)))
    (tmp_path / "a b.tar").unlink()
    foreign(tmp_path, lambda members, i: members.pop("frames.npy"))
    with pytest.raises(DataError, match=r"holds no clips: expected tars with members KEY\.frames\.npy"):
        index_folder(IndexConfig(data=str(tmp_path)))


def test_codes_need_their_tokenizer_and_must_be_below_its_size(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(good / "tokens", folder)
    for path in (folder / MANIFEST, *folder.glob("*.index.json")):
        path.unlink()
    config = IndexConfig(data=str(folder), max_bad_share=1)
    with pytest.raises(ConfigError, match=r"--tokenizer is not given; .* holds codes"):
        index_folder(config)
    highest = [int(cases.make_clip(i, "tokens").max()) for i in range(12)]
    indexed = index_folder(config, dataclasses.replace(cases.CODES, codebook_size=max(highest)))
    assert indexed.quarantined == {"code_range": highest.count(max(highest))}
    assert indexed.manifest.tokenizer_id == cases.CODES.tokenizer_id
    assert indexed.manifest.grid_size == 6


# --- folders of ours --------------------------------------------------------------------------------------------------


def damaged(good: Path, folder: Path) -> IndexConfig:
    shutil.copytree(good / "tokens", folder)
    cases.payload_edit("npy", 140)(folder, "tokens")
    return IndexConfig(data=str(folder), max_bad_share=0.2, again=True)


def test_a_damaged_clip_of_ours_is_left_out_and_stays_out(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    config = damaged(good, folder)
    manifest = (folder / MANIFEST).read_bytes()
    before = Manifest.load(folder)
    assert index_folder(config).quarantined == {"checksum": 1}
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    after = Manifest.load(folder)
    assert (after.total_clips, after.tokenizer_id, after.rejected) == (11, before.tokenizer_id, {"quarantined_checksum": 1})
    assert after.digest() != before.digest()
    assert verify_folder(folder)[1] == []
    index_folder(config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    (folder / MANIFEST).write_bytes(manifest)  # killed before the manifest was written
    with pytest.raises(DataError, match="is not the one that"):
        ShardDataset(folder, "tokens")
    index_folder(config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    dataclasses.replace(after, rejected={"too_long": 2, "quarantined_zeros": 7}).save(folder)
    assert index_folder(config).manifest.rejected == {"too_long": 2, "quarantined_checksum": 1}  # those of earlier runs are not added
    index_path(folder / "tokens-00000.tar").unlink()  # then nobody knows which of the clips of the shard are good
    indexed = index_folder(dataclasses.replace(config, max_bad_share=0.7))
    assert indexed.quarantined == {"checksum": 1, "not_indexed": 5}
    assert indexed.manifest.total_clips == 6


def test_a_lost_index_is_made_again_where_the_shard_is_as_it_was_written(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(good / "tokens", folder)
    index_path(folder / "tokens-00001.tar").unlink()
    assert index_folder(IndexConfig(data=str(folder), again=True)).quarantined == {}
    for path in (good / "tokens").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_the_command_line(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x"
    damaged(good, folder)
    cli.run(["verify", "--data", str(good / "raw")])
    assert capsys.readouterr().out == f"{good / 'raw'}: 12 clips in 2 shards; every byte is as it was written\n"
    with pytest.raises(DataError, match=r"x is damaged in 1 place: restore .* t2v index --data .*x again=true"):
        cli.run(["verify", "--data", str(folder)])
    assert "1 of 6 clips are damaged or gone: clip 00000002 is not what was written" in capsys.readouterr().out
    cli.run(["index", "--data", str(folder), "again=true", "max_bad_share=0.2"])
    assert capsys.readouterr().out == (
        f"{folder}: 11 good clips in 2 shards\n  left out, checksum: 1 (listed in {folder}/{QUARANTINE})\n"
    )
    for verb in ("index", "verify"):
        with pytest.raises(ConfigError, match="--data is not given"):
            cli.run([verb])
