"""What merging kept and lost: every model on held-out clips of every chunk.

    models (by name) x chunks (held-out clips) -> PSNR, SSIM, perceptual distance, use of codes -> Markdown, heat map
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.subset import Selection, split
from t2v_ds.data.video import write_png
from t2v_ds.evaluation.reconstruction import psnr, some_clips
from t2v_ds.files import write_atomically
from t2v_ds.losses import PerceptualDistance, ssim_loss
from t2v_ds.models.facade import Tokenizer
from t2v_ds.training.monitor import Monitor

MERGED = "merged"  # the model that the others are compared with
FRAMES = 8  # of a clip, evenly spaced: neighbours look alike
NUMBERS = (  # of `Quality`: name, title, digits
    ("psnr", "PSNR, dB", 2), ("ssim", "SSIM", 3), ("perceptual", "Perceptual distance (lower is better)", 4),
    ("codes_used", "Share of codes used", 3),
)  # fmt: skip
CELL, LEFT, TOP, FONT_SIZE = (96, 34), 260, 40, 13  # pixels of the heat map


@dataclass(frozen=True)
class Quality:
    """Means over frames of a chunk's held-out clips."""

    psnr: float  # dB
    ssim: float
    perceptual: float | None  # distance, lower is better; None without a network
    codes_used: float  # share of the codebook


def measure(tokenizer: Tokenizer, clips: Sequence[np.ndarray], perceptual: PerceptualDistance | None = None) -> Quality:
    """Encode and decode some frames of clips (each uint8 [T, H, W, 3])."""
    psnrs, ssims, distances, used = [], [], [], set()
    for clip in clips:
        frames = clip[np.unique(np.linspace(0, len(clip) - 1, FRAMES).round().astype(int))]
        codes = tokenizer.encode(frames)
        seen = tokenizer.decode(codes)
        psnrs.append(psnr(frames, seen))
        original, drawn = _unit(frames), _unit(seen)
        with torch.no_grad():
            ssims.append(1 - float(ssim_loss(drawn, original)))
            if perceptual is not None:
                distances.append(float(perceptual(drawn, original)))
        used.update(np.unique(codes).tolist())
    share = len(used) / tokenizer.model.config.quantizer.codebook_size
    return Quality(
        float(np.concatenate(psnrs).mean()), float(np.mean(ssims)), float(np.mean(distances)) if distances else None, share
    )


def _unit(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> fp32 [T, 3, H, W] in 0..1."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


Table = dict[str, dict[str, Quality]]  # model -> chunk -> quality


def measured_clips(data: str | Path, held_out: float, most: int) -> list[list[np.ndarray]]:
    """Up to `most` held-out clips of each chunk of raw shards, or of a chunk that has none, of its others."""
    clips = []
    for chunk in Manifest.load(data, "raw").chunks:
        with ShardDataset(data, "raw", chunk["chunk"]) as dataset:
            trained, kept = split(dataset, held_out)
            clips.append(some_clips(Selection(dataset, kept if len(kept) else trained), most))
    return clips


def measure_all(models: dict[str, Tokenizer], clips: dict[str, list[np.ndarray]], perceptual: PerceptualDistance | None = None) -> Table:
    """Every model on the clips of every chunk."""
    return {name: {chunk: measure(model, some, perceptual) for chunk, some in clips.items()} for name, model in models.items()}


def table_markdown(table: Table, chunks: Sequence[str], what: str, digits: int) -> list[str]:
    """Lines of a Markdown table of one number ("psnr", ...), with its mean and its worst chunk."""
    lines = [f"| model | {' | '.join(chunks)} | mean | worst |", "|---|" + "---:|" * (len(chunks) + 2)]
    for model, row in table.items():
        values = [asdict(row[chunk])[what] for chunk in chunks]
        if None in values:
            continue
        worst = max(values) if what == "perceptual" else min(values)
        numbers = [f"{value:.{digits}f}" for value in (*values, float(np.mean(values)), worst)]
        lines.append(f"| {model} | {' | '.join(numbers)} |")
    return lines


def write_forgetting_report(out: Path, table: Table, held_out: bool, missing: Sequence[int]) -> None:
    """Write `out`/report.md, `out`/heat_map.png and the latter into the run's TensorBoard.

    Args:
        out: the merged run's folder.
        table: with a row `MERGED`.
        held_out: whether the clips were kept from training.
        missing: chunks that had no thread.
    """
    chunks = list(next(iter(table.values())))
    picture = heat_map(table, chunks)
    lines = ["# What merging kept", ""]
    if missing:
        lines += [f"**Merged without threads of the chunks {', '.join(map(str, missing))}.**", ""]
    measured = "clips held out of training" if held_out else "clips of the training: none were held out (set held_out=0.05)"
    lines += [f"Measured on {measured}.", ""]
    lines += ["![PSNR of every model on every chunk](heat_map.png)", ""]
    for what, title, digits in NUMBERS:
        rows = table_markdown(table, chunks, what, digits)
        if len(rows) > 2:
            lines += [f"## {title}", "", *rows, ""]
    write_atomically(out / "report.md", "\n".join(lines).encode())
    write_png(out / "heat_map.png", picture)
    monitor = Monitor(out / "tensorboard", 0, 0)
    monitor.image("forgetting", picture, 0)
    monitor.close()


def heat_map(table: Table, chunks: Sequence[str]) -> np.ndarray:
    """PSNR of every model on every chunk as a picture uint8 [H, W, 3]: green is the best on the chunk, red 6 dB and more below."""
    font = ImageFont.load_default(FONT_SIZE)
    width, height = CELL
    picture = Image.new("RGB", (LEFT + width * len(chunks), TOP + height * len(table)), "white")
    draw = ImageDraw.Draw(picture)
    for column, chunk in enumerate(chunks):
        draw.text((LEFT + column * width + width // 2, TOP // 2), chunk[:13], fill="black", font=font, anchor="mm")
        best = max(row[chunk].psnr for row in table.values())
        for line, (model, row) in enumerate(table.items()):
            lost = min(1.0, (best - row[chunk].psnr) / 6)
            colour = (int(80 + 160 * lost), int(190 - 110 * lost), 90)
            left, top = LEFT + column * width, TOP + line * height
            draw.rectangle((left, top, left + width - 2, top + height - 2), fill=colour)
            draw.text((left + width // 2, top + height // 2), f"{row[chunk].psnr:.2f} dB", fill="white", font=font, anchor="mm")
            if column == 0:
                draw.text((8, top + height // 2), model[:38], fill="black", font=font, anchor="lm")
    return np.asarray(picture).copy()
