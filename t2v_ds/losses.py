"""The losses of the VQ-VAE, each with a weight.

    reconstruction, target [N, 3, H, W] --+-> l1, ssim, perceptual, lab ----+
    quantized (latents, vectors, usage) --+-> codebook, commitment, diversity +-> sum of weight x loss

A loss whose weight is 0 is not computed, and nothing is imported or built for it. Structural similarity (Wang et al. 2004)
comes from torchmetrics, CIELAB from kornia, the frozen networks from torchvision.
"""

from __future__ import annotations

import logging
import math
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_ds.config import LossConfig
from t2v_ds.errors import ConfigError, first_line
from t2v_ds.models.quantizer import QuantizerOutput

logger = logging.getLogger(__name__)

SSIM_WINDOW = 11  # pixels: a Gaussian of 1.5 pixels, cut at 3.5 sigma
WEIGHTS_SETTING = "losses.perceptual_weights"
RANDOM_SEED = 0  # of `perceptual_weights: random`; fixed, so that a resumed run measures with the same network
DOWNLOAD_TIMEOUT_S = 30.0
# Layers of torchvision's `features` whose output is compared, and the smallest image that reaches the last of them.
TAPS = {
    "vgg16": (3, 8, 15, 22),  # relu1_2, relu2_2, relu3_3, relu4_3 (Johnson et al. 2016)
    "squeezenet": (1, 4, 7, 10),  # relu1, fire3, fire5, fire8
}
SMALLEST_IMAGE = {"vgg16": 8, "squeezenet": 15}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VQVAELosses(nn.Module):
    """Weighted sum of the losses of `LossConfig`.

    It has no parameters, buffers or state: the frozen network is held outside nn.Module's registration, so that neither the
    optimizer nor a checkpoint sees it, but follows `.to(device)`.
    """

    def __init__(self, config: LossConfig, learning: str) -> None:
        """Build what the losses with a weight need; `learning` is `QuantizerConfig.learning`.

        Raises:
            ConfigError: every weight is 0, or the perceptual weights cannot be had.
        """
        super().__init__()
        if learning not in ("ema", "gradient"):
            raise ConfigError(f"setting 'quantizer.learning' is {learning!r}; allowed: 'ema' or 'gradient'")
        possible: dict[str, Callable[[Tensor, Tensor, QuantizerOutput], Tensor]] = {
            "l1": lambda reconstruction, target, _: F.l1_loss(reconstruction, target),
            "codebook": lambda _, __, quantized: F.mse_loss(quantized.vectors, quantized.latents.detach()),
            "commitment": lambda _, __, quantized: F.mse_loss(quantized.latents, quantized.vectors.detach()),
            "ssim": lambda reconstruction, target, _: ssim_loss(reconstruction, target),
            "perceptual": lambda reconstruction, target, _: self._perceptual[0](reconstruction, target),
            "lab": lambda reconstruction, target, _: lab_loss(reconstruction, target),
            "diversity": lambda _, __, quantized: diversity_loss(quantized.soft_usage()),
        }
        self.weights: dict[str, float] = {name: getattr(config, name) for name in possible if getattr(config, name) > 0}
        if learning == "ema":
            self.weights.pop("codebook", None)  # statistics move the codebook, and never both do
        if not self.weights:
            raise ConfigError("every weight in 'losses' is 0; at least losses.l1 must be above 0")
        self._losses = {name: possible[name] for name in self.weights}
        # In a list, which nn.Module does not look into.
        self._perceptual: list[PerceptualDistance] = []
        if "perceptual" in self.weights:
            self._perceptual.append(PerceptualDistance(config.perceptual_network, config.perceptual_weights))

    def forward(self, reconstruction: Tensor, target: Tensor, quantized: QuantizerOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the losses.

        Args:
            reconstruction: floating point [N, 3, H, W], 0..1.
            target: floating point [N, 3, H, W], 0..1.
            quantized: what the quantizer gave for the same frames.

        Returns:
            fp32 scalar with gradient: the sum of weight x loss; and each loss by name: fp32 scalar, unweighted, detached.

        Raises:
            ConfigError: the images are too small for a loss (names it).
        """
        reconstruction, target = reconstruction.float(), target.float()
        total = reconstruction.new_zeros(())
        values: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            value = self._losses[name](reconstruction, target, quantized).float()
            total = total + weight * value
            values[name] = value.detach()
        return total, values

    def _apply(self, fn: Any, recurse: bool = True) -> VQVAELosses:
        """Move the frozen network with this module; it stays fp32, and autocast decides how it is computed."""
        super()._apply(fn, recurse)
        for network in self._perceptual:
            network._apply(fn)
            network.float()
        return self


def ssim_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """1 - structural similarity of images [N, 3, H, W] in 0..1, in fp32.

    Raises:
        ConfigError: the images are smaller than SSIM's window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _require_size(target, SSIM_WINDOW, "ssim", "SSIM's window")
    with torch.autocast(target.device.type, enabled=False):
        similarity = structural_similarity_index_measure(reconstruction, target, data_range=1.0)
    if not isinstance(similarity, Tensor):  # a tuple, when maps are asked for
        raise TypeError("torchmetrics returned maps that were not asked for")
    return 1 - similarity


def lab_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference in CIELAB of images [N, 3, H, W] in 0..1, in units of 100 (the range of lightness), in fp32."""
    from kornia.color import rgb_to_lab

    with torch.autocast(target.device.type, enabled=False):
        # Not clamped first: torch's clamp has no gradient at exactly 0 and 1, and kornia's curves go on outside 0..1.
        return (rgb_to_lab(reconstruction) - rgb_to_lab(target)).abs().mean() / 100


def diversity_loss(usage: Tensor) -> Tensor:
    """Shares of use [K] -> 0 (all codes used alike) .. 1 (one code used): (log K - entropy) / log K."""
    entropy = -(usage * usage.clamp_min(1e-12).log()).sum()  # the clamp keeps the gradient at 0 finite
    return 1 - entropy / math.log(len(usage))


class PerceptualDistance(nn.Module):
    """Distance of the features that a frozen network sees in two images (Johnson et al. 2016).

    Features are scaled to unit length over the channels first (Zhang et al. 2018), so that layers and networks of any
    scale, random ones too, count alike.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: str, weights: str, setting: str = WEIGHTS_SETTING) -> None:
        """Build `network` ("vgg16" or "squeezenet") with `weights` ("imagenet", "random", or the path of a state dict).

        Raises:
            ConfigError: the weights cannot be downloaded or read, or belong to another network; names `setting`.
        """
        super().__init__()
        self.network = network
        self.features = _build_features(network, weights, setting)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Mean over layers and places of the squared distance of unit features of images [N, 3, H, W] in 0..1."""
        _require_size(target, SMALLEST_IMAGE[self.network], "perceptual", self.network)
        with torch.no_grad():
            wanted = self.extract(target)
        found = self.extract(reconstruction)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(found, wanted, strict=True)]
        return torch.stack(distances).mean()

    def extract(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] in 0..1 -> fp32 features [N, C, h, w] of unit length over C, one for each layer compared."""
        x = (images - self.mean) / self.std
        outputs = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in TAPS[self.network]:
                features = x.float()
                outputs.append(features * features.square().sum(1, keepdim=True).add(1e-6).rsqrt())
        return outputs


