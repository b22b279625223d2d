"""`octavo chat`: a conversation in the terminal with any server that speaks the OpenAI API.

Knows the wire only, nothing of the engine. On a terminal, Ctrl-C stops an answer (the server then stops computing it)
and Ctrl-D or /quit leaves; from a pipe, each line is one turn.
"""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from octavo.server.errors import OctavoError, StartupError

# What a model writes must not steer the terminal: control characters but newline and tab are dropped.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_TIMEOUT = httpx.Timeout(10, read=600)  # seconds; a long prompt on a busy CPU server keeps silent for minutes


class _AnswerError(OctavoError):
    """The server refused a turn or broke it off; the conversation can go on."""


def chat(
    base_url: str,
    *,
    model: str | None,
    api_key: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
) -> int:
    """Holds a conversation over stdin and stdout; returns 1 if a turn failed, else 0.

    `base_url` may end in /v1 or not; `model` None takes the first that the server lists. Raises StartupError when the
    server cannot be reached or lists no model.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is not UTF-8 is still said, as well as it can be
    with contextlib.suppress(ImportError):  # optional in CPython; with it `input` edits lines and keeps a history
        import readline  # noqa: F401
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
    options = {"temperature": temperature, "max_tokens": max_tokens}
    body: dict[str, Any] = {"stream": True} | {key: value for key, value in options.items() if value is not None}
    messages = [{"role": "system", "content": system}] if system else []
    on_terminal = sys.stdin.isatty()
    failed = False
    with _client(url, headers) as client:
        body["model"] = model or _first_model(client, url)
        if on_terminal:
            print(f"{body['model']} at {url}. Ctrl-C stops an answer, Ctrl-D or /quit leaves.")
        for text in _turns("> " if on_terminal else ""):
            messages.append({"role": "user", "content": text})
            answer = ""
            try:
                for piece in _answer(client, body | {"messages": messages}):
                    answer += piece
                    print(piece.translate(_CONTROL), end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            except (_AnswerError, httpx.HTTPError) as error:
                failed = True
                print(f"octavo: error: {error or type(error).__name__}", file=sys.stderr)
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": answer})
    return int(failed)


def _client(url: str, headers: dict[str, str]) -> httpx.Client:
    try:
        return httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT)
    except (httpx.InvalidURL, UnicodeEncodeError) as error:
        raise StartupError(f"--base-url or --api-key cannot be used: {error}") from None


def _turns(prompt: str) -> Iterator[str]:
    """What the user says, until the end of input or /quit. Ctrl-C while typing drops the line."""
    while True:
        try:
            text = input(prompt).strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        if text == "/quit":
            return
        if text:
            yield text


def _first_model(client: httpx.Client, url: str) -> str:
    try:
        response = client.get("/models")
        if response.status_code != 200:
            raise StartupError(f"{url}/models: {_message(response)}")
        name: str = response.json()["data"][0]["id"]
        return name
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StartupError(f"cannot reach {url} ({error}); is `octavo serve` running there?") from None
    except (ValueError, LookupError, TypeError):
        raise StartupError(f"{url}/models does not list a model; is it an OpenAI API?") from None


def _answer(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """Pieces of one answer's text. Raises _AnswerError or httpx.HTTPError; leaving it early ends the request."""
    with client.stream("POST", "/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise _AnswerError(_message(response))
        for line in _lines(response):
            data = line.removeprefix(b"data:").strip()
            if data == line or not data:  # a blank line or a comment
                continue
            if data == b"[DONE]":
                return
            yield _text(data)
    raise _AnswerError("the server broke off the answer")


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Complete lines. Cut at newlines alone: iter_lines also cuts at U+2028, which another server's JSON may hold."""
    rest = b""
    for data in response.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _text(data: bytes) -> str:
    """The text that one chunk adds to the answer. Raises _AnswerError for an error event."""
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise _AnswerError(chunk["error"]["message"])
        return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _AnswerError("the server's answer is not a stream of the OpenAI API") from None


def _message(response: httpx.Response) -> str:
    """The error's text from an OpenAI error body, or the bare status."""
    try:
        message: str = response.json()["error"]["message"]
        return message
    except (ValueError, LookupError, TypeError):
        return f"HTTP {response.status_code}"
