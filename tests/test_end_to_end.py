"""The server as its users have it: a process of its own, reached over HTTP, stopped by signals, killed without warning.

Where the order of events matters the engine is halted (SIGSTOP), so that nothing here depends on how fast it is.
"""

import asyncio
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_fakes import eventually
from servers import READY_S, Server, command, launched, processes, serving, stat

# Whoever halts the engine is not to be taken for a fault.
TINY_FLAGS = ("--kv-cache-memory-bytes", "32M", "--max-model-len", "8192", "--step-deadline", "0")
MAX_NUM_SEQS, MAX_NUM_QUEUED = 16, 64
ENDLESS = 8000  # max_tokens of a request that no test waits for
CAPITAL = "The capital of France is"


@pytest.fixture(scope="module")
def tiny(served_checkpoint: Callable[[str], Path]) -> Path:
    """A model that starts in no time, with a byte-level tokenizer and a context that no test fills."""
    folder = served_checkpoint("llama2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return folder


@pytest.fixture(scope="module")
def default_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The default model with default flags."""
    with serving(smollm2, tmp_path_factory.mktemp("default") / "log") as server:
        yield server


@pytest.fixture
def client(default_server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of the default model's server."""
    with openai.OpenAI(base_url=f"{default_server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client
    print(default_server.log)


@dataclass
class Reply:
    """What came of one request."""

    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    events: list[Any] = field(default_factory=list)  # of a stream; its last is "[DONE]" or an error
    body: Any = None  # of anything else

    @property
    def is_complete(self) -> bool:
        """A stream with its end."""
        return self.status == 200 and self.events[-1:] == ["[DONE]"]

    @property
    def num_tokens(self) -> int:
        """Output tokens that a complete stream accounts for."""
        num_tokens: int = self.events[-2]["usage"]["completion_tokens"]
        return num_tokens

    @property
    def is_cut(self) -> bool:
        """A stream that ends with an explicit error and without the mark of a whole one."""
        return self.status == 200 and "error" in self.events[-1] and "[DONE]" not in self.events


async def stream(http: httpx.AsyncClient, reply: Reply, max_tokens: int, prompt: str = "Hello") -> Reply:
    """Streams a completion into `reply`."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        reply.status, reply.headers = response.status_code, response.headers
        if response.status_code != 200:
            reply.body = json.loads(await response.aread())
            return reply
        async for line in response.aiter_lines():
            if line.startswith("data: "):  # others are comments
                data = line.removeprefix("data: ")
                reply.events.append(data if data == "[DONE]" else json.loads(data))
    return reply


Sent = tuple[list[Reply], "asyncio.Future[Any]"]


@asynccontextmanager
async def sent(http: httpx.AsyncClient, num_requests: int, max_tokens: int) -> AsyncIterator[Sent]:
    """Streams under way, and what waits for them all; those still open are left in the end."""
    replies = [Reply() for _ in range(num_requests)]
    tasks = [asyncio.create_task(stream(http, reply, max_tokens, f"{i}")) for i, reply in enumerate(replies)]
    try:
        yield replies, asyncio.gather(*tasks, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def connect(server: Server) -> httpx.AsyncClient:
    """A client without bounds of its own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60)


# The default model, through OpenAI's client


def test_completion(client: openai.OpenAI, default_server: Server) -> None:
    model = "smollm2-135m-instruct"
    assert [listed.id for listed in client.models.list()] == [model]
    whole = client.completions.create(model=model, prompt=CAPITAL, max_tokens=8, temperature=0)
    assert whole.choices[0].text.startswith(" Paris")
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 8, 13)
    chunks = list(
        client.completions.create(
            model=model,
            prompt=CAPITAL,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 3
    assert chunks[-1].usage == whole.usage


def test_chat(client: openai.OpenAI) -> None:
    model = "smollm2-135m-instruct"
    question: Any = [{"role": "user", "content": "What is the capital of Japan?"}]
    whole = client.chat.completions.create(model=model, messages=question, max_tokens=30, temperature=0)
    text = whole.choices[0].message.content
    assert text is not None and "Tokyo" in text
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (37, 8)
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=question,
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="smollm2-135m-instruct"):
        client.completions.create(model="gpt-4", prompt="a")


def test_clients_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    prompts = (CAPITAL, "The largest planet of the solar system is")

    def ask(prompt: str) -> str:
        model = "smollm2-135m-instruct"
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0)
        return answer.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(ask, prompts))
    assert together == alone
    assert alone[0] != alone[1]


