"""Compiles the native CPU ops: `python -m octavo.kernels.cpu.build`.

One shared library per instruction set, next to the sources; the best one that the machine can run is chosen when the
ops are loaded. Plain C functions: nothing of torch is compiled in, so a build takes a minute or two.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vbmi", "avx512_bf16"}
# variant -> (compiler flags, CPU flags it needs), best first
VARIANTS: dict[str, tuple[list[str], set[str]]] = (
    {
        "amx": (
            ["-march=x86-64-v4", "-mavx512vbmi", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
            {*_AVX512, "amx_tile", "amx_bf16"},
        ),
        "avx512_bf16": (["-march=x86-64-v4", "-mavx512vbmi", "-mavx512bf16"], _AVX512),
        "avx2": (["-march=x86-64-v3"], {"avx2", "fma", "bmi2"}),
    }
    if platform.machine() == "x86_64"
    else {"native": (["-mcpu=native" if platform.machine() == "aarch64" else "-march=native"], set())}
)

# No contraction: a multiply-add is fused only where the source says so, so that bits do not depend on the optimiser.
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-Wall", "-Werror"]
# GCC warns of vectors passed by functions that it then inlines, and of its own intrinsics' undefined lanes.
FLAGS += ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def library_path(variant: str) -> Path:
    """Where the library of a variant lies once built."""
    return FOLDER / f"octavo_cpu_{variant}.so"


def build() -> None:
    """Compile all variants. Raises FileNotFoundError without a compiler, CalledProcessError where it fails."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_build_variant, VARIANTS))


def _build_variant(variant: str) -> None:
    sources = sorted(str(path) for path in FOLDER.glob("*.cpp"))
    target = library_path(variant)
    partial = target.with_suffix(f".{os.getpid()}.tmp")  # renamed when whole: a running server keeps the old one
    print(f"compiling native ops: {variant}", file=sys.stderr)
    command = [os.environ.get("CXX", "g++"), *FLAGS, *VARIANTS[variant][0], *sources, "-o", str(partial)]
    try:
        subprocess.run(command, check=True)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        build()
    except FileNotFoundError as error:
        sys.exit(f"no C++ compiler ({error.filename}): install g++ or set CXX; without native ops Octavo runs slowly")
    except subprocess.CalledProcessError as error:
        sys.exit(f"compiling failed with status {error.returncode}")
