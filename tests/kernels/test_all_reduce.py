"""all_reduce over processes, which check it themselves: the tree's sum in every bit, in any batch, by shared memory and
by gloo.

Run as a program, this file is such processes: one imports torch, the others are forked from it.
"""

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from octavo.kernels import backend, reference
from octavo.kernels.all_reduce import all_reduce
from octavo.kernels.cpu.library import call
from octavo.kernels.program import Program
from octavo.kernels.ranks import DistributedRanks, Ranks, SharedMemoryRanks
from octavo.kernels.rms_norm import rms_norm

NUM_PROCESSES = 4
SHAPES = [(1, 16), (3, 144), (40, 80)]
REGION_BYTES = 1 << 20


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 10.0 ** (seed % 3)).to(dtype)


def check_sum(ranks: Ranks, shape: tuple[int, int], parts_each: int, dtype: torch.dtype, wide: bool) -> torch.Tensor:
    """All-reduce in both forms; returns the sum with bias and residual."""
    parts_dtype = torch.float32 if wide else dtype
    all_parts = torch.stack([values(shape, parts_dtype, 1000 + i) for i in range(ranks.num_ranks * parts_each)])
    bias, residual = values(shape[1:], torch.float32, 1), values(shape, dtype, 2)
    parts, sums = ranks.buffer((parts_each, *shape), parts_dtype), ranks.buffer(shape, dtype)
    parts.copy_(all_parts[ranks.rank * parts_each : (ranks.rank + 1) * parts_each])
    out = residual.clone()
    got = all_reduce(parts, out, ranks, sums=sums, bias=bias, residual=out)
    assert got is out and torch.equal(got, reference.sum_parts(all_parts, bias, residual, dtype))
    alone = all_reduce(parts, torch.empty_like(out), ranks, sums=sums)
    assert torch.equal(alone, reference.sum_parts(all_parts, None, None, dtype))
    exact = all_parts.double().sum(0) + bias + residual
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), exact, atol=100 * tolerance, rtol=tolerance)
    last = shape[0] - 1  # a row alone, by the same buffers
    parts[:, 0] = all_parts[ranks.rank * parts_each : (ranks.rank + 1) * parts_each, last]
    row = residual[last:].clone()
    all_reduce(parts[:, :1], row, ranks, sums=sums[:1], bias=bias, residual=row)
    assert torch.equal(row, got[last:])
    return got


