"""The transformer: what a position may see, real lengths, groups, and that it learns."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from t2v_ds.config import PRESETS, TransformerConfig
from t2v_ds.config_loader import from_dict
from t2v_ds.models.transformer import Losses, VideoTransformer
from t2v_ds.training.optimizer import parameter_groups
from tests.toy_transformer import LONGEST, TEXT, K, captions, codes_of, logits_of, make, some_passes, states_of

KINDS: list[dict[str, Any]] = [
    {"attention": "full"},
    {"attention": "factorised", "layers": 4},
    {"attention": "window", "window_frames": 2, "conditioning": "cross"},
]


def variants_of(model: VideoTransformer, codes: Tensor) -> Tensor:
    """The clip, and for each of its codes, in the order in which they are told, one that differs in it alone: [1 + n, T, h, w]."""
    order = model.to_groups(codes).flatten()
    n = len(order)
    changed = order.repeat(n, 1)
    changed[torch.arange(n), torch.arange(n)] = (order + 1) % K
    groups = torch.cat([order[None], changed]).view(n + 1, len(codes), model.config.positions, model.config.slots)
    return model.to_codes(groups)


def moved_by(model: VideoTransformer, codes: Tensor, passes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How much a change of code j moves the logits of code i, [n, n], and the states of the frames as they are, [n, T, P]."""
    variants = variants_of(model, codes)
    count, frames = len(variants), len(codes)
    text, mask = captions(1)
    passes = None if passes is None else passes.repeat(count, 1)
    states, _ = states_of(model, variants.flatten(0, 1), [frames] * count, text.expand(count, -1, -1), mask.expand(count, -1), passes)
    logits = logits_of(model, states[-1], model.to_groups(variants.flatten(0, 1)))
    logits = logits.view(count, -1, K)
    difference = (logits[1:] - logits[0]).abs().amax(-1)
    of_frames = states[0].unflatten(0, (count, frames))
    return difference, (of_frames[1:] - of_frames[0]).abs().amax(-1)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("neighbourhood", [0, 3])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_token_no_prediction_sees_its_own_code_or_a_later_one(kind: int, neighbourhood: int, group: int) -> None:
    model = make(group, neighbourhood=neighbourhood, **KINDS[kind])
    difference, _ = moved_by(model, codes_of(3))
    for j in range(len(difference)):
        assert float(difference[j, : j + 1].max()) < 1e-5, f"changing code {j} moves a prediction up to its own"
    assert float(difference.diagonal(1).min()) > 1e-3  # and the next one sees it
    per_frame = len(difference) // 3
    if kind != 1 or neighbourhood:  # a place along time alone has not yet been told the code there
        assert float(difference[:per_frame, per_frame : 2 * per_frame].amax(1).min()) > 1e-3


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("neighbourhood", [0, 3])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_frame_a_guess_sees_frames_before_and_what_passes_before_its_own_have_told(kind: int, neighbourhood: int, group: int) -> None:
    model = make(group, neighbourhood=neighbourhood, decoding="frame", **KINDS[kind])
    passes = some_passes([3], model.config.positions)
    difference, of_frames = moved_by(model, codes_of(3), passes)
    slots, per_frame = model.config.slots, len(difference) // 3
    for j in range(len(difference)):
        frame, position, slot = j // per_frame, j % per_frame // slots, j % slots
        own = difference[j].view(3, -1, slots)
        assert float(own[:frame].sum()) < 1e-4
        later = passes[frame] > passes[frame, position]
        assert (own[frame][later].amax(-1) > 1e-3).all(), "what is told in passes before is seen"
        assert float(own[frame][~later & (torch.arange(len(later)) != position)].sum()) < 1e-4, "and nothing else of the frame"
        assert float(own[frame, position, : slot + 1].max()) < 1e-5
        if frame < 2:
            assert float(own[frame + 1].max()) > 1e-3  # whenever it was told: the next frame sees this one as it is
        assert float(of_frames[j, :frame].sum()) < 1e-4
        known = passes[frame] >= passes[frame, position]  # by those that became known with it or later
        assert (of_frames[j, frame] > 1e-3).tolist() == known.tolist()


def test_a_code_is_fed_to_its_neighbourhood_alone() -> None:
    """With attention cut out: to the next position, the rows below and the frame behind."""
    model = make(group=1, grid_size=5, std=0.3)
    with torch.no_grad():
        for block in model.blocks:
            block.get_parameter("attention.out.weight").zero_()
    codes = codes_of(3, side=5)
    text, mask = captions(1)
    before, _ = states_of(model, codes, [3], text, mask)
    changed = codes.clone()
    changed[0, 1, 3] = (codes[0, 1, 3] + 1) % K
    after, _ = states_of(model, changed, [3], text, mask)
    moved = (after - before)[0].abs().amax(-1).view(3, 5, 5) > 1e-6
    expected = torch.zeros(3, 5, 5, dtype=torch.bool)
    expected[0, 1, 4] = True
    expected[0, 2, 2:5] = True
    expected[1, 0:3, 2:5] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("conditioning", ["prefix", "cross"])
