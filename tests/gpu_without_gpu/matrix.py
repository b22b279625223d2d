"""Matrix products by whole warps (mma) and by groups of four warps out of shared memory (wgmma).

A product of two elements is exact in float64, and so, but for extreme spreads of exponents, are sums of up to 256 of
them: the sum over k is taken in float64, in one fixed order, the accumulator added last, and the result rounded once.
A row's result depends on that row and on B alone. Hardware sums with fewer bits, in an order that it does not tell.
"""

import re

import numpy as np

from gpu_without_gpu.errors import GpuError, Unsupported
from gpu_without_gpu.formats import E4M3, E5M2, Array, bf16_to_f32
from gpu_without_gpu.machine import Batch, Mask, Step
from gpu_without_gpu.memory import MANY
from gpu_without_gpu.operands import destination, items, opcode, selector, source, spread
from gpu_without_gpu.ptx import Group, Instruction, Operand, Register

# Type -> (bits of an element as it lies in a register, raw elements -> numbers)
ELEMENTS = {
    "bf16": (np.uint16, bf16_to_f32),
    "f16": (np.uint16, lambda raw: raw.view(np.float16)),
    "tf32": (np.uint32, lambda raw: (raw & np.uint32(0xFFFF_E000)).view(np.float32)),
    "s8": (np.uint8, lambda raw: raw.view(np.int8)),
    "u8": (np.uint8, lambda raw: raw),
    "e4m3": (np.uint8, E4M3.decode),
    "e5m2": (np.uint8, E5M2.decode),
}


