"""rotary_kv_write: queries in place, keys and values in their slots and nowhere else, with the native op's bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo.kernels import backend, reference
from octavo.kernels.cpu.library import library
from octavo.kernels.gpu import rotary_kv_write as gpu
from octavo.kernels.gpu.device import has_float8
from octavo.kernels.rotary_kv_write import rotary_kv_write

BF16, F16, F32, INT8, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
TOLERANCE = {F32: 1e-6, BF16: 8e-3, F16: 1e-3}
NUM_BLOCKS = 5


class Case:
    """Random rows for slots in any order, the cache holds 7 wherever nothing may be written."""

    def __init__(
        self,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        rotary_size: int,
        block_size: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> None:
        generator = torch.Generator().manual_seed(tokens + heads)
        self.heads = heads
        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_size, generator=generator).to(dtype)
        angles = torch.rand(100, rotary_size // 2, generator=generator) * 6
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        self.positions = torch.randint(0, 100, (tokens,), dtype=torch.int32, generator=generator)
        self.positions[0] = 99  # behind whose sines there is nothing
        later = torch.randperm(NUM_BLOCKS * block_size - 1, generator=generator) + 1
        self.slots = torch.cat([torch.tensor([0]), later])[:tokens]
        shape = (NUM_BLOCKS, 2, kv_heads, block_size, head_size)
        self.cache = torch.full(shape, 7.0).to(cache_dtype)
        self.scales = torch.full(shape[:-1], 7.0) if cache_dtype in reference.QUANTISED_MAX else None

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The rows, the cache and its scales after the op."""
        device = backend.device()
        qkv, cache = self.qkv.to(device, copy=True), self.cache.to(device, copy=True)
        scales = None if self.scales is None else self.scales.to(device, copy=True)
        cos_sin, positions, slots = (x.to(device) for x in (self.cos_sin, self.positions, self.slots))
        rotary_kv_write(qkv, cos_sin, positions, slots, cache, self.heads, scales)
        return qkv.cpu(), cache.cpu(), None if scales is None else scales.cpu()

    def check(self) -> None:
        """Rows against float64; cache and scales are, bit for bit, what the rotated rows ask for."""
        qkv, cache, scales = self.run()
        _, _, kv_heads, _, head_size = cache.shape
        split = self.heads + kv_heads
        rows = self.qkv.double().unflatten(1, (-1, head_size))
        want = torch.cat([reference.rotary(rows[:, :split], self.cos_sin.double(), self.positions), rows[:, split:]], 1)
        want = torch.where(self.slots[:, None, None] < 0, rows, want).flatten(1)
        tolerance = TOLERANCE[qkv.dtype]
        torch.testing.assert_close(qkv.double(), want, atol=tolerance, rtol=tolerance)
        identity = torch.zeros_like(self.cos_sin)
        identity[:, : identity.shape[1] // 2] = 1.0
        want_cache, want_scales = self.cache.clone(), None if self.scales is None else self.scales.clone()
        reference.rotary_kv_write(
            qkv.clone(), identity, self.positions, self.slots, want_cache, self.heads, want_scales
        )
        assert torch.equal(cache.view(torch.uint8), want_cache.view(torch.uint8))
        assert scales is None or (want_scales is not None and torch.equal(scales, want_scales))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "rotary_size", "block_size", "dtype", "cache_dtype"),
    [
        (9, 3, 64, 64, 16, BF16, BF16),
        (4, 4, 80, 32, 64, F16, F16),
        (6, 1, 16, 16, 32, F32, F32),
        (3, 2, 80, 80, 16, BF16, BF16),
        (3, 1, 96, 40, 16, F16, INT8),
        (40, 8, 128, 128, 32, BF16, INT8),
        (9, 3, 64, 64, 16, F16, FP8),
        (4, 2, 256, 64, 16, BF16, FP8),
    ],
)
def test_rotate_and_write(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    rotary_size: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> None:
    if cache_dtype == FP8 and not has_float8(backend.device()):
        pytest.skip("the chip has no float8")
    case = Case(tokens, heads, kv_heads, head_size, rotary_size, block_size, dtype, cache_dtype)
    case.check()
    case.slots[tokens // 2 :: 4] = -1  # padding, left alone
    case.check()


@pytest.mark.skipif(library() is None, reason="no native kernels are built")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("head_size", "rotary_size"), [(64, 64), (80, 40)])
def test_rotated_rows_have_the_native_kernels_bits(head_size: int, rotary_size: int, dtype: torch.dtype) -> None:
    case = Case(3, 5, 1, head_size, rotary_size, 16, dtype, dtype)
    got, _, _ = case.run()
    selected, device = backend.kernels(), backend.device()
    backend.select("native")
    try:
        want, _, _ = case.run()
    finally:
        backend.select(selected, device)
    assert torch.equal(got, want)


def test_scales_of_rows_that_are_zero_tiny_or_not_finite() -> None:
    case = Case(7, 1, 1, 16, 16, 16, BF16, INT8)
    case.positions[:] = 0
    case.cos_sin[0, :8], case.cos_sin[0, 8:] = 1.0, 0.0  # no rotation
    rows = case.qkv.view(7, 3, 16)
    rows[0] = 0.0
    rows[1] = 2.0**-133  # the least number there is, whose scale float32 holds with a few bits
    rows[2, :, 3] = float("nan")
    rows[3] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5] * 2)  # scale 1: halves go to even
    rows[4, :, :] = -3.0
    rows[5, 2, 3], rows[5, 2, 11] = float("inf"), float("-inf")  # a value's, which is not rotated
    _, cache, scales = case.run()
    assert scales is not None
    blocks, offsets = case.slots // 16, case.slots % 16
    stored = cache[blocks, 0, 0, offsets]
    scale = scales[blocks, 0, 0, offsets]
    assert scale[0] == 0 and not stored[0].any()
    assert scale[1] > 0 and (stored[1] == 127).all()
    assert scale[2].isnan()  # what is not a number stays so
    assert scale[3] == 1.0 and stored[3].tolist() == [127, 0, 2, 2, 0, -2, -2, 126] * 2
    assert scale[4] == torch.tensor(3.0) / 127 and (stored[4] == -127).all()
    assert scales[blocks, 1, 0, offsets][5] == torch.inf
    want, want_scales = reference.quantise(rows[:, 2], INT8)
    assert torch.equal(cache[blocks, 1, 0, offsets], want)
    assert torch.equal(scales[blocks, 1, 0, offsets].nan_to_num(-1), want_scales.nan_to_num(-1))


