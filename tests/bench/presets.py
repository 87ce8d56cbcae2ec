"""The table of presets in docs/plan.md: what `t2v plan` says of a clip of 40 x 32 x 32 codes on each GPU.

    python -m tests.bench.presets [--presets 30m 300m]
"""

from __future__ import annotations

import argparse

from t2v_ds.config import PRESETS
from t2v_ds.config_loader import load_plan
from t2v_ds.training.planning.layers import trace_cache
from t2v_ds.training.planning.planner import Plan, Planner
from t2v_ds.training.planning.report import gib

KINDS = (("full", "token"), ("full", "frame"), ("window", "frame"), ("factorised", "frame"))


def plan(preset: str, attention: str, decoding: str, gpus: int, ds_config: str, checkpointing: bool) -> Plan:
    """One clip a GPU, bf16."""
    settings = [
        f"model.preset={preset}", f"model.attention={attention}", f"model.decoding={decoding}", "model.loss_tile=4096",
        f"model.activation_checkpointing={str(checkpointing).lower()}", "text.tokens=32", "text.width=384", f"train.batch={gpus}",
        "train.precision=bf16", f"train.ds_config={ds_config}", f"gpus={gpus}", "frames=40",
    ]  # fmt: skip
    config, run = load_plan(None, settings)
    return Planner(config).plan(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    arguments = parser.parse_args()
    print(
        "| preset | attention, decoding | parameters, M | 1 GPU, zero1, all kept | 1 GPU, zero1 | 8 GPUs, zero2 | 8 GPUs, zero3 "
        "| TFLOP a clip | of it attention | codes/s | cache, GiB |\n|---|---|" + "---:|" * 9
    )
    for preset in arguments.presets:
        for attention, decoding in KINDS:
            kept, one, two, three = (
                plan(preset, attention, decoding, gpus, ds_config, checkpointing)
                for gpus, ds_config, checkpointing in ((1, "zero1", False), (1, "zero1", True), (8, "zero2", True), (8, "zero3", True))
            )
            memory = " | ".join(gib(x.memory.total) for x in (kept, one, two, three))
            cost, millions = one.cost, one.trace.total_parameters / 1e6
            rate = cost.codes / cost.seconds
            print(
                f"| {preset} | {attention}, {decoding} | {millions:,.0f} | {memory} | {cost.flops / 1e12:.3g} | "
                f"{cost.attention_flops / cost.flops:.0%} | {float(f'{rate:.3g}'):,.0f} | {trace_cache(one.run) / 2**30:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
