"""Bits that change by themselves are found, by the rank that has them, and nothing is found where none has changed."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_threads import engine_of

from octavo.kernels import backend
from octavo.kernels.cpu.library import reads_compressed
from octavo.models.config import read_config
from octavo.models.llama import Llama
from octavo.models.memory import weight_bytes
from octavo.models.resident import resident_tensors
from octavo.server.config import EngineConfig
from octavo.server.engine import integrity
from octavo.server.engine.bit_flips import BitFlips, flip_bit
from octavo.server.engine.engine import Engine, Rank
from octavo.server.engine.integrity import Corruption, WeightScrub
from octavo.server.engine.progress import FINDING_BYTES, Finding, Progress
from octavo.server.engine.request import GenerationRequest, SamplingParams
from octavo.server.engine.runner import Runner

SIZES = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 4 << 20}


@pytest.fixture
def config(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., EngineConfig]:
    def make(name: str = "smollm2", num_ranks: int = 1, **options: object) -> EngineConfig:
        folder = str(tiny_checkpoint(name))
        return EngineConfig(folder, device="cpu", tensor_parallel_size=num_ranks, **{**SIZES, **options})  # type: ignore[arg-type]

    return make


@pytest.fixture(autouse=True)
def runners(monkeypatch: pytest.MonkeyPatch) -> list[Runner]:
    """Those of all ranks, which are threads."""
    made: list[Runner] = []
    load = Rank.load

    def loaded(rank: Rank, *args: Any) -> Runner:
        made.append(load(rank, *args))
        return made[-1]

    monkeypatch.setattr(Rank, "load", loaded)
    return made


def greedy(name: str, prompt: list[int], max_tokens: int = 8) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[int]]:
    """The tokens of requests that are added at once; of choices but the first by another name."""
    found: dict[str, list[int]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            name = delta.request_id + (f" {delta.choice_index}" if delta.choice_index else "")
            found.setdefault(name, []).extend(delta.token_ids)
    engine.scheduler.check()
    return found


@pytest.mark.parametrize("name", ["smollm2", "llama-biases", "qwen3"])
def test_all_of_a_model_is_looked_at(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    model = Llama(read_config(tiny_checkpoint(name)), torch.bfloat16, 64)
    tensors = resident_tensors(model)
    assert sum(tensor.nbytes for tensor in tensors.values()) == (
        weight_bytes(model.config, torch.bfloat16) + model.cos_sin.nbytes
    )
    assert "layers[2].mlp.down.weights[0].data" in tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_of_an_engine_what_is_held_is_known(dtype: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Which may be less than was planned, since weights are compressed where that pays."""
    engine = Engine(EngineConfig(model=str(tiny_checkpoint("smollm2")), dtype=dtype, device="cpu"))
    model = engine.runner.model
    held = sum(tensor.nbytes for tensor in resident_tensors(model).values()) - model.cos_sin.nbytes
    assert held == engine.info.weight_bytes
    assert (held < weight_bytes(model.config, model.dtype)) == (dtype == "bfloat16" and reads_compressed())


@pytest.mark.parametrize("size", [8, 100, 4096, 4097, 10_000])
def test_a_flip_anywhere_is_found_within_a_round(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "SLICE_BYTES", 4096)
    rng = random.Random(size)
    tensors = {"a": torch.zeros(size, dtype=torch.uint8), "b": torch.ones(7, dtype=torch.float32)}
    scrub = WeightScrub(tensors, 0.5)
    for _ in range(2 * scrub.num_slices):
        scrub.check_next()
    for name, tensor in tensors.items():
        before = tensor.clone()
        bit = flip_bit(tensor, rng)
        begin = bit // 8 // 4096 * 4096
        with pytest.raises(Corruption, match=f"^{name} has changed, within bytes {begin} to ") as found:
            for _ in range(scrub.num_slices):
                scrub.check_next()
        assert found.value.detector == "weights"
        tensor.copy_(before)


def test_scrubbing_takes_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    scrub = WeightScrub({"a": torch.zeros(8)}, 0.1)

    def check() -> None:
        nonlocal now_s
        now_s += 0.001

    monkeypatch.setattr(scrub, "check_next", check)
    for _ in range(1000):
        now_s += 0.005
        scrub.run()
    assert scrub.seconds / now_s == pytest.approx(0.1, rel=0.02)
    before_s = scrub.seconds
    now_s += 3600.0  # nothing is made up for
    scrub.run()
    assert scrub.seconds - before_s < 0.03
    off = WeightScrub({"a": torch.zeros(8)}, 0.0)
    off.run()
    assert off.num_slices == 0


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_an_engine_ends_over_a_flip_in_its_weights(config: Callable[..., EngineConfig], quantization: str) -> None:
    with engine_of(config("llama2", weight_scrub=0.5, quantization=quantization)) as engine:
        flips = BitFlips(engine.runner, seed=1)
        run(engine, greedy("a", [5, 6, 7]))
        assert engine.stats().weight_slices_checked > 0 and engine.stats().weight_check_s > 0
        name = flips.weights()
        with pytest.raises(Corruption) as found:
            for _ in range(1000):
                run(engine, greedy("b", [5, 6, 7]))
        assert str(found.value).startswith(f"{name} has changed")