def check_group(ranks: Ranks) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            for wide in (True, False):
                check_sum(ranks, shape, 1, dtype, wide)
    if 8 % ranks.num_ranks == 0:  # as many parts whatever the ranks: the same bits as in a process alone
        for shape in SHAPES:
            got = check_sum(ranks, shape, 8 // ranks.num_ranks, torch.bfloat16, True)
            assert torch.equal(got, check_sum(Ranks(), shape, 8, torch.bfloat16, True))
    # A slow rank finds what the others meant for it, not what they have written since.
    widths = [16, 32, 5, 7][: ranks.num_ranks]
    columns, out = ranks.buffer((3, 32), torch.float32).view(-1), torch.empty((3, sum(widths)))
    told = ranks.buffer((5,), torch.int32)
    for turn in range(20):
        part = columns[: 3 * widths[ranks.rank]].view(3, -1)
        part[:] = 100 * turn + ranks.rank
        if ranks.rank == turn % ranks.num_ranks:
            sum(range(20000))
        got = ranks.gather(part, widths, out)
        want = torch.cat([torch.full((3, width), 100.0 * turn + rank) for rank, width in enumerate(widths)], dim=1)
        assert ranks.rank or torch.equal(got, want)
        told[:] = torch.arange(5) * turn if ranks.rank == 0 else -1
        ranks.broadcast(told)
        assert told.tolist() == [i * turn for i in range(5)]


def check_program(ranks: Ranks) -> None:
    """A sum in the middle of recorded ops, for fewer rows than were recorded."""
    all_parts = torch.stack([values((8, 32), torch.float32, 1000 + i) for i in range(ranks.num_ranks)])
    parts, sums = ranks.buffer((1, 8, 32), torch.float32), ranks.buffer((8, 32), torch.bfloat16)
    parts.copy_(all_parts[ranks.rank])
    residual, weight = values((8, 32), torch.bfloat16, 2), values((32,), torch.float32, 1)
    out, normed = torch.zeros_like(residual), torch.zeros_like(residual)

    def launch(rows: int) -> None:
        all_reduce(parts[:, :rows], out[:rows], ranks, sums=sums[:rows], residual=residual[:rows])
        rms_norm(out[:rows], weight, 1e-5, normed[:rows])

    program = Program(launch, 8)
    for rows in (3, 8, 1):
        out.zero_()
        program.run(rows)
        assert torch.equal(out[:rows], reference.sum_parts(all_parts, None, residual, torch.bfloat16)[:rows])
        assert not out[rows:].any()
        assert torch.equal(normed[:rows], rms_norm(out[:rows], weight, 1e-5, torch.empty_like(out[:rows])))


def test_what_fails_in_a_program_is_raised_at_its_end() -> None:
    calls: list[int] = []

    def fail(rows: int) -> None:
        calls.append(rows)
        raise ValueError("broken")

    def launch(rows: int) -> None:
        call(fail, rows)
        call(calls.append, rows)

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            Program(launch, 8).run(3)
    assert calls == [3, 3]


def main(meeting_point: str) -> int:
    memories = [os.memfd_create("ranks") for _ in range(NUM_PROCESSES)]
    rank = next((rank for rank in range(1, NUM_PROCESSES) if os.fork() == 0), 0)
    torch.set_num_threads(1)
    if backend.kernels() == "native":
        for num_ranks in range(1, NUM_PROCESSES + 1):
            if rank < num_ranks:
                check_group(SharedMemoryRanks(rank, num_ranks, memories[num_ranks - 1], 16 * REGION_BYTES))
    every_kernels = ("native", "torch") if backend.kernels() == "native" else ("torch",)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=NUM_PROCESSES)
    for num_ranks in (3, NUM_PROCESSES):
        group = dist.new_group(list(range(num_ranks)))
        if rank < num_ranks:
            for kernels in every_kernels:
                backend.select(kernels)
                check_group(DistributedRanks(group))
                check_program(DistributedRanks(group))
    dist.barrier()
    dist.destroy_process_group()
    if rank:
        os._exit(0)
    return max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(1, NUM_PROCESSES))


def test_processes_agree(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(tmp_path / "meeting_point")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 0, errors


def test_a_process_alone() -> None:
    check_group(Ranks())


def test_wrong_arguments_are_named() -> None:
    parts, out = torch.zeros((2, 3, 32)), torch.zeros((3, 32))
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"out": torch.zeros((3, 16))}, "parts: shape is"),
        ({"parts": torch.zeros((2, 3, 24)), "out": torch.zeros((3, 24))}, "parts: shape is"),
        ({"parts": torch.zeros((9, 3, 32))}, "at most 8 parts"),
        ({"parts": parts.bfloat16()}, "parts: dtype is torch.bfloat16"),
        ({"bias": torch.zeros(16)}, "bias: shape"),
        ({"residual": out.bfloat16()}, "residual: dtype"),
    ]
    for changes, words in wrong:
        with pytest.raises(ValueError, match=words):
            all_reduce(**{"parts": parts, "out": out, "ranks": Ranks(), **changes})  # type: ignore[arg-type]
    if backend.kernels() == "native":
        memory = os.memfd_create("ranks")
        ranks = SharedMemoryRanks(0, 1, memory, 1 << 12)
        buffer = ranks.buffer((1, 3, 32), torch.float32)
        with pytest.raises(ValueError, match="sums: missing"):
            all_reduce(buffer, out, ranks)
        with pytest.raises(ValueError, match="not part of a buffer"):
            all_reduce(parts[:1], out, ranks, sums=out)
        with pytest.raises(ValueError, match="do not fit"):
            ranks.buffer((1 << 12,), torch.float32)
        os.close(memory)


if __name__ == "__main__":
    try:
        status = main(sys.argv[1])
    except Exception:
        traceback.print_exc()
        os.killpg(0, signal.SIGKILL)  # what goes wrong in one process ends all of them
    sys.exit(status)
