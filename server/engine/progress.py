"""What an engine is doing, on a page of memory that the front end reads. Standard library only.

It costs no message and wakes nobody, and it is still there when the engine is stuck or gone: whoever looks at it knows
whether the engine goes on, how long its step may take, which requests were in that step, and what each rank has done;
and, where a rank has ended itself over bits that have changed, what it found.
"""

import mmap
import os
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass

MAX_RANKS = 8
_ROW = struct.Struct("<qddq")  # of each rank: what `RankFigures` has
_AT = struct.Struct("<d")  # behind it: when the rank last showed itself
_HEAD = struct.Struct("<ddq")  # at_s, expected_s, bytes of ids behind it + 1, 0 between steps
_ROW_BYTES = 64  # ranks do not write to each other's cache lines
_HEAD_BEGIN = MAX_RANKS * _ROW_BYTES
_IDS_BEGIN = _HEAD_BEGIN + _HEAD.size
IDLE_S = 0.25  # after which a rank without work shows itself
RESIDENT_S = 1.0  # between two looks at the memory of a process
PAGE_BYTES = 1 << 16
_FINDING = struct.Struct("<BBH")  # rank + 2, 1 for none; the lengths of detector and text behind it; at the page's end
FINDING_BYTES = 512
_FINDING_AT = PAGE_BYTES - FINDING_BYTES


@dataclass(frozen=True, slots=True)
class Beat:
    """The engine's latest sign of life."""

    at_s: float = 0.0  # time.monotonic(), which all processes share; 0.0: none yet
    expected_s: float = 0.0  # how long it is likely to take until the next one
    is_step: bool = False  # a step runs
    request_ids: tuple[str, ...] = ()  # that are in it; none where it only audits


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rank has found to be wrong, and which of its detectors did."""

    rank: int | None  # whose bits are wrong; None: that cannot be said
    detector: str
    text: str


@dataclass(slots=True)
class RankFigures:
    """What a rank has done since it started, and the memory that it has."""

    num_steps: int = 0
    step_s: float = 0.0  # in steps, from a plan to the next tokens
    collective_s: float = 0.0  # of these, in collectives, waiting for other ranks included; 0.0 with NCCL
    resident_bytes: int = 0  # of the process, in the host's memory, what it shares with others included


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    with suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


class Progress:
    """One page, mapped by both sides: `fd` is to be inherited by the engine, which opens it by that number."""

    def __init__(self, fd: int | None = None) -> None:
        """None: a new page, in no file system."""
        if fd is None:
            fd = os.memfd_create("octavo-progress")
            os.ftruncate(fd, PAGE_BYTES)
        self.fd = fd
        self._page = mmap.mmap(fd, PAGE_BYTES)
        self._resident_bytes, self._looked_s = 0, -RESIDENT_S

    def beat(self, expected_s: float, request_ids: Iterable[str] | None = None) -> None:
        """Says that the engine goes on, and what with: a step with these requests; None: it has nothing to do.

        What of the ids does not fit on the page is left out.
        """
        ids = "\n".join(request_ids or ()).encode()[: _FINDING_AT - _IDS_BEGIN]
        self._page[_IDS_BEGIN : _IDS_BEGIN + len(ids)] = ids
        _HEAD.pack_into(
            self._page, _HEAD_BEGIN, time.monotonic(), expected_s, 0 if request_ids is None else len(ids) + 1
        )

    def read(self) -> Beat:
        """The latest beat. One that is being written may be mixed with the one before."""
        at_s, expected_s, ids_end = _HEAD.unpack_from(self._page, _HEAD_BEGIN)
        ids = self._page[_IDS_BEGIN : _IDS_BEGIN + max(ids_end - 1, 0)].decode(errors="replace")
        return Beat(at_s, expected_s, ids_end > 0, tuple(ids.split("\n")) if ids else ())

    def show(self, rank: int, figures: RankFigures) -> None:
        """Puts down what a rank, this process, has done; now and then its memory is looked at as well."""
        if (now := time.monotonic()) - self._looked_s >= RESIDENT_S:
            self._looked_s, self._resident_bytes = now, resident_bytes()
        figures.resident_bytes = self._resident_bytes
        self.put(rank, figures)

    def put(self, rank: int, figures: RankFigures) -> None:
        """Puts down what a rank has done."""
        _ROW.pack_into(self._page, rank * _ROW_BYTES, *astuple(figures))
        self.alive(rank)

    def alive(self, rank: int) -> None:
        """Says that a rank, this process, goes on. One that waits for other ranks in a step does not say so."""
        _AT.pack_into(self._page, rank * _ROW_BYTES + _ROW.size, time.monotonic())

    def alive_s(self, rank: int) -> float:
        """When a rank last said that it goes on; 0.0: not yet."""
        at_s: float = _AT.unpack_from(self._page, rank * _ROW_BYTES + _ROW.size)[0]
        return at_s

    def figures(self, num_ranks: int) -> list[RankFigures]:
        """Of each rank, as it was after its last step; none where the page is let go."""
        if self._page.closed:
            return []
        return [RankFigures(*_ROW.unpack_from(self._page, rank * _ROW_BYTES)) for rank in range(num_ranks)]

    def report(self, finding: Finding) -> None:
        """Says why this rank is about to end, in words that are cut where they are too long."""
        detector = finding.detector.encode()
        text = finding.text.encode()[: FINDING_BYTES - _FINDING.size - len(detector)]
        begin = _FINDING_AT + _FINDING.size
        self._page[begin : begin + len(detector) + len(text)] = detector + text
        _FINDING.pack_into(
            self._page, _FINDING_AT, 1 if finding.rank is None else finding.rank + 2, len(detector), len(text)
        )

    def finding(self) -> Finding | None:
        """What a rank has reported; of several, the last."""
        rank, detector_bytes, text_bytes = _FINDING.unpack_from(self._page, _FINDING_AT)
        if not rank:
            return None
        begin = _FINDING_AT + _FINDING.size
        data = self._page[begin : begin + detector_bytes + text_bytes]
        detector, text = (part.decode(errors="replace") for part in (data[:detector_bytes], data[detector_bytes:]))
        return Finding(None if rank == 1 else rank - 2, detector, text)

    def close(self) -> None:
        """Lets the page go; the other side may still have it. Nothing where that is done."""
        if not self._page.closed:
            self._page.close()
            os.close(self.fd)
