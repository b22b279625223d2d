"""The front end's side of the engine: takes requests, and hands what comes of them to those who asked.

Owns the journal: a delta is handed out only after it is committed there. Nothing waits between the socket and a
stream's own code: a step's deltas are handed out in the call that read them, which is what keeps a token cheap. The
engine itself comes and goes, which is the supervisor's business: a request stays until it has ended.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from octavo.server.config import SupervisorConfig
from octavo.server.engine.channel import Abort, Add, EngineInfo, EngineStats, StepOutput
from octavo.server.engine.journal import Journal
from octavo.server.engine.progress import RankFigures
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest
from octavo.server.engine.supervisor import EngineState, Recovery, Supervisor
from octavo.server.errors import EngineError, OctavoError, RequestError

WAIT_S = 5.0  # between two words to those who wait for a recovery

OnDeltas = Callable[[list[Delta]], None]
OnError = Callable[[OctavoError], None]


class EngineClient:
    """An engine and the requests in it. All methods belong to one event loop.

    Attributes:
        stats: the latest; counters are since the server's start.
        on_step: called with each step.
        on_wait: called, while requests wait for a recovery, at its beginning and every few seconds.
        on_recovered: called when they go on.
    """

    def __init__(self, config: SupervisorConfig) -> None:
        self.stats = EngineStats()
        self._offset: dict[str, float] = {}  # of the counters: what earlier engines have counted
        self.on_step: Callable[[StepOutput], None] | None = None
        self.on_wait: Callable[[], None] | None = None
        self.on_recovered: Callable[[Recovery], None] | None = None
        self.journal = Journal()
        self._callers: dict[str, tuple[OnDeltas, OnError]] = {}  # by request id
        self._waiting: asyncio.TimerHandle | None = None
        self._supervisor = supervisor = Supervisor(config, self.journal)
        supervisor.on_outputs, supervisor.on_fault = self._take, self._lost
        supervisor.on_refused, supervisor.on_dead = self._refused, self._died
        supervisor.on_recovered = self._recovered

    @property
    def state(self) -> EngineState:
        """Whether the engine loads, runs, is being replaced after a fault, or is given up."""
        return self._supervisor.state

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine, once `start` has returned."""
        return self._supervisor.info

    @property
    def figures(self) -> list[RankFigures]:
        """What each of the current ranks has done; none while they load."""
        return self._supervisor.figures

    @property
    def degraded(self) -> str:
        """With how many ranks it goes on and why, in words; empty where it has all that were asked for."""
        return self._supervisor.degraded

    @property
    def left_out(self) -> list[str]:
        """Why devices are not used, for each of them: reasons of `devices.LEFT_OUT`."""
        return [out.reason for out in self._supervisor.devices.left_out.values()]

    @property
    def pids(self) -> list[int]:
        """Process ids of the current ranks."""
        return self._supervisor.pids

    async def start(self) -> None:
        """Start the engine and wait until the model is loaded. Raises StartupError with the engine's own words."""
        await self._supervisor.start()

    async def close(self) -> None:
        """Stop the engine; it ends by itself once the socket closes, and is killed if it does not."""
        if self._waiting is not None:
            self._waiting.cancel()
        await self._supervisor.close()

    def begin(self, request: GenerationRequest, on_deltas: OnDeltas, on_error: OnError) -> None:
        """Run a valid request: its deltas go to `on_deltas`, all of one step at once, until each choice has ended.

        `on_error` is called if it is given up first. Neither is called before this returns, nor after `end`, and
        neither may raise. The request id must never have been used before: the engine may still answer for a request
        given up on. Raises EngineError if there is no engine and none to come, ValueError where the id is in use,
        RequestError where the request was valid for an engine with more ranks.
        """
        if self.state not in ("ok", "recovering"):
            raise EngineError(f"the engine is {self.state}")
        if self.state == "ok" and (error := self._supervisor.too_long(request)):
            raise error
        self.journal.open(request)
        self._callers[request.request_id] = on_deltas, on_error
        if self.state == "ok":
            self._supervisor.send(Add(request))

    def end(self, request_id: str) -> None:
        """Forget a request, and abort what of it still runs. Unknown ids are ignored."""
        entry = self.journal.entries.get(request_id)
        if entry is None:
            return
        if entry.open_choices:
            self._supervisor.send(Abort(request_id))
        self.journal.close(request_id)
        del self._callers[request_id]

    async def abort(self, request_id: str) -> bool:
        """End all choices of a request with `FinishReason.ABORT`, as a delta says. False where it is not known."""
        entry = self.journal.entries.get(request_id)
        if entry is None or not entry.open_choices:
            return False
        self._supervisor.send(Abort(request_id))
        if self.state != "ok":  # there may be nobody to answer
            self._end_choices(request_id)
        return True

    def abort_choice(self, request_id: str, choice_index: int) -> None:
        """End one choice at once: the engine stops it, and no more deltas come for it. Unknown ids are ignored."""
        entry = self.journal.entries.get(request_id)
        if entry is not None and choice_index in entry.open_choices:
            entry.open_choices.discard(choice_index)
            self._supervisor.send(Abort(request_id, choice_index))

    def _end_choices(self, request_id: str) -> None:
        """Ends the open choices of a request as its engine would."""
        deltas = [
            Delta(request_id, index, len(token_ids), [], finish_reason=FinishReason.ABORT)
            for index, token_ids in self.journal.entries[request_id].unfinished().items()
        ]
        for delta in deltas:
            self.journal.commit(self.journal.epoch, delta)
        self._callers[request_id][0](deltas)

    def _take(self, outputs: list[StepOutput]) -> None:
        """Commits what the engine has sent, and hands it out; a stream that is behind gets several steps at once."""
        deltas: dict[str, list[Delta]] = {}  # by request id
        for output in outputs:
            if self.state == "ok":
                output.stats.count_from(self._offset)
                self.stats = output.stats
                if self.on_step is not None:
                    self.on_step(output)
            else:  # the engine proves itself, which is nobody's request
                self._offset = self.stats.offset_of(output.stats)
            for delta in output.deltas:
                if self.journal.commit(output.epoch, delta):
                    deltas.setdefault(delta.request_id, []).append(delta)
        if deltas:
            self._supervisor.progressed()
        for request_id, gained in deltas.items():
            self._callers[request_id][0](gained)

    def _lost(self) -> None:
        """The engine is gone, and with it all that ran."""
        num_waiting = sum(len(entry.open_choices) for entry in self.journal.entries.values())
        self.stats = replace(self.stats, num_running=0, num_waiting=num_waiting, num_deferred=0, num_blocks_used=0)
        if self._waiting is not None:
            self._waiting.cancel()
        self._wait()

    def _wait(self) -> None:
        """Has those who wait know it."""
        if self.state == "recovering":
            if self.on_wait is not None:
                self.on_wait()
            self._waiting = asyncio.get_running_loop().call_later(WAIT_S, self._wait)

    def _recovered(self, recovery: Recovery) -> None:
        if self.on_recovered is not None:
            self.on_recovered(recovery)

    def _refused(self, request_id: str, error: RequestError) -> None:
        self._callers[request_id][1](error)

    def _died(self, text: str) -> None:
        for _, on_error in list(self._callers.values()):
            on_error(EngineError(text))
