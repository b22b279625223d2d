"""What launchers allocate is what the memory plan counts."""

from typing import Any

import pytest
import torch
from tiny_models import TINY

from octavo.kernels import backend
from octavo.kernels.backend import device
from octavo.kernels.gpu import paged_attention as gpu
from octavo.kernels.gpu.paged_attention import partial_bytes
from octavo.models.config import parse_config
from octavo.models.memory import LOGITS_ROWS, workspace_bytes


class Launches:
    """Stands in for a kernel: keeps the arguments, launches nothing."""

    def __init__(self) -> None:
        self.args: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **_: self.args.append(args)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_results_of_attention(dtype: torch.dtype, num_kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_heads, head_size, max_context_len = 8, 64, 5000
    launches = Launches()
    monkeypatch.setattr(gpu, "num_processors", lambda _: 8)
    monkeypatch.setattr(gpu, "attend_kernel", launches)
    monkeypatch.setattr(gpu, "merge_kernel", Launches())
    cache = torch.empty((1, 2, num_kv_heads, 16, head_size), dtype=dtype, device=device())
    found = []
    for num_tokens, num_sequences in [(n, 1) for n in range(1, 130)] + [(n, n) for n in range(1, 40)]:
        rows = torch.empty((num_tokens, (num_heads + 2 * num_kv_heads) * head_size), dtype=dtype, device=device())
        ints = torch.empty((num_sequences, 313), dtype=torch.int32, device=device())
        lens = (num_tokens // num_sequences, max_context_len)
        out = rows[:, : num_heads * head_size]
        gpu.launch(
            out, None, rows, cache, None, ints, ints, ints, num_heads, num_heads // num_kv_heads, 0, 1.0, 0, 0.0, *lens
        )
        _, _, partials, stats, *_ = launches.args.pop()
        if partials is not out:
            most = partial_bytes(dtype, num_tokens, num_heads, head_size, max_context_len)
            assert partials.nbytes + stats.nbytes <= most
            found.append(partials.nbytes + stats.nbytes)
    bound = partial_bytes(dtype, 1000, num_heads, head_size, max_context_len)
    assert bound / 2 <= max(found) <= bound
    assert partial_bytes(dtype, 1000, num_heads, head_size, 1024) == 0


def test_what_products_of_the_vendor_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of every token, in graphs and beside them, and rounded logits, which no graph computes."""
    config = parse_config(TINY | {"architectures": ["LlamaForCausalLM"]})
    planned = {}
    for exact in (True, False):
        monkeypatch.setattr(backend, "_exact", exact)
        planned[exact] = workspace_bytes(config, 100, 5000, torch.bfloat16)
    gates, logits = 2 * 100 * 2 * config.intermediate_size, LOGITS_ROWS * config.vocab_size
    assert planned[False] - planned[True] == 2 * (gates + logits)
