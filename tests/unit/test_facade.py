"""What users hold in their hands: a tokenizer and a generator, loaded from folders, without DeepSpeed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import t2v_ds
from t2v_ds.config import QuantizerConfig, SamplingConfig, TextConfig, TransformerConfig, VQVAEConfig
from t2v_ds.errors import CheckpointError, ConfigError
from t2v_ds.generate import generate_files, read_frames, write_clip
from t2v_ds.models.exported import export_model
from t2v_ds.models.facade import Generator, Tokenizer, export_tokenizer, generator_config, load_tokenizer
from t2v_ds.models.text import build_text_encoder
from t2v_ds.models.transformer import VideoTransformer
from t2v_ds.models.vqvae import VQVAE, to_pixels
from tests.helpers import environment

SIZE, GRID, K = 16, 4, 24
VQ = VQVAEConfig(SIZE, 8, (1, 2), (0, 1), 4, QuantizerConfig(codebook_size=K, codebook_dim=6))
TEXT = TextConfig(tokens=8, width=12)
TRANSFORMER = TransformerConfig(width=16, layers=1, heads=2, max_frames=6, group=2, grid_size=GRID, codebook_size=K, text_width=TEXT.width)


def vqvae(seed: int = 0) -> VQVAE:
    torch.manual_seed(seed)
    model = VQVAE(VQ).eval()
    model.quantizer.started.fill_(1)
    return model


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A tokenizer's folder and that of a generator made for it."""
    tokenizer, generator = tmp_path / "tokenizer", tmp_path / "generator"
    tokenizer_id = export_tokenizer(tokenizer, VQ, vqvae().state_dict())
    torch.manual_seed(1)
    model = VideoTransformer(TRANSFORMER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    config = generator_config(TRANSFORMER, TEXT, build_text_encoder(TEXT).identity(), tokenizer_id, 2, 5, 70)
    export_model(generator, config, model.state_dict())
    shutil.copytree(tokenizer, generator / "tokenizer")
    return tokenizer, generator


def clip(*leading: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*leading, SIZE, SIZE, 3), dtype=np.uint8)


def test_frames_to_codes_and_back(folders: tuple[Path, Path]) -> None:
    tokenizer = t2v_ds.load_tokenizer(folders[0])
    assert isinstance(tokenizer, Tokenizer)
    assert not tokenizer.model.training
    model = vqvae()  # what was exported is what was loaded
    expected = model.encode(torch.from_numpy(clip(5)))
    codes = tokenizer.encode(clip(5))
    assert codes.dtype == np.uint16
    assert np.array_equal(codes, expected.numpy())
    frames = tokenizer.decode(codes)
    assert frames.dtype == np.uint8
    assert frames.shape == (5, SIZE, SIZE, 3)
    assert np.array_equal(frames, to_pixels(model.decode(expected)).numpy())
    batch = clip(2, 3)
    many = tokenizer.encode(batch)
    assert many.shape == (2, 3, GRID, GRID)
    assert np.array_equal(many[1], tokenizer.encode(batch[1]))
    assert tokenizer.decode(many).shape == batch.shape
    assert np.array_equal(tokenizer.decode(many)[1], tokenizer.decode(many[1]))
    assert np.array_equal(tokenizer.encode(torch.from_numpy(batch)), many)  # tensors too
    for same in (many.astype(np.int64), torch.from_numpy(many.astype(np.int32))):
        assert np.array_equal(tokenizer.decode(same), tokenizer.decode(many))
    tokenizer.batch = 2
    assert np.array_equal(tokenizer.encode(batch), many)  # however it is cut into batches
    assert np.array_equal(t2v_ds.load_tokenizer(folders[0], precision="bf16").decode(many).shape, batch.shape)


def test_frames_and_codes_that_do_not_fit_are_refused(folders: tuple[Path, Path]) -> None:
    tokenizer = t2v_ds.load_tokenizer(folders[0])
    for bad in (clip(2).astype(np.float32), clip(2) / 255, clip(2).astype(np.int64), clip(), clip(1, 1, 1), clip(2)[..., :1]):
        with pytest.raises(ValueError, match=r"frames are .*; expected uint8 \[T, H, W, 3\] or \[B, T, H, W, 3\]"):
            tokenizer.encode(bad)
    with pytest.raises(ValueError, match="frames are 8 x 16 pixels; this model takes 16 x 16"):
        tokenizer.encode(clip(2)[:, ::2])
    codes = tokenizer.encode(clip(2)).astype(np.int64)
    for wrong in (codes.astype(np.float32), codes[0], codes[:, :2], codes[None, None]):
        with pytest.raises(ValueError, match=r"expected integers \[T, 4, 4\]"):
            tokenizer.decode(wrong)
    for value in (-1, K):
        codes[1, 2, 3] = value
        with pytest.raises(ValueError, match=f"{value}.*; this tokenizer has codes 0 to 23"):
            tokenizer.decode(codes)


