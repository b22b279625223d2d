"""paged_attention against float64 over awkward lengths, with poison in everything that must not be read."""

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from octavo.kernels import backend, reference
from octavo.kernels.gpu import paged_attention as gpu
from octavo.kernels.gpu.device import has_float8
from octavo.kernels.paged_attention import paged_attention

BF16, F16, F32, INT8, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
TOLERANCE = {F32: 1e-5, BF16: 1.6e-2, F16: 2e-3}
PIECE = 128  # in these tests, so that short contexts have several
# (new tokens, context): one; one before, at and past edges of blocks, tiles and pieces; chunks behind a context
DECODES = [(1, n) for n in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192, 193, 255, 256, 257, 300)]
CHUNKS = [(2, 2), (5, 5), (16, 128), (17, 129), (3, 130), (33, 161), (64, 64), (65, 257)]


class Case:
    """A batch of sequences on scattered blocks; unwritten slots, foreign blocks, padding and outputs are poison."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: int = 3,
        kv_heads: int = 1,
        head_size: int = 64,
        block_size: int = 16,
        dtype: torch.dtype = BF16,
        cache_dtype: torch.dtype | None = None,
        group: int | None = None,
        first_head: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(heads * head_size + len(lengths))
        self.lengths, self.heads, self.head_size, self.dtype = lengths, heads, head_size, dtype
        self.group, self.first_head = group or heads // kv_heads, first_head
        cache_dtype = cache_dtype or dtype
        width = -(-max(context for _, context in lengths) // block_size)
        num_blocks = width * len(lengths) + 3
        plain = torch.randn((num_blocks, 2, kv_heads, block_size, head_size), generator=generator).to(dtype)
        cache, scales = plain, None
        if cache_dtype in reference.QUANTISED_MAX:
            cache, scales = reference.quantise(plain, cache_dtype)
        order = torch.randperm(num_blocks - 1, generator=generator) + 1
        tables = order[: width * len(lengths)].view(len(lengths), width).int()
        written = torch.zeros((num_blocks, block_size), dtype=torch.bool)
        for sequence, (_, context) in enumerate(lengths):
            at = torch.arange(context)
            written[tables[sequence, at // block_size].long(), at % block_size] = True
            tables[sequence, -(-context // block_size) :] = 0  # block 0 is nobody's, all poison
        poison = ~written[:, None, None, :].expand(cache.shape[:-1])
        cache.view(torch.uint8 if cache_dtype == FP8 else cache_dtype)[poison] = (
            127 if cache_dtype in (INT8, FP8) else float("nan")  # 127 are float8's bits of NaN
        )
        if scales is not None:
            scales[poison] = float("nan")
        self.rows = []
        for new, _ in lengths:
            qkv = torch.full((new, (heads + 2 * kv_heads) * head_size), float("nan")).to(dtype)
            qkv[:, : heads * head_size] = torch.randn(new, heads * head_size, generator=generator).to(dtype)
            self.rows.append(qkv)
        self.cache, self.tables = cache.to(backend.device()), tables
        self.scales = None if scales is None else scales.to(backend.device())
        self.place: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows.to(
            backend.device()
        )  # where rows of queries, keys and values lie, and of block tables

    def run(
        self,
        which: list[int] | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
        splits: int = 1,
        piece: int = PIECE,
        hint: bool = True,
        padding: int = 0,
        scale: float | None = None,
        longest: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention and log-sum-exp of some sequences, with empty ones and rows of padding after them."""
        device = backend.device()
        which = list(range(len(self.lengths))) if which is None else which
        new = torch.tensor([self.lengths[i][0] for i in which] + padding * [0])
        total = int(new.sum())
        width = self.rows[0].shape[1]
        qkv = torch.cat([self.rows[i] for i in which] + [torch.full((padding, width), float("nan")).to(self.dtype)])
        wide = torch.full((len(qkv), width + 16), float("nan")).to(self.dtype)  # rows may be strided
        wide[:, :width] = qkv
        out = torch.full((len(qkv), self.heads * self.head_size), float("nan"), dtype=self.dtype, device=device)
        lse = torch.full((len(qkv), self.heads), float("nan"), device=device)
        nowhere = torch.full((padding, self.tables.shape[1]), -(1 << 20), dtype=torch.int32)
        tables = torch.cat([self.tables[which], nowhere])
        lens = torch.tensor([self.lengths[i][1] for i in which] + padding * [0], dtype=torch.int32)
        gpu.launch(
            out,
            lse,
            self.place(wide)[:, :width],
            self.cache,
            self.scales,
            self.place(tables),
            torch.cat([torch.tensor([0]), new.cumsum(0)]).int().to(device),
            lens.to(device),
            self.heads,
            self.group,
            self.first_head,
            scale or self.head_size**-0.5,
            window,
            soft_cap,
            int(new.max()) if hint else len(qkv),
            longest or (int(lens.max()) if hint else tables.shape[1] * self.cache.shape[3]),
            num_splits=splits,
            piece=piece,
        )
        assert out[total:].isnan().all() and lse[total:].isnan().all()
        return out[:total].cpu(), lse[:total].cpu()

    def exact(
        self, window: int = 0, soft_cap: float = 0.0, scale: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of all sequences in float64."""
        new = torch.tensor([new for new, _ in self.lengths])
        lse = torch.empty((int(new.sum()), self.heads), dtype=torch.float64)
        out = reference.paged_attention(
            torch.cat(self.rows).double(),
            self.cache.cpu(),
            self.tables,
            torch.cat([torch.tensor([0]), new.cumsum(0)]).int(),
            torch.tensor([context for _, context in self.lengths], dtype=torch.int32),
            self.heads,
            scale or self.head_size**-0.5,
            window,
            torch.float64,
            group_size=self.group,
            first_head=self.first_head,
            kv_scales=None if self.scales is None else self.scales.cpu(),
            soft_cap=soft_cap,
            lse=lse,
        )
        return out, lse

    def check(self, **options: Any) -> None:
        """Both agree with float64, and are the same where several programs share the pieces."""
        out, lse = self.run(**options)
        want_out, want_lse = self.exact(
            **{name: options[name] for name in ("window", "soft_cap", "scale") if name in options}
        )
        # With scales, weights are rounded to bfloat16 where they would be to float16.
        tolerance = TOLERANCE[BF16 if self.dtype == F16 and self.scales is not None else self.dtype]
        torch.testing.assert_close(out.double(), want_out, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), want_lse, atol=max(tolerance / 4, 1e-5), rtol=1e-5)
        check_same(self.run(splits=2, **options), (out, lse))

    def check_alone(self, **options: Any) -> None:
        """Each sequence alone has the bits that it has among the others."""
        out, lse = self.run(**options)
        begin = 0
        for i, (new, _) in enumerate(self.lengths):
            check_same(self.run([i], splits=i % 3 + 1, **options), (out[begin : begin + new], lse[begin : begin + new]))
            begin += new


def check_same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    """Every bit; Triton's interpreter leaves the order of a product's sums to numpy, so there it is nearly every."""
    for a, b in zip(got, want, strict=True):
        if triton.knobs.runtime.interpret:
            torch.testing.assert_close(a, b, atol=TOLERANCE[BF16] / 4, rtol=TOLERANCE[BF16] / 4)
        else:
            assert torch.equal(a, b)


def test_lengths_at_every_edge() -> None:
    Case(DECODES, 2, 1, 32, 16).check()
    Case(CHUNKS).check(window=40)


def test_nothing_is_read_behind_the_tables() -> None:
    for context in (112, 128, 144):  # whose last block is full, and the last of the tables
        Case([(1, 40), (1, context)], 2, 1, 80, 16).check()


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 40, 128])
def test_lengths_mixed(window: int) -> None:
    Case(DECODES + CHUNKS).check(window=window)


def test_a_position_has_the_same_bits_in_prefill_chunk_and_decode() -> None:
    whole = Case([(200, 200)])
    for window in (0, 50):
        want = whole.run(window=window)
        lengths = [(1, 1), (1, 64), (5, 65), (7, 70), (64, 128), (1, 129), (40, 200), (1, 200)]
        part = Case([(200, 200)] * len(lengths))
        part.cache, part.lengths = whole.cache, lengths
        part.tables = whole.tables.repeat(len(lengths), 1)
        part.rows = [whole.rows[0][context - new : context] for new, context in lengths]
        for which in ([0, 1, 5, 7], list(range(len(lengths))), [3], [7]):  # decodes, a mixed batch, one alone
            got = part.run(which, window=window, splits=len(which) % 3 + 1)
            check_same(
                got,
                tuple(torch.cat([x[lengths[i][1] - lengths[i][0] : lengths[i][1]] for i in which]) for x in want),
            )


@pytest.mark.parametrize(("heads", "first_head"), [(5, 2), (4, 1), (2, 2)])
def test_groups_that_are_cut(heads: int, first_head: int) -> None:
    case = Case([(1, 1), (1, 129), (20, 200)], heads, -(-(first_head + heads) // 3), group=3, first_head=first_head)
    case.check()
    case.check_alone(window=40)


def test_quantised() -> None:
    case = Case([(1, 1), (1, 129), (20, 200)], 8, 2, 64, 32, BF16, INT8)
    case.check()
    case.check_alone(window=30, soft_cap=5.0)


def test_float32() -> None:
    Case([(1, 1), (1, 64), (1, 129), (9, 90)], 3, 3, 32, 16, F32).check(soft_cap=3.0)


def test_bounds_come_from_shapes_where_nobody_gives_them() -> None:
    case = Case([(1, 40), (3, 70), (1, 1)])
    want = case.run()
    for splits, padding in ((1, 0), (2, 3)):
        got = case.run(hint=False, splits=splits, padding=padding)
        check_same(got, want)
    new, context = (torch.tensor(column, dtype=torch.int32) for column in zip(*case.lengths, strict=True))
    device = backend.device()
    begins = torch.cat([torch.zeros(1, dtype=torch.int32), new.cumsum(0).int()])
    arguments = (case.cache, case.tables.to(device), begins.to(device), context.to(device), case.heads)
    lse = torch.empty_like(want[1]).to(device)
    out = paged_attention(torch.cat(case.rows).to(device), *arguments, case.head_size**-0.5, lse=lse)
    check_same((out.cpu(), lse.cpu()), want)  # one piece, here and there


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_sees_nothing_finite_is_no_number() -> None:
    case = Case([(1, 70), (1, 300)])
    case.cache[case.tables[0, 2].long()] = float("nan")
    case.cache[case.tables[1, 3].long()] = float("inf")
    for splits in (1, 2):
        out, lse = case.run(splits=splits)
        assert out.isnan().all(dim=1).all() and lse.isnan().all()


# heads, KV heads, head size, block size, type, of the cache, window, soft-cap: each pair of values in some row
SWEEP = [
    (3, 3, 16, 16, BF16, BF16, 0, 0.0),
    (9, 3, 16, 32, F16, INT8, 40, 5.0),
    (4, 1, 32, 64, F16, F16, 1, 0.0),
    (7, 1, 32, 32, BF16, FP8, 129, 3.0),
    (9, 3, 64, 16, F16, INT8, 129, 0.0),
    (8, 2, 64, 64, F32, F32, 0, 5.0),
    (7, 7, 64, 32, BF16, FP8, 40, 0.0),
    (14, 2, 80, 16, BF16, INT8, 1, 3.0),
    (6, 2, 80, 64, F16, FP8, 0, 0.0),
    (4, 1, 80, 32, F32, F32, 129, 0.0),
    (3, 1, 96, 32, F16, F16, 40, 3.0),
    (4, 4, 96, 64, BF16, INT8, 129, 5.0),
    (8, 2, 96, 16, BF16, BF16, 0, 0.0),
    (12, 3, 128, 16, BF16, BF16, 129, 3.0),
    (7, 1, 128, 64, F16, INT8, 0, 5.0),
    (3, 1, 128, 32, BF16, FP8, 1, 0.0),
    (40, 1, 128, 32, BF16, INT8, 40, 0.0),
    (4, 1, 256, 16, BF16, FP8, 40, 5.0),
    (6, 2, 256, 64, BF16, BF16, 1, 0.0),
    (7, 1, 256, 32, BF16, INT8, 0, 3.0),
    (5, 5, 256, 64, F32, F32, 40, 3.0),
    (2, 2, 256, 16, F16, F16, 129, 0.0),
    (3, 1, 128, 16, F32, F32, 40, 0.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size", "dtype", "cache_dtype", "window", "soft_cap"), SWEEP
)
def test_sweep(
    heads: int,
    kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    window: int,
    soft_cap: float,
) -> None:
    if cache_dtype == FP8 and not has_float8(backend.device()):
        pytest.skip("the chip has no float8")
    sizes = (heads, kv_heads, head_size, block_size, dtype, cache_dtype)
    Case([(1, 1), (1, 63), (1, 129), (2, 66)], *sizes).check(window=window, soft_cap=soft_cap)
    mixed = Case([(40, 140), (1, 64), (1, 257)], *sizes)
    mixed.check(window=window, soft_cap=soft_cap)
    mixed.check_alone(window=window, soft_cap=soft_cap)


@pytest.mark.slow
def test_pieces_as_they_are_shipped() -> None:
    lengths = [(1, gpu.PIECE - 1), (1, gpu.PIECE), (1, gpu.PIECE + 1), (3, 2 * gpu.PIECE + 1)]
    case = Case(lengths, 2, 1, 64, 32)
    case.check(piece=gpu.PIECE)
    case.check(piece=gpu.PIECE, window=gpu.PIECE + 100)
    case.check_alone(piece=gpu.PIECE)


def test_rows_and_blocks_far_apart(far_apart: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case = Case([(1, 3), (1, 17), (1, 70)], 2, 1, 256, 64)
    want = case.run()
    case.place = far_apart
    num_blocks = 2**31 // case.cache[0].numel()
    far = torch.empty((num_blocks + len(case.cache), *case.cache.shape[1:]), dtype=BF16, device=backend.device())
    far[num_blocks:], case.cache = case.cache, far  # most of it is never touched
    case.tables += num_blocks
    check_same(case.run(), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes more memory than a GPU may have")
def test_slots_past_2_to_the_31() -> None:
    case = Case([(1, 3), (1, 70)], 2, 1, 16, 64, BF16, INT8)
    assert case.scales is not None
    want = case.run()
    num_blocks = 2**31 // case.scales[0].numel()
    case.cache, case.scales = behind(num_blocks, case.cache), behind(num_blocks, case.scales)
    case.tables += num_blocks
    check_same(case.run(), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes more memory than a GPU may have")
def test_partial_results_past_2_to_the_31() -> None:
    case = Case([(1, 17), (1, 129), (1, 3), (1, 200), (1, 300)], 2, 1, 16)
    last_row, pieces = 9, 2**31 // (9 * 16) + 1
    assert last_row * pieces * case.head_size >= 2**31
    check_same(case.run(splits=2, longest=PIECE * pieces), case.run(splits=2))


def behind(num_blocks: int, last: torch.Tensor) -> torch.Tensor:
    """So many blocks that take no memory, then these."""
    size = (num_blocks + len(last)) * last[0].nbytes
    reserved = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    blocks = torch.frombuffer(reserved, dtype=last.dtype).view(-1, *last.shape[1:])
    blocks[num_blocks:] = last
    return blocks


def test_what_lies_before_every_window_is_not_read() -> None:
    case, window = Case([(1, 200), (5, 130)]), 40
    want = case.run(window=window)
    for sequence, (new, context) in enumerate(case.lengths):
        at = torch.arange(context - new - window + 1)
        case.cache[case.tables[sequence, at // 16].long(), :, :, at % 16] = float("nan")
    check_same(case.run(window=window), want)


def test_large_scores_do_not_overflow() -> None:
    Case([(3, 100), (1, 200)], 2, 1, 32, 16, F32).check(scale=300.0)


def test_wrong_arguments_are_named() -> None:
    def call(**changes: object) -> torch.Tensor:
        device = backend.device()
        arguments: dict[str, Any] = {
            "qkv": torch.zeros(2, 80, device=device),
            "kv_cache": torch.zeros(1, 2, 1, 16, 16, device=device),
            "block_tables": torch.zeros(1, 1, dtype=torch.int32, device=device),
            "token_begins": torch.tensor([0, 2], dtype=torch.int32, device=device),
            "context_lens": torch.tensor([2], dtype=torch.int32, device=device),
            "num_heads": 3,
            "scale": 1.0,
        }
        return paged_attention(**{**arguments, **changes})

    device = backend.device()
    quantised = torch.zeros(1, 2, 1, 16, 16, dtype=INT8, device=device)
    float8 = torch.zeros(1, 2, 1, 16, 16, device=device).to(FP8)
    scales = torch.zeros(1, 2, 1, 16, device=device)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kv_cache": quantised}, "kv_scales: missing, with a cache of torch.int8"),
        ({"kv_scales": scales}, "kv_scales: given, with a cache of torch.float32"),
        ({"kv_cache": quantised, "kv_scales": scales[:, :1]}, "kv_scales: shape"),
        ({"lse": torch.zeros(2, 2, device=device)}, "lse: shape"),
        ({"soft_cap": -1.0}, "soft_cap: is -1.0"),
        ({"kv_cache": quantised, "kv_scales": scales}, "qkv: dtype is torch.float32, expected torch.bfloat16"),
        ({"qkv": torch.zeros(2, 80, device=device).half()}, "qkv: dtype is torch.float16"),
    ]
    if not has_float8(device):
        wrong.append(
            ({"kv_cache": float8, "kv_scales": scales}, "float8_e4m3fn, which this chip lacks; use torch.int8")
        )
    for changes, words in wrong:
        with pytest.raises(ValueError, match=words):
            call(**changes)
