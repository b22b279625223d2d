"""matmul and gated_matmul against float64; the promise that a row's bits stand by themselves; the vendor's library."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from octavo.kernels import backend
from octavo.kernels.gpu import matmul as gpu
from octavo.kernels.matmul import PackedWeight, empty_packed, gated_matmul, matmul

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# One before, at and past the edges of tiles, which are of 16, 32 and 64 rows and of 16 to 128 columns.
SHAPES = [(1, 1, 2), (2, 16, 64), (16, 33, 66), (17, 31, 128), (33, 80, 48), (129, 130, 80), (20, 66, 34)]  # m, n, k
WIDE_SHAPES = [
    (m, n, k)
    for m in (1, 15, 16, 17, 31, 32, 33, 64, 65, 128, 129, 192, 193)
    for n, k in ((16, 32), (33, 144), (127, 63), (129, 65))
]

# The interpreter leaves a tile's products to numpy, which adds them in an order of its own.
EXECUTED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="of compiled kernels only")

Poison = Callable[..., Tensor]


def packed(weight: Tensor, num_parts: int = 1) -> PackedWeight:
    return PackedWeight(weight.view(-1), weight.shape[0], weight.shape[1], num_parts)


def check_product(m: int, n: int, k: int, dtype: torch.dtype, in_poison: Poison) -> None:
    torch.manual_seed(n * k + m)
    x, w = in_poison(torch.randn(m, k).to(dtype), gap=16), in_poison(torch.randn(n, k).to(dtype))
    bias, before = in_poison(torch.randn(n)), torch.randn(m, n).to(dtype)
    exact, added = x.double() @ w.double().T, before.to(x.device).double()
    scale = TOLERANCES[dtype] * k**0.5
    for out_dtype, biased, with_residual in ((dtype, True, True), (torch.float32, False, False)):
        residual = in_poison(before) if with_residual else None
        out = in_poison(torch.full((m, n), torch.nan, dtype=out_dtype)) if residual is None else residual
        assert matmul(x, packed(w), bias if biased else None, residual, out_dtype, out) is out
        want = exact + (bias.double() if biased else 0) + (added if with_residual else 0)
        torch.testing.assert_close(out.double(), want, atol=scale, rtol=TOLERANCES[out_dtype])


def check_gated_product(m: int, n: int, k: int, dtype: torch.dtype, biased: bool, in_poison: Poison) -> None:
    torch.manual_seed(n * k + m)
    x, w = in_poison(torch.randn(m, k).to(dtype), gap=16), in_poison(torch.randn(2 * n, k).to(dtype))
    bias = in_poison(torch.randn(2 * n)) if biased else None
    out = in_poison(torch.full((m, n), torch.nan, dtype=dtype))
    assert gated_matmul(x, packed(w, 2), bias, out) is out
    gate, up = (x.double() @ w.double().T + (0.0 if bias is None else bias.double())).chunk(2, dim=1)
    want = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(out.double(), want, atol=TOLERANCES[dtype] * k, rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product(m: int, n: int, k: int, dtype: torch.dtype, in_poison: Poison) -> None:
    check_product(m, n, k, dtype, in_poison)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gated_product(m: int, n: int, k: int, dtype: torch.dtype, in_poison: Poison) -> None:
    check_gated_product(m, n, k, dtype, m % 2 == 1, in_poison)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("m", "n", "k"), WIDE_SHAPES)
def test_product_of_many_shapes(m: int, n: int, k: int, dtype: torch.dtype, in_poison: Poison) -> None:
    biased = k % 2 == 0
    k += k % 2 if dtype.itemsize == 2 else 0  # rows of 16-bit weights are even
    check_product(m, n, k, dtype, in_poison)
    check_gated_product(m, n, k, dtype, biased, in_poison)


def test_tiles_by_turns() -> None:
    """Programs in groups, the last of which is smaller, cover every tile once."""
    torch.manual_seed(0)
    m = 16 * 64 + 70  # 18 tiles of rows: two groups of 8 and one of 2
    x, w = torch.randn(m, 16, device=backend.device()), torch.randn(70, 16, device=backend.device())
    torch.testing.assert_close(matmul(x, packed(w)).double(), x.double() @ w.double().T, atol=1e-5, rtol=1e-5)


def test_rows_far_apart(far_apart: Poison, device: torch.device) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(65, 16).bfloat16().to(device), torch.randn(16, 16).bfloat16().to(device)
    assert torch.equal(matmul(far_apart(x), packed(w)), matmul(x, packed(w)))


@EXECUTED
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_row_alone_has_the_bits_it_has_in_a_batch(dtype: torch.dtype, gated: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(130, 336).to(device, dtype), torch.randn(96, 336).to(device, dtype)
    weight, op = packed(w, 2 if gated else 1), gated_matmul if gated else matmul
    whole = op(x, weight)  # by the largest tile; the others serve 1 to 16 rows, and 17 to 128
    for m in (1, 2, 15, 16, 17, 33, 64):
        for begin in {0, 3, 130 - m}:
            assert torch.equal(op(x[begin : begin + m], weight), whole[begin : begin + m]), (m, begin)


@EXECUTED
@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("k", [64, 200, 576])
def test_every_row_alone(k: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(k)
    x, w = torch.randn(130, k).to(device, dtype), torch.randn(48, k).to(device, dtype)
    whole = matmul(x, packed(w))
    for row in range(130):
        assert torch.equal(matmul(x[row : row + 1], packed(w)), whole[row : row + 1]), row


@EXECUTED
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("m", [1, 17, 129])
def test_sums_run_over_k_from_0_upwards(m: int, dtype: torch.dtype, device: torch.device) -> None:
    """1 is lost in the sum while that is 2^30, and only then."""
    k, big = 160, 2.0**15
    places = [(32, 144, 64, 0.0), (32, 64, 144, 1.0), (64, 144, 32, 0.0), (0, 16, 32, 1.0), (0, 144, 128, 0.0)]
    x, w = torch.zeros(m, k), torch.zeros(len(places), k)
    want = torch.empty(m, len(places))
    x[:] = big
    for col, (plus, minus, one, result) in enumerate(places):
        w[col, plus], w[col, minus], w[col, one], want[:, col] = big, -big, 1 / big, result
    got = matmul(x.to(device, dtype), packed(w.to(device, dtype)), out_dtype=torch.float32)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("m", [1, 20, 130])
def test_nan_stays_in_its_row_and_column(m: int, device: torch.device) -> None:
    x, w = torch.ones(m, 40, device=device).bfloat16(), torch.ones(50, 40, device=device).bfloat16()
    w[7, 0] = x[m - 1, 39] = torch.nan
    want = torch.full((m, 50), 40.0)
    want[:, 7] = want[m - 1] = torch.nan
    assert torch.equal(matmul(x, packed(w)).cpu().float().nan_to_num(), want.nan_to_num())


@pytest.fixture
def by_vendor() -> Iterator[None]:
    backend.select("triton", backend.device(), exact=False)
    yield
    backend.select("triton", backend.device())


def test_vendor_library_means_the_same(by_vendor: None, monkeypatch: pytest.MonkeyPatch, in_poison: Poison) -> None:
    monkeypatch.setattr(gpu, "launch", None)
    for dtype in (torch.bfloat16, torch.float32):
        check_product(17, 33, 48, dtype, in_poison)
        check_gated_product(17, 33, 48, dtype, True, in_poison)


def test_weights_are_plain_and_may_be_float16() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 8)
    weight = empty_packed(64, 8, torch.float16, num_parts=2)
    weight.write_rows(32, w[32:])
    weight.write_rows(0, w[:32])
    assert torch.equal(weight.data.cpu().view(64, 8), w.half())
