"""Linear layers whose weights stay quantised: the product of the dequantised weight, in every bit."""

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import device, kernels
from octavo.kernels.checks import check, compute_dtypes, output
from octavo.kernels.cpu.library import Args, address, launch, zeros_in_huge_pages
from octavo.kernels.matmul import PANEL, MatmulArgs, matmul_args, product_out

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of the native ops' ScaleType


class QuantisedArgs(ctypes.Structure):
    """A quantised weight, as the native ops take it among their arguments."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("scale_type", ctypes.c_int32),
        ("offsets_are_zeros", ctypes.c_int32),
    ]


class _PackArgs(Args):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("row_begin", ctypes.c_int64),
        ("panel_begin", ctypes.c_int64),
        ("panel_step", ctypes.c_int64),
        ("is_bf16", ctypes.c_int64),
        ("weight", QuantisedArgs),
    ]


class _Args(Args):
    _fields_ = [("product", MatmulArgs), ("weight", QuantisedArgs)]


class _EmbeddingArgs(Args):
    _fields_ = [
        ("count", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("first_id", ctypes.c_int64),
        ("num_parts", ctypes.c_int32),
        ("is_bf16", ctypes.c_int32),
        ("weight", QuantisedArgs),
    ]


@dataclass(frozen=True, slots=True)
class CodeFormat:
    """What a weight's codes mean: round(table[code] * scale) in the compute dtype, in groups of `group_size` along k.

    `table` has 16 entries, for codes of 4 bits; without one codes have 8 bits and are signed numbers: round(code *
    scale). `shift` is what else each group has, in the scale's dtype: an "offset",
    round(fma(table[code], scale, offset)); or a "zero" point, for which offset = -(zero * scale), exact in float32
    where scale and zero point have 16 bits.
    """

    table: tuple[float, ...] | None
    group_size: int
    scale_dtype: torch.dtype = torch.float32
    shift: Literal["offset", "zero"] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError on a wrong field."""
        if self.table is not None and len(self.table) != 16:
            raise ValueError(f"table: has {len(self.table)} entries, expected 16")
        if self.group_size < 16 or self.group_size % 16:
            raise ValueError(f"group_size: is {self.group_size}, expected a multiple of 16")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype: is {self.scale_dtype}, expected {' or '.join(map(str, SCALE_DTYPES))}")

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        return 8 if self.table is None else 4


