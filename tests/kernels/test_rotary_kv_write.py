"""rotary_kv_write against float64: queries in place, keys and values in their slots and nowhere else."""

import pytest
import torch

from octavo.kernels import reference
from octavo.kernels.rotary_kv_write import rotary_kv_write


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "rotary_size"), [(9, 3, 64, 64), (4, 4, 80, 32), (6, 1, 16, 16)]
)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_rotate_and_write(
    tokens: int,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    rotary_size: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_size).to(dtype)
    angles = torch.rand(100, rotary_size // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(0, 100, (tokens,), dtype=torch.int32)
    slots = torch.randperm(5 * block_size)[:tokens]
    cache = torch.full((5, 2, kv_heads, block_size, head_size), 7.0, dtype=dtype)
    split = qkv.double().unflatten(1, (-1, head_size)).split([heads, kv_heads, kv_heads], dim=1)
    want_q = reference.rotary(split[0], cos_sin.double(), positions)
    want_k = reference.rotary(split[1], cos_sin.double(), positions)
    values = qkv[:, (heads + kv_heads) * head_size :].clone().unflatten(1, (kv_heads, head_size))

    rotary_kv_write(qkv, cos_sin, positions, slots, cache, heads)

    got_q = qkv[:, : heads * head_size].unflatten(1, (heads, head_size)).double()
    torch.testing.assert_close(got_q, want_q.double(), atol=tolerance, rtol=tolerance)
    blocks, offsets = slots // block_size, slots % block_size
    got_k = reference.keys(cache, blocks)[torch.arange(tokens), :, offsets].double()
    torch.testing.assert_close(got_k, want_k.double(), atol=tolerance, rtol=tolerance)
    assert torch.equal(reference.values(cache, blocks)[torch.arange(tokens), :, offsets], values)
    assert int((cache != 7.0).sum()) <= 2 * tokens * kv_heads * head_size  # nothing else was touched


def test_wrong_arguments_are_named() -> None:
    qkv, table = torch.zeros(2, 5 * 16), torch.zeros(8, 16)
    positions, slots = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    cache = torch.zeros(1, 2, 1, 16, 16)
    for arguments, words in [
        ((qkv, table, positions, slots, cache, 4), r"qkv: shape is \(2, 80\), expected \(any, 96\)"),
        ((qkv, table, positions.long(), slots, cache, 3), "positions: dtype is torch.int64"),
        ((qkv, table, positions, slots[:1], cache, 3), "slots: shape"),
        ((qkv, torch.zeros(8, 18), positions, slots, cache, 3), "cos_sin: rotary size is 18"),
        ((qkv.bfloat16(), table, positions, slots, cache, 3), "qkv: dtype is torch.bfloat16"),
    ]:
        with pytest.raises(ValueError, match=words):
            rotary_kv_write(*arguments)
