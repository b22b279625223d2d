"""Root mean square norm over the last dimension."""

import ctypes

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import kernels
from octavo.kernels.checks import check, compute_dtypes, output
from octavo.kernels.cpu.library import Args, address, launch


class _Args(Args):
    _fields_ = [
        ("outer", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("inner", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("is_bf16", ctypes.c_int32),
    ]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float32, rounded once, in `out` if given, which may be x.

    x: [rows, size]; weight: [size] float32; size is a multiple of 16. Where there is a `residual` [rows, size], of x's
    dtype, x is first added to it, in place and rounded, and the norm is of that. Raises ValueError on a wrong argument.
    Zhang and Sennrich, arXiv 1910.07467.
    """
    check(x, "x", (None, None), compute_dtypes())
    rows, size = x.shape
    check(weight, "weight", (size,), torch.float32)
    if residual is not None:
        check(residual, "residual", (rows, size), x.dtype)
    out = output(out, (rows, size), x.dtype)
    _norm(out, x, residual, weight, rows, 1, size, size, eps)
    return out


def rms_norm_heads(qkv: Tensor, begin: int, num_heads: int, weight: Tensor, eps: float) -> None:
    """Norm each of `num_heads` heads in place. Raises ValueError on a wrong argument.

    qkv: [tokens, width], heads from column `begin`; weight: [size] float32, size a multiple of 16.
    """
    check(qkv, "qkv", (None, None), compute_dtypes())
    check(weight, "weight", (None,), torch.float32)
    size = weight.shape[0]
    if begin < 0 or begin + num_heads * size > qkv.shape[1]:
        raise ValueError(f"num_heads: {num_heads} heads of {size} from column {begin} exceed the width {qkv.shape[1]}")
    view = qkv[:, begin : begin + num_heads * size]
    _norm(view, view, None, weight, qkv.shape[0], num_heads, qkv.stride(0), size, eps)


def _norm(
    out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    outer: int,
    inner: int,
    stride: int,
    size: int,
    eps: float,
) -> None:
    if size % 16:
        raise ValueError(f"x: size is {size}, expected a multiple of 16")
    if kernels() == "torch":
        vectors = (inner, size)
        total = None if residual is None else residual.unflatten(1, vectors)
        out.copy_(reference.rms_norm(x.unflatten(1, vectors), weight, eps, total).flatten(1))
        return
    if kernels() == "triton":
        from octavo.kernels.gpu import rms_norm as gpu  # here, since importing Triton takes its time

        gpu.launch(out, x, residual, weight, outer, inner, stride, size, eps)
        return
    is_bf16 = x.dtype == torch.bfloat16
    args = _Args(outer, address(out), address(x), address(residual), address(weight), inner, stride, size, eps, is_bf16)
    launch("octavo_rms_norm", args)
