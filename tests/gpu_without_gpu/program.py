"""From PTX text to code that runs."""

import functools

import numpy as np

from gpu_without_gpu import arithmetic, matrix, transfers
from gpu_without_gpu.formats import FORMATS
from gpu_without_gpu.machine import Code, Step
from gpu_without_gpu.operands import DECODERS
from gpu_without_gpu.ptx import Immediate, Instruction, Kernel, parse

assert arithmetic and matrix and transfers  # importing them fills the table of opcodes


@functools.cache
def load(text: str) -> Code:
    """Decode a kernel. Raises Unsupported for what is not understood, wherever in the kernel it stands."""
    kernel = parse(text)
    steps = [_decode(instruction) for instruction in kernel.instructions]
    data = {name: np.frombuffer(contents, np.uint8) for name, contents in kernel.data.items()}
    return Code(kernel, steps, _unit(kernel, "shared"), _unit(kernel, "global"), data)


def _decode(instruction: Instruction) -> Step | None:
    if instruction.opcode in ("bra", "ret", "exit"):
        instruction.only("uni")
        return None
    if instruction.opcode in ("bar", "barrier"):
        if "warp" in instruction.flags:
            instruction.only("warp sync")
            return _warp_barrier
        instruction.only("sync aligned cta")
        if instruction.operands != (Immediate(0),):
            raise instruction.unsupported("a barrier of some threads")
        return None
    if instruction.opcode not in DECODERS:
        raise instruction.unsupported()
    try:
        return DECODERS[instruction.opcode](instruction)
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise instruction.unsupported() from error


def _warp_barrier(batch: object, mask: object) -> None:
    """Warps run in step."""


def _unit(kernel: Kernel, space: str) -> int:
    """Bytes of the smallest element that the kernel accesses in this kind of memory."""
    return min([_access(instruction, space) for instruction in kernel.instructions], default=16)


def _access(instruction: Instruction, space: str) -> int:
    if not any(flag.startswith(space) for flag in instruction.flags):
        return 16
    if instruction.opcode in ("ld", "st", "atom", "red"):
        return FORMATS[instruction.types[0]].bits // 8
    if instruction.opcode == "cp" and isinstance(size := instruction.operands[2], Immediate):
        return size.value
    return 16
