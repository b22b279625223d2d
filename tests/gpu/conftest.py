"""Triton's kernels on what there is: a GPU, else the CPU, which executes what the compiler emits.

With TRITON_INTERPRET=1 in the environment they run in Triton's own interpreter, which needs a process of its own.
"""

from collections.abc import Callable, Iterator

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


@pytest.fixture
def in_poison(device: torch.device) -> Iterator[Callable[..., torch.Tensor]]:
    """tensor, gap -> its copy on the device amid NaN, rows `gap` elements apart; in the end that NaN must be there."""
    made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def place(tensor: torch.Tensor, gap: int = 0) -> torch.Tensor:
        rows = tensor.view(-1, tensor.shape[-1])
        stride, margin = rows.shape[1] + gap, 64
        buffer = torch.full((margin + rows.shape[0] * stride + margin,), torch.nan, dtype=tensor.dtype, device=device)
        inside = buffer[margin:-margin].view(-1, stride)[:, : rows.shape[1]]
        inside.copy_(rows)
        result = inside if gap else inside.view(tensor.shape)
        made.append((buffer, inside))
        return result

    yield place
    for buffer, inside in made:
        inside.fill_(torch.nan)
        assert bool(buffer.isnan().all()), "written where nothing was to be written"


@pytest.fixture
def far_apart(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """rows -> their copy, the last of which begins 2^31 elements behind the first; memory between is never touched."""

    def place(rows: torch.Tensor) -> torch.Tensor:
        stride = -(-(2**31) // (len(rows) - 1) // 16) * 16
        buffer = torch.empty((len(rows) - 1) * stride + rows.shape[1], dtype=rows.dtype, device=device)
        return buffer.as_strided(rows.shape, (stride, 1)).copy_(rows)

    return place
