"""docs/kernels.md, made of the compile matrix, of what ops must move and compute, and of the tests that there are."""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpu.compile_matrix import RENEW, TARGETS, Compiled

from octavo.benchmarks.kernels import LOADS, SHAPES, Types, works

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs/kernels.md"
CHIPS = {"A100": (2.0e12, 312e12), "H100": (3.35e12, 989e12)}  # bytes/s, dense bfloat16 FLOP/s, as their makers say

TOP = f"""\
# GPU kernels

What is known of the Triton kernels without running them on a GPU. `{RENEW}` makes this page and the snapshot
`tests/gpu/compile_matrix.txt`, which has a line for each variant and target. Where there is a GPU, `make gpu` runs the
tests on it, compares its results with those of the executed PTX on the same inputs (in every bit where an op has
neither products by tensor cores nor approximate functions), times every configuration and writes `docs/gpu.md`. That
has not been done yet: **nothing here is a measured speed**.

## What the compilers make of them

`make test-kernels` compiles every op's variants (where there are very many, as few as have every pair of types and
constants) down to machine code, and fails where anything differs from the snapshot, where a register is spilled on an
sm target, where a product of 8 or 16 bits does without tensor cores, or where products on one sm target are by more
than one instruction. A cell is the range over a row's variants: registers of a thread, KiB of shared memory of a block,
and occupancy, which is the share of the warps that a processor may hold, as registers and shared memory allow it
(estimated; 0 means that a block needs more memory than there is). More registers and less occupancy than before ask for
a reason; a low occupancy by itself is none for worry where many bytes are in flight, as in a pipelined loop. gfx942 is
compiled only to see that nothing is NVIDIA's alone.

"""

MIDDLE = """\

## What they must move and compute

Estimates: bytes and FLOPs of one call in bfloat16, one layer's worth, and the least time for these at the bandwidth and
rate that the makers give for the chips (A100: 2.0 TB/s, 312 TFLOP/s; H100: 3.35 TB/s, 989 TFLOP/s). Small calls take
longer, since launching a kernel takes some microseconds. `python -m octavo.benchmarks.kernels` times the same calls on
what there is, CPU included.

"""

BOTTOM = """\

## What is executed

A mode skips the tests that mean nothing to it, such as those of order in Triton's interpreter.

"""

NOT_EXECUTED = """\

Not executed without a GPU:

- sm_100 and gfx942: only compiled.
- float8 on sm_80, which refuses it: int8 is what such a chip offers. On sm_90 it is executed.
- `wgmma`, the tensor memory accelerator and `mbarrier`: no variant uses them, which the snapshot shows, so on sm_80 and
  sm_90 every configuration can be executed. Exactness wants one instruction for every number of rows, and `wgmma` takes
  64 rows or more.
- The exchange of an all-reduce between GPUs, and CUDA graphs: libraries, not kernels.
"""


def _range(values: Sequence[float], form: str = "{:.0f}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def compiled_table(lines: Iterable[Compiled]) -> str:
    """A row for each op and the first word of its variants' names."""
    groups: dict[str, list[Compiled]] = defaultdict(list)
    for line in lines:
        form = line.variant.split(",")[0]
        groups[line.op if re.search(r"\d ranks", form) else f"{line.op}, {form}"].append(line)
    rows = [f"| kernel | variants | {' | '.join(TARGETS)} | tensor cores |", f"|---|---:|{'---|' * len(TARGETS)}---|"]
    for name, group in groups.items():
        cells = []
        for target in TARGETS:
            some = [line for line in group if line.target == target and not line.refused]
            if not some:
                cells.append("refused")
                continue
            cells.append(
                f"{_range([line.registers for line in some])} regs, "
                f"{_range([line.shared / 1024 for line in some])} KiB, "
                f"{_range([line.occupancy * 100 for line in some])} %"
            )
            if spilled := max(line.spilled for line in some):
                cells[-1] += f", **spills {spilled} bytes**"
        found = {part.split(" ")[0] for line in group for part in line.tensor_core.split(", ") if part}
        count = len(group) // len(TARGETS)
        rows.append(f"| {name} | {count} | {' | '.join(cells)} | {', '.join(sorted(found)) or '-'} |")
    return "\n".join(rows) + "\n"


def estimates_table() -> str:
    """A row for each op, model and load."""
    rows = [
        "| op | model | load | MB | GFLOP | A100, µs | H100, µs | bound by |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for model, shape in SHAPES.items():
        for name, load in LOADS.items():
            for work in works(shape, load, Types()):
                times = [(work.num_bytes / bandwidth, work.flops / rate) for bandwidth, rate in CHIPS.values()]
                bounds = dict.fromkeys("memory" if a >= b else "compute" for a, b in times)
                least = " | ".join(f"{max(pair) * 1e6:.2f}" for pair in times)
                rows.append(
                    f"| {work.op} | {model} | {name} | {work.num_bytes / 1e6:.3g} | {work.flops / 1e9:.3g} "
                    f"| {least} | {', '.join(bounds)} |"
                )
    return "\n".join(rows) + "\n"


def count_tests(marks: str) -> dict[str, int]:
    """Tests of each op, by the file that they are in."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", "-q", "-m", marks]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"test_(\w+)\.py: (\d+)", listed)}


def tests_table() -> str:
    """How the tests are run, and how many there are of each op."""
    quick, slow = count_tests("not slow"), count_tests("slow")
    num_quick, num_slow = sum(quick.values()), sum(slow.values())
    num_both = num_quick + num_slow - quick.get("compile", 0) - slow.get("compile", 0)
    rows = [
        "| mode | tests | command |",
        "|---|---:|---|",
        f"| PTX for sm_80, executed | {num_quick} | `make test` |",
        f"| the same, wider, and the compile matrix | {num_slow} | `make test-kernels` |",
        f"| PTX for sm_90, executed | {num_both} | `make test-kernels` |",
        f"| Triton's interpreter | {num_both} | `make test-kernels` |",
        f"| a GPU | {num_quick + num_slow} | `make gpu` |",
        "",
        "| tests of | quick | slow |",
        "|---|---:|---:|",
        *(f"| {name} | {quick.get(name, 0)} | {slow.get(name, 0)} |" for name in sorted(quick | slow)),
    ]
    return "\n".join(rows) + "\n"


def page(lines: Iterable[Compiled]) -> str:
    """All of it."""
    return TOP + compiled_table(lines) + MIDDLE + estimates_table() + BOTTOM + tests_table() + NOT_EXECUTED
