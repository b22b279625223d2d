"""Instructions that compute within a thread: integers, floats, conversions, comparisons, selections."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_without_gpu.errors import Unsupported
from gpu_without_gpu.formats import FORMATS, SIGNED, UNSIGNED, Array, flush, fused_multiply_add, to_odd_f32
from gpu_without_gpu.machine import Step
from gpu_without_gpu.operands import destination, elementwise, items, opcode, selector, source
from gpu_without_gpu.ptx import Group, Immediate, Instruction

HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def is_float(kind: str) -> bool:
    return "f" in kind


def one_type(instruction: Instruction) -> str:
    if len(instruction.types) != 1:
        raise instruction.unsupported("types")
    return instruction.types[0]


def flushing(instruction: Instruction, function: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, with subnormal operands and results as zero if the instruction says .ftz."""
    if "ftz" not in instruction.flags:
        return function
    if "f32" not in instruction.types:
        raise instruction.unsupported(".ftz")
    return lambda *operands: flush(function(*(flush(x) if x.dtype == np.float32 else x for x in operands)))


# Sums, products, quotients


def _high_unsigned(x: Array, y: Array) -> Array:
    if x.itemsize < 8:
        return ((x.astype(np.uint64) * y) >> (8 * x.itemsize)).astype(x.dtype)
    low = np.uint64(0xFFFF_FFFF)
    x0, x1, y0, y1 = x & low, x >> 32, y & low, y >> 32
    middle = x1 * y0 + (x0 * y0 >> 32)
    return x1 * y1 + (middle >> 32) + ((x0 * y1 + (middle & low)) >> 32)


def _high_signed(x: Array, y: Array) -> Array:
    kind = UNSIGNED[8 * x.itemsize]
    high = _high_unsigned(x.view(kind), y.view(kind)).view(x.dtype)
    return high - np.where(x < 0, y, 0) - np.where(y < 0, x, 0)  # type: ignore[no-any-return]


