"""An engine and a tokenizer for tests of the HTTP side: scripted tokens, no model."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from octavo.server.api.app import create_app
from octavo.server.api.state import State
from octavo.server.config import ServerConfig
from octavo.server.engine.channel import EngineInfo, EngineStats, RankInfo, StepOutput
from octavo.server.engine.devices import Rung
from octavo.server.engine.progress import RankFigures
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, TokenLogprobs
from octavo.server.engine.supervisor import EngineState, Recovery
from octavo.server.errors import EngineError, OctavoError
from octavo.server.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MAX_MODEL_LEN = 200


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer, one token a byte, with two special tokens and a chat template; written to `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HuggingFaceTokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": 257}))
    return Tokenizer(folder)


EOS = 257
VOCAB_SIZE = 258


@dataclass
class FakeEngine:
    """Emits what `script` says, `step_size` tokens a delta, all choices in turn."""

    script: Callable[[GenerationRequest, int], list[int]]
    step_size: int = 1
    state: EngineState = "ok"
    degraded: str = ""
    left_out: list[str] = field(default_factory=list)
    on_step: Callable[[StepOutput], None] | None = None
    on_wait: Callable[[], None] | None = None
    on_recovered: Callable[[Recovery], None] | None = None
    stats: EngineStats = field(default_factory=EngineStats)
    info: EngineInfo = field(
        default_factory=lambda: EngineInfo(
            model_name="tiny",
            architecture="Fake",
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            num_parameters=1,
            num_blocks=64,
            block_size=16,
            ranks=[RankInfo(4, 4, 4, 1 << 20, 4, 0.0)],
            device="cpu",
            kernels="none",
            num_threads=1,
            load_s=0.0,
            ladder=[Rung(1, MAX_MODEL_LEN)],
        )
    )
    figures: list[RankFigures] = field(default_factory=lambda: [RankFigures(10, 2.0, 0.5, 1 << 20)])
    requests: list[GenerationRequest] = field(default_factory=list)
    num_running: int = 0
    begun: "dict[str, asyncio.Task[None]]" = field(default_factory=dict)  # requests not ended by their caller
    num_closed_early: int = 0
    aborted_choices: list[tuple[str, int]] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)  # tokens flow while it is set
    free_tokens: int = 0  # of each choice, that flow without it
    die_after: int | None = None  # tokens of a choice after which the engine fails
    fail_after: int | None = None  # tokens after which a choice ends with ERROR
    _aborted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.go.set()

    def begin(
        self,
        request: GenerationRequest,
        on_deltas: Callable[[list[Delta]], None],
        on_error: Callable[[OctavoError], None],
    ) -> None:
        """As the engine's client does it."""
        self.requests.append(request)
        self.begun[request.request_id] = asyncio.create_task(self._run(request, on_deltas, on_error))

    def end(self, request_id: str) -> None:
        """As the engine's client does it."""
        task = self.begun.pop(request_id, None)
        if task is not None:
            self.num_closed_early += not task.done()
            task.cancel()

    async def _run(
        self,
        request: GenerationRequest,
        on_deltas: Callable[[list[Delta]], None],
        on_error: Callable[[OctavoError], None],
    ) -> None:
        self.num_running += 1
        try:
            await self._emit(request, on_deltas)
        except EngineError as error:
            on_error(error)
        finally:
            self.num_running -= 1

    async def _emit(self, request: GenerationRequest, on_deltas: Callable[[list[Delta]], None]) -> None:
        running = dict.fromkeys(range(request.n), 0)  # choice -> tokens out
        while running:
            for index, start in list(running.items()):
                if (request.request_id, index) in self.aborted_choices:
                    del running[index]
                    continue
                if start >= self.free_tokens:
                    while not self.go.is_set() and request.request_id not in self._aborted:
                        await asyncio.wait((asyncio.create_task(self.go.wait()),), timeout=0.01)
                delta = self._delta(request, index, start)
                running[index] += len(delta.token_ids)
                if delta.finish_reason is not None:
                    del running[index]
                on_deltas([delta])
            await asyncio.sleep(0)

    def _delta(self, request: GenerationRequest, index: int, start: int) -> Delta:
        params = request.params
        if self.die_after is not None and start >= self.die_after:
            raise EngineError("the engine died")
        script = self.script(request, index)[: params.max_tokens]
        ids, reason, stop_id = script[start : start + self.step_size], None, None
        for i, token_id in enumerate(ids):
            if token_id in params.eos_token_ids or token_id in params.stop_token_ids:
                ids, reason = ids[: i + 1], FinishReason.STOP
                stop_id = token_id if token_id in params.stop_token_ids else None
                break
        if reason is None and start + len(ids) >= len(script):
            reason = FinishReason.LENGTH
        if request.request_id in self._aborted:
            ids, reason = [], FinishReason.ABORT
        if self.fail_after is not None and start >= self.fail_after:
            ids, reason = [], FinishReason.ERROR
        delta = Delta(request.request_id, index, start, ids, finish_reason=reason, stop_token_id=stop_id)
        if params.logprobs is not None:
            delta.logprobs = [logprobs_of(token_id, params.logprobs) for token_id in ids]
        if start == 0:
            delta.scheduled_s = asyncio.get_running_loop().time()
            delta.num_cached_tokens = 16 * index
            if params.prompt_logprobs is not None and index == 0:
                rest = [logprobs_of(i, params.prompt_logprobs) for i in request.prompt_token_ids[1:]]
                delta.prompt_logprobs = [None, *rest]
        self.stats = replace(self.stats, step=self.stats.step + 1, step_tokens=len(ids))
        self.stats.generation_tokens += len(ids)
        if self.on_step is not None:
            self.on_step(StepOutput(0, [delta], self.stats))
        return delta

    async def abort(self, request_id: str) -> bool:
        """Ends all choices of a request."""
        self._aborted.add(request_id)
        return any(request.request_id == request_id for request in self.requests)

    def abort_choice(self, request_id: str, choice_index: int) -> None:
        """Ends one choice."""
        self.aborted_choices.append((request_id, choice_index))


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """The fake's log-probabilities: the token itself second best, the last of the top minus infinity."""
    top = [((token_id + 1) % VOCAB_SIZE, -0.25), (token_id, -1.5), ((token_id + 2) % VOCAB_SIZE, float("-inf"))]
    return TokenLogprobs(token_id, -1.5, top[:num_top])


