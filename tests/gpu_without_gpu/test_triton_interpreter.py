"""Triton's interpreter, mended. An upgrade of Triton that undoes the mending, or makes it needless, shows here."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def checks(*arguments: str) -> dict[str, str]:
    """name of a check -> "right", or what is wrong."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", "gpu_without_gpu.interpreter_checks", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split(": ", 1) for line in finished.stdout.splitlines())


def test_the_mended_interpreter_is_right() -> None:
    result = checks()
    assert len(result) == 7
    assert {name: what for name, what in result.items() if what != "right"} == {}


def test_without_mending_it_is_wrong() -> None:
    """What is right by itself needs no mending any more."""
    assert [name for name, what in checks("unmended").items() if what == "right"] == []