def test_a_row_of_zeros_in_float8() -> None:
    if not has_float8(backend.device()):
        pytest.skip("the chip has no float8")
    case = Case(1, 9, 3, 64, 64, 16, F16, FP8)
    case.qkv[0] = 0.0
    _, cache, scales = case.run()
    assert scales is not None and not cache[0, :, :, 0].float().any() and not scales[0, :, :, 0].any()


@pytest.mark.parametrize("rotary_size", [40, 96])
def test_scales_are_of_what_there_is(rotary_size: int) -> None:
    """Small numbers, beside columns of a tile that no head has."""
    case = Case(3, 2, 1, 96, rotary_size, 16, BF16, INT8)
    case.qkv *= 1e-3
    case.check()


def test_rows_far_apart(far_apart: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case = Case(3, 2, 1, 32, 32, 16, BF16, BF16)
    want, want_cache, _ = case.run()
    qkv, cache = far_apart(case.qkv), case.cache.to(backend.device())
    cos_sin, positions, slots = (x.to(backend.device()) for x in (case.cos_sin, case.positions, case.slots))
    gpu.launch(qkv, cos_sin, positions, slots, cache, case.heads, None)
    assert torch.equal(qkv.cpu(), want) and torch.equal(cache.cpu(), want_cache)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes more memory than a GPU may have")
def test_positions_whose_angles_lie_past_2_to_the_31() -> None:
    case = Case(3, 2, 1, 256, 256, 16, BF16, BF16)
    want, want_cache, _ = case.run()
    first = 2**31 // 256
    table = torch.empty(first + len(case.cos_sin), 256)  # most of it is never touched
    table[first:], case.cos_sin = case.cos_sin, table
    case.positions += first
    got, cache, _ = case.run()
    assert torch.equal(got, want) and torch.equal(cache, want_cache)


def test_wrong_arguments_are_named() -> None:
    device = backend.device()
    qkv, table = torch.zeros(2, 5 * 16, device=device), torch.zeros(8, 16, device=device)
    positions = torch.zeros(2, dtype=torch.int32, device=device)
    slots = torch.zeros(2, dtype=torch.int64, device=device)
    cache = torch.zeros(1, 2, 1, 16, 16, device=device)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((qkv, table, positions, slots, cache, 3, torch.zeros(1, 2, 1, 16, device=device)), "kv_scales: given"),
        ((qkv, table, positions, slots, cache.to(INT8), 3), "kv_scales: missing"),
        ((qkv, table, positions, slots, cache.double(), 3), "kv_cache: dtype is torch.float64"),
        ((qkv.half(), table, positions, slots, cache, 3), "qkv: dtype is torch.float16"),
        (
            (qkv, table, positions, slots, cache.to(INT8), 3, torch.zeros(1, 2, 1, 16, device=device)),
            "qkv: dtype is torch.float32, expected torch.bfloat16 or torch.float16",
        ),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            rotary_kv_write(*arguments)
