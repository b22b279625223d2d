"""The gate of a SwiGLU MLP."""

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.checks import COMPUTE_DTYPES, check
from octavo.kernels.cpu.library import address, i64, library


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in float32, rounded once. gate_up: [rows, 2 * size], gate first; returns [rows, size].

    size is a multiple of 16. Raises ValueError on a wrong argument. Shazeer, arXiv 2002.05202.
    """
    check(gate_up, "gate_up", (None, None), COMPUTE_DTYPES)
    rows, width = gate_up.shape
    if width % 32:
        raise ValueError(f"gate_up: width is {width}, expected a multiple of 32")
    lib = library()
    if lib is None:
        return reference.silu_mul(gate_up)
    out = torch.empty((rows, width // 2), dtype=gate_up.dtype)
    lib.octavo_silu_mul(address(out), address(gate_up), i64(rows), i64(width // 2), gate_up.dtype == torch.bfloat16)
    return out
