"""Time the lookup against other ways of finding the nearest code, and count the codes that each gets wrong.

    python kernels/bench.py [--device cpu|cuda] [--latents 16384] [--threads 1] [--repeats 7] [--shapes 1024x256,8192x64]
                            [--data gaussian|fresh] [--write docs/kernel.md]

    for each shape: a process for each way -> warm-up, memory, codes -> rounds: every way once, one after another -> medians

A way has a process of its own because a library reads OPENBLAS_CORETYPE but once, and because memory that one way has freed would
hide what the next one takes. Ways that are not installed (pip install -e '.[bench]') are named and left out. `--write` replaces
the part of a file between the lines "<!-- bench DEVICE -->" and "<!-- end -->".
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Way = Callable[[Tensor, Tensor], Tensor]
OURS = "t2v_ds vq_lookup"


def ours(device: str) -> Way:
    """The lookup."""
    from t2v_ds.kernels import vq_lookup

    return vq_lookup


def ours_assign(device: str) -> Way:
    """The lookup with the codebook rows, counts and sums."""
    from t2v_ds.kernels import vq_assign

    return lambda x, c: vq_assign(x, c)[0]


def ours_plain(device: str) -> Way:
    """The lookup where nothing is compiled."""
    from t2v_ds.kernels import reference

    return reference.lookup


def cdist(device: str) -> Way:
    """The obvious way."""
    return lambda x, c: torch.cdist(x, c).argmin(1)


def _expanded(x: Tensor, c: Tensor) -> Tensor:
    return (x.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * x @ c.T).argmin(1)


def expanded(device: str) -> Way:
    """|x|² + |c|² - 2 x·c, the usual way."""
    return _expanded


def compiled(device: str) -> Way:
    """The same, compiled."""
    return torch.compile(_expanded)


def addmm(device: str) -> Way:
    """|c|²/2 - x·c."""
    return lambda x, c: torch.addmm(c.square().sum(1) / 2, x, c.T, alpha=-1).argmin(1)


def chunked(device: str) -> Way:
    """The same for 256 latents at a time."""

    def way(x: Tensor, c: Tensor) -> Tensor:
        bias = c.square().sum(1) / 2
        return torch.cat([torch.addmm(bias, part, c.T, alpha=-1).argmin(1) for part in x.split(256)])

    return way


def bf16(device: str) -> Way:
    """With a bf16 matrix product."""
    return lambda x, c: (c.square().sum(1) / 2 - (x.bfloat16() @ c.bfloat16().T).float()).argmin(1)


def faiss(device: str) -> Way:
    """IndexFlatL2."""
    import faiss as library  # type: ignore[import-not-found]

    library.omp_set_num_threads(torch.get_num_threads())

    def way(x: Tensor, c: Tensor) -> Tensor:
        index = library.IndexFlatL2(c.shape[1])
        index.add(c.numpy())
        return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])

    return way


def sklearn(device: str) -> Way:
    """pairwise_distances_argmin."""
    from sklearn.metrics import pairwise_distances_argmin

    return lambda x, c: torch.from_numpy(pairwise_distances_argmin(x.numpy(), c.numpy()))


def vector_quantize_pytorch(device: str) -> Way:
    """VectorQuantize."""
    from vector_quantize_pytorch import VectorQuantize  # type: ignore[import-not-found]

    def way(x: Tensor, c: Tensor) -> Tensor:
        layer = VectorQuantize(dim=c.shape[1], codebook_size=len(c)).to(x.device).eval()
        layer.codebook = c
        with torch.no_grad():
            return layer(x[None])[1][0]

    return way


# Name -> (how it is made, environment, devices)
WAYS: dict[str, tuple[Callable[[str], Way], dict[str, str], str]] = {
    OURS: (ours, {}, "cpu cuda"),
    "t2v_ds vq_assign": (ours_assign, {}, "cpu cuda"),
    "t2v_ds, not compiled": (ours_plain, {}, "cpu cuda"),
    "torch.cdist + argmin": (cdist, {}, "cpu cuda"),
    "x² + c² - 2xc, argmin": (expanded, {}, "cpu cuda"),
    "the same, torch.compile": (compiled, {}, "cpu cuda"),
    "addmm + argmin": (addmm, {}, "cuda"),
    "addmm + argmin, 256 rows at a time": (chunked, {}, "cpu"),
    "bf16 matmul + argmin": (bf16, {}, "cpu cuda"),
    "faiss IndexFlatL2, OPENBLAS_CORETYPE=SkylakeX": (faiss, {"OPENBLAS_CORETYPE": "SkylakeX"}, "cpu"),
    "faiss IndexFlatL2, OPENBLAS_CORETYPE=Haswell": (faiss, {"OPENBLAS_CORETYPE": "Haswell"}, "cpu"),
    "sklearn pairwise_distances_argmin": (sklearn, {}, "cpu"),
    "vector-quantize-pytorch": (vector_quantize_pytorch, {}, "cpu cuda"),
}


def draw(kind: str, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Latents [n, d] and a codebook [k, d]."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    return latents, codebook / k if kind == "fresh" else codebook


def resident(name: str) -> int:
    """Bytes of this process, by a line of /proc/self/status: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def extra_memory(way: Way, x: Tensor, c: Tensor) -> int:
    """Bytes that a call takes at most beyond what is there."""
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way(x, c)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    way(x, c)
    return resident("VmHWM") - before


