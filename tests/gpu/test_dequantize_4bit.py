"""dequantize_4bit against plain torch, in every bit."""

from collections.abc import Callable

import pytest
import torch
from gpu.packed_4bit import FORMS, form_id, placed, random_weight
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.matmul_4bit import CodeFormat, dequantize_4bit

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

Poison = Callable[..., Tensor]


def check(n: int, k: int, dtype: torch.dtype, form: CodeFormat, in_poison: Poison) -> None:
    torch.manual_seed(n * k)
    weight = placed(random_weight(n, k, dtype, form), in_poison)
    out = in_poison(torch.full((n, k), torch.nan, dtype=dtype))
    assert dequantize_4bit(weight, out) is out
    codes = weight.plain_codes()
    assert codes.unique().numel() == 16
    want = reference.dequantize_4bit(codes, weight.table, weight.scales, weight.offsets, form.shift, dtype)
    assert torch.equal(out, want)


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_bits(form: CodeFormat, in_poison: Poison) -> None:
    # One before, at and past the edges of tiles, which have 16 rows and 256 columns.
    size = form.group_size
    for n, k in ((15, size), (16, -(-256 // size) * size), (17, -(-272 // size) * size), (33, 2 * size)):
        check(n, k, torch.bfloat16, form, in_poison)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, in_poison: Poison) -> None:
    check(18, 320, dtype, FORMS[0], in_poison)
    check(18, 384, dtype, FORMS[5], in_poison)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=form_id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_shapes(dtype: torch.dtype, form: CodeFormat, in_poison: Poison) -> None:
    for n in (1, 16, 31):
        for groups in (1, 3, 5):
            check(n, groups * form.group_size, dtype, form, in_poison)
