"""Compressed weights: nothing of them is lost, so products and rows have the bits that those of plain weights have."""

import pytest
import torch
from instruction_sets import OTHERS, run_tests
from torch import Tensor

from octavo.kernels.backend import kernels
from octavo.kernels.embedding import embedding
from octavo.kernels.matmul import SAMPLE_SIZE, PackedWeight, compress, empty_packed, gated_matmul, matmul

pytestmark = pytest.mark.skipif(kernels() != "native", reason="no native kernels")
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 17, 24, 25, 33, 64, 66, 67, 100, 140)  # of every kind of tile


def packed(weight: Tensor, num_parts: int = 1) -> PackedWeight:
    result = empty_packed(weight.shape[0], weight.shape[1], torch.bfloat16, num_parts)
    for i, part in enumerate(weight.chunk(num_parts)):
        result.write_rows(i * len(part), part)
    return result


def compressed(weight: Tensor, num_parts: int = 1) -> PackedWeight:
    result = packed(weight, num_parts)
    assert compress([result]) > 0
    return result


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def numbers(n: int, k: int) -> Tensor:
    """Like trained weights, which have a few tiny ones, and more of these than chance would have it."""
    torch.manual_seed(n + k)
    weight = 0.02 * torch.randn(n, k) * (1 + torch.rand(n, 1))
    tiny = torch.rand(n, k) < 1e-3
    return torch.where(tiny, weight * 1e-9, weight).bfloat16()


@pytest.mark.parametrize(
    ("n", "k"), [(16, 64), (1, 256), (17, 136), (45, 264), (64, 576), (100, 1032), (80, 1536), (33, 2048)]
)
def test_products_have_the_same_bits(n: int, k: int) -> None:
    weight = numbers(n, k)
    plain, small = packed(weight), compressed(weight)
    x, bias, residual = torch.randn(ROWS[-1], k).bfloat16(), torch.randn(n), torch.randn(ROWS[-1], n).bfloat16()
    for m in ROWS:
        assert torch.equal(matmul(x[:m], small), matmul(x[:m], plain)), m
        want = matmul(x[:m], plain, bias, residual[:m])
        assert torch.equal(matmul(x[:m], small, bias, residual[:m]), want), m
        want = matmul(x[:m], plain, out_dtype=torch.float32)
        assert torch.equal(matmul(x[:m], small, out_dtype=torch.float32), want), m
    wide = torch.randn(9, 2 * k).bfloat16()
    assert torch.equal(matmul(wide[:, k:], small), matmul(wide[:, k:], plain))


@pytest.mark.parametrize(("n", "k"), [(32, 64), (96, 576), (160, 264)])
def test_gated_products_have_the_same_bits(n: int, k: int) -> None:
    weight = numbers(n, k)
    plain, small = packed(weight, 2), compressed(weight, 2)
    x, bias = torch.randn(ROWS[-1], k).bfloat16(), torch.randn(n)
    for m in ROWS:
        assert torch.equal(gated_matmul(x[:m], small), gated_matmul(x[:m], plain)), m
        assert torch.equal(gated_matmul(x[:m], small, bias), gated_matmul(x[:m], plain, bias)), m


def test_rows_are_what_was_written() -> None:
    weight = numbers(45, 520)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3e38, 1.0]).bfloat16()
    for i, value in enumerate(special):
        weight[5 * i, 57 * i] = value
    bits(weight)[44, 519] = 0x7FC1  # a NaN with something in it
    small = compressed(weight)
    ids = torch.cat([torch.arange(45), torch.tensor([44, -1, 45, 0])]).int()
    want = torch.cat([weight, weight[44:], torch.zeros(2, 520, dtype=torch.bfloat16), weight[:1]])
    assert torch.equal(bits(embedding(ids, small)), bits(want))
    assert torch.equal(bits(embedding(ids + 7, small, first_id=7)), bits(want))


