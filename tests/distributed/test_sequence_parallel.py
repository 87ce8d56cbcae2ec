"""Two ranks that share the positions of clips compute what one computes: losses, gradients, and a whole training."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.distributed.sequence_program import KINDS
from tests.helpers import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sequence")
    for ranks in (1, 2):
        for code, output in run_ranks(["tests/distributed/sequence_program.py", str(folder / f"{ranks}.json")], ranks):
            assert code == 0, output
    return [json.loads((folder / f"{ranks}.json").read_text()) for ranks in (1, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_one_rank(results: list[dict[str, Any]], kind: str) -> None:
    alone, shared = (one[kind] for one in results)
    torch.testing.assert_close(torch.tensor(shared["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=1e-6)
    assert alone["gradients"].keys() == shared["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        expected = torch.tensor(gradient)
        tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
        found = torch.tensor(shared["gradients"][name])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    moved = [name for name, gradient in alone["gradients"].items() if any(gradient)]
    assert len(moved) > 0.9 * len(alone["gradients"])
