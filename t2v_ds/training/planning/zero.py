"""What DeepSpeed holds beside the activations, by ZeRO stage: bytes on each GPU and in the machine's memory.

    P numbers, N ranks       weights  fp32 masters  Adam's moments  gradients between micro-batches
    stage 0                  4P       -             8P              4P             with Muon 4 bytes less of each number that it moves
    stage 1                  4P       4P/N          8P/N            4P
    stage 2                  4P       4P/N          8P/N            4P/N
    stage 3                  4P/N     4P/N          8P/N            4P/N     + weights gathered while they are used

The stages are those of Rajbhandari et al. 2020; the bytes, the buckets and the copies made on the way are those of DeepSpeed 0.19
(runtime/zero/stage_1_and_2.py, stage3.py, engine.py) as our engine uses it: fp32 weights, bf16 by autocast, torch's AdamW.
`tests/distributed/test_planning.py` compares with what the real engine allocates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from t2v_ds.training.optimizer import AT_A_TIME
from t2v_ds.training.planning.trace import Trace

FP32, BF16 = 4, 2
# DeepSpeed's defaults (runtime/zero/config.py).
BUCKET, PREFETCH, REUSE, SUB_GROUP = 500_000_000, 50_000_000, 1_000_000_000, 1_000_000_000


@dataclass
class Zero:
    """The settings of `zero_optimization` that decide about memory."""

    stage: int
    bucket: int  # numbers of a bucket of gradients
    overlap: bool  # two buckets instead of one
    contiguous: bool  # gradients are moved into buckets as they come
    prefetch: int  # stage 3: numbers gathered ahead
    reuse: int  # stage 3: weights needed again within so many numbers stay gathered
    sub_group: int  # stage 3: numbers that the optimizer moves at once
    optimizer_away: bool  # masters, moments and gradients lie in the machine's memory, or on disk
    weights_away: bool  # stage 3: weights too
    on_disk: bool  # "nvme"

    @classmethod
    def read(cls, ds_config: dict[str, Any]) -> Zero:
        """From a DeepSpeed configuration; what it leaves out is DeepSpeed's default."""
        zero = ds_config.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        places = [str((zero.get(key) or {}).get("device", "none")) for key in ("offload_optimizer", "offload_param")]
        away = [place != "none" for place in places]
        return cls(
            stage, int(zero.get("reduce_bucket_size", BUCKET)), bool(zero.get("overlap_comm", stage == 3)),
            bool(zero.get("contiguous_gradients", True)) or away[0], int(zero.get("stage3_prefetch_bucket_size", PREFETCH)),
            int(zero.get("stage3_max_reuse_distance", REUSE)), int(zero.get("sub_group_size", SUB_GROUP)),
            away[0] and stage > 0, away[1] and stage == 3, "nvme" in places,
        )  # fmt: skip


@dataclass
class States:
    """Bytes of one rank, by what they hold."""

    weights: int = 0
    masters: int = 0
    moments: int = 0
    gradients: int = 0  # held when a micro-batch begins, or the whole time
    buckets: int = 0
    gathered: int = 0  # stage 3: weights that are whole
    reducing: int = 0  # further copies of gradients while they are summed over the ranks
    stepping: int = 0  # further copies while the optimizer moves the weights
    host: int = 0  # in the machine's memory, of each rank
    host_stepping: int = 0  # there, more of it while the optimizer moves the weights
    apart: bool = False  # gradients leave the backward pass as they come
    early: tuple[int, int] = (0, 0)  # more than the first so many bytes of gradients: the second, their sum over the ranks, is there

    @property
    def standing(self) -> int:
        """On the GPU the whole time."""
        return self.weights + self.masters + self.moments

    def peaks(self, trace: Trace) -> dict[str, int]:
        """The highest bytes of each phase of the step, with the activations and the batch of `trace`."""
        always = self.standing + trace.frozen
        work = {
            phase: always + self.gradients + self.buckets + self.gathered + (peak.work if self.apart else peak.total)
            + self.early[1] * (peak.gradients > self.early[0])
            for phase, peak in trace.peaks.items()
        }  # fmt: skip
        work["reduction of gradients"] = always + self.buckets + self.reducing
        work["optimizer step"] = always + self.stepping
        return work


