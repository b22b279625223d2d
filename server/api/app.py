"""The ASGI application: routes inside, and around them an edge that every request passes.

The edge checks the key, names the request, ends it when its client leaves, turns every exception into an error body and
counts. Whatever a route took for its request (a permit, its place among the live ones) hangs on the request's `stack`
and is given back here, once, however the request ends.
"""

import asyncio
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from email.utils import formatdate

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.api.admission import Admission
from octavo.server.api.auth import Keys
from octavo.server.api.engine import Engine
from octavo.server.api.errors import error_response, refusal_of
from octavo.server.api.metrics import Metrics
from octavo.server.api.routes import OPEN_PATHS, router
from octavo.server.api.state import State
from octavo.server.config import ServerConfig
from octavo.server.errors import RequestError
from octavo.server.text.tokenizer import Tokenizer


def create_app(config: ServerConfig, tokenizer: Tokenizer, engine: Engine) -> FastAPI:
    """The application; `app.state.server` is its `State`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    state = State(config, tokenizer, engine, Admission(config, tokenizer, engine), Metrics(config, engine))
    app.state.server = state
    app.include_router(router)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_middleware(Edge, state=state, keys=Keys(config.api_key))
    return app


async def _http_exception(request: Request, error: Exception) -> Response:
    """The router's own refusals: no such path, no such method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = {404: "There is no such path.", 405: "This path does not take this method."}.get(status, "Bad request.")
    response = error_response(RequestError(message, status=status))
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response


@dataclass(slots=True)
class _Call:
    """One HTTP request on its way through the edge."""

    task: "asyncio.Task[object]"
    status: int = 0  # 0: no response yet
    is_complete: bool = False
    is_disconnected: bool = False
    watcher: "asyncio.Task[None] | None" = None
    started_s: float = field(default_factory=time.monotonic)


class Edge:
    """The outermost layer of ours; sets `request_id`, `key_id`, `arrival_s` and `stack` in the request's state."""

    def __init__(self, app: ASGIApp, state: State, keys: Keys) -> None:
        self._app = app
        self._state = state
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request from its head to the end of its response."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        task = asyncio.current_task()
        assert task is not None
        call = _Call(task)
        request = scope.setdefault("state", {})
        request.update(request_id=uuid.uuid4().hex, arrival_s=call.started_s)

        async def edge_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body") and call.watcher is None:
                call.watcher = asyncio.create_task(_watch(receive, call))
            return message

        async def edge_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request["request_id"]
                headers["date"] = formatdate(usegmt=True)
            elif not message.get("more_body"):
                call.is_complete = True
            await send(message)

        try:
            with ExitStack() as request["stack"]:
                if scope["path"] not in OPEN_PATHS:
                    request["key_id"] = self._keys.identify(_authorization(scope))
                await self._app(scope, edge_receive, edge_send)
        except asyncio.CancelledError:
            if not call.is_disconnected:
                raise
            task.uncancel()
        except ClientDisconnect:
            pass  # it left before its body was complete
        except Exception as error:
            refusal = refusal_of(error, request["request_id"])
            if not call.status:
                await error_response(refusal)(scope, receive, edge_send)
        finally:
            if call.watcher is not None:
                call.watcher.cancel()
            route = scope.get("route")
            duration_s = time.monotonic() - call.started_s
            # 499, as nginx has it: the client left before there was an answer.
            self._state.metrics.http(getattr(route, "path", "none"), scope["method"], call.status or 499, duration_s)


async def _watch(receive: Receive, call: _Call) -> None:
    """Cancels a request when its client leaves before the response is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not call.is_complete:
        call.is_disconnected = True
        call.task.cancel()


def _authorization(scope: Scope) -> bytes | None:
    value = Headers(scope=scope).get("authorization")
    return None if value is None else value.encode("latin-1")
