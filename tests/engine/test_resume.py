"""A run that is cut and goes on in a fresh engine, from what the journal has, gives the bits of the undisturbed run."""

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.kernels.sample import Sampled
from octavo.server.config import EngineConfig
from octavo.server.engine import runner
from octavo.server.engine.engine import Engine
from octavo.server.engine.journal import Journal
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs
from octavo.server.engine.scheduler import Scheduler

NUM_TOKENS = 12
MAX_LEN = 256
Outputs = dict[tuple[str, int], list[object]]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[[str], Path]) -> Engine:
    folder = tiny_checkpoint("smollm2")
    return Engine(EngineConfig(str(folder), device="cpu", max_model_len=MAX_LEN, kv_cache_memory_bytes=4 << 20))


def requests() -> list[GenerationRequest]:
    """Every option that looks at more than the last token, or is sent only once."""
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=3)
    seeded = replace(greedy, temperature=1.0, seed=11)
    kinds = {
        "greedy": (greedy, 1),
        "seeded": (seeded, 1),
        "choices": (replace(seeded, top_p=0.9, min_p=0.01), 3),
        "penalties": (
            replace(seeded, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4, temperature=0.6),
            2,
        ),
        "prompt": (replace(seeded, prompt_logprobs=2), 2),
        "min_tokens": (
            replace(
                seeded, min_tokens=NUM_TOKENS - 3, eos_token_ids=(5,), stop_token_ids=tuple(range(6, 310)), top_k=4
            ),
            1,
        ),
        "bad_words": (replace(greedy, bad_words=((9,), (4, 8), *(((i, i)) for i in range(320)))), 1),
        "bias": (replace(seeded, logit_bias=((17, 4.0), (18, -2.0)), allowed_token_ids=tuple(range(10, 40))), 1),
    }
    rng = random.Random(3)
    lens = [1, 15, 16, 33, 100, 40, 70, 3]
    return [
        GenerationRequest(name, [rng.randrange(320) for _ in range(length)], params, n)
        for length, (name, (params, n)) in zip(lens, kinds.items(), strict=True)
    ]


def fresh(engine: Engine) -> None:
    """As a new process has it: no request is known, no block is cached, and the KV cache holds something else."""
    engine.scheduler = Scheduler(
        num_blocks=64,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=MAX_LEN,
        enable_prefix_caching=True,
    )
    for kv_cache in engine.runner.kv_caches:
        kv_cache.fill_(3.0)


def bits(logprobs: TokenLogprobs | None) -> bytes:
    if logprobs is None:
        return b""
    values = [logprobs.token_id, logprobs.logprob, *(value for pair in logprobs.top for value in pair)]
    return struct.pack(f"<{len(values)}d", *values)


def run(engine: Engine, cuts: set[int]) -> Outputs:
    """What the front end has in the end of all that a stream shows; the engine is lost after each step in `cuts`."""
    journal, outputs = Journal(), Outputs()

    def receive(delta: Delta) -> None:
        assert journal.commit(journal.epoch, delta)
        assert (delta.scheduled_s is None) == (delta.start > 0)
        output = outputs.setdefault((delta.request_id, delta.choice_index), [])
        output += zip(delta.token_ids, map(bits, delta.logprobs or []), strict=True)
        if delta.prompt_logprobs is not None:
            output.append(list(map(bits, delta.prompt_logprobs)))
        if delta.finish_reason is not None:
            output.append((delta.finish_reason, delta.stop_token_id))

    fresh(engine)
    for request in requests():
        journal.open(request)
        engine.add(request)
    step = 0
    while engine.has_work:
        for delta in engine.step():
            receive(delta)
        step += 1
        if step in cuts:
            fresh(engine)
            for entry in journal.entries.values():
                if entry.open_choices:
                    engine.add(entry.request, entry.unfinished())
    engine.scheduler.check()
    assert not any(entry.open_choices for entry in journal.entries.values())
    return outputs


@pytest.fixture(scope="module")
def undisturbed(engine: Engine) -> Outputs:
    outputs = run(engine, set())
    assert len(outputs) == 12 and len({repr(output) for output in outputs.values()}) == 12
    assert any(len(output) <= NUM_TOKENS for output in outputs.values()), "none stops early"
    return outputs


def test_cut_after_any_step(engine: Engine, undisturbed: Outputs) -> None:
    for cut in range(1, 40):
        assert run(engine, {cut}) == undisturbed, cut


def test_cut_again_and_again(engine: Engine, undisturbed: Outputs) -> None:
    assert run(engine, set(range(7, 200, 7))) == undisturbed


def test_what_is_committed_is_not_computed_for_its_logprobs_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh(engine)
    scored: list[int] = []
    sample_rows = engine.runner._sample_rows

    def watched(hidden: torch.Tensor, rows: np.ndarray, *options: np.ndarray) -> Sampled | None:
        scored.append(len(rows))
        return sample_rows(hidden, rows, *options)

    monkeypatch.setattr(engine.runner, "_sample_rows", watched)
    engine.add(requests()[4], {0: [3], 1: [4, 5]})
    while engine.has_work:
        assert all(delta.prompt_logprobs is None for delta in engine.step())
    assert sum(scored) == 2 * NUM_TOKENS - 3


def test_an_exception_in_one_request_s_edits_fails_it_alone(
    engine: Engine, undisturbed: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    banned = runner._banned

    def breaks(params: SamplingParams, output: np.ndarray) -> list[tuple[int, float]]:
        if params.bad_words and len(output) == 3:
            raise KeyError("planted")
        return banned(params, output)

    monkeypatch.setattr(runner, "_banned", breaks)
    outputs = run(engine, set())
    failed = outputs.pop(("bad_words", 0))
    assert failed == [*undisturbed["bad_words", 0][:3], (FinishReason.ERROR, None)]
    assert outputs == {key: output for key, output in undisturbed.items() if key[0] != "bad_words"}
