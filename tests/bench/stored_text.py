"""What storing captions and codes saves a training step of the transformer, at the spec size.

    .venv/bin/python -m tests.bench.stored_text [--clips 512] [--rounds 20] [--encoded 8] [--device cpu] [--precision fp32] [--out FOLDER]

    clips of 15 to 40 frames of 32 x 32 codes, captions of 6 to 14 words -> token shards with the text vectors of each encoder
    1. a micro-batch of 16 captions: read from the shards, as training does | given to the encoder, none of them for a second time
    2. a clip:  codes and text vectors read by a ClipStream in micro-batches of 16
             |  its frames encoded by the VQ-VAE of configs/tgif_vqvae.yaml (random weights) and its caption by the encoder

CPU time, or with a GPU time on the clock; medians (of the VQ-VAE, a mean over lengths). Shards are in the page cache, and nothing reads
ahead. Frames lie in memory: reading them is not counted, though a training that encodes its clips would have to. `--device` is where
VQ-VAE and encoder compute; reading is the CPU's in any case.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2v_ds.config import StoredTextConfig, TransformerRunConfig, VQVAERunConfig
from t2v_ds.config_loader import load_config, resolve_recipe
from t2v_ds.data.dataset import Buffer, ShardDataset
from t2v_ds.data.manifest import Manifest, StoredText
from t2v_ds.data.shards import TEXT_DTYPE, token_members, write_shard
from t2v_ds.data.stream import ClipStream
from t2v_ds.models.facade import Tokenizer
from t2v_ds.models.text import CachedTextEncoder, build_text_encoder
from t2v_ds.models.vqvae import VQVAE
from t2v_ds.training.run import _captions, _Vary

MICRO_BATCH, SHARD = 16, 128
ENCODERS = {"hashing": StoredTextConfig("hashing", 32, 256), "minilm": StoredTextConfig("minilm", 32)}
WORDS = (
    "a the man woman dog cat car girl boy is in on with and down up street hair white black red running dancing sits smiles turns "
    "looks waving camera grass water table head hands over around quickly slowly ball door window"
).split()


def caption(i: int) -> str:
    """6 to 14 words, other ones for each clip."""
    rng = np.random.default_rng([1, i])
    return " ".join(rng.choice(WORDS, rng.integers(6, 15)))


def codes(i: int) -> np.ndarray:
    """uint16 [15..40, 32, 32]."""
    rng = np.random.default_rng([2, i])
    return rng.integers(0, 1024, (int(rng.integers(15, 41)), 32, 32), dtype=np.uint16)


def write(folder: Path, clips: int, text: CachedTextEncoder, settings: StoredTextConfig) -> None:
    """Token shards with text vectors."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards = []
    for first in range(0, clips, SHARD):
        numbers = range(first, min(first + SHARD, clips))
        samples = []
        for i, (vectors, is_cut) in zip(numbers, text.embed([caption(i) for i in numbers]), strict=True):
            array, stored = codes(i), vectors.numpy().astype(TEXT_DTYPE)
            samples.append((f"{i:08d}", token_members(array, caption(i), [50] * len(array), {}, stored, is_cut)))
        shards.append(write_shard(folder / f"tokens-{first // SHARD:05d}.tar", samples))
    about = StoredText(text.identity(), settings, text.width).describe(0)
    Manifest.build("tokens", shards, image_size=128, grid_size=32, codebook_size=1024, tokenizer_id="none", **about).save(folder)


def seconds(rounds: int, run: Callable[[int], Any], clock: Callable[[], float]) -> list[float]:
    """Of calls with 0, 1, 2, ..., after one that is not counted."""
    run(0)
    spent = []
    for number in range(rounds):
        start = clock()
        run(number)
        spent.append(clock() - start)
    return spent


def text_of_a_micro_batch(
    dataset: ShardDataset, text: CachedTextEncoder, rounds: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds for 16 captions: read, and encoded."""
    rng, buffer, kept = np.random.default_rng(0), Buffer(), np.ones(MICRO_BATCH, dtype=bool)
    batches = [rng.choice(len(dataset), MICRO_BATCH, replace=False) for _ in range(rounds)]

    def encode(number: int) -> None:
        text._cache.clear()
        text._cached_bytes = 0
        text.encode(dataset.captions(batches[number]))

    read = seconds(rounds, lambda number: _captions(dataset, batches[number], kept, buffer), clock)
    return statistics.median(read), statistics.median(seconds(rounds, encode, clock))


def reading(dataset: ShardDataset, rounds: int, clock: Callable[[], float]) -> float:
    """Seconds for a clip's codes and text vectors, as a training step takes them from its stream."""
    with ClipStream(dataset, MICRO_BATCH, seed=0, threads=0, load=_Vary(TransformerRunConfig())) as stream:
        return statistics.median(seconds(rounds, lambda _: next(stream), clock)) / MICRO_BATCH


def encoding(clips: int, device: torch.device, precision: str, clock: Callable[[], float]) -> float:
    """Seconds for a clip's frames by the VQ-VAE, on average over clips of all lengths."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(VQVAE(load_config(VQVAERunConfig, resolve_recipe("tgif_vqvae")).model), "none", device, precision)
    rng = np.random.default_rng(0)
    frames = [torch.from_numpy(rng.integers(0, 256, (length, 128, 128, 3), dtype=np.uint8))
              for length in np.linspace(15, 40, clips).round().astype(int)]  # fmt: skip
    return statistics.mean(seconds(clips, lambda number: tokenizer.encode(frames[number]), clock))


def encoders(folder: Path, flags: argparse.Namespace) -> Iterator[tuple[str, ShardDataset, CachedTextEncoder]]:
    """Each encoder, and shards with its vectors."""
    for name, settings in ENCODERS.items():
        text = build_text_encoder(settings, flags.device)
        assert isinstance(text, CachedTextEncoder)
        write(folder / name, flags.clips, text, settings)
        with ShardDataset(folder / name, "tokens") as dataset:
            yield name, dataset, text


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("clips", 512), ("rounds", 20), ("encoded", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, default=Path("runs/stored_text_bench"))
    flags = parser.parse_args()
    clock = time.process_time if flags.device.type == "cpu" else time.perf_counter
    print(f"{torch.get_num_threads()} threads, VQ-VAE and encoder on {flags.device}, VQ-VAE in {flags.precision}\n")
    print("| text vectors of a micro-batch of 16 | width | stored, ms | encoded, ms | ratio |\n|---|---:|---:|---:|---:|")
    for name, dataset, text in encoders(flags.out, flags):
        stored, encoded = text_of_a_micro_batch(dataset, text, flags.rounds, clock)
        print(f"| {name} | {text.width} | {1e3 * stored:.3f} | {1e3 * encoded:.2f} | {encoded / stored:.0f} |", flush=True)
        if name == "minilm":
            read, caption_s = reading(dataset, flags.rounds, clock), encoded / MICRO_BATCH
    frames_s = encoding(flags.encoded, flags.device, flags.precision, clock)
    print("\n| a clip of 15 to 40 frames of 128 x 128, its caption by minilm | ms | ratio |\n|---|---:|---:|")
    print(f"| codes and text vectors read from token shards | {1e3 * read:.3f} | 1 |")
    for what, spent in (("frames and caption encoded", frames_s + caption_s), ("the caption alone", caption_s)):
        print(f"| {what} | {1e3 * spent:.1f} | {spent / read:,.0f} |")


if __name__ == "__main__":
    main()
