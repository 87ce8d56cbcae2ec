"""What the tests ask of a real SLURM cluster on this machine."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers import ROOT, environment

LOCAL_SLURM = Path(__file__).parent / "local_slurm"


class Slurm:
    """The cluster, and what is asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = environment(LOCAL_SLURM_DIR=str(folder / "slurm"), XDG_CACHE_HOME=str(Path.home() / ".cache"))
        self.call(str(LOCAL_SLURM), "up", "-n", "4", "-c", "2", "-g", "0")
        self.env["SLURM_CONF"] = str(folder / "slurm/etc/slurm.conf")

    def call(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, script: str, out: Path, options: list[str], arguments: list[str]) -> Path:
        """Submit slurm/SCRIPT; the log that it will write."""
        log = out.with_suffix(".log")
        command = ["sbatch", "--parsable", f"--output={log}", "--export=ALL", *options, str(ROOT / "slurm" / script), *arguments]
        self.call(*command, "--out", str(out))
        return log

    def queue(self) -> list[str]:
        return self.call("squeue", "--noheader", "--format=%A_%a %j %T %r %N").splitlines()

    def wait(self, until: Callable[[], object], what: str, logs: Path, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not until():
            said = "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(logs.glob("*.log")))
            assert time.monotonic() < end, f"{what} did not come\n{self.queue()}\n{said}"
            time.sleep(0.5)
