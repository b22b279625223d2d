"""The profile of a decode step: its parts are those of the model, and profiling changes no token."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from octavo.benchmarks import offline, step_profile
from octavo.benchmarks.offline import make_requests
from octavo.benchmarks.serving import BenchmarkError
from octavo.benchmarks.step_profile import decode_engine, decoding, op_names, profile_step, streamed_bytes
from octavo.kernels import program
from octavo.kernels.cpu.library import library
from octavo.models.config import read_config
from octavo.server.config import EngineConfig
from octavo.server.engine import runner
from octavo.server.engine.engine import Engine

HOST_PARTS = {"logits", "sample", "plan", "fill batch", "apply", "rest"}
needs_native_ops = pytest.mark.skipif(library() is None, reason="no native ops")


@pytest.fixture
def engine(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Engine]:
    engine = decode_engine(str(tiny_checkpoint("smollm2")), [5, 6, 7], 12)
    yield engine
    assert not engine.has_work


def tokens(engine: Engine, step: Callable[[Engine], object]) -> list[list[int]]:
    """All tokens of three greedy choices, each second step of which is run by `step`."""
    requests = make_requests(3, 5, 12, engine.info.vocab_size, "same")
    with decoding(engine, requests):
        for _ in range(4):
            step(engine)
            engine.step()
        choices = [engine.scheduler._choices[request.request_id][0] for request in requests]
        return [list(choice.token_ids) for choice in choices]


@needs_native_ops
def test_profiled_steps_give_the_same_tokens_and_leave_the_engine_as_it_was(engine: Engine) -> None:
    functions = engine.runner._forward.run, vars(runner)["sample"], engine.scheduler.plan_step
    plain = tokens(engine, Engine.step)
    assert [len(choice) for choice in plain] == [5 + 1 + 8] * 3
    assert tokens(engine, profile_step) == plain
    assert (engine.runner._forward.run, vars(runner)["sample"], engine.scheduler.plan_step) == functions


def test_a_step_of_the_cpu_is_profiled_also_where_there_is_a_gpu(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[EngineConfig] = []
    monkeypatch.setattr(step_profile, "Engine", configs.append)
    decode_engine(str(tiny_checkpoint("smollm2")), [5], 12)
    assert [config.device for config in configs] == ["cpu"]


@needs_native_ops
def test_parts_of_a_step(engine: Engine) -> None:
    names = op_names(engine.runner._forward)
    # 3 layers, hidden 144: QKV of 9 + 2 x 3 heads of 32, output, gate and up, down.
    shapes = ("480x144", "144x288", "320x144", "144x160")
    kind = "" if engine.runner.model.embedding.weight.table is None else "_compressed"
    assert [names.count(f"matmul{kind} {shape}") for shape in shapes] == [3] * 4
    assert names.count("paged_attention") == 3 and names.count(f"embedding{kind}") == 1
    with decoding(engine, make_requests(2, 5, 12, engine.info.vocab_size, "parts")):
        parts = profile_step(engine)
    assert parts.keys() - {"checksum"} == set(names) | HOST_PARTS  # there is none in every step
    assert all(seconds > 0 for seconds in parts.values())


def test_bytes_that_parts_read(tiny_checkpoint: Callable[[str], Path]) -> None:
    names = ["matmul 10x6", "rms_norm", "matmul 10x6", "matmul_compressed 10x8"]
    full = streamed_bytes(read_config(tiny_checkpoint("smollm2")), names, 2, [100, 10], 320 * 144 * 2)
    assert full == {
        "logits": 320 * 144 * 2,
        "matmul 10x6": 2 * 10 * 6 * 2,
        "matmul_compressed 10x8": 10 * 8 * 12 // 8,
        "paged_attention": 3 * 110 * 2 * 3 * 32 * 2,
    }
    windowed = streamed_bytes(read_config(tiny_checkpoint("mistral")), names, 2, [100, 10], 0)
    assert windowed["paged_attention"] == 3 * (24 + 10) * 2 * 2 * 32 * 2


@needs_native_ops
def test_tables_and_json(
    tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(offline, "MATMUL_SIZE", 64)
    folder = tiny_checkpoint("smollm2")
    flags = ["--batch-size", "1,3", "--context-len", "20", "--num-steps", "2"]
    assert step_profile.main([str(folder), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert lines[0].startswith(f"{folder.name} in ") and result["machine"]["bandwidth"] > 0
    assert [profile["batch_size"] for profile in result["results"]] == [1, 3]
    for profile in result["results"]:
        parts = {row["part"]: row for row in profile["parts"]}
        assert sum(row["share"] for row in parts.values()) == pytest.approx(1)
        assert profile["sum_ms"] == pytest.approx(sum(row["ms"] for row in parts.values()))
        assert profile["step_ms"] > 0 and all(row["ms"] > 0 for row in parts.values())
        assert parts["paged_attention"]["num_calls"] == 3 and parts["rest"]["bytes_per_s"] is None
        assert parts["paged_attention"]["bytes_per_s"] > 0 and parts["logits"]["bytes_per_s"] > 0
    first_words = [line.split(" ")[0] for line in lines]
    assert (first_words.count("batch"), first_words.count("paged_attention"), first_words.count("sum")) == (2, 2, 2)


def test_it_says_what_it_needs(
    tmp_path: Path, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert step_profile.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("step_profile: error: ")
    for module in (step_profile, program):
        monkeypatch.setattr(module, "library", lambda: None)
    with pytest.raises(BenchmarkError, match="native"):
        profile_step(engine)
