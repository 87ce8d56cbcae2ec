"""Threads on chunks, then `t2v merge`, as a user runs them: one rank and two."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.subset import split
from t2v_ds.models.facade import load_tokenizer
from tests.helpers import finish, run_ranks, start

SETTINGS = [
    "model.image_size=16", "model.stem_channels=8", "model.channel_multipliers=[1,2]", "model.residual_blocks=[0,1]", "model.norm_groups=8",
    "model.quantizer.codebook_size=32", "model.quantizer.codebook_dim=8", "losses.perceptual=0", "losses.ssim=0", "frames_per_clip=1",
    "train.batch=4", "train.steps=8", "train.warmup_steps=1", "train.precision=fp32", "held_out=0.3",
]  # fmt: skip


def t2v(*arguments: str, code: int = 0) -> str:
    ((found, output),) = finish([start(["-m", "t2v_ds", *arguments])])
    assert found == code, output
    return output


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/ of three chunks, start/ and thread-0 ... thread-2."""
    root = tmp_path_factory.mktemp("merge")
    t2v("prepare", "--out", str(root / "raw"), "clips=60", "chunk_clips=20", "image_size=16", "min_frames=2", "max_frames=3")
    data = ["--data", str(root / "raw")]
    t2v("train-vqvae", *data, "--out", str(root / "start"), *SETTINGS, "balance=true", "model.quantizer.warmup_steps=2")
    for chunk in range(3):
        t2v("train-vqvae", *data, "--out", str(root / f"thread-{chunk}"), *SETTINGS, f"chunk={chunk}", f"start={root}/start")
    return root


def test_threads_are_merged_and_measured(threads: Path) -> None:
    root = threads
    runs = [str(root / f"thread-{chunk}") for chunk in (2, 0, 1)]
    merge = ["merge", "--threads", *runs, "--data", str(root / "raw"), "--compare", str(root / "start")]
    t2v(*merge, "--out", str(root / "merged"), "steps=6")
    report = (root / "merged/report.md").read_text()
    assert "clips held out of training" in report
    for name in ("thread of chunk 0", "thread of chunk 2", "average, codes aligned", str(root / "start"), "merged"):
        assert f"| {name} |" in report
    assert (root / "merged/heat_map.png").read_bytes().startswith(b"\x89PNG")
    identity = load_tokenizer(root / "merged").tokenizer_id
    assert t2v(*merge, "--out", str(root / "merged"), "steps=6")  # finished: nothing changes
    assert load_tokenizer(root / "merged").tokenizer_id == identity
    # Two ranks: the same training.
    arguments = ["-m", "t2v_ds", *merge, "--out", str(root / "two"), "steps=6"]
    assert [code for code, _ in run_ranks(arguments, 2)] == [0, 0]
    one, two = (load_tokenizer(root / name).model.state_dict() for name in ("merged", "two"))
    assert max(float((one[name].float() - two[name].float()).abs().max()) for name in one) < 1e-4


def test_a_missing_thread_is_refused_or_named(threads: Path) -> None:
    root = threads
    merge = ["merge", "--threads", str(root / "thread-0"), str(root / "thread-1"), "--data", str(root / "raw"), "--out", str(root / "some")]
    output = t2v(*merge, "steps=4", code=2)
    assert "chunks [2] have no thread" in output
    assert not (root / "some").exists()
    (root / "thread-2-unfinished").mkdir()
    merge[3:3] = [str(root / "thread-2-unfinished")]
    assert "thread-2-unfinished is not finished" in t2v(*merge, "steps=4", code=2)
    t2v(*merge, "steps=4", "allow_missing=true")
    assert "Merged without threads of the chunks 2." in (root / "some/report.md").read_text()


def test_a_start_of_another_shape_is_refused(threads: Path) -> None:
    root = threads
    settings = [one for one in SETTINGS if "codebook_size" not in one] + ["model.quantizer.codebook_size=64", f"start={root}/start"]
    output = t2v("train-vqvae", "--data", str(root / "raw"), "--out", str(root / "other"), *settings, code=2)
    assert "setting 'model.quantizer'" in output


def test_what_is_held_out_is_in_every_chunk_and_never_trained_on(threads: Path) -> None:
    with ShardDataset(threads / "raw", "raw") as dataset:
        train, held_out = split(dataset, 0.3)
        assert sorted([*train, *held_out]) == list(range(60))
        assert {int(i) // 20 for i in held_out} == {0, 1, 2}
        keys = {dataset.key(int(i)) for i in held_out}
    with ShardDataset(threads / "raw", "raw", 1) as dataset:
        assert {dataset.key(int(i)) for i in split(dataset, 0.3)[1]} == {key for key in keys if 20 <= int(key) < 40}
