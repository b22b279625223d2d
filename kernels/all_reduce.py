"""The sum over ranks, with what is added to it once: the same bits wherever an element lies, and in any batch."""

import ctypes

import torch
import torch.distributed as dist
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import kernels
from octavo.kernels.checks import check, compute_dtypes
from octavo.kernels.cpu.library import Args, address, call, launch
from octavo.kernels.ranks import DistributedRanks, NativeRanks, Ranks, SharedMemoryRanks

ALIGNMENT = 16  # elements: ranks' slices begin where wide loads may
MAX_PARTS = 8


class _Args(Args):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("ranks", NativeRanks),
        ("parts_offset", ctypes.c_int64),
        ("part_bytes", ctypes.c_int64),
        ("num_parts", ctypes.c_int64),
        ("sums_offset", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
        ("parts_are_float", ctypes.c_int32),
    ]


def all_reduce(
    parts: Tensor,
    out: Tensor,
    ranks: Ranks,
    *,
    sums: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The sum of all ranks' parts, plus bias and residual, in float32, rounded once; the same on every rank.

    parts: [parts of this rank, rows, width], float32 or dtype of the result, each rank as many, at most 8 in all; they
    are added in a balanced tree, ((0 + 1) + (2 + 3)) + ... in the order of ranks, so that the bits depend on how many
    parts there are and not on who holds them. out: [rows, width], returned; bias: [width] float32; residual: as out,
    and may be out. Libraries add in an order that depends on an element's place, so they only move bytes: each rank is
    sent its slice of everybody's parts, adds, and sends the sums to all. With shared memory `parts` are part of a
    buffer, and `sums`, part of another and like out, is where a rank's slice goes meanwhile. Raises ValueError on a
    wrong argument.
    """
    check(out, "out", (None, None), compute_dtypes())
    rows, width = out.shape
    check(parts, "parts", (None, rows, width), (torch.float32, out.dtype), contiguous=False)
    if width % ALIGNMENT or not 1 <= len(parts) * ranks.num_ranks <= MAX_PARTS or not parts[0].is_contiguous():
        raise ValueError(f"parts: shape is {tuple(parts.shape)} on each of {ranks.num_ranks} ranks, expected rows of a "
                         f"multiple of {ALIGNMENT}, one after the other, and at most {MAX_PARTS} parts")  # fmt: skip
    if bias is not None:
        check(bias, "bias", (width,), torch.float32)
    if residual is not None:
        check(residual, "residual", (rows, width), out.dtype)
    if isinstance(ranks, DistributedRanks):
        # Each rank sums its own before: that is a part of the tree for a power of two, and rounds nothing in float32.
        if len(parts) > 1 and (parts.dtype != torch.float32 or len(parts).bit_count() > 1):
            raise ValueError(f"parts: {len(parts)} of {parts.dtype} on each rank, expected one, or a power of two in "
                             f"{torch.float32}")  # fmt: skip

        def exchange(num_rows: int) -> None:
            added = None if residual is None else residual[:num_rows]
            with ranks.counted():
                _all_reduce_distributed(parts[:, :num_rows], out[:num_rows], ranks.group, bias, added)

        call(exchange, rows)
        return out
    if kernels() == "native":
        native, parts_offset, sums_offset = NativeRanks(regions=parts.data_ptr(), num_ranks=1), 0, 0
        if isinstance(ranks, SharedMemoryRanks):
            if sums is None:
                raise ValueError("sums: missing, with memory that ranks share")
            check(sums, "sums", (rows, width), out.dtype)
            native, parts_offset, sums_offset = ranks.native, ranks.offset(parts), ranks.offset(sums)
        args = _Args(
            rows,
            native,
            parts_offset,
            parts.stride(0) * parts.dtype.itemsize,
            len(parts),
            sums_offset,
            address(bias),
            address(residual),
            address(out),
            width,
            out.dtype == torch.bfloat16,
            parts.dtype == torch.float32,
        )
        launch("octavo_all_reduce", args)
        return out
    added = None if residual is None else residual.view(-1)
    _sum(parts.flatten(1), out.view(-1), 0, width, bias, added)
    return out


def _all_reduce_distributed(
    parts: Tensor, out: Tensor, group: dist.ProcessGroup, bias: Tensor | None, residual: Tensor | None
) -> None:
    num_ranks, rows_width = group.size(), out.numel()
    size = -(-rows_width // (num_ranks * ALIGNMENT)) * ALIGNMENT
    begin, end = (min(i * size, rows_width) for i in (group.rank(), group.rank() + 1))
    sent = torch.zeros((num_ranks, size), dtype=parts.dtype, device=parts.device)
    _sum(parts.flatten(1), sent.view(-1)[:rows_width], 0, 1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8), group=group)
    whole = torch.empty((num_ranks, size), dtype=out.dtype, device=out.device)
    part = whole[group.rank()]
    added = None if residual is None else residual.view(-1)[begin:end]
    _sum(received[:, : end - begin], part[: end - begin], begin, out.shape[1], bias, added)
    dist.all_gather_single(whole.view(torch.uint8).view(-1), part.clone().view(torch.uint8), group=group)
    out.copy_(whole.view(-1)[:rows_width].view_as(out))


def _sum(
    parts: Tensor, out: Tensor, begin: int, width: int, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    """parts: [parts, size]; out and residual: [size], elements from `begin` on of rows of `width`."""
    if kernels() == "triton":
        from octavo.kernels.gpu import all_reduce as gpu  # here, since importing Triton takes its time

        gpu.launch(parts, out, begin, width, bias, residual)
        return
    columns = torch.arange(begin, begin + out.numel()) % width
    out.copy_(reference.sum_parts(parts, None if bias is None else bias[columns], residual, out.dtype))
