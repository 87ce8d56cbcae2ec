"""Kernels are compiled with the package where that can be done, and an installation only fails for them where it was told to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2v_ds.kernels import build

ROOT = Path(__file__).resolve().parents[2]


def build_package(into: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py; /bin and /usr/bin hold no nvcc."""
    settings = {**os.environ, "PATH": "/usr/bin:/bin", "CUDA_HOME": "/nowhere", "CUDA_PATH": "", **environment}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(into), "egg_info", "--egg-base", str(into)]
    into.mkdir()
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)


def test_an_installed_package_brings_its_kernels(tmp_path: Path) -> None:
    done = build_package(tmp_path / "build", T2V_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    kernels = tmp_path / "build/lib/t2v_ds/kernels"
    assert (kernels / build.library_name(build.TARGETS["CPU"])).is_file()
    program = (
        "import t2v_ds.kernels as k; from t2v_ds.kernels import clips, gif, native; "
        "print(k.__file__); print(gif.available(), clips.available()); print(native.available())"
    )
    # Nothing to compile with, and nowhere to put it.
    environment = {"PYTHONPATH": str(tmp_path / "build/lib"), "PATH": str(tmp_path), "XDG_CACHE_HOME": "/proc/none"}
    loaded = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert loaded.stdout.splitlines() == [str(kernels / "__init__.py"), "True True", "('CPU',)"], loaded.stderr


def test_cuda_that_cannot_be_compiled_fails_only_if_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/usr/local/cuda/bin/nvcc").is_file():  # found there whatever the environment says
        environment = {"NVCC_PREPEND_FLAGS": "--no-such-flag"}
        reason = "failed: nvcc fatal"
    else:
        environment = {}
        reason = "there is no nvcc"
    done = build_package(tmp_path / "asked", T2V_BUILD_CUDA="1", **environment)
    assert done.returncode != 0
    assert reason in done.stderr
    done = build_package(tmp_path / "auto", T2V_BUILD_CUDA="auto", **environment)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "auto").rglob("*.so")) == ["clips", "gif", "vq_cpu"]


def test_a_setting_that_is_none_is_refused(tmp_path: Path) -> None:
    done = build_package(tmp_path / "wrong", T2V_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "T2V_BUILD_CUDA is 'yes'; it can be auto, 0 or 1" in done.stderr