def _require_size(images: Tensor, smallest: int, loss: str, what: str) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < smallest:
        raise ConfigError(
            f"setting 'losses.{loss}' needs images of at least {smallest} x {smallest} pixels ({what}); "
            f"these are {height} x {width}: set losses.{loss} to 0"
        )


def _build_features(network: str, weights: str, setting: str) -> nn.Sequential:
    from torchvision import models

    # On the meta device, because VGG16's classifier alone would take half a gigabyte and is not used.
    with torch.device("meta"):
        whole = models.vgg16(weights=None, init_weights=False) if network == "vgg16" else models.squeezenet1_0(weights=None)
    features: nn.Sequential = whole.features[: TAPS[network][-1] + 1]
    features.to_empty(device="cpu")
    if weights == "random":
        _initialise(features)
        logger.info("perceptual loss: %s with random weights (seed %d)", network, RANDOM_SEED)
        return features
    state = _download(network, setting) if weights == "imagenet" else read_state_dict(Path(weights).expanduser(), setting)
    for name, parameter in features.state_dict().items():
        found = state.get(f"features.{name}")
        if found is None or found.shape != parameter.shape:
            has = "is missing" if found is None else f"has shape {list(found.shape)}"
            raise ConfigError(
                f"setting '{setting}' ({weights}) does not fit torchvision's {network}: "
                f"'features.{name}' {has}, expected {list(parameter.shape)}"
            )
        parameter.copy_(found)
    logger.info("perceptual loss: %s with weights %s", network, weights)
    return features


def _initialise(features: nn.Sequential) -> None:
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _download(network: str, setting: str) -> dict[str, Tensor]:
    """Read torchvision's pretrained weights from torch's cache, or download them into it."""
    from torchvision import models

    known = models.VGG16_Weights.IMAGENET1K_V1 if network == "vgg16" else models.SqueezeNet1_0_Weights.IMAGENET1K_V1
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torch.hub sets none: without a route it would wait for ever
    try:
        state: dict[str, Tensor] = known.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        without = ", or set losses.perceptual to 0" if setting == WEIGHTS_SETTING else ""
        raise ConfigError(
            f"setting '{setting}' is 'imagenet', but the weights of {network} can neither be downloaded nor read from "
            f"torch's cache ({first_line(error)}); give the path of a state dict, or 'random'{without}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return state


def read_state_dict(path: Path, setting: str) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or one that `torch.load` reads without unpickling objects.

    Raises:
        ConfigError: no file, cut or damaged, or something else than tensors by name; names `setting`.
    """
    if not path.is_file():
        allowed = "'imagenet', 'random' or the path of a state dict"
        raise ConfigError(f"setting '{setting}' is '{path}', which is no file; allowed: {allowed}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise ConfigError(f"setting '{setting}': {path} is no readable state dict ({first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"setting '{setting}': {path} holds no state dict (names -> tensors)")
    return state
