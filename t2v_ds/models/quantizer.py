"""Vector quantization: latents -> codes -> codebook rows, and how the codebook learns.

    latents [N, D, h, w] -> vq_lookup (fp32) -> codes [N, h, w] -> codebook rows -> straight through -> decoder

The codebook is moved in exactly one of two ways (`QuantizerConfig.learning`):

- "ema" (van den Oord et al. 2017, appendix A.1): fp32 buffers moved by exponential moving averages of the latents
  assigned to each code. `forward` only collects counts and sums; `update` sums them over all ranks and moves the
  codebook after the optimizer step, so that it is the same on every rank at every ZeRO stage.
- "gradient": a parameter moved by the codebook loss through the optimizer.

For the first `warmup_steps` the latents pass unquantized; then the codebook is set to latents of the current batch. An
encoder that has not learned to tell images apart would otherwise fill the codebook with copies of one vector.

Codes that are hardly used are revived: they move onto badly quantized latents of the current batch (the same on all
ranks) and their statistics (moving averages, or Adam's moments) start afresh (Dhariwal et al. 2020, Jukebox, 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from t2v_ds.config import QuantizerConfig
from t2v_ds.kernels import vq_assign, vq_lookup

_ROUNDS = 8  # in which the codebook is chosen from data
_STREAM = 0xC0DEB  # keeps this module's random streams apart from others with the same seed


class Collectives(Protocol):
    """Sums over the ranks of a run."""

    @property
    def rank(self) -> int:
        """Of this process."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks."""
        ...


