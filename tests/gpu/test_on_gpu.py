"""A chip's results beside those of executed PTX; what `make gpu` does where there is no GPU, and where there is."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from gpu import on_gpu
from gpu.same_inputs import is_exact, results

ROOT = Path(__file__).parent.parent.parent
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

compiled = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="of compiled kernels only")


def check_beside_executed(arch: int, file: Path) -> None:
    """What runs in this process agrees with the PTX for this chip, executed by a process that sees no GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "GPU_WITHOUT_GPU_ARCH": str(arch)}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, "-m", "gpu.same_inputs", str(file)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=280)
    executed = torch.load(file)
    found = results()
    assert found.keys() == executed.keys()
    assert sum(map(is_exact, found)) > len(found) / 3
    for name, tensors in found.items():
        for got, want in zip(tensors, executed[name], strict=True):
            assert got.dtype == want.dtype and not got.float().isnan().any(), name
            tolerance = 0.0 if is_exact(name) else TOLERANCES[got.dtype]
            try:
                torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)
            except AssertionError as error:
                raise AssertionError(name) from error


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_a_gpu_computes_what_executed_ptx_does(tmp_path: Path) -> None:
    check_beside_executed(90 if torch.cuda.get_device_capability()[0] >= 9 else 80, tmp_path / "executed.pt")


@compiled
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is compared instead")
@pytest.mark.skipif(os.environ.get("GPU_WITHOUT_GPU_ARCH") == "90", reason="sm_80 is executed here, sm_90 beside it")
def test_sm_80_and_sm_90_compute_the_same(tmp_path: Path) -> None:
    check_beside_executed(90, tmp_path / "executed.pt")


@pytest.mark.parametrize("has_gpu", [False, True])
def test_make_gpu(has_gpu: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[str] = []

    def run(command: list[str]) -> SimpleNamespace:
        started.append(command[2])
        return SimpleNamespace(returncode=int(command[2] == "pytest"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(on_gpu, "subprocess", SimpleNamespace(run=run))
    assert on_gpu.main() == int(has_gpu)
    out, err = capsys.readouterr()
    if has_gpu:
        assert started == ["pytest", "octavo.benchmarks.kernels"] and err == "make gpu: failed: pytest\n"
    else:
        assert not started and out == "make gpu: skipped, torch finds no GPU here\n"
