"""Imports go down the layers, only three files know DeepSpeed, and only the command line prints."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A module may import from its own layer and from those above it in this list.
LAYERS = [
    {"config", "config_loader", "errors", "files", "ds_configs", "configs"},
    {"data", "kernels"},
    {"models", "losses"},
    {"training"},
    {"merge", "tokenize", "generate", "evaluation", "safety", "doctor"},
    {"pipeline", ""},  # "" is t2v_ds/__init__.py, which offers load_tokenizer and load_generator
    {"cli", "__main__"},
]
DEEPSPEED_ALLOWED = {"training/engine.py", "training/checkpoint.py", "training/sequence_parallel.py"}
PRINT_ALLOWED = {"cli.py", "__main__.py", "kernels/bench.py"}


def layer_of(module: str) -> int:
    """Layer of the first name below t2v_ds, such as "data"."""
    for index, names in enumerate(LAYERS):
        if module in names:
            return index
    raise AssertionError(f"t2v_ds.{module} has no layer: place it in LAYERS, and in docs/architecture.md")


def imported(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, at any depth; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def prints(tree: ast.AST) -> Iterator[int]:
    """Lines that write to the terminal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
            yield node.lineno


def violations(root: Path) -> list[str]:
    """Every breach of the rules in `root`/t2v_ds and `root`/kernels, as "file:line: what"."""
    files = [(path, path.relative_to(root / "t2v_ds")) for path in sorted((root / "t2v_ds").rglob("*.py"))]
    files += [(path, "kernels" / path.relative_to(root / "kernels")) for path in sorted((root / "kernels").rglob("*.py"))]
    found = []
    for path, name in files:
        top = name.parts[0].removesuffix(".py") if name != Path("__init__.py") else ""
        own = layer_of(top)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, target in imported(tree, ["t2v_ds", *name.parent.parts]):
            first, _, rest = target.partition(".")
            if first == "deepspeed" and name.as_posix() not in DEEPSPEED_ALLOWED:
                found.append(f"{name}:{line}: imports {target}")
            if first != "t2v_ds":
                continue
            below = rest.split(".")[0]
            if top == "kernels" and below != "kernels":
                found.append(f"{name}:{line}: kernels import nothing else of the project, but {target}")
            known = any(below in names for names in LAYERS)  # else a name that t2v_ds/__init__.py defines
            if layer_of(below if known else "") > own:
                found.append(f"{name}:{line}: layer {own} imports {target}")
        if name.as_posix() not in PRINT_ALLOWED:
            found += [f"{name}:{line}: prints" for line in prints(tree)]
    return found


def test_the_code_keeps_its_layers() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("t2v_ds/data/a.py", "def f():\n    from t2v_ds.models.vqvae import x\n", "data/a.py:2: layer 1 imports t2v_ds.models.vqvae.x"),
        ("t2v_ds/data/a.py", "from ..training import loop\n", "data/a.py:1: layer 1 imports t2v_ds.training.loop"),
        ("t2v_ds/config.py", "from t2v_ds import data\n", "config.py:1: layer 0 imports t2v_ds.data"),
        ("t2v_ds/models/a.py", "from t2v_ds import load_tokenizer\n", "models/a.py:1: layer 2 imports t2v_ds.load_tokenizer"),
        ("t2v_ds/__init__.py", "import t2v_ds.cli\n", "__init__.py:1: layer 5 imports t2v_ds.cli"),
        ("t2v_ds/losses.py", "import deepspeed.comm\n", "losses.py:1: imports deepspeed.comm"),
        ("t2v_ds/training/loop.py", "import importlib\nimportlib.import_module('deepspeed')\n", "training/loop.py:2: imports deepspeed"),
        ("t2v_ds/generate.py", "if True:\n    print('x')\n", "generate.py:2: prints"),
        ("kernels/a.py", "import t2v_ds.errors\n", "kernels/a.py:1: kernels import nothing else of the project, but t2v_ds.errors"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, name: str, source: str, expected: str) -> None:
    (tmp_path / "kernels").mkdir()
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from __future__ import annotations\n")
    assert violations(tmp_path) == []
    path.write_text(source)
    assert violations(tmp_path) == [expected]


def test_what_is_allowed_passes_and_what_has_no_layer_does_not(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "t2v_ds" / "training").mkdir(parents=True)
    (tmp_path / "t2v_ds" / "training" / "engine.py").write_text("import deepspeed\nfrom t2v_ds.models import vqvae\nfrom . import loop\n")
    (tmp_path / "t2v_ds" / "cli.py").write_text("from t2v_ds import pipeline\nprint(1)\n")
    assert violations(tmp_path) == []
    (tmp_path / "t2v_ds" / "novelty.py").write_text("")
    with pytest.raises(AssertionError, match=r"t2v_ds\.novelty has no layer"):
        violations(tmp_path)
