"""Prometheus metrics: vLLM's names, types, labels and buckets under a prefix of choice, and two of the HTTP layer.

What the engine counts is read from its statistics when somebody scrapes; what only the front end sees (latencies,
lengths, finish reasons) is observed as it happens.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict
from itertools import accumulate
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from octavo.server.api.engine import Engine
from octavo.server.config import ServerConfig
from octavo.server.engine.channel import EngineInfo, EngineStats, StepOutput
from octavo.server.engine.devices import LEFT_OUT
from octavo.server.engine.epoch import DETECTORS, REASONS
from octavo.server.engine.supervisor import PHASES, Recovery

# fmt: off
_TTFT_S = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TOKEN_S = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP_TOKENS = tuple(float(1 << shift) for shift in (0, *range(3, 15)))
_RECOVERY_S = (.01, .025, .05, .1, .25, .5, .75, 1, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 60, 120, 300)
_N = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_FINISH_REASONS = ("stop", "length", "abort", "error")
_LABELS = ("model_name", "engine")
# detector -> the field of EngineStats that says how much it has looked at, and that for how long it took
_CHECKED = {
    "weights": "weight_slices_checked",
    "kv": "kv_blocks_checked",
    "ranks": "rank_steps_checked",
    "audit": "tokens_audited",
}
_CHECK_S = {"weights": "weight_check_s", "kv": "kv_check_s"}

Family = TypeVar("Family", Counter, Gauge)


def lengths_up_to(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... as far as `limit`."""
    return tuple(float(m * 10**e) for e in range(len(str(limit))) for m in (1, 2, 5) if m * 10**e <= limit)


