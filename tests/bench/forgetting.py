"""Threads on chunks of different domains, merged, against naive averaging, the best thread, sequential and joint training.

    .venv/bin/python tests/bench/forgetting.py --source GIFS --out runs/forgetting [--seeds 3] [--chunks 4]
                                               [--warm 150] [--steps 75] [--cumulative 700]
                                               [--squeezenet WEIGHTS]

    GIFS/DOMAIN/*.gif -> one chunk a domain (the largest ones) -> a short start on all -> a thread a chunk -> average -> cumulative step

Equal compute: joint training (all chunks mixed) and sequential training (chunk after chunk) take as many steps as the merged model
took (start + threads + cumulative step). Prints means over seeds; run again, it goes on. Measured on clips held out of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2v_ds.config import PrepareConfig, VQVAERunConfig
from t2v_ds.config_loader import load_config
from t2v_ds.data.dataset import ShardDataset
from t2v_ds.data.manifest import Manifest
from t2v_ds.data.prepare import prepare
from t2v_ds.data.shards import raw_members, write_shard
from t2v_ds.data.video import write_png
from t2v_ds.evaluation.forgetting import Table, heat_map, measure_all, measured_clips, table_markdown
from t2v_ds.losses import PerceptualDistance
from t2v_ds.merge import average, load_thread
from t2v_ds.models.facade import Tokenizer, export_tokenizer, load_tokenizer
from t2v_ds.training.run import train_vqvae

HELD_OUT = 0.15
SETTINGS = [
    "model.image_size=64", "model.stem_channels=32", "model.channel_multipliers=[1,2,4]", "model.residual_blocks=[0,1,1]",
    "model.norm_groups=8", "model.quantizer.codebook_size=512", "model.quantizer.codebook_dim=64", "losses.perceptual=0", "losses.ssim=0",
    "losses.lab=0.5", "frames_per_clip=1", "train.batch=16", "train.learning_rate=1e-3", "train.warmup_steps=20", "train.weight_decay=0",
    "train.log_every=50", "train.precision=bf16", "train.save_every=100000", "train.visual_every=0", f"held_out={HELD_OUT}",
]  # fmt: skip


def by_domain(source: Path, out: Path, count: int) -> list[str]:
    """Write OUT with a chunk for each of the largest domains of SOURCE; return their names."""
    names = out / "domains.json"
    if names.is_file():
        return list(json.loads(names.read_text()))
    everything = out.with_name("everything")
    prepare(load_config(PrepareConfig, None, [f"source={source}", f"out={everything}", "image_size=64", "min_frames=4", "max_frames=200"]))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with ShardDataset(everything, "raw") as dataset:
        domains: dict[str, list[int]] = {}
        for i in range(len(dataset)):
            name = Path(dataset.read(i)["provenance"]["file"]).parts[0]
            domains.setdefault(name, []).append(i)
        chosen = sorted(sorted(domains, key=lambda name: -len(domains[name]))[:count])
        shards = []
        for chunk, name in enumerate(chosen):
            clips = (dataset.read(i) for i in domains[name])
            samples = ((c["key"], raw_members(c["frames"], c["caption"], c["durations_ms"], c["provenance"])) for c in clips)
            shards.append(write_shard(out / f"raw-{chunk:05d}.tar", samples, chunk))
        fields = {"image_size": 64, "source": dataset.manifest.source, "settings": dataset.manifest.settings}
        Manifest.build("raw", shards, **fields).save(out)
    names.write_text(json.dumps(chosen))
    return chosen


def run(data: Path, out: Path, seed: int, steps: int, **changes: Any) -> Path:
    """Train, unless that is done."""
    config = load_config(VQVAERunConfig, None, [*SETTINGS, f"data={data}", f"out={out}", f"seed={seed}", f"train.steps={steps}"])
    warmup = min(100, steps // 2) if not changes.get("start") else 0
    config.model.quantizer.warmup_steps = warmup
    train = dataclasses.replace(config.train, **changes.pop("train", {}))
    if "start" in changes:
        changes["start"] = str(changes["start"])
    train_vqvae(dataclasses.replace(config, train=train, **changes))
    return out


def models(data: Path, root: Path, seed: int, domains: list[str], flags: argparse.Namespace) -> dict[str, Path]:
    """Train everything of a seed; folders by name."""
    found: dict[str, Path] = {}
    start = run(data, root / "start", seed, flags.warm, balance=True, train={"schedule": "constant"})
    threads = [run(data, root / f"thread-{i}", seed, flags.steps, chunk=i, start=start) for i in range(len(domains))]
    for name, thread in zip(domains, threads, strict=True):
        found[f"thread: {name}"] = thread
    loaded = [load_thread(thread) for thread in threads]
    states = [thread.state for thread in loaded]
    for name, aligned in (("average, not aligned", False), ("average, aligned", True)):
        folder = root / name.replace(", ", "-").replace(" ", "-")
        state, moved = average(states, aligned)
        print(name, "codes renumbered:", moved)
        export_tokenizer(folder, loaded[0].tokenizer.model.config, state)
        found[name] = folder
    found["merged (average + cumulative step)"] = run(
        data, root / f"merged-{flags.cumulative}", seed, flags.cumulative, start=found["average, aligned"], balance=True
    )
    total = flags.warm + len(domains) * flags.steps + flags.cumulative
    found["joint, equal compute"] = run(data, root / f"joint-{total}", seed, total, balance=True)
    before = start
    share = flags.steps + flags.cumulative // len(domains)
    for i in range(len(domains)):
        before = run(data, root / f"sequential-{i}-{flags.cumulative}", seed, share, chunk=i, start=before)
    found["sequential, equal compute"] = before
    return found


def codes_used(tokenizer: Tokenizer, clips: dict[str, list[np.ndarray]]) -> float:
    """Share of the codebook that the clips of all chunks use together."""
    used = {code for some in clips.values() for clip in some for code in np.unique(tokenizer.encode(clip)).tolist()}
    return len(used) / tokenizer.model.config.quantizer.codebook_size


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    for name, default in (("seeds", 3), ("chunks", 4), ("warm", 150), ("steps", 75), ("cumulative", 700)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--squeezenet", default="", help="state dict of torchvision's squeezenet1_0: measure a perceptual distance, too")
    flags = parser.parse_args()
    perceptual = PerceptualDistance("squeezenet", flags.squeezenet) if flags.squeezenet else None
    data = flags.out / "data"
    flags.out.mkdir(parents=True, exist_ok=True)
    domains = by_domain(flags.source, data, flags.chunks)
    clips = dict(zip(domains, measured_clips(data, HELD_OUT, 10**6), strict=True))
    print({name: len(one) for name, one in clips.items()})
    tables = []
    used: dict[str, list[float]] = {}
    for seed in range(flags.seeds):
        folders = models(data, flags.out / f"seed-{seed}", seed, domains, flags)
        tokenizers = {model: load_tokenizer(folder) for model, folder in folders.items()}
        tables.append(measure_all(tokenizers, clips, perceptual))
        for model, tokenizer in tokenizers.items():
            used.setdefault(model, []).append(codes_used(tokenizer, clips))
    mean: Table = {}
    for model in tables[0]:
        mean[model] = {}
        for name in domains:
            rows = [dataclasses.asdict(table[model][name]) for table in tables]
            first = tables[0][model][name]
            mean[model][name] = dataclasses.replace(
                first, **{key: float(np.mean([row[key] for row in rows])) for key in rows[0] if rows[0][key] is not None}
            )
    for what, digits in (("psnr", 2), ("ssim", 3), ("perceptual", 4), ("codes_used", 3)):
        print(f"\n{what}, mean of {flags.seeds} seeds\n")
        print("\n".join(table_markdown(mean, domains, what, digits)))
    print("\nshare of codes used by all chunks together\n")
    for model, shares in used.items():
        print(f"| {model} | {np.mean(shares):.3f} |")
    write_png(flags.out / "heat_map.png", heat_map(mean, domains))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
