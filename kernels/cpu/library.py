"""Loads the native ops: the best compiled variant that this CPU can run, or none."""

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from octavo.kernels.cpu.build import VARIANTS, library_path


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of this CPU as Linux names them; empty where it does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def _may_use_tiles() -> bool:
    """Ask the kernel for the tile registers' state, which a process must do once before it may use them."""
    return bool(ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


@functools.cache
def variant() -> str | None:
    """Name of the variant in use: $OCTAVO_CPU_VARIANT, else the best that is built and can run here.

    Raises ValueError where $OCTAVO_CPU_VARIANT names one that is not built or cannot run.
    """
    usable = [
        name
        for name, (_, needs) in VARIANTS.items()
        if needs <= cpu_flags() and library_path(name).exists() and (name != "amx" or _may_use_tiles())
    ]
    wanted = os.environ.get("OCTAVO_CPU_VARIANT")
    if wanted is not None and wanted not in usable:
        raise ValueError(f"OCTAVO_CPU_VARIANT is {wanted!r}, but usable here: {', '.join(usable) or 'none'}")
    return wanted or (usable[0] if usable else None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, its functions returning nothing; None where nothing is built that can run here."""
    name = variant()
    return ctypes.CDLL(str(library_path(name))) if name else None


def set_num_threads(count: int) -> None:
    """How many threads the ops use from now on; torch itself keeps one, since little is left to it."""
    lib = library()
    if lib is not None:
        lib.octavo_set_num_threads(count)
    torch.set_num_threads(1 if lib is not None else count)


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 dot products that the native ops use.

    They are those of AVX-512 where it has BF16 and VBMI, and of the 64-bit Arm extension.
    """
    if platform.machine() == "x86_64":
        return {"avx512_bf16", "avx512vbmi"} <= cpu_flags()
    return platform.machine() == "aarch64" and "bf16" in cpu_flags()


def reads_compressed() -> bool:
    """Whether weights are to be compressed (`matmul.compress`) because it makes products quicker.

    Measured with AVX-512-BF16. With tiles numbers would be written to memory and read again before each product, and
    where bfloat16 is emulated it is not memory that products wait for.
    """
    return variant() == "avx512_bf16"


def address(tensor: torch.Tensor | None) -> int | None:
    """The tensor's data pointer as an argument; None stays a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def empty_in_huge_pages(num_bytes: int) -> torch.Tensor:
    """Memory, uint8, in huge pages where the system gives them: reading all of it misses fewer translations."""
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


_region = torch.empty(0, dtype=torch.uint8)  # what is left of it
REGION_BYTES = 64 << 20


def zeros_in_huge_pages(num_bytes: int) -> torch.Tensor:
    """As `empty_in_huge_pages`, but zeros, for what is small but one of many: they share regions of memory.

    A region goes back to the system when all that is in it has gone and another has been begun. Not for use by two
    threads at once.
    """
    global _region
    size = -(-num_bytes // 64) * 64  # whole cache lines
    if size > len(_region):
        _region = empty_in_huge_pages(max(size, REGION_BYTES))
    taken, _region = _region[:num_bytes], _region[size:]
    return taken


class Args(ctypes.Structure):
    """Arguments of an op, laid out as the C++ structure of the op's source file. First comes the number of rows."""


class _Recording(threading.local):
    """What is recorded in this thread."""

    ops: list[tuple[str, Args]] | None = None
    errors: tuple[BaseException, ...] = ()  # of Python among the ops, since a program began


_recording = _Recording()
PYTHON = "python"  # in place of an op's name


class PythonArgs(Args):
    """Of Python among native ops. `function` is what is called, with the address of this."""

    _fields_ = [("rows", ctypes.c_int64)]
    function: Any


_function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def launch(op: str, args: Args) -> None:
    """Run a native op; inside `record`, only note it down."""
    lib = library()
    assert lib is not None
    if _recording.ops is None:
        getattr(lib, op)(ctypes.byref(args))
    else:
        _recording.ops.append((op, args))


def call(function: Callable[[int], object], num_rows: int) -> None:
    """Call `function` with the number of rows in its place among native ops, as `launch` launches one.

    What it raises in a program is raised at the program's end; nothing is called in between.
    """
    if _recording.ops is None:
        function(num_rows)
        return
    args = PythonArgs(num_rows)

    def run(_: int) -> None:
        if not _recording.errors:
            try:
                function(args.rows)
            except BaseException as error:
                _recording.errors = (error,)

    args.function = _function(run)
    _recording.ops.append((PYTHON, args))


def raise_errors() -> None:
    """To be called at a program's end."""
    if errors := _recording.errors:
        _recording.errors = ()
        raise errors[0]


def address_of(op: str, args: Args) -> int:
    """Where the code of a recorded op begins."""
    lib = library()
    assert lib is not None
    found = ctypes.cast(args.function if isinstance(args, PythonArgs) else lib[op], ctypes.c_void_p).value
    assert found is not None
    return found


def record(function: Callable[[], object]) -> list[tuple[str, Args]]:
    """Names and arguments of the ops that `function` launches, none of which is run."""
    assert _recording.ops is None
    _recording.ops = []
    try:
        function()
        return _recording.ops
    finally:
        _recording.ops = None
