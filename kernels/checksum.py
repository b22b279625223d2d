"""Checksums of what lies in memory: whoever finds another one than before knows that a bit has changed."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import kernels
from octavo.kernels.checks import check
from octavo.kernels.cpu.library import Args, address, launch


class _Args(Args):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("parts", ctypes.c_void_p),
        ("num_parts", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("together", ctypes.c_int64),
    ]
    addresses: object  # of the parts: what `parts` points to


def checksum(parts: Sequence[Tensor], out: Tensor, index: Tensor | None = None) -> Tensor:
    """Of row i of all parts, one after the other, a checksum in out[i]; with an index of row index[i].

    parts: alike, [rows, ...] of any dtype, rows dense; index: [n] int64; out: int64, [n] or [rows], or [] for one
    checksum of all rows. Returns out.

    No flip of one bit leaves a checksum as it was, nor do two flips within 4096 bytes of a row's part. Other changes do
    by a chance of about 2^-32 where they lie in 4096 bytes, of 2^-64 elsewhere. Raises ValueError on a wrong argument.
    """
    first, together = parts[0], out.dim() == 0
    for part in parts:
        check(part, "parts", first.shape, first.dtype, contiguous=False)
        if part.stride() != first.stride() or not part[0].is_contiguous():
            raise ValueError(f"parts: strides are {part.stride()}, expected dense rows, as far apart in all parts")
    rows = first.shape[0]
    if index is not None:
        check(index, "index", (None,), torch.int64)
        rows = index.shape[0]
    check(out, "out", () if together else (rows,), torch.int64)
    if kernels() != "native":
        return out.copy_(reference.checksum(parts, index, together))
    addresses = (ctypes.c_void_p * len(parts))(*map(address, parts))
    args = _Args(
        rows,
        ctypes.addressof(addresses),
        len(parts),
        first[0].nbytes,
        first.stride(0) * first.itemsize,
        address(index),
        address(out),
        together,
    )
    args.addresses = addresses
    launch("octavo_checksum", args)
    return out
