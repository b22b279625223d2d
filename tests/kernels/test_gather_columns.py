"""Columns in another order, moved bit for bit."""

import pytest
import torch

from octavo.kernels.gather_columns import gather_columns


@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_columns_are_those_of_the_order(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn((rows, 200), generator=generator).to(dtype)[:, 3:163]
    order = torch.randperm(160, generator=generator)[:48].int()
    out = torch.zeros((rows, 64), dtype=dtype)
    assert torch.equal(gather_columns(x, order), x[:, order.long()])
    gather_columns(x, order, out[:, :48])
    assert torch.equal(out[:, :48], x[:, order.long()]) and not out[:, 48:].any()


def test_wrong_arguments_are_named() -> None:
    x, order = torch.zeros((2, 8)), torch.arange(8, dtype=torch.int32)
    with pytest.raises(ValueError, match="order: dtype is torch.int64"):
        gather_columns(x, order.long())
    with pytest.raises(ValueError, match="out: shape"):
        gather_columns(x, order, torch.zeros((2, 7)))