def test_a_cached_block_that_has_changed_is_not_served(config: Callable[..., EngineConfig]) -> None:
    prompt = [7 * i % 320 for i in range(100)]
    with engine_of(config(weight_scrub=0.0)) as engine:
        want = run(engine, greedy("a", prompt))["a"]
        cached = engine.scheduler._cache.match(engine.scheduler._cache._blocks)
        assert len(cached) == 6 and engine.runner.kv_checksums is not None
        flips = BitFlips(engine.runner, seed=3)
        for number in range(1, 5):
            engine.runner.kv_checksums._checked_at[:] = -10_000  # long ago
            flips.kv(cached[:5])
            assert run(engine, greedy(f"b{number}", prompt)) == {f"b{number}": want}
            assert engine.stats().kv_blocks_dropped == number
            cached = engine.scheduler._cache.match(engine.scheduler._cache._blocks)
        engine.runner.kv_checksums._checked_at[:] = -10_000
        assert run(engine, greedy("c", prompt)) == {"c": want}  # nothing has changed: cached blocks are used
        assert engine.stats().kv_blocks_dropped == 4 and engine.stats().prefix_cache_hits == 96 * 5
        engine.runner.kv_checksums._checked_at[:] = -10_000
        flips.kv(cached[:5])
        with pytest.raises(Corruption, match="^5 KV blocks have changed") as found:
            run(engine, greedy("d", prompt))
        assert (found.value.detector, found.value.rank) == ("kv", 0)


def test_a_block_that_was_just_looked_at_is_not_looked_at_again(config: Callable[..., EngineConfig]) -> None:
    prompt = [7 * i % 320 for i in range(100)]
    with engine_of(config(weight_scrub=0.0)) as engine:
        run(engine, greedy("a", prompt))
        for checks, at in ((0, 0), (6, -integrity.RECHECK_STEPS), (6, 0)):
            assert engine.runner.kv_checksums is not None
            engine.runner.kv_checksums._checked_at += at
            run(engine, greedy(f"b{checks}{at}", prompt))
            assert engine.stats().kv_blocks_checked == checks
    with engine_of(config(kv_checksums=False)) as engine:
        run(engine, greedy("a", prompt), greedy("b", prompt))
        assert engine.stats().kv_blocks_checked == 0


def test_others_that_hold_a_changed_block_are_computed_again(config: Callable[..., EngineConfig]) -> None:
    """A choice that runs on it goes on with the tokens that it has; a choice that does not is left alone."""
    prompt = [7 * i % 320 for i in range(50)]
    requests = greedy("a", prompt, 100), greedy("other", [3, 4, 5], 100), greedy("b", [*prompt, 1], 8)
    with engine_of(config(weight_scrub=0.0)) as engine:
        want = run(engine, *requests)
    with engine_of(config(weight_scrub=0.0)) as engine:
        found: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for request in requests[:2]:
            engine.add(request)
        for number in range(1000):
            if number == 20:
                assert engine.runner.kv_checksums is not None
                engine.runner.kv_checksums._checked_at[:] = -10_000
                blocks = engine.scheduler._running
                (a, _) = blocks
                layer = engine.runner.kv_caches[2][a.blocks[2]]
                layer[1, 0, 15, -1] = -layer[1, 0, 15, -1]  # a's tokens may be others until it is found
                engine.add(requests[2])
            for delta in engine.step():
                found[delta.request_id] += delta.token_ids
            engine.scheduler.check()
        stats = engine.stats()
        assert stats.kv_blocks_dropped == 1 and stats.num_preemptions == 0 and not engine.has_work
        assert found["b"] == want["b"] and found["other"] == want["other"]
        assert len(found["a"]) == 100 and found["a"][:20] == want["a"][:20]


NATIVE = pytest.mark.skipif(backend.kernels() != "native", reason="threads share no memory without native kernels")


@NATIVE
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_find_that_one_of_them_differs(num_ranks: int, config: Callable[..., EngineConfig]) -> None:
    with engine_of(config(num_ranks=num_ranks, rank_check_interval=2, weight_scrub=0.0)) as engine:
        for i in range(3):
            run(engine, greedy(str(i), [5, 6, 7]))
        assert engine.stats().rank_steps_checked > 10
        layer = engine.runner.model.layers[1]
        whole, norm = layer.mlp_norm.weight.clone(), layer.mlp_norm.weight
        norm[3] = -norm[3]
        with pytest.raises(Corruption) as found:
            for i in range(3):
                run(engine, greedy(str(i), [5, 6, 7]))
        norm.copy_(whole)
        assert str(found.value).endswith("in layer 1 before the MLP's sum")
        assert (found.value.detector, found.value.rank) == ("ranks", None if num_ranks == 2 else 0)


