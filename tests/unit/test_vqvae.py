"""The VQ-VAE: the spec size, codes alone decode, uint8 and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2v_ds.config import LossConfig, QuantizerConfig, VQVAEConfig
from t2v_ds.losses import VQVAELosses
from t2v_ds.models.vqvae import VQVAE, scale_pixels, to_pixels

SIZE = 16


def make(learning: str = "ema") -> VQVAE:
    """A small model with nothing at zero, so that every path carries something."""
    torch.manual_seed(0)
    quantizer = QuantizerConfig(codebook_size=24, codebook_dim=6, learning=learning)
    model = VQVAE(VQVAEConfig(SIZE, 8, (1, 2), (1, 1), 4, quantizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    model.quantizer.started.fill_(1)
    return model.eval()


def frames(n: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_default_is_the_spec_size() -> None:
    model = VQVAE(VQVAEConfig()).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["encoder.0.weight"] == (128, 3, 4, 4)
    assert shapes["encoder.1.conv1.weight"] == (128, 128, 3, 3)
    assert shapes["encoder.2.weight"] == (256, 128, 4, 4)
    assert shapes["encoder.5.weight"] == (256, 256, 1, 1)
    assert shapes["quantizer.codebook"] == (1024, 256)
    assert shapes["decoder.0.weight"] == (256, 256, 3, 3)
    blocks = {part: sum(type(m).__name__ == "ResidualBlock" for m in getattr(model, part)) for part in ("encoder", "decoder")}
    assert blocks == {"encoder": 3, "decoder": 3}
    assert any(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    image = torch.randint(0, 256, (1, 128, 128, 3), dtype=torch.uint8)
    codes = model.encode(image)
    assert codes.shape == (1, 32, 32)
    assert codes.dtype == torch.int64
    assert len(codes.unique()) > 100  # an untrained encoder already tells places apart
    pixels = model.decode(codes)
    assert pixels.shape == (1, 3, 128, 128)
    assert to_pixels(pixels).shape == image.shape


@pytest.mark.parametrize("learning", ["ema", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_decode_of_encode_is_the_models_own_forward_to_the_bit(precision: str, learning: str) -> None:
    model = make(learning)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        reconstruction, output = model(frames())
        codes = model.encode(frames())
        assert torch.equal(codes, output.codes)
        assert torch.equal(model.decode(codes), reconstruction)
        model.train()  # what is trained is what is decoded
        assert torch.equal(model(frames())[0], reconstruction)
    assert reconstruction.dtype == torch.float32
    assert len(codes.unique()) > 3


def test_the_decoder_sees_codebook_rows_and_no_encoder_weight() -> None:
    model = make()
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    codes = model.encode(frames())
    before = model.decode(codes)
    model(frames())
    rows = model.quantizer.codebook[codes].permute(0, 3, 1, 2)
    assert len(seen) == 2
    assert all(torch.equal(one, rows) for one in seen)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.normal_()
    assert not torch.equal(model.encode(frames()), codes)
    assert torch.equal(model.decode(codes), before)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_but_codes_crosses_the_quantizer(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every activation of the encoder is disturbed in a whole forward pass whose codes are held fixed."""
    model = make().train(training)
    with torch.no_grad():
        reconstruction, output = model(frames())
    codes = output.codes
    monkeypatch.setattr(model.quantizer, "lookup", lambda _: codes)
    monkeypatch.setattr(model.quantizer, "_collect", lambda _: codes.flatten())
    disturbed: set[nn.Module] = set()

    def disturb(module: nn.Module, _: Any, activation: Tensor) -> Tensor:
        disturbed.add(module)
        return activation + torch.randn_like(activation)

    modules = list(model.encoder.modules())
    for module in modules:
        module.register_forward_hook(disturb)
    with torch.no_grad():
        again, quantized = model(frames())
    assert disturbed == set(modules)
    assert not torch.equal(quantized.latents, output.latents)
    assert torch.equal(again, reconstruction)


@pytest.mark.parametrize("patch_encoder", [False, True])
def test_a_patch_encoder_sees_each_codes_own_pixels_alone(patch_encoder: bool) -> None:
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(SIZE, 8, (1, 2), (1, 1), 4, patch_encoder=patch_encoder)).eval()
    one = frames(1)
    other = one.clone()
    other[0, 4:8, 8:12] = 255 - other[0, 4:8, 8:12]  # the pixels of the code at row 1, column 2
    moved = (model.latents(other) - model.latents(one)).abs().amax(1)[0] > 1e-6
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1, 2] = True
    assert bool(moved[1, 2])
    assert torch.equal(moved, expected) == patch_encoder


def test_only_uint8_frames_of_the_right_size() -> None:
    model = make()
    for bad in (frames().float(), frames().float() / 255, frames().long(), frames().permute(0, 3, 1, 2), frames()[0]):
        with pytest.raises(ValueError, match=r"frames are|pixels; this model takes"):
            model(bad)
    with pytest.raises(ValueError, match=r"torch\.float32 .*; expected uint8 \[N, H, W, 3\]"):
        model.encode(frames().float())
    with pytest.raises(ValueError, match="frames are 8 x 8 pixels; this model takes 16 x 16"):
        model.encode(frames()[:, :8, :8])
    white = scale_pixels(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8))
    assert torch.equal(white, torch.ones(1, 3, 2, 2))
    everything = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_pixels(scale_pixels(everything)), everything)
    assert to_pixels(torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 128, 255]


PICTURE = ("l1", "ssim", "perceptual", "lab")
NAMES = (*PICTURE, "codebook", "commitment", "diversity")


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_reaches_what_it_is_for(name: str) -> None:
    model = make("gradient").train()
    config = LossConfig(**{**dict.fromkeys(NAMES, 0.0), name: 0.5}, perceptual_network="squeezenet", perceptual_weights="random")  # type: ignore[arg-type]
    reconstruction, output = model(frames())
    total, _ = VQVAELosses(config, "gradient")(reconstruction, scale_pixels(frames()), output)
    total.backward()

    def reached(part: nn.Module) -> set[bool]:
        return {p.grad is not None and bool(p.grad.isfinite().all()) and float(p.grad.abs().sum()) > 0 for p in part.parameters()}

    assert reached(model.encoder) == {name != "codebook"}
    assert reached(model.decoder) == {name in PICTURE}
    assert reached(model.quantizer) == {name in ("codebook", "diversity")}
