"""A forward pass as a list of ops: written down once, then run again and again with no Python in between."""

import ctypes
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import torch

from octavo.kernels.backend import device, kernels
from octavo.kernels.cpu.library import address_of, library, raise_errors, record


class _Call(ctypes.Structure):
    _fields_ = [("op", ctypes.c_void_p), ("args", ctypes.c_void_p)]


class Program:
    """What `function` computes, to be run again and again on the same tensors.

    `function(num_rows, ...)` must launch the same ops, on tensors that stay where they are, for every number of rows;
    all that may change is the contents, and the number of rows, which is the size of each tensor's first dimension.
    Where there are native ops it is called once, with its `largest` arguments; else it is called in each run.
    """

    def __init__(self, function: Callable[..., object], *largest: int) -> None:
        self._function = function
        if kernels() == "native":
            self._recorded = record(lambda: function(*largest))  # keeps the arguments alive
            self._calls = (_Call * len(self._recorded))(
                *(_Call(address_of(op, args), ctypes.addressof(args)) for op, args in self._recorded)
            )

    def run(self, num_rows: int, *rest: int) -> None:
        """Compute the first `num_rows` rows. No argument may be larger than in `largest`."""
        if kernels() != "native":
            self._function(num_rows, *rest)
            return
        lib = library()
        assert lib is not None
        lib.octavo_run_program(self._calls, ctypes.c_int64(len(self._calls)), ctypes.c_int64(num_rows))
        raise_errors()


def graph_sizes(largest: int) -> list[int]:
    """Numbers of rows worth a graph of their own: 1, 2, 4, 8, then every 8, and the largest."""
    return sorted({size for size in (1, 2, 4, *range(8, largest, 8)) if size < largest} | {largest})


class Graphs:
    """What `function(num_rows)` launches on a GPU, for some numbers of rows: captured once, then replayed.

    As with a `Program`, its tensors stay where they are. What it allocates lies in one memory that all graphs share, so
    nothing of that outlives a replay. `capture` takes a function and returns what replays it.
    """

    def __init__(
        self,
        function: Callable[[int], object],
        sizes: Sequence[int],
        capture: Callable[[Callable[[], object]], Callable[[], object]] | None = None,
    ) -> None:
        self._sizes = sorted(sizes)
        capture = capture or _cuda_capture()
        # The largest first: what it allocates is enough for all.
        self._replays = {size: capture(partial(function, size)) for size in reversed(self._sizes)}

    def size_for(self, num_rows: int) -> int:
        """The least size that holds so many rows, at most the largest."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, size: int) -> None:
        """Compute `size` rows, a size that was captured, with what the tensors hold by then."""
        self._replays[size]()


def _cuda_capture() -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Captures CUDA graphs. Without a GPU, where compiled kernels are executed one by one, a replay is a run."""
    if device().type != "cuda":
        return lambda function: function
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], object]) -> Callable[[], object]:
        function()  # kernels are compiled and loaded, neither of which can be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            function()
        return graph.replay

    return capture
