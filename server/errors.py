"""Errors that reach a person: a client's (`RequestError`), an operator's (`StartupError`), our own (`EngineError`)."""


class OctavoError(Exception):
    """Base of all errors whose text is meant to be read by a person."""


class RequestError(OctavoError):
    """The client's fault, or a refusal: becomes an OpenAI error body with an HTTP status.

    `message` comes from our own closed set of sentences: it names field, limit and (finite) value, never raw input.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
        self.retry_after_s = retry_after_s


class StartupError(OctavoError):
    """Why the server cannot start, in one line that says what to do. The command exits with status 1, no traceback."""

    rank = 0  # of an engine's ranks, the one that cannot


class DeviceError(StartupError):
    """A rank cannot start because its device is not there."""


class EngineError(OctavoError):
    """The engine failed while a request ran: the stream ends with an explicit error, never silently."""
