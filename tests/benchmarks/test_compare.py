"""Servers are started in turn, get the same prompts, and are gone afterwards."""

import json
import shlex
import sys
from pathlib import Path

import httpx
import pytest

from octavo.benchmarks import compare

FAKE = shlex.join([sys.executable, str(Path(__file__).with_name("fake_openai_server.py"))])
SIZES = ["--num-prompts", "3", "--input-len", "9", "--output-len", "4", "--max-concurrency", "2", "--num-warmups", "1"]


def server(name: str, command: str = FAKE) -> list[str]:
    return ["--server", f"{name}={command} {{port}}@http://127.0.0.1:{{port}}"]


def test_pairs_and_ratios(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*server("a"), *server("b"), "--tokenizer", str(smollm2), "--pairs", "2", *SIZES]
    code = compare.main([*flags, "--extra-body", 'b={"user": "short"}', "--model", "a=another"])
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert result["servers"] == ["a", "b"] and [list(pair) for pair in result["pairs"]] == [["a", "b"]] * 2
    assert [line.split(": ")[1] for line in err.splitlines() if line.startswith("pair")] == ["a", "b", "b", "a"]
    for pair in result["pairs"]:
        assert (pair["a"]["model_id"], pair["b"]["model_id"]) == ("another", "fake-model")
        assert (pair["a"]["total_output_tokens"], pair["b"]["total_output_tokens"]) == (12, 9)
    expected = [pair["a"]["output_throughput"] / pair["b"]["output_throughput"] for pair in result["pairs"]]
    assert result["ratios"]["b"]["output_throughput"] == {
        "median": pytest.approx(sum(expected) / 2),
        "min": min(expected),
        "max": max(expected),
    }


def test_a_stopped_server_is_gone() -> None:
    one = compare.peer(server("a")[1])
    with compare.running(one, 30) as url:
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


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
    flags = [*server("a", command), *server("b"), "--tokenizer", str(smollm2), *SIZES]
    assert compare.main(flags) == 1
    err = capsys.readouterr().err
    assert says in err and ("no model" in err) == (says == "status 1")


@pytest.mark.parametrize(
    "flags",
    [server("a"), [*server("a"), *server("a")], ["--server", "a=b"], [*server("a"), *server("b"), "--model", "c=d"]],
    ids=["one", "same name", "no url", "unknown name"],
)
def test_wrong_flags_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.main([*flags, "--tokenizer", "."])
    assert stop.value.code == 2
