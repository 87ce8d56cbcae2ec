"""Starting real processes: one rank, several by hand, by torchrun, by the deepspeed launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from t2v_ds.training.distributed import free_port

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "LOCAL_WORLD_SIZE",
    "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR",  # of a training inside the test process
)  # fmt: skip


def why_not(*programs: str) -> str:
    """Why tests that make nodes of network namespaces cannot run here; empty: they can."""
    if os.geteuid() != 0:
        return "not root"
    missing = [name for name in (*programs, "unshare") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"no {', '.join(missing)}"
    return "" if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode == 0 else "no network namespaces"


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without launcher and SLURM variables, one thread, the repository importable."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES and not key.startswith("SLURM_")}
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    bin_folder = str(Path(sys.executable).parent)
    env.update(OMP_NUM_THREADS="1", PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", PATH=f"{bin_folder}{os.pathsep}{env['PATH']}")
    return {**env, **extra}


def start(arguments: Sequence[str], **env: str) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS` as one rank alone, with its output captured, in a process group of its own."""
    return start_command([sys.executable, *arguments], environment(**env))


def start_command(command: Sequence[str], env: dict[str, str], cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start a command, with its output captured, in a process group of its own."""
    output, errors = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, env=env, cwd=cwd, text=True, start_new_session=True, stdout=output, stderr=errors)


def finish(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 180.0) -> list[tuple[int, str]]:
    """Wait for processes and return (exit code, output) of each; none is left running."""
    results = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout_s)
            results.append((process.returncode, output))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return results


def run_ranks(arguments: Sequence[str], ranks: int, timeout_s: float = 180.0, **env: str) -> list[tuple[int, str]]:
    """Run `python ARGUMENTS` as `ranks` processes with the variables a launcher sets; (exit code, output) of each rank."""
    if ranks == 1:
        return finish([start(arguments, **env)], timeout_s)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return finish([start(arguments, **common, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(ranks)], timeout_s)


def run_torchrun(arguments: Sequence[str], ranks: int, timeout_s: float = 180.0) -> tuple[int, str]:
    """Run `python ARGUMENTS` under torchrun; (exit code, output)."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    return finish([start([*launcher, *arguments])], timeout_s)[0]


def run_deepspeed(arguments: Sequence[str], ranks: int, timeout_s: float = 180.0) -> tuple[int, str]:
    """Run ARGUMENTS (such as `--module tests.toy ...`) under the deepspeed launcher; (exit code, output)."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return finish([start([*launcher, *arguments], DS_ACCELERATOR="cpu")], timeout_s)[0]
