"""Linear layers in one canonical order: a row's bits do not depend on how many rows share the call."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.activation_mul import silu_mul
from octavo.kernels.backend import device, exact, kernels
from octavo.kernels.checks import COMPUTE_DTYPES, check, compute_dtypes, output
from octavo.kernels.cpu.library import Args, address, empty_in_huge_pages, launch

PANEL = 16  # output columns that are stored together
BLOCK_K, MAX_K = 8, 1 << 20  # of a compressed weight: columns stored together, and what it has fewer columns than
# Exceptions: as many as k divided by these, of all panels on average (one of 256 numbers), and of any panel.
MEAN_EXCEPTIONS, MOST_EXCEPTIONS = 16, 2
SAMPLE_SIZE = 1 << 16  # numbers that say which high bytes are frequent, at most


class _PackArgs(Args):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("row_begin", ctypes.c_int64),
        ("panel_begin", ctypes.c_int64),
        ("panel_step", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
    ]


class _CompressArgs(Args):
    _fields_ = [
        ("packed", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("exceptions", ctypes.c_void_p),
        ("has_failed", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("max_exceptions", ctypes.c_int64),
    ]


@dataclass(slots=True)
class PackedWeight:
    """A weight [n, k] in the order that the ops read: panels of 16 rows where native ops exist, else plain.

    `data` holds ceil(n / 16) * 16 * k elements (or n * k, plain); rows past n are zero. The rows are `num_parts` parts
    of equal size, whose panels take turns. Of a compressed weight it holds codes: see `compress`.
    """

    data: Tensor
    n: int
    k: int
    num_parts: int = 1
    table: Tensor | None = None  # [16] uint8, of a compressed weight: the high bytes that codes stand for
    exceptions: Tensor | None = None  # [panels, max_exceptions] int32: where a panel has others, and which

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers: bfloat16 or float32; with Triton's kernels float16, too."""
        return self.data.dtype if self.table is None else torch.bfloat16

    def write_rows(self, begin: int, weight: Tensor) -> None:
        """Place `weight` [rows, k], of any device, at rows [begin, begin + rows) of one part, in this dtype.

        It is converted where it is: nothing but the packed weight takes memory of the device.
        """
        dtypes = (*COMPUTE_DTYPES, torch.float16)
        check(weight, "weight", (None, self.k), dtypes, contiguous=False, any_device=True)
        if self.table is not None:
            raise ValueError("weight: is compressed, nothing can be written to it any more")
        rows, part_size = weight.shape[0], self.n // self.num_parts
        part, row_begin = divmod(begin, part_size)
        if not 0 <= part < self.num_parts or row_begin + rows > part_size:
            raise ValueError(f"weight: rows [{begin}, {begin + rows}) do not fit the {self.n} rows that are packed")
        weight = weight.to(self.dtype).contiguous()
        if kernels() != "native":
            self.data.view(-1, self.k)[begin : begin + rows] = weight
            return
        args = _PackArgs(
            rows,
            address(self.data),
            address(weight),
            row_begin,
            part,
            self.num_parts,
            self.k,
            self.dtype == torch.bfloat16,
        )
        launch("octavo_pack_weight", args)


