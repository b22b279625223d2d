"""The `octavo` command as a user meets it: help, versions, and one line for every mistake."""

import json
import os
import re
import socketserver
import subprocess
import sys
import threading
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from octavo import __version__
from octavo.server import cli
from octavo.server.config import ServerConfig

ROOT = Path(__file__).parent.parent


def octavo(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "octavo.server", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def test_version() -> None:
    done = octavo("--version")
    assert (done.returncode, done.stdout) == (0, f"octavo {__version__}\n")


def test_help_names_every_verb_and_flag() -> None:
    top = octavo("--help")
    assert top.returncode == 0
    assert all(verb in top.stdout for verb in ("serve", "pull", "quantize", "chat", "bench"))
    serve = octavo("serve", "--help")
    assert serve.returncode == 0 and "example:\n  octavo serve " in serve.stdout
    for f in fields(ServerConfig):
        if not (f.metadata.get("positional") or f.metadata.get("hidden")):
            assert "--" + f.name.replace("_", "-") in serve.stdout
    assert "(default: 8000)" in serve.stdout and "(default: 0.9)" in serve.stdout and "(default: on)" in serve.stdout


def test_the_parser_needs_no_third_party_module() -> None:
    """What keeps `octavo --help` quick, without a clock: the command imports the standard library only."""
    code = "import sys, octavo.server.cli as c; c.build_parser(); print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert {"torch", "numpy", "fastapi", "pydantic", "httpx", "msgspec", "tokenizers"}.isdisjoint(loaded.split())


def test_without_a_command_the_help_is_shown() -> None:
    done = octavo()
    assert done.returncode == 2 and "commands:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "serv",
            "octavo: error: COMMAND: invalid choice: 'serv' (choose from 'serve', 'pull', 'quantize', 'chat', 'bench')",
        ),
        ("serve --prot 9", "octavo serve: error: unknown flag --prot; did you mean --port?"),
        ("serve --prot=9", "octavo serve: error: unknown flag --prot; did you mean --port?"),
        ("serve --xyzzy", "octavo serve: error: unknown flag --xyzzy; see octavo serve --help"),
        ("serve --max-num-seq 4", "octavo serve: error: unknown flag --max-num-seq; did you mean --max-num-seqs?"),
        ("serve one two", "octavo serve: error: unknown argument two; see octavo serve --help"),
        ("serve --port 65536", "octavo serve: error: --port: must be between 0 and 65535, not 65536"),
        ("serve --port -1", "octavo serve: error: --port: must be between 0 and 65535, not -1"),
        ("serve --port", "octavo serve: error: --port: expected one argument"),
        ("serve --max-num-seqs 0", "octavo serve: error: --max-num-seqs: must be 1 or more, not 0"),
        (
            "serve --max-num-batched-tokens 0",
            "octavo serve: error: --max-num-batched-tokens: must be 1 or more, not 0",
        ),
        (
            "serve --shutdown-timeout nan",
            "octavo serve: error: --shutdown-timeout: must be between 0 and 86400, not nan",
        ),
        ("serve --shutdown-timeout x", "octavo serve: error: --shutdown-timeout: not a number: 'x'"),
        (
            "serve --dtype int3",
            "octavo serve: error: --dtype: invalid choice: 'int3' "
            "(choose from 'auto', 'bfloat16', 'float16', 'float32')",
        ),
        ("serve --block-size 17", "octavo serve: error: --block-size: invalid choice: 17 (choose from 16, 32, 64)"),
        ("serve --api-key=", "octavo serve: error: --api-key: must not be empty"),
        (
            "serve --metrics-prefix 1x",
            "octavo serve: error: --metrics-prefix: must be letters, digits, _ and : without a leading digit, not '1x'",
        ),
        ("chat --temperature 3", "octavo chat: error: --temperature: must be between 0 and 2, not 3"),
        (
            "bench nothing",
            "octavo bench: error: BENCHMARK: invalid choice: 'nothing' (choose from 'serve', 'offline')",
        ),
    ],
)
def test_wrong_usage_is_one_line(arguments: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments.split())
    assert exit_info.value.code == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_wrong_usage_exits_with_2_and_no_traceback() -> None:
    done = octavo("serve", "--prot", "9")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["serve", "pull"])
def test_a_missing_model_is_one_line(verb: str, tmp_path: Path) -> None:
    done = octavo(verb, str(tmp_path / "nowhere"), OCTAVO_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"octavo: error: .+\n", done.stderr), done.stderr


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    done = octavo("serve", str(tmp_path), "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"octavo: error: .+\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-1", -1),
        ("1k", 1000),
        ("1K", 1024),
        ("25.6k", 25600),
        ("1.5K", 1536),
        ("2m", 2_000_000),
        ("512M", 512 << 20),
        ("3g", 3_000_000_000),
        ("4G", 4 << 30),
        ("1T", 1 << 40),
        (str(2**64 - 1), 2**64 - 1),
    ],
)
def test_whole_numbers(text: str, value: int) -> None:
    assert cli.parse_int(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "1kb", "1 k", "1.5", "0.0001k", "1e3", "1_000", "٣", "0x10", "nan", "9" * 5000]
)
def test_not_whole_numbers(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="not a whole number"):
        cli.parse_int(text)


