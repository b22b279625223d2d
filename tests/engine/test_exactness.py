"""Contract 3 on the default model in bfloat16: a request's bits do not depend on what else happens to the engine."""

import random
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest

from octavo.server.config import EngineConfig
from octavo.server.engine.engine import Engine
from octavo.server.engine.request import FinishReason, GenerationRequest, SamplingParams
from octavo.server.engine.scheduler import Scheduler

MAX_LEN = 640
NUM_TOKENS = 24
Output = list[tuple[int, bytes]]  # token id, the bits of its logprob and of the top ones


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    config = EngineConfig(model=str(smollm2), device="cpu", dtype="bfloat16", max_model_len=MAX_LEN, max_num_seqs=20)
    return Engine(config)


def requests() -> list[GenerationRequest]:
    """20 requests: greedy and seeded, with and without options, prompts of 1 to 600 tokens, two with choices."""
    rng = random.Random(0)
    lens = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 80, 100, 127, 128, 129, 200, 300, 400, 512, 600]
    options: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2**63},
        {"temperature": 1.3, "top_k": 40, "min_p": 0.02, "seed": 3},
        {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "seed": 4},
    ]
    return [
        GenerationRequest(
            f"r{i}",
            [rng.randrange(100, 49152) for _ in range(length)],
            SamplingParams(max_tokens=NUM_TOKENS, logprobs=3, **options[i % 5]),  # type: ignore[arg-type]
            n=2 if i in (7, 13) else 1,
        )
        for i, length in enumerate(lens)
    ]


def reset(engine: Engine, *, budget: int = 512, num_blocks: int = 800, caching: bool = False) -> None:
    """A new scheduler over the same model and memory: an empty prefix cache, other limits."""
    engine.scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=16,
        max_num_seqs=20,
        max_num_batched_tokens=budget,
        max_model_len=MAX_LEN,
        enable_prefix_caching=caching,
    )


def run(engine: Engine, which: Iterable[GenerationRequest]) -> dict[tuple[str, int], Output]:
    """All outputs of requests that are added at once."""
    out: dict[tuple[str, int], Output] = {}
    for request in which:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            assert delta.finish_reason in (None, FinishReason.LENGTH)
            for token_id, logprobs in zip(delta.token_ids, delta.logprobs or [], strict=True):
                values = [logprobs.logprob, *(value for pair in logprobs.top for value in pair)]
                bits = struct.pack(f"<{len(values)}d", *values)
                out.setdefault((delta.request_id, delta.choice_index), []).append((token_id, bits))
    engine.scheduler.check()
    return out


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[tuple[str, int], Output]:
    """Each request by itself on an empty engine."""
    out: dict[tuple[str, int], Output] = {}
    for request in requests():
        reset(engine)
        out |= run(engine, [request])
    assert len(out) == 22 and all(len(tokens) == NUM_TOKENS for tokens in out.values())
    assert len({tuple(token for token, _ in tokens) for tokens in out.values()}) > 15
    return out


@pytest.mark.parametrize("budget", [16, 64, 512])
def test_full_batch_and_prefill_chunks(engine: Engine, alone: dict[tuple[str, int], Output], budget: int) -> None:
    reset(engine, budget=budget)
    assert run(engine, requests()) == alone


def test_prefix_hits(engine: Engine, alone: dict[tuple[str, int], Output]) -> None:
    reset(engine, caching=True)
    assert run(engine, requests()) == alone
    hits = engine.stats().prefix_cache_hits
    assert run(engine, requests()) == alone
    assert engine.stats().prefix_cache_hits - hits > 2000


def test_forced_preemption(engine: Engine, alone: dict[tuple[str, int], Output]) -> None:
    reset(engine, num_blocks=48)
    assert run(engine, requests()) == alone
    assert engine.stats().num_preemptions >= 3


def test_neighbours_that_come_and_go(engine: Engine, alone: dict[tuple[str, int], Output]) -> None:
    reset(engine, budget=100, caching=True)
    rng = random.Random(1)
    mine = requests()
    waiting = list(mine)
    out: dict[tuple[str, int], list[int]] = {}
    for step in range(2000):
        if waiting and step % 3 == 0:
            engine.add(waiting.pop(0))
        if step % 5 == 0:
            prompt = [rng.randrange(49152) for _ in range(rng.randrange(1, 90))]
            engine.add(GenerationRequest(f"n{step}", prompt, SamplingParams(max_tokens=30, seed=step)))
        if step % 20 == 19:
            engine.abort(f"n{step - 4}")
        for delta in engine.step():
            for token_id in delta.token_ids:
                out.setdefault((delta.request_id, delta.choice_index), []).append(token_id)
        if not waiting and all(len(out.get((r.request_id, 0), [])) == NUM_TOKENS for r in mine):
            break
    for key, tokens in alone.items():
        assert out[key] == [token for token, _ in tokens], key
