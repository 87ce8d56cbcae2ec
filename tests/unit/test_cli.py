"""`t2v`: help that teaches, mistakes in one sentence, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t2v_ds import __version__, cli
from t2v_ds.config import DemoConfig, PrepareConfig, SamplingConfig
from t2v_ds.config_loader import to_dict
from t2v_ds.errors import ConfigError, DataError
from t2v_ds.files import require_writable
from tests.helpers import environment

VERBS = [
    "prepare", "index", "verify", "train-vqvae", "merge", "tokenize", "plan", "train-transformer", "generate", "evaluate", "demo", "doctor",
]  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, argparse.Namespace]]:
    """Verbs that do nothing but remember what they were called with."""
    made: list[tuple[str, Any, argparse.Namespace]] = []
    for name, verb in cli.VERBS.items():

        def remember(config: Any, flags: argparse.Namespace, name: str = name) -> None:
            made.append((name, config, flags))

        monkeypatch.setitem(cli.VERBS, name, dataclasses.replace(verb, run=remember))
    return made


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` in this process: its end raises, and what it does to logging is undone."""

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(cli, "_end", end)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    level = logging.getLogger("t2v_ds").level
    yield
    logging.getLogger("t2v_ds").setLevel(level)


def leaves(config: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in config.items():
        names += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def test_the_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(cli.VERBS) == VERBS
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        cli.run(arguments)
        text = capsys.readouterr().out
        assert re.findall(r"^  ([a-z-]+) +\S", text, flags=re.MULTILINE) == VERBS
    cli.run(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_teaches(name: str, capsys: pytest.CaptureFixture[str], calls: list[Any]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    example = re.search(rf"example:\n  (t2v {name}.*)", text)
    assert example is not None
    verb = cli.VERBS[name]
    if verb.config is not None:
        settings = text.partition("\nsettings (")[2].partition("\npositional arguments")[0]
        shown = dict(re.findall(r"^  ([\w.]+)=(.*)$", settings, flags=re.MULTILINE))
        assert set(shown) == set(leaves(to_dict(verb.config())))
        comments = [value for value in shown.values() if re.search(r"  \(.+\)$", value)]
        assert len(comments) >= len(shown) / 4
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", example[1])]
    cli.run(words[1:])  # the example works as it stands
    assert [one[0] for one in calls] == [name]


def test_flags_files_and_overrides_become_one_config(calls: list[Any], tmp_path: Any) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("clips: 5\nout: from_file\nseed: 2\n")
    cli.run(["prepare", "--config", str(path), "seed=3", "--out", "a b: 1", "--source", "gifs"])
    cli.run(["prepare", "--out", "flag", "out=override"])
    cli.run(["generate", "--model", "m", "--prompt", "a", "top_k=5", "--prompt", "b"])
    cli.run(["demo"])
    (_, first, _), (_, second, _), (_, third, flags), (_, fourth, _) = calls
    assert first == PrepareConfig(source="gifs", out="a b: 1", clips=5, seed=3)
    assert second.out == "override"
    assert third == SamplingConfig(top_k=5)
    assert (flags.prompt, flags.out, flags.sheet) == (["a", "b"], "clip.gif", None)
    assert isinstance(fourth, DemoConfig)
    assert fourth.prepare.image_size == 64  # its recipe is read unasked


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=0"])
def test_the_launchers_flag_is_ignored_wherever_it_stands(at: int, flag: str, calls: list[Any]) -> None:
    arguments = ["train-vqvae", "--data", "raw", "seed=4", "train.steps=5"]
    before = arguments.copy()
    if at != 2:  # between a flag and its value no launcher puts it
        arguments.insert(at, flag)
    cli.run(arguments)
    cli.run(before)
    assert calls[0][:2] == calls[1][:2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prepair"], "unknown verb 'prepair': did you mean 'prepare'?"),
        (["xyz"], "unknown verb 'xyz': valid: demo, doctor,"),
        (["prepare", "--sauce", "x"], "unrecognized arguments: --sauce"),
        (["prepare", "--sou", "x"], "unrecognized arguments: --sou"),  # no abbreviations: a new flag would break them
        (["prepare", "--out"], "argument --out: expected one argument (see t2v prepare --help)"),
        (["prepare", "stray"], "override 'stray' is not of the form key=value"),
        (["prepare", "clisp=3"], "unknown setting 'clisp' in the command line: did you mean 'clips' or"),
        (["train-vqvae", "--config", "tgif_vqva"], "did you mean 'tgif_vqvae'"),
        (["doctor", "seed=1"], "unrecognized arguments: seed=1"),
        (["generate", "--prompt", "a"], "--model is not given"),
        (["generate", "--model", "m"], "--prompt is empty"),
        (["generate", "--model", "m", "--prompt", "a", "--prompt", "  "], "--prompt is empty"),
        (["generate", "--model", "m", "--prompt", "a", "--out", "x.avi"], "--out is 'x.avi'; allowed: a file name that ends in .gif or"),
        (["generate", "--model", "m", "--prompt", "a", "--sheet", "x.jpg"], "--sheet is 'x.jpg'; allowed: a file name that ends in .png"),
        (["generate", "--model", "m", "--prompt", "a", "--out", "/proc/x.gif"], "--out is '/proc/x.gif', where no file can be"),
        (["generate", "--model", "m", "--prompt", "a", "--out", "/dev/null/x.gif"], "'/dev/null/x.gif', where no file can be"),
        (["generate", "--model", "m", "--prompt", "a", "--sheet", "/dev/null/a/x.png"], "--sheet is '/dev/null/a/x.png', where no file"),
        (["generate", "--model", "m", "--prompt", "a", "--begin-frames", "2"], "--begin-frames is given without --begin"),
        (["generate", "--model", "m", "--prompt", "a", "--begin", "x.gif", "--begin-frames", "0"], "--begin-frames is '0'; allowed: a"),
        (["plan", "--json", "/"], "--json is '/', which is a folder; allowed: a file name"),
        (["plan", "--json", "/proc/x.json"], "--json is '/proc/x.json', where no file can be"),
        (["evaluate", "--model", "m", "--data", "x", "--out", "/dev/null/ev"], "--out is '/dev/null/ev', where no folder can be"),
        (["demo", "--out", "/dev/null"], "--out is '/dev/null', which is a file; allowed: a folder"),
        (["prepare", "--source", "moving-shapes", "--out", "/dev/null"], "--out is '/dev/null', which is a file; allowed: a folder"),
        (["merge", "--out", "/proc/x"], "--out is '/proc/x', where no folder can be"),
        (["tokenize", "--data", "x", "--out", "y"], "--tokenizer is not given"),
        (["train-transformer", "--data", "x"], "--out is not given"),
        (["train-vqvae", "--out", "x"], "--data is not given"),
        (["prepare"], "setting 'out' is empty"),
        (["demo", "prepare.source=gifs", "--out", "/nonexistent"], "the demo allows only 'moving-shapes'"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.run(arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_place_to_write_is_tried_without_leaving_anything(tmp_path: Path) -> None:
    (tmp_path / "dir.gif").mkdir()
    with pytest.raises(ConfigError, match=r"dir.gif', which is a folder; allowed: a file name"):
        cli.run(["generate", "--model", "m", "--prompt", "a", "--out", str(tmp_path / "dir.gif")])
    require_writable("--out", tmp_path / "new" / "folder" / "x.gif")
    require_writable("--out", tmp_path / "dir.gif", folder=True)
    with pytest.raises(ConfigError, match="where no file can be made: File name too long"):
        require_writable("--out", tmp_path / f"{'x' * 255}.gif")
    assert [path.name for path in tmp_path.rglob("*")] == ["dir.gif"]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("the shard is gone"), 2, "t2v: error: the shard is gone\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x.tar"), 2, "t2v: error: the disk is full (/data/x.tar): make room, then"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "t2v: error: the disk is full: make room, then"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x.tar"), 2, "t2v: error: the disk is full (/data/x.tar)"),
        (OSError(errno.EACCES, "Permission denied", "/data"), 2, "t2v: error: /data: Permission denied; allow it, or choose another place"),
        (KeyboardInterrupt(), 130, "t2v: error: interrupted; run the same command again to go on\n"),
        (SystemExit(143), 143, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: None
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setitem(cli.VERBS, "doctor", dataclasses.replace(cli.VERBS["doctor"], run=fail))
    monkeypatch.setattr(sys, "argv", ["t2v", "doctor"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(says) if says else output.err == ""
    assert output.err.count("\n") == bool(says)


def test_bugs_keep_their_traceback_and_ranks_their_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: None
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(cli.VERBS, "doctor", dataclasses.replace(cli.VERBS["doctor"], run=fail))
    monkeypatch.setattr(sys, "argv", ["t2v", "doctor"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(sys, "argv", ["t2v", "doctr"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == "t2v: error (rank 3): unknown verb 'doctr': did you mean 'doctor'?\n"


def test_the_real_command_in_a_process_of_its_own() -> None:
    def t2v(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "t2v_ds", *arguments], env=environment(), capture_output=True, text=True, timeout=60)

    done = t2v("--version")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, __version__, "")
    done = t2v("generat")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "t2v: error: unknown verb 'generat': did you mean 'generate'?\n")
    closed = subprocess.run(
        f"'{sys.executable}' -m t2v_ds prepare --help | head -c 10 > /dev/null; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in closed.stderr
    heavy = "import sys; from t2v_ds import cli; assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules), 'slow to start'"
    assert subprocess.run([sys.executable, "-c", heavy], env=environment(), timeout=60).returncode == 0
