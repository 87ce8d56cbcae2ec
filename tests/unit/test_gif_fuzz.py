"""Damaged GIFs: the compiled decoder under sanitizers, compared with Pillow's way; tests/fuzz/fuzz_gif.py runs more of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz import fuzz_gif
from tests.fuzz.mutate import DAMAGES, Damage, own_seeds, walk


def test_damaged_files_are_decoded_as_pillow_does_or_rejected_and_nothing_else_happens(tmp_path: Path) -> None:
    kinds = fuzz_gif.fuzz(fuzz_gif.build(tmp_path), own_seeds(), seed=5, numbers=range(500))
    assert not [kind for kind in kinds if kind.startswith("FAULT")]
    assert kinds["same frames"] > 100  # mutants reach the decoder, and do not fail at the door
    assert kinds["both reject: undecodable"] > 50
    assert kinds["both reject: truncated"] > 50


PLANTED = {  # a line of gif.cpp, what is planted instead, and the fault that it leads to
    "crash": ("bottom < height_ ? bottom : height_}", "bottom}"),
    "hang": ("      at += width;\n", "      at += code == clear ? 0 : width;\n"),
    "other frames": ("starts[4] = {0, 4, 2, 1}", "starts[4] = {0, 4, 1, 2}"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = PLANTED[fault]
    code = (fuzz_gif.HERE.parents[1] / "kernels" / "gif.cpp").read_text()
    assert right in code
    (tmp_path / "gif.cpp").write_text(code.replace(right, wrong))
    (tmp_path / "main.cpp").write_text((fuzz_gif.HERE / "gif_main.cpp").read_text().replace("../../kernels/gif.cpp", "gif.cpp"))
    monkeypatch.setattr(fuzz_gif, "SECONDS", 1)
    numbers = range(5) if fault == "hang" else range(300)
    kinds = fuzz_gif.fuzz(fuzz_gif.build(tmp_path, tmp_path / "main.cpp"), own_seeds(), seed=5, numbers=numbers)
    assert kinds[f"FAULT {fault}"], kinds


@pytest.mark.parametrize("damage", sorted(set(DAMAGES), key=lambda one: one.__name__), ids=lambda damage: damage.__name__)
def test_each_damage_changes_most_files_and_spares_some_blocks(damage: Damage) -> None:
    seeds = own_seeds()
    useful = 0
    for n, data in enumerate(seeds):
        damaged = bytearray(data)
        damage(damaged, random.Random(n), seeds)
        useful += bytes(damaged) != data and bool(walk(bytes(damaged)))
    assert useful > len(seeds) // 4
