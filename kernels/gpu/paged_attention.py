"""Attention by tiles of rows and keys, and the merge of a context's pieces: see `launch`.

One order of arithmetic for every query, as on the CPU: pieces of PIECE keys aligned to position 0, each by itself and
then merged into those before it; in a piece tiles of a fixed size, also aligned to position 0. Scores, sums of weights
and sums of values are products of the one instruction that the chip has for the type, each element of which is summed
by itself in the order of the head or of the keys; maxima have no order. So a query's bits depend neither on the rows
that share its tile, nor on the number of rows or warps of a tile, nor on which programs work on the pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.backend import device
from octavo.kernels.gpu.device import num_processors, register_limit
from octavo.kernels.gpu.variant import Variant

PIECE = 1024  # keys that one program sums up by itself; a multiple of every tile
LOG2_E = 1.4426950408889634


@triton.jit
def _find_sequence(tile, one_tile_each, token_begins_ptr, num_sequences, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sequence whose rows are in `tile`. Sequence s owns the tiles from token_begins[s] * GROUP // BLOCK_M + s on.

    These are enough for its rows, and their number is known on the host: at most tokens * GROUP // BLOCK_M + sequences.
    """
    begin = tl.where(one_tile_each != 0, tile, 0)
    end = tl.where(one_tile_each != 0, tile + 1, num_sequences)
    while end - begin > 1:
        middle = (begin + end) // 2
        starts_later = tl.load(token_begins_ptr + middle) * GROUP // BLOCK_M + middle > tile
        begin = tl.where(starts_later, begin, middle)
        end = tl.where(starts_later, middle, end)
    return begin


