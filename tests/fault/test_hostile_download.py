"""Downloads from a server that drops, delays, truncates and lies, killed again and again: every row is accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.hostile_download import KEPT, PLANS, mistakes, plan, read_outcomes, run

LIMITS = ["download.timeout_s=3", "download.total_s=6", "download.retries=1", "download.threads=48"]


@pytest.mark.parametrize("parts", [1, 2])
def test_every_row_ends_as_the_server_decides(tmp_path: Path, parts: int) -> None:
    plans = plan(700 if parts == 1 else 300, seed=parts)
    result = run(tmp_path, plans, parts, kills=3, parts=parts, settings=LIMITS, pause=(0.0, 0.3))
    assert mistakes(plans, result.outcomes) == []
    assert result.kills >= 3
    left = {path.name for path in (tmp_path / "raw").iterdir() if not path.name.startswith("raw-")}
    assert left == {"manifest.json", "rejected.jsonl"}
    if parts == 1:
        assert {row.plan for row in plans} == {"ok", *PLANS}
        assert result.again <= 3 * 48  # a kill loses what the threads were fetching, and nothing that was there


def test_the_account_notices_what_is_lost_or_wrong(tmp_path: Path) -> None:
    plans = plan(40, seed=3)
    outcomes = run(tmp_path, plans, 3, kills=0, parts=1, settings=LIMITS, pause=(0, 0)).outcomes
    assert mistakes(plans, outcomes) == []
    row = outcomes.index(KEPT)
    changed = [*outcomes[:row], "dead_link", *outcomes[row + 1 :]]
    assert mistakes(plans, changed) == [f"row {row} ({plans[row].plan}): dead_link, expected kept"]
    rejected = tmp_path / "raw" / "rejected.jsonl"
    lines = rejected.read_text().splitlines(keepends=True)
    for damaged in (lines[1:], [*lines, lines[0]]):
        rejected.write_text("".join(damaged))
        with pytest.raises(RuntimeError, match="not accounted for once"):
            read_outcomes(tmp_path / "raw", 40)
