"""Seconds to draw a frame of 32 x 32 codes: decoding "token" against "frame", one backbone size, both with caches.

    python -m tests.bench.generation [--preset 30m] [--attention factorised full] [--context 1 16] [--passes 4 8 16] [--device cuda]

Untrained weights of the same seed; the clip has `context` frames already. A round draws one frame each way, in turn; medians of the
rounds. Guidance is off, as it doubles the work of both.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from t2v_ds.config import PRESETS, SamplingConfig, TransformerConfig
from t2v_ds.config_loader import from_dict
from t2v_ds.models.sampling import Draws, _Drawing
from t2v_ds.models.states import CachedStates
from t2v_ds.models.transformer import VideoTransformer


class Clip:
    """A clip that has some frames, to which others are added."""

    def __init__(self, arguments: argparse.Namespace, attention: str, decoding: str, context: int, passes: int = 1) -> None:
        torch.manual_seed(0)
        settings = {"preset": arguments.preset, "attention": attention, "decoding": decoding, "text_width": 128}
        self.device = torch.device(arguments.device)
        self.model = VideoTransformer(from_dict(TransformerConfig, settings)).eval().to(self.device)
        text, mask = torch.randn(1, 16, 128, device=self.device), torch.ones(1, 16, dtype=torch.bool, device=self.device)
        sampling = SamplingConfig(guidance=1.0, passes=passes)
        self.drawing = _Drawing(self.model, text, mask, sampling, 40, Draws(0, [0]), CachedStates)
        self.frames = list(torch.randint(0, 1024, (context, 1, 1024, 1), device=self.device))
        with torch.no_grad(), self.precision():
            self.drawing.start(None)
            self.drawing.given(self.frames)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    @torch.no_grad()
    def draw(self) -> float:
        """Seconds of the frame behind the context; it is not kept."""
        start = time.perf_counter()
        with self.precision():
            self.drawing.next_frame(self.frames)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="30m")
    parser.add_argument("--attention", nargs="+", default=["factorised", "full"])
    parser.add_argument("--context", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--passes", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print("| attention | frames before | token | " + " | ".join(f"frame, {n} passes | times faster" for n in arguments.passes) + " |")
    print("|---|---:|" + "---:|" * (1 + 2 * len(arguments.passes)))
    for attention in arguments.attention:
        for context in arguments.context:
            ways = [Clip(arguments, attention, "token", context)]
            ways += [Clip(arguments, attention, "frame", context, passes) for passes in arguments.passes]
            rounds = [[way.draw() for way in ways] for _ in range(arguments.rounds)]
            token, *frames = (statistics.median(column) for column in zip(*rounds, strict=True))
            cells = [f"{one:.2f} s | {token / one:.1f}" for one in frames]
            print(f"| {attention} | {context} | {token:.2f} s | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
