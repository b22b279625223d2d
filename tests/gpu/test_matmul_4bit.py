"""matmul_4bit and gated_matmul_4bit: in every bit what matmul makes of the dequantised weight, whatever the tile."""

import os
from collections.abc import Callable

import pytest
import torch
from gpu.packed_4bit import FORMS, form_id, placed, random_weight
from torch import Tensor

from octavo.kernels import backend
from octavo.kernels.gpu.matmul_4bit import TILES
from octavo.kernels.matmul import PackedWeight, gated_matmul, matmul
from octavo.kernels.matmul_4bit import CodeFormat, dequantize_4bit, gated_matmul_4bit, matmul_4bit

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# The interpreter leaves a tile's products to numpy, which adds them in an order of its own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXECUTED = pytest.mark.skipif(INTERPRETED, reason="of compiled kernels only")

Poison = Callable[..., Tensor]


def check_same(got: Tensor, want: Tensor, k: int) -> None:
    if INTERPRETED:
        tolerance = TOLERANCES[got.dtype]
        torch.testing.assert_close(got.double(), want.double(), atol=tolerance * k, rtol=tolerance)
    else:
        assert torch.equal(got, want)


def check_product(m: int, n: int, k: int, dtype: torch.dtype, form: CodeFormat, in_poison: Poison) -> None:
    torch.manual_seed(n * k + m)
    weight = placed(random_weight(n, k, dtype, form), in_poison)
    x, bias = in_poison(torch.randn(m, k).to(dtype), gap=256), in_poison(torch.randn(n))
    plain = PackedWeight(dequantize_4bit(weight).view(-1), n, k)
    before = torch.randn(m, n).to(dtype)
    residual = in_poison(before)
    want = matmul(x, plain, bias, before.to(x.device))
    assert matmul_4bit(x, weight, bias, residual, out=residual) is residual
    check_same(residual, want, k)
    out = in_poison(torch.full((m, n), torch.nan))
    check_same(matmul_4bit(x, weight, out_dtype=torch.float32, out=out), matmul(x, plain, out_dtype=out.dtype), k)


def check_gated_product(
    m: int, n: int, k: int, dtype: torch.dtype, form: CodeFormat, biased: bool, in_poison: Poison
) -> None:
    torch.manual_seed(n * k + m)
    weight = placed(random_weight(2 * n, k, dtype, form, num_parts=2), in_poison)
    x, bias = in_poison(torch.randn(m, k).to(dtype), gap=256), in_poison(torch.randn(2 * n)) if biased else None
    plain = PackedWeight(dequantize_4bit(weight).view(-1), 2 * n, k, 2)
    out = in_poison(torch.full((m, n), torch.nan, dtype=dtype))
    assert gated_matmul_4bit(x, weight, bias, out) is out
    check_same(out, gated_matmul(x, plain, bias), k)


# One before, at and past the edges of tiles, which are of 16, 32 and 128 rows, of 16 to 64 columns and of 32 to 256 k;
# m, n, groups, form.
SHAPES = [(1, 1, 4, 0), (16, 33, 5, 0), (17, 65, 2, 2), (33, 64, 1, 3), (129, 66, 1, 0), (130, 63, 5, 1), (2, 17, 6, 4)]
GATED_SHAPES = [(1, 16, 2, 0), (16, 48, 3, 2), (20, 80, 2, 0), (129, 48, 1, 3), (3, 16, 6, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "groups", "form"), SHAPES)
def test_product(m: int, n: int, groups: int, form: int, dtype: torch.dtype, in_poison: Poison) -> None:
    check_product(m, n, groups * FORMS[form].group_size, dtype, FORMS[form], in_poison)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "groups", "form"), GATED_SHAPES)
def test_gated_product(m: int, n: int, groups: int, form: int, dtype: torch.dtype, in_poison: Poison) -> None:
    check_gated_product(m, n, groups * FORMS[form].group_size, dtype, FORMS[form], m % 2 == 1, in_poison)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=form_id)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("m", [15, 17, 129])
def test_product_of_many_shapes(m: int, dtype: torch.dtype, form: CodeFormat, in_poison: Poison) -> None:
    k = -(-144 // form.group_size) * form.group_size
    check_product(m, 65, k, dtype, form, in_poison)
    check_gated_product(m, 48, k, dtype, form, m == 17, in_poison)


def test_tiles_by_turns() -> None:
    """Programs in groups, the last of which is smaller, cover every tile once."""
    torch.manual_seed(0)
    m = 8 * 128 + 70  # 9 tiles of rows: a group of 8 and one of 1
    weight = random_weight(70, 16, torch.float32, FORMS[1])
    x = torch.randn(m, 16, device=backend.device())
    want = x.double() @ dequantize_4bit(weight).double().T
    torch.testing.assert_close(matmul_4bit(x, weight).double(), want, atol=1e-4, rtol=1e-5)


def test_rows_far_apart(far_apart: Poison) -> None:
    torch.manual_seed(0)
    x = torch.randn(129, 16).bfloat16().to(backend.device())
    weight = random_weight(16, 16, torch.bfloat16, FORMS[1])
    assert torch.equal(matmul_4bit(far_apart(x), weight), matmul_4bit(x, weight))


@EXECUTED
@pytest.mark.parametrize("m", [1, 17, 129])
def test_zero_has_no_sign(m: int) -> None:
    """Products that underflow to -0 give what zeros past the end of k give."""
    weight = random_weight(16, 64, torch.float32, FORMS[0])
    weight.scales.fill_(-1e-30)
    weight.codes.fill_(0xFF)
    x = torch.full((m, 64), 1e-30, device=backend.device())
    plain = PackedWeight(dequantize_4bit(weight).view(-1), 16, 64)
    assert not matmul_4bit(x, weight).signbit().any() and not matmul(x, plain).signbit().any()


def test_every_tile_is_tried() -> None:
    tried = {False: [m for m, *_ in SHAPES], True: [m for m, *_ in GATED_SHAPES]}
    for (_, gated), tiles in TILES.items():
        edges = [0, *(tile.max_rows for tile in tiles)]
        for low, high in zip(edges, edges[1:], strict=False):
            assert any(low < m <= high for m in tried[gated]), (gated, high)


def test_nan_stays_in_its_row_and_column() -> None:
    weight = random_weight(34, 48, torch.bfloat16, FORMS[1])
    x = torch.ones(20, 48, device=backend.device()).bfloat16()
    want = matmul_4bit(x, weight).float()
    weight.scales[7, 1] = x[19, 47] = torch.nan
    want[:, 7] = want[19] = torch.nan
    assert torch.equal(matmul_4bit(x, weight).float().nan_to_num(-1), want.nan_to_num(-1))
