"""Each loss has the value and the gradient it should, and one with weight 0 costs nothing."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_ds import losses as losses_module
from t2v_ds.config import LossConfig, QuantizerConfig
from t2v_ds.errors import ConfigError
from t2v_ds.losses import PerceptualDistance, VQVAELosses, diversity_loss, lab_loss, ssim_loss
from t2v_ds.models.quantizer import Quantizer, QuantizerOutput

NAMES = ("l1", "codebook", "commitment", "ssim", "perceptual", "lab", "diversity")


def only(**weights: float) -> LossConfig:
    values = dict.fromkeys(NAMES, 0.0) | weights
    return LossConfig(**values, perceptual_weights="random")  # type: ignore[arg-type]


def quantizer(learning: str = "gradient") -> Quantizer:
    torch.manual_seed(0)
    module = Quantizer(QuantizerConfig(codebook_size=12, codebook_dim=4, learning=learning))
    module.started.fill_(1)  # before, latents pass unquantized and the losses of the codebook are 0
    return module


def quantized(learning: str = "gradient") -> tuple[QuantizerOutput, Tensor, Quantizer]:
    module = quantizer(learning)
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    return module(latents), latents, module


def images(size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, size, size, generator=generator).requires_grad_(), torch.rand(2, 3, size, size, generator=generator)


def forbidden() -> Tensor:
    raise AssertionError("soft_usage was called although losses.diversity is 0")


def test_total_is_the_weighted_sum_and_names_are_those_switched_on() -> None:
    config = LossConfig(perceptual_weights="random")
    output, _, _ = quantized()
    reconstruction, target = images()
    total, values = VQVAELosses(config, "gradient")(reconstruction, target, output)
    assert set(values) == set(NAMES)
    assert all(value.ndim == 0 and value.dtype == torch.float32 and not value.requires_grad for value in values.values())
    torch.testing.assert_close(total.detach(), torch.stack([getattr(config, name) * value for name, value in values.items()]).sum())
    assert all(float(value) > 0 for value in values.values())
    torch.testing.assert_close(values["l1"], (reconstruction - target).abs().mean().detach())


def test_each_loss_moves_what_it_should_and_nothing_else() -> None:
    moved = {}
    for name in NAMES:
        output, latents, module = quantized()
        reconstruction, target = images()
        total, values = VQVAELosses(only(**{name: 2.0}), "gradient")(reconstruction, target, output)
        assert list(values) == [name]
        total.backward()
        tensors = {"image": reconstruction, "latents": latents, "codebook": module.codebook}
        for tensor in tensors.values():
            assert tensor.grad is None or bool(torch.isfinite(tensor.grad).all())
        moved[name] = {key for key, tensor in tensors.items() if tensor.grad is not None and float(tensor.grad.abs().sum()) > 0}
    picture = {name: {"image"} for name in ("l1", "ssim", "perceptual", "lab")}
    assert moved == {**picture, "codebook": {"codebook"}, "commitment": {"latents"}, "diversity": {"latents", "codebook"}}


def test_with_ema_there_is_no_codebook_loss() -> None:
    output, latents, _ = quantized("ema")
    total, values = VQVAELosses(only(codebook=1.0, commitment=0.5), "ema")(*images(), output)
    assert set(values) == {"commitment"}
    torch.testing.assert_close(total.detach(), 0.5 * F.mse_loss(latents, output.vectors).detach())
    with pytest.raises(ConfigError, match="every weight"):
        VQVAELosses(only(codebook=1.0), "ema")
    with pytest.raises(ConfigError, match="'ema' or 'gradient'"):
        VQVAELosses(only(l1=1.0), "both")


def test_weight_zero_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("a perceptual network was built although losses.perceptual is 0")

    monkeypatch.setattr(losses_module, "PerceptualDistance", no_network)
    for name in ("ssim_loss", "lab_loss", "diversity_loss"):
        monkeypatch.setattr(losses_module, name, no_network)
    output, _, _ = quantized()
    output.soft_usage = forbidden
    _, values = VQVAELosses(only(l1=1.0, commitment=1.0), "ema")(*images(), output)
    assert set(values) == {"l1", "commitment"}
    with pytest.raises(AssertionError, match="network was built"):
        VQVAELosses(only(perceptual=1.0), "ema")
    with pytest.raises(AssertionError, match="network was built"):
        VQVAELosses(only(lab=1.0), "ema")(*images(), output)


def test_weight_zero_imports_nothing() -> None:
    code = (
        "import sys; from t2v_ds.config import LossConfig; from t2v_ds.losses import VQVAELosses\n"
        "VQVAELosses(LossConfig(ssim=0, perceptual=0, lab=0), 'ema')\n"
        "assert not {'torchvision', 'torchmetrics', 'kornia'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_diversity_is_zero_for_even_use_and_one_for_a_single_code() -> None:
    assert float(diversity_loss(torch.full((8,), 1 / 8))) == pytest.approx(0, abs=1e-6)
    usage = torch.eye(8)[3].requires_grad_()
    value = diversity_loss(usage)
    value.backward()
    assert float(value.detach()) == pytest.approx(1, abs=1e-6)
    assert usage.grad is not None
    assert bool(torch.isfinite(usage.grad).all())
    half = torch.tensor([0.5, 0.5, 0, 0])
    assert float(diversity_loss(half)) == pytest.approx(1 - math.log(2) / math.log(4), abs=1e-6)


def test_diversity_spreads_latents_when_followed() -> None:
    module = quantizer("ema")
    with torch.no_grad():
        module.codebook[1:] = module.codebook[1:] * 0.01 + 3  # all latents near 0 belong to code 0
        module.codebook[0] = 0
    latents = (torch.randn(4, 4, 3, 3) * 0.5 + 0.7).requires_grad_()
    weighted = VQVAELosses(only(diversity=1.0), "ema")
    before = None
    optimizer = torch.optim.Adam([latents], lr=0.1)
    for _ in range(30):
        total, _ = weighted(*images(), module(latents))
        before = total.detach() if before is None else before
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert before is not None
    assert float(total.detach()) < 0.9 * float(before)


def test_lab_has_known_values_and_a_finite_gradient_at_black_and_white() -> None:
    black, white = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    assert float(lab_loss(black, white)) == pytest.approx(1 / 3, abs=2e-3)  # lightness 0 to 100, no colour
    red, green = black.clone(), black.clone()
    red[:, 0], green[:, 1] = 1, 1
    expected = (abs(53.24 - 87.73) + abs(80.09 + 86.18) + abs(67.20 - 83.18)) / 300  # published sRGB primaries, D65
    assert float(lab_loss(red, green)) == pytest.approx(expected, abs=2e-3)
    for value in (0.0, 1.0):
        reconstruction = torch.full((1, 3, 4, 4), value, requires_grad=True)
        lab_loss(reconstruction, torch.full((1, 3, 4, 4), 0.5)).backward()
        assert reconstruction.grad is not None
        assert bool(torch.isfinite(reconstruction.grad).all())
        assert float(reconstruction.grad.abs().sum()) > 0
    outside = torch.tensor([-0.5, 1.5]).repeat(1, 3, 4, 2).requires_grad_()
    lab_loss(outside, torch.full((1, 3, 4, 4), 0.5)).backward()
    assert outside.grad is not None
    assert bool(torch.isfinite(outside.grad).all())
    assert bool((outside.grad != 0).all())


def test_ssim_is_zero_for_equal_images_and_refuses_what_its_window_does_not_fit() -> None:
    reconstruction, target = images(16)
    assert float(ssim_loss(target, target)) == pytest.approx(0, abs=1e-6)
    assert 0.5 < float(ssim_loss(reconstruction, target).detach()) < 1.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssim_loss(reconstruction, target), ssim_loss(reconstruction, target).float())
    assert math.isfinite(float(ssim_loss(*images(11))))
    with pytest.raises(ConfigError, match=r"losses.ssim.*at least 11 x 11.*10 x 10"):
        ssim_loss(*images(10))


@pytest.mark.parametrize(("network", "smallest"), [("vgg16", 8), ("squeezenet", 15)])
def test_perceptual_distance(network: str, smallest: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        distance = PerceptualDistance(network, "random")
    assert "random weights (seed 0)" in caplog.text
    again = PerceptualDistance(network, "random")
    reconstruction, target = images(smallest)
    value = distance(reconstruction, target)
    assert torch.equal(value, again(reconstruction, target))
    assert float(distance(target, target)) == 0
    assert float(distance(target + 0.01 * torch.randn(target.shape), target)) < float(value)
    channels = [64, 128, 256, 512] if network == "vgg16" else [96, 128, 256, 512]
    assert [features.shape[1] for features in distance.extract(target)] == channels
    value.backward()
    assert reconstruction.grad is not None
    assert float(reconstruction.grad.abs().sum()) > 0
    with pytest.raises(ConfigError, match=f"losses.perceptual.*at least {smallest} x {smallest}"):
        distance(*images(smallest - 1))


def test_the_frozen_network_is_invisible_but_moves_along() -> None:
    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.losses = VQVAELosses(only(perceptual=1.0), "ema")

    objective = Objective()
    assert set(objective.state_dict()) == {"layer.weight", "layer.bias"}
    assert len(list(objective.parameters())) == 2
    assert len(list(objective.buffers())) == 0
    network = objective.losses._perceptual[0]
    objective.train()
    assert not network.features.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    weights = network.features[0].weight.clone()
    objective.to(torch.bfloat16)
    assert network.features[0].weight.dtype == torch.float32
    assert not torch.equal(weights, torch.zeros_like(weights))
    objective.to("meta")
    assert all(tensor.device.type == "meta" for tensor in [*network.parameters(), *network.buffers()])


def test_weights_from_a_file(tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(1)
    state = models.squeezenet1_0(weights=None).state_dict()
    torch.save(state, tmp_path / "net.pth")
    save_file(state, tmp_path / "net.safetensors")
    distances = [PerceptualDistance("squeezenet", str(tmp_path / name)) for name in ("net.pth", "net.safetensors")]
    target = images()[1]
    with torch.no_grad():
        x = (target - distances[0].mean) / distances[0].std
        expected = models.squeezenet1_0(weights=None)
        expected.load_state_dict(state)
        last = F.normalize(expected.features[:11](x), dim=1)
        for distance in distances:
            torch.testing.assert_close(distance.extract(target)[-1], last, atol=1e-3, rtol=1e-3)


def test_bad_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"missing\.pth', which is no file"):
        PerceptualDistance("vgg16", str(tmp_path / "missing.pth"))
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02garbage")
        with pytest.raises(ConfigError, match=f"{name} is no readable state dict"):
            PerceptualDistance("vgg16", str(tmp_path / name))
    save_file({"features.0.weight": torch.zeros(96, 3, 7, 7)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"'features.0.weight' has shape \[96, 3, 7, 7\], expected \[64, 3, 3, 3\]"):
        PerceptualDistance("vgg16", str(tmp_path / "other.safetensors"))

    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(ConfigError, match=r"neither be downloaded nor read.*Name or service not known.*'random'") as caught:
        PerceptualDistance("vgg16", "imagenet")
    assert "\n" not in str(caught.value)
