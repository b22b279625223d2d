"""Keeps an engine alive: after a fault it starts another, which goes on with every request that has not ended.

    starting -> ok -> recovering -> ok ... -> dead

A fault ends an epoch. The journal takes nothing more of it, its processes are killed, the next one is started and asked
a question whose answer is known; then the unfinished requests are given to it in the order of their arrival, each with
the tokens that it has. A request that was in the step that failed, twice without a token between, is tried alone first.
Where recovery does not succeed within its bounds the supervisor gives up.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from octavo.server.config import SupervisorConfig
from octavo.server.engine.channel import Abort, Add, EngineInfo, StepOutput, ToEngine
from octavo.server.engine.epoch import Epoch, Fault
from octavo.server.engine.group import Launcher
from octavo.server.engine.journal import Entry, Journal
from octavo.server.engine.known_answer import Answer, KnownAnswer
from octavo.server.engine.progress import RankFigures
from octavo.server.errors import RequestError, StartupError

log = logging.getLogger("octavo")

WINDOW_S = 600.0  # in which faults are counted
PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0)  # before a start, by how many have failed in a row
START_FACTOR, START_S = 4.0, 30.0  # a start may take this many times the first one's time, and this long at least
SUSPICIOUS = 2  # faults in a row with which a request is tried alone
PHASES = ("detect", "kill", "start", "check", "resume", "total")

EngineState = Literal["starting", "ok", "recovering", "dead"]


@dataclass(slots=True)
class Recovery:
    """One fault and what came after it.

    `seconds` by phase: from the engine's last sign of life to the fault, to the end of its processes, to the next one's
    being loaded, to its right answer, to the first token of a request; and all together.
    """

    fault: Fault
    num_requests: int  # that waited
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds what is done to a phase."""
        begin_s = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] += time.monotonic() - begin_s


