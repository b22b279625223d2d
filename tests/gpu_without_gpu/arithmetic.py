"""Instructions that compute within a thread: integers, floats, conversions, comparisons, selections."""

from collections.abc import Callable

import numpy as np

from gpu_without_gpu.formats import (
    FORMATS,
    SIGNED,
    UNSIGNED,
    Array,
    Format,
    flush,
    fused_multiply_add,
    fused_multiply_add_f32,
    to_odd_f32,
)
from gpu_without_gpu.machine import Batch, Mask, Step
from gpu_without_gpu.operands import destination, elementwise, items, opcode, selector, source
from gpu_without_gpu.ptx import Group, Immediate, Instruction

Function = Callable[..., Array]


def is_float(kind: str) -> bool:
    return "f" in kind


def one_type(instruction: Instruction) -> str:
    if len(instruction.types) != 1:
        raise instruction.unsupported("types")
    return instruction.types[0]


def flushing(instruction: Instruction, function: Function) -> Function:
    """`function`, with subnormal operands and results as zero if the instruction says .ftz."""
    if "ftz" not in instruction.flags:
        return function
    if "f32" not in instruction.types:
        raise instruction.unsupported(".ftz")

    def flushed(*operands: Array) -> Array:
        result = function(*(flush(x) if x.dtype == np.float32 else x for x in operands))
        return flush(result) if result.dtype == np.float32 else result

    return flushed


# Floats


def _extreme(pick: Function, negative_zero: bool) -> Function:
    """A float minimum or maximum: -0 is less than +0."""

    def extreme(x: Array, y: Array) -> Array:
        result = pick(x, y)
        if (zeros := (x == 0) & (y == 0)).any():
            sign = np.signbit(x) | np.signbit(y) if negative_zero else np.signbit(x) & np.signbit(y)
            result = np.where(zeros, np.where(sign, -0.0, 0.0).astype(result.dtype), result)
        return result

    return extreme


