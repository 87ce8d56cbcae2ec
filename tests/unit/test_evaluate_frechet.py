"""Fréchet distance against what is known of it, and the networks that its features come from."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import Tensor, nn

from t2v_ds.config import FVDConfig
from t2v_ds.errors import ConfigError
from t2v_ds.evaluation.extractors import _normalised, open_extractor
from t2v_ds.evaluation.frechet import fixed_frames, floor_of, frechet_distance

CPU = torch.device("cpu")


def features(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3


@pytest.mark.parametrize(("n", "d"), [(50, 7), (9, 40), (7, 7)])
def test_what_is_known_of_the_distance(n: int, d: int) -> None:
    x, shift = features(n, d), np.arange(d) / 3
    scale = float(((x - x.mean(0)) ** 2).sum() / (n - 1))  # tr C
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9 * scale)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9 * scale)
    assert frechet_distance(x, x + shift) == pytest.approx((shift**2).sum(), rel=1e-9)
    # Covariances C and 9 C have the root 3 C: tr (C + 9 C - 6 C).
    assert frechet_distance(x, x.mean(0) + 3 * (x - x.mean(0))) == pytest.approx(4 * scale, rel=1e-9)
    other = features(n + 3, d, 1)
    assert frechet_distance(x, other) == pytest.approx(frechet_distance(other, x), rel=1e-9)


def test_it_is_the_formula() -> None:
    a, b = features(60, 8), features(45, 8, 1) * 0.7
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_what_has_no_distance_is_refused() -> None:
    for a, b in ((features(5, 3), features(5, 4)), (features(1, 3), features(5, 3)), (features(5, 3)[0], features(5, 3))):
        with pytest.raises(ValueError, match="at least two of each"):
            frechet_distance(a, b)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(features(5, 3), features(5, 3) * np.inf)


def test_the_floor_is_of_as_many_clips_where_there_are_as_many() -> None:
    x, more = features(8, 3), features(9, 3, 1)
    assert floor_of(x, more) == {"distance": frechet_distance(x, more[:8]), "clips": 8}
    assert floor_of(x, x[:0, :0]) == {"distance": frechet_distance(x[0::2], x[1::2]), "clips": 4}
    halves = floor_of(x, more[:3])
    assert halves is not None and halves["clips"] == 5
    assert floor_of(x[:3], x[:0]) is None


def test_which_frames_are_taken() -> None:
    clip = np.arange(5, dtype=np.uint8)[:, None, None, None]
    assert fixed_frames(clip, 3).ravel().tolist() == [0, 1, 2]
    assert fixed_frames(clip, 7).ravel().tolist() == [0, 1, 2, 3, 4, 4, 4]


class Script(nn.Module):
    """Mean colours and their spread, and whether it was called as I3D is."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        asked = torch.full((x.shape[0], 1), float(int(rescale) + 2 * int(resize) + 4 * int(return_features)), device=x.device)
        return torch.cat([x.mean(dim=[2, 3, 4]), x.std(dim=[2, 3, 4]), asked], dim=1)


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Frames(nn.Module):
    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        return x.mean(dim=[3, 4])


def script(path: Path, module: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return path


def clips(count: int, size: int = 8, frames: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, frames, size, size, 3), dtype=np.uint8))


def test_a_torchscript_file_is_called_as_i3d_is(tmp_path: Path) -> None:
    path = script(tmp_path / "i3d.pt", Script())
    extractor = open_extractor(FVDConfig(weights=str(path), frames=3), CPU)
    extractor.check(8)
    assert (extractor.measure, extractor.name, len(extractor.sha256)) == ("FVD", "torchscript i3d.pt", 64)
    some = clips(19)  # more than a batch
    found = extractor.features(iter(some))
    assert found.dtype == np.float64 and found.shape == (19, 7)
    assert found[:, :3] == pytest.approx(np.stack([clip.mean(axis=(0, 1, 2)) for clip in some]), rel=1e-5)  # levels 0 to 255, RGB
    assert (found[:, 6] == 7).all()


