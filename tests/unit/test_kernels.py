"""The nearest code is the nearest code, in exact arithmetic: on every path, on data made to be hard, with ties and with bad rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2v_ds.kernels import build, lookup, native, ops, reference, vq_assign, vq_lookup

PATHS = ("reference", "portable", "avx2", "avx512", "bf16", "amx")  # a processor without one takes the best that it has
SHAPES = ((1, 2, 1), (37, 1, 5), (300, 130, 8), (257, 1024, 64), (130, 1000, 256), (64, 70, 33))
Data = tuple[Tensor, Tensor]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of computing, one after another."""
    assert "CPU" in native.available()
    if request.param == "reference":
        plain = {"lookup": ops._reference_lookup, "assign": ops._reference_assign}
        monkeypatch.setattr(lookup, "_call", lambda operator, *arguments: plain[operator.__name__.split(".")[0]](*arguments))
        monkeypatch.setattr(reference, "_CPU_SCORES", 2**15)  # several chunks
    else:
        monkeypatch.setenv("T2V_VQ_CPU", request.param)
    return str(request.param)


def gaussian(n: int, k: int, d: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(1000 * seed + k)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def clusters(n: int, k: int, d: int, seed: int) -> Data:
    noise, codebook = gaussian(n, k, d, seed)
    return codebook[torch.arange(n) * 7 % k] + 0.1 * noise, codebook


def offset(by: float) -> Callable[[int, int, int, int], Data]:
    return lambda *shape: (gaussian(*shape)[0] + by, gaussian(*shape)[1] + by)


def fresh(n: int, k: int, d: int, seed: int) -> Data:
    latents, codebook = gaussian(n, k, d, seed)
    return latents, torch.erf(codebook) / k  # between -1/K and 1/K


def duplicated(n: int, k: int, d: int, seed: int) -> Data:
    latents, codebook = gaussian(n, k, d, seed)
    return latents, codebook[torch.arange(k) * 5 % max(1, k // 3)]


def equal_to_codes(n: int, k: int, d: int, seed: int) -> Data:
    _, codebook = gaussian(n, k, d, seed)
    return codebook[torch.arange(n) % k].clone(), codebook


def midpoints(n: int, k: int, d: int, seed: int) -> Data:
    _, codebook = gaussian(n, k, d, seed)
    codebook = (codebook * 64).round() / 64  # so that midpoints are exact
    return (codebook[torch.arange(n) % k] + codebook[torch.arange(n) * 3 % k]) / 2, codebook


def scaled(by: float) -> Callable[[int, int, int, int], Data]:
    return lambda *shape: (gaussian(*shape)[0] * by, gaussian(*shape)[1] * by)


def one_code(n: int, k: int, d: int, seed: int) -> Data:
    latents, codebook = gaussian(n, k, d, seed)
    return latents, codebook[:1].repeat(k, 1)


def bf16(n: int, k: int, d: int, seed: int) -> Data:
    latents, codebook = gaussian(n, k, d, seed)
    return latents.bfloat16(), codebook.bfloat16()


def fp16(n: int, k: int, d: int, seed: int) -> Data:
    latents, codebook = gaussian(n, k, d, seed)
    return latents.half(), codebook


def near_ties(n: int, k: int, d: int, seed: int) -> Data:
    """Codes that differ in their last bits: not even float64 tells their distances apart."""
    k = min(k, 20)  # rational numbers are slow
    latents, codebook = gaussian(min(n, 40), k, d, seed)
    ulps = torch.randint(-2, 3, (k, d), generator=torch.Generator().manual_seed(seed))
    base = codebook[:1].expand(k, d).contiguous()
    return latents * 2.0**20, (base.view(torch.int32) + ulps).int().view(torch.float32)


KINDS: dict[str, Callable[[int, int, int, int], Data]] = {
    "gaussian": gaussian, "clusters": clusters, "mean +100": offset(100.0), "mean +1e4": offset(1e4), "fresh": fresh,
    "duplicated": duplicated, "equal to codes": equal_to_codes, "midpoints": midpoints, "denormal": scaled(1e-41),
    "1e30": scaled(1e30), "largest": scaled(5e37), "one code": one_code, "bf16": bf16, "fp16": fp16, "near ties": near_ties,
}  # fmt: skip


def exact(latents: Tensor, codebook: Tensor) -> Tensor:
    """The definition: float64 for all, rational numbers for what float64 leaves open."""
    x, rows = latents.float().double(), codebook.float().double()
    codes = []
    for one in x:
        distances = (one - rows).square().sum(1)
        near = (distances <= distances.min() * (1 + 1e-9)).nonzero().flatten().tolist()
        best = near[0]
        if len(near) > 1:
            wanted = [Fraction(value) for value in one.tolist()]
            exactly = [sum((a - Fraction(b)) ** 2 for a, b in zip(wanted, rows[code].tolist(), strict=True)) for code in near]
            best = near[exactly.index(min(exactly))]
        codes.append(best)
    return torch.tensor(codes, dtype=torch.int64)


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, tuple[int, int, int], int], Tensor]:
    """The exact codes, worked out once for all paths."""
    return {}


@pytest.mark.parametrize("kind", KINDS)
def test_no_code_is_wrong(kind: str, path: str, answers: dict[tuple[str, tuple[int, int, int], int], Tensor]) -> None:
    for shape in SHAPES:
        for seed in range(3):
            latents, codebook = KINDS[kind](*shape, seed)
            key = (kind, shape, seed)
            if key not in answers:
                distinct, inverse = torch.unique(codebook, dim=0, return_inverse=True)  # rational numbers are slow: no copies
                first = torch.tensor([int((inverse == i).nonzero()[0]) for i in range(len(distinct))])
                order = first.argsort()
                answers[key] = first[order][exact(latents, distinct[order])]
            assert torch.equal(vq_lookup(latents, codebook), answers[key]), (kind, shape, seed)


def test_no_latents_no_codes(path: str) -> None:
    latents, codebook = gaussian(0, 16, 4, 0)
    assert vq_lookup(latents, codebook).shape == (0,)
    codes, quantized, counts, sums = vq_assign(latents, codebook)
    assert (codes.shape, quantized.shape, float(counts.sum()), float(sums.abs().sum())) == ((0,), (0, 4), 0.0, 0.0)


def test_any_memory_layout(path: str) -> None:
    latents, codebook = gaussian(100, 40, 48, 0)
    expected = vq_lookup(latents, codebook)
    assert torch.equal(vq_lookup(latents.T.contiguous().T, codebook.repeat(1, 2)[:, :48]), expected)
    assert torch.equal(vq_lookup(latents.repeat_interleave(2, 0)[::2], codebook), expected)


def test_fp32_whatever_the_surroundings_say(path: str) -> None:
    latents, codebook = gaussian(500, 512, 32, 0)
    codes = vq_lookup(latents, codebook)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(vq_lookup(latents, codebook), codes)
            _, quantized, counts, sums = vq_assign(latents, codebook)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert quantized.dtype == counts.dtype == sums.dtype == torch.float32


def test_assign_collects_exact_statistics(path: str) -> None:
    latents, codebook = gaussian(600, 40, 6, 0)
    latents = (latents * 64).round() / 64  # sums of these have no rounding
    codes, quantized, counts, sums = vq_assign(latents, codebook)
    assert torch.equal(codes, vq_lookup(latents, codebook))
    assert torch.equal(quantized, codebook[codes])
    for code in range(40):
        mine = latents[codes == code]
        assert int(counts[code]) == len(mine)
        assert torch.equal(sums[code], mine.sum(0))


@pytest.mark.parametrize("kind", ["fresh", "midpoints", "one code", "mean +1e4", "1e30"])
def test_where_rounding_leaves_much_undecided(kind: str, path: str) -> None:
    for shape in ((1200, 300, 40), (900, 60, 3)):  # enough to try every precision
        latents, codebook = KINDS[kind](*shape, 0)
        assert torch.equal(vq_lookup(latents, codebook), reference.lookup(latents, codebook))


@pytest.mark.parametrize("d", [2, 4, 8, 9, 16, 33, 64])
@pytest.mark.parametrize("scale", [1, 2, 1024])
def test_products_of_what_bf16_cuts_off(d: int, scale: int, path: str) -> None:
    """All numbers are rounded by nearly half a unit of bf16, in ways whose products add up: what split bf16 drops is as large as can be."""
    v, w = 1 + 2.0**-8 - 2.0**-20, 1 + 2.0**-8 + 2.0**-20  # as bf16: 1, cut off +2^-8; 1 + 2^-7, cut off -2^-8
    x, a, b = ([Fraction(one)] * (d - 1) for one in (scale * v, v, w))
    for k in range(1, 4000):  # the last coordinate makes a the nearer one by a hair
        last = Fraction(float(torch.tensor(k * 2.0**-22).bfloat16()))
        nearer = sum((p - q) ** 2 for p, q in zip([*x, scale], [*a, last], strict=True))
        if nearer < sum((p - q) ** 2 for p, q in zip([*x, scale], [*b, 0], strict=True)):
            break
    rows = torch.tensor([[*map(float, a), float(last)], [*map(float, b), 0.0]])
    codebook = torch.cat([rows, -rows])
    latents = torch.tensor([[*map(float, x), float(scale)]]).repeat(600, 1)  # enough for the second precision
    assert (vq_lookup(latents, codebook) == 0).all()


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "bf16", "amx"])
def test_subnormal_numbers_count_whatever_torch_flushes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2V_VQ_CPU", name)
    problems = [(0.0 + KINDS["denormal"](300, 130, 8, 0)[0], KINDS["denormal"](300, 130, 8, 0)[1])]
    problems += [(torch.tensor([[0.0, 1, 1, 1]]), torch.tensor([[1e-40, 1, 1, 1], [0, 1, 1, 1]]))]
    problems += [(gaussian(400, 64, 8, 1)[0] * 2.0**-125, gaussian(400, 64, 8, 1)[1] * 2.0**-125)]
    for latents, codebook in problems:
        expected = vq_lookup(latents, codebook)
        try:
            assert torch.set_flush_denormal(True)
            found = vq_lookup(latents, codebook)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(found, expected)


