"""The codebook: exact rows forward, straight-through gradient, statistics that do not depend on the number of ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from t2v_ds.config import QuantizerConfig
from t2v_ds.models.quantizer import Quantizer

K, D = 12, 4


def make(learning: str = "ema", seed: int = 0, **settings: Any) -> Quantizer:
    torch.manual_seed(seed)
    module = Quantizer(QuantizerConfig(codebook_size=K, codebook_dim=D, learning=learning, **{"revive_every": 0, **settings}))
    module.started.fill_(1)
    return module


def exact_latents(n: int, seed: int) -> Tensor:
    """[n, D, 3, 3] in steps of 1/64: fp32 sums of them have no rounding, so that any order of adding gives the same bits."""
    return (torch.randn(n, D, 3, 3, generator=torch.Generator().manual_seed(seed)) * 64).round() / 64


def flat(latents: Tensor) -> Tensor:
    return latents.permute(0, 2, 3, 1).reshape(-1, D)


class Meeting:
    """Two threads that add their tensors up, as two ranks do."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.slots: list[Any] = [None, None]

    def rank(self, number: int) -> Any:
        meeting = self

        class Rank:
            rank, world_size = number, 2

            def all_reduce_sum(self, tensor: Tensor) -> Tensor:
                meeting.slots[number] = tensor.clone()
                meeting.barrier.wait()
                total = meeting.slots[0] + meeting.slots[1]
                meeting.barrier.wait()
                return tensor.copy_(total)

        return Rank()


def on_two_ranks(build: Callable[[], Quantizer], program: Callable[[Quantizer, int], Any]) -> list[Any]:
    """Run `program(quantizer, rank)` in two threads whose quantizers sum over each other; (quantizer, result) of each rank."""
    meeting, modules, results = Meeting(), [build(), build()], [None, None]
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            modules[number].collectives = meeting.rank(number)
            results[number] = program(modules[number], number)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return list(zip(modules, results, strict=True))


def test_forward_gives_codebook_rows_to_the_bit_and_the_gradient_goes_to_the_latents() -> None:
    for training in (True, False):
        module = make().train(training)
        with torch.no_grad():
            module.codebook += 1000.1  # latents + (rows - latents) would round here
        latents = torch.randn(2, D, 3, 3, requires_grad=True)
        output = module(latents)
        rows = module.codebook[output.codes].permute(0, 3, 1, 2)
        assert torch.equal(output.quantized, rows)
        assert torch.equal(output.codes, module.lookup(latents))
        distances = torch.cdist(flat(latents.detach()).double(), module.codebook.double())
        assert torch.equal(output.codes.flatten(), distances.argmin(1))
        weights = torch.randn_like(latents)
        (output.quantized * weights).sum().backward()
        assert latents.grad is not None
        assert torch.equal(latents.grad, weights)


def test_ema_update_equals_the_published_rule() -> None:
    module = make(decay=0.9)
    usage, sums, codebook = torch.ones(K).double(), module.codebook.double().clone(), module.codebook.double().clone()
    for step in range(1, 6):
        latents = torch.randn(6, D, 3, 3)
        vectors = flat(latents).double()
        codes = torch.cdist(vectors, codebook).argmin(1)
        for k in range(K):  # van den Oord et al. 2017, appendix A.1
            usage[k] = 0.9 * usage[k] + 0.1 * (codes == k).sum()
            sums[k] = 0.9 * sums[k] + 0.1 * vectors[codes == k].sum(0)
            codebook[k] = sums[k] / usage[k]
        for half in latents.chunk(2):  # two micro-batches of one step
            module(half)
        module.update(step, seed=0)
        torch.testing.assert_close(module.codebook.double(), codebook, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(module.usage.double(), usage, atol=1e-5, rtol=1e-5)
    module.eval()
    module(torch.randn(2, D, 3, 3))  # collects nothing
    with pytest.raises(RuntimeError, match="forward pass in training mode"):
        module.update(6, seed=0)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_two_ranks_or_two_micro_batches_move_the_codebook_like_one(warmup_steps: int) -> None:
    batches = [exact_latents(8, seed) for seed in range(4)]

    def program(module: Quantizer, rank: int | None, micro_batches: int = 1) -> list[dict[str, float]]:
        metrics = []
        for step, batch in enumerate(batches, start=1):
            for part in (batch if rank is None else batch.chunk(2)[rank]).chunk(micro_batches):
                module(part)
            metrics.append(module.update(step, seed=5))
        return metrics

    def build() -> Quantizer:
        module = make(decay=0.5, revive_every=2, dead_below=0.9, warmup_steps=warmup_steps)
        module.started.fill_(0 if warmup_steps else 1)
        return module

    alone, accumulating = build(), build()
    expected = program(alone, None)
    assert sum(one["revived"] for one in expected[warmup_steps:]) > 0
    results = [*on_two_ranks(build, program), *on_two_ranks(build, lambda module, rank: program(module, rank, 2))]
    for module, metrics in [*results, (accumulating, program(accumulating, None, 4))]:
        assert metrics == expected
        for name, tensor in alone.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor), name


