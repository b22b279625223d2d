"""Executes a kernel: all threads of many blocks at once, each register being one numpy array.

A register has one element per thread (*lane*), or a single one where all agree. Arrays in registers are never changed
in place. Threads that diverge form groups by the instruction they are at; the group that is furthest behind runs,
until it comes to where another group is, and they merge. A step of the instruction list takes `mask`: None for all
lanes, else which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_without_gpu.errors import GpuError, StepLimit
from gpu_without_gpu.formats import UNSIGNED, Array
from gpu_without_gpu.memory import AsyncCopies, GlobalAccesses, GlobalMemory, SharedMemory
from gpu_without_gpu.ptx import Instruction, Kernel, Register

Mask = Array | None
Step = Callable[["Batch", Mask], None]

MAX_STEPS = 3_000_000  # of one batch
MAX_LANES = 16_384  # in one batch, unless a single block has more
MAX_SHARED = 32 << 20  # bytes in one batch


@dataclass
class Code:
    """A kernel made ready to run: one step per instruction, or None for what steers."""

    kernel: Kernel
    steps: list[Step | None]
    shared_unit: int  # bytes of the smallest access to shared memory
    global_unit: int  # and of that to global memory
    data: dict[str, Array]  # module-level name -> its bytes


class Unwritten:
    """In place of the values of a register that was never written. Whatever is done with values begins with a view."""

    def __init__(self, register: Register) -> None:
        self._name = register.name

    def view(self, kind: object) -> Array:
        raise GpuError(f"{self._name} is read before anything is written to it")


class Batch:
    """The state of the blocks that run together."""

    def __init__(
        self,
        code: Code,
        memory: GlobalMemory,
        parameters: Sequence[int],
        grid: tuple[int, int, int],
        blocks: Array,
        shared_bytes: int,
    ) -> None:
        """`blocks` is [n, 3], each one's place in the grid; `parameters` are raw bits."""
        threads = code.kernel.num_threads
        self.code = code
        self.num_blocks, self.num_threads = len(blocks), threads
        self.num_lanes = threads * len(blocks)
        self.memory = memory
        self.shared = SharedMemory(len(blocks), shared_bytes, code.shared_unit, -(-threads // 32))
        self.accesses = None
        if threads > 32:  # one warp alone has nobody to race with
            self.accesses = GlobalAccesses(memory, len(blocks), code.global_unit)
        self.copies = AsyncCopies(self.shared, self.num_lanes)
        self.registers: list[Any] = [Unwritten(register) for register in code.kernel.registers]
        self.parameters = dict(zip(code.kernel.parameters, parameters, strict=True))
        self.lanes = np.arange(self.num_lanes)
        self.block = self.lanes // threads  # of each lane
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.thread = thread.astype(np.int32)  # within its block, of each lane
        self.warp = self.thread // 32
        zero = np.zeros(1, np.uint32)
        self.special = {
            "%tid.x": thread,
            "%tid.y": zero,
            "%tid.z": zero,
            "%laneid": thread & 31,
            "%warpid": thread // 32,
        }
        for axis, place in zip("xyz", blocks.T.astype(np.uint32), strict=True):
            self.special[f"%ctaid.{axis}"] = np.repeat(place, threads)
            self.special[f"%nctaid.{axis}"] = np.array([grid["xyz".index(axis)]], np.uint32)
            self.special[f"%ntid.{axis}"] = np.array([threads if axis == "x" else 1], np.uint32)
        self.symbols = {name: contents.ctypes.data for name, contents in code.data.items()}
        self.matrices: dict[tuple[object, ...], tuple[object, Array]] = {}  # see matrix.py
        self._live = np.ones(self.num_lanes, bool)
        self._groups: dict[int, Array] = {}  # instruction -> lanes that go on there
        self._waiting: dict[int, Array] = {}  # instruction after a barrier -> lanes that wait at it
        self._steps = 0

    # What steps use

    def full(self, values: Array) -> Array:
        """One element per lane."""
        return values if values.size == self.num_lanes else np.repeat(values, self.num_lanes)

    def assign(self, register: Register, raw: Array, mask: Mask) -> None:
        if mask is not None:
            before = self.registers[register.index]
            raw = np.where(mask, raw, ~UNSIGNED[register.bits](0) if isinstance(before, Unwritten) else before)
        self.registers[register.index] = raw

    def active(self, mask: Mask) -> Array:
        """Indices of the lanes."""
        return self.lanes if mask is None else np.flatnonzero(mask)

    def whole_warps(self, mask: Mask) -> Array:
        """Indices of the warps, counted over all blocks, of which all lanes are active. The others have none."""
        if mask is None:
            return np.arange(self.num_lanes // 32)
        by_warp = mask.reshape(-1, 32)
        whole = by_warp.all(1)
        if (by_warp.any(1) != whole).any():
            raise GpuError("a warp-wide instruction with some of the warp's threads elsewhere")
        return np.flatnonzero(whole)

    # Steering

    def run(self) -> None:
        self._groups[0] = self._live.copy()
        while self._groups:
            position = min(self._groups)
            lanes = self._groups.pop(position)
            try:
                self._run_group(position, None if lanes.all() else lanes)
            except GpuError as error:
                raise type(error)(f"{error}{self._location()}") from error
            except Exception as error:
                error.add_note(f"while executing PTX{self._location()}")
                raise

    def _location(self) -> str:
        instruction = self.code.kernel.instructions[self._position]
        return f"\n  in {self.code.kernel.name}, {instruction.source}: `{instruction.text}`"

    def _run_group(self, position: int, mask: Mask) -> None:
        """Until the group ends, splits, waits, or comes to where another one is."""
        steps, instructions = self.code.steps, self.code.kernel.instructions
        stop = min(self._groups, default=-1)
        while position != stop:
            self._position = position
            self._steps += 1
            instruction = instructions[position]
            active = mask
            if instruction.guard is not None:
                active, some = self._guarded(instruction, mask)
                if not some:
                    position += 1
                    continue
            if (step := steps[position]) is not None:
                step(self, active)
                position += 1
                continue
            if self._steps > MAX_STEPS:
                raise StepLimit(f"more than {MAX_STEPS} instructions executed")
            if active is not mask:  # the others go on behind it
                self._join(position + 1, self._lanes(mask) & ~self._lanes(active))
            if instruction.opcode == "bra":
                target = self.code.kernel.labels[instruction.operands[0].name]  # type: ignore[union-attr]
                if self._groups:
                    return self._join(target, self._lanes(active))
                position = target
            elif instruction.opcode in ("ret", "exit"):
                self._live &= ~self._lanes(active)
                return self._release()
            elif active is None:  # a barrier of all
                self._barrier(None)
                position += 1
            else:
                self._waiting[position + 1] = self._waiting.get(position + 1, False) | active
                return self._release()
        self._join(position, self._lanes(mask))

    def _lanes(self, mask: Mask) -> Array:
        return np.ones(self.num_lanes, bool) if mask is None else mask

    def _guarded(self, instruction: Instruction, mask: Mask) -> tuple[Mask, bool]:
        """The lanes whose guard holds, the very `mask` where that is all of them; and whether there are any."""
        assert instruction.guard is not None
        holds = self.registers[instruction.guard.index].view(np.bool_)
        if instruction.guard_negated:
            holds = ~holds
        if len(holds) == 1:
            return mask, bool(holds[0])
        if mask is None:
            return (None, True) if holds.all() else (holds, bool(holds.any()))
        both = holds & mask
        return (mask, True) if (both == mask).all() else (both, bool(both.any()))

    def _barrier(self, blocks: Array | None) -> None:
        self.shared.barrier(blocks)
        if self.accesses is not None:
            self.accesses.barrier(blocks)

    def _join(self, position: int, lanes: Array) -> None:
        self._groups[position] = self._groups[position] | lanes if position in self._groups else lanes

    def _release(self) -> None:
        """Let the blocks go on of which all live threads wait."""
        if not self._waiting:
            return
        waiting = np.logical_or.reduce(list(self._waiting.values())).reshape(self.num_blocks, -1)
        ready = (waiting | ~self._live.reshape(self.num_blocks, -1)).all(1) & waiting.any(1)
        if not ready.any():
            return
        self._barrier(ready)
        go = np.repeat(ready, self.num_threads)
        for position, lanes in list(self._waiting.items()):
            if (lanes & go).any():
                self._join(position, lanes & go)
            self._waiting[position] = lanes & ~go
            if not self._waiting[position].any():
                del self._waiting[position]


def execute(
    code: Code, memory: GlobalMemory, parameters: Sequence[int], grid: tuple[int, int, int], shared_bytes: int
) -> None:
    """Run all blocks of the grid, many at a time. Blocks must not wait for each other."""
    x, y, z = grid
    number = np.arange(x * y * z)
    blocks = np.stack([number % x, number // x % y, number // (x * y)], axis=1)
    size = max(1, min(MAX_LANES // code.kernel.num_threads, MAX_SHARED // max(1, shared_bytes)))
    for name, contents in code.data.items():
        memory.add(contents.ctypes.data, contents.size, name)
    memory.seal()
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), size):
            Batch(code, memory, parameters, grid, blocks[first : first + size], shared_bytes).run()
