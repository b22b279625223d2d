"""Server-sent events: one framing for both routes."""

from typing import Any

import msgspec

encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def event(payload: dict[str, Any]) -> bytes:
    """One event: `data: `, the payload as JSON, an empty line."""
    return b"data: " + encode_json(payload) + b"\n\n"
