"""What all routes of one server share, and how it drains."""

import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from octavo import __version__
from octavo.server.api.admission import Admission
from octavo.server.api.engine import Engine
from octavo.server.api.errors import unavailable
from octavo.server.api.generation import Generation
from octavo.server.api.metrics import Metrics
from octavo.server.config import ServerConfig
from octavo.server.errors import RequestError
from octavo.server.text.tokenizer import Tokenizer


@dataclass(slots=True)
class State:
    """The server's parts and its live requests."""

    config: ServerConfig
    tokenizer: Tokenizer
    engine: Engine
    admission: Admission
    metrics: Metrics
    draining: bool = False
    live: dict[str, Generation] = field(default_factory=dict)  # id of the response -> what runs
    created: int = field(default_factory=lambda: int(time.time()))
    num_requests: int = 0  # HTTP requests between their head and the end of their response
    _cut: RequestError | None = None

    @property
    def status(self) -> Literal["starting", "ok", "stalled", "dead", "draining"]:
        """In one word, what the server does."""
        return "draining" if self.draining and self.engine.state == "ok" else self.engine.state

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same request may get other bits."""
        info = self.engine.info
        facts = (__version__, info.architecture, info.dtype, info.kernels, info.num_parameters, self.config.exactness)
        return "fp_" + hashlib.sha256(repr(facts).encode()).hexdigest()[:12]

    def check_ready(self) -> None:
        """Raises RequestError (503) unless new requests are taken."""
        if self.status != "ok":
            raise unavailable(f"The server is not ready ({self.status}); try again later.")

    @contextmanager
    def register(self, request_id: str, generation: Generation) -> Iterator[None]:
        """Makes a running request known under its id. Raises RequestError if the id is taken."""
        if request_id in self.live:
            raise RequestError("request_id must be unique among running requests.", param="request_id")
        if self._cut is not None:
            raise self._cut
        self.live[request_id] = generation
        try:
            yield
        finally:
            del self.live[request_id]

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests, waits for those that run, ends the rest with an error. True: nothing was cut."""
        self.draining = True
        if await self._idle_within(timeout_s):
            return True
        self._cut = unavailable("The server is shutting down; the request was cut.")
        for generation in list(self.live.values()):
            generation.cut(self._cut)
        await self._idle_within(2.0)
        return False

    async def _idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self.num_requests:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            return False
        return True
