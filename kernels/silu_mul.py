"""The gate of a SwiGLU MLP."""

import ctypes

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.checks import COMPUTE_DTYPES, check, output
from octavo.kernels.cpu.library import Args, address, launch, library


class _Args(Args):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
    ]


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up in float32, rounded once. gate_up: [rows, 2 * size], gate first; returns [rows, size], `out`.

    size is a multiple of 16. Raises ValueError on a wrong argument. Shazeer, arXiv 2002.05202.
    """
    check(gate_up, "gate_up", (None, None), COMPUTE_DTYPES)
    rows, width = gate_up.shape
    if width % 32:
        raise ValueError(f"gate_up: width is {width}, expected a multiple of 32")
    out = output(out, (rows, width // 2), gate_up.dtype)
    if library() is None:
        return out.copy_(reference.silu_mul(gate_up))
    launch("octavo_silu_mul", _Args(rows, address(out), address(gate_up), width // 2, gate_up.dtype == torch.bfloat16))
    return out
