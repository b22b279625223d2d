"""What an engine is doing, on a page of memory that the front end reads. Standard library only.

It costs no message and wakes nobody, and it is still there when the engine is stuck or gone: whoever looks at it knows
whether the engine goes on, how long its step may take, and which requests were in that step.
"""

import mmap
import os
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

_HEAD = struct.Struct("<ddq")  # at_s, expected_s, bytes of ids behind it
PAGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Beat:
    """The engine's latest sign of life."""

    at_s: float = 0.0  # time.monotonic(), which all processes share; 0.0: none yet
    expected_s: float = 0.0  # how long it is likely to take until the next one
    request_ids: tuple[str, ...] = ()  # of the step that runs; none between steps


class Progress:
    """One page, mapped by both sides: `fd` is to be inherited by the engine, which opens it by that number."""

    def __init__(self, fd: int | None = None) -> None:
        """None: a new page, in no file system."""
        if fd is None:
            fd = os.memfd_create("octavo-progress")
            os.ftruncate(fd, PAGE_BYTES)
        self.fd = fd
        self._page = mmap.mmap(fd, PAGE_BYTES)

    def beat(self, expected_s: float, request_ids: Iterable[str] = ()) -> None:
        """Says that the engine goes on, and what with. What of the ids does not fit on the page is left out."""
        ids = "\n".join(request_ids).encode()[: PAGE_BYTES - _HEAD.size]
        self._page[_HEAD.size : _HEAD.size + len(ids)] = ids
        _HEAD.pack_into(self._page, 0, time.monotonic(), expected_s, len(ids))

    def read(self) -> Beat:
        """The latest beat. One that is being written may be mixed with the one before."""
        at_s, expected_s, num_bytes = _HEAD.unpack_from(self._page)
        ids = self._page[_HEAD.size : _HEAD.size + num_bytes].decode(errors="replace")
        return Beat(at_s, expected_s, tuple(ids.split("\n")) if ids else ())

    def close(self) -> None:
        """Lets the page go; the other side may still have it. Nothing where that is done."""
        if not self._page.closed:
            self._page.close()
            os.close(self.fd)
