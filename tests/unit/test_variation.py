"""What a training step makes of a clip: shares are as set, everything comes from the sample's own random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from t2v_ds.config import TransformerConfig, TransformerRunConfig
from t2v_ds.models.sampling import schedule
from t2v_ds.training.variation import Sample, join, lookalikes, vary

K, SIDE = 50, 4


def config(decoding: str = "frame", **settings: Any) -> TransformerRunConfig:
    model = TransformerConfig(grid_size=SIDE, codebook_size=K, decoding=decoding, last_frame=settings.get("last_frame_share", 0) > 0)
    return TransformerRunConfig(model=model, **settings)


def codes(frames: int = 10) -> np.ndarray:
    return np.arange(frames * SIDE * SIDE, dtype=np.uint16).reshape(frames, SIDE, SIDE) % K


def samples(count: int = 400, **settings: Any) -> list[Sample]:
    return [vary(codes(), np.random.default_rng(i), config(**settings)) for i in range(count)]


def test_the_same_numbers_give_the_same_sample() -> None:
    settings = config(context_noise=0.5, excerpt_share=0.5, last_frame_share=0.5)
    one, two, other = (vary(codes(), np.random.default_rng(seed), settings) for seed in (1, 1, 2))
    assert np.array_equal(one.passes, two.passes) and np.array_equal(one.context, two.context)  # type: ignore[arg-type]
    assert not np.array_equal(one.context, other.context) or one.start != other.start  # type: ignore[arg-type]


def test_captions_excerpts_and_last_frames_come_as_often_as_set() -> None:
    found = samples(caption_dropout=0.3, excerpt_share=0.4, excerpt_frames=3, last_frame_share=0.5)
    assert np.mean([not one.has_caption for one in found]) == pytest.approx(0.3, abs=0.08)
    excerpts = [one for one in found if one.start >= 0]
    assert len(excerpts) / len(found) == pytest.approx(0.4, abs=0.08)
    for one in excerpts:
        assert np.array_equal(one.codes, codes()[one.start : one.start + 3])
        assert one.last_given is False
    assert {one.start for one in excerpts} == set(range(8))
    assert np.mean([one.last_given for one in found if one.start < 0]) == pytest.approx(0.5, abs=0.1)
    assert samples(1)[0].last_given is None


def test_passes_are_those_of_drawing_and_a_tube_is_the_same_in_all_frames() -> None:
    for mask in ("tube", "frame"):
        found, counts = samples(mask=mask), []
        for one in found:
            assert one.passes is not None and one.passes.shape == (10, SIDE * SIDE)
            counts.append(int(one.passes.max()) + 1)
            sizes = [upto - done for done, upto, _ in schedule(SIDE * SIDE, counts[-1])]
            assert all(np.bincount(frame).tolist() == sizes for frame in one.passes)
            assert bool((one.passes == one.passes[0]).all()) == (mask == "tube")
        assert (min(counts), max(counts)) == (4, SIDE * SIDE)
        assert np.mean(np.log(counts)) == pytest.approx(np.log(8), abs=0.1)  # evenly between log(4) and log(16)
        first = np.stack([one.passes[0] for one in found if one.passes is not None])
        assert ((first == 0).mean(0) > 0.02).all()  # any position may be told first
    assert samples(1, decoding="token")[0].passes is None


def test_noise_is_fed_and_never_told() -> None:
    assert samples(1)[0].context is None
    wrong = []
    for one in samples(context_noise=0.4):
        assert np.array_equal(one.codes, codes())
        assert one.context is not None and one.context.dtype == np.uint16 and int(one.context.max()) < K
        wrong.append(float((one.context != one.codes).mean()))
    assert max(wrong) < 0.5
    assert np.mean(wrong) == pytest.approx(0.2 * (1 - 1 / K), abs=0.03)


def test_what_is_confused_is_alike_and_both_kinds_take_turns() -> None:
    book = torch.randn(K, 8, generator=torch.Generator().manual_seed(0))
    alike = lookalikes(book)
    assert alike.shape == (K, 16) and alike.dtype == np.uint16
    many = lookalikes(torch.randn(4100, 4))  # computed in parts
    assert many.shape == (4100, 16) and not (many == np.arange(4100)[:, None]).any()
    distances = torch.cdist(book, book)
    for code in range(K):
        others = np.setdiff1d(np.arange(K), [code, *alike[code]])
        assert code not in alike[code] and distances[code, alike[code].astype(int)].max() <= distances[code, others].min()
    settings, confused, wrong = config(context_confusion=0.5), config(context_noise=0.5, context_confusion=0.5), []
    for seed in range(200):
        one = vary(codes(), np.random.default_rng(seed), settings, alike)
        assert one.context is not None and np.array_equal(one.codes, codes()) and one.context.dtype == np.uint16
        changed = one.context != one.codes
        wrong.append(float(changed.mean()))
        assert all(fed in alike[told] for fed, told in zip(one.context[changed], one.codes[changed], strict=True))
    assert np.mean(wrong) == pytest.approx(0.25, abs=0.03)
    kinds = []
    for seed in range(200):
        one = vary(codes(), np.random.default_rng(seed), confused, alike)
        assert one.context is not None
        changed = one.context != one.codes
        kinds.append(all(fed in alike[told] for fed, told in zip(one.context[changed], one.codes[changed], strict=True)))
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.12)


def test_join_puts_clips_one_behind_the_other() -> None:
    settings = config(excerpt_share=0.5, context_noise=0.1, last_frame_share=0.2)
    parts = [vary(codes(frames), np.random.default_rng(frames), settings) for frames in (5, 9, 7)]
    batch = join(parts)
    assert batch["lengths"] == [len(one.codes) for one in parts]
    assert batch["codes"].shape == batch["context"].shape == (sum(batch["lengths"]), SIDE, SIDE)
    assert batch["passes"].shape == (sum(batch["lengths"]), SIDE * SIDE)
    assert batch["starts"] == [one.start for one in parts]
    assert len(batch["last_given"]) == 3
    plain = join([vary(codes(), np.random.default_rng(0), config("token"))])
    assert plain["context"] is None and plain["passes"] is None and plain["last_given"] is None
