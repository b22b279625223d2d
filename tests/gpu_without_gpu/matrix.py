"""Matrix products by whole warps (mma).

A product of two elements is exact in float64, and so, but for extreme spreads of exponents, are sums of up to 256 of
them: the sum over k is taken in float64, in one fixed order, the accumulator added last, and the result rounded once.
A row's result depends on that row and on B alone. Hardware sums with fewer bits, in an order that it does not tell.
"""

import re

import numpy as np

from gpu_without_gpu.formats import E4M3, E5M2, Array, bf16_to_f32
from gpu_without_gpu.machine import Batch, Mask, Step
from gpu_without_gpu.operands import Read, destination, items, opcode, source
from gpu_without_gpu.ptx import Instruction

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


def fragment(batch: Batch, reads: list[Read], kind: str, rows: int) -> Array:
    """The matrix that the warps hold in these registers: float64 [num_warps, 8 * rows, k].

    Lane 4 * g + t holds elements of row g (and g + 8 where `rows` is 2), at columns that begin at t elements' worth
    of a register.
    """
    values = [batch.full(read(batch)) for read in reads]
    key = (rows, *map(id, values))
    if key in batch.matrices:  # registers are never changed in place: the same arrays are the same matrix
        return batch.matrices[key][1]
    raw, decode = ELEMENTS[kind]
    stacked = np.stack(values).view(raw).reshape(-1, rows, batch.num_lanes // 32, 8, 4, 4 // np.dtype(raw).itemsize)
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
    a, b, c = ([source(instruction, part, "b32") for part in items(group)] for group in instruction.operands[1:])
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
