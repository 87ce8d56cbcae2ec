"""Time the lookup against other ways of finding the nearest code, interleaved, and count the codes that each gets wrong.

    python kernels/bench.py [--device cpu] [--latents 16384] [--threads 1] [--repeats 7] [--shapes 1024x256,8192x64] [--data gaussian|fresh]

Prints a table. Peers that are not installed (faiss, scikit-learn, vector-quantize-pytorch) are left out and named.
faiss is timed with the OPENBLAS_CORETYPE of the environment; run again with OPENBLAS_CORETYPE=SkylakeX for its other setting.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from t2v_ds.kernels import native, vq_assign, vq_lookup

Way = Callable[[Tensor, Tensor], Tensor]


def cdist(x: Tensor, c: Tensor) -> Tensor:
    """The obvious way."""
    return torch.cdist(x, c).argmin(1)


def expanded(x: Tensor, c: Tensor) -> Tensor:
    """|x|² + |c|² - 2 x·c, the usual way."""
    return (x.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * x @ c.T).argmin(1)


def chunked(x: Tensor, c: Tensor) -> Tensor:
    """|c|²/2 - x·c in chunks of 256 rows."""
    bias = c.square().sum(1) / 2
    return torch.cat([torch.addmm(bias, part, c.T, alpha=-1).argmin(1) for part in x.split(256)])


def bf16(x: Tensor, c: Tensor) -> Tensor:
    """The same with a bf16 matrix product."""
    return (c.square().sum(1) / 2 - (x.bfloat16() @ c.bfloat16().T).float()).argmin(1)


def ways(device: str) -> tuple[dict[str, Way], list[str]]:
    """Every way that is installed, and the names of those that are not."""
    found: dict[str, Way] = {"t2v_ds vq_lookup": vq_lookup, "t2v_ds vq_assign": lambda x, c: vq_assign(x, c)[0]}
    found |= {"cdist + argmin": cdist, "expanded + argmin": expanded, "addmm + argmin, chunks": chunked, "bf16 matmul + argmin": bf16}
    missing: list[str] = []
    if device != "cpu":
        return found, missing
    try:
        import faiss  # type: ignore[import-not-found]

        def faiss_flat(x: Tensor, c: Tensor) -> Tensor:
            faiss.omp_set_num_threads(torch.get_num_threads())
            index = faiss.IndexFlatL2(c.shape[1])
            index.add(c.numpy())
            return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])

        found[f"faiss IndexFlatL2 ({os.environ.get('OPENBLAS_CORETYPE', 'default')})"] = faiss_flat
    except ImportError:
        missing.append("faiss")
    try:
        from sklearn.metrics import pairwise_distances_argmin  # type: ignore[import-not-found]

        found["sklearn pairwise_distances_argmin"] = lambda x, c: torch.from_numpy(pairwise_distances_argmin(x.numpy(), c.numpy()))
    except ImportError:
        missing.append("scikit-learn")
    return found, missing


def draw(kind: str, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Latents [n, d] and a codebook [k, d]."""
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    return latents, codebook / k if kind == "fresh" else codebook


def wrong(codes: Tensor, x: Tensor, c: Tensor) -> int:
    """Latents that have a code farther away than another one, in float64."""
    count = 0
    for start in range(0, len(x), 4096):
        part, own = x[start : start + 4096].double(), codes[start : start + 4096].long()
        distances = torch.cdist(part, c.double(), compute_mode="donot_use_mm_for_euclid_dist")
        count += int((distances.gather(1, own[:, None])[:, 0] > distances.amin(1) * (1 + 1e-14)).sum())
    return count


def measure(way: Way, x: Tensor, c: Tensor) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    way(x, c)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", default="1024x256,1024x64,8192x64,16384x8")
    parser.add_argument("--data", choices=("gaussian", "fresh"), default="gaussian")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    found, missing = ways(flags.device)
    print(f"N = {flags.latents}, {flags.data}, {flags.threads} threads, compiled: {native.available()}")
    print(f"median of {flags.repeats}, interleaved")
    if missing:
        print(f"not installed: {', '.join(missing)}")
    for shape in flags.shapes.split(","):
        k, d = (int(one) for one in shape.split("x"))
        x, c = (one.to(flags.device) for one in draw(flags.data, flags.latents, k, d))
        codes = {name: way(x, c) for name, way in found.items()}  # also warms up
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(flags.repeats):
            for name, way in found.items():
                times[name].append(measure(way, x, c))
        ours = statistics.median(times["t2v_ds vq_lookup"])
        print(f"\nK, D = {k}, {d}\n\n| way | ms | ratio | GF/s | wrong codes |\n|---|---:|---:|---:|---:|")
        for name in found:
            median = statistics.median(times[name])
            rate = 2 * len(x) * k * d / median / 1e6
            print(f"| {name} | {median:.1f} | {median / ours:.2f} | {rate:.0f} | {wrong(codes[name], x, c)} |", flush=True)


if __name__ == "__main__":
    main()
