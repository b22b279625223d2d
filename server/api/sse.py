"""Server-sent events: one framing for both routes."""

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
RECOVERING = b": recovering\n\n"  # a comment, which clients ignore
_encode = msgspec.json.Encoder().encode
# JSON may hold these as they are, but whoever cuts a stream as str.splitlines does (httpx's iter_lines) cuts at them.
_LINE_ENDS = tuple((end.encode(), b"\\u%04x" % ord(end)) for end in "\x85\u2028\u2029")


def encode_json(value: Any) -> bytes:
    """`value` as JSON in UTF-8, on one line by everybody's measure."""
    data = _encode(value)
    for end, escaped in _LINE_ENDS:
        data = data.replace(end, escaped)
    return data


def event(payload: dict[str, Any]) -> bytes:
    """One event: `data: `, the payload as JSON, an empty line."""
    return b"data: " + encode_json(payload) + b"\n\n"