class ParameterAccess(Protocol):
    """Reads and writes whole parameters of a model that an engine may have partitioned."""

    def read_parameter(self, parameter: nn.Parameter) -> Tensor:
        """Return the full fp32 value."""
        ...

    def write_rows(self, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        """Set `parameter[rows] = values` on all ranks and reset the optimizer's statistics of those rows."""
        ...


class SingleProcess:
    """`Collectives` of a run with one rank."""

    rank = 0
    world_size = 1

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor


@dataclass
class QuantizerOutput:
    """What the decoder and the losses need of a quantized batch."""

    codes: Tensor  # int64 [N, h, w]
    quantized: Tensor  # [N, D, h, w]: the codebook rows, exactly; the gradient goes straight to `latents`
    latents: Tensor  # fp32 [N, D, h, w], before quantization
    vectors: Tensor  # fp32 [N, D, h, w]: the codebook rows, with gradient to the codebook when it is a parameter
    soft_usage: Callable[[], Tensor]  # -> [K]: mean soft assignment over the batch of all ranks, with gradient


class StraightThrough(torch.autograd.Function):
    """Forward: `vectors`, to the bit; backward: the gradient goes to `latents` (Bengio et al. 2013).

    The usual `latents + (vectors - latents).detach()` rounds, and a decoder fed by codes alone would then see other
    numbers than the one that was trained.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, latents: Tensor, vectors: Tensor) -> Tensor:
        """Return a copy of `vectors`."""
        return vectors.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient to `latents`."""
        return gradients[0], None


class Quantizer(nn.Module):
    """A codebook of K vectors of D numbers."""

    used_outside_forward = ("codebook",)  # `soft_usage` reads it later; an engine that frees parameters must know
    codebook: Tensor
    usage: Tensor
    started: Tensor
    sums: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        size, dim = config.codebook_size, config.codebook_dim
        start = torch.randn(size, dim) / dim**0.5
        if config.learning == "gradient":
            self.codebook = nn.Parameter(start)
        else:
            # Buffers, not parameters: ZeRO-3 drops writes made to parameters in forward.
            self.register_buffer("codebook", start)
            self.register_buffer("sums", start.clone())
        self.register_buffer("usage", torch.ones(size))  # moving average of how many latents a step each code takes
        self.register_buffer("started", torch.zeros((), dtype=torch.int64))  # 1 once the codebook is set from data
        self.collectives: Collectives = SingleProcess()
        self._counts: Tensor | None = None  # collected since the last update
        self._sums: Tensor | None = None
        self._latents: list[Tensor] = []  # [M, D] a forward pass since the last update: candidates for revival

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents [N, D, h, w]; in training mode also collects the statistics that `update` uses."""
        n, d, h, w = latents.shape
        latents = latents.float()
        flat = latents.permute(0, 2, 3, 1).reshape(-1, d)  # [N*h*w, D]
        if self.training and not self.started:
            return self._pass_through(latents, flat)
        codes = self._collect(flat.detach()).view(n, h, w) if self.training else self.lookup(latents)
        vectors = self.vectors(codes)
        quantized: Tensor = StraightThrough.apply(latents, vectors.detach())
        return QuantizerOutput(codes, quantized, latents, vectors, lambda: self._soft_usage(flat))

    def lookup(self, latents: Tensor) -> Tensor:
        """Nearest codes of latents [N, D, h, w]: int64 [N, h, w]."""
        n, d, h, w = latents.shape
        flat = latents.detach().float().permute(0, 2, 3, 1).reshape(-1, d)
        return vq_lookup(flat, self.codebook.detach()).view(n, h, w)

    def vectors(self, codes: Tensor) -> Tensor:
        """Codebook rows of codes [N, h, w]: [N, D, h, w] fp32."""
        return nn.functional.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    def _pass_through(self, latents: Tensor, flat: Tensor) -> QuantizerOutput:
        """Before the start: the latents themselves, with losses of the codebook that are 0."""
        n, _, h, w = latents.shape
        self._latents.append(flat.detach())
        codes = torch.zeros(n, h, w, dtype=torch.int64, device=latents.device)
        size = self.config.codebook_size
        return QuantizerOutput(codes, latents, latents, latents, lambda: latents.new_full((size,), 1 / size))

    def _collect(self, flat: Tensor) -> Tensor:
        codes, _, counts, sums = vq_assign(flat, self.codebook.detach())
        self._counts = counts if self._counts is None else self._counts + counts
        self._sums = sums if self._sums is None else self._sums + sums
        self._latents.append(flat)
        return codes

    def _soft_usage(self, flat: Tensor) -> Tensor:
        """Mean over the batch of softmax(-distance² / temperature): [K], with gradient (hard assignments have none)."""
        codebook = self.codebook
        spread = (codebook.detach() - codebook.detach().mean(0)).square().sum(1).mean().clamp_min(1e-12)
        with torch.autocast(flat.device.type, enabled=False):
            scores = 2 * flat @ codebook.T - codebook.square().sum(1)  # -distance² up to a constant a row
            local = (scores / (self.config.diversity_temperature * spread)).softmax(dim=1).mean(0)
        if self.collectives.world_size == 1:
            return local
        # The value is the mean over all ranks; the gradient is this rank's share, which data parallelism averages.
        mean = self.collectives.all_reduce_sum(local.detach().clone()) / self.collectives.world_size
        return local + (mean - local).detach()

    @torch.no_grad()
    def initialise(self, step: int, seed: int, access: ParameterAccess | None = None) -> None:
        """Set the codebook to latents of the last step, the same on all ranks, and start quantizing.

        Chosen in rounds, each with probability proportional to the squared distance to those chosen before (k-means||,
        Bahmani et al. 2012): what is rare in the data gets codes too.
        """
        size = self.config.codebook_size
        latents = self._candidates()
        chosen = latents.new_zeros(0, latents.shape[1], dtype=torch.float32)
        for number, part in enumerate(np.array_split(np.arange(size), min(size, _ROUNDS))):
            weights = self._squared_errors(chosen) if number else torch.ones(len(latents), device=latents.device)
            rows = self._pick(len(part), weights, np.random.SeedSequence([seed, _STREAM, step, 1, number]))
            chosen = torch.cat([chosen, rows])
        self.usage.fill_(1)
        self._write(torch.arange(size, device=chosen.device), chosen, access)
        self.started.fill_(1)
        self.discard()

    def discard(self) -> None:
        """Forget what forward passes have collected since the last update."""
        self._counts = self._sums = None
        self._latents = []

    @torch.no_grad()
    def update(self, step: int, seed: int, access: ParameterAccess | None = None) -> dict[str, float]:
        """After optimizer step `step`: sum statistics over ranks, move the codebook (EMA), revive dead codes.

        Returns:
            'perplexity' (e to the entropy of the codes of this step), 'code_use' (share of codes used in this step) and
            'revived' (codes revived), once quantizing has started.
        """
        if not self.started:
            if step >= self.config.warmup_steps:
                self.initialise(step, seed, access)
            self.discard()
            return {}
        if self._counts is None or self._sums is None:
            raise RuntimeError("Quantizer.update needs a forward pass in training mode first")
        counts = self.collectives.all_reduce_sum(self._counts)
        decay = self.config.decay
        self.usage.mul_(decay).add_(counts, alpha=1 - decay)
        if self.config.learning == "ema":
            self.sums.mul_(decay).add_(self.collectives.all_reduce_sum(self._sums), alpha=1 - decay)
            alive = self.usage > 1e-6  # below, the quotient is noise and the code is about to be revived
            self.codebook[alive] = self.sums[alive] / self.usage[alive, None]
        revived = 0
        if self.config.revive_every and step % self.config.revive_every == 0:
            revived = self._revive(step, seed, access)
        self.discard()
        share = counts / counts.sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        return {"perplexity": float(entropy.exp()), "code_use": float((counts > 0).float().mean()), "revived": float(revived)}

    def _revive(self, step: int, seed: int, access: ParameterAccess | None) -> int:
        dead = (self.usage < self.config.dead_below * self.usage.mean()).nonzero().flatten()
        if len(dead) == 0:
            return 0
        # Onto badly quantized latents: on random ones most would land, again, in the midst of the commonest.
        whole = self.codebook.detach()
        if access is not None and isinstance(self.codebook, nn.Parameter):
            whole = access.read_parameter(self.codebook)
        errors = self._squared_errors(whole)
        self._write(dead, self._pick(len(dead), errors, np.random.SeedSequence([seed, _STREAM, step, 0])), access)
        return len(dead)

    def _write(self, codes: Tensor, rows: Tensor, access: ParameterAccess | None) -> None:
        """Set codebook rows and restart their statistics as if they had the mean use."""
        mean = self.usage.mean().clamp_min(1e-3)
        self.usage[codes] = mean
        if isinstance(self.codebook, nn.Parameter):
            if access is None:
                self.codebook[codes] = rows
            else:
                access.write_rows(self.codebook, codes, rows)
        else:
            self.codebook[codes] = rows
            self.sums[codes] = rows * mean

    def _squared_errors(self, codebook: Tensor) -> Tensor:
        """Squared distance of each of this rank's latents of the step to the nearest of `codebook` [k, D]: [M] fp32."""
        latents = self._candidates()
        return (latents - codebook[vq_lookup(latents, codebook)]).square().sum(1)

    def _candidates(self) -> Tensor:
        if not self._latents:
            raise RuntimeError("the quantizer has seen no latents since its last update")
        if len(self._latents) > 1:  # micro-batches of one step
            self._latents = [torch.cat(self._latents)]
        return self._latents[0]

    def _pick(self, count: int, weights: Tensor, entropy: np.random.SeedSequence) -> Tensor:
        """Pick `count` latents of the step's batch of all ranks with probability proportional to their weights [M].

        Ranks hold equal, consecutive parts of the global batch and draw by systematic sampling over its cumulated weights, so
        that all of them pick the same latents [count, D], whatever their number.
        """
        latents, group = self._candidates(), self.collectives
        cumulated = weights.double().cumsum(0)  # [M]
        totals = torch.zeros(group.world_size, dtype=torch.float64, device=latents.device)
        totals[group.rank] = cumulated[-1]
        totals = group.all_reduce_sum(totals)
        if not bool(totals.sum() > 0):  # every latent is a code already
            return self._pick(count, torch.ones_like(weights), entropy)
        start = np.random.Generator(np.random.PCG64(entropy)).random()
        wanted = (torch.arange(count, dtype=torch.float64, device=latents.device) + start) / count * totals.sum()
        ends = totals.cumsum(0)
        owner = torch.searchsorted(ends, wanted, right=True).clamp_max(group.world_size - 1)
        mine = owner == group.rank
        index = torch.searchsorted(cumulated, wanted[mine] - (ends - totals)[group.rank], right=True).clamp_max(len(latents) - 1)
        rows = torch.zeros(count, latents.shape[1], device=latents.device)
        rows[mine] = latents[index].float()
        return group.all_reduce_sum(rows)