def _divide(x: Array, y: Array) -> Array:
    """Towards zero; the GPU gives all ones for a divisor of zero."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    if x.dtype.kind == "u":
        return np.where(y == 0, ~y.dtype.type(0), x // safe)
    unsigned = UNSIGNED[8 * x.itemsize]
    quotient = (np.abs(x).view(unsigned) // np.abs(safe).view(unsigned)).view(x.dtype)
    return np.where(y == 0, y.dtype.type(-1), np.where((x < 0) != (safe < 0), -quotient, quotient))


def _remainder(x: Array, y: Array) -> Array:
    return np.where(y == 0, x, x - _divide(x, y) * y)


def _extreme(pick: Callable[..., Array], negative_zero: bool) -> Callable[..., Array]:
    """A float minimum or maximum: -0 is less than +0."""

    def extreme(x: Array, y: Array) -> Array:
        result = pick(x, y)
        if (zeros := (x == 0) & (y == 0)).any():
            sign = np.signbit(x) | np.signbit(y) if negative_zero else np.signbit(x) & np.signbit(y)
            result = np.where(zeros, np.where(sign, -0.0, 0.0).astype(result.dtype), result)
        return result

    return extreme


FLOAT_FLAGS = {
    "add": "rn ftz",
    "sub": "rn ftz",
    "mul": "rn ftz",
    "min": "ftz NaN",
    "max": "ftz NaN",
    "div": "rn full approx ftz",
}
SIMPLE: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


@opcode("add", "sub", "min", "max", "div", "rem", "mul")
def _binary(instruction: Instruction) -> Step:
    kind, name = one_type(instruction), instruction.opcode
    if is_float(kind):
        if name not in FLOAT_FLAGS or (name == "div" and kind in HALVES):
            raise instruction.unsupported()
        flags = instruction.only(FLOAT_FLAGS[name])
        function = SIMPLE.get(name)
        if name == "min":
            function = _extreme(np.minimum if "NaN" in flags else np.fmin, negative_zero=True)
        elif name == "max":
            function = _extreme(np.maximum if "NaN" in flags else np.fmax, negative_zero=False)
        assert function is not None
        return elementwise(instruction, (kind, kind), kind, flushing(instruction, function))
    if name == "mul":
        return _multiply(instruction, kind, ())
    instruction.only("")
    integer = {**SIMPLE, "min": np.minimum, "max": np.maximum, "div": _divide, "rem": _remainder}[name]
    return elementwise(instruction, (kind, kind), kind, integer)


def _multiply(instruction: Instruction, kind: str, addend: tuple[()] | tuple[str]) -> Step:
    """mul and mad of integers."""
    flags = instruction.only("lo hi wide")
    bits, signed = FORMATS[kind].bits, kind[0] == "s"
    result = kind
    if "wide" in flags:
        result = f"{kind[0]}{2 * bits}"
        wide = (SIGNED if signed else UNSIGNED)[2 * bits]

        def product(x: Array, y: Array) -> Array:
            return x.astype(wide) * y.astype(wide)  # type: ignore[no-any-return]
    elif "hi" in flags:
        product = _high_signed if signed else _high_unsigned
    elif "lo" in flags:
        product = np.multiply
    else:
        raise instruction.unsupported()
    if addend:
        return elementwise(instruction, (kind, kind, result), result, lambda x, y, z: product(x, y) + z)
    return elementwise(instruction, (kind, kind), result, product)


@opcode("mad")
def _mad(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    return _fma(instruction) if is_float(kind) else _multiply(instruction, kind, (kind,))


@opcode("fma")
def _fma(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("rn ftz")
    if kind == "f64":
        raise instruction.unsupported("float64")
    function = fused_multiply_add
    if kind.startswith("bf16"):

        def function(x: Array, y: Array, z: Array) -> Array:
            return to_odd_f32(fused_multiply_add(x, y, z))
    elif kind == "f32":

        def function(x: Array, y: Array, z: Array) -> Array:
            return fused_multiply_add(x, y, z).astype(np.float32)

    return elementwise(instruction, (kind,) * 3, kind, flushing(instruction, function))


# One operand

# Approximate functions are computed in float64 and rounded to float32: nearer to the truth than a GPU's, and the same
# for a value wherever it stands in an array.
APPROXIMATE: dict[str, Callable[..., Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
}


@opcode(*APPROXIMATE)
def _function(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    flags = instruction.only("approx ftz rn" if instruction.opcode in ("sqrt", "rcp") else "approx ftz")
    exact = APPROXIMATE[instruction.opcode]
    if not flags & {"approx", "rn"}:
        raise instruction.unsupported()
    if kind == "f64" and "rn" in flags:
        return elementwise(instruction, (kind,), kind, exact)
    if kind == "f64":
        raise instruction.unsupported("float64")

    def function(x: Array) -> Array:
        return exact(x.astype(np.float64)).astype(np.float32)

    return elementwise(instruction, (kind,), kind, flushing(instruction, function))


@opcode("neg", "abs")
def _sign(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("ftz" if is_float(kind) else "")
    if kind in HALVES:  # of the bits, so that NaN keeps them
        top = 0x8000 if FORMATS[kind].bits == 16 else 0x8000_8000
        bits = f"b{FORMATS[kind].bits}"
        flip = instruction.opcode == "neg"
        return elementwise(
            instruction, (bits,), bits, lambda x: x ^ x.dtype.type(top) if flip else x & ~x.dtype.type(top)
        )
    function = np.negative if instruction.opcode == "neg" else np.abs
    return elementwise(instruction, (kind,), kind, flushing(instruction, function))


@opcode("copysign")
def _copysign(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("")
    return elementwise(instruction, (kind, kind), kind, lambda sign, x: np.copysign(x, sign))


@opcode("popc", "clz", "brev")
def _bits(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("")
    bits = FORMATS[kind].bits

    def clz(x: Array) -> Array:
        count = np.zeros(x.shape, np.uint32)
        for shift in (32, 16, 8, 4, 2, 1):
            if shift < bits:
                high = (x >> x.dtype.type(bits - shift)) == 0
                x = np.where(high, x << x.dtype.type(shift), x)
                count = count + np.where(high, np.uint32(shift), np.uint32(0))
        return count + (x == 0)  # type: ignore[no-any-return]

    def brev(x: Array) -> Array:
        table = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)
        flipped = table[np.ascontiguousarray(x).view(np.uint8).reshape(-1, bits // 8)[:, ::-1]]
        return np.ascontiguousarray(flipped).view(x.dtype).reshape(-1)

    if instruction.opcode == "brev":
        return elementwise(instruction, (kind,), kind, brev)
    return elementwise(instruction, (kind,), "u32", clz if instruction.opcode == "clz" else np.bitwise_count)


# Bits


@opcode("and", "or", "xor", "not", "cnot")
def _logic(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("")
    functions: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    if instruction.opcode in functions:
        return elementwise(instruction, (kind, kind), kind, functions[instruction.opcode])
    return elementwise(instruction, (kind,), kind, np.invert if instruction.opcode == "not" else lambda x: x == 0)


@opcode("shl", "shr")
def _shift(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("")
    bits = FORMATS[kind].bits
    left, signed = instruction.opcode == "shl", kind[0] == "s"

    def shift(x: Array, count: Array) -> Array:
        within = np.minimum(count, bits - 1).astype(x.dtype)
        moved = x << within if left else x >> within
        return moved if signed and not left else np.where(count < bits, moved, x.dtype.type(0))

    operand = instruction.operands[2]
    if isinstance(operand, Immediate) and 0 <= operand.value < bits:
        constant = FORMATS[kind].decode(np.zeros(1, FORMATS[kind].raw)).dtype.type(operand.value)
        return elementwise(instruction, (kind, "u32"), kind, lambda x, _: x << constant if left else x >> constant)
    return elementwise(instruction, (kind, "u32"), kind, shift)


@opcode("shf")
def _funnel_shift(instruction: Instruction) -> Step:
    one_type(instruction)
    flags = instruction.only("l r wrap clamp")

    def shift(low: Array, high: Array, count: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low
        count = (count & 31 if "wrap" in flags else np.minimum(count, 32)).astype(np.uint64)
        return (both << count >> np.uint64(32) if "l" in flags else both >> count).astype(np.uint32)  # type: ignore[no-any-return]

    return elementwise(instruction, ("b32",) * 3, "b32", shift)


@opcode("bfe")
def _extract(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("")
    bits, signed = FORMATS[kind].bits, kind[0] == "s"

    def extract(x: Array, position: Array, length: Array) -> Array:
        position, length = np.minimum(position & 0xFF, bits), np.minimum(length & 0xFF, bits)
        if not signed:
            shifted = np.where(position < bits, x >> np.minimum(position, bits - 1).astype(x.dtype), x.dtype.type(0))
            ones = np.where(
                length < bits,
                (x.dtype.type(1) << np.minimum(length, bits - 1).astype(x.dtype)) - x.dtype.type(1),
                ~x.dtype.type(0),
            )
            return shifted & ones  # type: ignore[no-any-return]
        top = np.minimum(position + length, bits)  # shift the field up against the sign, then down again
        up = np.minimum(bits - top, bits - 1).astype(x.dtype)
        down = np.minimum(bits - top + position, bits - 1).astype(x.dtype)
        return np.where(length == 0, x.dtype.type(0), (x << up) >> down)

    return elementwise(instruction, (kind, "u32", "u32"), kind, extract)


@opcode("bfi")
def _insert(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("")
    bits = FORMATS[kind].bits

    def insert(field: Array, into: Array, position: Array, length: Array) -> Array:
        one = field.dtype.type(1)
        position, length = np.minimum(position & 0xFF, bits), np.minimum(length & 0xFF, bits)
        ones = np.where(
            length < bits, (one << np.minimum(length, bits - 1).astype(field.dtype)) - one, ~field.dtype.type(0)
        )
        shift = np.minimum(position, bits - 1).astype(field.dtype)
        mask = np.where(position < bits, ones << shift, field.dtype.type(0))
        return (into & ~mask) | ((field << shift) & mask)  # type: ignore[no-any-return]

    return elementwise(instruction, (kind, kind, "u32", "u32"), kind, insert)


@opcode("prmt")
def _permute(instruction: Instruction) -> Step:
    one_type(instruction)
    instruction.only("")

    def general(x: Array, y: Array, selection: Array) -> Array:
        both = x.astype(np.uint64) | (y.astype(np.uint64) << np.uint64(32))
        result = np.zeros(1, np.uint32)
        for i in range(4):
            pick = selection >> np.uint32(4 * i) & 15
            byte = (both >> ((pick & 7).astype(np.uint64) * 8) & np.uint64(255)).astype(np.uint32)
            byte = np.where(pick & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
            result = result | byte << np.uint32(8 * i)
        return result

    return elementwise(instruction, ("b32",) * 3, "b32", general)


@opcode("lop3")
def _logic3(instruction: Instruction) -> Step:
    one_type(instruction)
    instruction.only("")
    table = selector(instruction, instruction.operands[4])
    invert = table.bit_count() > 4
    terms = [i for i in range(8) if (table >> i & 1) != invert]

    def combine(x: Array, y: Array, z: Array, _: Array) -> Array:
        result = np.zeros(1, np.uint32)
        for i in terms:
            result = result | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        return ~result if invert else result

    return elementwise(instruction, ("b32",) * 4, "b32", combine)


# Moves, comparisons, selections


@opcode("mov")
def _move(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("")
    target, origin = instruction.operands
    if not isinstance(target, Group) and not isinstance(origin, Group):
        return elementwise(instruction, (kind,), kind, lambda x: x)
    parts = items(target) if isinstance(target, Group) else items(origin)
    bits = FORMATS[kind].bits // len(parts)
    part = f"b{bits}"
    if isinstance(target, Group):
        read = source(instruction, origin, kind)
        writes = [destination(instruction, each, part) for each in parts]

        def unpack(batch: Any, mask: Any) -> None:
            values = read(batch)
            for i, write in enumerate(writes):
                write(batch, values >> values.dtype.type(i * bits), mask)

        return unpack
    reads = [source(instruction, each, part) for each in parts]
    write = destination(instruction, target, kind)
    whole = FORMATS[kind].raw

    def pack(batch: Any, mask: Any) -> None:
        value = reads[0](batch).astype(whole)
        for i, read in enumerate(reads[1:], 1):
            value = value | read(batch).astype(whole) << whole(i * bits)
        write(batch, value, mask)

    return pack


@opcode("cvta")
def _convert_address(instruction: Instruction) -> Step:
    instruction.only("to global")  # generic addresses are global ones here
    if "global" not in instruction.flags:
        raise instruction.unsupported()
    return elementwise(instruction, ("u64",), "u64", lambda x: x)


@opcode("selp")
def _select(instruction: Instruction) -> Step:
    bits = f"b{FORMATS[one_type(instruction)].bits}"
    instruction.only("")
    return elementwise(instruction, (bits, bits, "pred"), bits, lambda x, y, which: np.where(which, x, y))


COMPARE: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _unordered(x: Array, y: Array) -> Array:
    return np.isnan(x) | np.isnan(y)


def _float_comparison(name: str) -> Callable[..., Array] | None:
    if name == "nan":
        return _unordered
    if name == "num":
        return lambda x, y: ~_unordered(x, y)
    if name == "ne":
        return lambda x, y: (x != y) & ~_unordered(x, y)
    if name.endswith("u") and name[:-1] in COMPARE:
        compare = COMPARE[name[:-1]]
        return lambda x, y: compare(x, y) | _unordered(x, y)
    return COMPARE.get(name)


@opcode("setp")
def _compare(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    if kind in ("f16x2", "bf16x2", "pred"):
        raise instruction.unsupported()
    name, *rest = [flag for flag in instruction.flags if flag != "ftz"]
    compare = _float_comparison(name) if is_float(kind) else COMPARE.get(name)
    if compare is None:
        raise instruction.unsupported(f"comparison {name}")
    if "ftz" in instruction.flags:
        plain = compare

        def compare(x: Array, y: Array) -> Array:
            return plain(flush(x), flush(y))

    if not rest:
        return elementwise(instruction, (kind, kind), "pred", compare)
    combine = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.get(rest[0])
    if combine is None or len(rest) > 1:
        raise instruction.unsupported()
    return elementwise(instruction, (kind, kind, "pred"), "pred", lambda x, y, p: combine(compare(x, y), p))


# Conversions


def _to_integer(target: str, rounding: str, wide: bool) -> Callable[[Array], Array]:
    kind = FORMATS[target].raw if target[0] == "u" else SIGNED[FORMATS[target].bits]
    limits = np.iinfo(kind)
    round_ = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    of_nan = kind(limits.max // 2 + 1 if target[0] == "u" else limits.min) if wide else kind(0)

    def convert(x: Array) -> Array:
        whole = round_(x.astype(np.float64))
        # A float64 cannot hold the largest 64-bit integer: compare, and convert only what is within.
        low, high = whole <= float(limits.min), whole >= float(limits.max)
        inside = np.where(low | high | np.isnan(whole), 0.0, whole).astype(kind)
        result = np.where(low, kind(limits.min), np.where(high, kind(limits.max), inside))
        return np.where(np.isnan(x), of_nan, result)

    return convert


def _round_to_tf32(x: Array, away: bool) -> Array:
    bits = x.view(np.uint32)
    half = np.uint32(0x1000) if away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    rounded = (bits + half) & np.uint32(0xFFFF_E000)
    return np.where(np.isfinite(x), rounded, bits)


@opcode("cvt")
def _convert(instruction: Instruction) -> Step:
    if len(instruction.types) != 2:
        raise instruction.unsupported("types")
    target, origin = instruction.types
    flags = instruction.only("rn rz rna rni rzi rmi rpi ftz satfinite sat")
    if "sat" in flags or ("rz" in flags and (target, origin) != ("bf16", "f32")):
        raise instruction.unsupported("rounding")
    if (("rna" in flags) and target != "tf32") or (("satfinite" in flags) != (target in ("e4m3x2", "e5m2x2"))):
        raise instruction.unsupported("rounding")
    if target == "tf32":
        if origin != "f32":
            raise instruction.unsupported("types")
        return elementwise(instruction, ("f32",), "b32", lambda x: _round_to_tf32(x, "rna" in flags))
    if target not in FORMATS or origin not in FORMATS:
        raise instruction.unsupported("types")
    if FORMATS[target].per_register == 2 and FORMATS[origin].per_register == 1:
        if origin != "f32" or "rn" not in flags:
            raise instruction.unsupported("types")
        return elementwise(instruction, ("f32", "f32"), target, lambda high, low: _interleave(low, high))
    if FORMATS[target].per_register != FORMATS[origin].per_register:
        raise instruction.unsupported("types")
    rounding = flags & {"rni", "rzi", "rmi", "rpi"}
    if is_float(origin) and not is_float(target):
        (how,) = rounding or {"rzi"}
        wide = origin == "f64" or target in ("s64", "u64")
        return elementwise(instruction, (origin,), target, flushing(instruction, _to_integer(target, how, wide)))
    if rounding:
        if target != origin:
            raise instruction.unsupported("rounding")
        (how,) = rounding
        return elementwise(
            instruction, (origin,), target, {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how]
        )
    if "rz" in flags:
        return elementwise(instruction, ("b32",), "b16", lambda x: x >> np.uint32(16))
    if is_float(target) and not is_float(origin):
        return elementwise(instruction, (origin,), target, _from_integer(target))
    if origin == "f64" and target == "bf16":
        return elementwise(instruction, (origin,), target, to_odd_f32)
    return elementwise(instruction, (origin,), target, flushing(instruction, lambda x: x))


def _interleave(low: Array, high: Array) -> Array:
    low, high = np.broadcast_arrays(low, high)
    return np.stack([low, high], axis=1).reshape(-1)


def _from_integer(target: str) -> Callable[[Array], Array]:
    if target == "f32":
        return lambda x: x.astype(np.float32)
    if target == "f64":
        return lambda x: x.astype(np.float64)

    def convert(x: Array) -> Array:
        if x.itemsize == 8:
            raise Unsupported("not executed without a GPU: a 64-bit integer to half precision")
        wide = x.astype(np.float64)
        return to_odd_f32(wide) if target == "bf16" else wide

    return convert
