"""A real cluster of four nodes on this machine, for the tests of this folder.

It needs SLURM and munge (apt-get install slurm-wlm munge) and root: without them these tests are not collected.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import why_not
from tests.slurm.cluster import LOCAL_SLURM, Slurm

reason = why_not("sbatch", "slurmctld", "munged", "ip")
collect_ignore = ["test_pipeline.py", "test_jobs.py"] if reason else []


def pytest_report_header() -> str:
    return f"not collected: tests/slurm/{{test_pipeline,test_jobs}}.py ({reason})" if reason else "SLURM: tested"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    folder = Path("/tmp") / f"t2v-slurm-{os.getpid()}"  # munge wants a short path
    folder.mkdir()
    try:
        yield Slurm(folder)
    finally:
        subprocess.run([str(LOCAL_SLURM), "down"], env={**os.environ, "LOCAL_SLURM_DIR": str(folder / "slurm")}, check=False, timeout=120)
        subprocess.run(["rm", "-rf", str(folder)], check=False)
