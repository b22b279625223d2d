"""Instructions that move data between threads and memory, and between the threads of a warp."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_without_gpu.errors import GpuError, Trap
from gpu_without_gpu.formats import FORMATS, UNSIGNED, Array
from gpu_without_gpu.machine import Batch, Mask, Step
from gpu_without_gpu.operands import address, destination, items, opcode, source, spread
from gpu_without_gpu.ptx import Address, Immediate, Instruction, Special

CACHING = (
    "ca cg cs lu cv wb wt nc volatile weak relaxed acquire release acq_rel cta gpu sys L1::evict_normal "
    "L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate L2::cache_hint L2::64B L2::128B L2::256B"
)
SHARED = frozenset({"shared", "shared::cta"})


def _access(instruction: Instruction, extra: str = "") -> tuple[bool, str, int]:
    """(is it shared memory?, the element's type, how many)."""
    if len(instruction.types) != 1:
        raise instruction.unsupported("types")
    flags = instruction.only(f"{CACHING} global shared shared::cta v2 v4 v8 {extra}")
    if not flags & (SHARED | {"global"}):
        raise instruction.unsupported("a generic address")
    count = next((int(flag[1:]) for flag in flags if flag in ("v2", "v4", "v8")), 1)
    return bool(flags & SHARED), instruction.types[0], count


def _of(lanes: Array, values: Array) -> Array:
    """The values of these lanes, out of those of all, or the one that all share."""
    return np.repeat(values, len(lanes)) if len(values) == 1 else values if len(lanes) == len(values) else values[lanes]


@opcode("ld")
def _load(instruction: Instruction) -> Step:
    if "param" in instruction.flags:
        return _load_parameter(instruction)
    shared, kind, count = _access(instruction)
    targets = items(instruction.operands[0])
    if len(targets) != count:
        raise instruction.unsupported("number of operands")
    form = FORMATS[kind]
    writes = [destination(instruction, target, kind) for target in targets]
    where = address(instruction, instruction.operands[1], 32 if shared else 64)
    bits, decode = form.bits, form.decode

    def load(batch: Batch, mask: Mask) -> None:
        lanes = batch.active(mask)
        addresses = _of(lanes, where(batch))
        if shared:
            places = _read_shared(batch, lanes, addresses, bits // 8 * count)
            rows = batch.shared.load(places, bits, count)
        else:
            rows = batch.memory.load(addresses, bits, count)
            _note_read(batch, lanes, addresses, bits // 8 * count)
        columns = np.ascontiguousarray(rows.T)
        for write, column in zip(writes, columns, strict=True):
            write(batch, decode(spread(batch, lanes, column)), mask)

    return load


def _load_parameter(instruction: Instruction) -> Step:
    instruction.only("param")
    operand = instruction.operands[1]
    if not isinstance(operand, Address) or not isinstance(operand.base, Special) or operand.offset:
        raise instruction.unsupported()
    name, (kind,) = operand.base.name, instruction.types
    raw = UNSIGNED[FORMATS[kind].bits]
    ones = (1 << FORMATS[kind].bits) - 1
    write = destination(instruction, instruction.operands[0], f"b{FORMATS[kind].bits}")
    return lambda batch, mask: write(batch, np.array([batch.parameters[name] & ones], raw), mask)


def _note_read(batch: Batch, lanes: Array, addresses: Array, size: int) -> None:
    if batch.accesses is not None:
        batch.accesses.read(addresses, size, batch.block[lanes], batch.thread[lanes])


def _note_write(batch: Batch, lanes: Array, addresses: Array, size: int, atomic: bool = False) -> None:
    if batch.accesses is not None:
        batch.accesses.write(addresses, size, batch.block[lanes], batch.thread[lanes], atomic)


def _read_shared(batch: Batch, lanes: Array, addresses: Array, size: int) -> Array:
    blocks = batch.block[lanes]
    places = batch.shared.place(addresses, blocks, size)
    batch.shared.note_read(places, size, blocks, batch.warp[lanes])
    return places


def _write_shared(batch: Batch, lanes: Array, addresses: Array, rows: Array) -> None:
    size = rows.itemsize * rows.shape[1]
    blocks = batch.block[lanes]
    places = batch.shared.place(addresses, blocks, size)
    batch.shared.note_write(places, rows.view(np.uint8), blocks, batch.warp[lanes])
    batch.shared.store(places, rows)


@opcode("st")
def _store(instruction: Instruction) -> Step:
    if "param" in instruction.flags:  # arguments of a call, see there
        return lambda batch, mask: None
    shared, kind, count = _access(instruction)
    origins = items(instruction.operands[1])
    if len(origins) != count:
        raise instruction.unsupported("number of operands")
    bits = FORMATS[kind].bits
    reads = [source(instruction, origin, f"b{bits}") for origin in origins]
    where = address(instruction, instruction.operands[0], 32 if shared else 64)

    def store(batch: Batch, mask: Mask) -> None:
        lanes = batch.active(mask)
        addresses = _of(lanes, where(batch))
        rows = np.stack([_of(lanes, read(batch)) for read in reads], axis=1)
        if shared:
            _write_shared(batch, lanes, addresses, rows)
        else:
            batch.memory.store(addresses, rows)
            _note_write(batch, lanes, addresses, rows.itemsize * count)

    return store


# Atomics


ATOMIC: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, x: x,
    "cas": lambda old, expected, x: x if (old == expected).all() else old,
}


@opcode("atom", "red")
def _atomic(instruction: Instruction) -> Step:
    shared, kind, count = _access(instruction, " ".join([*ATOMIC, "noftz"]))
    (name,) = (flag for flag in instruction.flags if flag in ATOMIC)
    if kind.endswith("x2") or count > 1:
        raise instruction.unsupported()
    function, form = ATOMIC[name], FORMATS[kind]
    returns = instruction.opcode == "atom"
    place, *origins = instruction.operands[returns:]
    reads = [source(instruction, origin, f"b{form.bits}") for origin in origins]
    write = destination(instruction, instruction.operands[0] if returns else Special("_"), f"b{form.bits}")
    where = address(instruction, place, 32 if shared else 64)

    def atomic(batch: Batch, mask: Mask) -> None:
        lanes = batch.active(mask)
        addresses = _of(lanes, where(batch))
        if shared:
            places = batch.shared.place(addresses, batch.block[lanes], form.bits // 8)
        operands = [_of(lanes, read(batch)) for read in reads]
        before = np.empty(len(lanes), form.raw)
        for i in range(len(lanes)):  # one thread after another, in their order
            if shared:
                word = batch.shared.word(int(places[i]), form.bits)
            else:
                word = batch.memory.word(int(addresses[i]), form.bits)
            before[i] = word[0]
            value = function(form.decode(word.copy()), *(form.decode(x[i : i + 1]) for x in operands))
            word[:] = form.encode(value)
        if not shared:
            _note_write(batch, lanes, addresses, form.bits // 8, atomic=True)
        write(batch, spread(batch, lanes, before), mask)

    return atomic


# Asynchronous copies


@opcode("cp")
def _async_copy(instruction: Instruction) -> Step:
    flags = set(instruction.flags)
    if "commit_group" in flags:
        instruction.only("async commit_group")
        return lambda batch, mask: batch.copies.commit(batch.active(mask))
    if flags & {"wait_group", "wait_all"}:
        instruction.only("async wait_group wait_all")
        pending = None
        if "wait_group" in flags:
            (count,) = instruction.operands
            if not isinstance(count, Immediate):
                raise instruction.unsupported()
            pending = count.value

        def wait(batch: Batch, mask: Mask) -> None:
            batch.copies.wait(np.ones(batch.num_lanes, bool) if mask is None else mask, pending)

        return wait
    instruction.only("async ca cg shared shared::cta global L2::64B L2::128B L2::256B L2::cache_hint")
    target, origin, size_operand, *rest = instruction.operands
    if not isinstance(size_operand, Immediate) or size_operand.value not in (4, 8, 16):
        raise instruction.unsupported()
    size = size_operand.value
    if "L2::cache_hint" in flags:
        rest = rest[:-1]
    to = address(instruction, target, 32)
    at = address(instruction, origin, 64)
    read_size = source(instruction, rest[0], "u32") if rest else None

    def copy(batch: Batch, mask: Mask) -> None:
        lanes = batch.active(mask)
        blocks = batch.block[lanes]
        places = batch.shared.place(_of(lanes, to(batch)), blocks, size)
        origins = _of(lanes, at(batch))
        values = np.zeros((len(lanes), size), np.uint8)
        if read_size is None:
            values[:] = batch.memory.bytes(origins, size)
            _note_read(batch, lanes, origins, size)
        else:  # bytes beyond the given size are zeros, and are not read
            sizes = _of(lanes, read_size(batch))
            if ((sizes != 0) & (sizes != size)).any():
                raise GpuError("an asynchronous copy of a part of its size")
            if (some := sizes > 0).any():
                values[some] = batch.memory.bytes(origins[some], size)
                _note_read(batch, lanes[some], origins[some], size)
        batch.copies.start(lanes, places, values, blocks, batch.warp[lanes])

    return copy


# Matrices of 8 x 8 elements of 16 bits, one row per thread


def _matrix_rows(batch: Batch, addresses: Array, count: int, warps: Array) -> tuple[Array, Array, Array]:
    """Of the active warps: (indices of the rows' bytes, their blocks, their warps), each [num_warps * count * 8]."""
    rows = batch.full(addresses).reshape(-1, 32)[warps, : 8 * count].reshape(-1)
    lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
    blocks = batch.block[lanes]
    return batch.shared.place(rows, blocks, 16), blocks, batch.warp[lanes]


def _matrix_count(instruction: Instruction) -> int:
    flags = instruction.only("sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
    if instruction.types != ("b16",):
        raise instruction.unsupported("types")
    return next(count for count in (1, 2, 4) if f"x{count}" in flags)


@opcode("ldmatrix")
def _load_matrix(instruction: Instruction) -> Step:
    count = _matrix_count(instruction)
    writes = [destination(instruction, target, "b32") for target in items(instruction.operands[0])]
    where = address(instruction, instruction.operands[1], 32)
    transposed = "trans" in instruction.flags

    def load(batch: Batch, mask: Mask) -> None:
        warps = batch.whole_warps(mask)
        places, blocks, owners = _matrix_rows(batch, where(batch), count, warps)
        batch.shared.note_read(places, 16, blocks, owners)
        matrices = batch.shared.load(places, 16, 8).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        fragments = np.ascontiguousarray(matrices.swapaxes(0, 1)).view(np.uint32).reshape(count, -1)
        lanes = batch.active(mask)
        for write, fragment in zip(writes, fragments, strict=True):
            write(batch, spread(batch, lanes, fragment), mask)

    return load


@opcode("stmatrix")
def _store_matrix(instruction: Instruction) -> Step:
    count = _matrix_count(instruction)
    reads = [source(instruction, origin, "b32") for origin in items(instruction.operands[1])]
    where = address(instruction, instruction.operands[0], 32)
    transposed = "trans" in instruction.flags

    def store(batch: Batch, mask: Mask) -> None:
        warps = batch.whole_warps(mask)
        places, blocks, owners = _matrix_rows(batch, where(batch), count, warps)
        fragments = np.stack([batch.full(read(batch)).reshape(-1, 32)[warps] for read in reads], axis=1)
        matrices = fragments.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        rows = matrices.reshape(-1, 8)
        batch.shared.note_write(places, rows.view(np.uint8), blocks, owners)
        batch.shared.store(places, rows)

    return store


# Within a warp


def _members(instruction: Instruction) -> Step:
    """A check that whole warps take part, which is what the membermask, the last operand, always says in Triton."""
    members = source(instruction, instruction.operands[-1], "b32")

    def check(batch: Batch, mask: Mask) -> None:
        batch.whole_warps(mask)
        if (_of(batch.active(mask), members(batch)) != 0xFFFF_FFFF).any():
            raise GpuError("a membermask of less than the warp")

    return check


@opcode("shfl")
def _shuffle(instruction: Instruction) -> Step:
    check = _members(instruction)
    flags = instruction.only("sync up down bfly idx")
    (mode,) = flags - {"sync"}
    target, origin, distance, clamp, _ = instruction.operands
    value, valid = (*items(target), Special("_"))[:2]
    write, write_valid = destination(instruction, value, "b32"), destination(instruction, valid, "pred")
    read = source(instruction, origin, "b32")
    read_distance, read_clamp = source(instruction, distance, "u32"), source(instruction, clamp, "u32")
    lane = np.arange(32)

    def lookup(by: Array, limit: Array) -> tuple[Array, Array]:
        by, segment, limit = by.astype(np.int64) & 31, limit.astype(np.int64) >> 8 & 31, limit.astype(np.int64) & 31
        last = (lane & segment) | (limit & ~segment)
        if mode == "up":
            chosen, good = lane - by, lane - by >= last
        elif mode == "down":
            chosen, good = lane + by, lane + by <= last
        elif mode == "bfly":
            chosen, good = lane ^ by, lane ^ by <= last
        else:
            chosen = (lane & segment) | (by & ~segment)
            good = chosen <= last
        return np.where(good, chosen, lane), good

    fixed = None
    if isinstance(distance, Immediate) and isinstance(clamp, Immediate):
        fixed = lookup(np.array([distance.value]), np.array([clamp.value]))

    def shuffle(batch: Batch, mask: Mask) -> None:
        check(batch, mask)
        values = batch.full(read(batch)).reshape(-1, 32)
        if fixed is not None:
            write(batch, values[:, fixed[0]].reshape(-1), mask)
            write_valid(batch, np.tile(fixed[1], len(values)), mask)
            return
        by = batch.full(read_distance(batch)).reshape(-1, 32)
        chosen, good = lookup(by, batch.full(read_clamp(batch)).reshape(-1, 32))
        write(batch, np.take_along_axis(values, chosen, 1).reshape(-1), mask)
        write_valid(batch, good.reshape(-1), mask)

    return shuffle


@opcode("vote")
def _vote(instruction: Instruction) -> Step:
    check = _members(instruction)
    flags = instruction.only("sync all any uni ballot")
    (mode,) = flags - {"sync"}
    if instruction.types != ("b32" if mode == "ballot" else "pred",):
        raise instruction.unsupported("types")
    target, origin, _ = instruction.operands
    read = source(instruction, origin, "pred")
    write = destination(instruction, target, "b32" if mode == "ballot" else "pred")

    def vote(batch: Batch, mask: Mask) -> None:
        check(batch, mask)
        votes = batch.full(read(batch)).reshape(-1, 32)
        result: dict[str, Any] = {
            "all": votes.all(1),
            "any": votes.any(1),
            "uni": votes.all(1) | ~votes.any(1),
            "ballot": np.packbits(votes, axis=1, bitorder="little").view(np.uint32)[:, 0],
        }
        write(batch, np.repeat(result[mode], 32), mask)

    return vote


@opcode("redux")
def _reduce(instruction: Instruction) -> Step:
    check = _members(instruction)
    flags = instruction.only("sync add min max and or xor")
    (mode,) = flags - {"sync"}
    (kind,) = instruction.types
    if kind not in ("s32", "u32", "b32"):
        raise instruction.unsupported("types")
    function: Any = ATOMIC[mode]
    read = source(instruction, instruction.operands[1], kind)
    write = destination(instruction, instruction.operands[0], kind)

    def reduce(batch: Batch, mask: Mask) -> None:
        check(batch, mask)
        values = batch.full(read(batch)).reshape(-1, 32)
        write(batch, np.repeat(function.reduce(values, axis=1, dtype=values.dtype), 32), mask)

    return reduce


# What has no effect here, and what ends the kernel


@opcode("fence", "membar", "createpolicy")
def _nothing(instruction: Instruction) -> Step:
    instruction.only("acq_rel sc gpu cta sys gl proxy async shared::cta fractional L2::evict_first L2::evict_last")
    if instruction.opcode != "createpolicy":
        return lambda batch, mask: None
    write = destination(instruction, instruction.operands[0], "b64")
    return lambda batch, mask: write(batch, np.zeros(1, np.uint64), mask)


@opcode("trap", "call")
def _trap(instruction: Instruction) -> Step:
    if instruction.opcode == "call" and not any(operand == Special("__assertfail") for operand in instruction.operands):
        raise instruction.unsupported()

    def trap(batch: Batch, mask: Mask) -> None:
        raise Trap("the kernel asserts or traps")

    return trap