def test_every_number_has_a_range_or_choices() -> None:
    for flag in cli.serve_flags():
        if flag.type in (int, float):
            assert flag.choices or flag.field in cli.RANGES, flag.name


def test_flags_become_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServerConfig] = []

    def run(config: ServerConfig) -> int:
        served.append(config)
        return 0

    monkeypatch.setattr("octavo.server.serve.run", run)
    monkeypatch.setattr("octavo.server.pull.resolve_model", lambda model: Path("/models") / (model or "default"))
    assert cli.main(["serve"]) == 0
    flags = "mine --port 0 --max-num-seqs 1k --no-enable-prefix-caching --enable-prompt-tokens-details --api-key a"
    assert cli.main(["serve", *flags.split(), "--api-key", "b", "--block-size", "32", "--shutdown-timeout", "1.5"]) == 0
    assert served == [
        ServerConfig(model="/models/default"),
        ServerConfig(
            model="/models/mine",
            port=0,
            max_num_seqs=1000,
            enable_prefix_caching=False,
            enable_prompt_tokens_details=True,
            api_key=("a", "b"),
            block_size=32,
            shutdown_timeout=1.5,
        ),
    ]


def test_bench_hands_over_its_arguments_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    class Benchmark:
        @staticmethod
        def main(argv: list[str]) -> int:
            return 7 if argv == ["--help", "--model", "x", "y"] else 0

    monkeypatch.setitem(sys.modules, "octavo.benchmarks.serving", Benchmark)
    assert cli.main(["bench", "serve", "--help", "--model", "x", "y"]) == 7


def flags_table() -> str:
    """The table of flags in README.md."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for flag in cli.serve_flags():
        name = f"`{flag.name}`" + (f", `--no-{flag.name[2:]}`" if flag.type is bool else "")
        meaning = flag.help + (f" ({', '.join(map(str, flag.choices))})" if flag.choices else "")
        lines.append(f"| {name} | {f'`{flag.default}`' if flag.default else ''} | {meaning} |")
    return "\n".join(lines)


def test_readme_lists_the_flags() -> None:
    assert flags_table() in (ROOT / "README.md").read_text(), f"README.md's table must be:\n{flags_table()}"


class OpenAIServer(ThreadingHTTPServer):
    """A server that streams what a test prepared and keeps the bodies it was sent."""

    daemon_threads = True
    chunks: list[bytes]
    bodies: list[dict[str, Any]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: OpenAIServer

    def do_GET(self) -> None:
        self._send(200, b'{"data": [{"id": "tiny"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body | {"authorization": self.headers["Authorization"]})
        if "refuse" in body["messages"][-1]["content"]:
            self._send(400, b'{"error": {"message": "messages: refused"}}')
        else:
            self._send(200, b"".join(b"data: " + chunk + b"\n\n" for chunk in self.server.chunks))

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(("127.0.0.1", 0), Handler) as server:
        server.bodies = []
        server.chunks = [chunk("Hel"), chunk("lo\u2028\x1b[2J"), b'{"choices": []}', b"[DONE]"]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chunk(text: str) -> bytes:
    return json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode()


def test_chat_holds_a_conversation(server: OpenAIServer) -> None:
    flags = ["--system", "short", "--temperature", "0", "--max-tokens", "5", "--api-key", "k"]
    done = octavo("chat", "--base-url", server.url, *flags, stdin="Hi\n\nAnd?\n/quit\nnever\n")
    # The screen is not steered by what a model writes; the conversation keeps it as it came.
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello\u2028[2J\n" * 2, "")
    first, second = server.bodies
    assert first == {
        "stream": True,
        "model": "tiny",
        "temperature": 0.0,
        "max_tokens": 5,
        "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "Hi"}],
        "authorization": "Bearer k",
    }
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "Hello\u2028\x1b[2J"},
        {"role": "user", "content": "And?"},
    ]


def test_chat_goes_on_after_a_refused_turn(server: OpenAIServer) -> None:
    done = octavo("chat", "--base-url", server.url, stdin="refuse\nHi\n")
    assert (done.returncode, done.stderr) == (1, "octavo: error: messages: refused\n")
    assert done.stdout.startswith("Hello")
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([chunk("Hel")], "the server broke off the answer"),
        ([b'{"error": {"message": "the engine died"}}'], "the engine died"),
        ([b"not json"], "the server's answer is not a stream of the OpenAI API"),
        ([b"[1]"], "the server's answer is not a stream of the OpenAI API"),
    ],
)
def test_chat_tells_of_a_broken_stream(server: OpenAIServer, chunks: list[bytes], message: str) -> None:
    server.chunks = chunks
    done = octavo("chat", "--base-url", server.url, stdin="Hi\n")
    assert (done.returncode, done.stderr) == (1, f"octavo: error: {message}\n")


def test_chat_without_a_server_is_one_line() -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as closed:
        port = closed.server_address[1]
    done = octavo("chat", "--base-url", f"http://127.0.0.1:{port}", stdin="Hi\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"octavo: error: cannot reach .+\n", done.stderr), done.stderr
