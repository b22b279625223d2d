"""Choosing tokens: the very tokens that kernels/cpu/sample.cpp chooses, for the same logits.

Every number that decides is the same on both in every bit: float32 by the same operations (the one exp, the one log,
IEEE division, nothing fused but where written), sums in fixed point, whose order does not matter, or in a fixed tree.
There, a row's candidates are sorted; here, thresholds are searched, and equal logits go by id. Each program has a row.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gpu.device import register_limit
from octavo.kernels.gpu.math import exp, log
from octavo.kernels.gpu.variant import Variant
from octavo.kernels.sample import NOT_FINITE, ROW


def _word(field: str) -> tl.constexpr:
    """Where a field lies in a row of 32-bit words."""
    return tl.constexpr(ROW.fields[field][1] // 4)  # type: ignore[index]


_SEED = _word("seed")
_TEMPERATURE = _word("temperature")
_TOP_P = _word("top_p")
_MIN_P = _word("min_p")
_PRESENCE = _word("presence_penalty")
_FREQUENCY = _word("frequency_penalty")
_REPETITION = _word("repetition_penalty")
_TOP_K = _word("top_k")
_SLOT = _word("slot")
_PROMPT_LEN = _word("prompt_len")
_TOTAL_LEN = _word("total_len")
_CHOICE_INDEX = _word("choice_index")
_NUM_TOP = _word("num_top")
_TARGET = _word("target")
_EDITS_BEGIN = _word("edits_begin")
_EDITS_END = _word("edits_end")
_ALLOWED_BEGIN = _word("allowed_begin")
_ALLOWED_END = _word("allowed_end")
_ROW_WORDS = tl.constexpr(ROW.itemsize // 4)

_NOT_FINITE = tl.constexpr(NOT_FINITE)
_INF = tl.constexpr(float("inf"))
_INT_MAX = tl.constexpr(2**31 - 1)
_LOWEST_KEY = tl.constexpr(-(2**31))  # below that of every number
_NEG_INF_KEY = tl.constexpr(-(2**31) + 0x7FFFFF)
# The most and the least that noise can add: -log(-log(1 - 2^-24)) rounded up, -log(-log(2^-24)) rounded down.
_MAX_NOISE = tl.constexpr(16.65)
_MIN_NOISE = tl.constexpr(-2.82)
_FIXED = tl.constexpr(2.0**40)
# What is known of a token in its int32 mark: how often it is in the output, and two bits.
_IN_PROMPT = tl.constexpr(1 << 30)
_ALLOWED = tl.constexpr(1 << 29)
_COUNT = tl.constexpr((1 << 29) - 1)
_EDITS = tl.constexpr(64)  # edits and top logprobs at once: each is compared with each
_TOP = tl.constexpr(32)
_SHARDS = tl.constexpr(8)
_SHARD_LANES = tl.constexpr(128)

BLOCK = 1024  # tokens at once; no result depends on it


@triton.jit
def _float(ptr):
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit
def _noise(begin, row_ptr, BLOCK: tl.constexpr):
    """-log(E) for the tokens from `begin` on, E = -log(u), u = (the 23 high bits + 1/2) / 2^23, never 0 or 1.

    A call of Philox-4x32-10 (Salmon et al., SC 2011) has the bits of four tokens.
    """
    seed = (tl.load(row_ptr + _SEED + 1).to(tl.uint64) << 32) | tl.load(row_ptr + _SEED).to(tl.uint32).to(tl.uint64)
    index = tl.load(row_ptr + _TOTAL_LEN) - tl.load(row_ptr + _PROMPT_LEN)
    choice = tl.load(row_ptr + _CHOICE_INDEX)
    a, b, c, d = tl.philox(seed, begin // 4 + tl.arange(0, BLOCK // 4), index, choice, 0)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    u = tl.fma((bits >> 9).to(tl.float32), 1.0 / (1 << 23), 1.0 / (1 << 24))
    return -log(-log(u))


@triton.jit
def _key(x):
    """An int32 that orders as x does; -0 and 0 have the same."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _survives(key, ids, lowest, last):
    """Whether a token is above (lowest, last) in the order of (logit, lowest id), or is that one."""
    return (key > lowest) | ((key == lowest) & (ids <= last))


