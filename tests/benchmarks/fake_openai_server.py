"""A stand-in for an OpenAI server with delays that are known: `python fake_openai_server.py PORT`, or as a fixture.

One word is one token. The first `num_failures` requests get a 500; a `user` of "break" gets streams that end midway,
"error" an error event, "short" one token too few.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer(ThreadingHTTPServer):
    """Listens on 127.0.0.1; `bodies` keeps what was asked, in order of arrival."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        port: int = 0,
        *,
        first_s: float = 0.0,
        gap_s: float = 0.0,
        routes: bool = True,
        done: bool = True,
        num_failures: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.first_s, self.gap_s, self.routes, self.done = first_s, gap_s, routes, done
        self.num_failures = num_failures
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.in_flight = self.peak = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._json({"data": [{"id": "fake-model"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and self.server.routes:
            # A special token at the front, as many models have one.
            words = [int.from_bytes(word.encode(), "big") for word in body["prompt"].split()]
            self._json({"tokens": [1] * body["add_special_tokens"] + words})
        elif self.path == "/detokenize" and self.server.routes:
            texts = [token_id.to_bytes(16, "big").lstrip(b"\0").decode() for token_id in body["tokens"]]
            self._json({"prompt": " ".join(texts)})
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            with self.server.lock:
                self.server.bodies.append(body)
                self.server.keys.add(self.headers.get("Authorization"))
                self.server.in_flight += 1
                self.server.peak = max(self.server.peak, self.server.in_flight)
                fails = len(self.server.bodies) <= self.server.num_failures
            try:
                if fails:
                    self._json({"error": {"message": "out of luck"}}, status=500)
                else:
                    self._generate(body)
            finally:
                with self.server.lock:
                    self.server.in_flight -= 1
        else:
            self._json({"error": {"message": "no such route"}}, status=404)

    def _generate(self, body: dict[str, Any]) -> None:
        chat = self.path.endswith("/chat/completions")
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        mark = body.get("user")
        self.send_response(200)
        self.end_headers()
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        time.sleep(self.server.first_s)
        num_tokens = body["max_tokens"] - (mark == "short")
        for index in range(num_tokens):
            time.sleep(self.server.gap_s if index else 0)
            reason = "length" if index == num_tokens - 1 else None
            part = {"delta": {"content": " x"}} if chat else {"text": " x"}
            self._event({"choices": [{**part, "finish_reason": reason}]})
            if mark == "error":
                self._event({"error": {"message": "engine died", "type": "server_error", "param": None, "code": None}})
            if mark in ("break", "error"):
                return
        num_prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split()) + (not chat)
        self._event({"choices": [], "usage": {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens}})
        if self.server.done:
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    FakeServer(int(sys.argv[1])).serve_forever()
