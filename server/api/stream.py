"""The response that streams a generation as server-sent events.

A token's way out is short: the engine's client calls the generation, which calls the stream, which writes to the
socket, before anything else runs. What cannot be written at once (the head, the end, what a slow reader has no room
for yet) is left to the request's own task.
"""

import asyncio
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.api.errors import error_body, refusal_of
from octavo.server.api.formats import Format
from octavo.server.api.generation import Generation
from octavo.server.api.sse import RECOVERING, event

BODY = "body"  # in the state of a request: the `Body` of its response, where the server has one


class Body(Protocol):
    """The body of a response without a content length, for those who do not wait. The head must have been sent."""

    @property
    def is_writable(self) -> bool:
        """Whether the client is there and keeps up with what it is sent."""

    def write(self, data: bytes) -> None:
        """Sends a part of the body."""


class EventStream(Response):
    """Sends what a generation gains as soon as the client takes it; what has gathered by then goes out as one write.

    Ends with [DONE], or with an error event. The status goes out with the first event, or when the engine has not
    recovered a few seconds after a fault: what fails before is still an error with a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, format: Format) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._format = format
        self._body: Body | None = None  # from the first event on
        self._waiter: asyncio.Future[None] | None = None  # what the task waits for while it has nothing to send
        self._num_waits = 0
        self._comment = b""  # to be sent by the task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams. Leaving in any way ends the generation."""
        with self._generation.running(self._on_gain, self._on_wait):
            data = await self._next()
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                while not self._generation.is_done:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    self._body = scope["state"].get(BODY)
                    data = await self._next()
                data += self._gained() + self._format.end()
            except Exception as error:
                data = event(error_body(refusal_of(error, self._format.request_id)))
            await send({"type": "http.response.body", "body": data})

    async def _next(self) -> bytes:
        """The next events, as soon as there are some; none once all are taken. Raises what ended the generation."""
        while not (data := self._gained()) and self._generation.is_running and not self._comment:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not data:
            self._generation.check()
        comment, self._comment = self._comment, b""
        return comment + data

    def _gained(self) -> bytes:
        return self._format.events(self._generation.take())

    def _on_wait(self) -> None:
        # Whoever stands between may end a connection that is silent for long.
        self._num_waits += 1
        if self._waiter is None:
            return
        if self._body is not None:
            if self._body.is_writable:
                self._body.write(RECOVERING)
        elif self._num_waits > 1:  # until now what becomes of it could still have had a status of its own
            self._comment = RECOVERING
            self._wake()

    def _on_gain(self) -> None:
        if self._waiter is None:
            return  # the task is sending, and will look again
        if self._body is not None and self._body.is_writable and self._generation.is_running:
            if data := self._gained():
                self._body.write(data)
            return
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # it may have been cancelled
            waiter.set_result(None)
