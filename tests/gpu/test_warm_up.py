"""Warm-up launches every form of every kernel: none is compiled while requests wait."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from gpu.compile_matrix import ops

from octavo.kernels import backend
from octavo.kernels.gpu import paged_attention
from octavo.models.config import parse_config
from octavo.models.llama import Llama
from octavo.server.engine.plan import NewChoice, StepPlan
from octavo.server.engine.request import SamplingParams
from octavo.server.engine.runner import Runner

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="of compiled kernels only")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 321,  # odd: what is laid out in rows of it begins at addresses of every kind
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2400,
    "attention_bias": True,
}
MAX_TOKENS, MAX_SEQS, MAX_LEN = 150, 40, 2400  # tiles of attention and of products differ below, contexts have pieces


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> dict[str, None]:
    """Of the kernels that are launched meanwhile, in order. None is compiled or executed: outputs stay as they are."""
    found: dict[str, None] = {}

    def note(*, key: str, fn: Any, **_: object) -> bool:
        found[f"{fn.name} {key}"] = None
        return True  # not to be compiled

    if backend.device().type == "cpu":
        monkeypatch.setattr(paged_attention, "num_processors", lambda _: 132)
    for module in ops().values():
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    return found


def plan(starts: list[int], nums: list[int], params: SamplingParams) -> StepPlan:
    """A step in which each choice, all in the same blocks, computes so many tokens from there on."""
    slots = list(range(len(starts)))
    ends = [start + num for start, num in zip(starts, nums, strict=True)]
    scores = params.prompt_logprobs is not None
    choices = [NewChoice(slot, 0, [0] * end, end, params, scores) for slot, end in zip(slots, ends, strict=True)]
    blocks = [(slot, list(range(-(-end // 16)))) for slot, end in zip(slots, ends, strict=True)]
    return StepPlan(0, 0, choices, blocks, slots, starts, nums, [True] * len(slots))


def mixed_steps() -> Iterator[StepPlan]:
    """Of few and many choices, few and many tokens each, behind short and long contexts, with options or not."""
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    scored = SamplingParams(max_tokens=1, logprobs=3, prompt_logprobs=2, top_k=5, presence_penalty=1.0)
    for context in (0, 1, 16, 1000, 1040, 2050):
        for num in (1, 2, 4, 5, 6, 7, 10, 11, 15, 16, 17, 33, 64, 65, 127, 128, 129, 149):
            yield plan([context], [num], scored if num in (1, 17, 65) else greedy)
            yield plan([context] * 2, [num, 1], greedy)
        for num_choices in (3, 4, 5, 16, 17, 39, 40):
            yield plan([context] * num_choices, [1] * num_choices, scored if context == 16 else greedy)
            yield plan([context] * num_choices, [3] * num_choices, greedy)


@pytest.mark.parametrize("use_graphs", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_warm_up_launches_every_form_that_steps_do(
    dtype: torch.dtype, use_graphs: bool, forms: dict[str, None]
) -> None:
    with torch.no_grad():
        runner = Runner(
            Llama(parse_config(CONFIG), dtype, MAX_LEN),
            num_blocks=MAX_LEN // 16,
            block_size=16,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=MAX_TOKENS,
            max_model_len=MAX_LEN,
            use_graphs=use_graphs,
        )
        runner.compile_kernels()
        runner.warm_up(MAX_TOKENS)
        warm = list(forms)
        for step in mixed_steps():
            runner.execute(step)
    assert list(forms) == warm
    assert len([form for form in warm if "attend_kernel" in form]) == (4 if dtype == torch.bfloat16 else 2)
