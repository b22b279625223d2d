"""The edge of the server: keys, bodies, room, states, cancel. Whatever is sent, no 500 and nothing left behind."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import EOS, eventually, serving

from octavo.server.api import routes
from octavo.server.api.auth import load_keys
from octavo.server.api.schemas import ChatBody, CompletionBody
from octavo.server.config import ServerConfig
from octavo.server.errors import StartupError

JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, which must have exactly the four keys."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


async def test_every_route_but_the_probes_needs_a_key(tmp_path: Path) -> None:
    async with serving(tmp_path, api_key=("secret", "other")) as server:
        paths: set[tuple[str, str]] = set()

        def collect(router: Any) -> None:
            for route in router.routes:
                if hasattr(route, "path") and hasattr(route, "methods"):
                    paths.update((method, route.path) for method in route.methods)
                else:
                    collect(getattr(route, "original_router", route))

        collect(server.app)
        assert {("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/livez")} <= paths
        for method, path in [*paths, ("GET", "/no/such/path"), ("POST", "/livez/")]:
            path = re.sub("{.*}", "tiny", path)
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                response = await server.http.request(method, path, headers=headers)
                if path in ("/livez", "/readyz", "/health"):
                    assert response.status_code == 200
                else:
                    assert response.status_code == 401, path
                    assert error_of(response)["type"] == "authentication_error"
            for key in ("secret", "other"):
                response = await server.http.request(method, path, headers={"authorization": f"Bearer {key}"})
                assert response.status_code != 401


def test_keys_come_from_flag_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("three\n\n four \n")
    monkeypatch.setenv("OCTAVO_API_KEY", "two")
    assert load_keys(ServerConfig(api_key=("one",), api_key_file=str(file))) == ("one", "two", "three", "four")
    file.write_text("\n")
    for name in (str(file), str(tmp_path / "none")):
        with pytest.raises(StartupError):
            load_keys(ServerConfig(api_key_file=name))


async def test_paths_and_methods_that_do_not_exist(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for method, path, status in (
            ("GET", "/", 404),
            ("GET", "/docs", 404),
            ("GET", "/openapi.json", 404),
            ("GET", "/v1/completions", 405),
            ("DELETE", "/v1/models", 405),
            ("GET", "/v1/models/../etc/passwd", 404),
            ("POST", "/v1/requests/x/cancel", 404),
        ):
            response = await server.http.request(method, path)
            assert response.status_code == status, path
            error_of(response)
            assert response.headers["x-request-id"]


HOSTILE = [
    b"",
    b"null",
    b"[" * 100_000,
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
    b'{"prompt": "a", "logit_bias": {"99999999999": 1}}',
    b'{"prompt": "a", "' + b"x" * 100_000 + b'": 1}',
    b'{"prompt": "a", "\\u0000\\uffff": 1}',
    b'{"prompt": "' + b"a" * 1_000_000 + b'"}',
    b'{"prompt": [' + b"1," * 100_000 + b"1]}",
    b'{"prompt": [' + b"[1]," * 5000 + b"[1]]}",
    b'{"prompt": {"__class__": "x"}}',
    b'{"model": "../../etc/passwd", "prompt": "a"}',
    b'{"prompt": "a", "request_id": "../x"}',
    b"\xff\xfe",
    b'{"prompt": "a"} {"prompt": "b"}',
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("raw", HOSTILE, ids=lambda raw: str(raw[:40]))
async def test_hostile_bodies_are_refused(tmp_path: Path, path: str, raw: bytes) -> None:
    async with serving(tmp_path) as server:
        response = await server.http.post(path, content=raw, headers=JSON)
        assert response.status_code in (400, 404)
        message = error_of(response)["message"]
        assert len(message) < 500
        assert message.isprintable()
        assert "passwd" not in message
        assert server.engine.requests == []


async def test_content_type_must_be_json(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            response = await server.http.post(
                "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind}
            )
            assert response.status_code == 415
        response = await server.http.post(
            "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "Application/JSON; charset=utf-8"}
        )
        assert response.status_code == 200


async def test_a_body_over_the_cap_is_read_no_further(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        num_sent = 0

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal num_sent
            while True:
                num_sent += 1 << 16
                yield b" " * (1 << 16)

        response = await server.http.post("/v1/completions", content=chunks(), headers=JSON)
        assert response.status_code == 413
        error_of(response)
        assert num_sent <= server.state.admission.max_body_bytes + (1 << 17)


async def test_a_body_that_says_it_is_over_the_cap_is_not_read(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        limit = server.state.admission.max_body_bytes

        async def chunks() -> AsyncIterator[bytes]:
            yield pytest.fail("the body was read")

        headers = {**JSON, "content-length": str(limit + 1)}
        response = await server.http.post("/v1/completions", content=chunks(), headers=headers)
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
        body = b'{"prompt": "a"}'
        response = await server.http.post("/v1/completions", content=body.ljust(limit), headers=JSON)
        assert response.status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "BODY_TIMEOUT_S", 0.05)
    async with serving(tmp_path) as server:

        async def chunks() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(60)

        response = await server.http.post("/v1/completions", content=chunks(), headers=JSON)
        assert response.status_code == 408
        error_of(response)


async def test_health_says_that_devices_are_lost(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.engine.degraded = "1 of 2 ranks: device 1 is gone"
        health = await server.http.get("/health")
        assert (health.status_code, (await server.http.get("/readyz")).status_code) == (200, 200)
        reason = server.engine.degraded
        assert health.json() == {"status": "ok", "degraded": True, "ranks": 1, "reason": reason}


async def test_a_full_server_refuses_at_once_and_recovers(tmp_path: Path) -> None:
    async with serving(tmp_path, max_num_seqs=2, max_num_queued_reqs=1) as server:
        server.engine.go.clear()
        two = asyncio.create_task(server.ok("/v1/completions", prompt="a", n=2))
        one = asyncio.create_task(server.ok("/v1/completions", prompt="a"))
        await eventually(lambda: server.engine.num_running == 2)
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            # Refused before the body is looked at.
            response = await server.http.post(path, content=b"not JSON", headers=JSON)
            assert response.status_code == 429
            assert error_of(response)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) > 0
        server.engine.go.set()
        await asyncio.gather(one, two)
        await server.ok("/v1/completions", prompt="a")


async def test_n_counts_against_the_room(tmp_path: Path) -> None:
    async with serving(tmp_path, max_num_seqs=3, max_num_queued_reqs=0) as server:
        server.engine.go.clear()
        two = asyncio.create_task(server.ok("/v1/completions", prompt="a", n=2))
        await eventually(lambda: server.engine.num_running == 1)
        response = await server.post("/v1/completions", {"prompt": "a", "n": 2})
        assert response.status_code == 429
        server.engine.go.set()
        await two


async def test_the_token_budget(tmp_path: Path) -> None:
    async with serving(tmp_path, max_num_queued_tokens=100) as server:
        server.engine.go.clear()
        first = asyncio.create_task(server.ok("/v1/completions", prompt=[40] * 60))
        await eventually(lambda: server.engine.num_running == 1)
        assert server.state.admission.num_tokens == 60
        assert (await server.post("/v1/completions", {"prompt": [40] * 60})).status_code == 429
        server.engine.go.set()
        await first
        await server.ok("/v1/completions", prompt=[40] * 60)


async def test_request_ids(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.engine.go.clear()
        first = asyncio.create_task(server.post("/v1/completions", {"prompt": "a", "request_id": "mine"}))
        await eventually(lambda: server.engine.num_running == 1)
        second = await server.post("/v1/completions", {"prompt": "a", "request_id": "mine"})
        assert (second.status_code, error_of(second)["param"]) == (400, "request_id")
        server.engine.go.set()
        response = await first
        assert response.json()["id"] == response.headers["x-request-id"] == "mine"
        again = await server.ok("/v1/completions", prompt="a", request_id="mine")
        assert again["id"] == "mine"


async def test_cancel(tmp_path: Path) -> None:
    async with serving(tmp_path, "abcdef") as server:
        server.engine.go.clear()
        server.engine.free_tokens = 2
        body = {"prompt": ["a", "b"], "n": 2, "request_id": "mine"}
        running = asyncio.create_task(server.ok("/v1/completions", **body))
        await eventually(lambda: server.engine.num_running == 2)
        response = await server.http.post("/v1/requests/mine/cancel")
        assert response.json() == {"id": "mine", "cancelled": True}
        choices = (await running)["choices"]
        assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [("ab", "abort")] * 4
        assert (await server.http.post("/v1/requests/mine/cancel")).status_code == 404


async def test_request_ids_belong_to_a_key(tmp_path: Path) -> None:
    async with serving(tmp_path, "abcdef", api_key=("one", "two")) as server:
        server.engine.go.clear()
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        body = {"prompt": "a", "request_id": "mine"}
        first = asyncio.create_task(server.http.post("/v1/completions", json=body, headers=one))
        await eventually(lambda: server.engine.num_running == 1)
        assert (await server.http.post("/v1/requests/mine/cancel", headers=two)).status_code == 404
        second = asyncio.create_task(server.http.post("/v1/completions", json=body, headers=two))
        await eventually(lambda: server.engine.num_running == 2)
        assert (await server.http.post("/v1/requests/mine/cancel", headers=two)).status_code == 200
        assert (await second).json()["choices"][0]["finish_reason"] == "abort"
        assert server.engine.num_running == 1
        server.engine.go.set()
        response = (await first).json()
        assert (response["id"], response["choices"][0]["finish_reason"]) == ("mine", "stop")


async def test_our_own_failures_tell_nothing_but_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as server:

        def fail(*_: object, **__: object) -> list[int]:
            raise RuntimeError("/secret/path at 0xdeadbeef")

        monkeypatch.setattr(server.tokenizer, "encode", fail)
        response = await server.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 500
        message = error_of(response)["message"]
        assert response.headers["x-request-id"] in message
        assert "secret" not in message


@pytest.mark.parametrize(
    ("state", "draining", "readyz", "health", "word"),
    [
        ("ok", False, 200, 200, "ok"),
        ("starting", False, 503, 503, "starting"),
        ("recovering", False, 503, 200, "recovering"),
        ("recovering", True, 503, 200, "draining"),
        ("dead", False, 503, 503, "dead"),
        ("ok", True, 503, 200, "draining"),
        ("dead", True, 503, 503, "dead"),
    ],
)
async def test_states(tmp_path: Path, state: Any, draining: bool, readyz: int, health: int, word: str) -> None:
    async with serving(tmp_path) as server:
        server.engine.state, server.state.draining = state, draining
        assert (await server.http.get("/livez")).text == "ok"
        response = await server.http.get("/readyz")
        assert (response.status_code, response.text) == (readyz, word)
        response = await server.http.get("/health")
        assert (response.status_code, response.json()) == (health, {"status": word})
        assert (await server.http.get("/metrics")).status_code == 200
        for method, path in (("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/v1/models")):
            response = await server.http.request(method, path, content=b'{"prompt": "a"}', headers=JSON)
            is_taken = word in ("ok", "recovering")
            assert response.status_code == (200 if is_taken else 503)
            if not is_taken:
                assert int(response.headers["retry-after"]) > 0


async def test_models(tmp_path: Path) -> None:
    async with serving(tmp_path, served_model_name="org/name") as server:
        listed = (await server.http.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [("org/name", 200)]
        assert (await server.http.get("/v1/models/org/name")).json() == listed["data"][0]
        for response in (
            await server.http.get("/v1/models/tiny"),
            await server.post("/v1/completions", {"prompt": "a", "model": "tiny"}),
        ):
            assert response.status_code == 404
            assert error_of(response) | {"message": ""} == {
                "message": "",
                "type": "not_found_error",
                "param": "model",
                "code": "model_not_found",
            }


async def test_tokenize_agrees_with_generation(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        messages = [{"role": "user", "content": "Grüße <|end|>"}]
        for path, prompt in (
            ("/v1/completions", {"prompt": "Grüße <|end|>"}),
            ("/v1/chat/completions", {"messages": messages}),
        ):
            answer = await server.ok("/tokenize", **prompt, return_token_strs=True)
            await server.ok(path, **prompt, max_tokens=1)
            assert answer["tokens"] == server.engine.requests[-1].prompt_token_ids
            assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
            assert answer["max_model_len"] == 200
        back = await server.ok("/detokenize", tokens=[*server.tokenizer.encode("Grüße"), EOS])
        assert back == {"prompt": "Grüße<|end|>"}
        for body in ({}, {"prompt": "a", "messages": messages}):
            assert (await server.post("/tokenize", body)).status_code == 400
        assert (await server.post("/detokenize", {"tokens": [100_000]})).status_code == 400
        assert (await server.http.get("/tokenizer_info")).json()["vocab_size"] == 258
        assert set((await server.http.get("/version")).json()) == {"version"}


async def test_fields_that_tokenize_would_ignore_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        messages = [{"role": "user", "content": "a"}]
        for body, field in (
            ({"messages": messages, "add_special_tokens": True}, "add_special_tokens"),
            ({"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
            ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ):
            response = await server.post("/tokenize", body)
            assert (response.status_code, error_of(response)["param"]) == (400, field)
            assert field in error_of(response)["message"]
        await server.ok("/tokenize", prompt="a", add_special_tokens=False)
        await server.ok("/tokenize", messages=messages, add_generation_prompt=False)


async def test_answers_are_json_without_nan(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        body = {"prompt": "ab", "logprobs": 3, "echo": True, "prompt_logprobs": 3}
        response = await server.post("/v1/completions", body)

        def refuse(word: str) -> None:
            raise AssertionError(word)

        json.loads(response.text, parse_constant=refuse)
        assert "null" not in json.dumps(response.json()["choices"][0]["logprobs"]["token_logprobs"][1:])


NASTY = [
    *("null", "true", "false", "0", "-1", "1", "2", "17", "0.5", "-0.0", "1e308", "1e-308", "9223372036854775808"),
    *('""', '"a"', '" "', '"\\u0000"', '"<|end|>"', '"🌍"', "[]", "[0]", "[257]", "[258]", "[-1]", '["a"]', '[""]'),
    *("[[]]", "[[0]]", "[null]", "{}", '{"0": 1}', '{"a": "b"}', '{"type": "text"}', '{"include_usage": true}'),
]


@pytest.mark.parametrize("body_type", [CompletionBody, ChatBody])
async def test_no_value_of_any_field_makes_a_500(
    tmp_path: Path, body_type: type[CompletionBody] | type[ChatBody]
) -> None:
    is_chat = body_type is ChatBody
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    base = '"messages": [{"role": "user", "content": "a"}]' if is_chat else '"prompt": "ab"'
    async with serving(tmp_path) as server:
        num_accepted = 0
        for field in body_type.model_fields:
            for value in NASTY:
                raw = f'{{"max_tokens": 2, {base}, "{field}": {value}}}'.encode()
                response = await server.http.post(path, content=raw, headers=JSON)
                assert response.status_code in (200, 400, 404), raw
                if response.status_code != 200:
                    assert field in error_of(response)["message"] or response.status_code == 404
                num_accepted += response.status_code == 200
        assert num_accepted > 100
