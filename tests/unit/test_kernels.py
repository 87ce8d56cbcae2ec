"""The nearest code is the nearest code: against float64, in chunks, under autocast, with ties and with bad rows."""

import pytest
import torch

from t2v_ds.kernels import reference, vq_assign, vq_lookup


def exact(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.cdist(latents.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def data(n: int, k: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


@pytest.mark.parametrize(("n", "k", "d"), [(1, 2, 1), (700, 5, 3), (3000, 129, 8), (500, 1024, 64), (0, 16, 4)])
def test_finds_the_nearest_row_in_chunks(n: int, k: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CPU_SCORES", 64)  # chunks of 64 rows
    latents, codebook = data(n, k, d)
    codes = vq_lookup(latents, codebook)
    assert codes.dtype == torch.int64
    nearest = exact(latents, codebook)
    differ = codes != nearest
    # fp32 may only choose otherwise where float64 sees practically the same distance.
    gap = (latents - codebook[codes]).double().norm(dim=1) - (latents - codebook[nearest]).double().norm(dim=1)
    assert int(differ.sum()) <= n // 500
    assert bool((gap[differ] < 1e-5).all())


def test_an_offset_common_to_all_does_not_cancel() -> None:
    latents, codebook = data(2000, 256, 16)
    step = 2.0**-12  # so that adding 1000 is exact in fp32 and cannot change the answer
    latents, codebook = (latents / step).round() * step, (codebook / step).round() * step
    assert torch.equal(latents + 1000 - 1000, latents)
    agree = vq_lookup(latents + 1000, codebook + 1000) == exact(latents, codebook)
    assert float(agree.float().mean()) > 0.999


@pytest.mark.parametrize("k", [7, 64, 130, 1021])
def test_equal_rows_go_to_the_lowest_index(k: int) -> None:
    latents, base = data(400, max(1, k // 6), 5)
    group = torch.randint(0, len(base), (k,), generator=torch.Generator().manual_seed(1))
    first = torch.tensor([int((group == g).nonzero()[0]) for g in group])
    codes = vq_lookup(latents, base[group])
    assert torch.equal(first[codes], codes)
    assert len(codes.unique()) > 1 or len(base) == 1
    assert torch.equal(reference._first_of_equal_rows(base[group]), first)
    assert int(vq_lookup(torch.zeros(1, 2), torch.tensor([[1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0]]))) == 0  # equal distances


def test_fp32_whatever_the_surroundings_say() -> None:
    latents, codebook = data(2000, 512, 32)
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


def test_assign_collects_exact_statistics() -> None:
    latents, codebook = data(600, 40, 6)
    latents.requires_grad_()
    codes, quantized, counts, sums = vq_assign(latents, codebook)
    assert torch.equal(codes, vq_lookup(latents, codebook))
    assert torch.equal(quantized, codebook[codes])
    assert not quantized.requires_grad
    assert not sums.requires_grad
    for code in range(40):
        mine = latents.detach()[codes == code]
        assert int(counts[code]) == len(mine)
        torch.testing.assert_close(sums[code], mine.sum(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_is_named(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CPU_SCORES", 64)
    latents, codebook = data(300, 100, 8)
    latents[217, 3] = value
    with pytest.raises(ValueError, match="latents row 217 holds NaN or infinity"):
        vq_assign(latents, codebook)
    codebook[5, 1] = value
    with pytest.raises(ValueError, match="codebook row 5 holds NaN or infinity"):
        vq_lookup(latents, codebook)
    with pytest.raises(ValueError, match="row 1 holds numbers too large"):
        vq_lookup(torch.tensor([[1.0], [3e38]]), torch.tensor([[-1e9], [1e9]]))


def test_types_and_shapes_are_checked() -> None:
    latents, codebook = data(10, 300, 4)
    assert vq_lookup(latents.bfloat16(), codebook, torch.int16).dtype == torch.int16
    with pytest.raises(ValueError, match="uint8 cannot name 300"):
        vq_lookup(latents, codebook, torch.uint8)
    with pytest.raises(ValueError, match=r"\[10, 4\] and the codebook is \[300, 3\]"):
        vq_lookup(latents, codebook[:, :3])
    with pytest.raises(ValueError, match="floating point"):
        vq_lookup(latents.long(), codebook)
    with pytest.raises(ValueError, match="no rows"):
        vq_lookup(latents, codebook[:0])
