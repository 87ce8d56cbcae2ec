"""Drawing with caches gives, to the code, what computing everything anew gives: in both modes, whatever a layer looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t2v_ds.config import SamplingConfig
from t2v_ds.models.sampling import sample_codes
from tests.toy_transformer import LONGEST, K, Recomputed, captions, make

KINDS: list[dict[str, Any]] = [
    {"attention": "full"},
    {"attention": "factorised", "layers": 4, "head_ratio": 2},
    {"attention": "window", "window_frames": 2},
    {"attention": "factorised", "conditioning": "cross", "kv_heads": 1},
    {"attention": "full", "rotary": False, "learned_positions": False, "neighbourhood": 0, "conditioning": "cross"},
    {"attention": "window", "window_frames": 3, "kv_heads": 1, "learned_positions": False, "neighbourhood": 5},
]


def both(settings: dict[str, Any], config: SamplingConfig, std: float = 0.3, **options: Any) -> None:
    model = make(std=std, **settings)
    text, mask = captions(3)
    cached = sample_codes(model, text, mask, config, **options)
    anew = sample_codes(model, text, mask, config, states=Recomputed, **options)
    assert all(torch.equal(a, b) for a, b in zip(cached, anew, strict=True))
    if config.temperature == 0:  # where the likeliest codes may be few
        return
    assert len(torch.cat(cached).unique()) > 3
    assert not torch.equal(cached[0][: len(cached[1])], cached[1][: len(cached[0])])  # the caption matters


def test_a_window_longer_than_any_clip_takes_no_room() -> None:
    model = make(attention="window", window_frames=1000)
    words, _ = model.text_inputs(*captions(1))
    for cache in model.start_caches(words):
        assert cache._keys.shape[1] == words.shape[1] + LONGEST * model.config.positions


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_tokens(kind: int, group: int) -> None:
    both({**KINDS[kind], "decoding": "token", "group": group}, SamplingConfig(guidance=2.0, frames=LONGEST))
    both({**KINDS[kind], "decoding": "token", "group": group}, SamplingConfig(temperature=0, guidance=1.0))


@pytest.mark.parametrize("unmask", ["random", "confident"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_frames(kind: int, group: int, unmask: str) -> None:
    settings = {**KINDS[kind], "decoding": "frame", "group": group}
    both(settings, SamplingConfig(guidance=2.0, frames=LONGEST, passes=3, unmask=unmask, guidance_schedule="passes"))
    both(settings, SamplingConfig(temperature=0, guidance=1.0, passes=2, unmask=unmask, top_p=1.0))


@pytest.mark.parametrize("decoding", ["token", "frame"])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_first_and_last_frames_given(kind: int, decoding: str) -> None:
    settings = {**KINDS[kind], "decoding": decoding, "last_frame": True}
    first = torch.randint(0, K, (3, 2, 4, 4), generator=torch.Generator().manual_seed(3))
    config = SamplingConfig(guidance=2.0, passes=2, guidance_schedule="frames")
    both(settings, config, first_frames=first)
    both(settings, SamplingConfig(frames=5, passes=2), first_frames=first, last_frame=first[:, 0].flip(1))
    both(settings, SamplingConfig(frames=4, passes=2, loop=True))
