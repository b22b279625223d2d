"""`octavo serve`: one process that listens, starts the engine, serves, and drains when it is told to stop.

It listens before the engine has loaded, so that probes get an answer. uvicorn speaks HTTP; the signals and the end are
ours.
"""

import asyncio
import gc
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from octavo import __version__
from octavo.server.api.app import create_app
from octavo.server.api.auth import load_keys
from octavo.server.api.state import State
from octavo.server.api.stream import BODY
from octavo.server.config import GIB, ServerConfig
from octavo.server.engine.channel import EngineStats
from octavo.server.engine.client import EngineClient
from octavo.server.engine.node import run_node
from octavo.server.engine.progress import RankFigures
from octavo.server.errors import StartupError
from octavo.server.local_model import load_tokenizer
from octavo.server.text.tokenizer import Tokenizer

logger = logging.getLogger("octavo")

STATS_INTERVAL_S = 10.0
HEADER_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 60.0  # for a client to make room for more of its response
MAX_HEADER_BYTES = 64 << 10
KEEP_ALIVE_S = 75
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
GIVEN_UP = 70
SPARE_FILES = 64  # descriptors left for everything that is not a client's connection


class StreamedBody:
    """Writes to a response past its ASGI application: a step's tokens go out without waking a task for each stream."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_writable(self) -> bool:
        """Whether the client is there and keeps up with what it is sent."""
        return not (self._cycle.flow.write_paused or self._cycle.disconnected)

    def write(self, data: bytes) -> None:
        """Sends a part of the body, framed as uvicorn frames a body of unknown length."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with what it leaves open: bounds on heads, on clients that do not read, on connections.

    The state of each request has a `StreamedBody`.
    """

    max_connections = 1024  # set from the process's limit on open files
    _head_timer: asyncio.TimerHandle
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accepts a connection, or closes it if there are too many."""
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > self.max_connections:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._head_timer.cancel()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is sent to. One that stops reading would keep its room for ever."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(SEND_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read again."""
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().resume_writing()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._head_timer.cancel()
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._head_timer.cancel()
        self._is_in_head = False
        super().on_headers_complete()
        self.scope["state"][BODY] = StreamedBody(self.cycle)  # the request's task has not run yet

    def data_received(self, data: bytes) -> None:
        """Takes bytes; a head over the limit ends the connection."""
        was_in_head = self._is_in_head
        if was_in_head:
            # There is nothing to upgrade to, and the parser would stop at the offer and lose the body.
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nignored:", head) + end + rest
        super().data_received(data)
        if was_in_head and self._is_in_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEADER_BYTES:
                self.transport.write(b"HTTP/1.1 431 \r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                self.transport.close()

    def _expect_head(self) -> None:
        self._is_in_head, self._num_head_bytes = True, 0
        self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # pipelined behind a request that is still answered, which must not be cut
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._head_is_late)


def run(config: ServerConfig) -> int:
    """Serves until SIGTERM or SIGINT; or, on a machine but the first of several, computes until that one ends.

    `config.model` is a local folder or a GGUF file.

    Returns the exit status: 0 if every request that was accepted was also finished, 1 if some were cut, GIVEN_UP where
    no engine could be had any more. Raises StartupError.
    """
    _log_to_stderr(config.log_level)
    if config.node_rank:
        return run_node(config)
    config = replace(config, api_key=load_keys(config))
    tokenizer = load_tokenizer(Path(config.model), config.chat_template)
    # Nothing loaded so far is ever garbage: keep the collector from walking it.
    gc.collect()
    gc.freeze()
    with _listen(config.host, config.port) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, tokenizer, listener))


async def _serve(config: ServerConfig, tokenizer: Tokenizer, listener: socket.socket) -> int:
    client = EngineClient(config)
    app = create_app(config, tokenizer, client)
    state: State = app.state.server
    http = uvicorn.Server(
        uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=config.log_level == "debug",
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=2,
        )
    )
    # Server.serve() would take the signals and wake ten times a second; its parts do without.
    http.config.load()
    http.lifespan = http.config.lifespan_class(http.config)
    HttpProtocol.max_connections = _raise_file_limit() - SPARE_FILES
    stop = _stop_event()
    await http.startup(sockets=[listener])
    try:
        if not await _start_engine(client, stop):
            return 0
        _log_start(config, client, listener)
        if await _run_until_stopped(state, stop):
            logger.info("stopping: %d requests run, up to %g s", state.num_requests, config.shutdown_timeout)
            is_whole = await state.drain(config.shutdown_timeout)
            return GIVEN_UP if client.state == "dead" else 0 if is_whole else 1
        await state.drain(1.0)
        return GIVEN_UP
    finally:
        await http.shutdown(sockets=[listener])
        state.admission.close()
        await client.close()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises StartupError if the address is not to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise StartupError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return listener


