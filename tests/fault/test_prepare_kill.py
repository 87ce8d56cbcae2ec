"""`prepare` killed at any instant, and run again: the same bytes as a run that nothing disturbed."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from t2v_ds.config import PrepareConfig
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.gif import encode_gif
from t2v_ds.data.prepare import prepare, prepare_part
from t2v_ds.errors import DataError

CLIPS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 GIFs, of which every seventh is cut, every tenth too short."""
    root = tmp_path_factory.mktemp("source") / "gifs"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(CLIPS):
        frames = rng.integers(0, 8, (1 if i % 10 == 0 else 2 + i % 3, 24, 24, 3), dtype=np.uint8) * 30
        data = encode_gif(frames, [50] * len(frames))
        (root / f"{i:04d}_clip{'abc'[i % 3]}.gif").write_bytes(data[: len(data) // 2] if i % 7 == 0 else data)
    return root


def settings(source: Path | str, out: Path, **more: int) -> PrepareConfig:
    return PrepareConfig(
        source=str(source), out=str(out), **{"image_size": 32, "min_frames": 2, "chunk_clips": 50, "shard_clips": 20, "workers": 1, **more}
    )


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "raw"
    prepare(settings(folder, out))
    return contents(out)


def start(source: Path, out: Path, workers: int, part: str = "") -> subprocess.Popen[bytes]:
    code = (
        "from t2v_ds.config import PrepareConfig; from t2v_ds.data.prepare import prepare, prepare_part; "
        f"{'prepare_part' if part else 'prepare'}(PrepareConfig(source={str(source)!r}, out={str(out)!r}, image_size=32, min_frames=2, "
        f"chunk_clips=50, shard_clips=20, workers={workers}, part={part!r}))"
    )
    # A session of its own, so that a worker that outlives its parent can be found.
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def alive(session: int) -> list[int]:
    """Processes of a session that are not zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(state[3]) == session and state[0] != "Z":
                found.append(int(entry.name))
    return found


def test_the_undisturbed_run_is_right(undisturbed: dict[str, bytes]) -> None:
    manifest = json.loads(undisturbed["manifest.json"])
    cut = {i for i in range(CLIPS) if i % 7 == 0}
    short = {i for i in range(CLIPS) if i % 10 == 0} - cut
    assert manifest["rejected"] == {"too_short": len(short), "truncated": len(cut)}
    assert manifest["total_clips"] == CLIPS - len(cut) - len(short) == 116
    assert [chunk["clips"] for chunk in manifest["chunks"]] == [50, 50, 16]
    assert [shard["clips"] for shard in manifest["shards"]] == [20, 20, 10, 20, 20, 10, 16]
    rejected = [json.loads(line) for line in undisturbed["rejected.jsonl"].splitlines()]
    assert [int(one["key"]) for one in rejected] == sorted(cut | short)
    shards = {f"raw-{n:05d}{end}" for n in range(7) for end in (".tar", ".index.json")}
    assert set(undisturbed) == {"manifest.json", "rejected.jsonl"} | shards


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again(folder: Path, undisturbed: dict[str, bytes], tmp_path: Path, workers: int) -> None:
    out = tmp_path / "raw"
    rng = random.Random(workers)
    unfinished = 0
    for _ in range(6):
        process = start(folder, out, workers)
        deadline = time.monotonic() + 30
        # Let it begin to write, and then some: a kill while modules are being imported proves nothing.
        written = len(list(out.glob(".work/block-*")))
        while process.poll() is None and len(list(out.glob(".work/block-*"))) <= written and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.wait()
        unfinished += not (out / "manifest.json").exists()
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert alive(process.pid) == []  # no worker outlives it
    assert unfinished >= 2
    process = start(folder, out, workers)
    assert process.wait(60) == 0
    assert contents(out) == undisturbed
    assert not (out / ".work").exists()


def test_parts_at_once_one_of_them_killed(folder: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "raw"
    parts = {part: start(folder, out, 1, f"{part}/3") for part in (1, 2, 3)}
    deadline = time.monotonic() + 30
    while not list(out.glob(".work/*block-000001*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    parts[2].kill()
    assert [parts[part].wait(60) for part in (1, 3)] == [0, 0]
    assert parts[2].wait(60) in (-signal.SIGKILL, 0)  # 0: the machine was so busy that the blow came too late
    blocks = {int(path.name[-6:]) for path in out.glob(".work/block-*")}
    assert set(range(0, 10, 3)) | set(range(2, 10, 3)) <= blocks <= set(range(10))
    assert not list(out.glob("raw-*"))
    assert start(folder, out, 2, "2/3").wait(60) == 0
    assert len(list(out.glob(".work/block-*/clips.tar"))) == 10
    made = [path.stat().st_mtime_ns for path in sorted(out.glob(".work/block-*/clips.tar"))]
    assert start(folder, out, 1, "1/3").wait(60) == 0  # nothing is left to do
    assert [path.stat().st_mtime_ns for path in sorted(out.glob(".work/block-*/clips.tar"))] == made
    prepare(settings(folder, out))
    assert contents(out) == undisturbed
    assert start(folder, out, 1, "3/3").wait(60) == 0
    assert contents(out) == undisturbed


def test_a_part_and_the_whole_do_not_run_at_once(folder: Path, tmp_path: Path) -> None:
    import t2v_ds.data.prepare as module

    out = tmp_path / "raw"
    out.mkdir()
    for held, asked in ((fcntl.LOCK_SH, prepare), (fcntl.LOCK_EX, prepare_part), (fcntl.LOCK_EX, prepare)):
        with module._locked(out, held), pytest.raises(DataError, match="another process is preparing"):
            asked(settings(folder, out))
    assert list(out.iterdir()) == []


def test_nothing_finished_is_done_again(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every block in turn, each row is loaded once over all runs; then a finished folder loads nothing."""
    import t2v_ds.data.blocks as module

    out, loaded, allowed = tmp_path / "raw", [], 0
    real = module._make_block

    def one_block(source: object, config: object, block: int, rows: range) -> int:
        if len(loaded) == allowed:
            raise KeyboardInterrupt
        loaded.append(block)
        return real(source, config, block, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_make_block", one_block)
    while allowed < 9:
        allowed += 1
        with pytest.raises(KeyboardInterrupt):
            prepare(settings(folder, out))
        waiting = sum(path.stat().st_size for path in out.glob(".work/*/clips.tar"))
        assert waiting < (20 + 2 * 16) * 14_000  # packed blocks do not stay on the disk: a shard's clips, and a block's
    allowed = 11
    prepare(settings(folder, out))
    assert loaded == list(range(10))
    assert contents(out) == undisturbed
    prepare(settings(folder, out))
    assert len(loaded) == 10
    assert contents(out) == undisturbed


@pytest.mark.parametrize("moment", ["before shard", "after shard", "before rejected", "before manifest", "before clean-up"])
def test_killed_between_two_steps_of_packing(
    folder: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    import t2v_ds.data.pack as pack
    import t2v_ds.data.prepare as module

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "before shard":
            patch.setattr(pack, "write_shard", stop)
        elif moment == "after shard":
            patch.setattr(pack.Packer, "_drop_packed", stop)
        elif moment == "before rejected":
            patch.setattr(pack.Packer, "write_rejected", stop)
        elif moment == "before manifest":
            patch.setattr(module.Manifest, "save", stop)
        else:
            patch.setattr(module, "_remove_scratch", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings(folder, tmp_path / "raw"))
    assert (tmp_path / "raw" / ".work").exists()
    prepare(settings(folder, tmp_path / "raw"))
    assert contents(tmp_path / "raw") == undisturbed


def test_a_shard_lost_while_stopped_is_made_again(folder: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    import t2v_ds.data.pack as pack

    out = tmp_path / "raw"

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.Packer, "write_rejected", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings(folder, out))
    (out / "raw-00002.tar").unlink()
    prepare(settings(folder, out))
    assert contents(out) == undisturbed


def test_other_settings_or_another_source_are_refused(folder: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "raw"
    prepare(settings(folder, out))
    with pytest.raises(DataError, match="was prepared with 'image_size' 32, this run has 16"):
        prepare(settings(folder, out, image_size=16))
    with pytest.raises(DataError, match="was prepared with the source's name 'folder', this run has 'moving-shapes'"):
        prepare(settings("moving-shapes", out))
    assert contents(out) == undisturbed
    (out / "raw-00000.tar").unlink()
    with pytest.raises(DataError, match=r"raw-00000\.tar is missing"):
        prepare(settings(folder, out))
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"holds shards but no manifest\.json"):
        prepare(settings(folder, out))


def test_all_rejected_is_an_error_that_counts(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):  # and can be tried again
        with pytest.raises(DataError, match=r"no clip of source .* can be used: too_short 128, truncated 22; see .*rejected\.jsonl"):
            prepare(settings(folder, tmp_path / "raw", min_frames=6))
    assert sorted(contents(tmp_path / "raw")) == ["rejected.jsonl"]
    assert (tmp_path / "raw" / "rejected.jsonl").read_bytes().count(b"\n") == CLIPS


def test_a_killed_worker_is_one_sentence_and_the_run_goes_on_later(tmp_path: Path) -> None:
    source = settings("moving-shapes", tmp_path / "raw", clips=64, workers=2, min_frames=15)
    code = (
        "import os, signal\nimport t2v_ds.data.sources as s\n"
        "real = s.MovingShapesSource.load\n"
        "def load(self, i, config):\n"
        "    if i == 40 and not os.path.exists(config.out + '.killed'):\n"
        "        open(config.out + '.killed', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, i, config)\n"
        "s.MovingShapesSource.load = load\n"
        "if __name__ == '__main__':\n"
        "    from t2v_ds.config import PrepareConfig; from t2v_ds.data.prepare import prepare\n"
        f"    prepare({source!r})\n"
    )
    (tmp_path / "main.py").write_text("from t2v_ds.config import DownloadConfig, FilterConfig\n" + code)
    run = subprocess.run([sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "DataError: a worker process was killed while preparing" in run.stderr
    assert subprocess.run([sys.executable, str(tmp_path / "main.py")], capture_output=True, timeout=60).returncode == 0
    prepare(settings("moving-shapes", tmp_path / "once", clips=64, min_frames=15))
    assert contents(tmp_path / "raw") == contents(tmp_path / "once")


def test_moving_shapes_list_what_is_held_out_and_a_limit_limits(tmp_path: Path) -> None:
    manifest = prepare(settings("moving-shapes", tmp_path / "raw", clips=64, limit=5, min_frames=15))
    assert manifest.total_clips == len(ShardDataset(tmp_path / "raw", "raw")) == 5
    assert manifest.source["held_out"]
    assert set(manifest.source["held_out"][0]) >= {"colour", "shape", "direction"}


def test_two_at_a_time_are_kept_apart(folder: Path, tmp_path: Path) -> None:
    process = start(folder, tmp_path / "raw", 1)
    deadline = time.monotonic() + 30
    while not (tmp_path / "raw" / ".work").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DataError, match="another process is preparing"):
            prepare(settings(folder, tmp_path / "raw"))
    finally:
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(60) == 0
