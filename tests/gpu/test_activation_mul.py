"""silu_mul and gelu_mul against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.kernels import backend
from octavo.kernels.activation_mul import gelu_mul, silu_mul

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
OPS = {"silu": silu_mul, "gelu": gelu_mul}

Poison = Callable[..., Tensor]


def exact(name: str, x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, dim=1)
    if name == "silu":
        return gate / (1 + (-gate).exp()) * up
    return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("name", list(OPS))
@pytest.mark.parametrize(("rows", "size", "gap"), [(1, 1, 0), (3, 48, 16), (2, 1023, 0), (1, 1024, 0), (5, 1040, 32)])
def test_product(rows: int, size: int, gap: int, name: str, dtype: torch.dtype, in_poison: Poison) -> None:
    torch.manual_seed(size)
    x = in_poison((torch.randn(rows, 2 * size) * 3).to(dtype), gap)
    out = in_poison(torch.full((rows, size), torch.nan, dtype=dtype))
    assert OPS[name](x, out) is out
    torch.testing.assert_close(out.double(), exact(name, x), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    assert torch.equal(OPS[name](x[rows - 1 :]), out[rows - 1 :])


@pytest.mark.parametrize("name", list(OPS))
def test_far_from_zero(name: str, device: torch.device) -> None:
    gate = torch.tensor([-1e30, -1e4, -300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0, 1e4], device=device)
    got = OPS[name](torch.cat([gate, torch.full_like(gate, 2.0)])[None])
    torch.testing.assert_close(got[0], torch.where(gate > 0, 2 * gate, 0.0), atol=1e-6, rtol=1e-6)


def test_rows_far_apart(far_apart: Poison) -> None:
    x = torch.randn(3, 32).bfloat16()
    assert torch.equal(silu_mul(far_apart(x)), silu_mul(x.to(backend.device())))


def test_wrong_arguments_are_named(device: torch.device) -> None:
    with pytest.raises(ValueError, match="x: width is 5, expected an even number"):
        silu_mul(torch.randn(2, 5, device=device))
    with pytest.raises(ValueError, match="x: dtype is torch.float64"):
        gelu_mul(torch.randn(2, 4, device=device).double())
    with pytest.raises(ValueError, match=r"out: shape is \(2, 3\), expected \(2, 2\)"):
        gelu_mul(torch.randn(2, 4, device=device), torch.empty(2, 3, device=device))