def _rounded(function: Function) -> Function:
    """A function of float32 by way of float64: for approximate ones nearer to the truth than a GPU, and the same for a
    value wherever it stands in an array, which numpy's own float32 functions need not be."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


FLOAT: dict[str, tuple[int, str, Function]] = {  # number of operands, flags, meaning
    "add": (2, "rn ftz", np.add),
    "sub": (2, "rn ftz", np.subtract),
    "mul": (2, "rn ftz", np.multiply),
    "min": (2, "ftz", _extreme(np.fmin, negative_zero=True)),
    "max": (2, "ftz", _extreme(np.fmax, negative_zero=False)),
    "min.NaN": (2, "ftz NaN", _extreme(np.minimum, negative_zero=True)),
    "max.NaN": (2, "ftz NaN", _extreme(np.maximum, negative_zero=False)),
    "neg": (1, "ftz", np.negative),
    "abs": (1, "ftz", np.abs),
}
FLOAT32 = FLOAT | {
    "div": (2, "rn full approx ftz", np.divide),
    "fma": (3, "rn ftz", fused_multiply_add_f32),
    "copysign": (2, "", lambda sign, x: np.copysign(x, sign)),
    "sqrt": (1, "approx rn ftz", _rounded(np.sqrt)),
    "rsqrt": (1, "approx ftz", _rounded(lambda x: 1 / np.sqrt(x))),
    "rcp": (1, "approx rn ftz", _rounded(lambda x: 1 / x)),
    "ex2": (1, "approx ftz", _rounded(np.exp2)),
    "lg2": (1, "approx ftz", _rounded(np.log2)),
    "sin": (1, "approx ftz", _rounded(np.sin)),
    "cos": (1, "approx ftz", _rounded(np.cos)),
    "tanh": (1, "approx", _rounded(np.tanh)),
}
FLOAT64 = FLOAT | {"div": (2, "rn", np.divide), "sqrt": (1, "rn", np.sqrt), "rcp": (1, "rn", lambda x: 1 / x)}
FLOAT16 = FLOAT | {"fma": (3, "rn", fused_multiply_add)}
BFLOAT16 = FLOAT | {"fma": (3, "rn", lambda x, y, z: to_odd_f32(fused_multiply_add(x, y, z)))}
FLOATS = {"f32": FLOAT32, "f64": FLOAT64, "f16": FLOAT16, "f16x2": FLOAT16, "bf16": BFLOAT16, "bf16x2": BFLOAT16}


# Integers. Shift counts and the like are taken modulo the width only after what lies beyond has been seen to.


def _divide(x: Array, y: Array) -> Array:
    """Towards zero. What the GPU gives for a divisor of zero is all ones."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    if x.dtype.kind == "u":
        return np.where(y == 0, ~y.dtype.type(0), x // safe)
    unsigned = UNSIGNED[8 * x.itemsize]
    quotient = (np.abs(x).view(unsigned) // np.abs(safe).view(unsigned)).view(x.dtype)
    return np.where(y == 0, y.dtype.type(-1), np.where((x < 0) != (safe < 0), -quotient, quotient))


def _count_leading_zeros(x: Array) -> Array:
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | x >> x.dtype.type(min(shift, 8 * x.itemsize - 1))
    return np.bitwise_count(~x)


def _ones(length: Array, like: Array) -> Array:
    """`length` ones from the lowest bit up."""
    bits = 8 * like.itemsize
    one = UNSIGNED[bits](1)
    return np.where(length < bits, (one << (length % bits).astype(one.dtype)) - one, ~UNSIGNED[bits](0))


def _shift_left(x: Array, count: Array) -> Array:
    bits = 8 * x.itemsize
    return np.where(count < bits, x << (count % bits).astype(x.dtype), x.dtype.type(0))


def _shift_right(x: Array, count: Array) -> Array:
    bits = 8 * x.itemsize
    if x.dtype.kind == "i":
        return x >> np.minimum(count, bits - 1).astype(x.dtype)
    return np.where(count < bits, x >> (count % bits).astype(x.dtype), x.dtype.type(0))


def _extract(x: Array, position: Array, length: Array) -> Array:
    bits = 8 * x.itemsize
    position, length = np.minimum(position & 255, bits), np.minimum(length & 255, bits)
    if x.dtype.kind == "u":
        return _shift_right(x, position) & _ones(length, x)
    up = bits - np.minimum(position + length, bits)  # move the field up against the sign, then down
    return np.where(length == 0, x.dtype.type(0), _shift_right(_shift_left(x, up), up + position))


def _insert(field: Array, into: Array, position: Array, length: Array) -> Array:
    position, length = position & 255, length & 255
    mask = _shift_left(_ones(length, field), position)
    return (into & ~mask) | (_shift_left(field, position) & mask)


def _permute(x: Array, y: Array, selection: Array) -> Array:
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    result = np.zeros(1, np.uint32)
    for i in range(4):
        pick = selection >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> ((pick & 7) * 8).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        if (signs := pick & 8).any():  # its sign in place of the byte
            byte = np.where(signs, (byte >> np.uint32(7)) * np.uint32(255), byte)
        result = result | byte << np.uint32(8 * i)
    return result


INTEGER: dict[str, tuple[str, str, Function]] = {  # types of the operands and the result, meaning; = is the own type
    "add": ("= =", "=", np.add),
    "sub": ("= =", "=", np.subtract),
    "div": ("= =", "=", _divide),
    "rem": ("= =", "=", lambda x, y: x - _divide(x, y) * y),
    "min": ("= =", "=", np.minimum),
    "max": ("= =", "=", np.maximum),
    "neg": ("=", "=", np.negative),
    "abs": ("=", "=", np.abs),
    "and": ("= =", "=", np.bitwise_and),
    "or": ("= =", "=", np.bitwise_or),
    "xor": ("= =", "=", np.bitwise_xor),
    "not": ("=", "=", np.invert),
    "shl": ("= u32", "=", _shift_left),
    "shr": ("= u32", "=", _shift_right),
    "popc": ("=", "u32", np.bitwise_count),
    "clz": ("=", "u32", _count_leading_zeros),
    "bfe": ("= u32 u32", "=", _extract),
    "bfi": ("= = u32 u32", "=", _insert),
    "prmt": ("= = =", "=", _permute),
}


@opcode(*{*FLOAT, *FLOAT32, *INTEGER} - {"min.NaN", "max.NaN", "mul", "fma"})
def _simple(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    if is_float(kind):
        name = f"{instruction.opcode}.NaN" if "NaN" in instruction.flags else instruction.opcode
        if name not in FLOATS[kind]:
            raise instruction.unsupported()
        count, flags, function = FLOATS[kind][name]
        instruction.only(flags)
        return elementwise(instruction, (kind,) * count, kind, flushing(instruction, function))
    if instruction.opcode not in INTEGER:
        raise instruction.unsupported()
    instruction.only("")
    operands, result, function = INTEGER[instruction.opcode]
    shift = instruction.operands[-1]
    if instruction.opcode in ("shl", "shr") and isinstance(shift, Immediate) and shift.value < FORMATS[kind].bits:
        count = FORMATS[kind].decode(np.array([shift.value], FORMATS[kind].raw))
        move = np.left_shift if instruction.opcode == "shl" else np.right_shift
        return elementwise(instruction, (kind, "u32"), kind, lambda x, _: move(x, count))
    kinds = tuple(operands.replace("=", kind).split())
    return elementwise(instruction, kinds, result.replace("=", kind), function)


def _high(x: Array, y: Array) -> Array:
    """The upper half of a product."""
    bits = 8 * x.itemsize
    if bits < 64:
        wide = (SIGNED if x.dtype.kind == "i" else UNSIGNED)[64]
        return (x.astype(wide) * y.astype(wide) >> wide(bits)).astype(x.dtype)
    if x.dtype.kind == "i":
        high = _high(x.view(np.uint64), y.view(np.uint64)).view(np.int64)
        return high - np.where(x < 0, y, 0) - np.where(y < 0, x, 0)
    low, half = np.uint64(0xFFFF_FFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    return x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)


def _wide(kind: type) -> Function:
    return lambda x, y: x.astype(kind) * y.astype(kind)


@opcode("mul", "mad", "fma")
def _multiply(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    if is_float(kind):
        return _simple(instruction)
    bits, types = FORMATS[kind].bits, SIGNED if kind[0] == "s" else UNSIGNED
    flags = instruction.only("lo hi wide")
    result = kind
    function: Function = np.multiply
    if flags == {"wide"}:
        result = f"{kind[0]}{2 * bits}"
        function = _wide(types[2 * bits])
    elif flags == {"hi"}:
        function = _high
    elif flags != {"lo"}:
        raise instruction.unsupported()
    if instruction.opcode == "mul":
        return elementwise(instruction, (kind, kind), result, function)
    return elementwise(instruction, (kind, kind, result), result, lambda x, y, z: function(x, y) + z)


@opcode("shf")
def _funnel_shift(instruction: Instruction) -> Step:
    flags = instruction.only("l r wrap clamp")

    def shift(low: Array, high: Array, count: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low
        count = (count & 31 if "wrap" in flags else np.minimum(count, 32)).astype(np.uint64)
        return (both << count >> np.uint64(32) if "l" in flags else both >> count).astype(np.uint32)

    return elementwise(instruction, (one_type(instruction),) * 3, "b32", shift)


@opcode("lop3")
def _logic3(instruction: Instruction) -> Step:
    instruction.only("")
    table = selector(instruction, instruction.operands[4])
    invert = table.bit_count() > 4
    terms = [i for i in range(8) if (table >> i & 1) != invert]

    def combine(x: Array, y: Array, z: Array, _: Array) -> Array:
        result = np.zeros(1, np.uint32)
        for i in terms:
            result = result | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        return ~result if invert else result

    return elementwise(instruction, (one_type(instruction),) * 4, "b32", combine)


# Moves, selections, comparisons


@opcode("mov")
def _move(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    instruction.only("")
    target, origin = instruction.operands
    if not isinstance(target, Group) and not isinstance(origin, Group):
        return elementwise(instruction, (kind,), kind, lambda x: x)
    parts = items(target if isinstance(target, Group) else origin)
    whole, bits = FORMATS[kind].raw, FORMATS[kind].bits // len(parts)
    if isinstance(target, Group):
        read = source(instruction, origin, kind)
        writes = [destination(instruction, part, f"b{bits}") for part in parts]

        def unpack(batch: Batch, mask: Mask) -> None:
            values = read(batch)
            for i, write in enumerate(writes):
                write(batch, values >> whole(i * bits), mask)

        return unpack
    reads = [source(instruction, part, f"b{bits}") for part in parts]
    write = destination(instruction, target, kind)

    def pack(batch: Batch, mask: Mask) -> None:
        value = reads[0](batch).astype(whole)
        for i, read in enumerate(reads[1:], 1):
            value = value | read(batch).astype(whole) << whole(i * bits)
        write(batch, value, mask)

    return pack


@opcode("cvta")
def _convert_address(instruction: Instruction) -> Step:
    if "global" not in instruction.only("to global"):  # generic addresses are global ones here
        raise instruction.unsupported()
    return elementwise(instruction, ("u64",), "u64", lambda x: x)


@opcode("selp")
def _select(instruction: Instruction) -> Step:
    instruction.only("")
    bits = f"b{FORMATS[one_type(instruction)].bits}"

    def select(x: Array, y: Array, which: Array) -> Array:
        return np.where(which, x, y)

    return elementwise(instruction, (bits, bits, "pred"), bits, select)


def _unordered(x: Array, y: Array) -> Array:
    return np.isnan(x) | np.isnan(y)


COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE_UNSIGNED = COMPARE | {
    name: COMPARE[same] for name, same in zip(("lo", "ls", "hi", "hs"), list(COMPARE)[2:], strict=True)
}
COMPARE_FLOAT = COMPARE | {
    "ne": lambda x, y: (x != y) & ~_unordered(x, y),
    "num": lambda x, y: ~_unordered(x, y),
    "nan": _unordered,
    "equ": lambda x, y: (x == y) | _unordered(x, y),
    "neu": np.not_equal,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
}
LOGIC: dict[str, Function] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@opcode("setp")
def _compare(instruction: Instruction) -> Step:
    kind = one_type(instruction)
    name, *combine = (flag for flag in instruction.flags if flag != "ftz")
    table = COMPARE_FLOAT if is_float(kind) else COMPARE if kind[0] == "s" else COMPARE_UNSIGNED
    if name not in table or kind.endswith("x2") or len(combine) > 1 or (combine and combine[0] not in LOGIC):
        raise instruction.unsupported()
    compare = flushing(instruction, table[name])
    if not combine:
        return elementwise(instruction, (kind, kind), "pred", compare)
    join = LOGIC[combine[0]]
    return elementwise(instruction, (kind, kind, "pred"), "pred", lambda x, y, p: join(compare(x, y), p))


# Conversions

ROUND: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(target: str, round_: Function, nan_is_zero: bool) -> Function:
    """Saturates."""
    kind = (SIGNED if target[0] == "s" else UNSIGNED)[FORMATS[target].bits]
    limits = np.iinfo(kind)
    of_nan = 0 if nan_is_zero else limits.min if target[0] == "s" else limits.max // 2 + 1

    def convert(x: Array) -> Array:
        whole = round_(x.astype(np.float64))
        # float64 lacks the largest 64-bit integers: only what is surely within is converted
        low, high = whole <= float(limits.min), whole >= float(limits.max)
        inside = np.where(low | high | np.isnan(whole), 0.0, whole).astype(kind)
        result = np.where(low, kind(limits.min), np.where(high, kind(limits.max), inside))
        return np.where(np.isnan(x), kind(of_nan), result)

    return convert


def _to_tf32(x: Array, away: bool) -> Array:
    """float32 rounded to 10 bits of mantissa: ties away from zero, or to even."""
    bits = x.view(np.uint32)
    half = np.uint32(0x1000) if away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return np.where(np.isfinite(x), (bits + half) & np.uint32(0xFFFF_E000), bits)


def _towards_zero(x: Array, form: Format) -> Array:
    """Raw bits of a format of 16 bits."""
    nearest = form.encode(x)
    return nearest - (np.abs(form.decode(nearest)) > np.abs(x))


def _pair(high: Array, low: Array) -> Array:
    return np.stack(np.broadcast_arrays(low, high), axis=1).reshape(-1)


@opcode("cvt")
def _convert(instruction: Instruction) -> Step:
    target, origin = instruction.types
    flags = instruction.only("rn rz rna rni rzi rmi rpi ftz satfinite")
    rounding = flags - {"ftz", "satfinite"}
    if len(rounding) > 1 or ("satfinite" in flags) != (target in ("e4m3x2", "e5m2x2")):
        raise instruction.unsupported("rounding")

    def convert(function: Function, result: str = target, count: int = 1) -> Step:
        return elementwise(instruction, (origin,) * count, result, flushing(instruction, function))

    if target == "tf32" and origin == "f32" and rounding <= {"rna", "rn"}:
        return convert(lambda x: _to_tf32(x, "rna" in rounding), "b32")
    if target in ("bf16", "f16") and origin == "f32" and rounding == {"rz"}:
        return convert(lambda x: _towards_zero(x, FORMATS[target]), f"b{FORMATS[target].bits}")
    numbers = FORMATS[target].per_register, FORMATS[origin].per_register
    if is_float(origin) and not is_float(target) and numbers == (1, 1):
        (how,) = rounding
        return convert(_to_integer(target, ROUND[how], origin != "f64" and target not in ("s64", "u64")))
    if rounding & set(ROUND):
        (how,) = rounding
        if target != origin:
            raise instruction.unsupported("rounding")
        return convert(ROUND[how])
    if not rounding <= {"rn"}:
        raise instruction.unsupported("rounding")
    if numbers == (2, 1) and origin == "f32":
        return convert(_pair, count=2)
    if numbers[0] != numbers[1]:
        raise instruction.unsupported("types")
    if is_float(target) and not is_float(origin):
        if target in ("f32", "f64"):
            return convert(lambda x: x.astype(np.float32 if target == "f32" else np.float64))
        if FORMATS[origin].bits == 64:
            raise instruction.unsupported("types")
        return convert(lambda x: to_odd_f32(x.astype(np.float64)))
    if origin == "f64" and target in ("bf16", "f16"):
        return convert(to_odd_f32)
    return convert(lambda x: x)