def test_the_start_from_data_is_the_same_on_one_rank_and_on_two() -> None:
    batch = exact_latents(8, 3)

    def program(module: Quantizer, rank: int | None) -> None:
        module.started.zero_()
        module(batch if rank is None else batch.chunk(2)[rank])
        module.initialise(7, seed=1)

    alone = make()
    program(alone, None)
    rows = {tuple(row) for row in flat(batch).tolist()}
    assert {tuple(row) for row in alone.codebook.tolist()} <= rows
    assert len(torch.unique(alone.codebook, dim=0)) == K  # different latents while there are enough
    assert torch.equal(alone.sums, alone.codebook)
    assert int(alone.started) == 1
    for module, _ in on_two_ranks(make, program):
        assert torch.equal(module.codebook, alone.codebook)
    few = make()
    few.started.zero_()
    few(batch[:1])  # 9 latents for 12 codes
    few.initialise(7, seed=1)
    assert {tuple(row) for row in few.codebook.tolist()} <= rows


def test_soft_usage_has_a_gradient_and_is_the_mean_over_ranks() -> None:
    batch = exact_latents(4, 9)
    alone = make()
    latents = batch.clone().requires_grad_()
    usage = alone(latents).soft_usage()
    assert usage.shape == (K,)
    torch.testing.assert_close(usage.sum().detach(), torch.tensor(1.0))
    weights = torch.arange(K, dtype=torch.float32)
    (usage * weights).sum().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) > 0

    def program(module: Quantizer, rank: int) -> tuple[Tensor, Tensor]:
        half = batch.chunk(2)[rank].clone().requires_grad_()
        usage = module(half).soft_usage()
        (usage * weights).sum().backward()
        assert half.grad is not None
        return usage.detach(), half.grad

    (_, (first, gradient_0)), (_, (second, gradient_1)) = on_two_ranks(make, program)
    torch.testing.assert_close(first, usage.detach())
    torch.testing.assert_close(second, usage.detach())
    # Data parallelism averages the ranks' gradients: half of each is what one rank has.
    torch.testing.assert_close(torch.cat([gradient_0, gradient_1]) / 2, latents.grad)


def test_dead_codes_move_onto_latents_and_their_statistics_start_afresh() -> None:
    module = make(decay=0.5, dead_below=0.2, revive_every=3)
    with torch.no_grad():
        module.codebook[4:] += 100  # nothing is near them
        module.sums.copy_(module.codebook)
    batch = exact_latents(8, 2)
    for step in (1, 2):
        module(batch)
        assert module.update(step, seed=0)["revived"] == 0
    module(batch)
    before = module.usage.clone()
    assert module.update(3, seed=0)["revived"] == K - 4
    rows = {tuple(row) for row in flat(batch).tolist()}
    assert {tuple(row) for row in module.codebook[4:].tolist()} <= rows
    mean = module.usage[4:]
    assert torch.equal(mean, mean[:1].expand(K - 4))  # all got the mean use, and sums that agree with it
    assert float(mean[0]) > 10 * float(before[4:].max())
    torch.testing.assert_close(module.sums[4:], module.codebook[4:] * mean[:, None])
    module(batch)
    assert module.update(4, seed=0)["code_use"] > 4 / K  # they are used again