@pytest.mark.parametrize(("num_exceptions", "fits"), [(0, True), (1, True), (64, True), (65, False)])
def test_exceptions_of_one_panel(num_exceptions: int, fits: bool) -> None:
    """At most k / 2; lists are as long as the longest."""
    weight = with_exceptions(160, 128, num_exceptions, rows=slice(16, 32))
    small = packed(weight)
    assert compress([small]) == (160 * 128 // 2 - 16 - 4 * 10 * num_exceptions if fits else 0)
    assert (small.table is not None) == fits
    assert torch.equal(embedding(torch.arange(160, dtype=torch.int32), small), weight)
    x = torch.randn(9, 128).bfloat16()
    assert torch.equal(matmul(x, small), matmul(x, packed(weight)))


@pytest.mark.parametrize(("num_exceptions", "fits"), [(24, True), (25, False)])
def test_exceptions_of_all_panels(num_exceptions: int, fits: bool) -> None:
    """At most k / 16 on average."""
    weight = with_exceptions(48, 128, num_exceptions, rows=slice(0, 48))
    small = packed(weight)
    assert (compress([small]) > 0) == (small.table is not None) == fits
    assert torch.equal(embedding(torch.arange(48, dtype=torch.int32), small), weight)


def with_exceptions(n: int, k: int, num_exceptions: int, rows: slice) -> Tensor:
    """As many, spread over the rows; the others have as many high bytes as the table has entries."""
    weight = (torch.tensor(4.0) ** -torch.arange(16)).repeat(n * k // 16).view(n, k).bfloat16()
    some = weight[rows]
    at = torch.arange(num_exceptions) * (some.numel() // max(num_exceptions, 1))
    some.view(-1)[at] = (1e30 * (1 + torch.arange(num_exceptions))).bfloat16()
    return weight


@pytest.mark.parametrize("n", [1, 17, 40])
def test_rows_past_n_cost_no_exceptions(n: int) -> None:
    """They are zeros, which the weight itself has none of: 16 high bytes are taken by others."""
    torch.manual_seed(n)
    weight = (1.5 * torch.tensor(4.0) ** torch.randint(-16, 0, (n, 512))).bfloat16()
    small, x = compressed(weight), torch.randn(9, 512).bfloat16()
    assert torch.equal(embedding(torch.arange(n, dtype=torch.int32), small), weight)
    assert torch.equal(matmul(x, small), matmul(x, packed(weight)))


def test_all_rows_count_for_the_table() -> None:
    """Also where a weight is so large that one number in a power of two is looked at."""
    torch.manual_seed(0)
    n, k = 16, 2 * SAMPLE_SIZE
    weight = (1.5 * torch.tensor(4.0) ** torch.randint(-14, 0, (n, k))).bfloat16()
    weight[1::2] = 1e30
    assert torch.equal(embedding(torch.arange(n, dtype=torch.int32), compressed(weight)), weight)


def test_weights_are_compressed_once() -> None:
    weight = compressed(numbers(16, 64))
    assert compress([weight]) == 0


def test_what_cannot_be_compressed_stays_as_it_is() -> None:
    torch.manual_seed(0)
    odd, wide, wild = numbers(32, 68), torch.randn(32, 64), torch.randint(-(1 << 15), 1 << 15, (32, 64))
    weights = [packed(odd), empty_packed(32, 64, torch.float32), packed(wild.short().view(torch.bfloat16))]
    weights.append(empty_packed(0, 64, torch.bfloat16))
    weights[1].write_rows(0, wide)
    good = packed(numbers(32, 64))
    before = [weight.data.clone() for weight in weights]
    assert compress([*weights, good]) > 0 and good.table is not None
    for weight, data in zip(weights, before, strict=True):
        assert weight.table is None and torch.equal(weight.data.view(torch.uint8), data.view(torch.uint8))


def test_nothing_is_written_to_a_compressed_weight() -> None:
    weight = compressed(numbers(16, 64))
    with pytest.raises(ValueError, match="weight: is compressed"):
        weight.write_rows(0, torch.zeros(1, 64))


@pytest.mark.parametrize("name", OTHERS)
def test_other_instruction_sets(name: str) -> None:
    run_tests(name, __file__, "not instruction_sets")
