"""The CUDA kernel with no GPU: the same source runs on the host over tests/cuda_shim, and its machine code is looked at.

    kernels/vq_cuda.cu -> g++ over the shim -> threads as fibers in random order -> codes, sums: against exact arithmetic
                       -> with a planted bug -> the same checks must fail
                       -> nvcc -> registers, spills, tensor core and asynchronous copy instructions
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import multiprocessing
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from t2v_ds.kernels import build
from tests.unit.test_kernels import KINDS, Data, gaussian

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*sorted((ROOT / "kernels").glob("vq_cuda*")), ROOT / "kernels/vq.h"]
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
H100 = (233472, 232448)  # shared memory of a multiprocessor, and of a block at most
A100 = (167936, 166912)
# Latents, codes, dimension, multiprocessors, their memory: padding and several tiles in every direction, blocks of 128, 64 and 32 rows.
SHAPES = (
    (1, 2, 1, 1, H100), (37, 1, 5, 1, H100), (140, 130, 8, 1, H100), (70, 300, 33, 1, A100), (40, 150, 256, 1, A100),
    (70, 40, 300, 1, H100), (20, 140, 513, 1, H100), (33, 33, 1024, 1, A100), (65, 257, 64, 1000, H100),
)  # fmt: skip


class HostCall(ctypes.Structure):
    """What tests/cuda_shim/entry.h takes."""

    _fields_ = (
        ("latents", ctypes.c_void_p), ("codebook", ctypes.c_void_p), ("rows", ctypes.c_int64), ("codes", ctypes.c_int64),
        ("dim", ctypes.c_int64), ("out", ctypes.c_void_p), ("quantized", ctypes.c_void_p), ("counts", ctypes.c_void_p),
        ("sums", ctypes.c_void_p), ("type", ctypes.c_int32), ("deterministic", ctypes.c_int32), ("mark_bad", ctypes.c_int32),
        ("seed", ctypes.c_uint64), ("processors", ctypes.c_int32), ("shared_of_processor", ctypes.c_int32),
        ("shared_of_block", ctypes.c_int32), ("undecided", ctypes.c_uint32), ("bank_conflicts", ctypes.c_uint64),
        ("message", ctypes.c_char * 512),
    )  # fmt: skip


@dataclass
class Result:
    codes: Tensor
    quantized: Tensor
    counts: Tensor
    sums: Tensor
    undecided: int
    bank_conflicts: int


@dataclass
class Host:
    """The kernels compiled for this machine."""

    library: ctypes.CDLL

    def run(
        self, latents: Tensor, codebook: Tensor, *, assign: bool = True, deterministic: bool = True, mark_bad: bool = False, seed: int = 0,
        processors: int = 1, memory: tuple[int, int] = H100,
    ) -> Result:  # fmt: skip
        """Run once.

        Raises:
            ValueError: the kernels', or the shim's, complaint.
        """
        codebook = codebook.float()
        (n, d), k = latents.shape, len(codebook)
        guard = 64  # numbers behind each result, which nobody may write
        codes = torch.full((n + guard,), -7)
        floats = [torch.full((size + guard,), float("nan")) for size in (n * d, k, k * d)]
        call = HostCall(
            latents.data_ptr(), codebook.data_ptr(), n, k, d, codes.data_ptr(), *(one.data_ptr() if assign else None for one in floats),
            TYPES[latents.dtype], deterministic, mark_bad, seed, processors, *memory,
        )  # fmt: skip
        self.library.t2v_vq_host(ctypes.byref(call))
        if call.message:
            raise ValueError(call.message.decode())
        if not (codes[n:] == -7).all() or not all(one[-guard:].isnan().all() for one in floats):
            raise ValueError("written behind the end of a result")
        quantized, counts, sums = (one[:-guard] for one in floats)
        return Result(codes[:n], quantized.view(n, d), counts, sums.view(k, d), call.undecided, call.bank_conflicts)


def compile_host(folder: Path, edits: dict[str, tuple[str, str]] | None = None) -> Host:
    """Compile a copy of the sources over the shim, after replacing text of some files."""
    for source in SOURCES:
        text = source.read_text()
        if edits and source.name in edits:
            old, new = edits[source.name]
            assert text.count(old) == 1, f"{source.name} holds {text.count(old)} times: {old}"
            text = text.replace(old, new)
        (folder / source.name).write_text(text)
    library = folder / "vq_cuda_host.so"
    command = [*build.compiler_of("CPU"), "-x", "c++", "-O1", "-std=c++20", "-fPIC", "-shared", "-DT2V_CUDA_SHIM", "-Wall", "-Wextra"]
    command += ["-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter", f"-I{ROOT / 'tests/cuda_shim'}", "-o", str(library)]
    done = subprocess.run([*command, str(folder / "vq_cuda.cu")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return Host(ctypes.CDLL(str(library)))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return compile_host(tmp_path_factory.mktemp("vq_cuda"))


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """The exact codes: float64 for what it surely decides, integers (multiples of the smallest number of fp32) for the rest."""
    integers = np.frompyfunc(lambda value: int(math.ldexp(value, 149)), 1, 1)
    x, rows = latents.double(), codebook.double()
    distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(rows)).scatter_reduce_(0, inverse, torch.arange(len(rows)), reduce="amin")
    rows = distinct[first.argsort()]  # copies are looked at once
    first = first.sort().values
    codes = torch.empty(len(x), dtype=torch.int64)
    for i in range(len(x)):
        distances = (x[i] - rows).square().sum(1)
        near = (distances <= distances.min() * (1 + 1e-9)).nonzero().flatten()
        if len(near) > 1:
            exactly = ((integers(rows[near].numpy()) - integers(x[i].numpy())) ** 2).sum(1)
            near = near[int(exactly.argmin()) :]
        codes[i] = first[near[0]]
    return codes


def dyadic(n: int, k: int, d: int, seed: int) -> Data:
    """Latents whose sums have no rounding in any order."""
    latents, codebook = gaussian(n, k, d, seed)
    return (latents * 64).round() / 64, codebook


def closer_than_float64(n: int, k: int, d: int, seed: int) -> Data:
    """Codes that differ in their last bits, seen from so far away, in such directions, that only integers tell their distances apart."""
    latents, codebook = gaussian(min(n, 20), min(k, 100), d, seed)
    ulps = torch.randint(-1, 2, codebook.shape, generator=torch.Generator().manual_seed(seed))
    base = torch.full_like(codebook, 1.5)
    return latents.sign() * 2.0**50 * (1 + latents * 2.0**-18), (base.view(torch.int32) + ulps).int().view(torch.float32)


def opposite_extremes(n: int, k: int, d: int, seed: int) -> Data:
    """Differences that fp32 cannot hold."""
    latents, codebook = gaussian(n, k, d, seed)
    return latents.tanh() * 3.4e38, codebook.sign() * 3e38 * (1 + 0.1 * codebook.tanh())


def far_away(by: float) -> Callable[[int, int, int, int], Data]:
    """Latents beyond fp16's range in units of the codebook, or beyond what the filter takes at all."""
    return lambda n, *shape: (gaussian(min(n, 3), *shape)[0] * by, gaussian(n, *shape)[1] / 1000)


