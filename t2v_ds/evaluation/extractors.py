"""Networks that see features in videos, loaded from files: what FVD is measured with.

    fvd.weights: a TorchScript program  -> called as StyleGAN-V calls its I3D      (Skorokhodov et al. 2022)
                 a state dict           -> torchvision's r3d_18 or s3d, without its classifier
                 nothing                -> r3d_18 with fixed random weights: a stand-in, comparable only with itself

Figures of two extractors cannot be compared, so each carries a name and the sha256 of its file.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_ds.config import FVDConfig
from t2v_ds.errors import CheckpointError, ConfigError, first_line
from t2v_ds.evaluation.frechet import fixed_frames
from t2v_ds.losses import read_state_dict
from t2v_ds.models.exported import content_id, load_state

logger = logging.getLogger(__name__)

STAND_IN_SEED = 0
BATCH = 8  # clips at once: 16 frames of 224 x 224 pixels take about 1 GB in I3D
# Of torchvision's networks: pixels a side that their weights were trained at, and the name of the classifier.
_SIZES = {"r3d_18": 112, "s3d": 224}
_HEADS = {"r3d_18": "fc", "s3d": "classifier"}
# Of Kinetics-400, as torchvision's presets of both networks have them.
_MEAN, _STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


@dataclass
class Extractor:
    """A network that sees features in videos.

    Attributes:
        name: of the network, with its file.
        measure: what a Fréchet distance of its features is called: "FVD", or "stand-in FVD" of random weights.
        sha256: of its file; of the stand-in a hash of its weights.
        resizing: how frames come to its size, in words.
        frames: that are taken of each clip.
    """

    name: str
    measure: str
    sha256: str
    resizing: str
    frames: int
    network: Any  # a torch.jit.ScriptModule or an nn.Module
    side: int  # pixels that frames are resized to; 0: the network does it
    device: torch.device

    def features(self, clips: Iterable[np.ndarray]) -> np.ndarray:
        """Clips, each uint8 [T, H, W, 3] of one size, -> fp64 [N, D]."""
        found: list[np.ndarray] = []
        batch: list[np.ndarray] = []
        for clip in clips:
            batch.append(fixed_frames(clip, self.frames))
            if len(batch) == BATCH:
                found.append(self._see(np.stack(batch)))
                batch = []
        if batch:
            found.append(self._see(np.stack(batch)))
        return np.concatenate(found) if found else np.empty((0, 0))

    @torch.inference_mode()
    def _see(self, clips: np.ndarray) -> np.ndarray:
        """uint8 [B, T, H, W, 3] -> fp64 [B, D]."""
        videos = torch.from_numpy(clips).to(self.device).permute(0, 4, 1, 2, 3).float()  # [B, 3, T, H, W], 0..255
        if self.side:
            seen = self.network(_normalised(videos, self.side))
        else:
            seen = self.network(videos, rescale=True, resize=True, return_features=True)
        if not isinstance(seen, Tensor) or seen.ndim != 2 or len(seen) != len(clips):
            what = list(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            raise ValueError(f"it returns {what} for {len(clips)} clips; expected features [{len(clips)}, D]")
        return seen.double().cpu().numpy()

    def check(self, image_size: int) -> None:
        """Try it on a black clip: whatever does not fit is told before hours of drawing.

        Raises:
            ConfigError: it cannot see clips of this size and of `frames` frames, or returns something else than features.
        """
        try:
            self.features([np.zeros((self.frames, image_size, image_size, 3), dtype=np.uint8)])
        except (RuntimeError, ValueError, TypeError) as error:
            reason = next((line.strip() for line in reversed(str(error).splitlines()) if "Error" in line), first_line(error))
            raise ConfigError(
                f"setting 'fvd.weights': {self.name} cannot see {self.frames} frames of {image_size} x {image_size} pixels ({reason})"
            ) from error


def _normalised(videos: Tensor, side: int) -> Tensor:
    """fp32 [B, 3, T, H, W] in 0..255 -> the same of side x side pixels, with Kinetics' mean and deviation taken out."""
    frames = videos.transpose(1, 2)  # [B, T, 3, H, W]
    small = F.interpolate(frames.flatten(0, 1), (side, side), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values, device=videos.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return ((small / 255 - mean) / std).unflatten(0, frames.shape[:2]).transpose(1, 2)


def open_extractor(config: FVDConfig, device: torch.device) -> Extractor:
    """Load the network that `config` names.

    Raises:
        ConfigError: there is no such file, it is cut or damaged, or it holds something else.
    """
    if not config.weights:
        return _stand_in(config.frames, device)
    path = Path(config.weights).expanduser()
    if not path.is_file():
        raise ConfigError(f"setting 'fvd.weights' is '{path}', which is no file; allowed: the file of a {config.architecture} network")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if config.architecture == "torchscript":
        network, side = _load_script(path), 0
        resizing = "by the program in the file (called with resize=True, rescale=True, return_features=True)"
    else:
        network, side = _build(config.architecture), _SIZES[config.architecture]
        head = f"{_HEADS[config.architecture]}."
        state = {name: tensor for name, tensor in read_state_dict(path, "fvd.weights").items() if not name.startswith(head)}
        try:
            load_state(network, state, str(path))
        except CheckpointError as error:
            raise ConfigError(f"setting 'fvd.weights' does not fit torchvision's {config.architecture}: {error}") from error
        resizing = _resizing(side)
    name = f"{config.architecture} {path.name}"
    return Extractor(name, "FVD", sha256, resizing, config.frames, network.to(device).eval(), side, device)


def _load_script(path: Path) -> Any:
    """A TorchScript program, whose constants are read by a reader that makes no Python objects."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch prefers torch.export; the file that everybody compares with is TorchScript
            return torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(
            f"setting 'fvd.weights': {path} is no whole TorchScript file ({first_line(error)}); "
            "a state dict of torchvision's r3d_18 or s3d is given with fvd.architecture=r3d_18 or s3d"
        ) from error


def _build(architecture: str) -> nn.Module:
    """Torchvision's network, with random weights, which returns the features before its classifier: [B, 3, T, S, S] -> [B, D]."""
    from torchvision.models import video

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(STAND_IN_SEED)
        network: nn.Module = getattr(video, architecture)(weights=None)
    setattr(network, _HEADS[architecture], nn.Identity())
    return network


def _resizing(side: int) -> str:
    return f"the whole frame to {side} x {side} pixels, bilinear with antialiasing"


def _stand_in(frames: int, device: torch.device) -> Extractor:
    network = _build("r3d_18")
    name = f"stand-in: random r3d_18, seed {STAND_IN_SEED}; comparable only with itself"
    sha256 = content_id({}, dict(network.state_dict()))  # of another version of torch it may have other weights
    side = _SIZES["r3d_18"]
    return Extractor(name, "stand-in FVD", sha256, _resizing(side), frames, network.to(device).eval(), side, device)