def states_of(
    trace: Trace, zero: Zero, ranks: int, accumulation: int, precision: str, on_cpu: bool, optimizer: str = "adamw"
) -> States:  # fmt: skip
    """What each of `ranks` holds; `accumulation`: micro-batches a step; `on_cpu`: of memory that is only reserved, nothing counts."""
    size = trace.total_parameters
    if zero.stage == 0:
        hidden = trace.hidden if optimizer == "muon" else 0
        return _without_partitions(trace, zero, accumulation, on_cpu, hidden, BF16 if precision == "bf16" else FP32)
    # Partitions are aligned to an even number of elements a rank.
    share = FP32 * sum(-(-group // (2 * ranks)) * 2 for group in trace.groups)
    states = States(
        weights=share if zero.stage == 3 else FP32 * size, masters=share, moments=2 * share,
        buckets=_buckets(trace, zero, precision, on_cpu), apart=zero.contiguous,
    )  # fmt: skip
    # The flat gradient; on a GPU, where AdamW is not fused, the root of the second moment, too.
    moved = FP32 * min(max(-(-group // ranks) for group in trace.groups), zero.sub_group)
    copies = moved * (1 if on_cpu else 2)
    bucket, low = min(zero.bucket, trace.low_precision or size), BF16 if precision == "bf16" else FP32
    if zero.stage == 3:
        states.gradients = share
        states.reducing = share + bucket * (FP32 + low)
        states.stepping = share + states.buckets + copies
        if ranks > 1:
            ahead = max(zero.prefetch, trace.largest)
            states.gathered = FP32 * min(size, zero.reuse // 2 + ahead) + low * min(size, ahead)
    else:
        held = share if zero.stage == 2 else FP32 * size
        states.gradients = held * (accumulation > 1)
        sent = bucket * (FP32 + BF16 * (low == BF16)) if ranks > 1 else 0  # summed in a copy, which one rank alone needs not
        states.reducing = max(sent, share) + (states.gradients if zero.stage == 2 else 0)
        states.early = (FP32 * zero.bucket, share * (zero.stage == 2 or accumulation == 1))
        states.stepping = share + copies
    if zero.optimizer_away:
        _move_optimizer(states, trace, zero, share, accumulation)
        states.host_stepping = 0 if zero.on_disk or on_cpu else 2 * moved  # the gradient lies there already
    return states


def _without_partitions(trace: Trace, zero: Zero, accumulation: int, on_cpu: bool, hidden: int, computed: int) -> States:
    """`hidden`: numbers of the matrices of which Muon keeps one moment, and that it moves some at a time, computing in so many bytes."""
    size = FP32 * trace.total_parameters
    held = size * (accumulation > 1)
    step = 0 if on_cpu else size - FP32 * hidden  # a temporary of all parameters together, where AdamW is not fused
    if hidden:
        step = max(step, (FP32 + 2 * computed) * min(hidden, max(AT_A_TIME, trace.largest)))
    return States(
        weights=size, moments=2 * size - FP32 * hidden, gradients=held, apart=accumulation > 1,
        reducing=size + FP32 * min(zero.bucket, trace.total_parameters), stepping=size + step,
    )  # fmt: skip


def _buckets(trace: Trace, zero: Zero, precision: str, on_cpu: bool) -> int:
    """A bucket for each data type that is sent; at stages 1 and 2 all hold fp32, and `overlap` doubles them."""
    if not zero.contiguous:
        return 0
    low, rest = trace.low_precision, trace.total_parameters - trace.low_precision
    kinds = [(count, bytes_each) for count, bytes_each in ((low, BF16 if zero.stage == 3 else FP32), (rest, FP32)) if count]
    twice = 2 if zero.overlap and zero.stage < 3 else 1
    if not on_cpu:
        return sum(zero.bucket * each * twice for _, each in kinds)
    # Pages that are never written are never there: of two buckets the second is used when the first is full.
    return sum(min(count, zero.bucket * twice) * each for count, each in kinds)


def _move_optimizer(states: States, trace: Trace, zero: Zero, share: int, accumulation: int) -> None:
    """Masters, moments and gradients go to the machine's memory, and with `weights_away` the weights' partitions."""
    gradients = share * (3 if accumulation > 1 and zero.stage < 3 else 2)  # and a buffer of the same size
    away = states.masters + states.moments + gradients
    states.masters = states.moments = 0
    states.early = (0, 0)
    if zero.stage > 1:
        states.gradients = 0
    if zero.stage < 3:
        states.buckets += FP32 * trace.largest  # through which a gradient goes at a time, on both sides
        away += FP32 * trace.largest
    if zero.weights_away:
        away += states.weights
        states.weights = 0
    states.reducing -= share if zero.stage == 3 else 0
    states.stepping = states.buckets if zero.stage == 3 else FP32 * trace.largest
    states.host = 0 if zero.on_disk else away
