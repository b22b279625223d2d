"""`make gpu`: all tests of the kernels on the GPU, among them the comparison with what is executed without one, then
their times, which go into docs/gpu.md."""

import subprocess
import sys

import torch

TESTS = ["pytest", "tests/gpu"]
TIMES = ["octavo.benchmarks.kernels", "--every-type", "--output", "docs/gpu.md"]


def main() -> int:
    """An exit status: 0 as well where there is no GPU, and nothing is run."""
    if not torch.cuda.is_available():
        print("make gpu: skipped, torch finds no GPU here")
        return 0
    failed = [
        arguments[0] for arguments in (TESTS, TIMES) if subprocess.run([sys.executable, "-m", *arguments]).returncode
    ]
    if failed:
        print(f"make gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