def test_prompts_to_clips(folders: tuple[Path, Path]) -> None:
    generator = t2v_ds.load_generator(folders[1])
    assert isinstance(generator, Generator)
    assert generator.frame_duration_ms == 70
    prompts = ["a red circle moves right", "a blue square moves up", "a green triangle moves left"]
    clips = generator.generate(prompts, seed=3)
    assert len(clips) == 3
    assert all(one.dtype == np.uint8 and one.shape[1:] == (SIZE, SIZE, 3) and 2 <= len(one) <= 5 for one in clips)
    for again in (
        generator.generate(prompts, SamplingConfig(seed=3)),
        generator.generate(prompts, SamplingConfig(seed=9), batch=2, seed=3),
        t2v_ds.load_generator(folders[1], tokenizer=folders[0]).generate(prompts, seed=3, batch=1),
    ):
        assert all(np.array_equal(a, b) for a, b in zip(again, clips, strict=True))
    [alone] = generator.generate(prompts[0], seed=3)
    assert np.array_equal(alone, clips[0])
    assert [len(one) for one in generator.generate(prompts, frames=6)] == [6, 6, 6]
    assert not np.array_equal(generator.generate(prompts[0], frames=4, seed=0)[0], generator.generate(prompts[0], frames=4, seed=1)[0])
    for bad, sentence in (
        ({"prompts": " "}, "prompt 1 of 1 is empty"),
        ({"prompts": ["a", ""]}, "prompt 2 of 2 is empty"),
        ({"prompts": "a", "frames": 7}, "setting 'frames' is 7; this model knows 1 to 6 frames"),
        ({"prompts": "a", "temprature": 1}, r"unknown setting 'temprature' in generate\(\): did you mean 'temperature'"),
        ({"prompts": "a", "top_p": 0}, "setting 'top_p' is 0.0; allowed"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            generator.generate(**bad)


@pytest.mark.parametrize("which", [0, 1])
def test_damaged_folders_are_one_sentence(folders: tuple[Path, Path], which: int) -> None:
    folder = folders[which]
    load = (t2v_ds.load_tokenizer, t2v_ds.load_generator)[which]
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, text = weights.read_bytes(), config.read_text()

    def refused(sentence: str) -> None:
        with pytest.raises(CheckpointError, match=sentence) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
        weights.write_bytes(whole)
        config.write_text(text)

    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused(r"model\.safetensors \(\d+ bytes\) is cut or damaged")
    config.write_text(text.replace('"group": 2', '"group": 1') if which else text.replace('"stem_channels": 8', '"stem_channels": 16'))
    refused("was changed after model.safetensors was written")
    config.write_text(text[: len(text) // 2])
    refused("cannot be read")
    config.unlink()
    refused(r"has no config\.json")
    load(folder)
    with pytest.raises(CheckpointError, match="holds a model of kind"):
        load(folders[1 - which])
    with pytest.raises(CheckpointError, match="no model folder"):
        load(folder / "nowhere")


def test_a_flipped_byte_of_the_weights_is_noticed(folders: tuple[Path, Path]) -> None:
    for folder in (folders[0], folders[1] / "tokenizer", folders[1]):
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        for at in (len(whole) - 1, len(whole) // 2, len(whole) * 3 // 4):
            damaged = bytearray(whole)
            damaged[at] ^= 0x40
            weights.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"is cut or damaged|is damaged: a byte has changed"):
                (t2v_ds.load_tokenizer if folder == folders[0] else t2v_ds.load_generator)(folder if folder == folders[0] else folders[1])
        weights.write_bytes(whole)


def test_a_copy_beside_is_made_once_and_again_where_it_is_damaged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer, beside = load_tokenizer(folders[0]), tmp_path / "beside"
    beside.mkdir()
    tokenizer.export_beside(beside)
    weights = beside / "tokenizer/model.safetensors"
    content, made = weights.read_bytes(), weights.stat().st_ino
    tokenizer.export_beside(beside)
    assert weights.stat().st_ino == made
    weights.write_bytes(content[: len(content) // 2])
    tokenizer.export_beside(beside)
    assert weights.read_bytes() == content
    assert [path.name for path in beside.iterdir()] == ["tokenizer"]


def test_another_tokenizer_is_refused_by_both_ids(folders: tuple[Path, Path], tmp_path: Path) -> None:
    made_with = json.loads((folders[1] / "config.json").read_text())["tokenizer_id"]
    other = export_tokenizer(tmp_path / "other", VQ, vqvae(seed=5).state_dict())
    assert other != made_with
    with pytest.raises(CheckpointError, match=f"{made_with}.* {other}"):
        t2v_ds.load_generator(folders[1], tokenizer=tmp_path / "other")


def test_another_text_encoder_is_refused(folders: tuple[Path, Path]) -> None:
    generator = t2v_ds.load_generator(folders[1])
    config = json.loads((folders[1] / "config.json").read_text())
    config["text_identity"] = "hashing-other"
    with pytest.raises(CheckpointError, match="trained with hashing-other"):
        Generator(generator.model, generator.tokenizer, config, torch.device("cpu"), "fp32")


def test_a_model_of_another_version_is_one_sentence(folders: tuple[Path, Path], tmp_path: Path) -> None:
    state = vqvae().state_dict()
    for number, change in enumerate(({"colour": 1}, {"stem_channels": "wide"}, {"norm_groups": 3})):
        model = {**json.loads((folders[0] / "config.json").read_text())["model"], **change}
        export_model(tmp_path / str(number), {"kind": "tokenizer", "tokenizer_id": "x", "model": model}, state)
        with pytest.raises(CheckpointError, match="does not describe a model of this version"):
            t2v_ds.load_tokenizer(tmp_path / str(number))
    wrong = {**state, "quantizer.codebook": state["quantizer.codebook"][:, :3]}
    export_tokenizer(tmp_path / "shape", VQ, wrong)
    with pytest.raises(CheckpointError, match=r"'quantizer\.codebook' .* has shape \[24, 3\]; .* needs \[24, 6\]"):
        t2v_ds.load_tokenizer(tmp_path / "shape")


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ImportError("deepspeed is not installed")

sys.meta_path.insert(0, Blocker())
import numpy as np
import t2v_ds

tokenizer = t2v_ds.load_tokenizer(sys.argv[1])
frames = tokenizer.decode(tokenizer.encode(np.zeros((2, 16, 16, 3), np.uint8)))
[clip] = t2v_ds.load_generator(sys.argv[2]).generate("a red circle moves right")
assert frames.shape == (2, 16, 16, 3) and clip.shape[1:] == (16, 16, 3)
assert not [name for name in sys.modules if name.split(".")[0] == "deepspeed"]
print("drawn")
"""


def test_both_load_where_deepspeed_is_not_installed(folders: tuple[Path, Path]) -> None:
    command = [sys.executable, "-c", BLOCKED, *map(str, folders)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "drawn"


def test_clips_begin_and_end_as_given(tmp_path: Path) -> None:
    folder = tmp_path / "generator"
    config = dataclasses.replace(TRANSFORMER, last_frame=True, decoding="frame")
    tokenizer_id = export_tokenizer(folder / "tokenizer", VQ, vqvae().state_dict())
    export_model(
        folder,
        generator_config(config, TEXT, build_text_encoder(TEXT).identity(), tokenizer_id, 2, 5, 70),
        VideoTransformer(config).state_dict(),
    )
    generator = t2v_ds.load_generator(folder)
    first, last = clip(2), clip(3)[-1]
    [drawn] = generator.generate("a circle", first_frames=first, last_frame=last, frames=5)
    shown = generator.tokenizer.decode(generator.tokenizer.encode(np.concatenate([first, last[None]])))
    assert np.array_equal(drawn[[0, 1, 4]], shown)
    assert len(drawn) == 5
    [looped] = generator.generate("a circle", loop=True, frames=4)
    assert np.array_equal(looped[0], looped[-1])
    with pytest.raises(ConfigError, match=r"5 first frames are given, and the clip has 5: .* \(--begin-frames\), or ask for up to 6 with"):
        generator.generate("a circle", first_frames=clip(5))
    with pytest.raises(ConfigError, match=r"5 first frames and a last one are given, and the clip has 6: .*; this model draws no more"):
        generator.generate("a circle", first_frames=clip(5), last_frame=last, frames=6)
    gif, out = tmp_path / "begin.gif", tmp_path / "out.gif"
    write_clip(gif, clip(5), 70)
    with pytest.raises(ConfigError, match="5 first frames are given, and the clip has 4"):
        generate_files(generator, ["a circle"], out, SamplingConfig(frames=4), begin=gif)
    generate_files(generator, ["a circle"], out, SamplingConfig(frames=4), begin=gif, begin_frames=2)
    begun = generator.tokenizer.decode(generator.tokenizer.encode(read_frames(gif, generator, "")[3:]))
    written = read_frames(out, generator, "")
    assert len(written) == 4 and np.abs(written[:2].astype(int) - begun).mean() < 8  # a GIF has 256 colours
    with pytest.raises(ConfigError, match="'loop' is true and a last frame is given"):
        generator.generate("a circle", loop=True, last_frame=last)


def test_guidance_that_rises_with_the_passes_needs_passes(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="'guidance_schedule' is 'passes', but this model draws no frame in passes"):
        t2v_ds.load_generator(folders[1]).generate("a circle", guidance_schedule="passes")
    with pytest.raises(ConfigError, match="'passes' is 9, but this model draws no frame in passes: leave it at 8"):
        t2v_ds.load_generator(folders[1]).generate("a circle", passes=9)


def test_a_model_that_was_not_trained_to_end_on_a_frame_says_so(folders: tuple[Path, Path]) -> None:
    generator = t2v_ds.load_generator(folders[1])
    with pytest.raises(ConfigError, match="'loop' is true, but this model was not trained to end on a frame"):
        generator.generate("a circle", loop=True)
    with pytest.raises(ConfigError, match="a last frame is given, but"):
        generator.generate("a circle", last_frame=clip(1)[0])
