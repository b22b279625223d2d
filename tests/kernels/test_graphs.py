"""Graphs compute what their function computes, a size at a time, and are captured with the largest first."""

from collections.abc import Callable

import pytest
import torch

from octavo.kernels.program import Graphs, graph_sizes


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (9, [1, 2, 4, 8, 9]),
        (16, [1, 2, 4, 8, 16]),
        (30, [1, 2, 4, 8, 16, 24, 30]),
    ],
)
def test_sizes(largest: int, sizes: list[int]) -> None:
    assert graph_sizes(largest) == sizes


def test_replays_compute_with_what_the_tensors_hold() -> None:
    x, out = torch.zeros(8), torch.full((8,), 7.0)
    captured: list[int] = []

    def function(size: int) -> None:
        captured.append(size)
        torch.mul(x[:size], 2, out=out[:size])

    def capture(launch: Callable[[], object]) -> Callable[[], object]:
        launch()  # as when a GPU is given a first run
        return launch

    graphs = Graphs(function, graph_sizes(8), capture)
    assert captured == [8, 4, 2, 1]
    out.fill_(7.0)
    for num_rows, size in ((1, 1), (2, 2), (3, 4), (5, 8), (8, 8)):
        assert graphs.size_for(num_rows) == size
    x.copy_(torch.arange(8.0))
    graphs.replay(4)
    assert out.tolist() == [0.0, 2.0, 4.0, 6.0, 7.0, 7.0, 7.0, 7.0]
    x.fill_(1.0)
    graphs.replay(2)
    assert out.tolist() == [2.0, 2.0, 4.0, 6.0, 7.0, 7.0, 7.0, 7.0]
