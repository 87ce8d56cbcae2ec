"""Which clips look alike: copies are found, own clips are found, and prompts are told from seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from t2v_ds.config import PerceptualConfig
from t2v_ds.errors import ConfigError
from t2v_ds.evaluation.likeness import distinctness, memorisation, nearest, nearest_is_own, open_space, own_clips

CPU = torch.device("cpu")
PIXELS = open_space(PerceptualConfig(), 32, CPU)


def clip(seed: int, frames: int = 6, size: int = 32) -> np.ndarray:
    """A smooth clip of its own colours."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def noisy(frames: np.ndarray, seed: int = 0, level: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (frames + rng.normal(0, level, frames.shape)).clip(0, 255).astype(np.uint8)


def test_distances_without_a_network_are_levels() -> None:
    a, b = (PIXELS.look(np.full((frames, 32, 32, 3), level, dtype=np.uint8)) for frames, level in ((5, 100), (9, 103)))
    assert float(np.linalg.norm(a - b)) == pytest.approx(3, rel=1e-5)
    assert PIXELS.name == "8 frames of 16 x 16 pixels" and PIXELS.unit == "levels of 0 to 255"
    short = np.full((1, 32, 32, 3), 100, dtype=np.uint8)
    assert np.array_equal(PIXELS.look(short), a)


@pytest.mark.parametrize("space", [PIXELS, open_space(PerceptualConfig("random"), 32, CPU)], ids=["pixels", "squeezenet"])
def test_a_noisy_copy_is_known_among_others(space: object) -> None:
    training = [clip(seed) for seed in range(12)]
    drawn = [noisy(training[i], i) for i in (7, 2, 2, 11)]
    captions = [f"clip {i}" for i in range(12)]
    own = nearest_is_own(drawn, training, ["clip 7", "clip 2", "clip 2", "clip 3"], captions, space)  # type: ignore[arg-type]
    assert own.number.tolist() == [7, 2, 2, 11]
    assert own.rank[:3].tolist() == [0, 0, 0] and own.rank[3] >= 1
    assert own.hits == 3


def test_the_nearest_is_the_one_that_all_distances_say() -> None:
    rng = np.random.default_rng(0)
    looks, others = (rng.standard_normal((n, 5)).astype(np.float32) + 100 for n in (300, 40))
    distances = np.linalg.norm(looks[:, None].astype(np.float64) - others, axis=2)
    number, distance = nearest(looks, others)
    assert np.array_equal(number, distances.argmin(1))
    assert distance == pytest.approx(distances.min(1), rel=1e-12)
    number, distance = nearest(others)
    among = np.linalg.norm(others[:, None].astype(np.float64) - others, axis=2) + np.diag(np.full(40, np.inf))
    assert np.array_equal(number, among.argmin(1))
    assert distance == pytest.approx(among.min(1), rel=1e-12)
    assert nearest(np.concatenate([others, others[:1]]))[1][0] == 0  # a copy of itself counts


def test_ranks_by_hand() -> None:
    training = np.array([[0.0], [1.0], [2.0], [10.0]], dtype=np.float32)
    captions = ["a", "b", "a", "c"]
    own = own_clips(np.array([[0.1], [1.1], [9.0], [5.0], [1.4]], dtype=np.float32), training, ["a", "c", "c", "unknown", "a"], captions)
    assert own.number.tolist() == [0, 1, 3, 2, 1]
    assert own.distance == pytest.approx([0.1, 0.1, 1.0, 3.0, 0.4], rel=1e-5)
    assert own.rank.tolist() == [0, 3, 0, -1, 1]  # two clips are captioned "a"; the nearer one is at 2.0
    assert own.hits == 2


def test_copies_are_counted_against_the_usual_distance() -> None:
    rng = np.random.default_rng(0)
    training = rng.standard_normal((200, 6)).astype(np.float32)
    captions = [str(i) for i in range(200)]
    copies = own_clips(training[:20] + np.float32(1e-3), training, captions[:20], captions)
    found = memorisation(copies, training)
    assert found["nearer_than_1st_percentile"]["hits"] == 20
    assert found["nearest_is_own"]["share"] == 1 and found["median_rank_of_own"] == 0
    assert found["ratio"] < 0.01 and found["training_clips"] == 200
    fresh = own_clips(rng.standard_normal((200, 6)).astype(np.float32), training, ["none"] * 200, captions)
    found = memorisation(fresh, training)
    assert found["nearer_than_1st_percentile"]["share"] < 0.05
    assert found["ratio"] == pytest.approx(1, abs=0.2)
    assert found["nearest_is_own"] is None and found["median_rank_of_own"] is None


def test_prompts_are_told_from_seeds() -> None:
    first = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=np.float32)
    second = first + np.array([0.0, 0.5], dtype=np.float32)
    found = distinctness(first, second, 2 * first)
    assert found == {"prompts": 3, "between_prompts": 4.0, "between_seeds": 0.5, "ratio": 8.0, "between_real_clips": 8.0}
    assert distinctness(first, first, first)["ratio"] is None


def test_a_network_that_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "squeezenet.pth"
    path.write_bytes(b"PK\x03\x04 cut")
    for settings, size, sentence in (
        ({"weights": str(path)}, 32, rf"setting 'perceptual\.weights': {path} is no readable state dict"),
        ({"weights": str(tmp_path / "no")}, 32, r"setting 'perceptual\.weights' is '.*no', which is no file"),
        ({"weights": "random"}, 8, "needs frames of at least 15 x 15 pixels; these are 8 x 8: leave out perceptual.weights"),
        ({"weights": "random", "network": "alexnet"}, 32, r"setting 'perceptual\.network' is 'alexnet'; allowed"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            open_space(PerceptualConfig(**settings), size, CPU)
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"perceptual\.weights' .* torchvision's squeezenet: 'features\.0\.weight' has shape"):
        open_space(PerceptualConfig(str(path)), 32, CPU)


def test_a_network_from_a_file_is_named_with_its_hash(tmp_path: Path) -> None:
    from torchvision import models

    path = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save(models.squeezenet1_0(weights=None).state_dict(), path)
    space = open_space(PerceptualConfig(str(path)), 32, CPU)
    assert "squeezenet with weights weights.pth" in space.name and len(space.sha256) == 64
    # Half a look's squared length is that of a unit vector a cell, averaged: looks do not grow with frames, cells or layers.
    assert 0 < float(np.linalg.norm(space.look(clip(0)))) <= 1 + 1e-5
