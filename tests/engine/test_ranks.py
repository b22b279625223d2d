"""Groups of ranks beside a rank alone: the same tokens, the same bits in any batch, with `ranks` whatever their number.

Ranks are threads here; as processes they are in `test_end_to_end.py`.
"""

import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rank_threads import engine_of

from octavo.kernels import backend
from octavo.server.config import EngineConfig
from octavo.server.engine.engine import Engine
from octavo.server.engine.peers import Place
from octavo.server.engine.request import GenerationRequest, SamplingParams
from octavo.server.engine.scheduler import Scheduler
from octavo.server.errors import StartupError

pytestmark = pytest.mark.skipif(backend.kernels() != "native", reason="threads share no memory without native kernels")

NUM_TOKENS, KV_BYTES = 30, 4 << 20
Output = list[tuple[int, bytes]]  # token id, the bits of its logprob and of the top ones


@pytest.fixture
def config(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., EngineConfig]:
    def make(name: str, num_ranks: int, **options: object) -> EngineConfig:
        folder = str(tiny_checkpoint(name))
        sizes = {
            "max_model_len": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "kv_cache_memory_bytes": 4 << 20,
        }
        return EngineConfig(folder, device="cpu", tensor_parallel_size=num_ranks, **{**sizes, **options})  # type: ignore[arg-type]

    return make


def requests() -> list[GenerationRequest]:
    """Greedy and seeded, with and without options, one with choices, one that scores its prompt."""
    rng = random.Random(0)
    options: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2**63},
        {"temperature": 0.0, "prompt_logprobs": 1},
        {"temperature": 0.9, "presence_penalty": 0.5, "repetition_penalty": 1.1, "seed": 4},
    ]
    return [
        GenerationRequest(
            f"r{i}",
            [rng.randrange(320) for _ in range(length)],
            SamplingParams(max_tokens=NUM_TOKENS, logprobs=2, **options[i % 5]),  # type: ignore[arg-type]
            n=2 if i == 2 else 1,
        )
        for i, length in enumerate([1, 16, 17, 33, 64, 100, 150])
    ]


def run(engine: Engine, which: Iterable[GenerationRequest]) -> dict[tuple[str, int], Output]:
    """All outputs of requests that are added at once."""
    out: dict[tuple[str, int], Output] = {}
    for request in which:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            assert delta.finish_reason != "error"
            for entry in [*(delta.prompt_logprobs or [])[1:], *(delta.logprobs or [])]:
                assert entry is not None
                values = [entry.logprob, *(value for pair in entry.top for value in pair)]
                bits = struct.pack(f"<{len(values)}d", *values)
                out.setdefault((delta.request_id, delta.choice_index), []).append((entry.token_id, bits))
    engine.scheduler.check()
    return out


def tokens(outputs: dict[tuple[str, int], Output]) -> dict[tuple[str, int], list[int]]:
    return {key: [token for token, _ in output] for key, output in outputs.items()}


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "mistral", "llama-biases"])
def test_ranks_say_what_one_says(name: str, config: Callable[..., EngineConfig]) -> None:
    with engine_of(config(name, 1, dtype="float32")) as engine:
        want = tokens(run(engine, requests()))
    assert len(want) == 8
    for num_ranks in (2, 3, 4):
        with engine_of(config(name, num_ranks, dtype="float32")) as engine:
            assert tokens(run(engine, requests())) == want, num_ranks
            assert len(engine.info.ranks) == num_ranks


def test_at_three_ranks_bits_do_not_depend_on_the_batch(config: Callable[..., EngineConfig]) -> None:
    with engine_of(config("smollm2", 3, dtype="bfloat16")) as engine:

        def reset(budget: int = 64, num_blocks: int = 100, caching: bool = False) -> None:
            """Another scheduler, as if steps went on being counted."""
            steps = engine.scheduler._num_planned_steps
            engine.scheduler = Scheduler(
                num_blocks=num_blocks,
                block_size=16,
                max_num_seqs=8,
                max_num_batched_tokens=budget,
                max_model_len=256,
                enable_prefix_caching=caching,
            )
            engine.scheduler._num_planned_steps = engine.scheduler._step = steps

        alone: dict[tuple[str, int], Output] = {}
        for request in requests():
            reset()
            alone |= run(engine, [request])
        for budget in (16, 64):
            reset(budget)
            assert run(engine, requests()) == alone, budget
        reset(caching=True)
        for _ in range(2):
            assert run(engine, requests()) == alone
        assert engine.stats().prefix_cache_hits > 100
        reset(num_blocks=20)
        assert run(engine, requests()) == alone
        assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("counts", [(1, 2, 4), pytest.param((1, 8), marks=pytest.mark.slow)])
def test_bits_that_do_not_depend_on_the_number_of_ranks(
    counts: tuple[int, ...], config: Callable[..., EngineConfig]
) -> None:
    found = []
    for num_ranks in counts:
        with engine_of(config("smollm2", num_ranks, dtype="bfloat16", exactness="ranks")) as engine:
            found.append(run(engine, requests()))
    assert all(outputs == found[0] for outputs in found)


@pytest.mark.parametrize(
    ("num_ranks", "options", "words"),
    [
        (7, {}, "--tensor-parallel-size is 7: the model has 6 query heads: at most 6 ranks"),
        (3, {"exactness": "ranks"}, "need 1, 2, 4 or 8 of them, not 3"),
        (2, {"kv_cache_memory_bytes": 1 << 50}, "too little memory"),
    ],
)
def test_a_group_that_cannot_be(
    num_ranks: int, options: dict[str, object], words: str, config: Callable[..., EngineConfig]
) -> None:
    with pytest.raises(StartupError, match=words):
        Engine(config("llama2", num_ranks, **options), Place(0, num_ranks))
