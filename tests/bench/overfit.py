"""Can the whole chain learn real clips by heart? A few captioned GIFs -> tokenizer -> transformer -> drawn again from their captions.

    python -m tests.bench.overfit --captions gifs.tsv --source GIFS --out OUT [--clips 20] [--frames 15 20] [--weights squeezenet.pth]

`--captions`: TSV of `file TAB caption`, files below GIFS. Clips are picked evenly from those of so many frames. Every stage is the
product's own verb; `t2v evaluate` then says of how many drawn clips the nearest training clip is its own, and writes a contact sheet:
OUT/evaluation.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from t2v_ds.data.gif import RejectedClip, decode_gif


def pick(arguments: argparse.Namespace, folder: Path) -> None:
    """Link the clips into a folder of their own, with their captions."""
    fits = []
    for line in Path(arguments.captions).read_text(encoding="utf-8").splitlines()[1:]:
        name, caption = line.split("\t")[:2]
        path = Path(arguments.source, name)
        try:
            decode_gif(path.read_bytes(), arguments.frames[1], min_frames=arguments.frames[0], size=64)
        except (RejectedClip, OSError):
            continue
        if caption not in [known for _, known in fits]:  # two clips of one caption could not be told apart
            fits.append((path, caption))
    chosen = [fits[i * len(fits) // arguments.clips] for i in range(arguments.clips)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (path, caption) in enumerate(chosen):
        name = f"{number:02d}.gif"
        if not (folder / name).exists():
            os.symlink(path.resolve(), folder / name)
        lines.append(f"{name}\t{caption}\n")
    (folder / "captions.tsv").write_text("".join(lines), encoding="utf-8")


def run(*command: object) -> None:
    """One verb of the product."""
    subprocess.run([sys.executable, "-m", "t2v_ds", *(str(part) for part in command)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--frames", type=int, nargs=2, default=[15, 20])
    parser.add_argument("--weights", help="SqueezeNet's ImageNet state dict: clips are then compared by its features")
    parser.add_argument("--vqvae-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--decoding", default="frame")
    arguments = parser.parse_args()
    out: Path = arguments.out
    pick(arguments, out / "gifs")
    run(
        "prepare", "--source", out / "gifs", "--out", out / "raw", "image_size=64", "workers=1", "filters.flat_below=0",
        "filters.still_below=0",
    )  # fmt: skip
    run(
        "train-vqvae", "--data", out / "raw", "--out", out / "tokenizer", "model.image_size=64", "model.stem_channels=32",
        "model.channel_multipliers=[1,2,4]", "model.residual_blocks=[0,1,2]", "model.norm_groups=8", "model.quantizer.codebook_dim=64",
        "model.quantizer.warmup_steps=200", "losses.perceptual=0", "losses.ssim=0", "frames_per_clip=2", "train.batch=10",
        f"train.steps={arguments.vqvae_steps}", "train.learning_rate=1e-3", "train.warmup_steps=50", "train.visual_every=0",
    )  # fmt: skip
    run(
        "tokenize", "--data", out / "raw", "--tokenizer", out / "tokenizer", "--out", out / "tokens", "text.encoder=hashing",
        "text.tokens=24", "text.width=128",
    )  # fmt: skip
    run(
        "train-transformer", "--data", out / "tokens", "--out", out / "generator", "text.encoder=", "model.width=256", "model.layers=4",
        "model.heads=4", "model.group=2", f"model.decoding={arguments.decoding}", "model.attention=factorised", "excerpt_share=0.5",
        "train.batch=10", f"train.steps={arguments.steps}", "train.learning_rate=2e-3", "train.warmup_steps=50", "train.visual_every=0",
    )  # fmt: skip
    space = [f"perceptual.weights={arguments.weights}"] if arguments.weights else []
    run(
        "evaluate", "--model", out / "generator", "--data", out / "tokens", "--raw", out / "raw", "--out", out / "evaluation",
        f"clips={arguments.clips}", f"training_clips={arguments.clips}", "prompts_from=training", f"sheet_clips={arguments.clips}",
        "second_draws=0", "sampling.guidance=1", "sampling.top_p=1", *space,
    )  # fmt: skip


if __name__ == "__main__":
    main()
