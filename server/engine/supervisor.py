"""Keeps an engine alive: after a fault it starts another, which goes on with every request that has not ended.

    starting -> ok -> recovering -> ok ... -> dead

A fault ends an epoch. The journal takes nothing more of it, its processes are killed, the next one is started and asked
a question whose answer is known; then the unfinished requests are given to it in the order of their arrival, each with
the tokens that it has. A request that was in the step that failed, twice without a token of each of its choices
between, is tried alone first. Where recovery does not succeed within its bounds the supervisor gives up.

Where a device is lost the next epoch has fewer ranks, and more again once it is back: then the epoch is ended as by a
fault, when no request runs, or when none has been found to be a good time for a while.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal

from octavo.server.config import SupervisorConfig
from octavo.server.engine.channel import Abort, Add, EngineInfo, StepOutput, ToEngine
from octavo.server.engine.devices import PROBE, WINDOW_S, Devices
from octavo.server.engine.epoch import TICK_S, Epoch, Fault
from octavo.server.engine.group import Group, Launcher
from octavo.server.engine.journal import Entry, Journal
from octavo.server.engine.known_answer import Answer, KnownAnswer
from octavo.server.engine.progress import RankFigures
from octavo.server.engine.request import GenerationRequest
from octavo.server.errors import RequestError, StartupError

log = logging.getLogger("octavo")

GROW_S = 60.0  # after which a device that is back is not kept waiting for a time when no request runs
PROBE_S = 30.0  # for a device to show that it is there
JOIN_S = 0.25  # between two looks at which machines have joined
PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0)  # before a start, by how many have failed in a row
START_FACTOR, START_S = 4.0, 30.0  # a start may take this many times the first one's time, and this long at least
SUSPICIOUS = 2  # faults in a row with which a request is tried alone
SUSPECTING = ("died", "failed", "stalled")  # the reasons of faults that a request may be the cause of
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
        self.devices = Devices(config.tensor_parallel_size, config.max_device_faults)
        self._engine_config = config.engine()
        self._answers: dict[tuple[int, int], Answer] = {}  # what the first engine of each kind has answered
        self._asked: tuple[KnownAnswer, asyncio.Future[None]] | None = None
        self._start_limit_s: float | None = None  # of the first start: none
        self._faults_s: deque[float] = deque(
            maxlen=config.max_faults + 1
        )  # when the latest were, but those of requests
        self._caused: Fault | None = None  # the latest that a request was found to be the cause of
        self._resuming: tuple[Recovery, float] | None = None  # requests go on since then, and none has a token yet
        self._task: asyncio.Task[None] | None = None
        self._missing = ""  # machines that have not joined, in words
        self._listens = ""  # where they can, in words

    @property
    def degraded(self) -> str:
        """With how many ranks it goes on and why, in words; empty where it has all that were asked for."""
        if not self.devices.is_degraded:
            return ""
        why = [
            f"device {device} is {'back' if out.back_s is not None else out.reason}"
            for device, out in sorted(self.devices.left_out.items())
        ]
        return f"{len(self.devices.used)} of {self._config.tensor_parallel_size} ranks: {', '.join(why)}"

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
        if self._config.nnodes > 1:
            self._listens = self._launcher.listen(self._config)
            try:
                async with asyncio.timeout(self._config.max_recovery_time):
                    await self._join()
            except TimeoutError:
                raise StartupError(
                    f"{self._missing} did not join within {self._config.max_recovery_time:g} s"
                ) from None
        begin_s = time.monotonic()
        fault = await self._start_epoch() or await self._check()
        if fault is not None:
            text = fault.text if fault.reason == "startup" else f"{fault.text} while it started (its log says why)"
            raise StartupError(text)
        self._start_limit_s = max(START_S, START_FACTOR * (time.monotonic() - begin_s))
        self.devices.ladder = self.info.ladder
        device = "cpu" if self.info.device == "cpu" else "cuda"  # and never another: it would have other bits
        self._engine_config = replace(self._engine_config, device=device)
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
                fault = await self._watch()
                async with asyncio.timeout(self._config.max_recovery_time):
                    recovery = await self._recover(fault)
                if recovery is None:
                    text = f"{len(self._faults_s)} faults within {WINDOW_S / 60:.0f} minutes"
                    break
                self._refuse_too_long()
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

    async def _watch(self) -> Fault:
        """Waits for the current epoch's fault. Meanwhile asks what is known, and looks after devices left out."""
        assert self._epoch is not None
        epoch, interval_s = self._epoch, self._config.canary_interval or math.inf
        next_s = time.monotonic() + interval_s
        while not epoch.fault.done():
            wait_s = min(next_s - time.monotonic(), TICK_S if self.devices.is_degraded else math.inf)
            await asyncio.wait((epoch.fault,), timeout=None if wait_s == math.inf else max(wait_s, 0.0))
            if time.monotonic() >= next_s:
                await self._check()
                next_s = time.monotonic() + interval_s
            elif self.devices.is_degraded:
                await self._look_for_devices()
        return epoch.fault.result()

    async def _look_for_devices(self) -> None:
        """Looks whether devices are back, and ends the epoch where there can be more ranks and it is time for it."""
        assert self._epoch is not None
        for device in self.devices.to_look_for(time.monotonic()):
            if not self._epoch.fault.done() and await self._is_there(device):
                log.warning("device %d is back", device)
                self.devices.is_back(device, time.monotonic())
        runs = any(entry.open_choices for entry in self._journal.entries.values())
        if self.devices.can_grow and not (runs and self.devices.back_for_s(time.monotonic()) < GROW_S):
            self._epoch.fail("regrown", "devices are back: the engine is started again with more ranks")

    async def _is_there(self, device: int) -> bool:
        """Whether a process can be started on a device that is not in use."""
        assert self._epoch is not None
        try:
            group = self._launcher.start(self._engine_config, PROBE, [device])
        except OSError:
            return False
        probe = asyncio.create_task(asyncio.to_thread(_shows_itself, group))
        await asyncio.wait((probe, self._epoch.fault), timeout=PROBE_S, return_when=asyncio.FIRST_COMPLETED)
        group.kill()
        return await probe

    async def _recover(self, fault: Fault) -> Recovery | None:
        """The next epoch, which has proved itself, after as many attempts as it takes. None: there were too many."""
        recovery = Recovery(fault, sum(bool(entry.open_choices) for entry in self._journal.entries.values()))
        recovery.seconds["detect"] = fault.silent_s
        self.state, self._resuming = "recovering", None
        for attempt in count():
            num_left_out = len(self.devices.left_out)
            with recovery.timed("kill"):
                if await self._bury(fault):
                    return None
            with recovery.timed("start"):
                if len(self.devices.left_out) == num_left_out:  # else it is another attempt
                    await asyncio.sleep(PAUSES_S[min(attempt, len(PAUSES_S) - 1)])
                failed = await self._start_epoch()
            with recovery.timed("check"):
                failed = failed or await self._check()
            if failed is None:
                break
            fault = failed
        if self.devices.is_degraded:
            log.warning("the engine goes on with %s", self.degraded)
        return recovery

    async def _bury(self, fault: Fault) -> bool:
        """Takes nothing more from the current epoch and ends its processes. True: there were too many faults."""
        assert self._epoch is not None
        is_planned, now_s = fault.reason == "regrown", time.monotonic()
        log.log(logging.WARNING if is_planned else logging.ERROR, "%s", fault.text)
        self._journal.epoch += 1
        is_caused = fault is self._caused
        if fault.reason in SUSPECTING and not is_caused:
            for request_id in set(self._epoch.running):  # where each of its choices may be named
                if (entry := self._journal.entries.get(request_id)) is not None:
                    entry.fault(now_s)
        self.on_fault()
        if fault.rank is not None and not is_caused and (text := self.devices.fault(fault.rank, fault.is_gone, now_s)):
            log.error("%s: it is left out", text)
        await self._epoch.kill()
        if is_planned or is_caused:
            return False
        self._faults_s.append(now_s)
        return len(self._faults_s) > self._config.max_faults and self._faults_s[-1] - self._faults_s[0] < WINDOW_S

    async def _start_epoch(self) -> Fault | None:
        """Starts an epoch with the number that the journal expects, and waits until it has loaded."""
        rung = self.devices.choose()
        config = replace(self._engine_config, tensor_parallel_size=rung.num_ranks)
        if rung.max_model_len:
            config = replace(config, max_model_len=rung.max_model_len)
        limit_s = self._start_limit_s and self._start_limit_s * self.devices.ladder[0].num_ranks / rung.num_ranks
        if self._config.nnodes > 1:
            await self._join()
        try:
            group = self._launcher.start(config, self._journal.epoch, self.devices.used)
        except OSError as error:
            return Fault("startup", f"the engine's processes cannot be started: {error.strerror}")
        self._epoch = epoch = Epoch(group, self._config.step_deadline, self._patience, self._take)
        await asyncio.wait((epoch.ready, epoch.fault), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not epoch.ready.done():
            epoch.fail("stalled", f"the engine did not load within {limit_s or 0:.0f} s")
            return epoch.fault.result()
        self.info = epoch.ready.result()
        return None

    async def _join(self) -> None:
        """Waits until all machines are there."""
        told = ""
        while missing := await asyncio.to_thread(self._launcher.join, JOIN_S):
            self._missing = f"node{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            if told != self._missing:
                told = self._missing
                log.warning("waiting for %s on %s", told, self._listens)

    async def _check(self) -> Fault | None:
        """Asks the current engine what is known; the first one is believed.

        So is the first with each number of ranks, unless bits do not depend on that.
        """
        assert self._epoch is not None
        known, answered = KnownAnswer(self.info), asyncio.get_running_loop().create_future()
        self._asked = known, answered
        self._epoch.send(known.add)
        await asyncio.wait((answered, self._epoch.fault), return_when=asyncio.FIRST_COMPLETED)
        self._asked = None
        kind = (0 if self._config.exactness == "ranks" else len(self.info.ranks)), self.info.max_model_len
        if answered.done() and (kind not in self._answers or self._config.exactness == "fast"):
            self._answers[kind] = known.answer  # fast promises no bits
        elif answered.done() and known.answer != self._answers[kind]:
            self._epoch.fail("wrong", "the engine computes wrongly: another answer than the known one")
        return self._epoch.fault.result() if self._epoch.fault.done() else None

    def _refuse_too_long(self) -> None:
        """Gives up requests that the current engine's context cannot hold."""
        for entry in list(self._journal.entries.values()):
            if entry.open_choices and (error := self.too_long(entry.request)):
                entry.open_choices.clear()
                self.on_refused(entry.request.request_id, error)

    def too_long(self, request: GenerationRequest) -> RequestError | None:
        """Why a valid request cannot be run by the current engine, if it cannot: fewer ranks may have less memory."""
        num_tokens = len(request.prompt_token_ids) + request.params.max_tokens
        if num_tokens <= self.info.max_model_len:
            return None
        return RequestError(
            f"The engine has lost devices and goes on with {len(self.info.ranks)} ranks, which hold "
            f"{self.info.max_model_len} tokens of context; this request may need {num_tokens}.",
            code="engine_degraded",
            status=503,
        )

    async def _try_suspects(self) -> None:
        """Runs each request under suspicion alone until its choices have a token more.

        One that ends the epoch is refused, and the faults that it was running in are counted no longer.
        """
        assert self._epoch is not None
        for entry in [entry for entry in self._journal.entries.values() if entry.num_faults >= SUSPICIOUS]:
            name = entry.request.request_id
            log.warning("request %s was running in %d faults: it runs alone", name, entry.num_faults)
            self._add(entry)
            while entry.num_faults and not self._epoch.fault.done():
                await asyncio.sleep(0.01)
            if self._epoch.fault.done():
                fault = self._epoch.fault.result()
                if entry.num_faults and fault.reason in SUSPECTING and name in self._epoch.running:
                    log.error("request %s is given up: it ends the engine when it runs alone", name)
                    self._caused = fault
                    self._faults_s = deque(
                        (at_s for at_s in self._faults_s if at_s not in entry.faults_s), self._faults_s.maxlen
                    )
                    self.devices.forgive(entry.faults_s)
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
        self._refuse_too_long()  # those that came while others were tried alone
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


def _shows_itself(group: Group) -> bool:
    """Whether a probe says that its device is there. Waits for that, or for its end."""
    try:
        group.wait_until_started()
        return bool(group.channel.recv(1))
    except (OSError, StartupError):
        return False
    finally:
        group.kill()
        group.wait(PROBE_S)
        group.channel.close()
