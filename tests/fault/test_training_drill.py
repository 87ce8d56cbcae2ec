"""Trainings of both models killed at random moments, while saving, by a signal, with a rank lost, on one rank and on changing ones.

Each ends as if undisturbed. And data that has changed since.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from t2v_ds.training.checkpoint import latest_checkpoint
from t2v_ds.training.distributed import free_port
from tests.fault.conftest import TRANSFORMER, VQVAE
from tests.fault.warm import Warm

STEPS = 40
KILLS = ("starting", "saving", "anywhere", "anywhere")  # all ranks at once
SETTINGS = [f"train.steps={STEPS}", "train.save_every=3", "train.log_every=1", "train.precision=fp32"]
PREPARE = ["--source", "moving-shapes", "image_size=32", "max_frames=16", "shard_clips=8", "chunk_clips=12", "workers=1"]


@dataclass(frozen=True)
class Chain:
    """A warm process, the data for both models, and their undisturbed runs."""

    warm: Warm
    folder: Path

    def command(self, model: str, run: Path, *settings: str) -> list[str | Path]:
        data = self.folder / {"vqvae": "raw", "transformer": "tokens"}[model]
        return [f"train-{model}", "--config", self.folder / f"{model}.yaml", "--data", data, "--out", run, *SETTINGS, *settings]

    def calm(self, model: str) -> Path:
        return self.folder / f"calm-{model}"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("chain")
    with Warm() as warm:
        chain, log = Chain(warm, folder), folder / "log"
        for model, settings in (("vqvae", VQVAE), ("transformer", TRANSFORMER)):
            (folder / f"{model}.yaml").write_text(yaml.safe_dump(settings))
        warm.run("prepare", "--out", folder / "raw", "clips=27", *PREPARE, log=log)
        warm.run(*chain.command("vqvae", chain.calm("vqvae")), log=log)
        warm.run("tokenize", "--data", folder / "raw", "--tokenizer", chain.calm("vqvae"), "--out", folder / "tokens", log=log)
        warm.run(*chain.command("transformer", chain.calm("transformer")), log=log)
        yield chain


def lines(run: Path) -> list[dict[str, Any]]:
    """The curve without timings."""
    path = run / "metrics.jsonl"
    curve = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [{key: value for key, value in line.items() if not key.startswith("performance/")} for line in curve]


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=0)


def start(chain: Chain, command: list[str | Path], log: Path, world: int) -> list[int]:
    if world == 1:
        return [chain.warm.start(*command, log=log)]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [chain.warm.start(*command, log=log, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world)]


def wait_until(chain: Chain, pid: int, log: Path, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert chain.warm.poll(pid) is None, f"over before the blow fell: {log.read_text()}"
        assert time.monotonic() < until, "the run does not get there"
        time.sleep(0.001)


def strike(chain: Chain, run: Path, ranks: list[int], blow: str, point: int, chance: random.Random) -> None:
    """Wait for the moment (`point`: a step that must be made, unless the run is to die while it starts), and let the blow fall."""
    log = run.with_suffix(".log")
    if blow == "starting":
        time.sleep(chance.uniform(0, 0.5))
    else:
        wait_until(chain, ranks[0], log, lambda: last_step(run) >= point)
    if blow == "saving":
        wait_until(chain, ranks[0], log, lambda: any(run.glob("checkpoints/*.partial")))
    else:
        time.sleep(chance.uniform(0, 0.05))
    assert [chain.warm.poll(pid) for pid in ranks] == [None] * len(ranks), f"over before the blow fell: {log.read_text()}"
    for pid in [ranks[-1]] if blow == "one rank" else chance.sample(ranks, len(ranks)):
        os.kill(pid, signal.SIGUSR1 if blow == "signal" else signal.SIGKILL)
    codes = [chain.warm.wait(pid) for pid in ranks]
    if blow == "signal":
        assert codes == [0] * len(ranks), log.read_text()
        saved = latest_checkpoint(run)
        assert saved is not None and int(saved.name[5:]) == last_step(run), "the step of the signal was not saved"
    elif blow == "one rank":
        assert codes[-1] == -signal.SIGKILL
        assert 0 not in codes, "the other rank must not go on alone"
    else:
        assert codes == [-signal.SIGKILL] * len(ranks)
    assert not (run / "DONE").exists()


def storm(chain: Chain, model: str, run: Path, blows: list[tuple[int, str]], chance: random.Random, *settings: str) -> None:
    """Start the run on so many ranks, let the blow fall, and again; then let it end on one rank."""
    log = run.with_suffix(".log")
    points = sorted(chance.randrange(1, STEPS - 12) for _ in blows)
    for point, (world, blow) in zip(points, blows, strict=True):
        command = chain.command(model, run, f"train.data_threads={chance.randrange(4)}", *settings)
        strike(chain, run, start(chain, command, log, world), blow, point, chance)
    chain.warm.run(*chain.command(model, run, *settings), log=log)


def position(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())["stream"]
    return state


@pytest.mark.parametrize(
    ("model", "settings"), [("vqvae", ["train.visual_every=9"]), ("transformer", ["model.dropout=0.1"])], ids=["vqvae", "transformer"]
)
def test_killed_ten_times_the_weights_are_the_same_to_the_bit(chain: Chain, model: str, settings: list[str], tmp_path: Path) -> None:
    calm, stormy, chance = tmp_path / "calm", tmp_path / "stormy", random.Random(model)
    chain.warm.run(*chain.command(model, calm, *settings), log=tmp_path / "calm.log")
    blows = [*(chance.choice(KILLS) for _ in range(8)), "saving", "starting", "signal"]
    storm(chain, model, stormy, [(1, blow) for blow in chance.sample(blows, len(blows))], chance, *settings)
    assert [line["step"] for line in lines(calm)] == list(range(1, STEPS + 1))
    assert lines(stormy) == lines(calm)
    assert position(stormy) == position(calm)
    assert position(stormy)["consumed"] == STEPS * 4
    assert (stormy / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (stormy / "checkpoints").iterdir()) == [f"step_{STEPS - 1:08d}", f"step_{STEPS:08d}"]


@pytest.mark.parametrize("model", ["vqvae", "transformer"])
def test_killed_and_resumed_on_other_numbers_of_ranks_the_loss_is_the_same(chain: Chain, model: str, tmp_path: Path) -> None:
    calm, stormy = chain.calm(model), tmp_path / "stormy"
    storm(chain, model, stormy, [(2, "saving"), (1, "anywhere"), (2, "one rank"), (1, "saving")], random.Random(model))
    assert position(stormy) == position(calm)
    said = stormy.with_suffix(".log").read_text()
    assert "is of 2 ranks at ZeRO stage 1; carrying it over to 1 ranks" in said
    assert "is of 1 ranks at ZeRO stage 1; carrying it over to 2 ranks" in said
    for found, expected in zip(lines(stormy), lines(calm), strict=True):
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, rtol=5e-6, atol=1e-9)


def refused(chain: Chain, command: list[str | Path], log: Path) -> str:
    """The sentence with which a run is refused."""
    assert chain.warm.wait(chain.warm.start(*command, log=log)) == 2
    assert "Traceback" not in log.read_text()
    return log.read_text().splitlines()[-1]


def test_changed_data_is_refused_by_what_changed_or_begins_the_epoch_anew(chain: Chain, tmp_path: Path) -> None:
    run, log, more = tmp_path / "run", tmp_path / "log", tmp_path / "more"
    chain.warm.run("prepare", "--out", more, "clips=36", *PREPARE, log=tmp_path / "prepare.log")
    command = chain.command("vqvae", run)
    grown = [more if part == chain.folder / "raw" else part for part in command]
    pid = chain.warm.start(*command, log=log)
    wait_until(chain, pid, log, lambda: last_step(run) >= 13)
    os.kill(pid, signal.SIGUSR1)  # it saves, and ends
    assert chain.warm.wait(pid) == 0
    step = last_step(run)
    epoch = step * 4 // 27
    assert 1 <= epoch <= 4

    sentence = refused(chain, grown, log)
    assert "27 clips) than this run's" in sentence
    assert "36 clips), where shards were" in sentence
    assert "added: raw-00005.tar (4 clips); changed: raw-00004.tar (8 clips, were 3)" in sentence
    assert "accept_new_data=true" in sentence

    chain.warm.run(*grown, "accept_new_data=true", log=log)
    assert f"epoch {epoch} begins anew, on 36 clips instead of 27" in log.read_text()
    assert position(run)["consumed"] == epoch * 36 + 4 * (STEPS - step)
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    assert lines(run)[:step] == lines(chain.calm("vqvae"))[:step]  # the model and its curve were kept
    assert lines(run)[step:] != lines(chain.calm("vqvae"))[step:]

    weights = (run / "model.safetensors").read_bytes()
    assert "was trained on other data (shards were removed: raw-00005.tar (4 clips); changed" in refused(chain, command, log)
    assert f"has made {STEPS} steps on other data" in refused(chain, [*command, "accept_new_data=true"], log)
    chain.warm.run(*command, "accept_new_data=true", f"train.steps={STEPS + 3}", log=log)
    assert (run / "model.safetensors").read_bytes() != weights


def test_new_data_with_codes_of_another_tokenizer_is_never_accepted(chain: Chain, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = chain.command("transformer", run, "train.steps=3")
    chain.warm.run(*command, log=log)
    chain.warm.run(*chain.command("vqvae", tmp_path / "tokenizer", "seed=1", "train.steps=4"), log=log)
    chain.warm.run("tokenize", "--data", chain.folder / "raw", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "tokens", log=log)
    other = [tmp_path / "tokens" if part == chain.folder / "tokens" else part for part in command]
    assert "setting 'tokenizer_id' is" in refused(chain, [*other, "accept_new_data=true", "train.steps=6"], log)
