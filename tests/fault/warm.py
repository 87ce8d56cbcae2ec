"""A process that has imported all of t2v_ds, torch and DeepSpeed, and forks a real `t2v` for every command line it reads.

Importing takes many seconds, forking some milliseconds; so a drill can start a training dozens of times. Nothing is initialised before
the fork: no process group, no engine, no thread.

line in: {"start": arguments, "env": {...}, "log": file} -> {"pid": number}; {"poll": pid} -> {"code": exit code, -signal, or null}
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from tests.helpers import ROOT, environment

# The last ones are imported only when they are used, by our code or by DeepSpeed.
MODULES = """t2v_ds.cli t2v_ds.training.run t2v_ds.tokenize t2v_ds.data.prepare
deepspeed.runtime.zero.muon.muon_optimizer torchmetrics.functional.image kornia.color tensorboard.summary.writer""".split()


class Warm:
    """The process, seen from a test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.warm"], env=environment(), cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(self, *arguments: str | Path, log: Path, **env: str) -> int:
        """Start `t2v ARGUMENTS`, its output going to `log`; returns the process's number."""
        return int(self._ask(start=list(map(str, arguments)), env=env, log=str(log))["pid"])

    def poll(self, pid: int) -> int | None:
        """How it ended: exit code, or minus the signal; None: it runs."""
        code: int | None = self._ask(poll=pid)["code"]
        return code

    def wait(self, pid: int, timeout_s: float = 120.0) -> int:
        """Wait for its end."""
        until = time.monotonic() + timeout_s
        while (code := self.poll(pid)) is None:
            assert time.monotonic() < until, "it does not end"
            time.sleep(0.005)
        return code

    def run(self, *arguments: str | Path, log: Path, **env: str) -> None:
        """Run `t2v ARGUMENTS`, which must succeed."""
        assert self.wait(self.start(*arguments, log=log, **env)) == 0, log.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # it then kills what still runs, and ends
        self._process.wait(30)


def serve() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints while it is imported
    for module in MODULES:
        importlib.import_module(module)
    from t2v_ds.training.engine import import_deepspeed

    import_deepspeed()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be in the forked processes"
    ended: dict[int, int | None] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            pid = os.fork()
            if pid == 0:
                _become(question["start"], question["env"], question["log"])
            ended[pid] = None
            answer = {"pid": pid}
        else:
            pid = question["poll"]
            if ended[pid] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                ended[pid] = os.waitstatus_to_exitcode(status) if found else None
            answer = {"code": ended[pid]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in [pid for pid, code in ended.items() if code is None]:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # finalising all that was imported takes seconds


def _become(arguments: list[str], env: dict[str, str], log: str) -> None:
    """Be `t2v ARGUMENTS`, in a session of its own."""
    os.setsid()
    os.environ.update(env)
    files = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for target, source in ((0, files[0]), (1, files[1]), (2, files[1])):
        os.dup2(source, target)
    sys.argv = ["t2v", *arguments]
    from t2v_ds.cli import main

    code = 1
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # and not back to the loop


if __name__ == "__main__":
    serve()