HARDER: dict[str, Callable[[int, int, int, int], Data]] = {
    "dyadic": dyadic, "closer than float64": closer_than_float64, "opposite extremes": opposite_extremes, "1e4 away": far_away(1e4),
    "1e15 away": far_away(1e15), "1e30 away": far_away(1e30),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, *HARDER])
def test_no_code_is_wrong(kind: str, host: Host) -> None:
    for seed, (n, k, d, processors, memory) in enumerate(SHAPES):
        latents, codebook = (KINDS | HARDER)[kind](n, k, d, seed)
        codebook = codebook.float()
        expected = nearest(latents, codebook)
        result = host.run(latents, codebook, seed=seed, processors=processors, memory=memory)
        assert torch.equal(result.codes, expected), (kind, n, k, d)
        assert torch.equal(result.quantized, codebook[expected])
        assert torch.equal(result.counts, torch.bincount(expected, minlength=len(codebook)).float())
        assert result.bank_conflicts == 0
    assert torch.equal(host.run(latents, codebook, assign=False, mark_bad=True).codes, expected)


def test_the_filter_decides_most_and_integers_decide_some(host: Host) -> None:
    latents, codebook = gaussian(250, 512, 64, 0)
    assert 0 < host.run(latents, codebook).undecided < 40
    latents, codebook = closer_than_float64(20, 100, 8, 0)
    assert host.run(latents, codebook).undecided > 0
    distances = (latents.double()[:, None] - codebook.double()).square().sum(2)
    assert (distances.argmin(1) != nearest(latents, codebook)).any()


