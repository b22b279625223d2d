"""What is taken away from a compiled kernel must be missed: barriers, and waiting for asynchronous copies."""

import re

import pytest
import torch

from gpu_without_gpu import compile_only, run_ptx, sample_kernels
from gpu_without_gpu.errors import Race

M, N, K, BLOCK_K = 32, 64, 256, 64


@pytest.fixture(scope="module")
def compiled() -> tuple[str, int]:
    kernel = compile_only(
        sample_kernels.matmul, torch.bfloat16, torch.bfloat16, torch.float32, K, K, 1, K, 1,
        M=M, N=N, BLOCK_K=BLOCK_K, SCALE=1, num_warps=4, num_stages=3, target="sm_80",
    )  # fmt: skip
    return kernel.asm["ptx"], kernel.metadata.shared


def error_of(text: str, shared_bytes: int) -> float:
    torch.manual_seed(0)
    a, b, out = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.full((M, N), float("nan"))
    run_ptx(text, (1, 1, 1), a, b, out, K, K, K, None, None, shared_bytes=shared_bytes)
    return float((out - a.float() @ b.float().T).abs().max())


def mutants(text: str, pattern: str) -> list[str]:
    return [text[: found.start()] + text[found.end() :] for found in re.finditer(pattern, text)]


def test_a_missing_barrier_is_a_race(compiled: tuple[str, int]) -> None:
    """But for the first one, between copies to different places."""
    text, shared_bytes = compiled
    assert error_of(text, shared_bytes) < 1e-3
    first, *changed = mutants(text, r"bar\.sync\s+0;")
    assert error_of(first, shared_bytes) < 1e-3 and len(changed) >= 4
    for mutant in changed:
        with pytest.raises(Race):
            error_of(mutant, shared_bytes)


def test_a_missing_wait_gives_nan(compiled: tuple[str, int]) -> None:
    """But for the last one, when nothing is in flight any more."""
    text, shared_bytes = compiled
    *changed, last = mutants(text, r"cp\.async\.wait_group\s+\d+;")
    assert changed and error_of(last, shared_bytes) < 1e-3
    for mutant in changed:
        assert not error_of(mutant, shared_bytes) < 1e-3
