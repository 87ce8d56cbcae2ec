"""Trained models as one uses them: frames <-> codes, prompts -> frames. Loading needs no DeepSpeed.

    folder (config.json + model.safetensors) -> Tokenizer  .encode(frames) -> codes   .decode(codes) -> frames
    folder (the same, + tokenizer/)          -> Generator  .generate(prompts) -> clips
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from t2v_ds.config import SamplingConfig, TextConfig, TransformerConfig, VQVAEConfig
from t2v_ds.config_loader import from_dict, to_dict
from t2v_ds.data.collate import pack_codes
from t2v_ds.errors import CheckpointError, ConfigError, first_line
from t2v_ds.files import own_name
from t2v_ds.models.exported import CONFIG_FILE, WEIGHTS_FILE, content_id, export_model, load_exported, load_state
from t2v_ds.models.likelihood import bits_per_code
from t2v_ds.models.sampling import sample_codes
from t2v_ds.models.text import build_text_encoder
from t2v_ds.models.transformer import VideoTransformer
from t2v_ds.models.vqvae import VQVAE, to_pixels

TOKENIZER, GENERATOR = "tokenizer", "generator"
TOKENIZER_FOLDER = "tokenizer"  # in a folder of token shards and in a generator's: the tokenizer that they belong to
_NO_ENDING = "but this model was not trained to end on a frame (model.last_frame=true, last_frame_share=0.3)"


def export_tokenizer(folder: str | Path, config: VQVAEConfig, state: dict[str, Tensor]) -> str:
    """Write a tokenizer and return its id, which names its settings and weights."""
    model = to_dict(config)
    tokenizer_id = content_id(model, state)
    export_model(folder, {"kind": TOKENIZER, "tokenizer_id": tokenizer_id, "model": model}, state)
    return tokenizer_id


def generator_config(
    model: TransformerConfig, text: TextConfig, text_identity: str, tokenizer_id: str, min_frames: int, max_frames: int, duration_ms: int
) -> dict[str, Any]:
    """`config.json` of a generator."""
    return {
        "kind": GENERATOR,
        "model": to_dict(model),
        "text": to_dict(text),
        "text_identity": text_identity,
        "tokenizer_id": tokenizer_id,
        "min_frames": min_frames,
        "max_frames": max_frames,
        "frame_duration_ms": duration_ms,
    }


def _load(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, state = load_exported(folder)
    if config.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a model of kind {config.get('kind')!r}; expected a {kind}")
    return config, state


def _config(cls: type[Any], config: dict[str, Any], key: str, folder: str | Path) -> Any:
    try:
        return from_dict(cls, config[key], f"{folder}/config.json", prefix=f"{key}.")
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{folder}/config.json does not describe a model of this version: {error}") from error


class Tokenizer:
    """A trained VQ-VAE: frames <-> codes.

    Attributes:
        tokenizer_id: names the settings and weights; token shards and generators carry it.
        model: the VQVAE, in eval mode.
    """

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str | torch.device = "cpu", precision: str = "fp32") -> Tokenizer:
        """`load_tokenizer` of a folder, or of a repository of the Hugging Face Hub."""
        return load_tokenizer(_folder_of(name_or_path), device, precision)

    def __init__(self, model: VQVAE, tokenizer_id: str, device: torch.device, precision: str = "fp32", batch: int = 64) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer_id, self.device, self.batch = tokenizer_id, device, batch
        self.precision = precision

    @staticmethod
    def require_place_beside(folder: Path) -> None:
        """Raise CheckpointError where something else stands in `folder`/tokenizer, such as the run that trained a tokenizer."""
        inner = folder / TOKENIZER_FOLDER
        ours = {name for file in (CONFIG_FILE, WEIGHTS_FILE) for name in (file, f".{file}.tmp")}
        others = sorted(path.name for path in inner.iterdir() if path.name not in ours) if inner.is_dir() else []
        if others:
            raise CheckpointError(f"{inner} would be replaced, but holds '{others[0]}': choose another output folder than {folder}")

    def export_beside(self, folder: Path) -> None:
        """Write a copy into `folder`/tokenizer, in the place of what stands there or of what a killed run left of it.

        Raises:
            CheckpointError: see `require_place_beside`.
        """
        self.require_place_beside(folder)
        inner = folder / TOKENIZER_FOLDER
        made = own_name(inner)  # whole before it has its name: others may read it
        tokenizer_id = export_tokenizer(made, self.model.config, self.model.state_dict())
        try:
            with contextlib.suppress(CheckpointError):  # nothing that loads
                if load_exported(inner)[0].get("tokenizer_id") == tokenizer_id:
                    return  # it is there, or another process has just made it
            shutil.rmtree(inner, ignore_errors=True)
            made.rename(inner)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def encode(self, frames: np.ndarray | Tensor) -> np.ndarray:
        """Frames uint8 [T, H, W, 3] or [B, T, H, W, 3] -> codes uint16 [T, h, w] or [B, T, h, w].

        Raises:
            ValueError: frames of another type, shape or size.
        """
        data = torch.as_tensor(frames)
        if data.dtype != torch.uint8 or data.ndim not in (4, 5) or data.shape[-1] != 3:
            raise ValueError(f"frames are {data.dtype} {list(data.shape)}; expected uint8 [T, H, W, 3] or [B, T, H, W, 3]")
        flat = data.reshape(-1, *data.shape[-3:])  # [N, H, W, 3]
        with self._computing():
            codes = torch.cat([self.model.encode(part.to(self.device)).cpu() for part in flat.split(self.batch)])
        return codes.reshape(*data.shape[:-3], *codes.shape[1:]).numpy().astype(np.uint16)

    def decode(self, codes: np.ndarray | Tensor) -> np.ndarray:
        """Codes (any integer type) [T, h, w] or [B, T, h, w] -> frames uint8 [T, H, W, 3] or [B, T, H, W, 3].

        Raises:
            ValueError: not integers, another grid, or codes outside the codebook.
        """
        data = np.asarray(codes)
        side, size = self.model.config.grid_size, self.model.config.quantizer.codebook_size
        if data.dtype.kind not in "iu" or data.ndim not in (3, 4) or data.shape[-2:] != (side, side):
            raise ValueError(f"codes are {data.dtype} {list(data.shape)}; expected integers [T, {side}, {side}] or [B, T, {side}, {side}]")
        if data.size and (int(data.min()) < 0 or int(data.max()) >= size):
            raise ValueError(f"codes run from {data.min()} to {data.max()}; this tokenizer has codes 0 to {size - 1}")
        flat = torch.from_numpy(data.reshape(-1, side, side).astype(np.int64))  # [N, h, w]
        with self._computing():
            frames = torch.cat([to_pixels(self.model.decode(part.to(self.device))).cpu() for part in flat.split(self.batch)])
        return frames.reshape(*data.shape[:-2], *frames.shape[1:]).numpy()


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu", precision: str = "fp32") -> Tokenizer:
    """Load a tokenizer from a folder written by `t2v train-vqvae`.

    Args:
        folder: with `config.json` and `model.safetensors`.
        device: such as "cpu" or "cuda".
        precision: "fp32", or "bf16" for autocast.

    Raises:
        CheckpointError: missing, cut, damaged, or not a tokenizer.
    """
    config, state = _load(folder, TOKENIZER)
    model = VQVAE(_config(VQVAEConfig, config, "model", folder))
    load_state(model, state, Path(folder) / "model.safetensors")
    tokenizer_id = content_id(config["model"], state)
    if tokenizer_id != config.get("tokenizer_id"):
        raise CheckpointError(
            f"{folder}/model.safetensors holds tokenizer {tokenizer_id}, but config.json names {config.get('tokenizer_id')}: "
            "the files belong to different trainings, or a byte has changed"
        )
    return Tokenizer(model, tokenizer_id, torch.device(device), precision)


class Generator:
    """A trained transformer with its tokenizer: prompts -> clips.

    Attributes:
        tokenizer: decodes the codes.
        frame_duration_ms: how long a frame is shown.
    """

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str | torch.device = "cpu", precision: str = "fp32") -> Generator:
        """`load_generator` of a folder, or of a repository of the Hugging Face Hub."""
        return load_generator(_folder_of(name_or_path), None, device, precision)

    def __init__(self, model: VideoTransformer, tokenizer: Tokenizer, config: dict[str, Any], device: torch.device, precision: str) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.device, self.precision = tokenizer, device, precision
        self.text = build_text_encoder(from_dict(TextConfig, config["text"]))
        if self.text.identity() != config["text_identity"]:
            raise CheckpointError(
                f"the text encoder '{config['text']['encoder']}' is {self.text.identity()}, but the generator was trained with "
                f"{config['text_identity']}: use the same encoder files"
            )
        self.min_frames, self.max_frames = int(config["min_frames"]), int(config["max_frames"])
        self.frame_duration_ms = int(config["frame_duration_ms"])

    def generate(
        self, prompts: str | Sequence[str], sampling: SamplingConfig | None = None, batch: int = 16, progress: bool = False,
        first_frames: np.ndarray | None = None, last_frame: np.ndarray | None = None, **settings: Any,
    ) -> list[np.ndarray]:  # fmt: skip
        """Draw a clip for each prompt: frames uint8 [T, H, W, 3], each with its own T.

        Args:
            prompts: one or several captions.
            sampling: how codes are drawn; or give its fields by name, such as `temperature=0.9, seed=1`.
            batch: prompts drawn at once; does not change the result beyond rounding.
            progress: show a bar.
            first_frames: uint8 [T, H, W, 3] with which every clip begins, as the tokenizer shows them.
            last_frame: uint8 [H, W, 3] with which every clip ends; of models trained with last_frame_share.

        Raises:
            ConfigError: an empty prompt, an unknown setting, more frames than the model knows, or an ending that it cannot reach.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for number, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ConfigError(f"prompt {number + 1} of {len(prompts)} is empty; describe a clip, such as 'a red circle moves right'")
        if settings:
            base = to_dict(sampling) if sampling else {}
            sampling = from_dict(SamplingConfig, {**base, **settings}, "generate()")
        sampling = dataclasses.replace(sampling) if sampling else SamplingConfig()
        self.check_sampling(sampling)
        given = self._given(sampling, first_frames, last_frame)
        clips: list[np.ndarray] = []
        for first in tqdm(range(0, len(prompts), batch), desc="generate", unit="batch", disable=not progress):
            clips += self._draw(prompts[first : first + batch], sampling, first, *given)
        self.text.log_truncated()
        return clips

    def check_sampling(self, sampling: SamplingConfig, group: str = "") -> None:
        """Raise ConfigError where this model cannot draw so; `group`: what stands before the settings' names, such as "sampling."."""
        config = self.model.config
        if sampling.frames > config.max_frames:
            raise ConfigError(f"setting '{group}frames' is {sampling.frames}; this model knows 1 to {config.max_frames} frames")
        if sampling.guidance_schedule == "passes" and config.decoding == "token":
            what = f"setting '{group}guidance_schedule' is 'passes'"
            raise ConfigError(f"{what}, but this model draws no frame in passes: allowed: constant, frames")
        usual = SamplingConfig()
        for name in ("passes", "unmask"):
            value, other = getattr(sampling, name), getattr(usual, name)
            if value != other and config.decoding == "token":
                raise ConfigError(f"setting '{group}{name}' is {value!r}, but this model draws no frame in passes: leave it at {other!r}")
        if sampling.loop and not config.last_frame:
            raise ConfigError(f"setting '{group}loop' is true, {_NO_ENDING}")

    def _given(
        self, sampling: SamplingConfig, first_frames: np.ndarray | None, last_frame: np.ndarray | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Codes of the frames that are given: int64 [T, h, w] and [h, w]."""
        if sampling.loop and last_frame is not None:
            raise ConfigError("setting 'loop' is true and a last frame is given (--end), but a loop ends on its first: give one of them")
        if last_frame is not None and not self.model.config.last_frame:
            raise ConfigError(f"a last frame is given, {_NO_ENDING}")
        known = 0 if first_frames is None else len(first_frames)
        wanted = sampling.frames or min(self.max_frames, self.model.config.max_frames)
        if known + (last_frame is not None) >= wanted and known:
            ends = " and a last one" if last_frame is not None else ""
            most = self.model.config.max_frames
            more = f", or ask for up to {most} with frames=" if wanted < most else f"; this model draws no more than {most}"
            raise ConfigError(
                f"{known} first frames{ends} are given, and the clip has {wanted}: go on from the last few of them (--begin-frames){more}"
            )
        codes = [None if one is None else torch.from_numpy(self.tokenizer.encode(one).astype(np.int64)).to(self.device)
                 for one in (first_frames, None if last_frame is None else last_frame[None])]  # fmt: skip
        return codes[0], None if codes[1] is None else codes[1][0]

    @torch.inference_mode()
    def bits_per_code(self, codes: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        """How well the model foretells clips, each code given the caption and all codes before it.

        Args:
            codes: of each clip, integers [T, h, w], each with its own T, at most `max_frames` of the model.
            captions: one a clip; the empty one is that of guidance.

        Returns:
            fp64 [B]: bits a code (negative log2 likelihood), the mean over each clip's codes; see `likelihood`.
        """
        batch = pack_codes(codes)
        text, mask = (one.to(self.device) for one in self.text.encode(list(captions)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            bits = bits_per_code(self.model, batch["codes"].to(self.device), batch["lengths"], text, mask)
        return bits.cpu().numpy()

    def _draw(self, prompts: list[str], sampling: SamplingConfig, first: int, begin: Tensor | None, end: Tensor | None) -> list[np.ndarray]:
        text, mask = (one.to(self.device) for one in self.text.encode(prompts))
        count = len(prompts)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            drawn = sample_codes(
                self.model, text, mask, sampling, self.min_frames, self.max_frames, first,
                None if begin is None else begin.expand(count, -1, -1, -1), None if end is None else end.expand(count, -1, -1),
            )  # fmt: skip
        return [self.tokenizer.decode(codes.cpu().numpy()) for codes in drawn]


def load_generator(
    folder: str | Path, tokenizer: str | Path | None = None, device: str | torch.device = "cpu", precision: str = "fp32"
) -> Generator:
    """Load a generator from a folder written by `t2v train-transformer`.

    Args:
        folder: with `config.json`, `model.safetensors` and `tokenizer/`.
        tokenizer: another folder with the same tokenizer; None: the one inside.
        device: such as "cpu" or "cuda".
        precision: "fp32", or "bf16" for autocast.

    Raises:
        CheckpointError: missing, cut, damaged, not a generator, or made for another tokenizer (names both ids).
    """
    config, state = _load(folder, GENERATOR)
    model = VideoTransformer(_config(TransformerConfig, config, "model", folder))
    load_state(model, state, Path(folder) / "model.safetensors")
    where = tokenizer or Path(folder) / TOKENIZER_FOLDER
    decoder = load_tokenizer(where, device, precision)
    require_same_tokenizer(config["tokenizer_id"], f"generator {folder}", decoder.tokenizer_id, str(where))
    return Generator(model, decoder, config, torch.device(device), precision)


def _folder_of(name_or_path: str | Path) -> Path:
    """A folder as it is, or a repository's files, fetched; only settings and safetensors are.

    Raises:
        CheckpointError: it is neither.
    """
    with contextlib.suppress(OSError):  # a name too long to be a file's
        if Path(name_or_path).is_dir():
            return Path(name_or_path)
    from huggingface_hub import snapshot_download

    files = [f"{folder}{name}" for folder in ("", f"{TOKENIZER_FOLDER}/") for name in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=files))
    except Exception as error:  # of the name, of the network, of the hub: each library below raises its own
        what = f"'{name_or_path}' is neither a folder nor a model that can be fetched from the hub"
        raise CheckpointError(f"{what}: {first_line(error)}") from error


def require_same_tokenizer(needed: str, what: str, found: str, where: str) -> None:
    """Raise CheckpointError naming both ids unless they are equal."""
    if needed != found:
        raise CheckpointError(f"{what} was made with tokenizer {needed}, but {where} is tokenizer {found}; use the one it was made with")