def test_any_alignment(host: Host) -> None:
    latents, codebook = gaussian(65, 40, 48, 0)
    expected = nearest(latents, codebook)
    for dtype in TYPES:
        moved = torch.cat([torch.zeros(1), latents.flatten()]).to(dtype)[1:].view(65, 48)
        moved_codebook = torch.cat([torch.zeros(1), codebook.flatten()])[1:].view(40, 48)
        result = host.run(moved, moved_codebook)
        assert torch.equal(result.codes, nearest(moved, codebook))
        assert dtype != torch.float32 or torch.equal(result.codes, expected)
        assert torch.equal(result.quantized, codebook[result.codes])


def test_no_latents_no_codes(host: Host) -> None:
    latents, codebook = gaussian(0, 16, 4, 0)
    for deterministic in (False, True):
        result = host.run(latents, codebook, deterministic=deterministic)
        assert float(result.counts.abs().sum()) == float(result.sums.abs().sum()) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_is_named_or_marked(value: float, host: Host) -> None:
    latents, codebook = gaussian(200, 50, 8, 0)
    expected = nearest(latents, codebook)
    latents[131, 3] = latents[190, 7] = value
    expected[131] = expected[190] = -1
    assert torch.equal(host.run(latents, codebook, assign=False, mark_bad=True).codes, expected)
    for assign, deterministic in ((False, True), (True, True), (True, False)):
        with pytest.raises(ValueError, match="latents row 131 holds NaN or infinity"):
            host.run(latents, codebook, assign=assign, deterministic=deterministic)
    codebook[5, 1] = codebook[7, 7] = value
    for assign, deterministic in ((False, True), (True, True), (True, False)):
        with pytest.raises(ValueError, match="codebook row 5 holds NaN or infinity"):
            host.run(latents, codebook, assign=assign, deterministic=deterministic, mark_bad=True)


def complaints(host: Host, schedules: int) -> Iterator[str]:
    """What is wrong under some random schedules: a problem whose sums are exact, one with rounding, one with ties."""
    latents, codebook = dyadic(300, 40, 20, 0)
    expected = nearest(latents, codebook)
    counts = torch.bincount(expected, minlength=40).float()
    sums = torch.zeros(40, 20, dtype=torch.float64).index_add_(0, expected, latents.double()).float()
    rounded, _ = gaussian(300, 40, 20, 1)
    ties, copies = KINDS["midpoints"](64, 150, 40, 0)
    tied = nearest(ties, copies)
    first: dict[int, Tensor] = {}
    for seed in range(schedules):
        try:
            for deterministic in (False, True):
                result = host.run(latents, codebook, deterministic=deterministic, seed=seed)
                if not torch.equal(result.codes, expected) or not torch.equal(result.quantized, codebook[expected]):
                    yield "codes"
                if not torch.equal(result.counts, counts) or not torch.equal(result.sums, sums):
                    yield "sums"
            size = (3, 40)[seed % 2]  # the rows of one of three codes span several pieces
            result = host.run(rounded, codebook[:size], seed=seed)
            if not torch.equal(first.setdefault(size, result.sums), result.sums):
                yield "sums differ from run to run"
            if not torch.allclose(result.sums.sum(0), rounded.sum(0), atol=1e-3):
                yield "sums of all codes"
            if seed % 10 == 0:
                result = host.run(ties, copies, assign=False, seed=seed)
                if not torch.equal(result.codes, tied):
                    yield "ties"
                if result.bank_conflicts:
                    yield "bank conflicts"
        except ValueError as error:
            yield str(error)


def test_100_random_schedules(host: Host) -> None:
    assert list(complaints(host, 100)) == []


