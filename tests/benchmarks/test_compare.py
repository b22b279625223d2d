"""Servers are measured in turn on the same prompts, what was started is gone afterwards, and ratios are per pair."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_openai_server import FakeServer

from octavo.benchmarks import compare

FAKE = shlex.join([sys.executable, str(Path(__file__).with_name("fake_openai_server.py"))])
TINY = ["--case", "tiny=2,3,9,4,0"]


def server(name: str, command: str = FAKE) -> list[str]:
    return ["--server", f"{name}={command} {{port}}@http://127.0.0.1:{{port}}"]


@pytest.fixture
def two_running() -> Iterator[list[FakeServer]]:
    fakes = [FakeServer(), FakeServer()]
    threads = [threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}) for fake in fakes]
    for thread in threads:
        thread.start()
    try:
        yield fakes
    finally:
        for fake, thread in zip(fakes, threads, strict=True):
            fake.shutdown()
            fake.server_close()
            thread.join()


def test_pairs_cases_and_ratios(smollm2: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = [*server("a"), *server("b"), "--tokenizer", str(smollm2), "--pairs", "2", *TINY, "--case", "one=1,1,5,2,0"]
    saved = tmp_path / "result.json"
    code = compare.main(
        [*flags, "--extra-body", 'b={"user": "short"}', "--model", "a=another", "--save-result", str(saved)]
    )
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and json.loads(saved.read_text()) == result
    assert result["servers"] == ["a", "b"] and [list(pair) for pair in result["pairs"]] == [["a", "b"]] * 2
    assert result["cases"]["tiny"] == {
        "max_concurrency": 2,
        "num_prompts": 3,
        "input_len": 9,
        "output_len": 4,
        "shared_prefix_len": 0,
    }
    # One start serves all cases of a pair; the second pair goes the other way round.
    heads = [line.split(":")[0].split(", ", 1)[1] for line in err.splitlines() if "starting" in line]
    assert heads == ["a", "b", "b", "a"]
    for pair in result["pairs"]:
        for measured in pair.values():
            assert measured["start_s"] > 0
            assert all(one["resident_bytes"] > 0 for one in (measured, *measured["cases"].values()))
        a, b = (pair[name]["cases"] for name in "ab")
        assert (a["tiny"]["model_id"], b["tiny"]["model_id"]) == ("another", "fake-model")
        assert (a["tiny"]["total_output_tokens"], b["tiny"]["total_output_tokens"]) == (12, 9)
        assert (a["one"]["total_output_tokens"], b["one"]["total_output_tokens"]) == (2, 1)
    for case in ("tiny", "one"):
        first, second = (
            pair["a"]["cases"][case]["output_throughput"] / pair["b"]["cases"][case]["output_throughput"]
            for pair in result["pairs"]
        )
        assert result["ratios"][case]["b"]["output_throughput"] == {
            "median": pytest.approx((first + second) / 2),
            "min": min(first, second),
            "max": max(first, second),
        }
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    assert [row[:2] for row in rows if row[0] in result["cases"]] == [
        *(["tiny", "a"], ["tiny", "b"], ["one", "a"], ["one", "b"]),
        *(["tiny", "a / b"], ["one", "a / b"]),
    ]
    assert [row[-2:] for row in rows if row[:2] == ["tiny", "b"]] == [["0", "6"]]  # none failed, 6 of another length


def test_prompts_are_shared_by_servers_and_by_nothing_else(
    smollm2: Path, two_running: list[FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for name, fake in zip("ab", two_running, strict=True) for flag in ("--server", f"{name}=@{fake.url}")]
    cases = ["--case", "own=1,4,12,2,0", "--case", "prefix=1,4,12,3,8"]
    assert compare.main([*flags, *cases, "--tokenizer", str(smollm2), "--pairs", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(pair["a"]["start_s"] is None and pair["a"]["resident_bytes"] is None for pair in result["pairs"])
    a, b = ([body for body in fake.bodies if body["max_tokens"] < 16] for fake in two_running)
    assert sorted(body["prompt"] for body in a) == sorted(body["prompt"] for body in b)
    assert len({body["prompt"] for body in a}) == len(a) == 2 * (5 + 5)

    def starts(max_tokens: int) -> list[str]:
        return [" ".join(body["prompt"].split()[:3]) for body in a if body["max_tokens"] == max_tokens]

    # Each pair has a prefix of its own, and so has the one warm-up of each case.
    assert len(set(starts(2))) == 10 and len(set(starts(3))) == 4


def test_a_running_server_is_left_running(two_running: list[FakeServer]) -> None:
    with compare.running(compare.peer(f"a=@{two_running[0].url}"), 30) as running:
        assert (running.url, running.process_id) == (two_running[0].url, None)
    assert httpx.get(f"{running.url}/health", trust_env=False).status_code == 200


def test_a_stopped_server_is_gone() -> None:
    one = compare.peer(server("a")[1])
    with compare.running(one, 30) as running:
        assert httpx.get(f"{running.url}/health", trust_env=False).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health", trust_env=False)


def test_memory_is_that_of_the_whole_tree() -> None:
    size = 50 << 20
    hog = shlex.join([sys.executable, "-c", f"import time; kept = b'x' * {size}; print(flush=True); time.sleep(60)"])
    command = ["sh", "-c", f"{hog} & wait"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = compare.resident_bytes(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
    assert found is not None and found > size


def test_failed_runs_have_no_figures() -> None:
    good: dict[str, Any] = dict.fromkeys(compare.FIGURES, 2.0) | {"failed": 0, "num_wrong_length": 0}
    bad: dict[str, Any] = dict.fromkeys(compare.FIGURES, None) | {"failed": 3, "num_wrong_length": 0}

    def measured(result: dict[str, Any]) -> dict[str, Any]:
        return {"start_s": None, "resident_bytes": None, "cases": {"c": result | {"resident_bytes": None}}}

    pairs = [{"a": measured(good), "b": measured(bad)}] * 2
    assert compare.ratios(pairs) == {"c": {"b": {key: {} for key in compare.FIGURES}}}
    lines = compare.tables(pairs).splitlines()
    assert lines[2] == "| a | - | - | - |"
    assert "| c | a | 2.0 | 2.0 | 2.0 | 2.0 | 2.0 | 0 | 0 |" in lines
    assert "| c | b | - | - | - | - | - | 6 | 0 |" in lines and "| c | a / b | - | - | - | - | - |" in lines
    pairs[1] = {"a": measured(good), "b": measured(dict.fromkeys(compare.FIGURES, 4.0))}
    assert compare.ratios(pairs)["c"]["b"]["p99_itl_ms"] == {"median": 0.5, "min": 0.5, "max": 0.5}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (shlex.join([sys.executable, "-c", "import sys; sys.exit('no model')"]), "status 1"),
        ("/nonexistent/server", "cannot be started"),
    ],
    ids=["ends", "missing"],
)
def test_a_server_that_does_not_start_is_an_error(
    smollm2: Path, capsys: pytest.CaptureFixture[str], command: str, says: str
) -> None:
    flags = [*server("a", command), *server("b"), "--tokenizer", str(smollm2), *TINY]
    assert compare.main(flags) == 1
    err = capsys.readouterr().err
    assert says in err and ("no model" in err) == (says == "status 1")


def test_a_server_that_does_not_answer_is_an_error(
    smollm2: Path, two_running: list[FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    two_running[0].num_failures = 1
    flags = [flag for name, fake in zip("ab", two_running, strict=True) for flag in ("--server", f"{name}=@{fake.url}")]
    assert compare.main([*flags, *TINY, "--tokenizer", str(smollm2)]) == 1
    assert "a gives no completion: HTTP 500" in capsys.readouterr().err


def test_cases_by_name_and_by_size() -> None:
    assert compare.case("c32") == ("c32", compare.Case(32, 64, 256, 128, 0))
    assert compare.case("c32=1,2,30,4,29") == ("c32", compare.Case(1, 2, 30, 4, 29))


@pytest.mark.parametrize(
    "flags",
    [
        server("a"),
        [*server("a"), *server("a")],
        ["--server", "a=b"],
        [*server("a"), *server("b"), "--model", "c=d"],
        [*server("a"), *server("b"), *TINY],
        [*server("a"), *server("b"), "--case", "unknown"],
        [*server("a"), *server("b"), "--case", "c=1,2,3"],
        [*server("a"), *server("b"), "--case", "c=1,2,30,4,30"],
    ],
    ids=["one", "same name", "no url", "unknown name", "same case", "unknown case", "few sizes", "long prefix"],
)
def test_wrong_flags_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.main([*flags, *TINY, "--tokenizer", "."])
    assert stop.value.code == 2
