"""The load generator counts right, against a server whose delays and faults are known."""

import json
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_openai_server import FakeServer

from octavo.benchmarks import serving
from octavo.benchmarks.serving import Output


@contextmanager
def running(**settings: Any) -> Iterator[FakeServer]:
    server = FakeServer(**settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Bench = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs main() on a server: exit code, the last line's JSON, everything printed."""

    def run(server: FakeServer, *flags: str) -> tuple[int, dict[str, Any], str]:
        sizes = ["--num-prompts", "6", "--num-warmups", "0", "--input-len", "12", "--output-len", "5"]
        code = serving.main(["--base-url", server.url, *sizes, *flags])
        out = capsys.readouterr().out
        return code, json.loads(out.splitlines()[-1]), out

    return run


def test_counts_and_keys(bench: Bench) -> None:
    with running() as server:
        code, result, out = bench(server, "--num-warmups", "2", "--max-concurrency", "3", "--label", "x")
    assert code == 0
    assert len(server.bodies) == 8 and 1 <= server.peak <= 3
    assert (result["completed"], result["failed"], result["num_wrong_length"]) == (6, 0, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (6 * 12, 6 * 5)
    assert result["model_id"] == "fake-model" and result["request_rate"] == "inf" and result["label"] == "x"
    assert result["output_throughput"] == pytest.approx(30 / result["duration"])
    assert result["total_token_throughput"] == pytest.approx(102 / result["duration"])
    for name in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std", "p50", "p95", "p99"):
            assert result[f"{statistic}_{name}_ms"] >= 0
    lines = out.splitlines()
    assert lines[0] == "=" * 12 + " Serving Benchmark Result " + "=" * 12
    assert f"{'Successful requests:':<40} 6" in out and f"{'P99 TTFT (ms):':<40} " in out
    assert lines[-2] == "=" * 50


def test_bodies_are_what_was_asked(bench: Bench) -> None:
    with running() as server:
        extra = json.dumps({"ignore_eos": None, "stream_options": None, "top_k": 7})
        bench(server, "--extra-body", extra, "--temperature", "0.5", "--api-key", "secret", "--shared-prefix-len", "4")
    for body in server.bodies:
        assert set(body) == {"model", "prompt", "max_tokens", "temperature", "stream", "top_k"}
        assert (body["max_tokens"], body["temperature"], body["stream"], body["top_k"]) == (5, 0.5, True, 7)
    prompts = [body["prompt"].split() for body in server.bodies]
    # 12 tokens, one of which the tokenizer adds by itself; 4 of them shared, that one included.
    assert {len(prompt) for prompt in prompts} == {11}
    assert len({tuple(prompt[:3]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == 6
    assert server.keys == {"Bearer secret"}


def test_ignore_eos_is_asked_for_unless_refused(bench: Bench) -> None:
    with running() as server:
        bench(server)
        bench(server, "--no-ignore-eos")
    assert [body.get("ignore_eos") for body in server.bodies] == [True] * 6 + [None] * 6
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


def test_latencies_are_those_of_the_server(bench: Bench) -> None:
    with running(first_s=0.15, gap_s=0.04) as server:
        _, result, _ = bench(server, "--num-prompts", "2")
    # The server sleeps at least this long; how much longer everything takes is up to the machine.
    assert result["mean_ttft_ms"] >= 150 and result["mean_e2el_ms"] >= 150 + 4 * 40
    assert result["mean_e2el_ms"] == pytest.approx(result["mean_ttft_ms"] + 4 * result["mean_tpot_ms"])
    assert result["mean_itl_ms"] == pytest.approx(result["mean_tpot_ms"])  # one output a token


def test_arithmetic_on_given_times() -> None:
    outputs = [
        Output(sent_s=10.0, times_s=[10.5, 10.6, 10.9], num_prompt_tokens=4, num_output_tokens=3, finished=True),
        Output(sent_s=10.2, times_s=[11.2], num_prompt_tokens=4, num_output_tokens=1, finished=True),
        Output(sent_s=10.0, error="HTTP 500: x"),
    ]
    result = serving.summarize(outputs, 2.0, [50, 75], output_len=3)
    assert (result["completed"], result["failed"], result["num_wrong_length"]) == (2, 1, 1)
    assert result["errors"] == ["1 x HTTP 500: x"]
    assert (result["total_output_tokens"], result["output_throughput"]) == (4, 2.0)
    assert result["mean_ttft_ms"] == pytest.approx(750) and result["p75_ttft_ms"] == pytest.approx(875)
    assert result["mean_itl_ms"] == pytest.approx(200) and result["std_itl_ms"] == pytest.approx(100)
    assert result["mean_tpot_ms"] == pytest.approx(200)  # of the first request alone: one token has no TPOT
    assert result["mean_e2el_ms"] == pytest.approx(950)
    assert result["max_output_tokens_per_s"] == 3 and result["max_concurrent_requests"] == 2


def test_tokens_merged_into_one_output_count_by_usage() -> None:
    output = Output(sent_s=0.0)
    output.read(b'{"choices": [{"text": "a b", "finish_reason": null}]}', 1.0)
    output.read(b'{"choices": [{"text": "", "finish_reason": null}]}', 2.0)
    output.read(b'{"choices": [{"text": "c", "finish_reason": "length"}], "usage": {"completion_tokens": 5}}', 3.0)
    assert output.times_s == [1.0, 3.0] and output.num_tokens == 5
    result = serving.summarize([output], 3.0, [50])
    assert result["mean_tpot_ms"] == pytest.approx(500) and result["mean_itl_ms"] == pytest.approx(2000)


def test_failures_are_counted_and_shown(bench: Bench) -> None:
    with running(num_failures=2) as server:
        code, result, out = bench(server)
        assert bench(server)[0] == 0
    assert code == 1
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (4, 2, 20)
    assert "error: 2 x HTTP 500" in out and "out of luck" in out


@pytest.mark.parametrize(
    ("user", "error"), [("break", "the stream broke off"), ("error", "engine died")], ids=["break", "error"]
)
def test_a_stream_that_breaks_is_a_failure(bench: Bench, tmp_path: Path, user: str, error: str) -> None:
    with running() as server:
        code, result, _ = bench(
            server, "--extra-body", json.dumps({"user": user}), "--plot", str(tmp_path / "empty.png")
        )
    assert code == 1 and result["failed"] == 6 and error in result["errors"][0]
    assert result["mean_ttft_ms"] is None


def test_an_end_without_done_is_no_failure(bench: Bench) -> None:
    with running(done=False) as server:
        code, result, _ = bench(server)
    assert code == 0 and result["completed"] == 6


def test_wrong_length_is_reported(bench: Bench) -> None:
    with running() as server:
        code, result, out = bench(server, "--extra-body", '{"user": "short"}')
    assert code == 0 and result["num_wrong_length"] == 6
    assert f"{'Requests of another length:':<40} 6" in out


def test_chat(bench: Bench) -> None:
    with running(first_s=0.05) as server:
        code, result, _ = bench(server, "--endpoint", "/v1/chat/completions", "--num-prompts", "2")
    assert code == 0 and result["endpoint_type"] == "openai-chat"
    assert [len(body["messages"][0]["content"].split()) for body in server.bodies] == [12, 12]
    assert result["total_output_tokens"] == 10
    assert result["median_ttft_ms"] >= 45  # the role chunk is no output


def test_without_tokenizer_prompts_are_token_ids(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with running(routes=False) as server:
        code, result, _ = bench(server, "--shared-prefix-len", "8")
        refused = serving.main(["--base-url", server.url, "--endpoint", "/v1/chat/completions"])
    assert code == 0 and result["total_input_tokens"] == 6 * 12
    prompts = [body["prompt"] for body in server.bodies]
    assert {len(prompt) for prompt in prompts} == {12} and len({tuple(prompt[:8]) for prompt in prompts}) == 1
    assert refused == 1 and "--tokenizer" in capsys.readouterr().err


def test_tokenizer_folder_gives_exact_lengths(smollm2: Path, bench: Bench) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    with running(routes=False) as server:
        bench(server, "--tokenizer", str(smollm2), "--input-len", "67", "--shared-prefix-len", "33")
    prompts = [tokenizer.encode(body["prompt"]).ids for body in server.bodies]
    assert {len(prompt) for prompt in prompts} == {67}
    assert len({tuple(prompt[:33]) for prompt in prompts}) == 1 and len({tuple(prompt[:34]) for prompt in prompts}) > 1


def test_levels_have_their_own_prompts_result_and_plot(bench: Bench, tmp_path: Path) -> None:
    saved, drawn = tmp_path / "result.json", tmp_path / "plot.png"
    with running() as server:
        code, result, out = bench(server, "--max-concurrency", "1,4", "--save-result", str(saved), "--plot", str(drawn))
    assert code == 0
    assert [run["max_concurrency"] for run in result["runs"]] == [1, 4]
    assert [run["max_concurrent_requests"] <= run["max_concurrency"] for run in result["runs"]] == [True, True]
    assert len({body["prompt"] for body in server.bodies}) == 12
    assert out.count("Serving Benchmark Result") == 2
    assert json.loads(saved.read_text()) == result
    assert drawn.read_bytes().startswith(b"\x89PNG") and drawn.stat().st_size > 5000


def test_same_seed_same_prompts(bench: Bench) -> None:
    with running() as server:
        bench(server, "--seed", "1")
        bench(server, "--seed", "1")
        bench(server, "--seed", "2")
    first, again, other = ({body["prompt"] for body in server.bodies[at : at + 6]} for at in (0, 6, 12))
    assert first == again and not first & other


async def test_request_rate_spreads_arrivals() -> None:
    with running() as server:
        async with serving.make_client(server.url, None, 10) as client:
            bodies = [b'{"prompt": "a", "max_tokens": 1}'] * 10
            start_s = time.perf_counter()
            outputs, duration_s = await serving.drive(
                client, "/v1/completions", bodies, request_rate=50, burstiness=0.5, seed=3
            )
    rng = random.Random(3)
    at_s = start_s
    for output in outputs:
        assert output.sent_s >= at_s - 0.001
        at_s += rng.gammavariate(0.5, 1 / 25)
    assert duration_s >= outputs[-1].sent_s - outputs[0].sent_s


def test_unreachable_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with running() as server:
        url = server.url
    assert serving.main(["--base-url", url]) == 1
    error = capsys.readouterr().err
    assert error.startswith("serving: error: no model from") and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-prompts", "0"],
        ["--max-concurrency", "1,0"],
        ["--request-rate", "0"],
        ["--request-rate", "nan"],
        ["--percentiles", "101"],
        ["--extra-body", "[]"],
        ["--shared-prefix-len", "256"],
        ["--nonsense"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_wrong_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        serving.main(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_percentile_interpolates() -> None:
    assert serving.percentile([4.0, 1.0, 2.0], 50) == 2.0
    assert serving.percentile([1.0, 2.0], 95) == pytest.approx(1.95)
    assert serving.percentile([3.0], 99) == 3.0
    assert math.isclose(serving.percentile([0.0, 10.0], 0), 0.0)


def test_runs_as_a_script() -> None:
    script = Path(serving.__file__)
    with running(num_failures=1) as server:
        done = subprocess.run(
            [sys.executable, script, "--base-url", server.url, "--num-prompts", "1", "--num-warmups", "0"],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1 and json.loads(done.stdout.splitlines()[-1])["failed"] == 1
    assert done.stderr == ""
