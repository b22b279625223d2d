"""How steps read and write registers, and the table from opcode to the function that makes a step of an instruction."""

from collections.abc import Callable

import numpy as np

from gpu_without_gpu.formats import FORMATS, SIGNED, UNSIGNED, Array, Format
from gpu_without_gpu.machine import Batch, Mask, Step
from gpu_without_gpu.ptx import Address, Group, Immediate, Instruction, Negated, Operand, Register, Special

Read = Callable[[Batch], Array]
Write = Callable[[Batch, Array, Mask], None]
Decoder = Callable[[Instruction], Step]

DECODERS: dict[str, Decoder] = {}


def opcode(*names: str) -> Callable[[Decoder], Decoder]:
    """Registers a decoder: a function that makes a step of an instruction, or raises Unsupported."""

    def register(decoder: Decoder) -> Decoder:
        DECODERS.update(dict.fromkeys(names, decoder))
        return decoder

    return register


def _raw(instruction: Instruction, operand: Operand, bits: int) -> Read:
    if isinstance(operand, Register):
        index, own, kind = operand.index, UNSIGNED[operand.bits], UNSIGNED[bits]
        if bits > operand.bits:
            raise instruction.unsupported(f"{operand.bits}-bit operand {operand.name}")
        if bits < operand.bits:
            return lambda batch: batch.registers[index].view(own).astype(kind)
        return lambda batch: batch.registers[index].view(kind)
    if isinstance(operand, Negated):
        inner = _raw(instruction, operand.register, bits)
        return lambda batch: ~inner(batch)
    if isinstance(operand, Immediate):
        constant = np.array([operand.value & ((1 << bits) - 1)], UNSIGNED[bits])
        return lambda batch: constant
    if isinstance(operand, Special):
        special, kind = operand.name, UNSIGNED[bits]
        if special in ("%tid.x", "%tid.y", "%tid.z", "%laneid", "%warpid") or special.startswith(
            ("%ctaid.", "%nctaid.", "%ntid.")
        ):
            return lambda batch: batch.special[special].astype(kind, copy=False)
        if special == "global_smem":
            zero = np.zeros(1, kind)
            return lambda batch: zero
        if not special.startswith("%"):
            return lambda batch: np.array([batch.symbols[special]], kind)
    raise instruction.unsupported(f"operand {operand}")


def source(instruction: Instruction, operand: Operand, kind: str) -> Read:
    """Reads an operand as numbers of the PTX type `kind`."""
    form = FORMATS[kind]
    raw, decode = _raw(instruction, operand, form.bits), form.decode
    if form.per_register > 1:
        return lambda batch: decode(batch.full(raw(batch)))
    if form.view is None:
        return raw
    if isinstance(operand, Immediate):
        constant = decode(np.array([operand.value & ((1 << form.bits) - 1)], form.raw))
        return lambda batch: constant
    if form.view and isinstance(operand, Register) and operand.bits == form.bits:
        index, view = operand.index, form.view
        return lambda batch: batch.registers[index].view(view)
    return lambda batch: decode(raw(batch))


def destination(instruction: Instruction, operand: Operand, kind: str) -> Write:
    """Writes numbers of the PTX type `kind`, rounding them to it. Sign or zeros fill a wider register."""
    form = FORMATS[kind]
    if operand == Special("_"):
        return lambda batch, values, mask: None
    if not isinstance(operand, Register) or operand.bits < form.bits:
        raise instruction.unsupported(f"destination {operand}")
    register, encode = operand, _widening(form, operand.bits, kind)

    def write(batch: Batch, values: Array, mask: Mask) -> None:
        batch.assign(register, encode(values), mask)

    return write


def _widening(form: Format, bits: int, kind: str) -> Callable[[Array], Array]:
    encode = form.encode
    if bits == form.bits:
        return encode
    if kind[0] == "s":
        return lambda values: encode(values).view(SIGNED[form.bits]).astype(SIGNED[bits]).view(UNSIGNED[bits])
    return lambda values: encode(values).astype(UNSIGNED[bits])


def items(operand: Operand) -> tuple[Operand, ...]:
    """The parts of {a, b}, or the one operand."""
    return operand.items if isinstance(operand, Group) else (operand,)


def address(instruction: Instruction, operand: Operand, bits: int) -> Read:
    """int64 addresses of `[base + offset]`."""
    if not isinstance(operand, Address):
        raise instruction.unsupported(f"address {operand}")
    base, offset = _raw(instruction, operand.base, bits), operand.offset
    if not offset:
        return lambda batch: base(batch).astype(np.int64)
    return lambda batch: base(batch).astype(np.int64) + offset


def elementwise(
    instruction: Instruction, kinds: tuple[str, ...], result: str, function: Callable[..., Array], skip: int = 1
) -> Step:
    """Applies a function to the operands after the first `skip`, of types `kinds`; its value goes to the first one."""
    operands = instruction.operands[skip:]
    if len(operands) != len(kinds):
        raise instruction.unsupported("number of operands")
    reads = [source(instruction, operand, kind) for operand, kind in zip(operands, kinds, strict=True)]
    write = destination(instruction, instruction.operands[0], result)
    if len(reads) == 1:
        (only,) = reads
        return lambda batch, mask: write(batch, function(only(batch)), mask)
    if len(reads) == 2:
        first, second = reads
        return lambda batch, mask: write(batch, function(first(batch), second(batch)), mask)
    if len(reads) == 3:
        first, second, third = reads
        return lambda batch, mask: write(batch, function(first(batch), second(batch), third(batch)), mask)
    return lambda batch, mask: write(batch, function(*[read(batch) for read in reads]), mask)


def selector(instruction: Instruction, operand: Operand) -> int:
    """The value of an operand that must be a constant."""
    if not isinstance(operand, Immediate):
        raise instruction.unsupported(f"variable {operand}")
    return operand.value


def spread(batch: Batch, lanes: Array, values: Array) -> Array:
    """Values of some lanes -> an array over all of them."""
    if len(lanes) == batch.num_lanes:
        return values
    result = np.zeros(batch.num_lanes, values.dtype)
    result[lanes] = values
    return result
