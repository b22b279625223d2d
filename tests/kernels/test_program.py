"""A program computes what its function computes, for every number of rows, with what the tensors hold by then."""

import torch

from octavo.kernels.matmul import empty_packed, gated_matmul, matmul
from octavo.kernels.program import Program
from octavo.kernels.rms_norm import rms_norm


def test_runs_for_any_number_of_rows_on_what_the_tensors_hold() -> None:
    torch.manual_seed(0)
    x, normed, wide, narrow = (torch.zeros(9, width) for width in (48, 48, 32, 16))
    norm, up, down = (
        torch.randn(48),
        empty_packed(64, 48, torch.float32, num_parts=2),
        empty_packed(16, 32, torch.float32),
    )
    up.write_rows(0, torch.randn(32, 48))
    up.write_rows(32, torch.randn(32, 48))
    down.write_rows(0, torch.randn(16, 32))

    def function(num_rows: int) -> None:
        rms_norm(x[:num_rows], norm, 1e-5, normed[:num_rows])
        gated_matmul(normed[:num_rows], up, out=wide[:num_rows])
        matmul(wide[:num_rows], down, out=narrow[:num_rows])

    program = Program(function, 9)
    for num_rows in (1, 9, 4):
        narrow.fill_(7.0)
        x.copy_(torch.randn(9, 48))
        program.run(num_rows)
        want = matmul(gated_matmul(rms_norm(x, norm, 1e-5), up), down)
        torch.testing.assert_close(narrow[:num_rows], want[:num_rows])
        assert bool((narrow[num_rows:] == 7.0).all())
