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
    memory: object  # whose `addresses` `parts` points to


class Rows:
    """Memory to take checksums of: row i is row i of all parts, one after the other. To be made once and kept.

    Raises ValueError unless the parts are alike, [rows, ...] of any dtype, their rows dense.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        first = parts[0]
        for part in parts:
            check(part, "parts", first.shape, first.dtype, contiguous=False)
            if part.stride() != first.stride() or not part[0].is_contiguous():
                raise ValueError(f"parts: strides are {part.stride()}, expected dense rows, as far apart in all parts")
        self.parts = parts
        self.addresses = (ctypes.c_void_p * len(parts))(*map(address, parts))
        self.row_bytes, self.row_stride = first[0].nbytes, first.stride(0) * first.itemsize

    def __len__(self) -> int:
        return self.parts[0].shape[0]


def checksum(rows: Rows, out: Tensor, index: Tensor | None = None) -> Tensor:
    """A checksum of row i in out[i]; with an index of row index[i].

    index: [n] int64; out: int64, [n] or [rows], or [] for one checksum of all rows. Returns out.

    No flip of one bit leaves a checksum as it was, nor do two flips within 4096 bytes of a row's part. Other changes do
    by a chance of about 2^-32 where they lie in 4096 bytes, of 2^-64 elsewhere. Raises ValueError on a wrong argument.
    """
    together, count = out.dim() == 0, len(rows)
    if index is not None:
        check(index, "index", (None,), torch.int64)
        count = index.shape[0]
    check(out, "out", () if together else (count,), torch.int64)
    if kernels() != "native":
        return out.copy_(reference.checksum(rows.parts, index, together))
    args = _Args(
        count,
        ctypes.addressof(rows.addresses),
        len(rows.parts),
        rows.row_bytes,
        rows.row_stride,
        address(index),
        address(out),
        together,
    )
    args.memory = rows
    launch("octavo_checksum", args)
    return out
