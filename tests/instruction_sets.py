"""The native ops for instruction sets that are not in use here."""

import os
import subprocess
import sys

import pytest

from octavo.kernels.cpu.build import VARIANTS, library_path
from octavo.kernels.cpu.library import cpu_flags, variant

# Those that can run: without the tiles of AMX, which are for whoever has them to use.
OTHERS = [
    name
    for name, (_, needs) in VARIANTS.items()
    if name not in (variant(), "amx") and needs <= cpu_flags() and library_path(name).exists()
]


def run_tests(name: str, file: str, words: str) -> None:
    """Run the tests of a file that `words` choose (`pytest -k`) with this instruction set's ops, in a process."""
    if "OCTAVO_CPU_VARIANT" in os.environ:
        pytest.skip("a run of this test")
    command = [sys.executable, "-m", "pytest", "-q", "-k", words, file]
    run = subprocess.run(command, env=os.environ | {"OCTAVO_CPU_VARIANT": name}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
