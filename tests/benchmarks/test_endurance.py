"""What is no question of speed: a server that is told to stop leaves nothing behind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from api_fakes import make_tokenizer

from octavo.benchmarks.endurance import drain, slope


@pytest.mark.slow
def test_a_server_that_is_told_to_stop(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tiny")
    shutil.copytree(tiny_checkpoint("smollm2"), tmp_path / "tiny", dirs_exist_ok=True)
    found = drain(str(tmp_path / "tiny"), 3)
    assert found["ok"], found
    assert found["whole"] + found["errors"] == 3 * 8


def test_the_slope_of_points_does_not_depend_on_a_few_of_them() -> None:
    points = [(x, 3.0 * x + 1) for x in range(10)]
    points[4] = (4, 1000.0)
    assert slope(points) == 3.0
