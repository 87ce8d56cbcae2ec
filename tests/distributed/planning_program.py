"""What `test_planning` runs on every rank: real training steps, each tensor that the engine makes seen by the planner's recorder.

Usage: planning_program.py SPECIFICATION.json OUT.json

The file maps a label to {"config": settings of a transformer's run, "lengths": of a micro-batch}, all of one model; OUT maps it to the
bytes that the second step held at its peaks, and to what is planned.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from t2v_ds.config import TransformerRunConfig
from t2v_ds.config_loader import from_dict
from t2v_ds.training.distributed import Collectives, connect, finish
from t2v_ds.training.ds_config import complete_ds_config
from t2v_ds.training.engine import Engine
from t2v_ds.training.planning.layers import trace_transformer
from t2v_ds.training.planning.subject import stand_in_tokenizer, transformer_batch, transformer_objective
from t2v_ds.training.planning.trace import Recorder, Trace
from t2v_ds.training.planning.zero import Zero, states_of


def measure(run: TransformerRunConfig, lengths: list[int], collectives: Collectives) -> dict[str, int]:
    """The second step's peaks of real tensors, Adam's moments being there."""
    tokenizer = stand_in_tokenizer(run.model.grid_size, run.model.codebook_size)
    recorder = Recorder()
    with recorder:
        objective = transformer_objective(run, tokenizer)
        batch = transformer_batch(run, lengths)
        engine = Engine(objective, run.train, 0, collectives, 100)
        for step in range(2):
            gc.collect()  # what earlier runs have left in cycles
            recorder.peaks.clear()
            for micro in range(engine.accumulation):
                recorder.enter("passes")
                loss, _ = engine.forward(batch)
                engine.backward(loss)
                del loss
                last = micro == engine.accumulation - 1
                time.sleep(0.1)  # gloo's thread lets go of what it has summed only when it gets the interpreter
                recorder.enter("step" if last else "passes")
                engine.step(step, last)
    return {name: peak.total for name, peak in recorder.peaks.items()}


def plan(run: TransformerRunConfig, trace: Trace, ranks: int) -> dict[str, int]:
    """What is planned for both; on a GPU as far as reserved memory goes, on a CPU as far as Adam's temporaries go."""
    config = complete_ds_config(run.train, ranks)
    zero, accumulation = Zero.read(config), int(config["gradient_accumulation_steps"])
    settings = (ranks, accumulation, run.train.precision)
    reserved, touched = (states_of(trace, zero, *settings, on_cpu, run.train.optimizer) for on_cpu in (False, True))
    passes = max(size for phase, size in reserved.peaks(trace).items() if phase != "optimizer step") + reserved.host
    step = touched.peaks(trace)["optimizer step"] + touched.host + touched.host_stepping
    if zero.stage == 3:  # its buckets stay
        step += reserved.buckets - touched.buckets
    return {"passes": passes + trace.batch, "step": step + trace.batch}


def main() -> None:
    specification, out = (Path(name) for name in sys.argv[1:])
    collectives = connect()
    found: dict[str, Any] = {}
    traces: dict[str, Trace] = {}  # all of one model
    for label, entry in json.loads(specification.read_text()).items():
        torch.manual_seed(0)
        run = from_dict(TransformerRunConfig, entry["config"])
        measured = measure(run, entry["lengths"], collectives)
        if collectives.rank == 0:
            key = f"{run.train.precision} {entry['lengths']}"
            if key not in traces:
                traces[key] = trace_transformer(run, entry["lengths"])
            found[label] = {"measured": measured, "planned": plan(run, traces[key], collectives.world_size)}
    if collectives.rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    finish(0)
