"""The suite may not pass by not running: a skip without the gpu mark fails the session."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
CASES = {
    "gpu": ("@pytest.mark.gpu\ndef test_a():\n    pytest.skip('none')", 0),
    "skip": ("def test_a():\n    pytest.skip('lazy')", 1),
    "mark": ("@pytest.mark.skip\ndef test_a():\n    pass", 1),
    "module": ("pytest.importorskip('no_such_module')\ndef test_a():\n    pass", 1),
    "xfail": ("@pytest.mark.xfail\ndef test_a():\n    assert False", 0),
}


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_only_gpu_tests_may_be_skipped(tmp_path: Path, workers: list[str]) -> None:
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    for name, (body, _) in CASES.items():
        test = f"import pytest\n{body}\ndef test_b():\n    pass\n"
        if name == "module":
            test = f"import pytest\n{body}\n"
        (tmp_path / f"test_{name}.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    allowed = [f"test_{name}.py" for name, (_, code) in CASES.items() if code == 0]
    refused = [f"test_{name}.py" for name, (_, code) in CASES.items() if code == 1]
    good = subprocess.run([*command, *allowed], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0, good.stdout
    bad = subprocess.run([*command, *allowed, *refused], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert bad.returncode == 1, bad.stdout
    for name in refused:
        assert f"ERROR {name}" in bad.stdout
    assert bad.stdout.count("only tests marked gpu") == len(refused)
