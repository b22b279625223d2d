"""silu_mul against float64."""

import pytest
import torch

from octavo.kernels.silu_mul import silu_mul


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("size", [16, 1536])
@pytest.mark.parametrize("rows", [1, 33])
def test_gate(rows: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(rows + size)
    x = (torch.randn(rows, 2 * size) * 8).to(dtype)
    x[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -88.0], dtype=dtype)  # where exp would overflow or vanish
    gate, up = x.double().chunk(2, dim=-1)
    want = gate / (1 + (-gate).exp()) * up
    got = silu_mul(x)
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    assert torch.equal(silu_mul(x[-1:].contiguous()), got[-1:])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="gate_up: width is 48, expected a multiple of 32"):
        silu_mul(torch.randn(2, 48))
    with pytest.raises(ValueError, match="gate_up: strides"):
        silu_mul(torch.randn(64, 2).T)