def test_every_word_and_no_more_is_seen(conditioning: str) -> None:
    model = make(conditioning=conditioning)
    text, mask = torch.randn(1, 3, TEXT), torch.tensor([[True, True, False]])
    before, _ = states_of(model, codes_of(2), [2], text, mask)
    for word in range(3):
        other = text.clone()
        other[0, word] += 1
        moved = float((states_of(model, codes_of(2), [2], other, mask)[0] - before).abs().amax())
        assert (moved > 1e-3) == (word < 2)


@pytest.mark.parametrize("decoding", ["token", "frame"])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_the_loss_of_a_clip_does_not_depend_on_those_beside_it(kind: int, decoding: str) -> None:
    model = make(decoding=decoding, last_frame=True, **KINDS[kind])
    lengths, given = [2, 4, 1, 3], [True, False, False, True]
    codes, (text, mask) = codes_of(10), captions(4)
    passes = some_passes(lengths, model.config.positions) if decoding == "frame" else None
    with torch.no_grad():
        together = torch.stack(model(codes, lengths, text, mask, None, None, passes, given))
        first = 0
        for b, length in enumerate(lengths):
            one, frames = slice(b, b + 1), slice(first, first + length)
            own = None if passes is None else passes[frames]
            alone = model(codes[frames], [length], text[one], mask[one], None, None, own, given[one])
            torch.testing.assert_close(torch.stack(alone)[:, 0], together[:, b], atol=1e-4, rtol=1e-4)
            first += length


