"""Errors as OpenAI's clients read them: one nested object with four keys, whatever went wrong."""

import logging
from typing import Any

from starlette.responses import Response

from octavo.server.api.sse import encode_json
from octavo.server.errors import EngineError, RequestError

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
RETRY_AFTER_S = 5  # of a server that starts, drains or has lost its engine


def unavailable(message: str) -> RequestError:
    """A refusal for as long as the server is not ready."""
    return RequestError(message, code="unavailable", status=503, retry_after_s=RETRY_AFTER_S)


def refusal_of(error: Exception, request_id: str) -> RequestError:
    """What the client is told about `error`. What we did not foresee goes to the log; the client gets the id alone."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineError):
        return unavailable("The engine failed while the request ran; try again later.")
    logger.error("request %s failed", request_id, exc_info=error)
    return RequestError(f"Internal error; the server's log has it under request {request_id}.", status=500)


def error_body(error: RequestError) -> dict[str, Any]:
    """The JSON object of an error: {"error": {message, type, param, code}}."""
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, default),
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: RequestError) -> Response:
    """The error as a response."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(encode_json(error_body(error)), error.status, headers, "application/json")