def test_many_latents(path: str) -> None:
    latents, codebook = clusters(5000, 700, 24, 0)
    codes, quantized, counts, sums = vq_assign(latents, codebook)
    assert torch.equal(codes, reference.lookup(latents, codebook))
    assert torch.equal(quantized, codebook[codes])
    assert torch.equal(counts, torch.bincount(codes, minlength=700).float())
    torch.testing.assert_close(sums, torch.zeros(700, 24, dtype=torch.float64).index_add_(0, codes, latents.double()).float())


OPERATORS = """
import sys, torch
from t2v_ds.kernels import ops, vq_assign, vq_lookup

ops.ready()
latents, codebook, weights = torch.randn(37, 33, requires_grad=True), torch.randn(21, 33, requires_grad=True), torch.randn(37, 33)
for arguments in ((latents, codebook.detach()), (latents.detach(), codebook.detach()), (latents.detach().bfloat16(), codebook.detach())):
    torch.library.opcheck(torch.ops.t2v_vq.lookup.default, (*arguments, False))
    torch.library.opcheck(torch.ops.t2v_vq.assign.default, (*arguments, True))

def loss(latents, codebook):
    codes, quantized, counts, sums = vq_assign(latents, codebook)
    return (quantized * weights).sum() + 0 * vq_lookup(latents, codebook).sum() + 0 * counts.sum() + 0 * sums.sum()

for function in (loss, torch.compile(loss, fullgraph=True)):
    latents.grad = None
    function(latents, codebook).backward()
    assert torch.equal(latents.grad, weights) and codebook.grad is None
half = latents.detach().bfloat16().requires_grad_()
vq_assign(half, codebook)[1].sum().backward()
assert half.grad.dtype == torch.bfloat16
bad = latents.detach().clone()
bad[5] = float("nan")
try:
    torch.compile(vq_lookup, fullgraph=True)(bad, codebook.detach())
except (RuntimeError, ValueError) as error:
    assert "latents row 5 holds NaN or infinity" in str(error)
else:
    sys.exit("no error")
"""


