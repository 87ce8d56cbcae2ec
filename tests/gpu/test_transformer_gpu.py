"""The transformer on a GPU: its losses and gradients are the CPU's, and drawing with caches is computing everything anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t2v_ds.config import SamplingConfig
from t2v_ds.models.sampling import sample_codes
from tests.toy_transformer import LONGEST, Recomputed, captions, codes_of, make, some_passes

pytestmark = pytest.mark.gpu

KINDS: list[dict[str, Any]] = [
    {"attention": "full"},
    {"attention": "factorised", "kv_heads": 1},
    {"attention": "window", "window_frames": 2, "conditioning": "cross"},
]


@pytest.mark.parametrize("decoding", ["token", "frame"])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_losses_and_gradients_are_those_of_the_cpu(kind: int, decoding: str) -> None:
    here, there = (make(decoding=decoding, std=0.2, **KINDS[kind]) for _ in range(2))
    there.cuda()
    lengths, (text, mask) = [3, 2, 3], captions(3)
    passes = some_passes(lengths, here.config.positions) if decoding == "frame" else None
    results = []
    for model in (here, there):
        device = model.no_word.device
        mine = [None if one is None else one.to(device) for one in (codes_of(8), text, mask, passes)]
        losses = model(mine[0], lengths, mine[1], mine[2], None, None, mine[3])
        torch.stack(losses).sum().backward()
        results.append((torch.stack(losses).detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    for name, expected in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], expected, rtol=1e-3, atol=1e-3 * max(1.0, float(expected.abs().max())), msg=name)


@pytest.mark.parametrize("decoding", ["token", "frame"])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_drawing_with_caches_is_computing_everything_anew(kind: int, decoding: str) -> None:
    model = make(decoding=decoding, std=0.3, **KINDS[kind]).cuda()
    text, mask = (one.cuda() for one in captions(3))
    config = SamplingConfig(guidance=2.0, frames=LONGEST, passes=3, temperature=0)
    cached = sample_codes(model, text, mask, config)
    anew = sample_codes(model, text, mask, config, states=Recomputed)
    assert all(torch.equal(a, b) for a, b in zip(cached, anew, strict=True))