def fragment(batch: Batch, registers: list[int], kind: str, rows: int) -> Array:
    """The matrix that the warps hold in these registers: float64 [num_warps, 8 * rows, k].

    Lane 4 * g + t holds elements of row g (and g + 8 where `rows` is 2), at columns that begin at t elements' worth
    of a register.
    """
    values = [batch.registers[index] for index in registers]
    key = (kind, rows, *map(id, values))
    if key in batch.matrices:  # registers are never changed in place: the same arrays are the same matrix
        return batch.matrices[key][1]
    raw, decode = ELEMENTS[kind]
    stacked = (
        np.stack([batch.full(x.view(np.uint32)) for x in values])
        .view(raw)
        .reshape(-1, rows, batch.num_lanes // 32, 8, 4, 4 // np.dtype(raw).itemsize)
    )
    ordered = stacked.transpose(2, 1, 3, 0, 4, 5)
    matrix = decode(np.ascontiguousarray(ordered)).reshape(ordered.shape[0], 8 * rows, -1).astype(np.float64)
    if len(batch.matrices) >= 64:
        batch.matrices.clear()
    batch.matrices[key] = (values, matrix)  # keeps the arrays, and so their ids, alive
    return matrix


def accumulate(product: Array, accumulator: Array, integer: bool, saturate: bool) -> Array:
    """float64 product + the accumulator's raw bits -> raw bits."""
    if not integer:
        return (product + accumulator.view(np.float32)).astype(np.float32).view(np.uint32)
    total = product.astype(np.int64) + accumulator.view(np.int32)
    if saturate:
        total = np.clip(total, -(1 << 31), (1 << 31) - 1)
    return total.astype(np.int32).view(np.uint32)


def _registers(instruction: Instruction, group: Operand) -> list[int]:
    """The indices of registers of 32 bits."""
    found = [part.index for part in items(group) if isinstance(part, Register) and part.bits == 32]
    if len(found) != len(items(group)):
        raise instruction.unsupported("operands")
    return found


@opcode("mma")
def _mma(instruction: Instruction) -> Step:
    flags = instruction.only("sync aligned m16n8k4 m16n8k8 m16n8k16 m16n8k32 row col satfinite")
    if len(instruction.types) != 4 or "row" not in flags or "col" not in flags:
        raise instruction.unsupported()
    result, left, right, accumulator = instruction.types
    if result != accumulator or result not in ("f32", "s32") or left not in ELEMENTS or right not in ELEMENTS:
        raise instruction.unsupported("types")
    integer = result == "s32"
    k = next(int(match.group(1)) for flag in flags if (match := re.fullmatch(r"m16n8k(\d+)", flag)))
    a, b = (_registers(instruction, group) for group in instruction.operands[1:3])
    c = [source(instruction, part, "b32") for part in items(instruction.operands[3])]
    writes = [destination(instruction, part, "b32") for part in items(instruction.operands[0])]
    per_register = 4 // np.dtype(ELEMENTS[left][0]).itemsize
    if len(a) * 4 * per_register != 2 * k or len(b) * 4 * per_register != k or len(c) != 4 or len(writes) != 4:
        raise instruction.unsupported("number of operands")

    def mma(batch: Batch, mask: Mask) -> None:
        batch.whole_warps(mask)
        product = fragment(batch, a, left, 2) @ fragment(batch, b, right, 1).swapaxes(1, 2)
        # [warps, (half, g), (t, i)] -> register 2 * half + i of lane 4 * g + t
        product = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        before = np.stack([batch.full(read(batch)) for read in c])
        for write, values in zip(writes, accumulate(product, before, integer, "satfinite" in flags), strict=True):
            write(batch, values, mask)

    return mma


# wgmma: 64 rows, of which each of the four warps has 16. It runs at once here: there is nothing to wait for.

SWIZZLE = {0: 16, 1: 128, 2: 64, 3: 32}  # a descriptor's mode -> bytes of a row within the repeating pattern


def _tile(
    batch: Batch, descriptors: Array, blocks: Array, kind: str, shape: tuple[int, int], transposed: bool
) -> Array:
    """The matrices in shared memory that descriptors tell of: float64 [len(descriptors), *shape], of `shape` (m, k).

    A matrix lies in chunks of 16 bytes along k, or along m where it is `transposed`. Rows of chunks come in groups of
    8; the bits of a chunk's address from 7 up, which number the row in its group, are xored onto those from 4 up.
    """
    start, leading, stride, rest = ((descriptors >> np.uint64(at)).astype(np.int64) & 0x3FFF for at in (0, 16, 32, 48))
    mode = int(descriptors[0] >> np.uint64(62))
    if (descriptors >> np.uint64(62) != mode).any() or (rest & 0xE).any() or (transposed and mode == 0):
        raise Unsupported("not executed without a GPU: this kind of matrix descriptor")
    width = SWIZZLE[mode]
    raw, decode = ELEMENTS[kind]
    per_chunk = 16 // np.dtype(raw).itemsize
    along, across = shape if transposed else shape[::-1]
    row, byte = np.arange(across)[:, None], 16 * np.arange(along // per_chunk)
    within = row % 8 * width + byte % width
    address = 16 * (start[:, None, None] + byte // width * leading[:, None, None] + row // 8 * stride[:, None, None])
    address = address + within
    address ^= address >> 3 & (width - 16)
    flat, owners = address.reshape(-1), np.repeat(blocks, address[0].size)
    places = batch.shared.place(flat, owners, 16)
    batch.shared.note_read(places, 16, owners, np.full(len(places), MANY, np.int32))
    chunks = batch.shared.load(places, 8 * np.dtype(raw).itemsize, per_chunk)
    matrix = decode(chunks).reshape(len(start), across, along).astype(np.float64)
    return matrix.swapaxes(1, 2) if transposed else matrix


@opcode("wgmma")
def _wgmma(instruction: Instruction) -> Step:
    if set(instruction.flags) & {"fence", "commit_group", "wait_group"}:
        instruction.only("fence commit_group wait_group sync aligned")
        return lambda batch, mask: None
    shape = next((m for flag in instruction.flags if (m := re.fullmatch(r"m64n(\d+)k(\d+)", flag))), None)
    if shape is None or len(instruction.types) != 3:
        raise instruction.unsupported()
    instruction.only(f"mma_async sync aligned satfinite {shape[0]}")
    n, k = int(shape[1]), int(shape[2])
    result, left, right = instruction.types
    if result not in ("f32", "s32"):
        raise instruction.unsupported("types")
    targets, a, b, scale_d, *constants = instruction.operands
    scale_a, scale_b, *transpose = [selector(instruction, constant) for constant in constants] or [1, 1]
    transpose_a, transpose_b = ([False] * 2 + [bool(t) for t in transpose])[-2:]
    registers = items(targets)
    writes = [destination(instruction, register, "b32") for register in registers]
    befores = [source(instruction, register, "b32") for register in registers]
    keep = source(instruction, scale_d, "pred")
    a_parts = _registers(instruction, a) if isinstance(a, Group) else None
    a_descriptor = source(instruction, a, "b64") if a_parts is None else None
    b_descriptor = source(instruction, b, "b64")
    integer, saturate = result == "s32", "satfinite" in instruction.flags

    def wgmma(batch: Batch, mask: Mask) -> None:
        lanes = batch.active(mask)
        groups = lanes[::128] // 128
        if not np.array_equal(lanes, (groups[:, None] * 128 + np.arange(128)).reshape(-1)):
            raise GpuError("a product by groups of four warps with some of a group's threads elsewhere")
        blocks = batch.block[groups * 128]
        if a_parts is not None:
            m = fragment(batch, a_parts, left, 2).reshape(-1, 64, k)[groups]
        else:
            assert a_descriptor is not None
            descriptors = batch.full(a_descriptor(batch))[groups * 128]
            m = _tile(batch, descriptors, blocks, left, (64, k), transpose_a)
        descriptors = batch.full(b_descriptor(batch))[groups * 128]
        product = scale_a * scale_b * (m @ _tile(batch, descriptors, blocks, right, (n, k), transpose_b).swapaxes(1, 2))
        # [groups, (warp, half, g), (j, t, i)] -> register 4 * j + 2 * half + i of lane 4 * g + t
        product = product.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        kept = batch.full(keep(batch))[lanes]
        before = (
            np.stack([batch.full(read(batch))[lanes] for read in befores]) if kept.any() else np.zeros_like(product)
        )
        before = np.where(kept, before, 0).astype(np.uint32)
        for write, values in zip(writes, accumulate(product, before, integer, saturate), strict=True):
            write(batch, spread(batch, lanes, values), mask)

    return wgmma
