"""Triton's kernels on what there is: a GPU, else the CPU, which executes what the compiler emits.

With TRITON_INTERPRET=1 in the environment they run in Triton's own interpreter, which needs a process of its own.
"""

from collections.abc import Iterator

import pytest
import torch

from octavo.kernels import backend


@pytest.fixture(autouse=True, scope="module")
def triton_kernels() -> Iterator[None]:
    """Ops run on Triton's kernels meanwhile."""
    before = backend.kernels()
    backend.select("triton", "cuda" if torch.cuda.is_available() else "cpu")
    yield
    backend.select(before)


@pytest.fixture
def device() -> torch.device:
    """Where tensors belong."""
    return backend.device()