# What the processes are


def test_it_starts_soon_and_stays_small(default_server: Server, client: openai.OpenAI) -> None:
    assert default_server.ready_s < 20  # 3 s on an idle machine
    client.completions.create(model="smollm2-135m-instruct", prompt=CAPITAL * 100, max_tokens=8)
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    pids = processes(default_server.pid)
    resident = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page_bytes for pid in pids]
    assert len(resident) == 3  # front end, launcher and rank, of which the latter share much
    assert sum(resident) < 1.5e9, resident


async def test_it_rests_when_idle(default_server: Server) -> None:
    def cpu_s() -> float:
        ticks = sum(int(value) for pid in processes(default_server.pid) for value in stat(pid)[11:13])
        return ticks / os.sysconf("SC_CLK_TCK")

    await default_server.until_idle()
    before = cpu_s()
    await asyncio.sleep(5)
    assert cpu_s() - before < 0.02 * 5


def test_only_the_engine_loads_torch(default_server: Server) -> None:
    assert "libtorch" not in Path(f"/proc/{default_server.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{default_server.engine_pid}/maps").read_text()


def test_one_socket_listens(default_server: Server) -> None:
    bound = set()
    for pid in processes(default_server.pid):
        inodes = {
            os.readlink(fd).removeprefix("socket:[").removesuffix("]") for fd in Path(f"/proc/{pid}/fd").iterdir()
        }
        for table in ("tcp", "tcp6", "udp", "udp6"):
            rows = [row.split() for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
            is_open = {"tcp": "0A", "udp": "07"}[table[:3]]
            bound |= {(table, row[1], row[9]) for row in rows if row[3] == is_open and row[9] in inodes}
    ((table, address, _),) = bound
    assert (table, address) == ("tcp", f"0100007F:{default_server.port:04X}")


def test_nothing_is_unpickled_and_nobody_is_called(tiny: Path, tmp_path: Path) -> None:
    hook = """
        import os, sys
        def hook(event, args):
            if event == "pickle.find_class" or event == "socket.connect" and isinstance(args[1], tuple):
                note(event, repr(args))
        def note(name, text):
            with open(os.path.join(os.path.dirname(__file__), name), "a") as file:
                file.write(text)
        note(f"hooked-{os.getpid()}", "")
        sys.addaudithook(hook)
    """
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text("\n".join(line[8:] for line in hook.splitlines()))
    with serving(tiny, tmp_path / "log", *TINY_FLAGS, PYTHONPATH=str(tmp_path / "hooks")) as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "logprobs": True}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200
        hooked = {f"hooked-{pid}" for pid in set(processes(server.pid)) - set(server.rank_pids)}
        assert len(hooked) == 2  # a rank is forked, hook and all
        noted = {path.name for path in (tmp_path / "hooks").iterdir() if path.is_file()}
        assert hooked <= noted
        assert noted.isdisjoint({"pickle.find_class", "socket.connect"})


