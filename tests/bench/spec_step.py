"""One real optimisation step of each model at the full spec size: time and peak memory.

    .venv/bin/python tests/bench/spec_step.py [vqvae] [transformer] [--layers 8] [--precision bf16]

VQ-VAE: 40 frames of 128 x 128, codebook 1024 x 256, losses of configs/tgif_vqvae.yaml (perceptual: VGG16 with random weights).
Transformer: configs/tgif_transformer.yaml (hidden 512), one clip of 40 x 32 x 32 = 40,960 codes. DeepSpeed engine, ZeRO stage 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import Any


def measure(model: str, layers: int, precision: str) -> tuple[float, float, float, int]:
    """Run one step; (seconds, peak GiB, loss, parameters). In a process of its own, whose peak memory is the step's."""
    import numpy as np
    import torch

    from t2v_ds.config import TransformerRunConfig, VQVAERunConfig
    from t2v_ds.config_loader import load_config, resolve_recipe
    from t2v_ds.models.facade import Tokenizer
    from t2v_ds.models.text import build_text_encoder
    from t2v_ds.models.vqvae import VQVAE
    from t2v_ds.training.distributed import connect
    from t2v_ds.training.engine import Engine
    from t2v_ds.training.objectives import Clips, TransformerObjective, VQVAEObjective
    from t2v_ds.training.variation import join, vary

    torch.manual_seed(0)
    collectives = connect()
    common = [f"train.precision={precision}", "train.batch=1", "train.micro_batch=1", "train.ds_config=zero1"]
    batch: dict[str, Any]
    if model == "vqvae":
        settings = [*common, "losses.perceptual_weights=random", "frames_per_clip=40", "model.quantizer.warmup_steps=0"]
        config = load_config(VQVAERunConfig, resolve_recipe("tgif_vqvae"), settings)
        frames = torch.randint(0, 256, (40, 128, 128, 3), dtype=torch.uint8)
        objective: Any = VQVAEObjective(config, collectives, np.zeros((1, 128, 128, 3), dtype=np.uint8))
        batch = {"frames": frames}
    else:
        spec = load_config(VQVAERunConfig, resolve_recipe("tgif_vqvae"))
        tokenizer = Tokenizer(VQVAE(spec.model), "none", torch.device("cpu"))
        filled = [f"model.layers={layers}", "model.text_width=256"]
        run = load_config(TransformerRunConfig, resolve_recipe("tgif_transformer"), [*common, *filled])
        text = build_text_encoder(run.text)
        objective = TransformerObjective(run, tokenizer, text, Clips(15, 40, 100), [])
        vectors, mask = text.encode(["a chocolate cookie is being placed in a white ice cream cone ."])
        rng = np.random.default_rng(0)
        batch = join([vary(rng.integers(1024, size=(40, 32, 32), dtype=np.uint16), rng, run)])
        batch.update(text=vectors, mask=mask)
    parameters = sum(p.numel() for p in objective.parameters())
    engine = Engine(objective, (config if model == "vqvae" else run).train, 0, collectives, 1000)
    batch = engine.to_device(batch)
    objective.initialise(batch, engine)
    start = time.monotonic()
    loss, _ = engine.forward(batch)
    engine.backward(loss)
    applied = engine.step(0)
    objective.after_step(1, engine)
    if not applied:
        raise RuntimeError("the step was skipped")
    return time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, float(loss.detach()), parameters


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["vqvae", "transformer"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--precision", default="bf16")
    flags = parser.parse_args()
    print("| model | parameters | one step, s | peak memory, GiB | loss |\n|---|---:|---:|---:|---:|")
    for model in flags.models:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory, loss, parameters = pool.apply(measure, (model, flags.layers, flags.precision))
        print(f"| {model} | {parameters / 1e6:.1f} M | {seconds:.1f} | {memory:.1f} | {loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
