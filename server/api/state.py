"""What all routes of one server share, and how it drains."""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

from octavo import __version__
from octavo.server.api.admission import Admission, Permit
from octavo.server.api.engine import Engine
from octavo.server.api.errors import unavailable
from octavo.server.api.generation import Generation
from octavo.server.api.metrics import Metrics
from octavo.server.config import ServerConfig
from octavo.server.errors import RequestError
from octavo.server.text.tokenizer import Tokenizer

logger = logging.getLogger("octavo")

MAX_BODIES = 256  # at the cap of each, what half-read bodies may hold in memory


@dataclass(slots=True)
class State:
    """The server's parts and its live requests."""

    config: ServerConfig
    tokenizer: Tokenizer
    engine: Engine
    admission: Admission
    metrics: Metrics
    draining: bool = False
    live: dict[tuple[str, str], Generation] = field(default_factory=dict)  # (key id, id of the response) -> what runs
    created: int = field(default_factory=lambda: int(time.time()))
    num_requests: int = 0  # accepted ones, until the end of their response
    _bodies: set[asyncio.Timeout] = field(default_factory=set)  # deadlines of bodies that are being read
    _cut: RequestError | None = None

    def __post_init__(self) -> None:
        self.engine.on_wait = self._wait

    @property
    def status(self) -> Literal["starting", "ok", "recovering", "dead", "draining"]:
        """In one word, what the server does."""
        return "draining" if self.draining and self.engine.state in ("ok", "recovering") else self.engine.state

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same request may get other bits."""
        info = self.engine.info
        facts = (
            *(__version__, info.architecture, info.dtype, info.device, info.kernels, info.num_parameters),
            self.config.exactness,
            0 if self.config.exactness == "ranks" else len(info.ranks),
        )
        return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    def check_ready(self) -> None:
        """Raises RequestError (503) unless new requests are taken: they are while others wait for a recovery."""
        if self.status not in ("ok", "recovering"):
            raise unavailable(f"The server is not ready ({self.status}); try again later.")

    @asynccontextmanager
    async def reading(self, timeout_s: float) -> AsyncIterator[None]:
        """Around the reading of a body. Raises TimeoutError when it takes too long, and when the server drains.

        Raises RequestError (429) where too many bodies are on their way already.
        """
        if len(self._bodies) >= MAX_BODIES:
            raise RequestError("Too many bodies are on their way; try again later.", status=429, retry_after_s=1)
        async with asyncio.timeout(timeout_s) as deadline:
            self._bodies.add(deadline)
            try:
                yield
            finally:
                self._bodies.discard(deadline)

    @contextmanager
    def accept(self) -> Iterator[Permit]:
        """From a whole body to the end of the response: the server sees it through. Raises RequestError (429, 503)."""
        self.check_ready()
        with self.admission.permit() as permit:
            self.num_requests += 1
            try:
                yield permit
            finally:
                self.num_requests -= 1

    @contextmanager
    def register(self, key_id: str, request_id: str, generation: Generation) -> Iterator[None]:
        """Makes a running request known under its id. Raises RequestError if the key has it in use."""
        name = key_id, request_id
        if name in self.live:
            raise RequestError("request_id must be unique among running requests.", param="request_id")
        if self._cut is not None:
            raise self._cut
        self.live[name] = generation
        try:
            yield
        finally:
            del self.live[name]

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests, waits for those that run, ends the rest with an error. True: nothing was cut."""
        self.draining = True
        for deadline in self._bodies:
            with suppress(RuntimeError):  # it expires anyhow
                deadline.reschedule(0.0)
        if await self._idle_within(timeout_s):
            return True
        self._cut = unavailable("The server is shutting down; the request was cut.")
        logger.warning("cutting %d requests that still run", self.num_requests)
        for generation in list(self.live.values()):
            generation.cut(self._cut)
        await self._idle_within(2.0)
        return False

    def _wait(self) -> None:
        for generation in self.live.values():
            generation.wait()

    async def _idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self.num_requests:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            return False
        return True