class FixedHistogram(Collector):
    """A histogram with fixed labels that is cheap to observe: some are, for each token. For one thread."""

    def __init__(self, name: str, text: str, buckets: tuple[float, ...], label_values: tuple[str, ...]) -> None:
        self._name, self._text, self._buckets, self._label_values = name, text, buckets, label_values
        self._counts = [0] * (len(buckets) + 1)  # of values up to each bucket's bound and over the one before
        self._sum = 0.0
        self._created_s = time.time()

    def observe(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As prometheus_client's own histograms show themselves."""
        family = HistogramMetricFamily(self._name, self._text, labels=_LABELS)
        bounds = [*map(floatToGoString, self._buckets), "+Inf"]
        family.add_metric(
            self._label_values, list(zip(bounds, accumulate(self._counts), strict=True)), sum_value=self._sum
        )
        labels = dict(zip(_LABELS, self._label_values, strict=True))
        family.add_sample(self._name + "_created", labels, self._created_s)
        yield family


class RankCollector(Collector):
    """What each rank has done and holds. Read when somebody scrapes: there are series for the ranks there are."""

    def __init__(self, prefix: str, engine: Engine, label_values: tuple[str, ...]) -> None:
        self._prefix, self._engine, self._label_values = prefix, engine, label_values

    def collect(self) -> Iterator[Metric]:
        """Counters are since the rank's start."""
        labels, name = (*_LABELS, "rank"), self._prefix + "rank_"
        steps = CounterMetricFamily(name + "steps", "Steps of a rank.", labels=labels)
        step_s = CounterMetricFamily(name + "step_seconds", "Time of a rank in steps.", labels=labels)
        collective_s = CounterMetricFamily(
            name + "collective_seconds", "Time of a rank in collectives, waiting included.", labels=labels
        )
        memory = GaugeMetricFamily(name + "memory_bytes", "Memory of a rank.", labels=(*labels, "kind"))
        if self._engine.state != "starting":
            for rank, (info, done) in enumerate(zip(self._engine.info.ranks, self._engine.figures, strict=False)):
                values = (*self._label_values, str(rank))
                steps.add_metric(values, done.num_steps)
                step_s.add_metric(values, done.step_s)
                collective_s.add_metric(values, done.collective_s)
                for kind, num_bytes in (
                    ("weights", info.weight_bytes),
                    ("kv_cache", info.kv_cache_bytes),
                    ("workspace", info.workspace_bytes),
                    ("resident", done.resident_bytes),
                ):
                    memory.add_metric((*values, kind), num_bytes)
        yield from (steps, step_s, collective_s, memory)


class Metrics:
    """All metrics of one server, in a registry of its own. Those about the model appear once the engine is ready.

    Attributes:
        ttft: of each choice, seconds from the request's arrival to its first token.
        itl: seconds from a choice's tokens to its next ones.
    """

    def __init__(self, config: ServerConfig, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        self._label_values = (config.model_name, "0")
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._http_requests = Counter(
            "http_requests", "HTTP requests.", ("handler", "method", "status"), registry=self.registry
        )
        self._http_duration = Histogram(
            "http_request_duration_seconds",
            "Time from the request's head to the end of its response.",
            ("handler", "method"),
            buckets=(0.1, 0.5, 1),
            registry=self.registry,
        )
        self._seen = EngineStats()  # what the counters hold already
        self._last_step = 0
        self._gauges = {
            name: self._gauge(name, text)
            for name, text in (
                ("num_requests_running", "Choices in execution."),
                ("num_requests_waiting", "Choices that wait, deferred ones included."),
                ("kv_cache_usage_perc", "Share of KV blocks that choices own, 0 to 1."),
                ("ranks", "Ranks that compute."),
            )
        }
        self._waiting = self._by(
            Gauge, "num_requests_waiting_by_reason", "Choices that wait, by reason.", "reason", ("capacity", "deferred")
        )
        self._counters = {
            name: self._counter(name, text)
            for name, text in (
                ("prefix_cache_queries", "Tokens looked up in the prefix cache."),
                ("prefix_cache_hits", "Tokens found in the prefix cache."),
                ("num_preemptions", "Choices put back to waiting for want of blocks."),
                ("prompt_tokens", "Prompt tokens processed, cached ones included."),
                ("prompt_tokens_cached", "Prompt tokens taken from the prefix cache."),
                ("generation_tokens", "Output tokens produced."),
                ("corrupted_requests", "Choices that ended because their logits were not finite."),
            )
        }
        self._by_source = self._by(
            Counter,
            "prompt_tokens_by_source",
            "Prompt tokens, by where they came from.",
            "source",
            ("local_compute", "local_cache_hit", "external_kv_transfer"),
        )
        self._success = self._by(
            Counter, "request_success", "Choices that ended, by reason.", "finished_reason", _FINISH_REASONS
        )
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens computed in a step.", _STEP_TOKENS)
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_S)
        self.itl = self._histogram("inter_token_latency_seconds", "Between outputs of a choice.", _TOKEN_S)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", _TOKEN_S
        )
        self._times = {
            name: self._histogram(f"{name}_seconds", text, _REQUEST_S)
            for name, text in (
                ("e2e_request_latency", "Arrival to last token."),
                ("request_queue_time", "Queued to first run."),
                ("request_prefill_time", "First run to first token."),
                ("request_decode_time", "First token to last."),
                ("request_inference_time", "First run to last token."),
            )
        }
        self._params_n = self._histogram("request_params_n", "n of a request.", _N)
        self._preemptions = self._histogram(
            "request_num_preemptions", "How often a choice was put back to waiting.", _PREEMPTIONS
        )
        self._lengths: dict[str, FixedHistogram] = {}  # once the context's length is known
        self._degraded = self._by(
            Gauge, "degraded", "Devices that are not used, by what is wrong with them.", "reason", LEFT_OUT
        )
        self._recoveries = self._by(
            Counter, "recoveries", "Engines replaced after a fault, by what it was.", "reason", REASONS
        )
        self._corruptions = self._by(
            Counter, "corruptions", "Findings of bits that had changed, by what found them.", "detector", DETECTORS
        )
        self._checks = self._by(
            Counter, "corruption_checks", "What rank 0 has looked at to find changed bits.", "detector", tuple(_CHECKED)
        )
        self._check_s = self._by(
            Counter, "corruption_check_seconds", "Time that this has taken.", "detector", tuple(_CHECK_S)
        )
        self._recovery_s = Histogram(
            config.metrics_prefix + "recovery_seconds",
            "Time from a fault until requests go on, by phase and in all.",
            (*_LABELS, "phase"),
            buckets=_RECOVERY_S,
            registry=self.registry,
        )
        for phase in PHASES:
            self._recovery_s.labels(*self._label_values, phase)
        self.registry.register(RankCollector(config.metrics_prefix, engine, self._label_values))
        engine.on_step, engine.on_recovered = self._on_step, self._on_recovered

    def http(self, handler: str, method: str, status: int, duration_s: float) -> None:
        """Counts an HTTP request; `handler` is the route's path."""
        self._http_requests.labels(handler, method, f"{status // 100}xx").inc()
        self._http_duration.labels(handler, method).observe(duration_s)

    def corrupted(self) -> None:
        """A choice ended because its logits were not finite."""
        self._counters["corrupted_requests"].inc()

    def choice_done(
        self,
        *,
        finish_reason: str,
        num_tokens: int,
        max_tokens: int,
        e2e_s: float,
        queued_s: float,
        scheduled_s: float,
        first_s: float,
        last_s: float,
        num_preemptions: int,
    ) -> None:
        """A choice has ended. Times are of time.monotonic(), 0.0 for what it did not reach."""
        self._know_model(self._engine.info)
        self._success[finish_reason].inc()
        self._lengths["request_generation_tokens"].observe(num_tokens)
        self._lengths["request_params_max_tokens"].observe(max_tokens)
        self._times["e2e_request_latency"].observe(e2e_s)
        self._preemptions.observe(num_preemptions)
        if scheduled_s:
            self._times["request_queue_time"].observe(max(0.0, scheduled_s - queued_s))
        if scheduled_s and first_s:
            self._times["request_prefill_time"].observe(max(0.0, first_s - scheduled_s))
            self._times["request_inference_time"].observe(max(0.0, last_s - scheduled_s))
        if first_s:
            self._times["request_decode_time"].observe(last_s - first_s)
        if num_tokens > 1:
            self._tpot.observe((last_s - first_s) / (num_tokens - 1))

    def prompt_done(self, *, num_prompt_tokens: int, num_computed_tokens: int, n: int, max_num_tokens: int) -> None:
        """All choices of a prompt have ended."""
        self._params_n.observe(n)
        self._lengths["request_prompt_tokens"].observe(num_prompt_tokens)
        self._lengths["request_prefill_kv_computed_tokens"].observe(num_computed_tokens)
        self._lengths["request_max_num_generation_tokens"].observe(max_num_tokens)

    def render(self) -> bytes:
        """The text that a scrape gets."""
        if self._engine.state != "starting":
            self._know_model(self._engine.info)
            self._update(self._engine.stats)
        return generate_latest(self.registry)

    def _know_model(self, info: EngineInfo) -> None:
        """Adds what depends on the model, the first time."""
        if self._lengths:
            return
        buckets = lengths_up_to(info.max_model_len)
        self._lengths = {
            name: self._histogram(name, text, buckets)
            for name, text in (
                ("request_prompt_tokens", "Prompt tokens of a request."),
                ("request_generation_tokens", "Output tokens of a choice."),
                ("request_max_num_generation_tokens", "Output tokens of a request's longest choice."),
                ("request_params_max_tokens", "max_tokens of a choice."),
                ("request_prefill_kv_computed_tokens", "Prompt tokens computed, cached ones left out."),
            )
        }
        labels = {
            "block_size": info.block_size,
            "cache_dtype": info.dtype,
            "num_gpu_blocks": info.num_blocks,
            "kv_cache_memory_bytes": info.kv_cache_bytes,
            "gpu_memory_utilization": self._config.gpu_memory_utilization,
            "device": info.device,
            "enable_prefix_caching": self._config.enable_prefix_caching,
            "engine": 0,
        }
        Gauge(
            self._config.metrics_prefix + "cache_config_info",
            "The KV cache's configuration.",
            tuple(labels),
            registry=self.registry,
        ).labels(**{name: str(value) for name, value in labels.items()}).set(1)

    def _gauge(self, name: str, text: str) -> Gauge:
        family = Gauge(self._config.metrics_prefix + name, text, _LABELS, registry=self.registry)
        return family.labels(*self._label_values)

    def _counter(self, name: str, text: str) -> Counter:
        family = Counter(self._config.metrics_prefix + name, text, _LABELS, registry=self.registry)
        return family.labels(*self._label_values)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> FixedHistogram:
        histogram = FixedHistogram(self._config.metrics_prefix + name, text, buckets, self._label_values)
        self.registry.register(histogram)
        return histogram

    def _by(self, kind: type[Family], name: str, text: str, label: str, values: tuple[str, ...]) -> dict[str, Family]:
        """One metric with a label more: its values -> their series."""
        family = kind(self._config.metrics_prefix + name, text, (*_LABELS, label), registry=self.registry)
        return {value: family.labels(*self._label_values, value) for value in values}

    def _on_step(self, output: StepOutput) -> None:
        if output.stats.step != self._last_step:  # the answer to an abort is no step
            self._last_step = output.stats.step
            self._step_tokens.observe(output.stats.step_tokens)

    def _on_recovered(self, recovery: Recovery) -> None:
        self._recoveries[recovery.fault.reason].inc()
        if recovery.fault.detector in self._corruptions:
            self._corruptions[recovery.fault.detector].inc()
        for phase, seconds in recovery.seconds.items():
            self._recovery_s.labels(*self._label_values, phase).observe(seconds)

    def _update(self, stats: EngineStats) -> None:
        """Brings gauges and counters up to `stats`."""
        self._gauges["num_requests_running"].set(stats.num_running)
        self._gauges["num_requests_waiting"].set(stats.num_waiting)
        self._gauges["ranks"].set(len(self._engine.info.ranks))
        for reason, gauge in self._degraded.items():
            gauge.set(self._engine.left_out.count(reason))
        self._waiting["deferred"].set(stats.num_deferred)
        self._waiting["capacity"].set(stats.num_waiting - stats.num_deferred)
        self._gauges["kv_cache_usage_perc"].set(stats.num_blocks_used / self._engine.info.num_blocks)
        before, self._seen = asdict(self._seen), EngineStats(**asdict(stats))
        new = {key: value - before[key] for key, value in asdict(stats).items()}
        for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "generation_tokens"):
            self._counters[name].inc(new[name])
        self._corruptions["kv"].inc(new["kv_blocks_dropped"])
        for counters, fields in ((self._checks, _CHECKED), (self._check_s, _CHECK_S)):
            for detector, field in fields.items():
                counters[detector].inc(new[field])
        self._counters["prompt_tokens"].inc(new["prompt_tokens_computed"] + new["prompt_tokens_cached"])
        self._counters["prompt_tokens_cached"].inc(new["prompt_tokens_cached"])
        self._by_source["local_compute"].inc(new["prompt_tokens_computed"])
        self._by_source["local_cache_hit"].inc(new["prompt_tokens_cached"])
