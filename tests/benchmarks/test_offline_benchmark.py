"""The offline benchmark's accounting and its windows, on an engine that only counts."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo.benchmarks import offline
from octavo.benchmarks.offline import DecodeWindow, Machine, ModelCost
from octavo.benchmarks.serving import BenchmarkError
from octavo.server.config import EngineConfig
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest
from octavo.server.quantize import quantize_checkpoint

COST = ModelCost(
    layer_params=1000, head_params=100, vocab_size=50, attention_width=8, step_bytes=2200, kv_token_bytes=12
)
MACHINE = Machine(bandwidth=1e3, matmul_rate=1e4, num_threads=1)


class CountingEngine:
    """Prefills one request a step, oldest first; every request prefilled before gets one token in each step."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.waiting: list[GenerationRequest] = []
        self.running: dict[str, tuple[GenerationRequest, int]] = {}
        self.num_seen = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: GenerationRequest) -> None:
        self.num_seen += 1
        self.waiting.append(request)

    def step(self) -> list[Delta]:
        time.sleep(0.001)
        if self.waiting:
            request = self.waiting.pop(0)
            self.running[request.request_id] = (request, 0)
        deltas = []
        for request_id, (request, num_out) in list(self.running.items()):
            last = num_out + 1 == request.params.max_tokens
            deltas.append(Delta(request_id, 0, num_out, [7], finish_reason=FinishReason.LENGTH if last else None))
            self.running[request_id] = (request, num_out + 1)
            if last:
                del self.running[request_id]
        return deltas


def test_cost_of_the_default_model(smollm2: Path) -> None:
    cost = ModelCost.of(smollm2, torch.bfloat16)
    assert cost.layer_params == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert cost.step_bytes == pytest.approx(269e6, rel=0.01)
    assert cost.kv_token_bytes == 30 * 2 * 3 * 64 * 2
    # One token at position 9: every matrix once, and two products of 9 heads x 64 with each of 10 positions, per layer.
    assert cost.flops(1, 10, 1) == 2 * (cost.layer_params + 576 * 49152) + 2 * 2 * 30 * 9 * 64 * 10


def test_codes_cost_what_they_take(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """An embedding that is not the head is not read."""
    source = tiny_checkpoint("llama2")
    quantize_checkpoint(source, tmp_path / "small", "int4")
    plain, small = ModelCost.of(source, torch.bfloat16), ModelCost.of(tmp_path / "small", torch.bfloat16)
    assert small.layer_params == plain.layer_params and small.head_params == plain.head_params == 320 * 96
    vectors = 4 * 7 * 96
    assert plain.step_bytes == 2 * (plain.layer_params + plain.head_params) + vectors
    # Half a byte each and 2 bytes to a group of 32; 64 bytes of table to each of a layer's four weights.
    assert small.step_bytes == plain.layer_params * 9 // 16 + 3 * 4 * 64 + 2 * plain.head_params + vectors


def test_no_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert offline.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("offline: error: ")


def test_decode_window_holds_the_steps_where_all_decode() -> None:
    engine = CountingEngine(EngineConfig())
    window = offline.measure_decode(engine, offline.make_requests(3, 10, 6, 50, "x"))
    # Requests start in steps 1, 2, 3; the first ends in step 6: steps 4 and 5 have all three.
    assert (window.num_steps, window.num_tokens) == (2, 6)
    # After step 3 the choices hold 10 prompt tokens and 3, 2, 1 outputs; after step 4 one more each.
    assert window.num_context == 36 + 39
    assert window.seconds >= 0.002 and not engine.has_work


def test_outputs_too_short_for_a_window_are_an_error() -> None:
    engine = CountingEngine(EngineConfig())
    with pytest.raises(BenchmarkError, match="--output-len"):
        offline.measure_decode(engine, offline.make_requests(3, 10, 3, 50, "x"))
    assert not engine.has_work


def test_ceilings() -> None:
    # 2 steps x 2200 weight bytes + 75 positions x 12 bytes at 1 kB/s; 6 x 2 x 1100 + 4 x 8 x 75 FLOP at 10 kFLOP/s.
    decode = offline.decode_result(DecodeWindow(2, 6, 75, 10.0), 3, COST, MACHINE)
    assert decode["share"] == pytest.approx(0.53) and decode["ceiling_tokens_per_s"] == pytest.approx(6 / 5.3)
    assert (decode["tokens_per_s"], decode["step_ms"]) == (pytest.approx(0.6), 5000)
    # 2 steps x 2200 weight bytes take 4.4 s; 2 x (20 x 1000 + 2 x 100) + 4 x 8 x 2 x 55 FLOP take 4.392 s.
    prefill = offline.prefill_result(8.8, 2, 10, 10, COST, MACHINE)
    assert prefill["share"] == pytest.approx(0.5)
    assert prefill["tokens_per_s"] == pytest.approx(20 / 8.8)


def test_run_states_the_ceiling_first(
    smollm2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(offline, "MATMUL_SIZE", 64)
    flags = [str(smollm2), "--batch-size", "1,3", "--input-len", "8", "--output-len", "6", "--num-prompts", "2"]
    args: argparse.Namespace = offline.make_parser().parse_args(flags)
    engines: list[CountingEngine] = []

    def make_engine(config: EngineConfig) -> CountingEngine:
        engines.append(CountingEngine(config))
        return engines[-1]

    result = offline.run(args, make_engine)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("machine: ") and lines[1].startswith("model:   269.1 MB")
    assert [line.split()[:2] for line in lines[3:]] == [["prefill", "2"], ["decode", "1"], ["decode", "3"]]
    assert [row["batch_size"] for row in result["results"]] == [2, 1, 3]
    assert all(row["tokens_per_s"] > 0 and row["share"] > 0 for row in result["results"])
    assert json.loads(json.dumps(result))["machine"]["torch"] == torch.__version__
    (engine,) = engines
    assert engine.num_seen == 1 + 2 + 1 + 3
    assert engine.config.max_num_seqs == 3 and not engine.config.enable_prefix_caching
    assert engine.config.device == "cpu"  # whose ceiling was stated