@dataclass(slots=True)
class Packed4Bit:
    """A quantised weight [n, k] in the order that the ops read: native ones panels of 16 rows, the others plain.

    Plain: `codes` [n, k / 2] uint8, even k in the low half of a byte, odd k in the high one (codes of 8 bits: [n, k]);
    `scales`, and `offsets` or zero points (None without a shift), [n, k / group_size] in the format's scale dtype.
    `table` is the format's, float32. The rows are `num_parts` parts of equal size, of which panels take turns. `dtype`
    is that of the dequantised weight, of x and, usually, of the result.
    """

    format: CodeFormat
    n: int
    k: int
    dtype: torch.dtype
    table: Tensor | None
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    num_parts: int = 1

    def write_rows(self, begin: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> None:
        """Place rows, of any device, at [begin, begin + rows) of one part.

        codes: [rows, k] uint8: below 16, or the bits of signed numbers; scales, and offsets or zero points: [rows,
        k / group_size], of 16 or 32 bits. They are packed where they are. Raises ValueError on a wrong argument.
        """
        form = self.format
        check(codes, "codes", (None, self.k), torch.uint8, contiguous=False, any_device=True)
        rows, part_size = codes.shape[0], self.n // self.num_parts
        check(scales, "scales", (rows, self.k // form.group_size), SCALE_DTYPES, contiguous=False, any_device=True)
        if (offsets is None) != (form.shift is None):
            raise ValueError(f"offsets: {'missing' if form.shift else 'given'}, but the format's shift is {form.shift}")
        if offsets is not None:
            check(offsets, "offsets", scales.shape, SCALE_DTYPES, contiguous=False, any_device=True)
        part, row_begin = divmod(begin, part_size)
        if not 0 <= part < self.num_parts or row_begin + rows > part_size:
            raise ValueError(f"codes: rows [{begin}, {begin + rows}) do not fit the {self.n} rows that are packed")
        codes, scales = codes.contiguous(), scales.to(form.scale_dtype).contiguous()
        offsets = None if offsets is None else offsets.to(form.scale_dtype).contiguous()
        if kernels() == "native":
            args = _PackArgs(
                rows,
                address(codes),
                address(scales),
                address(offsets),
                row_begin,
                part,
                self.num_parts,
                self.dtype == torch.bfloat16,
                self.args(),
            )
            launch("octavo_pack_4bit", args)
            return
        self.codes[begin : begin + rows] = codes if form.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
        self.scales[begin : begin + rows] = scales
        if self.offsets is not None and offsets is not None:
            self.offsets[begin : begin + rows] = offsets

    def plain_codes(self) -> Tensor:
        """[n, k] uint8, of a plain weight."""
        return self.codes if self.table is None else torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(1)

    def plain_rows(self, rows: Tensor) -> "Packed4Bit":
        """Some of the rows of a plain weight, each as often as it is named."""
        offsets = None if self.offsets is None else self.offsets[rows]
        codes, scales = self.codes[rows], self.scales[rows]
        return Packed4Bit(self.format, len(rows), self.k, self.dtype, self.table, codes, scales, offsets)

    def args(self) -> QuantisedArgs:
        """For a native op."""
        return QuantisedArgs(
            address(self.codes),
            address(self.table),
            address(self.scales),
            address(self.offsets),
            self.n,
            self.k,
            self.format.group_size,
            SCALE_DTYPES.index(self.format.scale_dtype),
            self.format.shift == "zero",
        )


def takes_8_bit_codes() -> bool:
    """Whether the kernels take codes of 8 bits beside those of 4."""
    return kernels() != "triton"


def packed_4bit_bytes(n: int, k: int, form: CodeFormat) -> int:
    """Bytes of a quantised weight [n, k]: what `empty_packed_4bit` allocates."""
    rows = -(-n // PANEL) * PANEL if kernels() == "native" else n
    group_bytes = form.group_size * form.bits // 8 + form.scale_dtype.itemsize * (2 if form.shift else 1)
    return rows * (k // form.group_size) * group_bytes + (0 if form.table is None else 16 * 4)


def empty_packed_4bit(n: int, k: int, dtype: torch.dtype, form: CodeFormat, num_parts: int = 1) -> Packed4Bit:
    """A quantised weight to be filled with `write_rows`.

    Raises ValueError where k is not whole groups, and for several parts that are not whole panels of 16 rows.
    """
    if dtype not in compute_dtypes():
        raise ValueError(f"dtype: is {dtype}, expected {' or '.join(map(str, compute_dtypes()))}")
    if form.table is None and not takes_8_bit_codes():
        raise ValueError("table: is missing, but Triton's kernels take codes of 4 bits alone")
    if k % form.group_size:
        raise ValueError(f"k: is {k}, expected a multiple of the group size, {form.group_size}")
    if num_parts > 1 and n % (num_parts * PANEL):
        raise ValueError(f"n: is {n}, expected a multiple of {num_parts} parts of {PANEL}")
    table = None if form.table is None else torch.tensor(form.table, dtype=torch.float32, device=device())
    rows = -(-n // PANEL) * PANEL if kernels() == "native" else n
    codes = _zeros(rows, k * form.bits // 8, torch.uint8)
    scales = _zeros(rows, k // form.group_size, form.scale_dtype)
    offsets = _zeros(rows, k // form.group_size, form.scale_dtype) if form.shift else None
    return Packed4Bit(form, n, k, dtype, table, codes, scales, offsets, num_parts)


def _zeros(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if kernels() != "native":
        return torch.zeros((rows, columns), dtype=dtype, device=device())
    return zeros_in_huge_pages(rows * columns * dtype.itemsize).view(dtype).view(rows, columns)


def matmul_4bit(
    x: Tensor,
    weight: Packed4Bit,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`matmul` of the dequantised weight.

    x: [m, k], rows may be strided, dtype of the weight; bias: [n] float32; residual: [m, n], dtype of the result.
    Returns [m, n] in `out_dtype` (default x's; float32 is the other choice), in `out` if given, which may be the
    residual. Raises ValueError on a wrong argument.
    """
    out = product_out(x, weight, 1, bias, residual, out_dtype, out)
    if kernels() == "torch":
        return out.copy_(reference.matmul(x, dequantize_4bit(weight), bias, residual, out.dtype))
    _launch(x, weight, bias, residual, out)
    return out


def gated_matmul_4bit(x: Tensor, weight: Packed4Bit, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`gated_matmul` of the dequantised weight.

    x: [m, k], rows may be strided; weight: of two parts, gate first; bias: [n] float32. Returns [m, n / 2] in x's
    dtype, in `out` if given. Raises ValueError on a wrong argument.
    """
    out = product_out(x, weight, 2, bias, out=out)
    if kernels() == "torch":
        return out.copy_(reference.gated_matmul(x, dequantize_4bit(weight), bias))
    _launch(x, weight, bias, None, out)
    return out


def dequantize_4bit(weight: Packed4Bit, out: Tensor | None = None) -> Tensor:
    """The weight as numbers, [n, k] in its compute dtype, in `out` if given."""
    out = output(out, (weight.n, weight.k), weight.dtype)
    if kernels() == "native":
        _launch_rows(weight, None, 0, out)
    elif kernels() == "triton":
        from octavo.kernels.gpu import dequantize_4bit as gpu

        gpu.launch(weight, out)
    else:
        codes, shift = weight.plain_codes(), weight.format.shift
        out.copy_(reference.dequantize_4bit(codes, weight.table, weight.scales, weight.offsets, shift, weight.dtype))
    return out


def embedding_4bit(token_ids: Tensor, weight: Packed4Bit, out: Tensor | None = None, first_id: int = 0) -> Tensor:
    """`embedding` in the dequantised weight.

    token_ids: [tokens] int32. Returns [tokens, k], in `out` if given. Raises ValueError on a wrong argument.
    """
    check(token_ids, "token_ids", (None,), torch.int32)
    if weight.num_parts != 1:
        raise ValueError(f"weight: has {weight.num_parts} parts, expected 1")
    out = output(out, (token_ids.shape[0], weight.k), weight.dtype)
    if kernels() == "native":
        _launch_rows(weight, token_ids, first_id, out)
        return out
    rows = token_ids.long() - first_id
    inside = (rows >= 0) & (rows < weight.n)
    dequantize_4bit(weight.plain_rows(rows.where(inside, 0)), out)
    return out.mul_(inside[:, None])


def _launch_rows(weight: Packed4Bit, token_ids: Tensor | None, first_id: int, out: Tensor) -> None:
    args = _EmbeddingArgs(
        out.shape[0],
        address(out),
        address(token_ids),
        first_id,
        weight.num_parts,
        weight.dtype == torch.bfloat16,
        weight.args(),
    )
    launch("octavo_embedding_4bit", args)


def _launch(x: Tensor, weight: Packed4Bit, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    if kernels() == "triton":
        from octavo.kernels.gpu import matmul_4bit as gpu

        gpu.launch(x, weight, bias, residual, out, gated=weight.num_parts == 2)
        return
    product = matmul_args(x, weight.codes, weight.n, weight.num_parts, bias, residual, out)
    launch("octavo_matmul_4bit", _Args(product, weight.args()))