@triton.jit
def _find_rows(
    tile,
    one_tile_each,
    window,
    token_begins_ptr,
    context_lens_ptr,
    num_sequences,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile's rows: their sequence, its first token, the tile's first row in it, their number (0 or less: none), and
    the keys they see: position of the sequence's first token, first and last key that any of them sees."""
    sequence = _find_sequence(tile, one_tile_each, token_begins_ptr, num_sequences, GROUP, BLOCK_M)
    token_begin = tl.load(token_begins_ptr + sequence)
    num_new = tl.load(token_begins_ptr + sequence + 1) - token_begin
    row_begin = tl.where(one_tile_each != 0, 0, (tile - token_begin * GROUP // BLOCK_M - sequence) * BLOCK_M)
    num_rows = tl.minimum(num_new * GROUP - row_begin, BLOCK_M)
    position = tl.load(context_lens_ptr + sequence) - num_new
    first_key = tl.maximum(position + row_begin // GROUP - window + 1, 0)
    last_key = position + (row_begin + num_rows - 1) // GROUP
    return sequence, token_begin, row_begin, num_rows, position, first_key, last_key


@triton.jit
def _merge(total_max, total_sum, total, piece_max, piece_sum, piece):
    """Adds a piece to those before it. One that saw nothing (maximum -inf, sums 0) changes nothing."""
    new_max = tl.maximum(total_max, piece_max)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf minus -inf would be no number
    a, b = tl.exp2(total_max - base), tl.exp2(piece_max - base)
    total_sum = tl.fma(total_sum, a, piece_sum * b)
    total = tl.fma(total, tl.broadcast_to(a[:, None], total.shape), piece * b[:, None])
    return new_max, total_sum, total


@triton.jit
def _finish(out_ptr, lse_ptr, out_rows, row_mask, total_max, total_sum, total, HEAD_SIZE: tl.constexpr):
    """Stores weighted means, and log-sum-exp in natural units where it is wanted; rows that saw nothing are 0, -inf."""
    columns = tl.arange(0, total.shape[1])
    mask = row_mask[:, None] & (columns < HEAD_SIZE)[None, :]
    inverse = tl.where(total_sum == 0.0, 0.0, tl.div_rn(1.0, total_sum))
    out = (total * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (out_rows * HEAD_SIZE)[:, None] + columns[None, :], out, mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + out_rows, (total_max + tl.log2(total_sum)) * 0.6931471805599453, mask=row_mask)


@triton.jit
def _find_heads(kv_head, rows, first_head, num_heads, GROUP: tl.constexpr):
    """The query head of each row, and whether it is among those that there are: the first and last group may be cut."""
    heads = kv_head * GROUP + rows % GROUP - first_head
    return heads, (heads >= 0) & (heads < num_heads)


@triton.jit(
    do_not_specialize=[
        "num_sequences",
        "num_heads",
        "num_kv_heads",
        "first_head",
        "table_stride",
        "window",
        "one_tile_each",
        "max_pieces",
    ]
)
def attend_kernel(
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_stats_ptr,
    qkv_ptr,
    cache_ptr,
    scales_ptr,
    block_tables_ptr,
    token_begins_ptr,
    context_lens_ptr,
    num_sequences,
    num_heads,
    num_kv_heads,
    first_head,
    qkv_stride,
    table_stride,
    window,
    one_tile_each,
    max_pieces,
    cap_scale,
    score_scale,
    SPLIT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One tile of BLOCK_M (token, head) rows of one sequence and KV head, over every num_programs(2)-th of its pieces.

    With SPLIT each piece's maxima, sums of weights and sums of values are stored; else they are merged here. Scores are
    in units of log2: weight = 2^(score - maximum). Tiles of a context are walked from `first_key` on, rounded down.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a prefill's last rows see the most keys: they start first
    kv_head = tl.program_id(1)
    sequence, token_begin, row_begin, num_rows, position, first_key, last_key = _find_rows(
        tile, one_tile_each, window, token_begins_ptr, context_lens_ptr, num_sequences, GROUP, BLOCK_M
    )
    if num_rows <= 0:
        return
    rows = row_begin + tl.arange(0, BLOCK_M)
    heads, is_there = _find_heads(kv_head, rows, first_head, num_heads, GROUP)
    row_mask = (rows < row_begin + num_rows) & is_there
    positions = position + rows // GROUP
    tokens = (token_begin + rows // GROUP).to(tl.int64)
    out_rows = tokens * num_heads + heads

    columns = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (columns < HEAD_SIZE)[None, :]
    q = tl.load(qkv_ptr + (tokens * qkv_stride + heads * HEAD_SIZE)[:, None] + columns[None, :], mask=mask, other=0.0)
    # Weights times a scale of values may be smaller than float16 can hold.
    weight_dtype: tl.constexpr = tl.bfloat16 if scales_ptr is not None and q.dtype == tl.float16 else q.dtype
    ones = tl.full([TILE, 8], 1.0, tl.float32).to(weight_dtype)

    block_tables_ptr += sequence.to(tl.int64) * table_stride
    cache_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
    if scales_ptr is not None:
        scales_ptr += kv_head * BLOCK_SIZE
    block_slots = 2 * num_kv_heads * BLOCK_SIZE  # K's and V's
    v_distance = num_kv_heads * BLOCK_SIZE

    total_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_sum = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_piece = first_key // PIECE
    for piece in tl.range(first_piece + tl.program_id(2), last_key // PIECE + 1, tl.num_programs(2), num_stages=1):
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sums = tl.zeros([BLOCK_M, 8], tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        begin = tl.maximum(piece * PIECE, first_key // TILE * TILE)
        end = tl.minimum(piece * PIECE + PIECE, last_key + 1)
        # A tile's block ids are read one tile ahead, so that its keys and values are one access away and can be, too.
        keys = begin + tl.arange(0, TILE)
        blocks = tl.load(block_tables_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)
        for at in tl.range(begin, end, TILE):
            keys = at + tl.arange(0, TILE)
            # Slots that no row sees may hold anything, NaN included, which a weight of 0 would not stop.
            key_mask = (keys >= first_key) & (keys < end)
            kv_mask = key_mask[:, None] & (columns < HEAD_SIZE)[None, :]
            slots = blocks.to(tl.int64) * block_slots + keys % BLOCK_SIZE
            kv_ptrs = cache_ptr + (slots * HEAD_SIZE)[:, None] + columns[None, :]
            k = tl.load(kv_ptrs, mask=kv_mask, other=0.0)
            v = tl.load(kv_ptrs + v_distance * HEAD_SIZE, mask=kv_mask, other=0.0)
            blocks = tl.load(block_tables_ptr + (keys + TILE) // BLOCK_SIZE, mask=keys + TILE < end, other=0)

            scores = tl.dot(q, k.to(q.dtype).T, input_precision="ieee")
            if scales_ptr is not None:
                scores *= tl.load(scales_ptr + slots, mask=key_mask, other=0.0)[None, :]
            if SOFT_CAP:
                scores = 1.0 - 2.0 / (tl.exp2(scores * cap_scale) + 1.0)  # tanh
            visible = (keys[None, :] <= positions[:, None]) & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
            base = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf minus -inf would be no number
            weights = tl.exp2(
                tl.fma(
                    scores,
                    tl.full(scores.shape, score_scale, tl.float32),
                    tl.broadcast_to(-base[:, None], scores.shape),
                )
            )
            alpha = tl.exp2(row_max - base)[:, None]
            row_max = new_max
            row_sums = tl.dot(weights.to(weight_dtype), ones, row_sums * alpha, input_precision="ieee")
            if scales_ptr is not None:
                weights *= tl.load(scales_ptr + v_distance + slots, mask=key_mask, other=0.0)[None, :]
            sums = tl.dot(weights.to(weight_dtype), v.to(weight_dtype), sums * alpha, input_precision="ieee")

        row_sum = tl.max(row_sums, 1)  # its columns are all the same
        if SPLIT:
            places = out_rows * max_pieces + (piece - first_piece)
            tl.store(partial_stats_ptr + 2 * places, row_max, mask=row_mask)
            tl.store(partial_stats_ptr + 2 * places + 1, row_sum, mask=row_mask)
            tl.store(partial_ptr + (places * HEAD_SIZE)[:, None] + columns[None, :], sums, mask=mask)
        else:
            total_max, total_sum, total = _merge(total_max, total_sum, total, row_max, row_sum, sums)
    if not SPLIT:
        _finish(out_ptr, lse_ptr, out_rows, row_mask, total_max, total_sum, total, HEAD_SIZE)


@triton.jit(do_not_specialize=["num_sequences", "num_heads", "first_head", "window", "one_tile_each", "max_pieces"])
def merge_kernel(
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_stats_ptr,
    token_begins_ptr,
    context_lens_ptr,
    num_sequences,
    num_heads,
    first_head,
    window,
    one_tile_each,
    max_pieces,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One row of a tile of `attend_kernel`: its pieces merged in their order, with the same arithmetic."""
    _, token_begin, row_begin, num_rows, _, first_key, last_key = _find_rows(
        tl.program_id(0), one_tile_each, window, token_begins_ptr, context_lens_ptr, num_sequences, GROUP, BLOCK_M
    )
    head, is_there = _find_heads(tl.program_id(1), row_begin + tl.program_id(2), first_head, num_heads, GROUP)
    if (tl.program_id(2) >= num_rows) | (is_there == 0):
        return
    row = row_begin + tl.program_id(2) + tl.arange(0, 1)
    token = (token_begin + row // GROUP).to(tl.int64)
    out_row = token * num_heads + head
    columns = tl.arange(0, BLOCK_D)
    mask = (columns < HEAD_SIZE)[None, :]
    total_max = tl.full([1], float("-inf"), tl.float32)
    total_sum = tl.zeros([1], tl.float32)
    total = tl.zeros([1, BLOCK_D], tl.float32)
    for piece in tl.range(0, last_key // PIECE - first_key // PIECE + 1, loop_unroll_factor=4):
        place = out_row * max_pieces + piece
        piece_max = tl.load(partial_stats_ptr + 2 * place)
        piece_sum = tl.load(partial_stats_ptr + 2 * place + 1)
        sums = tl.load(partial_ptr + (place * HEAD_SIZE)[:, None] + columns[None, :], mask=mask, other=0.0)
        total_max, total_sum, total = _merge(total_max, total_sum, total, piece_max, piece_sum, sums)
    _finish(out_ptr, lse_ptr, out_row, row < row_begin + num_rows, total_max, total_sum, total, HEAD_SIZE)


@dataclass(frozen=True, slots=True)
class Config:
    """How `attend_kernel` is compiled for a launch. Only `tile` matters to the bits."""

    block_m: int
    tile: int
    num_warps: int
    num_stages: int
    max_registers: int  # told to the assembler, which otherwise spills to get below bounds of its own


def config_of(dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int, rows_per_sequence: int) -> Config:
    """rows_per_sequence: (token, head) pairs of a KV head that the longest sequence may bring.

    Tiles of 16 or 32 rows are multiplied by mma.sync on every chip; from 64 on, sm_90 and sm_100 have others. The rest
    is chosen so that nothing spills, and that programs which share a processor keep 32 KiB or more on their way to it.
    """
    block_d = triton.next_power_of_2(head_size)
    if dtype == torch.float32:  # no tensor cores: products of single numbers
        return Config(16, tile=64 if block_d <= 64 else 16, num_warps=8, num_stages=3, max_registers=255)
    is_decode, is_large, is_quantised = rows_per_sequence <= 16, block_d > 128, cache_dtype != dtype
    num_warps = 4 if block_d <= (128 if is_decode == is_quantised else 64) else 8
    max_registers = 255
    if not is_quantised and block_d <= 64:
        max_registers = 168  # three programs on a processor
    elif not is_quantised and block_d <= 128 and is_decode:
        max_registers = 128  # two, of twice as many warps
    return Config(16 if is_decode else 32, 32 if is_large else 64, num_warps, 4 if is_quantised else 3, max_registers)


def _sizes(config: Config, group: int, head_size: int, piece: int = PIECE) -> dict[str, Any]:
    """Constants of both kernels."""
    return {
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "BLOCK_M": config.block_m,
        "BLOCK_D": triton.next_power_of_2(head_size),
        "PIECE": piece,
        "enable_fp_fusion": False,
    }


def _attend_options(config: Config, block_size: int, split: bool, soft_cap: bool) -> dict[str, Any]:
    return {
        "SPLIT": split,
        "SOFT_CAP": soft_cap,
        "BLOCK_SIZE": block_size,
        "TILE": config.tile,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **register_limit(config.max_registers),
    }


def variants() -> Iterator[Variant]:
    """Every configuration; block sizes, groups and soft-caps take turns, and float16, like bfloat16, has two heads."""
    i32, f32, bf16, f16 = torch.int32, torch.float32, torch.bfloat16, torch.float16
    heads = (16, 32, 64, 80, 96, 128, 256)
    cases: list[tuple[torch.dtype, torch.dtype, int]] = [(f32, f32, head_size) for head_size in heads]
    for quantised in (None, torch.int8, torch.float8_e4m3fn):
        cases += [(bf16, quantised or bf16, head_size) for head_size in heads]
        cases += [(f16, quantised or f16, head_size) for head_size in (64, 128)]
    turn = 0
    for dtype, cache_dtype, head_size in cases:
        scales = f32 if cache_dtype != dtype else None
        for config in dict.fromkeys(config_of(dtype, cache_dtype, head_size, rows) for rows in (16, 17)):
            for split in (False, True):
                block_size, group, soft_cap = (16, 32, 64)[turn % 3], (1, 3, 4, 7, 8)[turn % 5], turn % 7 == 0
                turn += 1
                types = "-".join(str(x).removeprefix("torch.") for x in dict.fromkeys((dtype, cache_dtype)))
                name = (
                    f"{types}, head {head_size}, block {block_size}, {config.block_m} rows of groups of {group}"
                    f"{', split' if split else ''}{', soft-cap' if soft_cap else ''}"
                )
                args = (dtype, f32, f32, f32, dtype, cache_dtype, scales, i32, i32, i32)
                args += (1, 1, 1, 1, 4096, 1, 1, 1, 1, 1.0, 1.0)  # type: ignore[assignment]
                options = {**_sizes(config, group, head_size), **_attend_options(config, block_size, split, soft_cap)}
                yield Variant(name, attend_kernel, args, options)
        if cache_dtype == dtype:
            args = (dtype, f32, f32, f32, i32, i32, 1, 1, 1, 1, 1, 1)  # type: ignore[assignment]
            name = f"merge, {str(dtype).removeprefix('torch.')}, head {head_size}"
            yield Variant(name, merge_kernel, args, {**_sizes(config, 4, head_size), "num_warps": 1})


def launch(
    out: Tensor,
    lse: Tensor | None,
    qkv: Tensor,
    kv_cache: Tensor,
    kv_scales: Tensor | None,
    block_tables: Tensor,
    token_begins: Tensor,
    context_lens: Tensor,
    num_heads: int,
    group: int,
    first_head: int,
    scale: float,
    window: int,
    soft_cap: float,
    max_query_len: int,
    max_context_len: int,
    num_splits: int | None = None,
    piece: int = PIECE,
) -> None:
    """Checked arguments of the op. Grids depend on shapes and the two lengths alone, so they may be captured.

    num_splits: programs that share a tile's pieces, by default enough to fill the chip; one needs no second kernel.
    """
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    num_tokens, num_sequences = qkv.shape[0], block_tables.shape[0]
    if not num_tokens or not num_sequences:
        return
    config = config_of(qkv.dtype, kv_cache.dtype, head_size, max_query_len * group)
    one_tile_each = max_query_len * group <= config.block_m
    num_tiles = num_sequences if one_tile_each else num_tokens * group // config.block_m + num_sequences
    window = window or 2**31 - 1
    seen = min(max_context_len, window + config.block_m)  # bounds the keys of a tile
    max_pieces = min(triton.cdiv(max_context_len, piece), triton.cdiv(seen, piece) + 1)
    if num_splits is None:
        num_splits = min(max_pieces, max(1, 4 * num_processors(qkv.device) // (num_tiles * num_kv_heads)))
    partials = stats = out  # not looked at
    if num_splits > 1:
        partials = torch.empty((num_tokens * num_heads, max_pieces, head_size), dtype=torch.float32, device=out.device)
        stats = torch.empty((num_tokens * num_heads, max_pieces, 2), dtype=torch.float32, device=out.device)
    sizes = _sizes(config, group, head_size, piece)
    attend_kernel[num_tiles, num_kv_heads, num_splits](
        out,
        lse,
        partials,
        stats,
        qkv,
        kv_cache,
        kv_scales,
        block_tables,
        token_begins,
        context_lens,
        num_sequences,
        num_heads,
        num_kv_heads,
        first_head,
        qkv.stride(0),
        block_tables.stride(0),
        window,
        int(one_tile_each),
        max_pieces,
        2 * LOG2_E * scale / soft_cap if soft_cap else 0.0,
        (soft_cap or scale) * LOG2_E,
        **_attend_options(config, block_size, num_splits > 1, soft_cap != 0.0),
        **sizes,
    )
    if num_splits > 1:
        merge_kernel[num_tiles, num_kv_heads, min(config.block_m, max_query_len * group)](
            out,
            lse,
            partials,
            stats,
            token_begins,
            context_lens,
            num_sequences,
            num_heads,
            first_head,
            window,
            int(one_tile_each),
            max_pieces,
            num_warps=1,
            **sizes,
        )


def partial_bytes(dtype: torch.dtype, num_tokens: int, num_heads: int, head_size: int, max_context_len: int) -> int:
    """Most bytes of partial results that `launch` allocates for up to so many tokens."""
    if max_context_len <= PIECE:
        return 0
    # Pieces are shared where tiles leave every second of the programs that the chip has work for unused.
    num_rows = 2 * num_processors(device()) * config_of(dtype, dtype, head_size, 1 << 30).block_m
    max_pieces = -(-max_context_len // PIECE)
    return min(num_tokens * num_heads, num_rows) * max_pieces * (head_size + 2) * 4
