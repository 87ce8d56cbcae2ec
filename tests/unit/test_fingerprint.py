"""Clips that teach nothing: what is flat, still, or seen before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2v_ds.config import FilterConfig, PrepareConfig
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.fingerprint import Duplicates, Fingerprint, check_content
from t2v_ds.data.gif import RejectedClip, decode_gif, encode_gif
from t2v_ds.data.moving_shapes import draw_clip
from t2v_ds.data.prepare import prepare, prepare_part
from t2v_ds.errors import ConfigError, DataError


def scene(seed: int = 0, frames: int = 6, size: int = 128) -> np.ndarray:
    """A smooth picture of its own for each seed, with a square that moves over it: [T, size, size, 3] uint8."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(60, 200, (4, 4, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC))
    clip = np.repeat(picture[None], frames, axis=0)
    for t in range(frames):
        clip[t, size // 4 : size // 2, t * size // 12 : t * size // 12 + size // 6] = 255 - cells[0, 0]
    return clip


def verdict(frames: np.ndarray, **settings: Any) -> str:
    try:
        check_content(frames, FilterConfig(**settings))
    except RejectedClip as rejected:
        return rejected.reason
    return ""


def test_stills_and_flat_clips_are_told_from_what_moves_a_little() -> None:
    rng = np.random.default_rng(0)
    clip = scene()
    still = np.repeat(clip[:1], 6, axis=0)
    noisy = np.clip(still + rng.normal(0, 3, still.shape), 0, 255).astype(np.uint8)  # grain of a camera
    grey = np.full_like(still, 120) + rng.integers(0, 6, still.shape, dtype=np.uint8)
    flashing = np.broadcast_to(np.array([0, 80, 160, 240, 40, 90], dtype=np.uint8)[:, None, None, None], still.shape)
    dot = still.copy()
    dot[3, 64:68, 64:68] ^= 128  # a cursor of 4 x 4 pixels that blinks once
    found = {name: verdict(frames) for name, frames in locals().items() if name in ("clip", "still", "noisy", "grey", "flashing", "dot")}
    assert found == {"clip": "", "still": "still", "noisy": "still", "grey": "flat", "flashing": "flat", "dot": ""}
    assert verdict(still, still_below=0) == verdict(flashing, flat_below=0) == verdict(grey, flat_below=0, still_below=0) == ""
    assert verdict(dot, still_below=256) == "still"
    assert verdict(still[:, ::16, ::16]) == "still"  # frames smaller than the grid


def test_every_clip_that_is_drawn_moves() -> None:
    for size, i in ((16, 0), (32, 1), (64, 2), (128, 3)):
        for index in range(i, 40, 4):
            assert verdict(draw_clip(index, 0, size, 2, 16)[0]) == "", (size, index)


def judge(clips: list[tuple[np.ndarray, str]], **settings: Any) -> list[str]:
    """The reason of each clip."""
    filters = FilterConfig(**settings)
    prints = [Fingerprint.of(f"{i:08d}", f"clip {i}", frames, caption, filters) for i, (frames, caption) in enumerate(clips)]
    found = {one["key"]: one["reason"] for one in Duplicates(filters).judge(prints)}
    return [found.get(one.key, "") for one in prints]


def test_a_duplicate_has_the_frames_and_the_caption_of_an_earlier_clip() -> None:
    clips = [(scene(0), "a"), (scene(1), "a"), (scene(0), "b"), (scene(0), "a"), (scene(0)[:5], "a"), (scene(0), "b")]
    assert judge(clips) == ["", "", "", "duplicate", "", "duplicate"]
    assert judge(clips, duplicates="any_caption") == ["", "", "duplicate", "duplicate", "", "duplicate"]
    assert judge(clips, duplicates="keep") == [""] * 6
    with pytest.raises(ConfigError, match=r"filters.duplicates' is 'all'; allowed: 'same_caption', 'any_caption', 'keep'"):
        FilterConfig(duplicates="all")


def test_a_near_duplicate_is_another_encoding_of_an_earlier_clip() -> None:
    def again(frames: np.ndarray) -> np.ndarray:  # half as large, as a GIF with another palette, and large again
        small = np.stack([np.asarray(Image.fromarray(frame).resize((64, 64), Image.Resampling.LANCZOS)) for frame in frames])
        return decode_gif(encode_gif(small, [100] * len(small)), 40, size=128).frames

    originals = [scene(seed) for seed in range(12)]
    clips = [(clip, "a") for clip in originals] + [(again(clip), "b") for clip in originals]
    clips += [(originals[0], "c"), (originals[0][::-1], "c"), (originals[0][..., ::-1], "c")]  # the same again, backwards, in other colours
    assert judge(clips, near_duplicate_below=16) == [""] * 12 + ["near_duplicate"] * 12 + [""] * 3
    assert judge(clips) == [""] * 27


def test_near_duplicates_are_found_as_by_comparing_all_with_all() -> None:
    rng = np.random.default_rng(0)
    scenes = rng.integers(80, 120, (15, 4, 8, 8, 3))  # each clip is its own picture of 4 x 8 x 8
    noise = [rng.integers(0, 1 + i % 9, (4, 8, 8, 3)) + i % 3 for i in range(150)]
    frames = np.stack([scenes[rng.integers(15)] + one for one in noise]).astype(np.uint8)
    for below in (1.5, 5.0, 9.0):
        filters = FilterConfig(near_duplicate_below=below)
        kept: list[int] = []
        expected = {}
        for i in range(150):
            if any((frames[i] == frames[j]).all() for j in kept):
                continue  # the same clip with another caption
            near = [j for j in kept if np.abs(frames[i].astype(int) - frames[j].astype(int)).max() < below]
            if near:
                expected[f"{i:08d}"] = f"looks like clip {near[0]:08d}"
            else:
                kept.append(i)
        prints = [Fingerprint.of(f"{i:08d}", "", clip, str(i), filters) for i, clip in enumerate(frames)]
        assert {one["key"]: one["detail"] for one in Duplicates(filters).judge(prints)} == expected
        assert 5 < len(expected) < 140


@pytest.fixture(scope="module")
def gifs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 GIFs of which every tenth is flat or still, every sixth is the same one, and every ninth nearly that one; one caption for all."""
    root = tmp_path_factory.mktemp("source") / "gifs"
    root.mkdir()
    for i in range(90):
        clip = scene(i, 4, 32)
        if i % 10 == 5:
            clip[:] = clip[0] if i % 20 == 5 else 7
        elif i % 6 == 0 or i % 9 == 0:
            clip = scene(1000, 4, 32) + np.uint8(i % 6 != 0)
        (root / f"a.{i:04d}.gif").write_bytes(encode_gif(clip, [50] * 4))
    return root


def settings(gifs: Path, out: Path, **more: Any) -> PrepareConfig:
    fixed: dict[str, Any] = {"image_size": 32, "min_frames": 2, "shard_clips": 7, "chunk_clips": 20, "workers": 1}
    return PrepareConfig(source=str(gifs), out=str(out), filters=FilterConfig(near_duplicate_below=6), **{**fixed, **more})


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_duplicates_do_not_depend_on_workers_parts_or_stops(gifs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = prepare(settings(gifs, tmp_path / "one"))
    expected = contents(tmp_path / "one")
    rejected = [json.loads(line) for line in expected["rejected.jsonl"].splitlines()]
    numbers = {reason: [int(one["key"]) for one in rejected if one["reason"] == reason] for reason in manifest.rejected}
    dull = [i for i in range(90) if i % 10 == 5]
    same = [i for i in range(90) if i not in dull and i % 6 == 0]
    near = [i for i in range(90) if i not in dull and i not in same and i % 9 == 0]
    assert numbers == {"still": dull[::2], "flat": dull[1::2], "duplicate": same[1:], "near_duplicate": near}
    assert [one["key"] for one in rejected] == sorted(one["key"] for one in rejected)
    assert rejected[[one["reason"] for one in rejected].index("duplicate")] == {
        "key": "00000006", "reason": "duplicate", "detail": "the frames and caption of clip 00000000", "source": "a.0006.gif",
    }  # fmt: skip
    with ShardDataset(tmp_path / "one", "raw") as dataset:
        gone = {int(one["key"]) for one in rejected}
        assert [int(dataset.key(i)) for i in range(len(dataset))] == [i for i in range(90) if i not in gone]

    prepare(settings(gifs, tmp_path / "two", workers=2))
    for part in ("3/3", "1/3", "2/3"):
        prepare_part(settings(gifs, tmp_path / "parts", part=part))
    prepare(settings(gifs, tmp_path / "parts"))
    _stop_after_each_block(settings(gifs, tmp_path / "stopped"), monkeypatch)
    for name in ("two", "parts", "stopped"):
        assert contents(tmp_path / name) == expected, name


def _stop_after_each_block(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, interrupted whenever one more block is made and before each shard is written, until it is done."""
    import t2v_ds.data.blocks as blocks
    import t2v_ds.data.pack as pack

    left = [0, 0]

    def limited(which: int, real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if left[which] == 0:
                raise KeyboardInterrupt
            left[which] -= 1
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_make_block", limited(0, blocks._make_block))
        patch.setattr(pack, "write_shard", limited(1, pack.write_shard))
        for run in range(200):
            left[:] = [1, run % 2]
            try:
                prepare(config)
            except KeyboardInterrupt:
                continue
            assert run > 10
            return
    raise AssertionError("never finished")


def test_clips_that_were_drawn_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import t2v_ds.data.sources as sources

    real = sources.draw_clip
    monkeypatch.setattr(sources, "draw_clip", lambda index, *rest: real(index % 2, *rest))  # what small pictures do by chance
    manifest = prepare(PrepareConfig(source="moving-shapes", out=str(tmp_path / "raw"), clips=6, image_size=16, workers=1))
    assert (manifest.total_clips, manifest.rejected) == (6, {})


def test_other_thresholds_do_not_share_a_folder(gifs: Path, tmp_path: Path) -> None:
    prepare(settings(gifs, tmp_path / "raw"))
    other = settings(gifs, tmp_path / "raw")
    other.filters.still_below = 3
    with pytest.raises(DataError, match=r"prepared with 'filters.still_below' 8.0, this run has 3"):
        prepare(other)
