"""What ranks hold: together the whole model, each no more than the memory functions say, read from its slices alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_tensors import tensors_of
from tqdm import tqdm

from octavo.models.checkpoint import SafetensorsCheckpoint
from octavo.models.config import ConfigError, ModelConfig, read_config
from octavo.models.llama import Llama
from octavo.models.loader import load
from octavo.models.memory import replicated_bytes, weight_bytes
from octavo.models.shard import Shard, Span, shard_model

MODELS = ["smollm2", "llama2", "llama-biases", "qwen3"]


def test_ranks_divide_what_there_is() -> None:
    for num_ranks in range(1, 9):
        for size, unit in ((8, 1), (9, 1), (1536, 16), (49152, 16), (333, 16)):
            spans = [Shard(rank, num_ranks).span(size, unit) for rank in range(num_ranks)]
            assert spans[0].begin == 0 and spans[-1].end == size
            assert all(a.end == b.begin for a, b in zip(spans, spans[1:], strict=False))
            assert all(span.begin % unit == 0 for span in spans) and len(Span(3, 7, 9) * 16) == 64
            lens = [-(-len(span) // unit) for span in spans]
            assert max(lens) - min(lens) <= 1
    for num_ranks in (1, 2, 4, 8):  # parts of a sum are the same whoever holds them
        parts = [part for rank in range(num_ranks) for part in Shard(rank, num_ranks, 8).parts]
        assert parts == [Shard(i, 8, 8) for i in range(8)]
        for rank in range(num_ranks):
            shard = Shard(rank, num_ranks, 8)
            assert shard.parts[0].span(9).begin == shard.span(9).begin
            assert shard.parts[-1].span(9).end == shard.span(9).end


def test_kv_heads_are_those_that_query_heads_need(config: Callable[[str], ModelConfig]) -> None:
    model = config("smollm2")  # 9 query heads, 3 KV heads
    by_ranks = {
        num_ranks: [
            (len(shard.heads(model)), shard.kv_heads(model).begin, len(shard.kv_heads(model)))
            for shard in Shard(0, num_ranks).peers
        ]
        for num_ranks in (2, 4, 8)
    }
    assert by_ranks[2] == [(4, 0, 2), (5, 1, 2)]
    assert by_ranks[4] == [(2, 0, 1), (2, 0, 2), (2, 1, 1), (3, 2, 1)]
    assert by_ranks[8] == [(1, 0, 1)] * 3 + [(1, 1, 1)] * 3 + [(1, 2, 1), (2, 2, 1)]


@pytest.fixture
def config(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], ModelConfig]:
    return lambda name: read_config(tiny_checkpoint(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_hold_what_is_planned(
    name: str, dtype: torch.dtype, config: Callable[[str], ModelConfig], tiny_checkpoint: Callable[[str], Path]
) -> None:
    model_config, folder = config(name), tiny_checkpoint(name)
    whole = weight_bytes(model_config, dtype)
    for num_ranks in (1, 2, 3, 4):
        allocated, read = [], []
        for rank in range(num_ranks):
            shard = shard_model(model_config, rank, num_ranks, rank_invariant=False)
            model = Llama(model_config, dtype, 16, shard)
            allocated.append(sum(tensor.nbytes for tensor in tensors_of(model)) - model.cos_sin.nbytes)
            assert allocated[-1] == weight_bytes(model_config, dtype, shard)
            read.append(load(SafetensorsCheckpoint(folder), model, tqdm(disable=True)))
        assert sum(allocated) == whole + replicated_bytes(model_config, num_ranks, dtype)
        assert max(read) < 1.4 * sum(read) / num_ranks  # none reads what is another's
    if model_config.num_heads >= 8:
        for num_ranks in (1, 2, 4, 8):
            shard = shard_model(model_config, 0, num_ranks, rank_invariant=True)
            held = sum(tensor.nbytes for tensor in tensors_of(Llama(model_config, dtype, 16, shard)))
            assert held - 4 * 16 * model_config.head_size == weight_bytes(model_config, dtype, shard)


@pytest.mark.parametrize(
    ("num_ranks", "rank_invariant", "words"),
    [
        (7, False, "the model has 6 query heads: at most 6 ranks"),
        (3, True, "need 1, 2, 4 or 8 of them, not 3"),
        (2, True, "the model has 6 query heads: too few for 8 parts of a sum"),
    ],
)
def test_ranks_that_would_have_nothing(
    num_ranks: int, rank_invariant: bool, words: str, config: Callable[[str], ModelConfig]
) -> None:
    with pytest.raises(ConfigError, match=words):
        shard_model(config("llama2"), 0, num_ranks, rank_invariant)
