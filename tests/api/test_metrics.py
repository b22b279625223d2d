"""Metrics: the names dashboards know, each moving when it should."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from api_fakes import Server, eventually, serving
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from octavo.server.api.metrics import FixedHistogram, lengths_up_to
from octavo.server.engine.epoch import DETECTORS, Fault
from octavo.server.engine.progress import RankFigures
from octavo.server.engine.supervisor import Recovery

Sample = tuple[str, tuple[tuple[str, str], ...]]


async def scrape(server: Server) -> dict[Sample, float]:
    """(name, sorted labels but model_name and engine) -> value."""
    text = (await server.http.get("/metrics")).text
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k not in ("model_name", "engine")))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_length_buckets() -> None:
    assert lengths_up_to(200) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert lengths_up_to(199) == (1, 2, 5, 10, 20, 50, 100)


def test_histograms_show_themselves_as_those_of_the_library() -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    buckets = (0.01, 0.5, 1.0, 20.0)
    library = Histogram("x_seconds", "Some text.", ("model_name", "engine"), buckets=buckets, registry=theirs)
    fixed = FixedHistogram("x_seconds", "Some text.", buckets, ("tiny", "0"))
    ours.register(fixed)
    for value in (0.0, 0.01, 0.02, 0.5, 3.0, 20.0, 21.0, 1e9):
        library.labels("tiny", "0").observe(value)
        fixed.observe(value)

    def lines(registry: CollectorRegistry) -> list[str]:
        created = 'x_seconds_created{engine="0",model_name="tiny"}'
        return [
            created if line.startswith(created) else line for line in generate_latest(registry).decode().split("\n")
        ]

    assert lines(ours) == lines(theirs)


async def test_a_finished_request_moves_what_it_should(tmp_path: Path) -> None:
    async with serving(tmp_path, "abc") as server:
        before = await scrape(server)
        await server.ok("/v1/completions", prompt="Hello", n=2, max_tokens=4, ignore_eos=True)
        after = await scrape(server)
        moved = {key: after[key] - before.get(key, 0.0) for key in after if after[key] != before.get(key, 0.0)}
        for name, count, total in (
            ("request_prompt_tokens", 1, 5),
            ("request_generation_tokens", 2, 8),
            ("request_max_num_generation_tokens", 1, 4),
            ("request_params_max_tokens", 2, 8),
            ("request_prefill_kv_computed_tokens", 1, 5),
            ("request_params_n", 1, 2),
            ("iteration_tokens_total", 8, 8),
        ):
            assert moved[f"octavo:{name}_count", ()] == count, name
            assert moved[f"octavo:{name}_sum", ()] == total, name
        for name, count in (
            ("time_to_first_token_seconds", 2),
            ("inter_token_latency_seconds", 6),
            ("request_time_per_output_token_seconds", 2),
            ("e2e_request_latency_seconds", 2),
            ("request_queue_time_seconds", 2),
            ("request_prefill_time_seconds", 2),
            ("request_decode_time_seconds", 2),
            ("request_inference_time_seconds", 2),
            ("request_num_preemptions", 2),
        ):
            assert moved[f"octavo:{name}_count", ()] == count, name
        assert moved["octavo:request_success_total", (("finished_reason", "length"),)] == 2
        assert moved["octavo:generation_tokens_total", ()] == 8
        labels = (("handler", "/v1/completions"), ("method", "POST"), ("status", "2xx"))
        assert moved["http_requests_total", labels] == 1
        assert moved["http_request_duration_seconds_count", labels[:2]] == 1


async def test_engine_statistics(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.engine.stats = replace(
            server.engine.stats,
            **{"num_running": 3, "num_waiting": 5, "num_deferred": 2, "num_blocks_used": 16, "num_preemptions": 4},
            **{"prefix_cache_queries": 100, "prefix_cache_hits": 64, "prompt_tokens_computed": 36},
            **{"prompt_tokens_cached": 64, "generation_tokens": 7},
        )
        expected = {
            ("num_requests_running", ()): 3,
            ("num_requests_waiting", ()): 5,
            ("num_requests_waiting_by_reason", (("reason", "capacity"),)): 3,
            ("num_requests_waiting_by_reason", (("reason", "deferred"),)): 2,
            ("kv_cache_usage_perc", ()): 0.25,
            ("num_preemptions_total", ()): 4,
            ("prefix_cache_queries_total", ()): 100,
            ("prefix_cache_hits_total", ()): 64,
            ("prompt_tokens_total", ()): 100,
            ("prompt_tokens_cached_total", ()): 64,
            ("prompt_tokens_by_source_total", (("source", "local_compute"),)): 36,
            ("prompt_tokens_by_source_total", (("source", "local_cache_hit"),)): 64,
            ("prompt_tokens_by_source_total", (("source", "external_kv_transfer"),)): 0,
            ("generation_tokens_total", ()): 7,
        }
        for _ in range(2):  # a second scrape adds nothing
            samples = await scrape(server)
            assert {key: samples[f"octavo:{key[0]}", key[1]] for key in expected} == expected
        server.engine.stats = replace(server.engine.stats, generation_tokens=9)
        assert (await scrape(server))["octavo:generation_tokens_total", ()] == 9


async def test_devices_that_are_left_out(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for left_out, counts in (([], (0, 0)), (["gone", "gone", "failing"], (2, 1))):
            server.engine.left_out = left_out
            samples = await scrape(server)
            assert samples["octavo:ranks", ()] == 1
            assert tuple(samples["octavo:degraded", (("reason", r),)] for r in ("gone", "failing")) == counts


async def test_recoveries(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        recovery = Recovery(Fault("died", "the engine process ended", 0.1), 3)
        recovery.seconds |= {"start": 2.5, "total": 3.0}
        assert server.engine.on_recovered is not None
        server.engine.on_recovered(recovery)
        samples = await scrape(server)
        assert samples["octavo:recoveries_total", (("reason", "died"),)] == 1
        assert samples["octavo:recoveries_total", (("reason", "stalled"),)] == 0
        for phase, seconds in recovery.seconds.items():
            assert samples["octavo:recovery_seconds_sum", (("phase", phase),)] == seconds
            assert samples["octavo:recovery_seconds_count", (("phase", phase),)] == 1


async def test_ranks_have_series_while_they_are_there(tmp_path: Path) -> None:
    def of_ranks(samples: dict[Sample, float]) -> dict[Sample, float]:
        return {key: value for key, value in samples.items() if key[0].startswith("octavo:rank_")}

    async with serving(tmp_path) as server:
        info = server.engine.info
        info.ranks = [replace(info.ranks[0], weight_bytes=4 + rank) for rank in range(3)]
        server.engine.figures = [RankFigures(10 + rank, 2.0, 0.5, 1 << 20) for rank in range(3)]
        samples = await scrape(server)
        assert [samples["octavo:rank_steps_total", (("rank", str(rank)),)] for rank in range(3)] == [10, 11, 12]
        assert samples["octavo:rank_step_seconds_total", (("rank", "2"),)] == 2.0
        assert samples["octavo:rank_collective_seconds_total", (("rank", "2"),)] == 0.5
        memory = {"weights": 6, "kv_cache": 1 << 20, "workspace": 4, "resident": 1 << 20}
        for kind, num_bytes in memory.items():
            assert samples["octavo:rank_memory_bytes", (("kind", kind), ("rank", "2"))] == num_bytes
        assert len(of_ranks(samples)) == 3 * (3 + len(memory))
        server.engine.figures = []  # while they load
        assert not of_ranks(await scrape(server))
        info.ranks, server.engine.figures = info.ranks[:2], [RankFigures(), RankFigures()]  # a smaller group
        samples = of_ranks(await scrape(server))
        assert {dict(labels)["rank"] for _, labels in samples} == {"0", "1"}
        assert samples["octavo:rank_steps_total", (("rank", "1"),)] == 0


async def test_corruptions(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        assert server.engine.on_recovered is not None
        server.engine.on_recovered(Recovery(Fault("corrupt", "rank 1, ...", 0.1, "weights"), 3))
        server.engine.on_recovered(Recovery(Fault("died", "an engine process ended", 0.1), 3))
        server.engine.stats = replace(server.engine.stats, weight_slices_checked=12, weight_check_s=0.5)
        samples = await scrape(server)
        assert samples["octavo:recoveries_total", (("reason", "corrupt"),)] == 1
        for detector in DETECTORS:
            assert samples["octavo:corruptions_total", (("detector", detector),)] == (detector == "weights")
        assert samples["octavo:corruption_checks_total", (("detector", "weights"),)] == 12
        assert samples["octavo:corruption_check_seconds_total", (("detector", "weights"),)] == 0.5


@pytest.mark.parametrize("reason", ["stop", "abort", "error"])
async def test_finish_reasons(tmp_path: Path, reason: str) -> None:
    async with serving(tmp_path) as server:
        if reason == "error":
            server.engine.fail_after = 1
        server.engine.go.clear()
        body = {"prompt": "a", "request_id": "x", "max_tokens": 100}
        running = asyncio.create_task(server.post("/v1/completions", body))
        await eventually(lambda: server.engine.num_running == 1)
        if reason == "abort":
            await server.http.post("/v1/requests/x/cancel")
        server.engine.go.set()
        await running
        samples = await scrape(server)
        assert samples["octavo:request_success_total", (("finished_reason", reason),)] == 1
        assert samples["octavo:corrupted_requests_total", ()] == (reason == "error")


async def test_prefix_and_labels(tmp_path: Path) -> None:
    async with serving(tmp_path, metrics_prefix="vllm:", served_model_name="m") as server:
        text = (await server.http.get("/metrics")).text
        assert 'vllm:num_requests_running{engine="0",model_name="m"} 0.0' in text
        (line,) = [line for line in text.splitlines() if line.startswith("vllm:cache_config_info{")]
        assert 'block_size="16"' in line
        assert "model_name" not in line
        assert "octavo:" not in text


async def test_refusals_are_counted_by_class_and_path(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await server.post("/v1/completions", {})
        await server.http.get("/nowhere/at/all")
        samples = await scrape(server)
        for handler, method in (("/v1/completions", "POST"), ("none", "GET")):
            labels = (("handler", handler), ("method", method), ("status", "4xx"))
            assert samples["http_requests_total", labels] == 1