def test_the_log_keeps_secrets(tiny: Path, tmp_path: Path) -> None:
    secret = f"canary{secrets.token_hex(8)}"
    headers = {"authorization": f"Bearer {secret}", "x-note": secret}
    (tmp_path / "keys").write_text(f"{secret}\n")
    flags = ("--api-key-file", str(tmp_path / "keys"), "--log-level", "debug")
    with serving(tiny, tmp_path / "log", *TINY_FLAGS, *flags) as server:

        def post(path: str, **content: Any) -> int:
            return httpx.post(f"{server.url}{path}", **{"headers": headers, **content}).status_code

        chat = {"messages": [{"role": "user", "content": secret}], "max_tokens": 4, "user": secret, "stop": [secret]}
        assert post("/v1/chat/completions", json=chat) == 200
        assert post("/v1/chat/completions", json={**chat, "stream": True}) == 200
        assert post("/v1/completions", json={"prompt": secret, "max_tokens": secret}) == 400
        assert post("/v1/completions", json={"prompt": "a", secret: secret}) == 400
        assert post("/v1/completions", json={"prompt": "a", "model": secret}) == 404
        assert post("/v1/completions", content=secret, headers={**headers, "content-type": "application/json"}) == 400
        assert post("/v1/completions", json=chat, headers={"authorization": f"Bearer x{secret}"}) == 401
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(f"{secret} is no HTTP\r\n\r\n".encode())
            while raw.recv(4096):
                pass
        os.kill(server.pid, signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert "/v1/chat/completions" in server.log  # it does log requests
        assert secret not in server.log


def test_it_starts_as_the_first_process_of_a_container(tiny: Path, tmp_path: Path) -> None:
    isolate = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*isolate, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a process namespace")
    with launched(tmp_path / "log", *isolate, *command(tiny, *TINY_FLAGS)) as server:
        server.wait_until_ready()


# More than it can take


async def check_room(server: Server, num_requests: int) -> None:
    """Of `num_requests` at once it takes exactly as many as it may, finishes those and refuses the rest at once."""
    num_accepted = MAX_NUM_SEQS + MAX_NUM_QUEUED
    async with connect(server) as http:
        async with sent(http, num_requests, max_tokens=32) as (replies, gathered):
            with server.halted_engine():
                # Nobody can finish now, so a refusal waits for nobody; none at all comes for the others.
                await eventually(lambda: sum(bool(r.status) for r in replies) >= num_requests - num_accepted, 20)
            await gathered
    refused = [reply for reply in replies if reply.status == 429]
    assert len(refused) == num_requests - num_accepted
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert {reply.body["error"]["code"] for reply in refused} == {"queue_full"}
    accepted = [reply for reply in replies if reply.status != 429]
    assert all(reply.is_complete and reply.num_tokens == 32 for reply in accepted)
    await server.until_idle()


@pytest.fixture(scope="module")
def _small_server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-queued-reqs", str(MAX_NUM_QUEUED))
    with serving(tiny, tmp_path_factory.mktemp("small") / "log", *TINY_FLAGS, *flags) as server:
        yield server


@pytest.fixture
def small_server(_small_server: Server) -> Iterator[Server]:
    """The tiny model with room for few."""
    yield _small_server
    print(_small_server.log)


async def test_too_many_requests(small_server: Server) -> None:
    await check_room(small_server, 200)


async def test_clients_that_leave_give_everything_back(small_server: Server) -> None:
    def answer() -> str:
        body = {"prompt": CAPITAL, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        text: str = httpx.post(f"{small_server.url}/v1/completions", json=body).json()["choices"][0]["text"]
        return text

    dice = random.Random(0)
    room = asyncio.Semaphore(40)

    async def leave(http: httpx.AsyncClient, number: int) -> None:
        async with room:
            if number % 3 == 0:  # in the middle of a stream
                reply, num_events = Reply(), dice.randint(1, 20)
                task = asyncio.create_task(stream(http, reply, ENDLESS))
                await eventually(lambda: len(reply.events) >= num_events, 30)
            elif number % 3 == 1:  # about the first byte of a stream
                task = asyncio.create_task(stream(http, Reply(), ENDLESS))
                await asyncio.sleep(dice.uniform(0, 0.05))
            else:  # in the middle of a silent wait
                body = {"prompt": "Hi", "max_tokens": ENDLESS, "ignore_eos": True, "n": dice.randint(1, 2)}
                waiting = asyncio.create_task(http.post("/v1/completions", json=body))
                await asyncio.sleep(dice.uniform(0, 0.3))
                assert not waiting.done()
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
                return
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    before = answer()
    async with connect(small_server) as http:
        await asyncio.gather(*(leave(http, number) for number in range(100)))
    await small_server.until_idle()
    assert answer() == before
    await check_room(small_server, MAX_NUM_SEQS + MAX_NUM_QUEUED + 4)


def test_an_id_may_be_used_again_as_soon_as_its_client_has_left(small_server: Server) -> None:
    def post(prompt: str, max_tokens: int, **options: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **options}
        return httpx.post(f"{small_server.url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=read_s))

    read_s = 30.0
    before = post(CAPITAL, 16).json()["choices"]
    assert before[0]["finish_reason"] == "length"
    for number in range(20):
        read_s = 0.05
        with pytest.raises(httpx.ReadTimeout):  # a prompt of its own, so that none is found in the cache
            post(f"{number} " + "a" * 7000, 1000, request_id="job-1")
        read_s = 30.0
        response = post(CAPITAL, 16, request_id="job-1")
        assert (response.status_code, response.json().get("choices")) == (200, before)


# How it ends


def signal_front_end(server: Server) -> None:
    os.kill(server.pid, signal.SIGTERM)


def press_ctrl_c(server: Server) -> None:
    """As a terminal does: the whole group gets it."""
    os.killpg(server.pid, signal.SIGINT)


async def until_streaming(replies: list[Reply]) -> None:
    await eventually(lambda: all(reply.events for reply in replies), 30)


async def until_draining(server: Server) -> None:
    await eventually(lambda: httpx.get(f"{server.url}/readyz").status_code == 503, 2)


@pytest.mark.parametrize("stop", [signal_front_end, press_ctrl_c])
async def test_running_requests_finish(stop: Callable[[Server], None], tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path / "log", *TINY_FLAGS) as server:
        async with connect(server) as http:
            async with sent(http, 8, max_tokens=600) as (replies, gathered):
                await until_streaming(replies)
                with server.halted_engine():
                    stop(server)
                    await until_draining(server)
                    refused = await http.post("/v1/completions", json={"prompt": "a"})
                    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
                    assert server.process.poll() is None
                await gathered
                assert all(reply.is_complete and reply.num_tokens == 600 for reply in replies)
        assert await server.exit_status(5) == 0
        assert "Traceback" not in server.log


@pytest.mark.parametrize("stop", [signal_front_end, press_ctrl_c])
async def test_what_runs_too_long_is_cut(stop: Callable[[Server], None], tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path / "log", *TINY_FLAGS, "--shutdown-timeout", "0.5") as server:
        async with connect(server) as http:
            body = {"prompt": "a", "max_tokens": ENDLESS, "ignore_eos": True}
            whole = asyncio.create_task(http.post("/v1/completions", json=body))
            async with sent(http, 8, ENDLESS) as (replies, gathered):
                await until_streaming(replies)
                stop(server)
                await gathered
                assert all(reply.is_cut for reply in replies)
            assert (await whole).status_code == 503
        assert await server.exit_status(5) == 1
        assert "Traceback" not in server.log


async def test_a_second_signal_ends_it_at_once(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path / "log", *TINY_FLAGS) as server:
        async with connect(server) as http:
            async with sent(http, 4, ENDLESS) as (replies, _):
                await until_streaming(replies)
                signal_front_end(server)
                await until_draining(server)
                signal_front_end(server)
                assert await server.exit_status(2) == 1


async def test_ctrl_c_while_it_loads(tiny: Path, tmp_path: Path) -> None:
    with launched(tmp_path / "log", *command(tiny, *TINY_FLAGS)) as server:
        await eventually(lambda: len(processes(server.pid)) == 2, READY_S)
        press_ctrl_c(server)
        assert await server.exit_status(10) == 0
        assert server.log == ""


@pytest.mark.parametrize("is_stuck", [False, True])
async def test_the_engine_dies_with_the_front_end(is_stuck: bool, tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path / "log", *TINY_FLAGS) as server:
        async with connect(server) as http:
            async with sent(http, 4, ENDLESS) as (replies, _):
                await until_streaming(replies)
                if is_stuck:  # it cannot see that its socket is closed
                    os.kill(server.engine_pid, signal.SIGSTOP)
                os.kill(server.pid, signal.SIGKILL)
                assert await server.exit_status(2) == -signal.SIGKILL


async def test_streams_end_with_an_error_when_the_engine_is_given_up(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path / "log", *TINY_FLAGS, "--max-recovery-time", "0") as server:
        async with connect(server) as http:
            body = {"prompt": "a", "max_tokens": ENDLESS, "ignore_eos": True}
            whole = asyncio.create_task(http.post("/v1/completions", json=body))
            async with sent(http, 8, ENDLESS) as (replies, gathered):
                await until_streaming(replies)
                os.kill(server.engine_pid, signal.SIGKILL)
                await gathered
                assert all(reply.is_cut for reply in replies)
                assert all(reply.events[-1]["error"]["message"].startswith("The engine failed") for reply in replies)
            assert (await whole).status_code == 503
        assert await server.exit_status(5) == 70
        assert "Traceback" not in server.log


@pytest.mark.parametrize("who", ["launcher", 0, 2])
async def test_nothing_is_left_of_a_group_that_loses_a_process(who: str | int, tiny: Path, tmp_path: Path) -> None:
    flags = ("--tensor-parallel-size", "3", "--max-recovery-time", "0")
    with serving(tiny, tmp_path / "log", *TINY_FLAGS, *flags) as server:
        assert len(server.rank_pids) == 3 and "memory of rank 2: weights" in server.log
        memory = {os.readlink(fd) for pid in server.rank_pids for fd in Path(f"/proc/{pid}/fd").iterdir()}
        assert any(name.startswith("/memfd:octavo") for name in memory)  # which ends with those who have it
        async with connect(server) as http:
            async with sent(http, 4, ENDLESS) as (replies, gathered):
                await until_streaming(replies)
                os.kill(server.launcher_pid if who == "launcher" else server.rank_pids[int(who)], signal.SIGKILL)
                await gathered
                assert all(reply.is_cut for reply in replies)
        assert await server.exit_status(5) == 70


# What it says when it cannot start


def refused(tmp_path: Path, folder: Path, *flags: str, status: int = 1) -> str:
    """The one line with which a start ends."""
    with launched(tmp_path / "log", *command(folder, *flags)) as server:
        assert server.process.wait(READY_S) == status
        assert processes(server.pid) == []
        (line,) = server.log.splitlines()
        return line


def test_a_missing_folder(tmp_path: Path) -> None:
    assert refused(tmp_path, tmp_path / "none").startswith(f"octavo: error: no model '{tmp_path / 'none'}'")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    line = refused(tmp_path, tmp_path)
    assert line.startswith("octavo: error: ") and f"{tmp_path / 'tokenizer.json'}" in line


def test_a_number_of_ranks_that_cannot_be(tiny: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, tiny, *TINY_FLAGS, "--tensor-parallel-size", "3", "--exactness", "ranks")
    assert line.startswith("octavo: error: --tensor-parallel-size is 3: ")


def test_a_checkpoint_with_a_wrong_tensor(tiny: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = Path(shutil.copytree(tiny, tmp_path / "model")) / "model.safetensors"
    name = "model.layers.1.input_layernorm.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:-1]}, file)
    line = refused(tmp_path, tmp_path / "model", *TINY_FLAGS)
    assert line.startswith(f"octavo: error: {file}: tensor {name} has shape (95,)")


def test_a_checkpoint_cut_short(tiny: Path, tmp_path: Path) -> None:
    file = Path(shutil.copytree(tiny, tmp_path / "model")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    line = refused(tmp_path, tmp_path / "model", *TINY_FLAGS)
    assert line.startswith(f"octavo: error: {file}: not a whole safetensors file")


def test_a_port_in_use(tiny: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(tmp_path, tiny, "--port", str(port))
    assert line.startswith(f"octavo: error: cannot listen on 127.0.0.1 port {port}: ")


def test_too_little_memory(tiny: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, tiny, "--kv-cache-memory-bytes", "1000g")
    assert line.startswith("octavo: error: too little memory: 100") and "--kv-cache-memory-bytes" in line


def test_a_wrong_flag(tiny: Path, tmp_path: Path) -> None:
    line = refused(tmp_path, tiny, "--max-num-seqs", "-1", status=2)
    assert line == "octavo serve: error: --max-num-seqs: must be 1 or more, not -1"
