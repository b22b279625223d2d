"""Server-sent events: one framing for both routes, and the response that streams them."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def event(payload: dict[str, Any]) -> bytes:
    """One event: `data: `, the payload as JSON, an empty line."""
    return b"data: " + encode_json(payload) + b"\n\n"


class EventStream(Response):
    """Sends what a generator yields, each item as one write.

    The status goes out with the first item: what fails before is still an error with a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, writes: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._writes = writes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams. Leaving in any way closes the generator."""
        async with aclosing(self._writes):
            data = await anext(self._writes)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": True})
            async for data in self._writes:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
