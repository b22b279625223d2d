"""A forward pass as a list of ops: written down once, then run for any number of rows with no Python in between."""

import ctypes
from collections.abc import Callable

from octavo.kernels.backend import kernels
from octavo.kernels.cpu.library import library, record


class _Call(ctypes.Structure):
    _fields_ = [("op", ctypes.c_void_p), ("args", ctypes.c_void_p)]


class Program:
    """What `function` computes, to be run again and again on the same tensors.

    `function(num_rows)` must launch the same ops, on tensors that stay where they are, for every number of rows; all
    that may change is the contents, and the number of rows, which is the size of each tensor's first dimension. Where
    there are native ops it is called once, with `max_rows`; else it is called in each run.
    """

    def __init__(self, function: Callable[[int], object], max_rows: int) -> None:
        self._function = function
        if kernels() == "native":
            lib = library()
            assert lib is not None
            self._recorded = record(lambda: function(max_rows))  # keeps the arguments alive
            self._calls = (_Call * len(self._recorded))(
                *(
                    _Call(ctypes.cast(lib[op], ctypes.c_void_p).value, ctypes.addressof(args))
                    for op, args in self._recorded
                )
            )

    def run(self, num_rows: int) -> None:
        """Compute the first `num_rows` rows, at most `max_rows`."""
        if kernels() != "native":
            self._function(num_rows)
            return
        lib = library()
        assert lib is not None
        lib.octavo_run_program(self._calls, ctypes.c_int64(len(self._calls)), ctypes.c_int64(num_rows))
