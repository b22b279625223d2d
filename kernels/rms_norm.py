"""Root mean square norm over the last dimension."""

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.checks import COMPUTE_DTYPES, check
from octavo.kernels.cpu.library import address, f32, i64, library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float32, rounded once. x: [rows, size]; weight: [size] float32.

    size is a multiple of 16. Raises ValueError on a wrong argument. Zhang and Sennrich, arXiv 1910.07467.
    """
    check(x, "x", (None, None), COMPUTE_DTYPES)
    rows, size = x.shape
    check(weight, "weight", (size,), torch.float32)
    out = torch.empty_like(x)
    _norm(out, x, weight, rows, 1, size, size, eps)
    return out


def rms_norm_heads(qkv: Tensor, begin: int, num_heads: int, weight: Tensor, eps: float) -> None:
    """Norm each of `num_heads` heads in place. qkv: [tokens, width], heads from column `begin`; weight: [size]."""
    check(qkv, "qkv", (None, None), COMPUTE_DTYPES)
    size = weight.shape[0]
    if begin < 0 or begin + num_heads * size > qkv.shape[1]:
        raise ValueError(f"num_heads: {num_heads} heads of {size} from column {begin} exceed the width {qkv.shape[1]}")
    view = qkv[:, begin : begin + num_heads * size]
    _norm(view, view, weight, qkv.shape[0], num_heads, qkv.stride(0), size, eps)


def _norm(out: Tensor, x: Tensor, weight: Tensor, outer: int, inner: int, stride: int, size: int, eps: float) -> None:
    if size % 16:
        raise ValueError(f"x: size is {size}, expected a multiple of 16")
    lib = library()
    if lib is None:
        out.copy_(reference.rms_norm(x.unflatten(1, (inner, size)), weight, eps).flatten(1))
        return
    lib.octavo_rms_norm(
        address(out),
        address(x),
        address(weight),
        i64(outer),
        i64(inner),
        i64(stride),
        i64(size),
        f32(eps),
        x.dtype == torch.bfloat16,
    )
