"""What all tests share: no network, few threads, and no test that is silently not run.

Only tests marked `gpu` (and those in tests/gpu) may be skipped; any other skip fails the session, because a suite that
passes without having run proves nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; tests that start ranks share the cores
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"


class SkipGuard:
    """Collects tests and modules that were skipped without being allowed to; under xdist, on the controller."""

    def __init__(self) -> None:
        self.forbidden: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in report.keywords:
            self._refuse(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._refuse(report.nodeid)

    def _refuse(self, nodeid: str) -> None:
        if not nodeid.startswith("tests/gpu/"):
            self.forbidden.append(nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.forbidden and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for nodeid in self.forbidden:
            terminalreporter.write_line(f"ERROR {nodeid} was skipped; only tests marked gpu may be", red=True)


FOLDERS = ("unit", "slurm", "distributed", "fault")  # fast ones first, and last no single long file


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the folders; under xdist one process runs a file, for its fixtures' sake, and one alone has the SLURM cluster."""
    rank = {name: place for place, name in enumerate(FOLDERS)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(FOLDERS)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("slurm" if item.path.parent.name == "slurm" else item.path.stem))
    skip_gpu_tests(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not collected at the end as well: -q hides the header, and under xdist only the workers know the folders' own."""
    for path in sorted(Path(__file__).parent.glob("*/conftest.py")):
        header = getattr(import_module(f"tests.{path.parent.name}.conftest"), "pytest_report_header", str)
        if header().startswith("not collected"):
            terminalreporter.write_line(header(), yellow=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipGuard(), "skip-guard")


def skip_gpu_tests(items: list[pytest.Item]) -> None:
    """Tests marked gpu, on machines without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