@dataclass
class Server:
    """An application under test, its parts, and a client that speaks to it without a socket."""

    app: FastAPI
    state: State
    engine: FakeEngine
    tokenizer: Tokenizer
    http: httpx.AsyncClient

    async def post(self, path: str, body: Any) -> httpx.Response:
        """POST of a JSON body."""
        return await self.http.post(path, json=body)

    async def ok(self, path: str, **body: Any) -> Any:
        """The answer to a body that must be accepted."""
        response = await self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    async def stream(self, path: str, **body: Any) -> list[Any]:
        """All events of a stream but [DONE], which must be the last."""
        response = await self.post(path, {"stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def saying(tokenizer: Tokenizer, text: str) -> Callable[[GenerationRequest, int], list[int]]:
    """A script: every choice says `text` and its index, then ends."""
    return lambda request, index: [*tokenizer.encode(f"{text}{index}"), EOS]


@asynccontextmanager
async def serving(
    folder: Path, text: str = "Grüße, Welt! 🌍 ", *, step_size: int = 1, **config: Any
) -> AsyncIterator[Server]:
    """A server of the fake engine; on leaving, everything taken must have been given back."""
    tokenizer = make_tokenizer(folder / "tiny")
    engine = FakeEngine(saying(tokenizer, text), step_size=step_size)
    app = create_app(ServerConfig(model=str(folder / "tiny"), **config), tokenizer, engine)
    state: State = app.state.server
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield Server(app, state, engine, tokenizer, http)
    assert (state.admission.num_choices, state.admission.num_tokens, state.num_requests) == (0, 0, 0)
    assert not state.live
    assert not engine.begun
    state.admission.close()


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits until `condition` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
