"""Columns of activations in the order of a weight whose groups of inputs are not in the model's order."""

import ctypes

import torch
from torch import Tensor

from octavo.kernels.backend import kernels
from octavo.kernels.checks import COMPUTE_DTYPES, check
from octavo.kernels.cpu.library import Args, address, launch


class _Args(Args):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("item_bytes", ctypes.c_int64),
    ]


def gather_columns(x: Tensor, order: Tensor, out: Tensor | None = None) -> Tensor:
    """x[:, order].

    x: [rows, columns], rows may be strided; order: [k] int32. Returns [rows, k] in x's dtype, in `out` if given, whose
    rows may be strided. Raises ValueError on a wrong argument.
    """
    check(x, "x", (None, None), (*COMPUTE_DTYPES, torch.float16), contiguous=False)
    check(order, "order", (None,), torch.int32)
    shape = (x.shape[0], order.shape[0])
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    check(out, "out", shape, x.dtype, contiguous=False)
    if kernels() != "native":  # moving values is the same everywhere: torch's own does it on a GPU, too
        return torch.index_select(x, 1, order, out=out)
    args = _Args(
        x.shape[0], address(x), address(order), address(out), order.shape[0], x.stride(0), out.stride(0), x.itemsize
    )
    launch("octavo_gather_columns", args)
    return out