def compress(weights: Sequence[PackedWeight]) -> int:
    """Make 12 bits of each number of the weights, without loss, where that is possible. Returns the bytes saved.

    To be called once, when nothing is written to them any more. A bfloat16's low byte stays as it is; of its high byte,
    sign and exponent, four bits say which of the weight's 16 most frequent ones it is. Those span 16 binary orders of
    magnitude, and what trained weights have beside them is listed. Products take numbers from codes as they go, so no
    bit of a result changes. A weight that has too many others stays as it is, as does one that is not bfloat16 or whose
    k is not whole blocks; without native ops all do.

    After Zhang et al., arXiv 2504.11651, who give exponents Huffman codes.
    """
    todo = [weight for weight in weights if _may_be_compressed(weight)]
    memory = empty_in_huge_pages(sum(weight.data.nbytes // 4 * 3 for weight in todo))
    used = saved = 0
    for weight in todo:
        codes = memory[used : used + weight.data.nbytes // 4 * 3]
        if (found := _compressed(weight, codes)) is not None:
            before = weight.data.nbytes
            weight.table, weight.exceptions = found
            weight.data = codes  # what it held goes before the next weight is looked at
            used += codes.nbytes
            saved += before - sum(part.nbytes for part in (codes, *found))
    return saved


def _may_be_compressed(weight: PackedWeight) -> bool:
    fits = weight.n > 0 and 0 < weight.k < MAX_K and weight.k % BLOCK_K == 0
    return kernels() == "native" and weight.data.dtype == torch.bfloat16 and fits


def _compressed(weight: PackedWeight, codes: Tensor) -> tuple[Tensor, Tensor] | None:
    """Table and exceptions, the codes being written; None where these are too many."""
    panels = weight.data.view(-1, weight.k // 2, PANEL, 2)
    # Not the rows past n.
    numbers = (panels[: weight.n // PANEL] if weight.n >= PANEL else panels[:, :, : weight.n]).flatten()
    step = -(-len(numbers) // SAMPLE_SIZE) | 1  # odd, or some rows of the panels would never be looked at
    sample = numbers.view(torch.uint8)[1 :: 2 * step]
    table = torch.bincount(sample, minlength=256).topk(16).indices.to(torch.uint8)
    num_panels, max_exceptions = -(-weight.n // PANEL), -(-weight.k // MOST_EXCEPTIONS)
    exceptions = torch.empty((num_panels, max_exceptions), dtype=torch.int32)
    has_failed = torch.zeros(1, dtype=torch.int32)
    args = _CompressArgs(
        address(weight.data),
        address(codes),
        address(exceptions),
        address(has_failed),
        address(table),
        weight.n,
        weight.k,
        max_exceptions,
    )
    launch("octavo_compress", args)
    counts = (exceptions != -1).sum(dim=1)
    if has_failed or counts.sum() * MEAN_EXCEPTIONS > num_panels * weight.k:
        return None
    return table, exceptions[:, : int(counts.max())].contiguous()


def packed_bytes(n: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of a packed weight [n, k]: what `empty_packed` allocates."""
    rows = -(-n // PANEL) * PANEL if kernels() == "native" else n
    return rows * k * dtype.itemsize


def empty_packed(n: int, k: int, dtype: torch.dtype, num_parts: int = 1) -> PackedWeight:
    """A packed weight to be filled with `write_rows`.

    Raises ValueError for an odd k in bfloat16, and for several parts that are not whole panels.
    """
    if dtype not in compute_dtypes():
        raise ValueError(f"dtype: is {dtype}, expected {' or '.join(map(str, compute_dtypes()))}")
    if k % 2 and dtype == torch.bfloat16:
        raise ValueError(f"k: is {k}, expected an even number in bfloat16")
    if num_parts > 1 and n % (num_parts * PANEL):
        raise ValueError(f"n: is {n}, expected a multiple of {num_parts} parts of {PANEL}")
    data = torch.zeros(packed_bytes(n, k, dtype) // dtype.itemsize, dtype=dtype, device=device())
    return PackedWeight(data, n, k, num_parts)


class MatmulArgs(Args):
    """Of the native products; what a weight's address is of is the op's own matter."""

    _fields_ = [
        ("m", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
        ("out_is_bf16", ctypes.c_int32),
        ("gated", ctypes.c_int64),
    ]


class CompressedArgs(Args):
    """A compressed weight, as native ops take it."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("exceptions", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("max_exceptions", ctypes.c_int64),
    ]


class _CompressedMatmulArgs(Args):
    _fields_ = [("product", MatmulArgs), ("weight", CompressedArgs)]


class Weight(Protocol):
    """What products need to know of a weight [n, k], whatever it is packed into."""

    @property
    def n(self) -> int: ...  # noqa: D102
    @property
    def k(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def num_parts(self) -> int: ...  # noqa: D102


def product_out(
    x: Tensor,
    weight: Weight,
    num_parts: int,
    bias: Tensor | None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Checks the arguments of a product with a weight of so many parts, and gives what its result is to be written to.

    Raises ValueError on a wrong argument.
    """
    out_dtype = out_dtype or x.dtype
    check(x, "x", (None, weight.k), weight.dtype, contiguous=False)
    if out_dtype not in (x.dtype, torch.float32):
        raise ValueError(f"out_dtype: is {out_dtype}, expected {x.dtype} or {torch.float32}")
    if weight.num_parts != num_parts:
        raise ValueError(f"weight: has {weight.num_parts} parts, expected {num_parts}")
    shape = x.shape[0], weight.n // num_parts
    if bias is not None:
        check(bias, "bias", (weight.n,), torch.float32)
    if residual is not None:
        check(residual, "residual", shape, out_dtype)
    return output(out, shape, out_dtype)


def matmul(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias + residual, summed in float32 over k from 0 upwards, rounded once.

    x: [m, k], rows may be strided, dtype of the weight; bias: [n] float32; residual: [m, n], dtype of the result.
    Returns [m, n] in `out_dtype` (default x's; float32 is the other choice), in `out` if given, which may be the
    residual. Raises ValueError on a wrong argument.
    """
    out = product_out(x, weight, 1, bias, residual, out_dtype, out)
    if kernels() == "torch":
        return out.copy_(reference.matmul(x, weight.data.view(-1, weight.k), bias, residual, out.dtype))
    if kernels() == "triton" and not exact():
        return _vendor_matmul(x, weight, bias, residual, out)
    _launch(x, weight, bias, residual, out)
    return out


def gated_matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, where gate and up are the two halves of x @ weight.T + bias, in float32, rounded once.

    x: [m, k], rows may be strided; weight: of two parts, gate first; bias: [n] float32. Returns [m, n / 2] in x's
    dtype, in `out` if given. Raises ValueError on a wrong argument. Shazeer, arXiv 2002.05202.
    """
    out = product_out(x, weight, 2, bias, out=out)
    if kernels() == "torch":
        return out.copy_(reference.gated_matmul(x, weight.data.view(-1, weight.k), bias))
    if kernels() == "triton" and not exact():
        both = torch.empty((x.shape[0], weight.n), dtype=x.dtype, device=x.device)
        return silu_mul(_vendor_matmul(x, weight, bias, None, both), out)
    _launch(x, weight, bias, None, out)
    return out


def _vendor_matmul(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> Tensor:
    """By the vendor's library, in its own order, rounded to x's dtype before anything is added."""
    plain = weight.data.view(-1, weight.k).T
    if residual is not None and residual.dtype == x.dtype:
        torch.addmm(residual, x, plain, out=out)
    elif residual is None and out.dtype == x.dtype:
        torch.mm(x, plain, out=out)
    else:
        products = x @ plain
        torch.add(products, 0 if residual is None else residual, out=out)
    return out if bias is None else out.add_(bias)


def _launch(x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    if kernels() == "triton":
        from octavo.kernels.gpu import matmul as gpu  # here, since importing Triton takes its time

        gpu.launch(x, weight.data.view(-1, weight.k), bias, residual, out, gated=weight.num_parts == 2)
        return
    args = matmul_args(x, weight.data, weight.n, weight.num_parts, bias, residual, out)
    if (compressed := compressed_args(weight)) is None:
        launch("octavo_matmul", args)
    else:
        launch("octavo_matmul_compressed", _CompressedMatmulArgs(args, compressed))


def compressed_args(weight: PackedWeight) -> CompressedArgs | None:
    """None: it is not compressed."""
    if weight.table is None or weight.exceptions is None:
        return None
    return CompressedArgs(
        address(weight.data),
        address(weight.table),
        address(weight.exceptions),
        weight.n,
        weight.k,
        weight.exceptions.shape[1],
    )


def matmul_args(
    x: Tensor, data: Tensor, n: int, num_parts: int, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> MatmulArgs:
    """For a native product with a packed weight of n rows."""
    return MatmulArgs(
        x.shape[0],
        address(x),
        address(data),
        address(bias),
        address(residual),
        address(out),
        n,
        x.shape[1],
        x.stride(0),
        x.dtype == torch.bfloat16,
        out.dtype == torch.bfloat16,
        num_parts == 2,
    )