@pytest.mark.parametrize("decoding", ["token", "frame"])
def test_the_loss_is_the_mean_likelihood_of_what_is_told(decoding: str) -> None:
    model = make(decoding=decoding)
    lengths, codes, (text, mask) = [3, 2], codes_of(5), captions(2)
    passes = some_passes(lengths, 4) if decoding == "frame" else None
    states, _ = states_of(model, codes, lengths, text, mask, passes)
    groups = model.to_groups(codes)
    logits = logits_of(model, states[-1], groups)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 2), groups.flatten(), reduction="none").view(groups.shape)
    with torch.no_grad():
        losses: Losses = model(codes, lengths, text, mask, None, None, passes)
        votes = model.end(states[0]).squeeze(-1).double()  # [F, P]
    for b, frames in enumerate((slice(0, 3), slice(3, 5))):
        torch.testing.assert_close(losses.codes[b], each[frames].mean())
        torch.testing.assert_close(losses.z[b], logits[frames].logsumexp(-1).square().mean())
        probability = votes[frames].sigmoid()
        right = torch.cat([1 - probability[:-1], probability[-1:]])
        torch.testing.assert_close(losses.end[b].double(), -right.log().mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_groups_hold_neighbouring_codes_and_go_back(group: int) -> None:
    model = make(group)
    codes = torch.arange(2 * 3 * 16).view(2, 3, 4, 4)
    groups = model.to_groups(codes)
    assert groups.shape == (2, 3, (4 // group) ** 2, group**2)
    assert torch.equal(model.to_codes(groups), codes)
    if group == 2:
        assert groups[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_part_of_a_clip_says_nothing_about_its_end_and_knows_its_time() -> None:
    model = make()
    codes, (text, mask) = codes_of(2), captions(1)
    with torch.no_grad():
        whole, part, later = (model(codes, [2], text, mask, [start]) for start in (-1, 0, 3))
    assert float(part.end) == 0 < float(whole.end)
    assert float(part.codes) == float(whole.codes) != float(later.codes)


def test_context_is_fed_and_codes_are_told() -> None:
    model = make()
    codes, noisy, (text, mask) = codes_of(2), codes_of(2, seed=9), captions(1)
    with torch.no_grad():
        found = model(codes, [2], text, mask, None, noisy)
        states, _ = states_of(model, noisy, [2], text, mask)
        logits = logits_of(model, states[0], model.to_groups(codes))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), model.to_groups(codes).flatten())
    torch.testing.assert_close(found.codes[0], expected)


@pytest.mark.parametrize(
    "settings",
    [{"decoding": "token"}, {"decoding": "frame", "attention": "factorised"}, {"tied_head": True, "kv_heads": 1, "conditioning": "cross"}],
)
def test_it_learns_a_few_clips_by_heart(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 2, "group": 2, "max_frames": LONGEST}
    model = VideoTransformer(TransformerConfig(**{**sizes, **settings}, grid_size=4, codebook_size=K, text_width=TEXT))
    model.initialise_codes(torch.randn(K, 3))
    lengths, codes, (text, mask) = [4, 2, 3], codes_of(9), captions(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(80):
        passes = some_passes(lengths, 4, seed=step) if model.config.decoding == "frame" else None
        found = model(codes, lengths, text, mask, None, None, passes)
        optimizer.zero_grad()
        (found.codes.mean() + found.end.mean()).backward()
        optimizer.step()
        losses.append((found.codes.mean().item(), found.end.mean().item()))
    assert losses[0][0] == pytest.approx(math.log(K), rel=0.25)  # starts by knowing nothing
    assert losses[-1][0] < 0.15 * losses[0][0]
    assert losses[-1][1] < 0.3
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("decoding", ["token", "frame"])
@pytest.mark.parametrize(
    "saving", [{"activation_checkpointing": True}, {"loss_tile": 3}, {"activation_checkpointing": True, "loss_tile": 5}]
)
def test_checkpointing_and_tiles_change_nothing(saving: dict[str, Any], decoding: str) -> None:
    plain = make(dropout=0.3, decoding=decoding, attention="factorised")
    other = make(dropout=0.3, decoding=decoding, attention="factorised", **saving)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    lengths, codes, (text, mask) = [3, 2], codes_of(5), captions(2)
    passes = some_passes(lengths, 4) if decoding == "frame" else None
    results = []
    for model in (plain.train(), other.train()):
        torch.manual_seed(5)
        loss = torch.stack(model(codes, lengths, text, mask, None, None, passes)).mean()
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=0 if "loss_tile" not in saving else 1e-5, rtol=0)
    for name, gradient in results[0][1].items():
        assert gradient is not None
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    with torch.no_grad():
        quiet = torch.stack(plain.eval()(codes, lengths, text, mask, None, None, passes)).mean()
    assert float(quiet) != float(results[0][0])  # dropout was on


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_bf16_autocast_gives_a_finite_loss_near_fp32s(kind: int) -> None:
    model = make(std=0.1, **KINDS[kind])
    codes, (text, mask) = codes_of(5), captions(2)
    with torch.no_grad():
        exact = model(codes, [3, 2], text, mask)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(codes, [3, 2], text, mask)
    assert rough.codes.dtype == torch.float32
    torch.testing.assert_close(rough.codes, exact.codes, atol=0.05, rtol=0.02)


def test_parameter_names_and_what_decays() -> None:
    """Names are what exported models are read by: a change of one breaks every model that was trained before."""
    model = make(group=2, layers=1)
    block = [f"blocks.0.attention.{name}.weight" for name in ("qkv", "query_norm", "key_norm", "out")]
    block += [f"blocks.0.{name}.weight" for name in ("norm1", "norm2", "gate_up", "down")]
    head = [f"head.{part}" for i in range(4) for part in (f"norms.{i}.weight", f"mixers.{i}.0.weight")]
    head += [f"head.logits.{i}.{part}" for i in range(4) for part in ("weight", "bias")]
    head += [f"head.given.{i}.weight" for i in range(3)]
    inputs = "start place.weight time.weight around_before.weight around_own.weight"
    others = "no_word norm.weight word.weight word.bias caption.weight caption.bias end.weight end.bias"
    names = {*block, *head, *others.split(), *(f"inputs.{name}" for name in inputs.split())}
    names |= {f"inputs.tables.{i}.weight" for i in range(4)}
    assert set(model.state_dict()) == names
    decayed, spared = (set(one["names"]) for one in parameter_groups(model, 0.1))
    tables = {name for name in names if name.startswith(("inputs.tables.", "head.given.", "inputs.place", "inputs.time"))}
    one_dimensional = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert spared == tables | one_dimensional
    assert decayed == names - spared
    assert not any("around" in name for name in make(neighbourhood=0).state_dict())
    assert tuple(model.state_dict()["inputs.time.weight"].shape) == (LONGEST, 16)


def test_switches_remove_what_they_switch_off() -> None:
    names = set(make(learned_positions=False, decoding="frame", conditioning="cross", tied_head=True, last_frame=True).state_dict())
    assert not names & {"inputs.place.weight", "inputs.time.weight", "inputs.start"}
    assert {"inputs.unknown", "inputs.goal.weight", "inputs.remaining.weight", "blocks.0.word_attention.q.weight"} <= names
    tied = make(tied_head=True)
    assert tied.head.logits[0].weight is tied.inputs.tables[0].weight
    codes, (text, mask) = codes_of(3).repeat(1, 1, 1), captions(1)
    turned, straight = make(learned_positions=False), make(learned_positions=False, rotary=False)
    assert all(torch.equal(a, b) for a, b in zip(turned.parameters(), straight.parameters(), strict=True))
    a, b = (states_of(model, codes, [3], text, mask)[0] for model in (turned, straight))
    assert float((a - b).abs().max()) > 1e-3


@pytest.mark.parametrize(("preset", "millions"), [("demo", 5), ("30m", 30.7), ("90m", 87), ("300m", 282), ("650m", 642), ("1.3b", 1300)])
def test_presets_have_about_the_size_of_their_names(preset: str, millions: float) -> None:
    config = from_dict(TransformerConfig, {"preset": preset, "text_width": 384})
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in VideoTransformer(config).parameters()) / 1e6
    assert found == pytest.approx(millions, rel=0.03)
    assert config.heads == PRESETS[preset]["heads"]
    assert from_dict(TransformerConfig, {"preset": preset, "heads": 2, "kv_heads": 1}).heads == 2


def test_copies_are_independent() -> None:
    model = make()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.no_word.add_(1)
    assert not torch.equal(model.no_word, other.no_word)