class Supervisor:
    """The epochs of one engine. All methods belong to one event loop.

    Attributes:
        state: what it does.
        info: the current engine's description, once `start` has returned.
        on_outputs: gets what the current engine has sent, all that came at once.
        on_fault: told when an epoch has ended and another is to come.
        on_refused: told the id of a request that is given up, and the error for it.
        on_recovered: told when requests go on.
        on_dead: told why it gives up.
    """

    info: EngineInfo
    on_outputs: Callable[[list[StepOutput]], None]
    on_fault: Callable[[], None]
    on_refused: Callable[[str, RequestError], None]
    on_recovered: Callable[[Recovery], None]
    on_dead: Callable[[str], None]

    def __init__(self, config: SupervisorConfig, journal: Journal) -> None:
        self._config, self._journal = config, journal
        self.state: EngineState = "starting"
        self._launcher = Launcher()
        self._epoch: Epoch | None = None
        self._answer: Answer | None = None
        self._asked: tuple[KnownAnswer, asyncio.Future[None]] | None = None
        self._start_limit_s: float | None = None  # of the first start: none
        self._faults_s: deque[float] = deque(maxlen=config.max_faults + 1)  # when the latest were
        self._resuming: tuple[Recovery, float] | None = None  # requests go on since then, and none has a token yet
        self._task: asyncio.Task[None] | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids of the current ranks."""
        return self._epoch.pids if self._epoch is not None else []

    @property
    def figures(self) -> list[RankFigures]:
        """What each of the current ranks has done; none while they load."""
        return self._epoch.figures if self._epoch is not None else []

    async def start(self) -> None:
        """Starts the first engine, and learns its answer. Raises StartupError with the engine's own words."""
        begin_s = time.monotonic()
        fault = await self._start_epoch() or await self._check()
        if fault is not None:
            text = fault.text if fault.reason == "startup" else f"{fault.text} while it started (its log says why)"
            raise StartupError(text)
        self._start_limit_s = max(START_S, START_FACTOR * (time.monotonic() - begin_s))
        self.state = "ok"
        self._task = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """Ends the engine."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.state = "dead"
        if self._epoch is not None:
            await self._epoch.close()
        self._launcher.close()

    def send(self, message: ToEngine) -> None:
        """Sends a message to the current engine, if it is there to take it."""
        if self._epoch is not None:
            self._epoch.send(message)

    def progressed(self) -> None:
        """To be told when a token is committed."""
        if self._resuming is not None:
            (recovery, since_s), self._resuming = self._resuming, None
            recovery.seconds["resume"] = time.monotonic() - since_s
            self._report(recovery)

    async def _supervise(self) -> None:
        assert self._epoch is not None
        text = "its supervisor failed"
        try:
            while True:
                interval_s = self._config.canary_interval or None
                await asyncio.wait((self._epoch.fault,), timeout=interval_s)
                if not self._epoch.fault.done():
                    await self._check()
                    continue
                async with asyncio.timeout(self._config.max_recovery_time):
                    recovery = await self._recover(self._epoch.fault.result())
                if recovery is None:
                    text = f"{len(self._faults_s)} faults within {WINDOW_S / 60:.0f} minutes"
                    break
                await self._try_suspects()
                self._resume(recovery)
        except TimeoutError:
            text = f"it did not recover within {self._config.max_recovery_time:g} s"
        except Exception:
            log.exception("the supervisor failed")
        self.state = "dead"
        self._journal.epoch += 1
        self.on_dead(f"the engine is given up: {text}")
        await self._epoch.kill()

    async def _recover(self, fault: Fault) -> Recovery | None:
        """The next epoch, which has proved itself, after as many attempts as it takes. None: there were too many."""
        recovery = Recovery(fault, sum(bool(entry.open_choices) for entry in self._journal.entries.values()))
        recovery.seconds["detect"] = fault.silent_s
        self.state, self._resuming = "recovering", None
        for attempt in count():
            with recovery.timed("kill"):
                if await self._bury(fault):
                    return None
            with recovery.timed("start"):
                await asyncio.sleep(PAUSES_S[min(attempt, len(PAUSES_S) - 1)])
                failed = await self._start_epoch()
            with recovery.timed("check"):
                failed = failed or await self._check()
            if failed is None:
                break
            fault = failed
        return recovery

    async def _bury(self, fault: Fault) -> bool:
        """Takes nothing more from the current epoch and ends its processes. True: there were too many faults."""
        assert self._epoch is not None
        log.error("%s", fault.text)
        self._journal.epoch += 1
        if fault.reason in ("died", "failed", "stalled"):
            for request_id in self._epoch.running:
                if (entry := self._journal.entries.get(request_id)) is not None:
                    entry.num_faults += 1
        self.on_fault()
        self._faults_s.append(time.monotonic())
        await self._epoch.kill()
        return len(self._faults_s) > self._config.max_faults and self._faults_s[-1] - self._faults_s[0] < WINDOW_S

    async def _start_epoch(self) -> Fault | None:
        """Starts an epoch with the number that the journal expects, and waits until it has loaded."""
        try:
            group = self._launcher.start(self._config.engine(), self._journal.epoch)
        except OSError as error:
            return Fault("startup", f"the engine's processes cannot be started: {error.strerror}")
        self._epoch = epoch = Epoch(group, self._config.step_deadline, self._patience, self._take)
        await asyncio.wait((epoch.ready, epoch.fault), timeout=self._start_limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not epoch.ready.done():
            epoch.fail("stalled", f"the engine did not load within {self._start_limit_s or 0:.0f} s")
            return epoch.fault.result()
        self.info = epoch.ready.result()
        return None

    async def _check(self) -> Fault | None:
        """Asks the current engine what is known; the first one is believed."""
        assert self._epoch is not None
        known, answered = KnownAnswer(self.info), asyncio.get_running_loop().create_future()
        self._asked = known, answered
        self._epoch.send(known.add)
        await asyncio.wait((answered, self._epoch.fault), return_when=asyncio.FIRST_COMPLETED)
        self._asked = None
        if answered.done() and (self._answer is None or self._config.exactness == "fast"):
            self._answer = known.answer  # fast promises no bits
        elif answered.done() and known.answer != self._answer:
            self._epoch.fail("wrong", "the engine computes wrongly: another answer than the known one")
        return self._epoch.fault.result() if self._epoch.fault.done() else None

    async def _try_suspects(self) -> None:
        """Runs each request under suspicion alone until it has a token more. One that ends the epoch is refused."""
        assert self._epoch is not None
        for entry in [entry for entry in self._journal.entries.values() if entry.num_faults >= SUSPICIOUS]:
            name = entry.request.request_id
            log.warning("request %s was running in %d faults: it runs alone", name, entry.num_faults)
            self._add(entry)
            while entry.open_choices and entry.num_faults and not self._epoch.fault.done():
                await asyncio.sleep(0.01)
            if self._epoch.fault.done():
                if entry.open_choices and entry.num_faults and name in self._epoch.running:
                    log.error("request %s is given up: it ends the engine when it runs alone", name)
                    entry.open_choices.clear()
                    text = "The engine failed each time that it ran this request, the last time alone."
                    self.on_refused(name, RequestError(text, code="engine_failure", status=500))
                return
            for index in entry.open_choices:
                self._epoch.send(Abort(name, index))

    def _resume(self, recovery: Recovery) -> None:
        """Gives all unfinished requests to the current engine."""
        assert self._epoch is not None
        if self._epoch.fault.done():
            return
        unfinished = [entry for entry in self._journal.entries.values() if entry.open_choices]
        for entry in unfinished:
            self._add(entry)
        self.state = "ok"
        if unfinished:
            self._resuming = recovery, time.monotonic()
        else:
            self._report(recovery)

    def _add(self, entry: Entry) -> None:
        self.send(Add(entry.request, entry.unfinished()))

    def _patience(self) -> float:
        """How many times its deadline the engine may take: more, after a fault that a request did not get past."""
        num_faults = max((entry.num_faults for entry in self._journal.entries.values()), default=0)
        return float(1 << min(num_faults, SUSPICIOUS))

    def _take(self, outputs: list[StepOutput]) -> None:
        if self._asked is not None:
            known, answered = self._asked
            for output in outputs:
                if known.feed(output.deltas) and not answered.done():
                    answered.set_result(None)
        self.on_outputs(outputs)

    def _report(self, recovery: Recovery) -> None:
        recovery.seconds["total"] = sum(recovery.seconds.values())
        parts: Any = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in recovery.seconds.items())
        log.warning("recovered; %d requests go on. Seconds: %s", recovery.num_requests, parts)
        self.on_recovered(recovery)