def test_gradient_mode_is_a_parameter_that_only_losses_and_revivals_move() -> None:
    module = make("gradient", decay=0.5, dead_below=0.2, revive_every=4)
    assert [name for name, _ in module.named_parameters()] == ["codebook"]
    assert "sums" not in module.state_dict()
    assert list(make("ema").parameters()) == []
    with torch.no_grad():
        module.codebook[4:] += 100
    batch = exact_latents(8, 2)
    output = module(batch)
    torch.nn.functional.mse_loss(output.vectors, output.latents.detach()).backward()
    gradient = module.codebook.grad
    assert gradient is not None
    used = torch.bincount(output.codes.flatten(), minlength=K) > 0
    assert torch.equal(gradient.abs().sum(1) > 0, used)
    module.zero_grad()
    assert not module(batch).quantized.requires_grad  # the decoder's gradient does not reach it
    module.discard()
    module(batch)
    before = module.codebook.detach().clone()
    for step in (1, 2, 3):
        module.update(step, seed=0)
        assert torch.equal(module.codebook, before)
        module(batch)
    written: list[Tensor] = []

    class Access:
        def read_parameter(self, parameter: torch.nn.Parameter) -> Tensor:
            return parameter.detach()

        def write_rows(self, parameter: torch.nn.Parameter, rows: Tensor, values: Tensor) -> None:
            assert parameter is module.codebook
            written.append(rows)

    module.update(4, seed=0, access=Access())
    assert torch.equal(written[0], torch.arange(4, K))  # an engine writes, and resets Adam's moments
    assert torch.equal(module.codebook, before)
    for step in (5, 6, 7, 8):  # without an engine it writes by itself
        module(batch)
        module.update(step, seed=0)
    after = module.codebook.detach()
    assert torch.equal(after[:4], before[:4])
    assert float(after[4:].abs().max()) < 50


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_the_warm_up_passes_latents_through_and_a_start_is_kept(learning: str) -> None:
    module = make(learning, warmup_steps=2)
    module.started.zero_()
    start = module.codebook.detach().clone()
    latents = exact_latents(4, 1).requires_grad_()
    for step in (1, 2):
        output = module(latents)
        assert torch.equal(output.quantized, latents)
        assert torch.equal(output.vectors, latents)
        assert float(output.soft_usage().sum()) == pytest.approx(1)
        assert torch.equal(module.codebook, start)
        assert module.update(step, seed=0) == {}
    assert int(module.started) == 1
    assert not torch.equal(module.codebook, start)
    resumed = make(learning, warmup_steps=2, seed=99)
    resumed.started.zero_()
    resumed.load_state_dict(module.state_dict())
    output = resumed(latents)
    assert torch.equal(output.quantized, resumed.codebook.detach()[output.codes].permute(0, 3, 1, 2))
    before = resumed.codebook.detach().clone()
    assert set(resumed.update(1, seed=0)) == {"perplexity", "code_use", "revived"}
    if learning == "gradient":
        assert torch.equal(resumed.codebook, before)


def test_evaluation_before_the_start_quantizes() -> None:
    module = make(warmup_steps=5).eval()
    module.started.zero_()
    output = module(torch.randn(1, D, 2, 2))
    assert torch.equal(output.quantized, module.codebook[output.codes].permute(0, 3, 1, 2))


def test_perplexity_and_code_use_by_hand() -> None:
    module = make()
    with torch.no_grad():
        module.codebook.copy_(torch.arange(K)[:, None].expand(K, D).float())
    numbers = torch.tensor([0, 0, 0, 0, 5, 5, 7, 8], dtype=torch.float32)  # shares 1/2, 1/4, 1/8, 1/8
    module(numbers.view(8, 1, 1, 1).expand(8, D, 1, 1))
    metrics = module.update(1, seed=0)
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 0.25 * math.log(8)
    assert metrics["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)
    assert metrics["code_use"] == pytest.approx(4 / K)
    module(numbers.view(8, 1, 1, 1).expand(8, D, 1, 1))
    module.discard()  # a skipped step leaves no statistics behind
    with pytest.raises(RuntimeError):
        module.update(2, seed=0)
