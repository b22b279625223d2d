"""The memories of a GPU: global memory is the tensors passed to a kernel, in place; shared memory is per block."""

import bisect
import ctypes
from typing import Any

import numpy as np

from gpu_without_gpu.errors import Misaligned, OutOfBounds, Race
from gpu_without_gpu.formats import UNSIGNED, Array

# All memory of this process as one array, so that an address is an index. Nothing is touched without a check of bounds.
_START = 4096
_BYTES: Array = np.frombuffer(memoryview((ctypes.c_uint8 * ((1 << 47) - 2 * _START)).from_address(_START)), np.uint8)
_WORDS = {width: _BYTES.view(UNSIGNED[width]) for width in (8, 16, 32, 64)}


def _rows(words: Array, count: int) -> Array:
    return words[: len(words) // count * count].reshape(-1, count)


_VECTORS = {(width, count): _rows(words, count) for width, words in _WORDS.items() for count in (1, 2, 4, 8, 16)}


class GlobalMemory:
    """The ranges of addresses that a kernel may use, each with a name for messages."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, str]] = []
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, size: int, name: str) -> None:
        """`size` bytes from the address `begin` on. They must live as long as this object is used."""
        if size:
            self._ranges.append((begin, begin + size, name))

    def add_tensor(self, tensor: Any, name: str) -> None:
        """What a torch tensor spans, from its first to its last element. Views of one storage may overlap."""
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            self.add(tensor.data_ptr(), (last + 1) * tensor.element_size(), name)

    def seal(self) -> None:
        """Merge what overlaps. No range is added afterwards."""
        merged: list[tuple[int, int, str]] = []
        for begin, end, name in sorted(self._ranges):
            if merged and begin < merged[-1][1]:
                first, last, names = merged[-1]
                merged[-1] = (first, max(last, end), names if name in names.split("+") else f"{names}+{name}")
            else:
                merged.append((begin, end, name))
        self._ranges = merged
        self._begins = [begin for begin, _, _ in merged]
        self._ends = [end for _, end, _ in merged]

    def check(self, addresses: Array, size: int) -> None:
        """`size` bytes at each address are within bounds."""
        if int(np.bitwise_or.reduce(addresses)) & (size - 1):
            raise Misaligned(f"{size} bytes at an address that is no multiple of {size}")
        low, high = int(addresses.min()), int(addresses.max())
        place = bisect.bisect_right(self._begins, low) - 1
        if place >= 0 and high + size <= self._ends[place]:
            return
        begins, ends = np.array(self._begins, np.int64), np.array(self._ends, np.int64)
        places = np.searchsorted(begins, addresses, "right") - 1
        bad = (places < 0) | (addresses + size > ends[places]) if len(begins) else np.ones(len(addresses), bool)
        if bad.any():
            raise OutOfBounds(f"{int(bad.sum())} threads out of bounds: {self._where(int(addresses[bad][0]), size)}")

    def range_of(self, addresses: Array) -> tuple[int, int] | None:
        """Begin and end of the range where all of these lie, which are within bounds; None where there are several."""
        place = bisect.bisect_right(self._begins, int(addresses.min())) - 1
        return (self._begins[place], self._ends[place]) if int(addresses.max()) < self._ends[place] else None

    def _where(self, address: int, size: int) -> str:
        if not self._ranges:
            return "no tensor was passed"
        distances = [
            (max(begin - address, address + size - end), begin, end, name) for begin, end, name in self._ranges
        ]
        _, begin, end, name = min(distances)
        return f"{size} bytes at byte {address - begin} of the {end - begin} of {name}"

    def load(self, addresses: Array, bits: int, count: int) -> Array:
        """int64 [n] -> unsigned [n, count] of `bits` each."""
        self.check(addresses, bits // 8 * count)
        if count == 1:
            return _WORDS[bits][(addresses - _START) // (bits // 8)][:, None]
        return _VECTORS[bits, count][(addresses - _START) // (bits // 8 * count)]

    def store(self, addresses: Array, values: Array) -> None:
        """int64 [n], unsigned [n, count]."""
        count, size = values.shape[1], values.itemsize
        self.check(addresses, size * count)
        _VECTORS[8 * size, count][(addresses - _START) // (size * count)] = values

    def bytes(self, addresses: Array, size: int) -> Array:
        """int64 [n] -> uint8 [n, size]."""
        self.check(addresses, size)
        return _VECTORS[8, size][(addresses - _START) // size]

    def word(self, address: int, bits: int) -> Array:
        """One element, to read and write."""
        self.check(np.array([address]), bits // 8)
        index = (address - _START) // (bits // 8)
        return _WORDS[bits][index : index + 1]


SPAN = 4096  # tags are period * SPAN + thread
ATOMIC = SPAN - 1  # in place of a thread: one or several, by atomic operations
SEVERAL = SPAN - 2  # in place of a thread: more than one
MOST_WATCHED = 1 << 26  # bytes of a range; larger ones are not watched


class GlobalAccesses:
    """Which thread of a block touched what in global memory last. What blocks do to each other is not seen.

    Between two of its barriers, a block is in a period, a number that no block has had before. For each unit (the
    smallest access of the kernel) the last writer and reader are kept, as period and thread.
    """

    def __init__(self, memory: GlobalMemory, num_blocks: int, unit: int) -> None:
        self.periods = np.arange(1, 1 + num_blocks)
        self._memory, self._unit = memory, unit
        self._shadows: dict[int, tuple[Array, Array]] = {}  # begin of a range -> last writer, last reader of its units
        self._reads: list[tuple[int, int, Array, Array, int]] = []  # yet to be noted

    def barrier(self, blocks: Array | None) -> None:
        """All threads of these blocks have met; None: of all blocks."""
        if blocks is None:
            self._reads.clear()
            self.periods += len(self.periods)
        else:
            self.periods[blocks] += len(self.periods)

    def _units(self, begin: int, addresses: Array, size: int) -> Array:
        first = addresses[:, None] // self._unit - begin // self._unit
        return first if size == self._unit else first + np.arange(size // self._unit)

    def _shadow(self, begin: int, end: int) -> tuple[Array, Array]:
        if begin not in self._shadows:
            count = (end - 1) // self._unit - begin // self._unit + 1
            self._shadows[begin] = np.zeros(count, np.int64), np.zeros(count, np.int64)
        return self._shadows[begin]

    def _range(self, addresses: Array) -> tuple[int, int] | None:
        found = self._memory.range_of(addresses)
        return found if found is not None and found[1] - found[0] <= MOST_WATCHED else None

    def read(self, addresses: Array, size: int, blocks: Array, threads: Array) -> None:
        """`size` bytes at each address are read by these threads, numbers within their blocks."""
        if (found := self._range(addresses)) is None:
            return
        tags = self.periods[blocks] * SPAN + threads
        if found[0] in self._shadows:
            writer = self._shadows[found[0]][0][self._units(found[0], addresses, size)]
            _check(writer, tags[:, None], "read of what another thread wrote to global memory, with no barrier between")
        self._reads.append((*found, addresses, tags, size))
        if len(self._reads) > MOST_READS:
            self._note_reads()

    def _note_reads(self) -> None:
        for begin, end, addresses, tags, size in self._reads:
            _, reader = self._shadow(begin, end)
            units = self._units(begin, addresses, size)
            before, now = reader[units], np.broadcast_to(tags[:, None], units.shape)
            now = np.where((before // SPAN == now // SPAN) & (before != now), now // SPAN * SPAN + SEVERAL, now)
            reader[units] = now
            clash = reader[units] != now  # several threads in this very read
            reader[units[clash]] = now[clash] // SPAN * SPAN + SEVERAL
        self._reads.clear()

    def write(self, addresses: Array, size: int, blocks: Array, threads: Array, atomic: bool = False) -> None:
        """`size` bytes at each address are written by these threads."""
        if (found := self._range(addresses)) is None:
            return
        self._note_reads()
        writer, reader = self._shadow(*found)
        units = self._units(found[0], addresses, size)
        tags = (self.periods[blocks] * SPAN + (ATOMIC if atomic else threads))[:, None]
        _check(reader[units], tags, "write to global memory over what another thread read, with no barrier between")
        _check(writer[units], tags, "write to global memory over what another thread wrote, with no barrier between")
        writer[units] = tags
        _check(writer[units], tags, "threads write to one place in global memory at once")


def _check(before: Array, tags: Array, words: str) -> None:
    """Whatever came before was in another period, or by the same thread."""
    if ((before // SPAN == tags // SPAN) & (before != tags)).any():
        raise Race(words)


WARPS = 64  # tags are epoch * WARPS + warp
MOST_READS = 256  # kept before they are noted
MANY = WARPS - 1  # in place of a warp: more than one


class SharedMemory:
    """Shared memory of `num_blocks` blocks, one after another.

    Bytes that nothing was written to hold 0xff, which is NaN in every float format. For each unit (the smallest access
    of the kernel) the last writer and the readers are kept, as the warp and the number of barriers that its block had
    passed. A write that changes nothing races with no other write: Triton replicates stores.
    """

    def __init__(self, num_blocks: int, size: int, unit: int, num_warps: int) -> None:
        """`num_warps` of each block: one warp alone has nobody to race with."""
        self.size = size
        self.stride = (size + 1023) // 1024 * 1024  # swizzles of matrix descriptors need this alignment
        self.unit = unit
        self.data = np.full(num_blocks * self.stride, 0xFF, np.uint8)
        self._words = {width: self.data.view(UNSIGNED[width]) for width in (8, 16, 32, 64)}
        self._vectors = {
            (width, count): words.reshape(-1, count)
            for width, words in self._words.items()
            for count in (1, 2, 4, 8, 16)
        }
        self._epoch = np.ones(num_blocks, np.int32)  # barriers passed
        self._writer = np.zeros(len(self.data) // unit, np.int32)
        self._reader = np.zeros(len(self.data) // unit, np.int32)
        # Since the last barrier of all blocks: was anything written, is anything in _reader, and reads yet to go there.
        self._written = self._read = False
        self._reads: list[tuple[Array, int, Array, Array]] = []
        self._alone = num_warps == 1

    def barrier(self, blocks: Array | None) -> None:
        """All threads of these blocks have met; None: of all blocks. `blocks` is bool [num_blocks]."""
        if blocks is None:
            self._reads.clear()
            self._written = self._read = False
            self._epoch += 1
        else:
            self._note_reads()
            self._epoch += blocks

    def place(self, addresses: Array, blocks: Array, size: int) -> Array:
        """Addresses within each block's memory -> indices of bytes, checked for `size` bytes each."""
        if int(np.bitwise_or.reduce(addresses)) & (size - 1):
            raise Misaligned(f"{size} bytes of shared memory at an address that is no multiple of {size}")
        if int(addresses.min()) < 0 or int(addresses.max()) + size > self.size:
            low, high = int(addresses.min()), int(addresses.max())
            raise OutOfBounds(f"{size} bytes at {low} to {high} of the {self.size} bytes of shared memory")
        return addresses + blocks * self.stride

    def _units(self, places: Array, size: int) -> Array:
        first = places[:, None] // self.unit
        return first if size == self.unit else first + np.arange(size // self.unit)

    def _tags(self, blocks: Array, warps: Array) -> tuple[Array, Array]:
        start = self._epoch[blocks][:, None] * WARPS
        return start, start + warps[:, None]

    def note_read(self, places: Array, size: int, blocks: Array, warps: Array) -> None:
        """`size` bytes at each place are about to be read by these warps, numbers within their blocks."""
        if self._alone:
            return
        if self._written:
            start, tags = self._tags(blocks, warps)
            writer = self._writer[self._units(places, size)]
            if ((writer >= start) & (writer != tags)).any():
                raise Race("read of what another warp wrote, with no barrier between")
        self._reads.append((places, size, blocks, warps))  # only a write before the next barrier needs to know
        if len(self._reads) > MOST_READS:
            self._note_reads()

    def _note_reads(self) -> None:
        for places, size, blocks, warps in self._reads:
            units = self._units(places, size)
            start, tags = self._tags(blocks, warps)
            before = self._reader[units]
            now = np.where((before >= start) & (before != tags), start + MANY, tags)
            self._reader[units] = now
            clash = self._reader[units] != now  # several warps in this very read
            self._reader[units[clash]] = np.broadcast_to(start + MANY, units.shape)[clash]
            self._read = True
        self._reads.clear()

    def note_write(self, places: Array, values: Array, blocks: Array, warps: Array) -> None:
        """`values` are the bytes, uint8 [n, size], about to be written."""
        if self._alone:
            return
        units = self._units(places, values.shape[1])
        start, tags = self._tags(blocks, warps)
        self._note_reads()
        if self._read:
            reader = self._reader[units]
            if ((reader >= start) & (reader != tags)).any():
                raise Race("write over what another warp read, with no barrier between")
        if self._written:
            writer = self._writer[units]
            if (other := (writer >= start) & (writer != tags)).any():
                differs = (self._vectors[8, self.unit][units] != values.reshape(len(units), -1, self.unit)).any(-1)
                if (other & differs).any():
                    raise Race("write over what another warp wrote, with no barrier between")
        self._writer[units] = tags
        self._written = True

    def load(self, places: Array, bits: int, count: int) -> Array:
        """Indices of bytes [n] -> unsigned [n, count]."""
        return self._vectors[bits, count][places // (bits // 8 * count)]

    def store(self, places: Array, values: Array) -> None:
        """Indices of bytes [n], unsigned [n, count]. Threads that write to one place must agree."""
        index = places // (values.itemsize * values.shape[1])
        vectors = self._vectors[8 * values.itemsize, values.shape[1]]
        vectors[index] = values
        if (vectors[index] != values).any():
            raise Race("threads write different values to one place at once")

    def word(self, place: int, bits: int) -> Array:
        """One element, to read and write."""
        return self._words[bits][place * 8 // bits : place * 8 // bits + 1]


class AsyncCopies:
    """Copies from global to shared memory in flight. Their destination holds poison until the thread waits for them."""

    def __init__(self, memory: SharedMemory, num_lanes: int) -> None:
        self._memory = memory
        self._committed = np.zeros(num_lanes, np.int64)  # groups that each thread has closed
        self._flying: list[tuple[Array, Array, Array, Array, Array, Array]] = []

    def start(self, lanes: Array, places: Array, values: Array, blocks: Array, warps: Array) -> None:
        self._memory.note_write(places, values, blocks, warps)
        self._memory.store(places, np.full_like(values, 0xFF))
        self._flying.append((lanes, self._committed[lanes], places, values, blocks, warps))

    def commit(self, lanes: Array) -> None:
        self._committed[lanes] += 1

    def wait(self, active: Array, pending: int | None) -> None:
        """Complete the copies of the `active` threads but for the latest `pending` groups; None: all, closed or not."""
        flying, self._flying = self._flying, []
        for copy in flying:
            lanes, group = copy[:2]
            done = active[lanes] & (True if pending is None else group < self._committed[lanes] - pending)
            if not done.all():
                self._flying.append(tuple(part[~done] for part in copy))  # type: ignore[arg-type]
            if done.any():
                _, _, places, values, blocks, warps = (part[done] for part in copy)
                self._memory.note_write(places, values, blocks, warps)
                self._memory.store(places, values)