@pytest.mark.parametrize("switch", ["reference", "compiled"])
def test_operators_can_be_traced_compiled_and_differentiated(switch: str) -> None:
    environment = {**os.environ, "T2V_VQ": switch}
    done = subprocess.run([sys.executable, "-c", OPERATORS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert ("plain torch" in done.stderr) == (switch == "reference")


def test_threads_change_nothing() -> None:
    latents, codebook = gaussian(5000, 64, 16, 0)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(vq_assign(latents, codebook))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_is_named_or_marked(value: float, path: str) -> None:
    latents, codebook = gaussian(300, 100, 8, 0)
    expected = vq_lookup(latents, codebook)
    latents[217, 3] = value
    expected[217] = -1
    assert torch.equal(vq_lookup(latents, codebook, mark_bad=True), expected)
    with pytest.raises(ValueError, match="latents row 217 holds NaN or infinity"):
        vq_assign(latents, codebook)
    codebook[5, 1] = value
    with pytest.raises(ValueError, match="codebook row 5 holds NaN or infinity"):
        vq_lookup(latents, codebook)


def test_types_and_shapes_are_checked() -> None:
    latents, codebook = gaussian(10, 300, 4, 0)
    assert vq_lookup(latents.bfloat16(), codebook, torch.int16).dtype == torch.int16
    assert torch.equal(vq_lookup(latents, codebook, torch.int32).long(), vq_lookup(latents, codebook))
    with pytest.raises(ValueError, match="uint16 cannot be -1, as mark_bad=True asks"):
        vq_lookup(latents, codebook, torch.uint16, mark_bad=True)
    with pytest.raises(ValueError, match="uint8 cannot name 300"):
        vq_lookup(latents, codebook, torch.uint8)
    with pytest.raises(ValueError, match=r"\[10, 4\] and the codebook is \[300, 3\]"):
        vq_lookup(latents, codebook[:, :3])
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16"):
        vq_lookup(latents.double(), codebook)
    for shape in ((0, 4), (65_537, 4), (3, 1025)):
        with pytest.raises(ValueError, match="it can have 1 to 65536 rows of 1 to 1024 numbers"):
            vq_lookup(torch.zeros(2, shape[1]), torch.zeros(shape))
    with pytest.raises(ValueError, match="one device"):
        vq_lookup(latents, codebook.to("meta"))


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2V_VQ_CPU", "AVX2")
    with pytest.raises(RuntimeError, match="T2V_VQ_CPU is 'AVX2'; it can be portable, avx2, avx512, bf16 or amx"):
        vq_lookup(*gaussian(3, 4, 5, 0))


def test_a_cut_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = build.library_name(build.TARGETS["CPU"])
    whole = build.library("CPU")
    assert build.library("CPU") == whole
    if whole.parent != build.HERE:
        content = whole.read_bytes()
        for damaged in (content[:60_000], b"", content[:1000] + b"x" + content[1001:]):
            whole.write_bytes(damaged)
            assert build.find_library("CPU") is None
        assert build.library("CPU").read_bytes() == content
        assert [path.name for path in whole.parent.iterdir()] == [name]


def test_the_reference_keeps_fp32_whatever_api_has_set_the_precision() -> None:
    program = (
        "import torch; from t2v_ds.kernels import vq_lookup; torch.backends.mkldnn.matmul.fp32_precision = 'bf16'; "
        "g = torch.Generator().manual_seed(0); x, c = torch.randn(500, 32, generator=g), torch.randn(300, 32, generator=g); "
        "codes = vq_lookup(x, c); assert torch.equal(codes, torch.cdist(x.double(), c.double()).argmin(1)); "
        "assert torch.backends.mkldnn.matmul.fp32_precision == 'bf16'"
    )
    environment = {**os.environ, "T2V_VQ": "reference"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_or_with_a_broken_one_there_is_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "library_name", lambda target: "another.so")  # none is there under this name
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in native._load("CPU")
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'vq_cpu.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert "failed: vq_cpu.cpp:1: error: no such thing" in native._load("CPU")
    assert [one.name for one in tmp_path.rglob("*") if one.is_file()] == ["g++"]  # nothing half-made is left
    monkeypatch.setenv("T2V_VQ", "reference")
    assert native._load("CPU") == "T2V_VQ=reference"
