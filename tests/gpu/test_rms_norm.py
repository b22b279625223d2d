"""rms_norm against float64, with and without a residual, whole and per head; a row's bits stand by themselves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.kernels.gpu import rms_norm as gpu
from octavo.kernels.rms_norm import rms_norm, rms_norm_heads

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
WIDE_SIZES = [16, 32, 48, 128, 240, 256, 272, 512, 1024, 2032, 2048, 4096, 4112, 8192, 16384]

Poison = Callable[..., Tensor]


def exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def check_norm(rows: int, size: int, dtype: torch.dtype, with_residual: bool, in_poison: Poison) -> None:
    torch.manual_seed(rows + size)
    x, weight = in_poison((torch.randn(rows, size) * 3).to(dtype)), in_poison(torch.randn(size))
    before = torch.randn(rows, size).to(dtype) if with_residual else None
    residual = None if before is None else in_poison(before)
    out = in_poison(torch.full((rows, size), torch.nan, dtype=dtype))
    normed = x if before is None else (x.float() + before.to(x.device).float()).to(dtype)
    assert rms_norm(x, weight, 1e-5, out, residual) is out
    torch.testing.assert_close(
        out.double(), exact(normed, weight, 1e-5), atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype]
    )
    if residual is not None:
        assert torch.equal(residual, normed)
        assert torch.equal(rms_norm(normed, weight, 1e-5), out)  # of the rounded sum
    for row in {0, rows - 1}:
        alone = x[row : row + 1].clone()
        added = None if before is None else before[row : row + 1].to(x.device)
        assert torch.equal(rms_norm(alone, weight, 1e-5, alone, added), out[row : row + 1])  # in place as well


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("size", [16, 64, 576])
@pytest.mark.parametrize("rows", [1, 5])
def test_norm(rows: int, size: int, with_residual: bool, dtype: torch.dtype, in_poison: Poison) -> None:
    check_norm(rows, size, dtype, with_residual, in_poison)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("size", WIDE_SIZES)
def test_norm_of_every_size(size: int, with_residual: bool, dtype: torch.dtype, in_poison: Poison) -> None:
    check_norm(3, size, dtype, with_residual, in_poison)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("num_heads", "size"), [(3, 32), (1, 80), (5, 128)])
def test_heads_in_place(num_heads: int, size: int, dtype: torch.dtype, in_poison: Poison) -> None:
    torch.manual_seed(size)
    begin, end = 2 * size, (2 + num_heads) * size
    before, weight = torch.randn(4, end + size).to(dtype), in_poison(torch.randn(size))
    qkv = in_poison(before)
    rms_norm_heads(qkv, begin, num_heads, weight, 1e-6)
    before = before.to(qkv.device)
    want = exact(before[:, begin:end].unflatten(1, (num_heads, size)), weight, 1e-6).flatten(1)
    torch.testing.assert_close(qkv[:, begin:end].double(), want, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    assert torch.equal(qkv[:, :begin], before[:, :begin]) and torch.equal(qkv[:, end:], before[:, end:])
    for token in range(4):
        head = rms_norm(before[token : token + 1, begin : begin + size].contiguous(), weight, 1e-6)
        assert torch.equal(qkv[token : token + 1, begin : begin + size], head)


def test_rows_far_apart(far_apart: Poison, device: torch.device) -> None:
    rows, weight = torch.randn(3, 32).bfloat16().to(device), torch.randn(32, device=device)
    far = far_apart(rows)
    gpu.launch(far, far, None, weight, 3, 1, far.stride(0), 32, 1e-5)
    assert torch.equal(far, rms_norm(rows, weight, 1e-5))


def test_small_and_large_values(device: torch.device) -> None:
    x = torch.zeros(3, 64, device=device)
    x[1], x[2] = 1e-20, 1e18  # squares that vanish beside eps, and that nearly overflow
    got = rms_norm(x, torch.ones(64, device=device), 1e-5)
    torch.testing.assert_close(got.double(), exact(x, torch.ones(64, device=device), 1e-5), atol=0, rtol=1e-6)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x, weight = torch.randn(2, 32, device=device), torch.randn(32, device=device)
    with pytest.raises(ValueError, match=r"residual: shape is \(2, 16\), expected \(2, 32\)"):
        rms_norm(x, weight, 1e-5, residual=x[:, :16].contiguous())
    with pytest.raises(ValueError, match="residual: dtype is torch.bfloat16, expected torch.float32"):
        rms_norm(x, weight, 1e-5, residual=x.bfloat16())
