"""Run by test_triton_interpreter.py, in a process with TRITON_INTERPRET=1: each function checks one mended thing."""

import sys

import torch
import triton

import gpu_without_gpu
from gpu_without_gpu import sample_kernels
from gpu_without_gpu.errors import OutOfBounds


def conversions() -> None:
    """Bit for bit, NaN and infinities included; float8 saturates."""
    bits = torch.randint(0, 1 << 32, (4096,)).to(torch.int64).to(torch.int32)
    values = torch.cat([bits.view(torch.float32)[:2048], torch.randn(1024) * 3, torch.arange(-512, 512) / 128])
    for target in (torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn):
        out, back = torch.zeros(4096, dtype=target), torch.zeros(4096)
        sample_kernels.convert[(4,)](values, out, BLOCK=1024)
        largest = torch.finfo(target).max if target.itemsize == 1 else float("inf")
        expected = values.clamp(-largest, largest).to(target)
        assert_same(out, expected)
        sample_kernels.convert[(4,)](out, back, BLOCK=1024)
        assert_same(back, expected.float())


def assert_same(x: torch.Tensor, y: torch.Tensor) -> None:
    """Equal bits, or both NaN."""
    x, y = x.float(), y.float()
    assert ((x.view(torch.int32) == y.view(torch.int32)) | (x.isnan() & y.isnan())).all()


def arithmetic() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, y, out = torch.randn(256).to(dtype), torch.randn(256).to(dtype), torch.zeros(256, dtype=dtype)
        sample_kernels.add[(4,)](x, y, out, 256, BLOCK=64)
        assert torch.equal(out, x + y)


def fused_multiply_add() -> None:
    x = torch.full((128,), 1 + 2.0**-12)
    out = torch.zeros(128)
    sample_kernels.fused[(1,)](x, x, -torch.full((128,), 1 + 2.0**-11), out, BLOCK=128)
    assert out.tolist() == [2.0**-24] * 128


def nan_and_reductions() -> None:
    nan = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        x, y = torch.tensor([nan, 1, nan, 3], dtype=dtype), torch.tensor([2, nan, nan, 1], dtype=dtype)
        out = torch.zeros(5, 4, dtype=dtype)
        sample_kernels.extremes[(1,)](x, y, out, BLOCK=4)
        torch.testing.assert_close(out[0], torch.tensor([2, 1, nan, 3], dtype=dtype), equal_nan=True)
        torch.testing.assert_close(out[1], torch.tensor([2, 1, nan, 1], dtype=dtype), equal_nan=True)
        assert out[2, 0] == 3 and out[3, 0] == 1 and out[4, 0].isnan()
        sample_kernels.extremes[(1,)](torch.full_like(x, nan), y, out, BLOCK=4)
        assert out[2:5, 0].isnan().all()


def products() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn, torch.int8):
        a, b = (torch.randint(-8, 8, (16, 64)).to(dtype) for _ in range(2))
        out = torch.zeros(16, 16, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
        sample_kernels.matmul[(1,)](a, b, out, 64, 64, 1, 64, 1, M=16, N=16, BLOCK_K=32, SCALE=1)
        assert torch.equal(out.double(), a.double() @ b.double().T)


def bounds() -> None:
    storage = torch.zeros(200)
    for x, out in ((storage[:100], torch.zeros(128)), (torch.zeros(128), storage[:100])):
        try:
            sample_kernels.add[(2,)](x, x, out, 101, BLOCK=64)
        except OutOfBounds as error:
            assert "4 bytes at byte 400 of the 400 of" in str(error)
        else:
            raise AssertionError("an access out of bounds went unseen")
    assert not storage.any()
    sample_kernels.copy_rows[(3,)](storage.view(20, 10)[:3, :5], storage.view(20, 10)[3:6, :5], 10, 5, 2.0, BLOCK=8)


def autotuning() -> None:
    tuned = triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["num_elements"])
    x, out = torch.randn(200), torch.zeros(200)
    tuned(sample_kernels.add)[lambda meta: (triton.cdiv(200, meta["BLOCK"]),)](x, x, out, 200)
    assert torch.equal(out, 2 * x)


CHECKS = [conversions, arithmetic, fused_multiply_add, nan_and_reductions, products, bounds, autotuning]

if __name__ == "__main__":
    if "unmended" not in sys.argv:
        gpu_without_gpu.install()
    for check in CHECKS:
        try:
            check()
        except Exception as error:
            print(f"{check.__name__}: {type(error).__name__}: {error}".splitlines()[0])
        else:
            print(f"{check.__name__}: right")
