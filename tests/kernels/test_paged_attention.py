"""paged_attention against float64 over awkward lengths, with poison in everything that must not be read."""

from typing import Any

import pytest
import torch

from octavo.kernels import reference
from octavo.kernels.paged_attention import paged_attention
from octavo.kernels.rotary_kv_write import rotary_kv_write

DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
# (new tokens, context): one, tile and block edges, one before and one past them, chunks behind a context
LENGTHS = [
    (1, 1),
    (1, 16),
    (1, 17),
    (1, 63),
    (1, 64),
    (1, 65),
    (1, 200),
    (5, 5),
    (64, 64),
    (65, 130),
    (33, 161),
    (2, 129),
]


class Case:
    """A batch of sequences on scattered blocks; unwritten slots, foreign blocks and spare table entries are poison."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        generator = torch.Generator().manual_seed(heads * head_size + len(lengths))
        self.heads, self.kv_heads, self.head_size, self.dtype = heads, kv_heads, head_size, dtype
        width = -(-max(context for _, context in lengths) // block_size) + 1
        num_blocks = width * len(lengths) + 3
        self.cache = torch.full((num_blocks, 2, kv_heads, block_size, head_size), float("nan"), dtype=dtype)
        order = torch.randperm(num_blocks - 1, generator=generator) + 1
        self.tables = order[: width * len(lengths)].view(len(lengths), width).int()
        cos_sin = torch.tensor([[1.0] * (head_size // 2) + [0.0] * (head_size // 2)])  # no rotation
        self.rows = []
        for sequence, (new, context) in enumerate(lengths):
            qkv = torch.randn(context, (heads + 2 * kv_heads) * head_size, generator=generator).to(dtype)
            at = torch.arange(context)
            slots = self.tables[sequence, at // block_size].long() * block_size + at % block_size
            rotary_kv_write(qkv, cos_sin, torch.zeros(context, dtype=torch.int32), slots, self.cache, heads)
            self.rows.append(qkv[context - new :])
            self.tables[sequence, -(-context // block_size) :] = 0  # block 0 is nobody's, all NaN
        self.lengths = lengths

    def run(self, which: list[int], window: int = 0) -> torch.Tensor:
        scale = self.head_size**-0.5
        return paged_attention(*self._arguments(which), num_heads=self.heads, scale=scale, window=window)

    def exact(self, which: list[int], window: int = 0) -> torch.Tensor:
        qkv, *rest = self._arguments(which)
        cache, tables, begins, lens = rest
        scale = self.head_size**-0.5
        return reference.paged_attention(
            qkv.double(), cache, tables, begins, lens, self.heads, scale, window, torch.float64
        )

    def _arguments(
        self, which: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        new = torch.tensor([self.lengths[i][0] for i in which])
        return (
            torch.cat([self.rows[i] for i in which]),
            self.cache,
            self.tables[which].contiguous(),
            torch.cat([torch.tensor([0]), new.cumsum(0)]).int(),
            torch.tensor([self.lengths[i][1] for i in which], dtype=torch.int32),
        )


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("window", [0, 1, 40, 64])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size"), [(9, 3, 64), (4, 4, 80), (5, 1, 128), (8, 2, 96), (2, 1, 256), (6, 6, 16)]
)
def test_attention(
    heads: int, kv_heads: int, head_size: int, block_size: int, window: int, dtype: torch.dtype, tolerance: float
) -> None:
    case = Case(LENGTHS, heads, kv_heads, head_size, block_size, dtype)
    everything = list(range(len(LENGTHS)))
    got, want = case.run(everything, window), case.exact(everything, window)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)
    begin = 0
    for i in everything:  # each sequence alone: the very same bits
        new = LENGTHS[i][0]
        assert torch.equal(case.run([i], window), got[begin : begin + new]), LENGTHS[i]
        begin += new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 50])
def test_a_position_has_the_same_bits_in_prefill_chunk_and_decode(window: int, dtype: torch.dtype) -> None:
    whole = Case([(150, 150)], 9, 3, 64, 16, dtype)
    want = whole.run([0], window)
    for new, context in [(1, 1), (1, 64), (1, 65), (1, 150), (7, 70), (64, 128), (22, 150)]:
        part = Case([(150, 150)], 9, 3, 64, 16, dtype)
        part.rows = [part.rows[0][context - new : context]]
        part.lengths = [(new, context)]
        assert torch.equal(part.run([0], window), want[context - new : context]), (new, context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "count"), [(0, 2), (1, 2), (2, 2), (2, 4), (4, 5), (1, 7), (8, 1)])
def test_heads_that_ranks_divide_have_the_bits_of_all(first: int, count: int, dtype: torch.dtype) -> None:
    lengths = [(1, 1), (1, 65), (33, 161), (11, 1100), (1, 1500)]
    whole = Case(lengths, 9, 3, 64, 16, dtype)
    kv_heads = range(first // 3, -(-(first + count) // 3))
    for which in (list(range(len(lengths))), [2], [4]):
        qkv, cache, tables, begins, lens = whole._arguments(which)
        part = torch.cat([qkv[:, first * 64 : (first + count) * 64], qkv[:, : 2 * len(kv_heads) * 64]], dim=1)
        arguments = (part.contiguous(), cache[:, :, kv_heads].contiguous(), tables, begins, lens, count, 0.125)
        got, want = (
            paged_attention(*arguments, group_size=3, first_head=first % 3),
            whole.run(which).unflatten(1, (9, 64)),
        )
        assert torch.equal(got.unflatten(1, (count, 64)), want[:, first : first + count])
        exact = reference.paged_attention(*arguments, 0, torch.float64, group_size=3, first_head=first % 3)
        torch.testing.assert_close(got.double(), exact.double(), atol=8e-3, rtol=8e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("window", [0, 300, 1500])
def test_long_contexts_in_pieces(window: int, dtype: torch.dtype, tolerance: float) -> None:
    lengths = [(1, 1023), (1, 1024), (1, 1025), (1, 2048), (3, 2049), (40, 2070), (1, 3000)]
    case = Case(lengths, 6, 2, 64, 32, dtype)
    everything = list(range(len(lengths)))
    got, want = case.run(everything, window), case.exact(everything, window)
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)
    begin = 0
    for i, (new, _) in enumerate(lengths):  # alone, its pieces are worked on side by side: the very same bits
        assert torch.equal(case.run([i], window), got[begin : begin + new]), lengths[i]
        begin += new


def test_nothing_finite_comes_of_what_is_not() -> None:
    case = Case([(1, 70), (1, 1100)], 2, 1, 32, 16, torch.bfloat16)
    case.cache[case.tables[0, 2]] = float("nan")
    case.cache[case.tables[1, 3]] = float("inf")
    got = case.run([0, 1])
    assert bool(got.isnan().all(dim=1).all())


def test_large_scores_do_not_overflow() -> None:
    case = Case([(3, 100)], 2, 1, 32, 16, torch.float32)
    case.rows[0] *= 1000
    assert bool(case.run([0]).isfinite().all())
    torch.testing.assert_close(case.run([0]).double(), case.exact([0]).double(), atol=1e-4, rtol=1e-4)


def test_wrong_arguments_are_named() -> None:
    def call(**changes: object) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "qkv": torch.zeros(2, 80),
            "kv_cache": torch.zeros(1, 2, 1, 16, 16),
            "block_tables": torch.zeros(1, 1, dtype=torch.int32),
            "token_begins": torch.tensor([0, 2], dtype=torch.int32),
            "context_lens": torch.tensor([2], dtype=torch.int32),
            "num_heads": 3,
            "scale": 1.0,
        }
        return paged_attention(**{**arguments, **changes})

    assert call().shape == (2, 48)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kv_cache": torch.zeros(1, 2, 1, 8, 16)}, "kv_cache: block size is 8"),
        ({"kv_cache": torch.zeros(1, 2, 1, 16, 24)}, "kv_cache: head size is 24"),
        ({"kv_cache": torch.zeros(1, 2, 2, 16, 16)}, "num_heads: is 3, with 2 KV heads"),
        ({"num_heads": 6}, "num_heads: is 6"),
        ({"group_size": 2}, "num_heads: is 3, with 1 KV heads"),
        ({"num_heads": 1, "group_size": 2, "first_head": 2}, "num_heads: is 1, with 1 KV heads"),
        ({"num_heads": 2, "group_size": 3, "first_head": -1}, "first_head: is -1"),
        ({"context_lens": torch.tensor([2])}, "context_lens: dtype is torch.int64"),
        ({"token_begins": torch.tensor([0], dtype=torch.int32)}, "token_begins: shape"),
        ({"qkv": torch.zeros(2, 80).bfloat16()}, "qkv: dtype is torch.bfloat16"),
        ({"scale": 0.0}, "scale: is 0.0"),
        ({"scale": float("inf")}, "scale: is inf"),
        ({"window": -1}, "window: is -1"),
        ({"soft_cap": float("inf")}, "soft_cap: is inf"),
        ({"soft_cap": float("nan")}, "soft_cap: is nan"),
    ]
    for changes, words in wrong:
        with pytest.raises(ValueError, match=words):
            call(**changes)