BUGS = {
    "no barrier before a stage is read": ("vq_cuda_filter.cuh", "__syncthreads();  // this stage", "// this stage"),
    "no barrier before the ring is reused": (
        "vq_cuda_filter.cuh", "__syncthreads();  // nobody reads the ring", "// nobody reads the ring"),
    "no barrier before classes are read": (
        "vq_cuda_filter.cuh", "  __syncthreads();\n  const int local = threadIdx.x;", "  const int local = threadIdx.x;"),
    "a barrier that half of each warp reaches": (
        "vq_cuda_filter.cuh", "__syncthreads();  // this stage", "if (lane < 16) __syncthreads();  // this stage"),
    "copies are waited for too late": ("vq_cuda_filter.cuh", "copy_async_wait<kStages - 2>()", "copy_async_wait<kStages - 1>()"),
    "copies are never waited for": ("vq_cuda_filter.cuh", "copy_async_wait<kStages - 2>();", ""),
    "rows that lie on the same banks": ("vq_cuda_device.cuh", "return piece ^ ((row >> 1) & 3);", "return (void)row, piece;"),
    "no bound": ("vq_cuda_filter.cuh", "return 2 * error * (1 + 1e-5f);", "return 0 * error;"),
    "the highest of equals": ("vq_cuda_refine.cuh", "(order == 0 && code > code_)", "(order == 0 && code < code_)"),
    "second best scores are forgotten": ("vq_cuda_filter.cuh", "hidden |= second[at] >= threshold;", ""),
    "no rank within a code": ("vq_cuda_statistics.cuh", "static_cast<uint32_t>(*next) + rank]", "static_cast<uint32_t>(*next)]"),
    "a place moves before all have read it": ("vq_cuda_statistics.cuh", "__syncwarp();  // all have read the place that now moves", ""),
    "a piece of a run is lost": ("vq_cuda_statistics.cuh", "piece = first + 1; piece <= last", "piece = first + 2; piece <= last"),
    "no barrier in the scan": (
        "vq_cuda_statistics.cuh", "  __syncthreads();\n  uint32_t before = prefix - own;", "  uint32_t before = prefix - own;"),
}  # fmt: skip


def notice(host: Host, where: Path) -> None:
    faulthandler.disable()
    where.write_text(next(complaints(host, 6), ""))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug: str, tmp_path: Path) -> None:
    name, old, new = BUGS[bug]
    host = compile_host(tmp_path, {name: (old, new)})
    # In a process of its own: what writes anywhere may end it, and is noticed as well.
    process = multiprocessing.get_context("fork").Process(target=notice, args=(host, tmp_path / "found"))
    process.start()
    process.join(6)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode != 0 or (tmp_path / "found").read_text(), f"{bug}: nothing was noticed"


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library that nvcc makes with the project's flags, and what ptxas says of its kernels."""
    library = tmp_path_factory.mktemp("nvcc") / "vq_cuda.so"
    root = Path(torch.__file__).parent
    command = [*build.compiler_of("CUDA"), *build.TARGETS["CUDA"].flags, "-Xptxas", "-v", f"-I{root / 'include'}", "-o", str(library)]
    command += [str(ROOT / "kernels/vq_cuda.cu"), f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return library, done.stderr


CEILINGS = {"filter_kernel": 255, "refine_kernel": 128, "": 64}  # registers; the filter's blocks of 128 threads still fit twice


def test_no_kernel_spills(machine_code: tuple[Path, str]) -> None:
    pattern = r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    kernels = re.findall(pattern, machine_code[1], re.DOTALL)
    assert {architecture for _, architecture, *_ in kernels} == {"80", "90"}
    assert len(kernels) == 2 * 13
    for name, architecture, stores, loads, registers in kernels:
        assert (stores, loads) == ("0", "0"), (name, architecture)
        ceiling = next(most for part, most in CEILINGS.items() if part in name)
        assert int(registers) <= ceiling, (name, architecture, registers)


def test_the_filter_uses_tensor_cores_and_asynchronous_copies(machine_code: tuple[Path, str], tmp_path: Path) -> None:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    shutil.copy(machine_code[0], tmp_path / "library.so")
    subprocess.run([tools / "cuobjdump", "-xelf", "all", "library.so"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    filters = {}
    for binary in tmp_path.glob("*.cubin"):
        text = subprocess.run([tools / "nvdisasm", binary], check=True, capture_output=True, text=True, timeout=300).stdout
        for function in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
            if "filter_kernel" in function.splitlines()[0]:
                name = re.match(r"\w+", function)
                assert name
                filters[name[0], "sm_90" in binary.name] = function
    assert len(filters) == 2 * 3
    for function in filters.values():
        assert "HMMA.16816.F32" in function
        assert "LDGSTS" in function
        assert "LDSM" in function


def test_the_library_registers_both_operators(machine_code: tuple[Path, str]) -> None:
    """In a process of its own, over a schema as the CPU's library has it."""
    program = f"""
import torch
library = torch.library.Library("t2v_vq", "DEF")
library.define("lookup(Tensor latents, Tensor codebook, bool mark_bad) -> Tensor")
library.define("assign(Tensor latents, Tensor codebook, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)")
torch.ops.load_library({str(machine_code[0])!r})
print([torch._C._dispatch_has_kernel_for_dispatch_key("t2v_vq::" + name, "CUDA") for name in ("lookup", "assign")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[True, True]\n", done.stderr
