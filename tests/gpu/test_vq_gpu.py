"""The CUDA kernel on a GPU: exact codes on data made to be hard, sums that repeat, errors, streams, devices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2v_ds.kernels import native, reference, vq_assign, vq_lookup
from tests.unit.test_kernels import KINDS, SHAPES, gaussian
from tests.unit.test_vq_cuda import HARDER, nearest

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert "CUDA" in native.available(), "the CUDA kernel is not compiled: these tests would only test the reference"


@pytest.mark.parametrize("kind", [*KINDS, *HARDER])
def test_no_code_is_wrong(kind: str) -> None:
    for shape in (*SHAPES, (70, 300, 600), (33, 129, 1024)):
        for seed in range(3):
            latents, codebook = (KINDS | HARDER)[kind](*shape, seed)
            expected = nearest(latents, codebook.float())
            assert torch.equal(vq_lookup(latents.cuda(), codebook.cuda()).cpu(), expected), (kind, shape, seed)
            codes, quantized, counts, _ = vq_assign(latents.cuda(), codebook.cuda())
            assert torch.equal(codes.cpu(), expected)
            assert torch.equal(quantized.cpu(), codebook.float()[expected])
            assert torch.equal(counts.cpu(), torch.bincount(expected, minlength=len(codebook)).float())


@pytest.mark.parametrize("shape", [(81920, 1024, 256), (300001, 513, 64), (65537, 8192, 64), (20000, 65536, 8), (9000, 2048, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_latents(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    latents, codebook = (one.cuda() for one in gaussian(*shape, 0))
    latents = latents.to(dtype)
    expected = reference.lookup(latents.float(), codebook)
    assert torch.equal(vq_lookup(latents, codebook), expected)
    for deterministic in (False, True):
        codes, quantized, counts, sums = vq_assign(latents, codebook, deterministic=deterministic)
        assert torch.equal(codes, expected)
        assert torch.equal(quantized, codebook[expected])
        assert torch.equal(counts, torch.bincount(expected, minlength=len(codebook)).float())
        exactly = torch.zeros(codebook.shape, dtype=torch.float64, device="cuda").index_add_(0, expected, latents.double())
        torch.testing.assert_close(sums.double(), exactly, rtol=1e-4, atol=1e-3)


def test_sums_of_dyadic_numbers_have_no_rounding() -> None:
    latents, codebook = (one.cuda() for one in gaussian(50000, 300, 40, 0))
    latents = (latents * 64).round() / 64
    for rows in (codebook, codebook[:2]):
        for deterministic in (False, True):
            codes, _, _, sums = vq_assign(latents, rows, deterministic=deterministic)
            exactly = torch.zeros(rows.shape, dtype=torch.float64, device="cuda").index_add_(0, codes, latents.double())
            assert torch.equal(sums.double(), exactly)


def test_everything_repeats_to_the_last_bit() -> None:
    for rows in (1024, 3):
        latents, codebook = (one.cuda() for one in gaussian(100000, rows, 96, 0))
        first = vq_assign(latents, codebook)
        for _ in range(20):
            assert all(torch.equal(one, other) for one, other in zip(first, vq_assign(latents, codebook), strict=True))


def test_rows_that_are_all_ambiguous() -> None:
    latents, codebook = (one.cuda() for one in gaussian(20000, 1024, 64, 0))
    assert int(vq_lookup(latents, codebook[:1].repeat(1024, 1)).abs().max()) == 0
    copies = codebook[torch.arange(1024, device="cuda") % 512]
    assert torch.equal(vq_lookup(latents, copies), reference.lookup(latents, copies))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_is_named_or_marked(value: float) -> None:
    latents, codebook = (one.cuda() for one in gaussian(3000, 100, 8, 0))
    expected = vq_lookup(latents, codebook)
    latents[2170, 3] = latents[2900, 0] = value
    expected[2170] = expected[2900] = -1
    assert torch.equal(vq_lookup(latents, codebook, mark_bad=True), expected)
    with pytest.raises(ValueError, match="latents row 2170 holds NaN or infinity"):
        vq_assign(latents, codebook)
    with pytest.raises(ValueError, match="latents row 2170 holds NaN or infinity"):
        vq_lookup(latents, codebook)
    codebook[5, 1] = value
    with pytest.raises(ValueError, match="codebook row 5 holds NaN or infinity"):
        vq_lookup(latents, codebook, mark_bad=True)


def test_no_latents_and_any_alignment() -> None:
    latents, codebook = (one.cuda() for one in gaussian(1000, 64, 48, 0))
    expected = vq_lookup(latents, codebook)
    for moved, rows in ((shifted(latents), codebook), (latents, shifted(codebook)), (latents.T.contiguous().T, codebook)):
        assert torch.equal(vq_lookup(moved, rows), expected)
        assert torch.equal(vq_assign(moved, rows)[1], codebook[expected])
    codes, quantized, counts, sums = vq_assign(latents[:0], codebook)
    assert (codes.shape, quantized.shape, float(counts.sum()), float(sums.abs().sum())) == ((0,), (0, 48), 0.0, 0.0)


def shifted(rows: Tensor) -> Tensor:
    """The same numbers, 4 bytes behind where 16 could be read at once."""
    return torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape)


def test_the_current_stream_is_used() -> None:
    latents, codebook = (one.cuda() for one in gaussian(50000, 256, 64, 0))
    expected = vq_lookup(latents, codebook)
    late = torch.zeros_like(latents)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(latents)
        codes = vq_lookup(late, codebook)
    stream.synchronize()
    assert torch.equal(codes, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    latents, codebook = gaussian(5000, 256, 64, 0)
    expected = vq_lookup(latents.cuda(), codebook.cuda()).cpu()
    assert torch.cuda.current_device() == 0
    result = vq_assign(latents.to("cuda:1"), codebook.to("cuda:1"))
    assert {one.device.index for one in result} == {1}
    assert torch.equal(result[0].cpu(), expected)


def test_no_buffer_of_all_scores() -> None:
    latents, codebook = (one.cuda() for one in gaussian(200000, 4096, 64, 0))
    vq_lookup(latents, codebook)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    vq_assign(latents, codebook)
    outputs = 4 * (2 * 200000 + 200000 * 64 + 4096 * 65)
    assert torch.cuda.max_memory_allocated() - before - outputs < 64 * 2**20
