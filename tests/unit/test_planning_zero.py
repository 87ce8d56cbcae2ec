"""DeepSpeed's share of the memory, by ZeRO stage; `tests/distributed/test_planning.py` compares it with the real engine."""

from __future__ import annotations

import dataclasses

import pytest

from t2v_ds.training.ds_config import resolve_ds_config
from t2v_ds.training.planning import zero as zeros
from t2v_ds.training.planning.trace import Peak, Trace
from t2v_ds.training.planning.zero import States, Zero, states_of

P = 1000
PEAKS = {"forward": Peak(500, 500, 0), "backward": Peak(9000, 5100, 4 * P)}
TRACE = Trace({"blocks": 900, "head": 100}, (902, 98), 800, 200, 7, 11, 400, PEAKS, 1.0, 0.0, 0.0)


def states(name: str, ranks: int = 4, accumulation: int = 1, precision: str = "bf16", on_cpu: bool = False) -> States:
    return states_of(TRACE, Zero.read(resolve_ds_config(name)), ranks, accumulation, precision, on_cpu)


def test_stages_partition_one_thing_more_each() -> None:
    share = 4 * (2 * 113 + 2 * 13)  # 902 and 98 numbers over 4 ranks, each rank an even number
    held = {name: states(name, accumulation=2) for name in ("zero0", "zero1", "zero2", "zero3")}
    found = {name: (one.weights, one.masters, one.moments, one.gradients) for name, one in held.items()}
    assert found == {
        "zero0": (4 * P, 0, 8 * P, 4 * P),
        "zero1": (4 * P, share, 2 * share, 4 * P),
        "zero2": (4 * P, share, 2 * share, share),
        "zero3": (share, share, 2 * share, share),
    }


def test_muon_keeps_one_moment_of_what_it_moves() -> None:
    trace, zero = dataclasses.replace(TRACE, hidden=600), Zero.read(resolve_ds_config("zero0"))
    both = {name: states_of(trace, zero, 4, 1, "bf16", False, name) for name in ("adamw", "muon")}
    assert both["adamw"].moments - both["muon"].moments == 4 * 600
    assert both["muon"].stepping == 4 * P + (4 + 2 * 2) * 600  # these are few enough to be moved together


def test_one_rank_holds_all_at_every_stage() -> None:
    for name in ("zero1", "zero2", "zero3"):
        one = states(name, ranks=1)
        assert (one.weights, one.masters, one.moments, one.gathered) == (4 * P, 4 * P, 8 * P, 0)


def test_without_accumulation_gradients_are_kept_nowhere_but_in_buckets() -> None:
    assert [states(name).gradients for name in ("zero0", "zero1", "zero2")] == [0, 0, 0]
    assert [states(name).apart for name in ("zero0", "zero1", "zero2", "zero3")] == [False, True, True, True]


def test_buckets_are_reserved_for_each_type_and_twice_for_overlap() -> None:
    full = 50_000_000  # as the files in ds_configs/ say
    assert states("zero1").buckets == states("zero2").buckets == 2 * 2 * 4 * full  # DeepSpeed makes both types' as fp32
    assert states("zero1", precision="fp32").buckets == 4 * 2 * full * 2  # low_precision is 800 still: of the trace
    assert states("zero3").buckets == (2 + 4) * full
    assert states("zero0").buckets == 0
    assert states("zero1", on_cpu=True).buckets == 4 * P  # pages that are touched


def test_offloading_moves_to_the_machine() -> None:
    near, far = states("zero3", accumulation=2), states("zero3_offload", accumulation=2)
    assert (far.weights, far.masters, far.moments, far.gradients) == (0, 0, 0, 0)
    assert far.host == near.weights + near.masters + near.moments + 2 * near.gradients
    assert near.host == 0
    assert far.buckets == near.buckets


def test_peaks_add_up() -> None:
    one = states("zero2", on_cpu=True)
    peaks = one.peaks(TRACE)
    always = one.weights + one.masters + one.moments + TRACE.frozen
    assert peaks["forward"] == always + one.buckets + 500
    assert peaks["backward"] == always + one.buckets + 5100  # gradients lie in the buckets
    assert peaks["optimizer step"] == always + one.stepping
    assert states("zero0").peaks(TRACE)["backward"] == 12 * P + TRACE.frozen + 9000


def test_gradients_that_fill_a_bucket_early_are_summed_early() -> None:
    small = dataclasses.replace(Zero.read(resolve_ds_config("zero2")), bucket=500)
    one = states_of(TRACE, small, 4, 1, "bf16", on_cpu=False)
    peaks = one.peaks(TRACE)
    assert peaks["backward"] - peaks["forward"] == 5100 - 500 + one.masters
    assert states("zero2").peaks(TRACE)["backward"] - states("zero2").peaks(TRACE)["forward"] == 5100 - 500


def test_what_a_file_leaves_out_is_deepspeeds_default() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (1, 2, 3):
        theirs, ours = DeepSpeedZeroConfig(stage=stage), Zero.read({"zero_optimization": {"stage": stage}})
        assert (ours.bucket, ours.prefetch, ours.reuse, ours.sub_group, ours.overlap, ours.contiguous) == (
            theirs.reduce_bucket_size, theirs.prefetch_bucket_size, theirs.max_reuse_distance, theirs.sub_group_size,
            theirs.overlap_comm, theirs.contiguous_gradients,
        )  # fmt: skip
    assert zeros.BUCKET == 500_000_000


@pytest.mark.parametrize(("place", "host"), [("cpu", True), ("nvme", False)])
def test_an_optimizer_on_disk_takes_no_memory(place: str, host: bool) -> None:
    zero = Zero.read({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": place}}})
    one = states_of(TRACE, zero, 4, 1, "bf16", on_cpu=False)
    assert (one.host > 0) == host
    assert one.weights > 0  # only the optimizer is away
    assert (one.masters, one.moments, one.gradients) == (0, 0, 0)