def refused(sentence: str, size: int = 8, **settings: object) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        open_extractor(FVDConfig(**settings), CPU).check(size)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_such_network_are_one_sentence(tmp_path: Path) -> None:
    whole = script(tmp_path / "i3d.pt", Script()).read_bytes()
    path = tmp_path / "x.pt"
    for data in (whole[: len(whole) // 2], whole[:-30], b"", b"<html>not found</html>"):
        path.write_bytes(data)
        refused(rf"fvd\.weights': {path} is no whole TorchScript file", weights=str(path))
    torch.save({"a": torch.ones(1)}, path)
    refused("is no whole TorchScript file .*fvd.architecture=r3d_18 or s3d", weights=str(path))
    refused(r"does not fit torchvision's r3d_18: .*x\.pt lacks the tensor 'stem\.0\.weight'", weights=str(path), architecture="r3d_18")
    path.write_bytes(whole[: len(whole) // 2])
    refused(rf"fvd\.weights': {path} is no readable state dict", weights=str(path), architecture="s3d")
    refused("which is no file; allowed: the file of a torchscript network", weights=str(tmp_path / "nowhere.pt"))
    refused("torchscript other.pt cannot see 16 frames of 8 x 8 pixels", weights=str(script(tmp_path / "other.pt", Other())))
    refused(r"expected features \[1, D\]", weights=str(script(tmp_path / "frames.pt", Frames())))
    refused("'fvd.architecture' is 'c3d'; allowed: 'torchscript'", architecture="c3d")
    refused("'fvd.architecture' is 's3d'; allowed: only beside fvd.weights", architecture="s3d")


def test_a_state_dict_of_torchvision(tmp_path: Path) -> None:
    from torchvision.models import video

    torch.manual_seed(1)
    whole = video.s3d(weights=None).eval()
    seen: list[Tensor] = []
    whole.avgpool.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    path = tmp_path / "s3d.safetensors"
    save_file(whole.state_dict(), path)
    extractor = open_extractor(FVDConfig(weights=str(path), architecture="s3d", frames=14), CPU)
    assert (extractor.name, extractor.measure) == ("s3d s3d.safetensors", "FVD")
    clip = clips(1, 16, 14)[0]
    found = extractor.features([clip])
    with torch.no_grad():
        whole(_normalised(torch.from_numpy(clip)[None].permute(0, 4, 1, 2, 3).float(), 224))
    assert found.shape == (1, 1024)
    assert found[0] == pytest.approx(seen[0].mean(dim=(2, 3, 4))[0].numpy(), rel=1e-4, abs=1e-6)
    refused(r"s3d s3d\.safetensors cannot see 4 frames of 8 x 8 pixels \(.*too small", weights=str(path), architecture="s3d", frames=4)
    del whole.classifier  # only what is used of the file must be there
    save_file({k: v for k, v in whole.state_dict().items() if k != "features.0.0.0.weight"}, path)
    refused(r"lacks the tensor 'features\.0\.0\.0\.weight'", weights=str(path), architecture="s3d")


def test_frames_are_normalised_as_torchvision_does() -> None:
    from torchvision.transforms._presets import VideoClassification

    clip = torch.from_numpy(clips(1, 32)[0])  # [T, H, W, 3]
    preset = VideoClassification(crop_size=(112, 112), resize_size=(112, 112))
    found = _normalised(clip[None].permute(0, 4, 1, 2, 3).float(), 112)
    assert found.shape == (1, 3, 3, 112, 112)
    # The preset rounds to whole levels after resizing.
    assert torch.allclose(found[0], preset(clip.permute(0, 3, 1, 2)), atol=1.1 / 255 / 0.216)


def test_the_stand_in_is_named_and_the_same_every_time() -> None:
    before = torch.random.get_rng_state()
    one, two = (open_extractor(FVDConfig(frames=2), CPU) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.measure == "stand-in FVD"
    assert one.name == "stand-in: random r3d_18, seed 0; comparable only with itself"
    assert one.sha256 == two.sha256
    some = clips(2, 16, 2)
    found = one.features(some)
    assert found.shape == (2, 512) and np.isfinite(found).all()
    assert np.array_equal(two.features(some), found)
    assert np.abs(found[0] - found[1]).max() > 1e-3  # it sees a difference
