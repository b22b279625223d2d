"""all_reduce over processes, which check it themselves: the sum in rank order, in every bit, in any batch.

Run as a program, this file is one such process.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

NUM_PROCESSES = 4
SHAPES = [(1, 1), (1, 16), (3, 37), (2, 576), (9, 130)]


def rank_input(rank: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + shape[1])
    return (torch.randn(shape, generator=generator) * 10.0 ** (rank % 3)).to(dtype)


def check_group(group: dist.ProcessGroup, rank: int) -> None:
    from octavo.kernels.all_reduce import all_reduce

    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float32, 1e-6)):
        for shape in SHAPES:
            inputs = [rank_input(other, shape, dtype) for other in range(group.size())]
            want = inputs[0].float()
            for other in inputs[1:]:
                want = want + other.float()
            got = inputs[rank].clone()
            assert all_reduce(got, group) is got
            assert torch.equal(got, want.to(dtype)), (shape, dtype)
            exact = torch.stack(inputs).double().sum(0)
            torch.testing.assert_close(got.double(), exact, atol=100 * tolerance, rtol=tolerance)
            row = shape[0] - 1
            alone = inputs[rank][row:].clone()
            assert torch.equal(all_reduce(alone, group), got[row:]), (shape, dtype)


def main(rank: int, meeting_point: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=NUM_PROCESSES)
    for size in (1, 2, 3, NUM_PROCESSES):
        group = dist.new_group(list(range(size)))
        if rank < size:
            check_group(group, rank)
    dist.barrier()
    dist.destroy_process_group()


def test_sums_in_rank_order(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OCTAVO_KERNELS": "torch", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "meeting_point")]
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(NUM_PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors)


if __name__ == "__main__":
    main(int(sys.argv[2]), sys.argv[1])
