"""What each op means, in plain torch and numpy: the oracle of the tests, and the slow path without a compiler.

Same arguments as the ops of the same name; exactness over batch shapes is promised by the ops, not here.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.kernels.backend import kernels

Array = npt.NDArray[Any]


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x @ weight.T + bias + residual in float32, rounded once. x: [m, k], weight: [n, k]."""
    out = x.float() @ weight.float().T
    if bias is not None:
        out = out + bias
    if residual is not None:
        out = out + residual.float()
    return out.to(out_dtype)


def dequantize_4bit(
    codes: Tensor, table: Tensor | None, scales: Tensor, offsets: Tensor | None, shift: str | None, dtype: torch.dtype
) -> Tensor:
    """table[code] * scale, with an offset or less the zero point, rounded to float32 and then to `dtype`.

    codes: [n, k] uint8, of 4 bits; without a table the bits of int8; scales, and offsets or zero points: [n,
    k / group size]; returns [n, k].
    """
    scale = scales.double().unsqueeze(2)
    values: Tensor = codes.view(torch.int8).double() if table is None else table.double()[codes.long()]
    values = values.unflatten(1, (scales.shape[1], -1)) * scale
    if offsets is not None:
        offset = offsets.double().unsqueeze(2)
        values = values + (-(offset * scale).float() if shift == "zero" else offset)
    return values.flatten(1).float().to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x is first added to the residual, if given."""
    if residual is not None:
        x = residual.copy_(residual.float() + x.float())
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def gated_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) * up of the halves of x @ weight.T + bias. x: [m, k], weight: [n, k]; returns [m, n / 2]."""
    gate, up = matmul(x, weight, bias, None, torch.float32).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up of the halves of x."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def gelu_mul(x: Tensor) -> Tensor:
    """gelu(gate) * up of the halves of x, GELU by its tanh approximation."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(x.dtype)


def embedding(token_ids: Tensor, weight: Tensor, first_id: int = 0) -> Tensor:
    """Rows of the weight [n, k], zeros for ids outside [first_id, first_id + n)."""
    rows = token_ids.long() - first_id
    inside = (rows >= 0) & (rows < weight.shape[0])
    return weight[rows.where(inside, 0)] * inside[:, None]


CHECKSUM_WORDS = 1024  # of 32 bits in a stripe
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, a one-to-one function of int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x


def checksum_factors(device: torch.device | str = "cpu") -> Tensor:
    """[words] int64: odd numbers of 32 bits, no two alike."""
    return _mix(torch.arange(1, CHECKSUM_WORDS + 1, device=device) * _GOLDEN) & 0xFFFFFFFF | 1


def checksum(parts: Sequence[Tensor], index: Tensor | None, together: bool) -> Tensor:
    """Of each row of the parts, [rows, ...], on end, or all together: sums of weighted words, mixed and added up."""
    rows = []
    for part in parts:
        data = (part if index is None else part[index]).contiguous().flatten(1).view(torch.uint8)
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % (4 * CHECKSUM_WORDS)))
        rows.append(data.view(torch.int32).view(len(data), -1, CHECKSUM_WORDS).long() & 0xFFFFFFFF)
    words = torch.cat(rows, dim=1)
    sums = (words * checksum_factors(words.device)).sum(2)
    sums = _mix(sums + torch.arange(1, sums.shape[1] + 1, device=sums.device) * _GOLDEN).sum(1)
    if together:
        sums = _mix(sums + torch.arange(1, len(sums) + 1, device=sums.device) * _GOLDEN).sum()
    return sums


def sum_parts(parts: Tensor, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """parts: [parts, ...], added in float32 in a balanced tree; then bias and residual, shaped like one; rounded."""

    def tree(parts: Tensor) -> Tensor:
        half = len(parts) // 2
        return tree(parts[:half]) + tree(parts[half:]) if half else parts[0].float()

    total = tree(parts)
    for added in (bias, residual):
        if added is not None:
            total = total + added.float()
    return total.to(out_dtype)


def rotary(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """The rotated heads. x: [tokens, heads, head_size]; cos_sin: [max_positions, rotary_size]."""
    size = cos_sin.shape[1]
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    a, b = x[..., :size].float().chunk(2, dim=-1)
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), x[..., size:]], dim=-1)


def tiles(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer's cache, [num_blocks, 2, num_kv_heads, block_size, head_size], as views in groups.

    K is [num_blocks, num_kv_heads, head_size / step, block_size, step], V is [num_blocks, num_kv_heads,
    block_size / step, head_size, step]. For Triton's kernels a cache is as plain as its shape, and step is 1; for the
    others a tile's bytes lie in the order of these views, and step is 2 in bfloat16.
    """
    num_blocks, _, num_kv_heads, block_size, head_size = kv_cache.shape
    if kernels() == "triton":
        return kv_cache[:, 0].mT.unsqueeze(4), kv_cache[:, 1].unsqueeze(4)
    step = 2 if kv_cache.dtype == torch.bfloat16 else 1
    k = kv_cache[:, 0].view(num_blocks, num_kv_heads, head_size // step, block_size, step)
    v = kv_cache[:, 1].view(num_blocks, num_kv_heads, block_size // step, head_size, step)
    return k, v


def keys(kv_cache: Tensor, blocks: Tensor) -> Tensor:
    """Keys of some blocks, in plain order: [blocks, num_kv_heads, block_size, head_size]."""
    return tiles(kv_cache)[0][blocks].permute(0, 1, 3, 2, 4).flatten(3)


def values(kv_cache: Tensor, blocks: Tensor) -> Tensor:
    """Values of some blocks, in plain order: [blocks, num_kv_heads, block_size, head_size]."""
    return tiles(kv_cache)[1][blocks].permute(0, 1, 2, 4, 3).flatten(2, 3)


QUANTISED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the greatest value a quantised cache stores


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in `dtype`, to nearest even and saturated, and scale = absmax / greatest value of each row, float32."""
    scale = x.float().abs().amax(-1, keepdim=True) / QUANTISED_MAX[dtype]
    stored = torch.where(scale == 0, 0.0, x.float() / scale).clamp(-QUANTISED_MAX[dtype], QUANTISED_MAX[dtype])
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scale.squeeze(-1)


def rotary_kv_write(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv_cache: Tensor,
    num_heads: int,
    kv_scales: Tensor | None = None,
) -> None:
    """Rotate queries and keys in place, write keys and values to their slots; negative ones are nobody's."""
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    rows = (slots >= 0).nonzero().squeeze(1)
    slots = slots[rows]
    heads = qkv[rows].unflatten(1, (-1, head_size))
    rotated = heads[:, : num_heads + num_kv_heads]
    rotated.copy_(rotary(rotated, cos_sin, positions[rows]))
    qkv[rows] = heads.flatten(1)
    _, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)  # [tokens, num_kv_heads, head_size]
    blocks, offsets = slots // block_size, slots % block_size
    if kv_scales is not None:
        k, kv_scales[blocks, 0, :, offsets] = quantise(k, kv_cache.dtype)
        v, kv_scales[blocks, 1, :, offsets] = quantise(v, kv_cache.dtype)
    k_tiles, v_tiles = tiles(kv_cache)
    step = k_tiles.shape[-1]
    k_tiles[blocks, :, :, offsets] = k.unflatten(2, (-1, step))
    v_tiles[blocks, :, offsets // step, :, offsets % step] = v


def paged_attention(
    qkv: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    token_begins: Tensor,
    context_lens: Tensor,
    num_heads: int,
    scale: float,
    window: int,
    compute_dtype: torch.dtype = torch.float32,
    *,
    group_size: int | None = None,
    first_head: int = 0,
    kv_scales: Tensor | None = None,
    soft_cap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Causal attention over paged KV, one sequence at a time. Returns [tokens, num_heads * head_size]."""
    _, _, num_kv_heads, block_size, head_size = kv_cache.shape
    out = torch.empty((qkv.shape[0], num_heads, head_size), dtype=qkv.dtype, device=qkv.device)
    kv_heads = torch.arange(first_head, first_head + num_heads) // (group_size or num_heads // num_kv_heads)
    for s, length in enumerate(context_lens.tolist()):
        begin, end = int(token_begins[s]), int(token_begins[s + 1])
        blocks = block_tables[s, : -(-length // block_size)].long()
        k, v = keys(kv_cache, blocks).to(compute_dtype), values(kv_cache, blocks).to(compute_dtype)
        if kv_scales is not None:
            k, v = (x * kv_scales[blocks, i].to(compute_dtype).unsqueeze(3) for i, x in enumerate((k, v)))
        k, v = (x.transpose(0, 1).flatten(1, 2)[kv_heads, :length] for x in (k, v))  # [num_heads, length, head_size]
        q = qkv[begin:end, : num_heads * head_size].view(-1, num_heads, head_size)
        scores = torch.einsum("thd,hkd->thk", q.to(compute_dtype), k) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        age = torch.arange(length - (end - begin), length)[:, None] - torch.arange(length)[None, :]
        visible = (age >= 0) & (age < window if window else torch.ones_like(age, dtype=torch.bool))
        scores = scores.masked_fill(~visible[:, None, :].to(qkv.device), float("-inf"))
        if lse is not None:
            lse[begin:end] = scores.logsumexp(dim=-1)
        weights = scores.softmax(dim=-1)
        out[begin:end] = torch.einsum("thk,hkd->thd", weights, v).to(out.dtype)
    return out.flatten(1)


def philox(counter: Array, key: int) -> Array:
    """Philox-4x32-10 (Salmon et al., SC 2011). counter: [..., 4] uint32; returns the same shape."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1, low = key & 0xFFFFFFFF, key >> 32, np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k0), p1 & low, high0 ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words: Array = np.stack(c, axis=-1).astype(np.uint32)
    return words


def noise(token_ids: Array, output_index: int, choice_index: int, seed: int) -> Array:
    """-log(E) of each token, E exponential: what the draw adds to logit / T."""
    counter = np.zeros((len(token_ids), 4), np.uint32)
    counter[:, 0] = token_ids // 4
    counter[:, 1] = output_index
    counter[:, 2] = choice_index
    words = philox(counter, seed)[np.arange(len(token_ids)), token_ids % 4]
    u = ((words >> np.uint32(9)).astype(np.float64) + 0.5) / 2.0**23
    gumbel: Array = -np.log(-np.log(u))
    return gumbel


def edited(logits: Array, row: Any, tokens: Array, edits: Array, allowed: Array, with_bans: bool = True) -> Array:
    """The logits of one row after penalties, edits and the allowed set. Bans that leave nothing are dropped."""
    x = logits.astype(np.float64)
    seen = np.unique(tokens[: row["total_len"]])
    penalty = float(row["repetition_penalty"])
    x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    ids, counts = np.unique(tokens[row["prompt_len"] : row["total_len"]], return_counts=True)
    x[ids] -= float(row["presence_penalty"]) + float(row["frequency_penalty"]) * counts
    for edit in edits[row["edits_begin"] : row["edits_end"]]:
        if with_bans or edit["add"] > -np.inf:
            x[edit["id"]] += edit["add"]
    only = allowed[row["allowed_begin"] : row["allowed_end"]]
    if len(only):
        masked = np.full_like(x, -np.inf)
        masked[only] = x[only]
        x = masked
    if with_bans and x.max() == -np.inf:
        return edited(logits, row, tokens, edits, allowed, with_bans=False)
    return x


def survivors(x: Array, row: Any) -> Array:
    """Token ids left by top-k, then top-p among those, then min-p; best first, lowest id first among equals."""
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[x[order] > -np.inf]
    if 0 < row["top_k"] < len(x):
        order = order[: row["top_k"]]
    weights = np.exp((x[order] - x[order[0]]) / float(row["temperature"]))
    if row["top_p"] < 1:
        before = np.cumsum(weights) - weights  # mass of the tokens ahead of each
        keep = before < float(row["top_p"]) * weights.sum()
        order, weights = order[keep], weights[keep]
    left: Array = order[weights >= float(row["min_p"])]
    return left


def sample(
    logits: Array, rows: Array, tokens: Array, edits: Array, allowed: Array, max_top: int
) -> tuple[Array, Array, Array, Array]:
    """See `octavo.kernels.sample`: token ids [rows], logprobs [rows], top ids and top logprobs [rows, max_top]."""
    token_ids = np.empty(len(rows), np.int32)
    logprobs = np.zeros(len(rows), np.float32)
    top_ids = np.zeros((len(rows), max_top), np.int32)
    top_logprobs = np.zeros((len(rows), max_top), np.float32)
    for r, row in enumerate(rows):
        raw = logits[r].astype(np.float64)
        if np.isnan(raw).any() or not np.isfinite(raw.max()):
            token_ids[r] = -1
            continue
        if row["target"] >= 0:
            token_ids[r] = row["target"]
        else:
            x = edited(logits[r], row, tokens[row["slot"]], edits, allowed)
            if x.max() == -np.inf:
                token_ids[r] = allowed[row["allowed_begin"]]
            elif row["temperature"] == 0:
                token_ids[r] = x.argmax()
            else:
                ids = survivors(x, row)
                index = int(row["total_len"] - row["prompt_len"])
                score = x[ids] / float(row["temperature"])
                score = score + noise(ids, index, int(row["choice_index"]), int(row["seed"]))
                token_ids[r] = ids[np.lexsort((ids, -score))[0]]
        if row["num_top"] >= 0:
            raw = raw - (raw.max() + np.log(np.exp(raw - raw.max()).sum()))
            logprobs[r] = raw[token_ids[r]]
            best = np.lexsort((np.arange(len(raw)), -raw))[: row["num_top"]]
            top_ids[r, : len(best)] = best
            top_logprobs[r, : len(best)] = raw[best]
    return token_ids, logprobs, top_ids, top_logprobs
