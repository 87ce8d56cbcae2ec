"""The report tells the truth about this machine, and about machines that lack something."""

import importlib.metadata
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from t2v_ds import doctor


def find(rows: list[doctor.Row], what: str) -> doctor.Row:
    (row,) = [row for row in rows if row[1] == what]
    return row


def test_report_of_this_machine() -> None:
    rows = doctor.report()
    assert {status for status, _, _ in rows} <= {"ok", "missing", "note"}
    assert all(what and detail and "\n" not in detail for _, what, detail in rows)
    assert not [row for row in rows if "could not be checked" in row[2]]
    assert find(rows, "DeepSpeed") == ("ok", "DeepSpeed", importlib.metadata.version("deepspeed"))
    assert find(rows, "PyTorch")[2].startswith(torch.__version__)
    assert find(rows, "MP4 (PyAV)")[0] in ("ok", "note")
    assert find(rows, "TensorBoard")[0] == "ok"
    assert float(find(rows, "disk")[2].split()[0]) > 0
    named = {what for _, what, _ in rows}
    assert named >= {"Python", "CPU cores", "memory", "shared memory", "bf16 on CPU", "nvcc", "C++ compiler", "ninja"}
    assert named >= {"SLURM", "pdsh", "ssh"}
    assert ("GPU 0" in named) == torch.cuda.is_available()


def test_a_bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "packages" / "deepspeed"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('CUDA_HOME does not exist,\\tunable to compile')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**26, 0, 2**26))
    monkeypatch.setattr(doctor, "_can_encode", lambda *_: False)
    rows = doctor.report()
    status, _, detail = find(rows, "DeepSpeed")
    assert status == "missing"
    assert "cannot be imported (RuntimeError: CUDA_HOME does not exist, unable to compile)" in detail
    assert "cannot train" in detail
    for what in ("SLURM", "pdsh", "ssh", "nvcc", "C++ compiler", "disk", "shared memory"):
        assert find(rows, what)[0] == "note", what
    assert find(rows, "MP4 (PyAV)")[0] == "missing"


def test_what_is_there_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun", "scontrol", "pdsh"):
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)

    def fails() -> None:
        raise OSError("odd\nmachine")

    monkeypatch.setattr(doctor, "_disk", fails)
    monkeypatch.setattr(fails, "__name__", "_disk")
    rows = doctor.report()
    assert find(rows, "SLURM")[0] == "ok"
    assert find(rows, "pdsh") == ("ok", "pdsh", str(tmp_path / "pdsh"))
    assert find(rows, "perceptual weights, vgg16")[0] == "ok"
    assert find(rows, "perceptual weights, squeezenet")[0] == "note"
    assert find(rows, "DeepSpeed")[0] == "missing"
    assert find(rows, "DeepSpeed")[2].startswith("not installed: t2v cannot train")
    assert find(rows, "TensorBoard")[0] == "missing"
    assert find(rows, "disk") == ("note", "disk", "could not be checked: odd machine")
