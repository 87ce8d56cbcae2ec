"""Prompts -> files: GIF or MP4, and a contact sheet.

    prompts -> generator -> clips -> x.gif   (one prompt)
                                  -> x-0.gif, x-1.gif, ...   (several)
                                  -> a contact sheet PNG, a row of frames a clip
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t2v_ds.config import SamplingConfig
from t2v_ds.data.gif import RejectedClip, decode_gif, encode_gif
from t2v_ds.data.video import contact_sheet, write_mp4, write_png
from t2v_ds.errors import ConfigError
from t2v_ds.files import require_writable, write_atomically
from t2v_ds.models.facade import Generator

SUFFIXES = (".gif", ".mp4")


def check_outputs(out: str | Path, sheet: str | Path | None) -> None:
    """Raise ConfigError unless the names end in what can be written, and files can be made there."""
    if Path(out).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--out is {str(out)!r}; allowed: a file name that ends in {' or '.join(SUFFIXES)}")
    if sheet and Path(sheet).suffix.lower() != ".png":
        raise ConfigError(f"--sheet is {str(sheet)!r}; allowed: a file name that ends in .png")
    require_writable("--out", out)
    if sheet:
        require_writable("--sheet", sheet)


def generate_files(
    generator: Generator, prompts: Sequence[str], out: str | Path, sampling: SamplingConfig, sheet: str | Path | None = None,
    begin: str | Path | None = None, end: str | Path | None = None, begin_frames: int = 0,
) -> list[Path]:  # fmt: skip
    """Draw a clip for each prompt and write it.

    Args:
        generator: loaded.
        prompts: one or several.
        out: a file that ends in .gif or .mp4; with several prompts `-0`, `-1`, ... is put before the ending.
        sampling: how codes are drawn.
        sheet: also write a contact sheet (PNG) here.
        begin: a GIF with whose frames every clip begins.
        end: a GIF with whose last frame every clip ends.
        begin_frames: only so many of the last frames of `begin`; 0: all.

    Returns:
        The files written.

    Raises:
        ConfigError: another ending, a place where nothing can be written, no prompt, an empty one, or a GIF that cannot be read.
    """
    check_outputs(out, sheet)
    out = Path(out)
    if not prompts:
        raise ConfigError("no prompt is given; add --prompt 'a red circle moves right'")
    first_frames = None if begin is None else read_frames(begin, generator, "--begin")[-begin_frames:]
    last_frame = None if end is None else read_frames(end, generator, "--end")[-1]
    clips = generator.generate(prompts, sampling, progress=True, first_frames=first_frames, last_frame=last_frame)
    names = [out] if len(clips) == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(len(clips))]
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, frames in zip(names, clips, strict=True):
        write_clip(name, frames, generator.frame_duration_ms)
    if sheet is None:
        return names
    write_png(sheet, contact_sheet(clips, list(prompts)))
    return [*names, Path(sheet)]


def read_frames(path: str | Path, generator: Generator, flag: str) -> np.ndarray:
    """The frames of a GIF at the generator's size: uint8 [T, S, S, 3]."""
    try:
        data = Path(path).read_bytes()
        return decode_gif(data, max_frames=10_000, size=generator.tokenizer.model.config.image_size, require_trailer=False).frames
    except OSError as error:
        raise ConfigError(f"{flag} is {str(path)!r}, which cannot be read: {error.strerror or error}") from error
    except RejectedClip as error:
        raise ConfigError(f"{flag} is {str(path)!r}, which is no GIF that can be shown: {error}") from error


def write_clip(path: str | Path, frames: np.ndarray, duration_ms: int) -> None:
    """Write frames uint8 [T, H, W, 3] as GIF or MP4, by the file's ending."""
    durations = [duration_ms] * len(frames)
    if Path(path).suffix.lower() == ".gif":
        write_atomically(Path(path), encode_gif(frames, durations))
    else:
        write_mp4(path, frames, durations)