@triton.jit
def _weight(x, best, temperature):
    return exp(tl.div_rn(x - best, temperature))


@triton.jit
def _amount(x, by_mass, best, temperature):
    """What a token counts for: 1, or its weight in units of 2^-40, cut off. Sums of these are exact."""
    return tl.where(by_mass, (_weight(x, best, temperature) * _FIXED).to(tl.int64), 1)


@triton.jit
def _likeliest(x_ptr, vocab, BLOCK: tl.constexpr):
    """The greatest number and its lowest id. Id -1, -inf: there are none but -inf; NaN: there is one."""
    top = tl.full((BLOCK,), -_INF, tl.float32)
    at = tl.full((BLOCK,), _INT_MAX, tl.int32)
    nan = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + ids, mask=ids < vocab, other=-_INF)
        nan |= (x != x).to(tl.int32)
        better = x > top
        at = tl.where(better, ids, at)
        top = tl.where(better, x, top)
    best = tl.max(top, axis=0)
    best_id = tl.min(tl.where(top == best, at, _INT_MAX), axis=0)
    is_nan = tl.max(nan, axis=0) != 0
    return tl.where(is_nan, float("nan"), best), tl.where(is_nan | (best == -_INF), -1, best_id)


@triton.jit
def _mark(marks_ptr, ids_ptr, begin, end, mark, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Add to, or set bits in, the marks of ids_ptr[begin:end]. Of atomics on integers the order does not matter."""
    for i in range(begin, end, BLOCK):
        at = i + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + at, mask=at < end, other=0)
        if ADD:
            tl.atomic_add(marks_ptr + ids, mark, mask=at < end, sem="relaxed")
        else:
            tl.atomic_or(marks_ptr + ids, mark, mask=at < end, sem="relaxed")


@triton.jit
def _edit(
    x_ptr, marks_ptr, raw_ptr, row_ptr, tokens_ptr, edits_ptr, allowed_ptr, vocab, with_bans, BLOCK: tl.constexpr
):
    """x = the raw logits, penalised, -inf outside of the allowed set, with biases and bans added."""
    for begin in range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        tl.store(marks_ptr + ids, 0, mask=ids < vocab)
    tl.debug_barrier()  # other threads read and write what these wrote; so below
    presence, frequency = _float(row_ptr + _PRESENCE), _float(row_ptr + _FREQUENCY)
    repetition = _float(row_ptr + _REPETITION)
    if (presence != 0.0) | (frequency != 0.0) | (repetition != 1.0):
        prompt_len = tl.load(row_ptr + _PROMPT_LEN)
        _mark(marks_ptr, tokens_ptr, 0, prompt_len, _IN_PROMPT, False, BLOCK)
        _mark(marks_ptr, tokens_ptr, prompt_len, tl.load(row_ptr + _TOTAL_LEN), 1, True, BLOCK)
    allowed_begin, allowed_end = tl.load(row_ptr + _ALLOWED_BEGIN), tl.load(row_ptr + _ALLOWED_END)
    _mark(marks_ptr, allowed_ptr, allowed_begin, allowed_end, _ALLOWED, False, BLOCK)
    tl.debug_barrier()
    for begin in range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(raw_ptr + ids, mask=ids < vocab, other=-_INF)
        mark = tl.load(marks_ptr + ids, mask=ids < vocab, other=0)
        count = mark & _COUNT
        seen = (count != 0) | ((mark & _IN_PROMPT) != 0)
        x = tl.where(seen, tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition), x)
        x = tl.where(count != 0, x - (presence + frequency * count.to(tl.float32)), x)
        x = tl.where((allowed_begin < allowed_end) & ((mark & _ALLOWED) == 0), -_INF, x)
        tl.store(x_ptr + ids, x, mask=ids < vocab)
    tl.debug_barrier()
    end = tl.load(row_ptr + _EDITS_END)
    for begin in range(tl.load(row_ptr + _EDITS_BEGIN), end, _EDITS):
        at, other = begin + tl.arange(0, _EDITS), begin + tl.arange(0, _EDITS)[None, :]
        ids = tl.load(edits_ptr + 2 * at, mask=at < end, other=0)
        add = tl.load(edits_ptr + 2 * at + 1, mask=at < end, other=0).to(tl.float32, bitcast=True)
        other_ids = tl.load(edits_ptr + 2 * other, mask=other < end, other=0)
        # Edits of the same token go one after the other, in their order.
        turn = tl.sum(((ids[:, None] == other_ids) & (other < at[:, None])).to(tl.int32), axis=1)
        turn = tl.where((at < end) & (with_bans | (add > -_INF)), turn, -1)
        for now in range(0, tl.max(turn, axis=0) + 1):
            x = tl.load(x_ptr + ids, mask=turn == now, other=0.0)
            tl.debug_barrier()  # there are fewer edits than threads: several read what one of them writes
            tl.store(x_ptr + ids, x + add, mask=turn == now)
            tl.debug_barrier()


@triton.jit
def _gather(x_ptr, ids_ptr, vocab, lowest, last, floor, by_mass, best, temperature, BLOCK: tl.constexpr):
    """Write down the ids of survivors with keys from `floor` on, in order: their number and amount, and that of all."""
    num = 0
    amount_kept = tl.zeros((BLOCK,), tl.int64)
    amount_all = tl.zeros((BLOCK,), tl.int64)
    for begin in range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + ids, mask=ids < vocab, other=-_INF)
        key = _key(x)
        alive = (ids < vocab) & _survives(key, ids, lowest, last)
        kept = alive & (key >= floor)
        amount = _amount(x, by_mass, best, temperature)
        amount_all += tl.where(alive, amount, 0)
        amount_kept += tl.where(kept, amount, 0)
        num_here = tl.sum(kept.to(tl.int32), axis=0)
        if num_here > 0:
            tl.store(ids_ptr + num + tl.cumsum(kept.to(tl.int32), axis=0) - 1, ids, mask=kept)
        num += num_here
    tl.debug_barrier()
    return num, tl.sum(amount_kept, axis=0), tl.sum(amount_all, axis=0)


@triton.jit
def _cut(x_ptr, ids_ptr, vocab, lowest, last, by_mass, top_k, top_p, best, temperature, BLOCK: tl.constexpr):
    """The last token, as (key, id), of the fewest first ones that are top_k, or have top_p of the mass.

    Counted are the tokens that survive (lowest, last), in the order of (logit, lowest id).
    """
    # As on the CPU: note down what lies within a margin of the best, and widen it until that is enough.
    num, tries = 0, 0
    floor, target, amount = _INT_MAX, tl.full((), 1, tl.int64), tl.full((), 0, tl.int64)
    margin = 8.0 * temperature
    while (amount < target) & (floor != lowest):
        floor = tl.where(tries < 2, tl.maximum(_key(best - margin), lowest), lowest)
        num, amount, total = _gather(x_ptr, ids_ptr, vocab, lowest, last, floor, by_mass, best, temperature, BLOCK)
        mass = (tl.cast(top_p, tl.float64) * total.to(tl.float64)).to(tl.int64)
        target = tl.where(by_mass, tl.maximum(mass, 1), top_k.to(tl.int64))
        margin = 4.0 * margin
        tries += 1
    # The greatest key from which on there is enough, bit by bit; what is above it is what failed last.
    found, above = tl.full((), _LOWEST_KEY, tl.int32), tl.full((), 0, tl.int64)
    bit = tl.full((), 1 << 31, tl.uint32)
    for _ in range(0, 32):
        trial = found ^ bit.to(tl.int32, bitcast=True)
        bit >>= 1
        sums = tl.zeros((BLOCK,), tl.int64)
        for begin in range(0, num, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            ids = tl.load(ids_ptr + at, mask=at < num, other=0)
            x = tl.load(x_ptr + ids, mask=at < num, other=-_INF)
            enough = (at < num) & (_key(x) >= trial)
            sums += tl.where(enough, _amount(x, by_mass, best, temperature), 0)
        amount = tl.sum(sums, axis=0)
        above = tl.where(amount < target, amount, above)
        found = tl.where(amount < target, found, trial)
    # Of the tokens with that key, as many as are needed.
    found_id, num_before = -1, 0
    for begin in range(0, num, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + at, mask=at < num, other=0)
        x = tl.load(x_ptr + ids, mask=at < num, other=-_INF)
        equal = (at < num) & (_key(x) == found)
        before = num_before + tl.cumsum(equal.to(tl.int32), axis=0) - 1
        needed = equal & (above + _amount(x, by_mass, best, temperature) * before < target)
        found_id = tl.maximum(found_id, tl.max(tl.where(needed, ids, -1), axis=0))
        num_before += tl.sum(equal.to(tl.int32), axis=0)
    tl.debug_barrier()
    # There may not be enough at all.
    return tl.maximum(found, lowest), tl.where(found < lowest, last, found_id)


@triton.jit
def _draw(x_ptr, ids_ptr, row_ptr, vocab, best, best_id, temperature, BLOCK: tl.constexpr):
    """argmax(x / T + noise) over the tokens that survive top-k, top-p among those, then min-p."""
    top_k, top_p, min_p = tl.load(row_ptr + _TOP_K), _float(row_ptr + _TOP_P), _float(row_ptr + _MIN_P)
    lowest, last = _NEG_INF_KEY, -1
    for by_mass in range(0, 2):
        if tl.where(by_mass != 0, top_p < 1.0, (top_k > 0) & (top_k < vocab)):
            lowest, last = _cut(
                x_ptr, ids_ptr, vocab, lowest, last, by_mass != 0, top_k, top_p, best, temperature, BLOCK
            )
    score, token = -_INF, best_id
    bound = tl.div_rn(best, temperature) + _MIN_NOISE
    for begin in range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + ids, mask=ids < vocab, other=-_INF)
        scaled = tl.div_rn(x, temperature)
        if tl.max(scaled, axis=0) + _MAX_NOISE >= bound:  # noise only where it could still win
            survives = _survives(_key(x), ids, lowest, last) & (_weight(x, best, temperature) >= min_p)
            scores = tl.where(survives, scaled + _noise(begin, row_ptr, BLOCK), -_INF)
            top = tl.max(scores, axis=0)
            if top > score:
                token = tl.min(tl.where(scores == top, ids, _INT_MAX), axis=0)
                score = top
                bound = tl.maximum(bound, top)
    return token


@triton.jit(do_not_specialize=["edits_at", "allowed_at", "tokens_stride", "out_stride"])
def sample_kernel(
    out_ptr,
    logits_ptr,
    words_ptr,
    tokens_ptr,
    edited_ptr,
    ids_ptr,
    vocab,
    edits_at,
    allowed_at,
    tokens_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    """The token of a row, into the first of its words in `out`. See `octavo.kernels.sample`.

    words: rows of ROW, edits from `edits_at` on, allowed ids from `allowed_at` on. edited, ids: scratch, [rows, vocab].
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = words_ptr + row * _ROW_WORDS
    x_ptr = logits_ptr + row * vocab
    ids_ptr += row * vocab
    best, best_id = _likeliest(x_ptr, vocab, BLOCK)
    finite = (best_id >= 0) & (best < _INF)
    token = tl.where(finite, tl.load(row_ptr + _TARGET), _NOT_FINITE)
    if finite & (token < 0):
        token = best_id
        allowed_begin, allowed_end = tl.load(row_ptr + _ALLOWED_BEGIN), tl.load(row_ptr + _ALLOWED_END)
        is_edited = (
            (_float(row_ptr + _PRESENCE) != 0.0)
            | (_float(row_ptr + _FREQUENCY) != 0.0)
            | (_float(row_ptr + _REPETITION) != 1.0)
            | (allowed_begin < allowed_end)
            | (tl.load(row_ptr + _EDITS_BEGIN) < tl.load(row_ptr + _EDITS_END))
        )
        if is_edited:
            raw_ptr, x_ptr = x_ptr, edited_ptr + row * vocab
            best_id = -1
            tries = 0
            while (best_id < 0) & (tries < 2):  # bans that leave no token at all are not applied
                slot_ptr = tokens_ptr + tl.load(row_ptr + _SLOT).to(tl.int64) * tokens_stride
                edits_ptr, allowed_ptr = words_ptr + edits_at, words_ptr + allowed_at
                _edit(x_ptr, ids_ptr, raw_ptr, row_ptr, slot_ptr, edits_ptr, allowed_ptr, vocab, tries == 0, BLOCK)
                best, best_id = _likeliest(x_ptr, vocab, BLOCK)
                tl.debug_barrier()
                tries += 1
            if best_id >= 0:
                token = best_id
            elif allowed_begin < allowed_end:  # the model itself gives these no probability
                token = tl.load(words_ptr + allowed_at + allowed_begin)
        temperature = _float(row_ptr + _TEMPERATURE)
        if (best_id >= 0) & (temperature != 0.0):
            token = _draw(x_ptr, ids_ptr, row_ptr, vocab, best, best_id, temperature, BLOCK)
    tl.store(out_ptr + row * out_stride, token)


@triton.jit
def _share(top, merged_top, total):
    return tl.where(top > -_INF, exp(top - merged_top) * total, 0.0)


@triton.jit
def _log_sum_exp(x_ptr, vocab):
    """log(sum(exp(x))): eight logical shards, each relative to its own maximum, merged in a fixed tree."""
    shards = tl.arange(0, _SHARDS)
    begins, ends = shards * vocab // _SHARDS, (shards + 1) * vocab // _SHARDS
    places = begins[:, None] + tl.arange(0, _SHARD_LANES)[None, :]
    size = (vocab + _SHARDS - 1) // _SHARDS
    top = tl.full((_SHARDS, _SHARD_LANES), -_INF, tl.float32)
    for i in range(0, size, _SHARD_LANES):
        top = tl.maximum(top, tl.load(x_ptr + places + i, mask=places + i < ends[:, None], other=-_INF))
    tops = tl.max(top, axis=1)
    origin = tl.where(tops > -_INF, tops, 0.0)[:, None]
    sums = tl.zeros((_SHARDS, _SHARD_LANES), tl.float32)
    for i in range(0, size, _SHARD_LANES):
        x = tl.load(x_ptr + places + i, mask=places + i < ends[:, None], other=-_INF)
        sums += exp(x - origin)
    # Sums of partners, whose sums are partners next, until all are the sum of all.
    lanes = tl.broadcast_to(tl.arange(0, _SHARD_LANES)[None, :], (_SHARDS, _SHARD_LANES))
    for i in tl.static_range(7):
        sums += tl.gather(sums, lanes ^ (64 >> i), axis=1)
    totals = tl.max(sums, axis=1)
    for i in tl.static_range(3):
        other_tops, other_totals = (
            tl.gather(tops, shards ^ (1 << i), axis=0),
            tl.gather(totals, shards ^ (1 << i), axis=0),
        )
        merged = tl.maximum(tops, other_tops)
        totals = _share(tops, merged, totals) + _share(other_tops, merged, other_totals)
        tops = merged
    return tl.max(tops, axis=0) + log(tl.max(totals, axis=0))


@triton.jit(do_not_specialize=["max_top"])
def logprobs_kernel(out_ptr, logits_ptr, words_ptr, ids_ptr, vocab, max_top, BLOCK: tl.constexpr):
    """Logprobs of a row's token, and the best ones, from the raw logits, where wanted.

    out: [rows, 2 + 2 * max_top] words: token id, its logprob, ids of the best tokens, logprobs of these. ids: scratch,
    [rows, vocab].
    """
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * (2 + 2 * max_top)
    x_ptr = logits_ptr + row * vocab
    ids_ptr += row * vocab
    token = tl.load(out_ptr)
    num_top = tl.load(words_ptr + row * _ROW_WORDS + _NUM_TOP)
    if (token >= 0) & (num_top >= 0):
        lse = _log_sum_exp(x_ptr, vocab)
        tl.store(out_ptr + 1, (tl.load(x_ptr + token) - lse).to(tl.int32, bitcast=True))
        if num_top > 0:
            best, _ = _likeliest(x_ptr, vocab, BLOCK)
            lowest, last = _cut(x_ptr, ids_ptr, vocab, _LOWEST_KEY, -1, False, num_top, 1.0, best, 1.0, BLOCK)
            num, _, _ = _gather(x_ptr, ids_ptr, vocab, lowest, last, lowest, False, best, 1.0, BLOCK)
            for begin in range(0, num, _TOP):
                at = begin + tl.arange(0, _TOP)
                ids = tl.load(ids_ptr + at, mask=at < num, other=0)
                x = tl.load(x_ptr + ids, mask=at < num, other=0.0)
                place = tl.zeros((_TOP,), tl.int32)
                for other_begin in range(0, num, _TOP):
                    other = other_begin + tl.arange(0, _TOP)[None, :]
                    other_ids = tl.load(ids_ptr + other, mask=other < num, other=0)
                    y = tl.load(x_ptr + other_ids, mask=other < num, other=0.0)
                    ahead = (y > x[:, None]) | ((y == x[:, None]) & (other_ids < ids[:, None]))
                    place += tl.sum((ahead & (other < num)).to(tl.int32), axis=1)
                tl.store(out_ptr + 2 + place, ids, mask=at < num)
                tl.store(out_ptr + 2 + max_top + place, (x - lse).to(tl.int32, bitcast=True), mask=at < num)


def _options() -> dict[str, Any]:
    # Left alone, ptxas spills a few registers for a second program beside it.
    return {"BLOCK": BLOCK, "num_warps": 8, "enable_fp_fusion": False, **register_limit(128)}


def scratch_bytes(num_rows: int, vocab: int) -> int:
    """Bytes of device memory that a call over so many rows works in, which are kept for the next call."""
    return 2 * num_rows * vocab * 4


_scratch: dict[torch.device, Tensor] = {}


def scratch(device: torch.device, num_rows: int, vocab: int) -> Tensor:
    """[2, num_rows, vocab] int32 to work in, the same memory at every call that needs no more."""
    size = scratch_bytes(num_rows, vocab) // 4
    if device not in _scratch or _scratch[device].numel() < size:
        _scratch[device] = torch.empty(size, dtype=torch.int32, device=device)
    return _scratch[device][:size].view(2, num_rows, vocab)


def launch(
    logits: Tensor,
    rows: npt.NDArray[np.void],
    tokens: Tensor,
    edits: npt.NDArray[np.void],
    allowed: npt.NDArray[np.int32],
    max_top: int,
) -> npt.NDArray[np.int32]:
    """See `octavo.kernels.sample`. Returns [rows, 2 + 2 * max_top] words, the one time that the host waits.

    A row: token id, its logprob, ids of the best tokens, logprobs of these.
    """
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return np.zeros((0, 2 + 2 * max_top), np.int32)
    words = np.concatenate([rows.view(np.int32), edits.view(np.int32), allowed])
    on_host = torch.from_numpy(words)
    if logits.is_cuda:
        on_host = on_host.pin_memory()  # from where a copy need not wait
    on_device = on_host.to(logits.device, non_blocking=True)
    out = torch.zeros((num_rows, 2 + 2 * max_top), dtype=torch.int32, device=logits.device)
    edited, ids = scratch(logits.device, num_rows, vocab)
    edits_at = num_rows * ROW.itemsize // 4
    allowed_at = edits_at + 2 * len(edits)
    sample_kernel[(num_rows,)](
        out,
        logits,
        on_device,
        tokens,
        edited.view(torch.float32),
        ids,
        vocab,
        edits_at,
        allowed_at,
        tokens.stride(0),
        out.stride(0),
        **_options(),
    )
    if (rows["num_top"] >= 0).any():
        logprobs_kernel[(num_rows,)](out, logits, on_device, ids, vocab, max_top, **_options())
    return out.cpu().numpy()


def variants() -> Iterator[Variant]:
    """Both kernels, with a vocabulary that vectors of floats divide and with one they do not."""
    i32, f32 = torch.int32, torch.float32
    for vocab in (49152, 50257):
        yield Variant(f"draw, {vocab}", sample_kernel, (i32, f32, i32, i32, f32, i32, vocab, 0, 0, 0, 0), _options())
        yield Variant(f"logprobs, {vocab}", logprobs_kernel, (i32, f32, i32, i32, vocab, 0), _options())