@NATIVE
def test_another_ranks_block_that_has_changed_is_heard_of(
    config: Callable[..., EngineConfig], runners: list[Runner]
) -> None:
    prompt = [7 * i % 320 for i in range(100)]
    with engine_of(config(num_ranks=2, weight_scrub=0.0)) as engine:
        want = run(engine, greedy("a", prompt))["a"]
        for runner in runners:
            assert runner.kv_checksums is not None
            runner.kv_checksums._checked_at[:] = -10_000
        (other,) = (runner for runner in runners if runner is not engine.runner)
        BitFlips(other, seed=3).kv(engine.scheduler._cache.match(engine.scheduler._cache._blocks)[:5])
        assert run(engine, greedy("b", prompt))["b"] == want
        assert engine.stats().kv_blocks_dropped == 1


def mixed_requests() -> list[GenerationRequest]:
    """Greedy and seeded, with penalties, edits and choices; they end by length and by a token."""
    params = [
        SamplingParams(40, temperature=0.0),
        SamplingParams(40, seed=7, logprobs=2),
        SamplingParams(40, seed=8, presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.2),
        SamplingParams(40, seed=9, temperature=1.5, min_tokens=10, stop_token_ids=tuple(range(160)), top_k=50),
        SamplingParams(40, seed=10, allowed_token_ids=(3, 5, 8), logit_bias=((5, 0.5),), bad_words=((3, 5),)),
    ]
    return [
        GenerationRequest(str(i), [(9 + i) * j % 320 for j in range(1, 20 + 17 * i)], some, n=1 + i % 2)
        for i, some in enumerate(params)
    ]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=NATIVE)])
def test_audits_find_nothing_where_nothing_is_wrong(num_ranks: int, config: Callable[..., EngineConfig]) -> None:
    with engine_of(config(num_ranks=num_ranks)) as engine:
        want = run(engine, *mixed_requests())
    with engine_of(config(num_ranks=num_ranks, audit=1.0)) as engine:
        assert run(engine, *mixed_requests()) == want
        assert engine.stats().tokens_audited == sum(map(len, want.values())) > 200
        assert engine.stats().num_blocks_used == 0


def test_an_audit_finds_a_token_that_was_wrong(config: Callable[..., EngineConfig], runners: list[Runner]) -> None:
    num_wrong = 0
    with engine_of(config()) as engine:
        want = run(engine, greedy("a", [5, 6, 7], 20))
    for seed in range(12):
        with engine_of(config(audit=1.0)) as engine:
            flips = BitFlips(engine.runner, seed)
            engine.add(greedy("a", [5, 6, 7], 20))
            found: list[int] = []
            try:
                while engine.has_work:
                    if len(found) == 10:
                        flips.logits()
                    deltas = engine.step()
                    found += [token_id for delta in deltas for token_id in delta.token_ids]
                    if any(delta.finish_reason == "error" for delta in deltas):
                        break
            except Corruption as error:
                assert (error.detector, error.rank) == ("audit", 0)
                assert str(error) == "output token 10 of choice 0 of request a is another one when computed again"
                assert len(found) == 20 and found[10] != want["a"][10]
                num_wrong += 1
            else:
                assert len(found) < 20 or found == want["a"]
    assert num_wrong


def test_a_finding_is_seen_by_the_other_side() -> None:
    progress = Progress()
    other = Progress(progress.fd)
    assert other.finding() is None
    progress.beat(1.0, ["x" * 40] * 2000)  # more than fits
    assert other.finding() is None
    progress.report(Finding(3, "weights", "layers[0].norm"))
    assert other.finding() == Finding(3, "weights", "layers[0].norm")
    progress.report(Finding(0, "weights", "é" * FINDING_BYTES))
    found = other.finding()
    assert found is not None and found.rank == 0 and found.text.startswith("é" * (FINDING_BYTES // 2 - 20))
    assert other.read().expected_s == 1.0
    other._page.close()
    progress.close()


def test_values_that_are_not_finite_end_one_choice_and_touch_no_other(
    config: Callable[..., EngineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [greedy(str(i), [5 + i, 6, 7], 20) for i in range(4)]
    with engine_of(config()) as engine:
        want = run(engine, *requests)
        model, logits = engine.runner.model, engine.runner.model.logits

        def spoiled(hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            logits(hidden, out)
            if len(out) == 4 and engine.stats().step % 5 == 0:
                out[2, 17] = float("nan")
            return out

        monkeypatch.setattr(model, "logits", spoiled)
        found: dict[str, list[int]] = {}
        reasons: dict[str, str | None] = {}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for delta in engine.step():
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
                reasons[delta.request_id] = delta.finish_reason
        assert reasons == {"0": "length", "1": "length", "2": "error", "3": "length"}
        assert len(found["2"]) < 20 and found["2"] == want["2"][: len(found["2"])]
        assert all(found[name] == want[name] for name in ("0", "1", "3"))
