"""The server on a real socket: probes while it loads, clients that leave, draining, signals, hostile connections."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import FakeEngine, eventually, make_tokenizer, saying

from octavo.server import serve
from octavo.server.api import state
from octavo.server.config import ServerConfig
from octavo.server.errors import StartupError


@dataclass
class FakeClient(FakeEngine):
    """The fake engine with a start and an end."""

    loaded: asyncio.Event = field(default_factory=asyncio.Event)
    start_error: str = ""
    is_closed: bool = False

    async def start(self) -> None:
        await self.loaded.wait()
        if self.start_error:
            raise StartupError(self.start_error)
        self.state = "ok"

    async def close(self) -> None:
        self.is_closed = True


@dataclass
class Running:
    """A server in this process: its engine, its address, the task that will give the exit status."""

    engine: FakeClient
    port: int
    http: httpx.AsyncClient
    exit_status: "asyncio.Task[int]"

    async def send(self, body: dict[str, Any], path: str = "/v1/completions") -> "Connection":
        """Sends a request and returns the connection, without waiting for an answer."""
        connection = Connection(*await asyncio.open_connection("127.0.0.1", self.port))
        raw = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        connection.writer.write(head.encode() + raw)
        return connection

    async def half_send(self) -> "Connection":
        """Sends a head and one byte of a body, and waits until the server waits for the rest."""
        connection = Connection(*await asyncio.open_connection("127.0.0.1", self.port))
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.writer.write(head + b"expect: 100-continue\r\ncontent-length: 100\r\n\r\n{")
        async with asyncio.timeout(10):
            assert b"100 Continue" in await connection.reader.readuntil(b"\r\n\r\n")
        return connection

    async def until_counted(self, line: str) -> None:
        """Waits until /metrics has a line."""
        async with asyncio.timeout(10):
            while line not in (await self.http.get("/metrics")).text:
                pass

    async def until_draining(self) -> None:
        """Waits until the signal has arrived."""
        async with asyncio.timeout(10):
            while (response := await self.http.get("/readyz")).status_code == 200:
                pass
        assert (response.status_code, response.text) == (503, "draining")


@dataclass
class Connection:
    """A client's raw connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def close(self) -> None:
        """Leaves."""
        self.writer.close()
        await self.writer.wait_closed()

    async def rest(self) -> bytes:
        """All that the server sends until it closes."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""
            finally:
                self.writer.close()


@asynccontextmanager
async def running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, load: bool = True, **config: Any
) -> AsyncIterator[Running]:
    tokenizer = make_tokenizer(tmp_path / "tiny")
    engine = FakeClient(saying(tokenizer, "abcdef"), state="starting")
    monkeypatch.setattr(serve, "EngineClient", lambda _: engine)
    listener = serve._listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server_config = ServerConfig(model=str(tmp_path / "tiny"), **config)
    task = asyncio.create_task(serve._serve(server_config, tokenizer, listener))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
        try:
            if load:
                engine.loaded.set()
                await eventually(lambda: engine.state == "ok")
            yield Running(engine, port, http, task)
        finally:
            if not task.done():
                os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.gather(task, return_exceptions=True)
            assert engine.is_closed
            assert engine.num_running == 0


async def test_it_listens_while_the_engine_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch, load=False) as server:
        assert (await server.http.get("/livez")).status_code == 200
        assert (await server.http.get("/readyz")).status_code == 503
        assert (await server.http.post("/v1/completions", json={"prompt": "a"})).status_code == 503
        server.engine.loaded.set()
        await eventually(lambda: server.engine.state == "ok")
        assert (await server.http.get("/readyz")).status_code == 200
        assert (await server.http.post("/v1/completions", json={"prompt": "a"})).status_code == 200
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.exit_status == 0


async def test_a_failed_start_is_a_startup_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch, load=False) as server:
        server.engine.start_error = "no weights"
        server.engine.loaded.set()
        with pytest.raises(StartupError, match="no weights"):
            await server.exit_status


async def test_a_signal_while_it_loads_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch, load=False) as server:
        await server.http.get("/livez")
        os.kill(os.getpid(), signal.SIGINT)
        assert await server.exit_status == 0


def test_a_port_in_use_is_a_startup_error(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            serve.run(ServerConfig(model=str(tmp_path / "tiny"), host="127.0.0.1", port=port))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("free_tokens", [0, 3])
async def test_a_client_that_leaves_ends_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, free_tokens: int
) -> None:
    async with running(tmp_path, monkeypatch) as server:
        server.engine.go.clear()
        server.engine.free_tokens = free_tokens
        connection = await server.send({"prompt": ["a", "b"], "stream": stream, "n": 2})
        await eventually(lambda: server.engine.num_running == 2)
        if stream and free_tokens:
            assert b"200 OK" in await connection.reader.readline()
        await connection.close()
        await eventually(lambda: server.engine.num_running == 0)
        assert server.engine.num_closed_early == 2
        # The next client finds all the room free again.
        server.engine.go.set()
        assert (await server.http.post("/v1/completions", json={"prompt": "a"})).status_code == 200


async def test_a_client_may_leave_before_its_body_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, monkeypatch) as server:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", server.port))
        head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        connection.writer.write(head)
        await connection.writer.drain()
        await server.http.get("/livez")  # by now the server has seen it
        await connection.close()
        await server.until_counted('http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0')
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_bodies_on_their_way_take_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch, max_num_seqs=1, max_num_queued_reqs=0) as server:
        connections = [await server.half_send() for _ in range(3)]
        assert (await server.http.post("/v1/completions", json={"prompt": "a"})).status_code == 200
        monkeypatch.setattr(state, "MAX_BODIES", 3)
        response = await server.http.post("/v1/completions", json={"prompt": "a"})
        assert (response.status_code, "retry-after" in response.headers) == (429, True)
        for connection in connections:
            await connection.close()
        async with asyncio.timeout(10):
            while (await server.http.post("/v1/completions", json={"prompt": "a"})).status_code != 200:
                pass


async def test_draining_waits_for_no_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch, shutdown_timeout=60) as server:
        connection = await server.half_send()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await server.exit_status == 0
        assert (await connection.rest()).startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize("apart", [False, True])
async def test_an_offer_to_upgrade_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    async with running(tmp_path, monkeypatch) as server:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", server.port))
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABkAAQAAP__\r\ncontent-type: application/json\r\ncontent-length: 15\r\n"
        )
        async with asyncio.timeout(10):
            if apart:
                connection.writer.write(head + b"expect: 100-continue\r\n\r\n")
                assert b"100 Continue" in await connection.reader.readuntil(b"\r\n\r\n")
                connection.writer.write(b'{"prompt": "a"}')
            else:
                connection.writer.write(head + b'\r\n{"prompt": "a"}')
            assert b"200 OK" in await connection.reader.readuntil(b"\r\n\r\n")
            assert b'"text":"abcdef0"' in await connection.reader.readuntil(b'"usage"')
        await connection.close()


async def test_streams_arrive_as_tokens_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as server:
        server.engine.go.clear()
        server.engine.free_tokens = 1
        connection = await server.send({"prompt": "a", "stream": True})
        async with asyncio.timeout(10):
            assert b'"text":"a"' in await connection.reader.readuntil(b"}\n\n")
        server.engine.go.set()
        async with asyncio.timeout(10):
            rest = await connection.reader.readuntil(b"data: [DONE]\n\n")
        assert rest.count(b'"finish_reason":"stop"') == 1
        await connection.close()


async def test_keep_alive_and_pipelining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as server:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", server.port))
        connection.writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
        for _ in range(3):
            async with asyncio.timeout(10):
                assert b"200 OK" in await connection.reader.readuntil(b"\r\n\r\nok")
        await connection.close()


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
async def test_probes_may_ask_for_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    async with running(tmp_path, monkeypatch, api_key=("secret",)) as server:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", server.port))
        connection.writer.write(f"HEAD {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        answer = await connection.rest()
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")


async def draining(server: Running) -> asyncio.Task[httpx.Response]:
    """A request that runs while the server drains, until `server.engine.go` is set."""
    server.engine.go.clear()
    post = asyncio.create_task(server.http.post("/v1/completions", json={"prompt": "a"}))
    await eventually(lambda: server.engine.num_running == 1)
    os.kill(os.getpid(), signal.SIGTERM)
    await server.until_draining()
    return post


async def test_draining_lets_running_requests_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as server:
        post = await draining(server)
        assert (await server.http.get("/health")).json() == {"status": "draining"}
        refused = await server.http.post("/v1/completions", json={"prompt": "b"})
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        server.engine.go.set()
        assert (await post).json()["choices"][0]["text"] == "abcdef0"
        assert await server.exit_status == 0


async def test_what_is_left_after_draining_gets_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch, shutdown_timeout=0.1) as server:
        server.engine.go.clear()
        server.engine.free_tokens = 1
        streamed = await server.send({"prompt": "a", "stream": True})
        whole = await server.send({"prompt": "a"})
        await eventually(lambda: server.engine.num_running == 2)
        await streamed.reader.readuntil(b"}\n\n")
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.exit_status == 1
        data = await streamed.rest()
        assert b'data: {"error":' in data
        assert data.endswith(b"0\r\n\r\n")  # a proper end of the body
        assert b"[DONE]" not in data
        assert (await whole.rest()).startswith(b"HTTP/1.1 503")


async def test_a_second_signal_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr("octavo.server.serve.os._exit", exits.append)
    async with running(tmp_path, monkeypatch) as server:
        server.engine.go.clear()
        connection = await server.send({"prompt": "a"})
        await eventually(lambda: server.engine.num_running == 1)
        os.kill(os.getpid(), signal.SIGINT)
        await server.until_draining()
        os.kill(os.getpid(), signal.SIGINT)
        await eventually(lambda: exits == [1])
        server.engine.go.set()
        await connection.reader.readline()
        await connection.close()


async def test_a_dead_engine_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as server:
        server.engine.state = "dead"
        async with asyncio.timeout(5):
            assert await server.exit_status == 70


async def test_an_engine_that_is_given_up_while_draining_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch) as server:
        post = await draining(server)
        server.engine.state = "dead"
        server.engine.go.set()
        await post
        assert await server.exit_status == 70


async def test_heads_are_bounded_in_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as server:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", server.port))
        connection.writer.write(b"GET /livez HTTP/1.1\r\nx: ")
        try:
            for _ in range(10_000):
                connection.writer.write(b"a" * 4096)
                await connection.writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        else:
            pytest.fail("40 MB of header were taken")
        assert (await connection.rest())[:12] in (b"HTTP/1.1 431", b"")


async def test_heads_are_bounded_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "HEADER_TIMEOUT_S", 0.1)
    async with running(tmp_path, monkeypatch) as server:
        for sent in (b"", b"GET /livez HTTP/1.1\r\n", b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\nGET "):
            connection = Connection(*await asyncio.open_connection("127.0.0.1", server.port))
            connection.writer.write(sent)
            await connection.rest()


async def test_a_late_head_does_not_cut_the_stream_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "HEADER_TIMEOUT_S", 0.1)
    async with running(tmp_path, monkeypatch) as server:
        server.engine.go.clear()
        server.engine.free_tokens = 1
        connection = await server.send({"prompt": "a", "stream": True})
        async with asyncio.timeout(10):
            await connection.reader.readuntil(b"}\n\n")
        connection.writer.write(b"GET /livez HTTP/1.1\r\n")
        await asyncio.sleep(0.5)
        server.engine.go.set()
        # Once the stream is over the head is late, and the connection ends.
        assert (await connection.rest()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_client_that_does_not_read_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "SEND_TIMEOUT_S", 0.1)
    lost = asyncio.Event()
    forget = serve.HttpProtocol.connection_lost

    def connection_lost(self: serve.HttpProtocol, exc: Exception | None) -> None:
        forget(self, exc)
        lost.set()

    monkeypatch.setattr(serve.HttpProtocol, "connection_lost", connection_lost)
    async with running(tmp_path, monkeypatch) as server:
        connection = Connection(*await asyncio.open_connection("127.0.0.1", server.port, limit=1))
        body = b'{"prompt": "' + b"a" * 2000 + b'", "return_token_strs": true}'
        head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        connection.writer.write((head % len(body) + body) * 1000)  # answers of 30 MB, more than sockets hold
        async with asyncio.timeout(30):
            await lost.wait()
        connection.writer.transport.abort()


async def test_connections_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_raise_file_limit", lambda: serve.SPARE_FILES + 2)
    async with running(tmp_path, monkeypatch) as server:
        first = [Connection(*await asyncio.open_connection("127.0.0.1", server.port)) for _ in range(2)]
        third = Connection(*await asyncio.open_connection("127.0.0.1", server.port))
        assert await third.rest() == b""
        for connection in first:
            await connection.close()