def work(pipe: Connection, name: str, device: str, threads: int, draws: tuple[str, int, int, int]) -> None:
    """What the process of a way does: send (codes, bytes), then for each question the milliseconds of a call; or send why it cannot."""
    torch.set_num_threads(threads)
    try:
        way = WAYS[name][0](device)
    except ImportError as error:
        pipe.send(f"not installed: {error.name}")
        return
    kind, n, k, d = draws
    x, c = (one.to(device) for one in draw(kind, n, k, d))
    try:
        way(x[:300], c[:50].clone())
        memory = extra_memory(way, x, c)
        pipe.send((way(x, c).cpu(), memory))
    except (RuntimeError, MemoryError) as error:
        pipe.send(" ".join(str(error).split())[:100])
        return
    while pipe.recv():
        start = time.perf_counter()
        way(x, c)
        if device == "cuda":
            torch.cuda.synchronize()
        pipe.send(1e3 * (time.perf_counter() - start))


class Worker:
    """The process of a way."""

    def __init__(self, name: str, *arguments: Any) -> None:
        before = dict(os.environ)
        os.environ.update(WAYS[name][1])
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, name, *arguments), daemon=True)
        self.process.start()
        theirs.close()
        os.environ.clear()
        os.environ.update(before)
        self.times: list[float] = []
        try:
            self.first: tuple[Tensor, int] | str = self.pipe.recv()
        except EOFError:
            self.first = "its process died"

    def measure(self) -> None:
        """Time a call."""
        self.pipe.send(True)
        self.times.append(self.pipe.recv())

    def stop(self) -> None:
        """End the process."""
        if self.process.is_alive() and not isinstance(self.first, str):
            self.pipe.send(False)
        self.process.join()


def wrong(codes: Tensor, x: Tensor, c: Tensor) -> int:
    """Latents that have a code farther away than another one, in float64."""
    count = 0
    for part, own in zip(x.split(2048), codes.long().split(2048), strict=True):
        distances = torch.cdist(part.double(), c.double(), compute_mode="donot_use_mm_for_euclid_dist")
        count += int((distances.gather(1, own[:, None])[:, 0] > distances.amin(1) * (1 + 1e-14)).sum())
    return count


def peak(device: str) -> float:
    """GF/s of a large matrix product, the faster of fp32 and bf16."""
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048 if device == "cpu" else 8192, 2048 if device == "cpu" else 8192, device=device).to(dtype)
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * len(a) ** 3 / (time.perf_counter() - start) / 1e9)
    return best


def table(shape: str, flags: argparse.Namespace, roof: float) -> list[str]:
    """Lines of the table for a shape "KxD"."""
    k, d = (int(one) for one in shape.split("x"))
    x, c = draw(flags.data, flags.latents, k, d)
    names = [name for name, (_, _, devices) in WAYS.items() if flags.device in devices]
    workers = {name: Worker(name, flags.device, flags.threads, (flags.data, flags.latents, k, d)) for name in names}
    running = {name: worker for name, worker in workers.items() if not isinstance(worker.first, str)}
    for _ in range(flags.repeats):
        for worker in running.values():
            worker.measure()
    lines = [f"K, D = {k}, {d}", "", "| way | ms | ratio | GF/s | % of peak | extra MiB | wrong codes |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    unit = statistics.median(running[OURS].times)
    for name, worker in workers.items():
        worker.stop()
        if isinstance(worker.first, str):
            lines.append(f"| {name} | {worker.first} | | | | | |")
            continue
        codes, memory = worker.first
        median = statistics.median(worker.times)
        rate = 2 * len(x) * k * d / median / 1e6
        lines.append(
            f"| {name} | {median:.{2 if median < 10 else 1}f} | {median / unit:.2f} | {rate:.0f} | {100 * rate / roof:.0f} | "
            f"{memory / 2**20:.0f} | {wrong(codes, x, c)} |"
        )
    return [*lines, ""]


def processor(device: str) -> str:
    """Its name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in about if line.startswith("model name")), platform.processor())
    flags = next((line for line in about if line.startswith("flags")), "").split()
    return f"{name} ({' '.join(one for one in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if one in flags)})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", default="1024x256,1024x64,8192x64,16384x8")
    parser.add_argument("--data", choices=("gaussian", "fresh"), default="gaussian")
    parser.add_argument("--write", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    roof = peak(flags.device)
    lines = [
        f"{processor(flags.device)}, N = {flags.latents:,}, {flags.data} data, threads: {flags.threads}, torch {torch.__version__}; "
        f"medians of {flags.repeats}, interleaved; peak: the fastest matrix product, {roof:.0f} GF/s.",
        "",
    ]
    print("\n".join(lines))
    for shape in flags.shapes.split(","):
        part = table(shape, flags, roof)
        print("\n".join(part), flush=True)
        lines += part
    if flags.write:
        text, start = flags.write.read_text(), f"<!-- bench {flags.device} -->"
        head, rest = text.split(start)
        flags.write.write_text(f"{head}{start}\n\n" + "\n".join(lines) + "\n<!-- end -->" + rest.split("<!-- end -->", 1)[1])


if __name__ == "__main__":
    main()
