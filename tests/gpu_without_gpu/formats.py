"""Number formats: how the bits in a register become numbers to compute with, and how results are rounded into bits.

Raw values are unsigned arrays. Half precision is computed in float32, which is wide enough for one correctly rounded
sum or product; where it is not (fused multiply-add), in float64 rounded to odd.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNSIGNED: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def bf16_to_f32(raw: Array) -> Array:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """To nearest, ties to even; NaN becomes 0x7fff, as on the GPU."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def to_odd_f32(x: Array) -> Array:
    """float64 -> float32, inexact results to the neighbour whose last bit is 1: a second rounding is then harmless."""
    nearest = x.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.int32)
    away = np.where(np.abs(x) > np.abs(back), 1, -1).astype(np.int32)
    inexact = (back != x) & np.isfinite(back) & ((bits & 1) == 0)
    # A value beyond the largest float32 must not step back from infinity; x itself is finite there.
    overflow = np.isinf(nearest) & np.isfinite(x)
    largest = np.copysign(np.float32(np.finfo(np.float32).max), nearest)
    return np.where(overflow, largest, np.where(inexact, bits + away, bits).astype(np.int32).view(np.float32))


class _Float8:
    """An 8-bit float: exact values by table, rounding by the midpoints between neighbours."""

    def __init__(self, exponent_bits: int, bias: int, largest: int, nan: int) -> None:
        mantissa_bits = 7 - exponent_bits
        codes = np.arange(128)
        exponent, mantissa = codes >> mantissa_bits, (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
        values[largest + 1 :] = np.nan
        if nan - largest > 1:
            values[largest + 1] = np.inf
        self.table = np.concatenate([values, -values]).astype(np.float32)
        self.midpoints = ((values[:largest] + values[1 : largest + 1]) / 2).astype(np.float32)
        self.nan = np.uint8(nan)

    def decode(self, raw: Array) -> Array:
        return self.table[raw]

    def encode(self, x: Array) -> Array:
        """float32 to nearest, ties to even, saturating to the largest finite value."""
        magnitude = np.abs(x)
        code = np.searchsorted(self.midpoints, magnitude)
        tie = self.midpoints[np.minimum(code, len(self.midpoints) - 1)] == magnitude
        code = (code + (tie & ((code & 1) == 1))).astype(np.uint8) | np.signbit(x).astype(np.uint8) << 7
        return np.where(np.isnan(x), self.nan, code)


E4M3 = _Float8(exponent_bits=4, bias=7, largest=0x7E, nan=0x7F)
E5M2 = _Float8(exponent_bits=5, bias=15, largest=0x7B, nan=0x7F)


class Format(NamedTuple):
    """A PTX type. `bits` is the width of the operand, `per_register` the numbers in it.

    Where numbers are the raw values seen as another type, `view` is that; None: the raw values themselves.
    """

    bits: int
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]
    per_register: int = 1
    view: Any = False  # False: there is more to it

    @property
    def raw(self) -> Any:
        return UNSIGNED[self.bits]


def _same(x: Array) -> Array:
    return x


def _unsigned(bits: int) -> Format:
    kind = UNSIGNED[bits]
    return Format(bits, _same, lambda x: x.astype(kind, copy=False), view=None)


def _viewed(bits: int, kind: Any) -> Format:
    unsigned = UNSIGNED[bits]
    return Format(bits, lambda raw: raw.view(kind), lambda x: x.astype(kind, copy=False).view(unsigned), view=kind)


def _f16(raw: Array) -> Array:
    return raw.view(np.float16).astype(np.float32)


def _to_f16(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def _packed(bits: int, part: Any, decode: Callable[[Array], Array], encode: Callable[[Array], Array]) -> Format:
    """Two numbers in one register, the first in the low half."""
    whole = UNSIGNED[bits]
    return Format(
        bits,
        lambda raw: decode(np.ascontiguousarray(raw).view(part)),
        lambda x: np.ascontiguousarray(encode(x)).view(whole),
        per_register=2,
    )


FORMATS = {
    "pred": Format(1, _same, _same, view=None),
    **{f"{kind}{bits}": _unsigned(bits) for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": _viewed(bits, SIGNED[bits]) for bits in (8, 16, 32, 64)},
    "f16": Format(16, _f16, _to_f16),
    "bf16": Format(16, bf16_to_f32, f32_to_bf16),
    "f32": _viewed(32, np.float32),
    "f64": _viewed(64, np.float64),
    "f16x2": _packed(32, np.uint16, _f16, _to_f16),
    "bf16x2": _packed(32, np.uint16, bf16_to_f32, f32_to_bf16),
    "u16x2": _packed(32, np.uint16, _same, _same),
    "s16x2": _packed(32, np.int16, _same, _same),
    "e4m3x2": _packed(16, np.uint8, E4M3.decode, E4M3.encode),
    "e5m2x2": _packed(16, np.uint8, E5M2.decode, E5M2.encode),
}


def flush(x: Array) -> Array:
    """Subnormal float32 to zero of the same sign (.ftz)."""
    small = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def fused_multiply_add(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of numbers with at most 24 bits of mantissa, in float64, rounded to odd where it does not fit.

    The product is exact. Rounding the sum to odd keeps what a second rounding, to the result's format, needs to know.
    """
    product = x.astype(np.float64) * y
    total = product + z
    return _to_odd(product, z, total) if ((total.view(np.int64) & 0x0FFF_FFFF) == 0).any() else total


def fused_multiply_add_f32(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of float32, rounded once."""
    product = x.astype(np.float64) * y
    total = product + z
    result = total.astype(np.float32)
    middle = (total.view(np.int64) & 0x1FFF_FFFF) == 0x1000_0000  # of two float32: what was rounded off would decide
    if middle.any() or ((np.abs(result) < np.finfo(np.float32).tiny) & (result != 0)).any():
        return _to_odd(product, z, total).astype(np.float32)
    return result


def _to_odd(product: Array, z: Array, total: Array) -> Array:
    """The float64 sum of two, `total`, moved to the neighbour whose last bit is 1 where it is not exact."""
    addend = np.broadcast_to(z, total.shape).astype(np.float64)
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exact: total + error is the true sum
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
    return np.where(inexact, bits + away, bits).view(np.float64)
