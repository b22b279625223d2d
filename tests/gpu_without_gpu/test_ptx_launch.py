"""Ordinary launches of small Triton kernels, through the compiler and the execution of its PTX."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import gpu_without_gpu
from gpu_without_gpu import compile_only, matrix, sample_kernels
from gpu_without_gpu.errors import Misaligned, OutOfBounds, StepLimit, Trap, Unsupported
from gpu_without_gpu.formats import Array


@pytest.fixture(autouse=True, params=[80, 90])
def arch(request: pytest.FixtureRequest) -> Iterator[int]:
    gpu_without_gpu.install(request.param)
    yield request.param
    gpu_without_gpu.install()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64])
@pytest.mark.parametrize("num_elements", [1, 64, 65, 200])
def test_addition(dtype: torch.dtype, num_elements: int) -> None:
    x, y = ((torch.randn(num_elements) * 9).to(dtype) for _ in range(2))
    out = torch.full_like(x, 77)
    sample_kernels.add[(triton.cdiv(num_elements, 64),)](x, y, out, num_elements, BLOCK=64, num_warps=1)
    assert torch.equal(out, x + y)


def test_out_of_bounds() -> None:
    x, out = torch.zeros(64), torch.zeros(128)
    with pytest.raises(OutOfBounds, match=r"4 bytes at byte 256 of the 256 of x_ptr\n  in add, sample_kernels.py:\d+"):
        sample_kernels.add[(2,)](x, x.clone(), out, 65, BLOCK=64, num_warps=1)
    with pytest.raises(OutOfBounds, match="of out_ptr"):
        sample_kernels.add[(2,)](out, out, torch.zeros(64), 65, BLOCK=64, num_warps=1)
    with pytest.raises(OutOfBounds):  # nothing to read at all
        sample_kernels.add[(1,)](torch.zeros(0), out, out, 1, BLOCK=64, num_warps=1)
    sample_kernels.add[(1,)](torch.zeros(0), torch.zeros(0), out, 0, BLOCK=64, num_warps=1)


def test_a_view_ends_where_its_last_element_does() -> None:
    storage = torch.zeros(300)
    view = storage[10:110:2]  # 50 elements over 99
    with pytest.raises(OutOfBounds, match="byte 396 of the 396"):
        sample_kernels.add[(1,)](view, torch.zeros(128), torch.zeros(128), 100, BLOCK=128, num_warps=1)


def test_strided_views_are_written_in_place() -> None:
    """And several of one storage share memory: out and x overlap here."""
    storage = torch.arange(60, dtype=torch.float32)
    grid = storage.view(6, 10)
    expected = storage.clone().view(6, 10)
    expected[2:5, 1:6] = expected[1:4, 1:6].clone() * 3
    x, out = grid[1:4, 1:6].clone(memory_format=torch.preserve_format), grid[2:5, 1:6]
    padded = torch.zeros(3, 10)
    padded[:, :5] = x
    sample_kernels.copy_rows[(3,)](padded, out, 10, 5, 3.0, BLOCK=8, num_warps=1)
    assert torch.equal(grid, expected)
    sample_kernels.copy_rows[(6,)](grid, grid, 10, 10, 2.0, BLOCK=16, num_warps=1)
    assert torch.equal(grid, expected * 2)


@pytest.mark.parametrize(
    ("origin", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float8_e5m2),
        (torch.float32, torch.float8_e4m3fn),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.bfloat16),
        (torch.float32, torch.int32),
        (torch.int32, torch.float32),
        (torch.int8, torch.bfloat16),
        (torch.uint8, torch.float16),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_conversions_equal_torch(arch: int, origin: torch.dtype, target: torch.dtype) -> None:
    if arch == 80 and (torch.float8_e4m3fn in (origin, target) or target == torch.float8_e5m2):
        pytest.skip("for sm_80 the compiler has no e4m3, and its own conversion to e5m2 rounds ties away from zero")
    bits = torch.randint(0, 256, (4096 * origin.itemsize,), dtype=torch.uint8)
    x = (bits % 2).bool() if origin == torch.bool else bits.view(origin)
    if origin == torch.float8_e5m2:
        x = x.float().nan_to_num(1, 1, 1).to(origin)  # the compiler's own conversion takes infinity for a number
    elif target == torch.int32:
        x = (x.nan_to_num(0, 0, 0)).clamp(-2e9, 2e9)
    elif target.itemsize == 1:  # saturation and ties, not noise over all exponents
        x = torch.cat([torch.randn(2048).to(origin) * 100, torch.arange(-1024, 1024).to(origin) / 128])
    out = torch.zeros(4096, dtype=target)
    sample_kernels.convert[(4,)](x, out, BLOCK=1024)
    expected = x.to(target)
    if target.itemsize == 1 and target.is_floating_point:
        largest = torch.finfo(target).max
        expected = x.float().clamp(-largest, largest).to(target)
    same = out.view(torch.uint8).view(4096, -1) == expected.view(torch.uint8).view(4096, -1)
    both_nan = out.float().isnan() & expected.float().isnan()
    assert (same.all(1) | both_nan).all()


def test_fused_multiply_add_rounds_once() -> None:
    """Against integer arithmetic of arbitrary size; half of the cases lie next to the middle of two floats."""
    generator = np.random.default_rng(0)
    mantissas = generator.integers(1 << 23, 1 << 24, (2, 512)).astype(object)
    mantissas[0, :256] |= 1  # odd, so that a product has many bits
    x, y = (np.array([float(m) for m in row], np.float32) * np.float32(2.0**-23) for row in mantissas)
    product = [int(a) * int(b) for a, b in zip(*mantissas, strict=True)]  # in units of 2**-46
    z_exact = [(1 << 70) + (1 << 46) if i % 2 else -(p // (1 << 24)) * (1 << 24) for i, p in enumerate(product)]
    z = np.array([float(v) * 2.0**-46 for v in z_exact], np.float32)
    z_exact = [int(float(v) * 2.0**46) for v in z]
    expected = [_nearest_float32(p + v) for p, v in zip(product, z_exact, strict=True)]
    out = torch.zeros(512)
    tensors = [torch.from_numpy(v) for v in (x, y, z)]
    sample_kernels.fused[(4,)](*tensors, out, BLOCK=128)
    assert out.tolist() == expected
    assert out.tolist() != (tensors[0] * tensors[1] + tensors[2]).tolist()


def _nearest_float32(units: int) -> float:
    """An exact number of 2**-46, to nearest even."""
    extra = max(0, abs(units).bit_length() - 24)
    whole, rest = divmod(abs(units), 1 << extra)
    half = (1 << extra) // 2
    whole += rest > half or (rest == half and extra > 0 and whole % 2 == 1)
    return float((whole << extra) * (1 if units > 0 else -1)) * 2.0**-46


def test_minima_and_maxima_of_nan_and_zeros() -> None:
    nan = float("nan")
    x = torch.tensor([nan, 1.0, nan, -0.0, 0.0, 3.0, -7.0, 2.0] * 4)
    y = torch.tensor([2.0, nan, nan, 0.0, -0.0, 1.0, -8.0, 2.0] * 4)
    out = torch.zeros(5, 32)
    sample_kernels.extremes[(1,)](x, y, out, BLOCK=32, num_warps=1)
    largest = torch.tensor([2.0, 1.0, nan, 0.0, 0.0, 3.0, -7.0, 2.0] * 4)
    smallest = torch.tensor([2.0, 1.0, nan, -0.0, -0.0, 1.0, -8.0, 2.0] * 4)
    assert torch.equal(out[:2].nan_to_num(9).sign(), torch.stack([largest, smallest]).nan_to_num(9).sign())
    torch.testing.assert_close(out[:2], torch.stack([largest, smallest]), rtol=0, atol=0, equal_nan=True)
    assert not out[0, 3:5].signbit().any() and out[1, 3:5].signbit().all()
    assert out[2:4, 0].tolist() == [3.0, -7.0] and out[4, 0].isnan()


def test_functions() -> None:
    x = torch.rand(256) * 6 + 0.01
    out = torch.zeros(7, 256)
    sample_kernels.functions[(1,)](x, out, BLOCK=256)
    wide = x.double()
    exact = [wide.exp2(), wide.log2(), wide.rsqrt(), wide.sqrt(), 1 / wide, wide.exp(), wide.log()]
    torch.testing.assert_close(out.double(), torch.stack(exact), rtol=1e-6, atol=3e-7)
    assert torch.equal(out[3], wide.sqrt().float()) and torch.equal(out[4], 1 / x)  # rounded correctly


MATMULS = [  # M, N, BLOCK_K, warps
    (16, 16, 32, 1),
    (16, 64, 32, 4),
    (64, 64, 64, 4),
    (128, 32, 32, 8),
]


@pytest.mark.parametrize(("m", "n", "block_k", "warps"), MATMULS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "float8_e5m2", "float8_e4m3fn"])
def test_matrix_products(arch: int, m: int, n: int, block_k: int, warps: int, dtype: str) -> None:
    kind = getattr(torch, dtype)
    if (arch == 80 and dtype.startswith("float8")) or (dtype != "bfloat16" and (m, n) in [(16, 64), (128, 32)]):
        pytest.skip("left to the slow sweep, or no e4m3 on sm_80")
    _check_matmul(m, n, block_k, warps, kind, transposed=(False, False), scale=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("m", "n", "block_k", "warps"), [(16, 64, 32, 4), (64, 16, 32, 4), (128, 256, 32, 4), (128, 128, 64, 8)]
)
@pytest.mark.parametrize(
    ("dtype", "transposed", "scale"),
    [("bfloat16", (a, b), scale) for a in (False, True) for b in (False, True) for scale in (1, 2)]
    + [(dtype, (False, True), 1) for dtype in ("float16", "float32", "int8", "float8_e5m2", "float8_e4m3fn")],
)
def test_matrix_products_in_all_layouts(
    arch: int, m: int, n: int, block_k: int, warps: int, dtype: str, transposed: tuple[bool, bool], scale: int
) -> None:
    if arch == 80 and dtype.startswith("float8"):
        pytest.skip("no e4m3 on sm_80")
    _check_matmul(m, n, block_k, warps, getattr(torch, dtype), transposed, scale)


def _check_matmul(
    m: int, n: int, block_k: int, warps: int, dtype: torch.dtype, transposed: tuple[bool, bool], scale: int
) -> None:
    k = 128
    a, b = (((torch.randn(rows, k) * 4).round() / 4 * (20 if dtype == torch.int8 else 1)).to(dtype) for rows in (m, n))
    a, b = (x.T.contiguous().T if t else x for x, t in zip((a, b), transposed, strict=True))
    out = torch.zeros(m, n, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    kernel = sample_kernels.matmul[(1,)](
        a, b, out, k, *a.stride(), *b.stride(), M=m, N=n, BLOCK_K=block_k, SCALE=scale, num_warps=warps
    )
    assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (m >= 64 and ".target sm_90" in kernel.asm["ptx"])
    # quarters have few bits: every product and sum is exact, in any order
    assert torch.equal(out.double(), scale * (a.double() @ b.double().T))


def test_a_row_of_a_product_depends_on_no_other() -> None:
    a, b = torch.randn(64, 256).bfloat16() * 100, torch.randn(64, 256).bfloat16()
    full, part = torch.zeros(64, 64), torch.zeros(16, 64)
    options = {"N": 64, "BLOCK_K": 64, "SCALE": 1}
    sample_kernels.matmul[(1,)](a, b, full, 256, *a.stride(), *b.stride(), M=64, **options)
    for rows in ([3] * 16, list(range(40, 56))[::-1]):
        few = a[rows].contiguous()
        sample_kernels.matmul[(1,)](few, b, part, 256, *few.stride(), *b.stride(), M=16, **options)
        assert torch.equal(part, full[rows])


def test_operands_of_several_products_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    raw, decode = matrix.ELEMENTS["bf16"]

    def counted(elements: Array) -> Array:
        decoded.append(elements.size)
        return decode(elements)

    monkeypatch.setitem(matrix.ELEMENTS, "bf16", (raw, counted))
    _check_matmul(16, 32, 32, 1, torch.bfloat16, (False, False), 1)
    assert len(decoded) == 8 * (1 + 4)  # of each 16 values of k one block of 16 rows, and 4 of 8 columns


def test_programs_diverge_and_leave_early() -> None:
    lengths = torch.tensor([0, 300, 1, 64, 65, 0, 128], dtype=torch.int32)
    x, out = torch.randn(7, 300), torch.full((7,), 5.0)
    sample_kernels.sum_loop[(7,)](x, lengths, out, 300, BLOCK=64)
    expected = torch.tensor([float(x[i, :n].sum()) if n else 5.0 for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(out, expected)


def test_atomics() -> None:
    counter, largest = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out, total = torch.full((5, 128), -1, dtype=torch.int32), torch.zeros(4)
    sample_kernels.tickets[(5,)](counter, out, total, largest, BLOCK=128)
    assert (counter.item(), largest.item()) == (5, 4) and total.tolist() == [160.0] * 4
    assert torch.equal(out.sort(0).values, torch.arange(128).int() + torch.arange(5).int()[:, None])


def test_sorting_and_scanning() -> None:
    x = torch.randn(256)
    ordered, sums, best = torch.zeros(256), torch.zeros(256), torch.zeros(1, dtype=torch.int32)
    sample_kernels.sort_and_scan[(1,)](x, ordered, sums, best, BLOCK=256)
    assert torch.equal(ordered, x.sort(descending=True).values) and best.item() == x.argmax()
    torch.testing.assert_close(sums, x.cumsum(0))


def test_noise() -> None:
    out = torch.zeros(1024)
    sample_kernels.noise[(1,)](out, 7, BLOCK=1024)
    assert 0 <= out.min() < 0.01 and 0.99 < out.max() < 1 and abs(out.mean() - 0.5) < 0.03


def test_autotuning_launches_every_configuration() -> None:
    configurations = [triton.Config({"BLOCK": 64}, num_warps=1), triton.Config({"BLOCK": 128}, num_warps=4)]
    tuned = triton.autotune(configurations, key=["num_elements"])(sample_kernels.add)
    x, out = torch.randn(200), torch.zeros(200)
    tuned[lambda meta: (triton.cdiv(200, meta["BLOCK"]),)](x, x, out, 200)
    assert torch.equal(out, 2 * x) and tuned.best_config in configurations


def test_assertions_in_a_kernel() -> None:
    x = torch.tensor([3], dtype=torch.int32)
    sample_kernels.checked[(1,)](x, 4, debug=True)
    assert x.item() == 4
    with pytest.raises(Trap):
        sample_kernels.checked[(1,)](x, 4, debug=True)


def test_a_host_tensor_descriptor(arch: int) -> None:
    x, out = torch.randn(12, 32), torch.full((16, 32), -1.0)
    descriptor = TensorDescriptor.from_tensor(x, [16, 32])
    if arch == 80:
        sample_kernels.descriptor_copy[(1,)](descriptor, out, ROWS=16, COLUMNS=32)
        assert torch.equal(out[:12], x) and not out[12:].any()
    else:
        with pytest.raises(Unsupported, match="tensor memory accelerator"):
            sample_kernels.descriptor_copy[(1,)](descriptor, out, ROWS=16, COLUMNS=32)


def test_what_is_not_executed_is_refused() -> None:
    with pytest.raises(Unsupported, match="globaltimer"):
        sample_kernels.clock[(1,)](torch.zeros(1, dtype=torch.int64))


def test_endless_loops_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_without_gpu.machine.MAX_STEPS", 1000)
    with pytest.raises(StepLimit):
        sample_kernels.spin[(1,)](torch.zeros(1, dtype=torch.int32))


def test_misaligned() -> None:
    """Odd addresses, where the compiler has been told of multiples of 16."""
    kernel = compile_only(sample_kernels.add, *[torch.float32] * 3, 128, BLOCK=128, num_warps=1, target="sm_80")
    x = torch.zeros(200)
    assert re.search(r"ld\.global\.v4", kernel.asm["ptx"])
    with pytest.raises(Misaligned):
        gpu_without_gpu.run_ptx(kernel.asm["ptx"], (1, 1, 1), x[1:], x[4:], x[4:], 128, None, None)


@pytest.mark.parametrize(
    ("target", "text"), [("sm_80", "ptx"), ("sm_90", "ptx"), ("sm_100", "ptx"), ("gfx942", "amdgcn")]
)
def test_compile_only(target: str, text: str) -> None:
    before = triton.runtime.driver.active
    kernel = compile_only(sample_kernels.add, *[torch.bfloat16] * 3, 7, BLOCK=256, num_warps=2, target=target)
    assert target in kernel.asm[text] and triton.runtime.driver.active is before
    assert kernel.asm["hsaco" if text == "amdgcn" else "cubin"]


def test_what_was_compiled_before_is_taken_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = torch.ones(64), torch.zeros(64)
    sample_kernels.add[(1,)](x, x, out, 64, BLOCK=64, num_warps=1)
    sample_kernels.add.device_caches.clear()  # as in a new process
    monkeypatch.setattr("triton.backends.nvidia.compiler.CUDABackend.make_cubin", None)
    sample_kernels.add[(1,)](out, x, out, 64, BLOCK=64, num_warps=1)
    assert out.tolist() == [3.0] * 64