def _raise_file_limit() -> int:
    """Raises the limit on open files as far as it goes without privileges; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return 65536 if soft == resource.RLIM_INFINITY else soft


def _stop_event() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            logger.error("stopped by a second signal")
            os._exit(1)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


async def _start_engine(client: EngineClient, stop: asyncio.Event) -> bool:
    """Starts the engine. False: told to stop before it was ready. Raises StartupError."""
    start, stopped = asyncio.create_task(client.start()), asyncio.create_task(stop.wait())
    await asyncio.wait((start, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not start.done():
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        return False
    await start
    return True


async def _run_until_stopped(state: State, stop: asyncio.Event) -> bool:
    """Waits and logs statistics while something runs. True: told to stop. False: the engine is given up."""
    before, before_s = replace(state.engine.stats), time.monotonic()
    figures, info = state.engine.figures, state.engine.info
    while state.engine.state != "dead":
        try:
            async with asyncio.timeout(1.0):
                await stop.wait()
            return True
        except TimeoutError:
            pass
        now = time.monotonic()
        if now - before_s >= STATS_INTERVAL_S:
            stats = replace(state.engine.stats)
            if stats.step != before.step:
                _log_stats(before, stats, now - before_s, state.engine.info.num_blocks)
                if state.engine.info is info:  # else these are other ranks
                    _log_ranks(figures, state.engine.figures)
            before, before_s = stats, now
            figures, info = state.engine.figures, state.engine.info
    return False


def _log_stats(before: EngineStats, now: EngineStats, seconds: float, num_blocks: int) -> None:
    cached = now.prompt_tokens_cached - before.prompt_tokens_cached
    prompt = now.prompt_tokens_computed - before.prompt_tokens_computed + cached
    queries = now.prefix_cache_queries - before.prefix_cache_queries
    hits = now.prefix_cache_hits - before.prefix_cache_hits
    logger.info(
        "prompt %.1f tok/s, generation %.1f tok/s, running %d, waiting %d, KV usage %.1f %%, prefix hits %.1f %%",
        prompt / seconds,
        (now.generation_tokens - before.generation_tokens) / seconds,
        now.num_running,
        now.num_waiting,
        100 * now.num_blocks_used / num_blocks,
        100 * hits / max(1, queries),
    )


def _log_ranks(before: list[RankFigures], now: list[RankFigures]) -> None:
    """What several ranks have done meanwhile; nothing where they are not those of before."""
    told = []
    for old, new in zip(before, now, strict=False):
        num_steps, step_s = new.num_steps - old.num_steps, new.step_s - old.step_s
        if num_steps <= 0 or len(now) == 1:
            return
        share = (new.collective_s - old.collective_s) / step_s
        told.append(f"{1e3 * step_s / num_steps:.2f} ms ({100 * share:.0f} %)")
    logger.info("a step of each rank, and of that in collectives: %s", ", ".join(told))


def _log_start(config: ServerConfig, client: EngineClient, listener: socket.socket) -> None:
    info = client.info
    host, port = cast(tuple[str, int], listener.getsockname()[:2])
    context = info.num_blocks * info.block_size
    logger.info("octavo %s serves %s (%s)", __version__, config.model_name, info.architecture)
    logger.info(
        "%s, %.1f M parameters, on %s, kernels %s, %s%d threads, loaded in %.1f s",
        info.dtype,
        info.num_parameters / 1e6,
        info.device,
        info.kernels,
        f"{len(info.ranks)} ranks of " if len(info.ranks) > 1 else "",
        info.num_threads,
        info.load_s,
    )
    for number, (rank, figures) in enumerate(zip(info.ranks, client.figures, strict=False)):
        logger.info(
            "%s: weights %.2f GiB, KV cache %.2f GiB, workspace %.2f GiB, reserve %.2f GiB, resident %.2f GiB; %.2f GB "
            "read in %.1f s",
            f"memory of rank {number}" if len(info.ranks) > 1 else "memory",
            rank.weight_bytes / GIB,
            rank.kv_cache_bytes / GIB,
            rank.workspace_bytes / GIB,
            rank.reserve_bytes / GIB,
            figures.resident_bytes / GIB,
            rank.read_bytes / 1e9,
            rank.load_s,
        )
    logger.info(
        "KV cache %.2f GiB: %d blocks, %d tokens at once, %.1f requests of the full length %d",
        info.kv_cache_bytes / GIB,
        info.num_blocks,
        context,
        context / info.max_model_len,
        info.max_model_len,
    )
    if len(info.ladder) > 1:
        rungs = [
            f"{rung.num_ranks}"
            + (f" (context {rung.max_model_len})" if rung.max_model_len < info.max_model_len else "")
            for rung in info.ladder[1:]
        ]
        logger.info("where devices are lost it goes on with fewer ranks: %s", ", ".join(rungs))
    elif config.nnodes > 1:
        logger.info("where a device is lost it is waited for: ranks over several machines are not made fewer")
    elif len(info.ranks) > 1:
        logger.info("where a device is lost it cannot go on: fewer ranks do not fit the memory")
    logger.info("listening on http://%s:%d%s", f"[{host}]" if ":" in host else host, port, _note(config))


def _note(config: ServerConfig) -> str:
    return "" if config.api_key else " (no API key is set: whoever reaches this address may use it)"


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("uvicorn.error").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
