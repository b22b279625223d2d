"""Checksums: the same from every kernel, and another one for any flip of a bit."""

import random

import pytest
import torch

from octavo.kernels import reference
from octavo.kernels.checksum import Rows, checksum


def memory(rows: int, row_bytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8, generator=generator)


def sums_of(parts: list[torch.Tensor]) -> list[int]:
    return checksum(Rows(parts), torch.empty(len(parts[0]), dtype=torch.int64)).tolist()


@pytest.mark.parametrize("row_bytes", [1, 4, 30, 4095, 4096, 4100, 20_000])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_every_kernel_has_the_same_sums(row_bytes: int, num_parts: int) -> None:
    parts = [memory(9, row_bytes, seed) for seed in range(num_parts)]
    index = torch.tensor([8, 0, 3, 3])
    for wanted in (None, index):
        rows = 9 if wanted is None else 4
        found = checksum(Rows(parts), torch.empty(rows, dtype=torch.int64), wanted)
        assert torch.equal(found, reference.checksum(parts, wanted, False))
        together = checksum(Rows(parts), torch.empty((), dtype=torch.int64), wanted)
        assert torch.equal(together, reference.checksum(parts, wanted, True))


def test_sums_are_of_the_bits_in_order() -> None:
    a, b = memory(2, 5000), memory(2, 5000, 1)
    assert sums_of([a, b])[0] == sums_of([a[:1], b[:1]])[0]
    assert len({*sums_of([a]), *sums_of([b]), *sums_of([a, b]), *sums_of([b, a])}) == 8
    assert sums_of([torch.zeros((1, 8))]) != sums_of([-torch.zeros((1, 8))])
    one = [checksum(Rows([x]), torch.empty((), dtype=torch.int64)).item() for x in (a, a.flip(0))]
    assert one[0] != one[1]


@pytest.mark.parametrize("num_flips", [1, 2, 3])
def test_flips_are_seen(num_flips: int) -> None:
    rng = random.Random(num_flips)
    data = memory(1, 10_000)
    before = sums_of([data])
    for _ in range(300):
        bits = rng.sample(range(80_000), num_flips)
        for bit in bits:
            data[0, bit // 8] ^= 1 << bit % 8
        assert sums_of([data]) != before
        for bit in bits:
            data[0, bit // 8] ^= 1 << bit % 8
    assert sums_of([data]) == before


def test_two_flips_within_a_stripe_cannot_cancel() -> None:
    """+-2^a times one odd factor, +-2^b times another, below 2^64 together: equal only if the factors are."""
    factors = reference.checksum_factors()
    assert len(factors.unique()) == len(factors) == 1024
    assert (factors % 2 == 1).all() and int(factors.max()) < 1 << 32


def test_wrong_arguments_are_named() -> None:
    data = memory(4, 64)
    with pytest.raises(ValueError, match="out: shape"):
        checksum(Rows([data]), torch.empty(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="parts: strides"):
        Rows([data[:, :32], data[:, 32:].contiguous()])
    with pytest.raises(ValueError, match="index: dtype"):
        checksum(Rows([data]), torch.empty(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))
