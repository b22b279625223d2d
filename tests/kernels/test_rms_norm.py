"""rms_norm against float64, alone and per head."""

import pytest
import torch

from octavo.kernels.rms_norm import rms_norm, rms_norm_heads

DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)]


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("size", [16, 64, 576, 4096])
@pytest.mark.parametrize("rows", [1, 2, 17, 300])
def test_norm(rows: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(rows + size)
    x, weight = (torch.randn(rows, size) * 3).to(dtype), torch.randn(size)
    got = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got.double(), exact(x, weight, 1e-5), atol=tolerance, rtol=tolerance)
    for row in (0, rows - 1):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-5), got[row : row + 1])


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_norm_of_residual_and_x(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, before, weight = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype), torch.randn(64)
    residual, x_before = before.clone(), x.clone()
    got = rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(residual, (before.float() + x.float()).to(dtype)) and torch.equal(x, x_before)
    torch.testing.assert_close(got.double(), exact(residual, weight, 1e-5), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_heads_in_place(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    qkv, weight = torch.randn(5, 8 * 32).to(dtype), torch.randn(32)
    before = qkv.clone()
    rms_norm_heads(qkv, 64, 3, weight, 1e-6)
    want = exact(before[:, 64:160].unflatten(1, (3, 32)), weight, 1e-6).flatten(1)
    torch.testing.assert_close(qkv[:, 64:160].double(), want, atol=tolerance, rtol=tolerance)
    assert torch.equal(qkv[:, :64], before[:, :64]) and torch.equal(qkv[:, 160:], before[:, 160:])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="x: size is 24, expected a multiple of 16"):
        rms_norm(torch.randn(2, 24), torch.randn(24), 1e-5)
    with pytest.raises(ValueError, match=r"weight: shape is \(16,\), expected \(32\)"):
        rms_norm(torch.randn(2, 32), torch.randn(16), 1e-5)
    for weight in (torch.randn(64)[::2], torch.randn(32, 1), torch.randn(32).bfloat16()):
        with pytest.raises(ValueError, match="weight: "):
            rms_norm_heads(torch.randn(2, 96), 0, 3, weight, 1e-5)
    with pytest.raises(ValueError, match="num_heads: 3 heads of 32 from column 16 exceed the width 96"):
        rms_norm_heads(torch.randn(2, 96), 16, 3, torch.randn(32), 1e-5)
