"""The scaling benchmark, tiny: the structure of its figures, and the work they are taken of. No time is judged."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.benchmarks import scaling
from octavo.benchmarks.step_profile import decode_engine
from octavo.kernels import backend
from octavo.kernels.cpu.library import multiplies_bf16
from octavo.kernels.sample import sample
from octavo.models.config import read_config
from octavo.server.engine import runner
from octavo.server.engine.plan import StepPlan
from octavo.server.engine.request import Delta, GenerationRequest
from octavo.server.engine.scheduler import Scheduler

PARTS = ("overhead", "admission", "attention")
FLAGS = (
    "--parts overhead,admission,attention --batch-size 1,5 --num-steps 3 --num-waiting 0,20 "
    "--attention-batch-size 1,3 --context-len 20,70"
).split()


def test_all_parts(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "NUM_SCHEDULER_STEPS", 20)
    monkeypatch.setattr(scaling, "TARGETS_MS", {5: 0.5})
    assert scaling.main([str(tiny_checkpoint("smollm2")), *FLAGS, "--plot", str(tmp_path)]) == 0
    assert vars(runner)["sample"] is sample  # the timers are off again
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    overhead, admission, attention = (result[part] for part in PARTS)
    assert [(row["batch_size"], row["target_ms"]) for row in overhead] == [(1, None), (5, 0.5)]
    assert [row["num_waiting"] for row in admission] == [0, 20]
    shapes = [(row["batch_size"], row["context_len"]) for row in attention]
    assert shapes == [(1, 20), (1, 70), (3, 20), (3, 70)]
    figures = [value for part in PARTS for row in result[part] for value in row.values() if isinstance(value, float)]
    assert len(figures) == 2 * 4 + 1 + 2 * 2 + 4 * 3 and all(value > 0 for value in figures)
    for row in overhead:  # the kernels are part of the step and not of its overhead
        assert row["overhead_ms"] < row["step_ms"]
    for row in attention:
        assert row["token_ns"] == pytest.approx(row["call_us"] * 1e3 / row["batch_size"] / row["context_len"])
    assert all(name in out for name in ("overhead_ms", "add_us", "token_ns"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{part}.png" for part in sorted(PARTS)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


@pytest.mark.skipif(backend.kernels() != "native", reason="ranks share no memory without native kernels")
def test_ranks_are_processes_of_their_own(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    flags = "--parts ranks --ranks 1,3 --rank-batch-size 1,4 --num-steps 3".split()
    command = [sys.executable, "-m", "octavo.benchmarks.scaling", str(tiny_checkpoint("smollm2")), *flags]
    done = subprocess.run([*command, "--plot", str(tmp_path)], capture_output=True, text=True, check=True, timeout=120)
    rows = json.loads(done.stdout.splitlines()[-1])["ranks"]
    assert [(row["batch_size"], row["ranks"]) for row in rows] == [(1, 1), (1, 3), (4, 1), (4, 3)]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["batch_size"] / row["step_ms"] * 1e3)
        parts = [row[f"{name}_ms"] for name in ("compute", "bandwidth", "latency", "host")]
        assert min(parts) >= 0 and row["model_ms"] == pytest.approx(sum(parts))
        has_peers = row["ranks"] > 1
        assert (row["latency_ms"] > 0) == (row["bandwidth_ms"] > 0) == (0 < row["collective_share"] < 1) == has_peers
        # 3 layers have two sums each, the embedding has one, of 144 columns: parts in float32, the sum in bfloat16
        itemsize = 2 if multiplies_bf16() else 4
        wanted = 7 * row["batch_size"] * 144 * (4 + itemsize) * 2 / 3 if has_peers else 0
        assert row["exchanged_bytes"] == pytest.approx(wanted)
    assert rows[1]["weight_bytes"] < 0.6 * rows[0]["weight_bytes"]
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_waiting", [0, 7])
def test_as_many_wait_in_every_measured_step(num_waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "NUM_SCHEDULER_STEPS", 50)
    loads: list[tuple[int, int]] = []

    class Watched(Scheduler):
        num_added = 0

        def add(self, request: GenerationRequest, committed: dict[int, list[int]] | None = None) -> None:
            super().add(request, committed)
            Watched.num_added += 1

        def plan_step(self, now_s: float, max_prefill_tokens: int | None = None) -> StepPlan | None:
            stats = self.stats()
            loads.append((stats["num_running"] + stats["num_waiting"], stats["num_preemptions"]))
            return super().plan_step(now_s, max_prefill_tokens)

    monkeypatch.setattr(scaling, "Scheduler", Watched)
    scaling.measure_admission(num_waiting)
    assert set(loads) == {(scaling.NUM_RUNNING + num_waiting, 0)}
    assert len(loads) == scaling.MAX_OUTPUT_LEN + 50
    assert Watched.num_added > scaling.NUM_RUNNING + num_waiting + 50  # choices end, and others take their places


def test_the_message_is_that_of_all_choices(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[Delta]] = []
    monkeypatch.setattr(scaling, "encode_frame", lambda message: sent.append(message.deltas))
    engine = decode_engine(str(tiny_checkpoint("smollm2")), scaling.prompt_lens(18), 5)
    scaling.measure_overhead(engine, 18, 3)
    assert [len(deltas) for deltas in sent] == [18, 18, 18] and not engine.has_work


def test_attention_reads_all_blocks_before_any_again(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []

    class Program:
        def __init__(self, function: Callable[[int], object], max_rows: int) -> None:
            self.function = function

        def run(self, num_rows: int) -> None:
            self.function(num_rows)

    def attend(*args: object) -> None:
        tables = args[2]
        calls.append(tables.flatten().tolist())  # type: ignore[attr-defined]

    monkeypatch.setattr(scaling, "Program", Program)
    monkeypatch.setattr(scaling, "paged_attention", attend)
    scaling.measure_attention(read_config(tiny_checkpoint("smollm2")), [1, 2], [32, 64])
    # 2 x 64 tokens are 8 blocks: 4 calls of 2 blocks read them all, or 2 of 4, or 1 of 8.
    num_calls = 1 + scaling.NUM_CALLS
    for index, num_rounds in enumerate((4, 2, 2, 1)):
        first = calls[index * num_calls :][:num_rounds]
        assert sorted(block for table in first for block in table) == list(range(8))


def test_errors_come_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([str(tmp_path), "--plot", str(tmp_path / "missing")]) == 1
    assert capsys.readouterr().err == f"scaling: error: {tmp_path / 'missing'} is not a folder\n"
    assert scaling.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("scaling: error: ")
