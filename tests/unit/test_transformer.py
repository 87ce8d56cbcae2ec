"""The transformer: what a position may see, real lengths, groups, and that it learns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from t2v_ds.config import TransformerConfig
from t2v_ds.models.transformer import VideoTransformer
from t2v_ds.training.optimizer import parameter_groups
from tests.toy_transformer import TEXT, K, captions, make, predictions


def codes_of(b: int, t: int, seed: int = 0, side: int = 4) -> Tensor:
    return torch.randint(0, K, (b, t, side, side), generator=torch.Generator().manual_seed(seed))


def in_order(model: VideoTransformer, codes: Tensor) -> Tensor:
    """Codes [B, T, h, w] -> [B, T*P*G], in the order in which they are predicted."""
    return model.to_groups(codes).flatten(1)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kernel", [0, 3])
def test_no_prediction_sees_its_own_code_or_a_later_one(group: int, kernel: int) -> None:
    model = make(group, neighbourhood=kernel)
    codes = codes_of(1, 3)
    order = in_order(model, codes)[0]  # [48]
    total = len(order)
    changed = order.repeat(total, 1)
    changed[torch.arange(total), torch.arange(total)] = (order + 1) % K  # variant j differs in code j alone
    variants = torch.cat([order[None], changed]).view(total + 1, 3, model.positions, model.slots)
    text, mask = captions(1)
    text, mask = text.expand(total + 1, -1, -1), mask.expand(total + 1, -1)
    logits, ends = predictions(model, model.to_codes(variants), text, mask)
    difference = (logits[1:] - logits[0]).abs().amax(-1)  # [changed code j, prediction i]
    for j in range(total):
        assert float(difference[j, : j + 1].max()) < 1e-5, f"changing code {j} moves a prediction up to its own"
    # And it is seen by those behind it: the next one, and one frame later.
    assert float(difference.diagonal(1).min()) > 1e-3
    per_frame = total // 3
    assert float(difference[:per_frame, per_frame : 2 * per_frame].amax(1).min()) > 1e-3
    end_difference = (ends[1:] - ends[0]).abs()  # [changed code j, "ends before frame t"]
    for t in range(4):
        assert float(end_difference[t * per_frame :, t].sum()) < 1e-4
        assert t == 0 or float(end_difference[: t * per_frame, t].min()) > 0


def test_a_code_is_fed_to_its_neighbourhood_alone() -> None:
    """With attention cut out: to the next position, the rows below and the frame behind."""
    model = make(group=1, grid_size=5, std=0.3)
    with torch.no_grad():
        for block in model.blocks:
            block.get_parameter("out.weight").zero_()
    codes = codes_of(1, 3, side=5)
    text, mask = captions(1)
    before, _ = predictions(model, codes, text, mask)
    changed = codes.clone()
    changed[0, 0, 1, 3] = (codes[0, 0, 1, 3] + 1) % K
    after, _ = predictions(model, changed, text, mask)
    moved = (after - before).abs().amax(-1).view(3, 5, 5) > 1e-6
    expected = torch.zeros(3, 5, 5, dtype=torch.bool)
    expected[0, 1, 4] = True
    expected[0, 2, 2:5] = True
    expected[1, 0:3, 2:5] = True
    assert torch.equal(moved, expected)


def test_every_word_and_no_more_is_seen() -> None:
    model = make()
    codes = codes_of(1, 2)
    text, mask = torch.randn(1, 3, TEXT), torch.tensor([[True, True, False]])
    before, _ = predictions(model, codes, text, mask)
    for word in range(3):
        other = text.clone()
        other[0, word] += 1
        moved = float((predictions(model, codes, other, mask)[0] - before).abs().amax())
        assert (moved > 1e-3) == (word < 2)


@pytest.mark.parametrize("group", [1, 2])
def test_the_loss_of_a_clip_does_not_depend_on_those_beside_it(group: int) -> None:
    model = make(group)
    lengths = torch.tensor([2, 4, 1, 3])
    codes, (text, mask) = codes_of(4, 4), captions(4)
    with torch.no_grad():
        together = torch.stack(model(codes, lengths, text, mask))
        for b, length in enumerate(lengths.tolist()):
            alone = model(codes[b : b + 1, :length], lengths[b : b + 1], text[b : b + 1], mask[b : b + 1])
            torch.testing.assert_close(torch.stack(alone)[:, 0], together[:, b], atol=1e-4, rtol=1e-4)
        padded = codes.clone()
        for b, length in enumerate(lengths.tolist()):
            padded[b, length:] = 0
        assert torch.equal(torch.stack(model(padded, lengths, text, mask)), together)  # what pads is never looked at


def test_the_loss_is_the_mean_likelihood_of_the_clips_own_codes() -> None:
    model = make()
    codes, (text, mask) = codes_of(2, 3), captions(2)
    logits, ends = predictions(model, codes, text, mask)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), in_order(model, codes).flatten(), reduction="none")
    expected = each.view(2, -1).mean(1)
    with torch.no_grad():
        loss, end = model(codes, torch.tensor([3, 3]), text, mask)
    torch.testing.assert_close(loss, expected)
    probability = ends.double().sigmoid()
    last = torch.cat([1 - probability[:, :3], probability[:, 3:]], dim=1)  # goes on before frames 0, 1, 2; ends before 3
    torch.testing.assert_close(end.double(), -last.log().mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_groups_hold_neighbouring_codes_and_go_back(group: int) -> None:
    model = make(group)
    codes = torch.arange(2 * 3 * 16).view(2, 3, 4, 4)
    groups = model.to_groups(codes)
    assert groups.shape == (2, 3, (4 // group) ** 2, group**2)
    assert torch.equal(model.to_codes(groups), codes)
    if group == 2:
        assert groups[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("group", [1, 2])
def test_two_clips_are_learned_by_heart(group: int) -> None:
    torch.manual_seed(0)
    model = VideoTransformer(TransformerConfig(32, 2, 2, group=group, max_frames=6, grid_size=4, codebook_size=K, text_width=TEXT))
    model.initialise_codes(torch.randn(K, 3))
    codes, (text, mask), lengths = codes_of(2, 3), captions(2), torch.tensor([2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        code_loss, end_loss = model(codes, lengths, text, mask)
        loss = code_loss.mean() + end_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((code_loss.mean().item(), end_loss.mean().item()))
    assert losses[0][0] == pytest.approx(math.log(K), rel=0.25)  # starts by knowing nothing
    assert losses[-1][0] < 0.1 * losses[0][0]
    assert losses[-1][1] < 0.2
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_activation_checkpointing_changes_nothing() -> None:
    plain = make(dropout=0.3)
    saving = copy.deepcopy(plain)
    saving.config.activation_checkpointing = True
    codes, (text, mask) = codes_of(2, 3), captions(2)
    results = []
    for model in (plain.train(), saving.train()):
        torch.manual_seed(5)
        loss = torch.stack(model(codes, torch.tensor([3, 2]), text, mask)).mean()
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert gradient is not None
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    with torch.no_grad():
        quiet = torch.stack(plain.eval()(codes, torch.tensor([3, 2]), text, mask)).mean()
    assert float(quiet) != float(results[0][0])  # dropout was on


def test_bf16_autocast_gives_a_finite_loss_near_fp32s() -> None:
    model = make(std=0.1)
    codes, (text, mask) = codes_of(2, 3), captions(2)
    with torch.no_grad():
        exact, _ = model(codes, torch.tensor([3, 2]), text, mask)
        with torch.autocast("cpu", torch.bfloat16):
            rough, _ = model(codes, torch.tensor([3, 2]), text, mask)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.02)


def test_parameter_names_and_what_decays() -> None:
    """Names are what exported models are read by: a change of one breaks every model that was trained before."""
    model = make(group=2, layers=1)
    block = [f"blocks.0.{name}.weight" for name in ("norm1", "qkv", "query_norm", "key_norm", "out", "norm2", "up", "down")]
    head = [f"head.{part}" for i in range(4) for part in (f"norms.{i}.weight", f"mixers.{i}.0.weight")]
    head += [f"head.logits.{i}.{part}" for i in range(4) for part in ("weight", "bias")]
    head += [f"head.given.{i}.weight" for i in range(3)]
    others = "start no_word place.weight time.weight around.weight norm.weight"
    others += " word.weight word.bias caption.weight caption.bias end.weight end.bias"
    names = {*block, *head, *others.split(), *(f"codes.{i}.weight" for i in range(4))}
    assert set(model.state_dict()) == names
    decayed, spared = (set(one["names"]) for one in parameter_groups(model, 0.1))
    tables = {name for name in names if name.startswith(("codes.", "head.given.", "place", "time"))}
    one_dimensional = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert spared == tables | one_dimensional
    assert decayed == names - spared
    assert not any(name.startswith("around") for name in make(neighbourhood=0).state_dict())
    assert tuple(model.state_dict()["time.weight"].shape) == (7, 16)  # six frames and the end's
