"""Both generation routes against the fake engine: parameters reach it, its tokens come back in OpenAI's format."""

import asyncio
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2  # what the openai package speaks HTTP with
import openai
import pytest
from api_fakes import EOS, MAX_MODEL_LEN, VOCAB_SIZE, eventually, logprobs_of, serving

from octavo.server.api.sse import DONE, event
from octavo.server.api.stream import BODY
from octavo.server.engine.request import SamplingParams

TEXT = "Grüße, Welt! 🌍 "
USER = [{"role": "user", "content": "Hi"}]


async def test_parameters_reach_the_engine(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await server.ok(
            "/v1/completions",
            **{"prompt": "Hi", "max_tokens": 20, "min_tokens": 3, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7},
            **{"min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5, "seed": -1},
            **{"logit_bias": {"9": -5, "3": 2}, "allowed_token_ids": [9, 3, 9], "stop_token_ids": [5], "logprobs": 2},
            **{"bad_words": ["ab"], "prompt_logprobs": 1, "request_id": "mine", "model": "tiny"},
        )
        (request,) = server.engine.requests
        encode = server.tokenizer.encode
        assert request.params == SamplingParams(
            max_tokens=20,
            min_tokens=3,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            min_p=0.1,
            presence_penalty=1.0,
            frequency_penalty=-1.0,
            repetition_penalty=1.5,
            seed=2**64 - 1,
            logit_bias=((3, 2.0), (9, -5.0)),
            allowed_token_ids=(3, 9),
            stop_token_ids=(5,),
            logprobs=2,
            bad_words=(tuple(encode("ab")), tuple(encode(" ab"))),
            prompt_logprobs=1,
            eos_token_ids=(EOS,),
        )
        assert (request.n, request.prompt_token_ids) == (2, encode("Hi"))
        assert request.request_id != "mine"  # the engine may still hold an earlier request of that name


async def test_defaults(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await server.ok("/v1/completions", prompt="Hi", top_k=-1, temperature=0.009, ignore_eos=True)
        await server.ok("/v1/chat/completions", messages=USER)
        completion, chat = server.engine.requests
        params = completion.params
        assert (params.max_tokens, params.top_k, params.temperature, params.eos_token_ids) == (16, 0, 0.0, ())
        assert chat.params.max_tokens == MAX_MODEL_LEN - len(chat.prompt_token_ids)
        assert completion.request_id != chat.request_id


async def test_a_model_may_know_fewer_tokens_than_its_tokenizer(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        word, after_space = server.tokenizer.encode("ab"), server.tokenizer.encode(" ab")
        server.engine.info = replace(server.engine.info, vocab_size=max(after_space))
        assert max(word) < max(after_space)
        await server.ok("/v1/completions", prompt=[1], bad_words=["ab"])
        assert server.engine.requests[0].params.bad_words == (tuple(word),)


async def test_logprobs_of_more_tokens_than_there_are(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.engine.info = replace(server.engine.info, vocab_size=3)
        for field in ("logprobs", "prompt_logprobs"):
            response = await server.post("/v1/completions", {"prompt": [1], field: 4})
            assert (response.status_code, response.json()["error"]["param"]) == (400, field)
            await server.ok("/v1/completions", **{"prompt": [1], field: 3})


async def test_max_completion_tokens_wins(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await server.ok("/v1/chat/completions", messages=USER, max_tokens=3, max_completion_tokens=5)
        assert server.engine.requests[0].params.max_tokens == 5


async def test_seeds(tmp_path: Path) -> None:
    async def seeds(**config: Any) -> list[int]:
        async with serving(tmp_path, **config) as server:
            for _ in range(2):
                await server.ok("/v1/completions", prompt=["a", "b"], max_tokens=1)
            return [request.params.seed for request in server.engine.requests]

    first, second, free = await seeds(seed=3), await seeds(seed=3), await seeds()
    assert first == second != await seeds(seed=4)
    assert len(set(first)) == len(set(free)) == 4


async def test_cache_scope_depends_on_salt_and_key(tmp_path: Path) -> None:
    async with serving(tmp_path, api_key=("one", "two")) as server:
        for key, salt in itertools.product(("one", "two"), (None, "a", "b")):
            body = {"prompt": "a", "max_tokens": 1, "cache_salt": salt}
            response = await server.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
            assert response.status_code == 200
        assert len({request.cache_salt for request in server.engine.requests}) == 6


async def test_prompts_are_prompt_major(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.engine.script = lambda request, index: [request.prompt_token_ids[0], 16 + index, EOS]
        answer = await server.ok("/v1/completions", prompt=[[40], [50, 51]], n=2, echo=False)
        token = server.tokenizer.token_text
        assert [choice["text"] for choice in answer["choices"]] == [
            token(first) + token(16 + k) for first in (40, 50) for k in range(2)
        ]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


@pytest.mark.parametrize("step_size", [1, 2, 7, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3},
        {"stop": "Welt"},
        {"stop": ["Welt!", "ß"], "include_stop_str_in_output": True},
        {"stop": "🌍", "n": 2},
        {"stop": "! 🌍 1 and more", "n": 2},
        {"max_tokens": 5},
        {"skip_special_tokens": False},
        {"skip_special_tokens": False, "include_stop_str_in_output": True},
        {"stop_token_ids": [72]},
        {"min_tokens": 12, "stop": "Welt"},
    ],
    ids=str,
)
async def test_a_stream_adds_up_to_the_whole(tmp_path: Path, step_size: int, options: dict[str, Any]) -> None:
    options = {"max_tokens": 60, "return_token_ids": True, **options}
    async with serving(tmp_path, TEXT, step_size=step_size) as server:
        for path, prompt in (
            ("/v1/completions", {"prompt": ["Hi", "Ho"], "logprobs": 2, "echo": True}),
            ("/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 2}),
        ):
            whole = await server.ok(path, **prompt, **options)
            chunks = await server.stream(path, **prompt, **options, stream_options={"include_usage": True})
            last = chunks.pop()
            assert last["choices"] == []
            assert last["usage"] == whole["usage"]
            assert all(chunk["usage"] is None for chunk in chunks)
            assert len({chunk["id"] for chunk in chunks}) == 1
            for choice in whole["choices"]:
                mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
                assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
                assert mine[-1]["finish_reason"] == choice["finish_reason"]
                assert mine[-1]["stop_reason"] == choice["stop_reason"]
                assert [i for c in mine for i in c.get("token_ids", [])] == choice["token_ids"]
                if path == "/v1/completions":
                    assert "".join(c["text"] for c in mine) == choice["text"]
                    for column, values in choice["logprobs"].items():
                        assert [value for c in mine for value in c["logprobs"][column]] == values
                else:
                    assert mine[0]["delta"] == {"role": "assistant", "content": ""}
                    assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
                    content = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
                    assert content == choice["logprobs"]["content"]


async def test_a_stream_is_cut_into_lines_alike_by_everybody(tmp_path: Path) -> None:
    text = "a\x85b\u2028\\\u2029 c\x0b\x1c\r\n d "
    async with serving(tmp_path, text) as server:
        answer = await server.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 60, "stream": True})
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert events.pop() == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == text + "0"


async def test_stop_strings_end_the_choice_and_its_bill(tmp_path: Path) -> None:
    async with serving(tmp_path, "Hello stop here ", step_size=3) as server:
        answer = await server.ok("/v1/completions", prompt="Hi", stop="stop", max_tokens=50, n=2, return_token_ids=True)
        for choice in answer["choices"]:
            assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hello ", "stop", "stop")
            assert len(choice["token_ids"]) == len("Hello stop")
        assert answer["usage"]["completion_tokens"] == 2 * len("Hello stop")
        request_id = server.engine.requests[0].request_id
        assert server.engine.aborted_choices == [(request_id, 0), (request_id, 1)]


async def test_reasons(tmp_path: Path) -> None:
    async with serving(tmp_path, "abc") as server:
        b = server.tokenizer.encode("b")[0]
        for options, expected in (
            ({}, ("abc0", "stop", None)),
            ({"max_tokens": 2}, ("ab", "length", None)),
            ({"stop_token_ids": [b]}, ("a", "stop", b)),
            ({"stop_token_ids": [b], "include_stop_str_in_output": True}, ("ab", "stop", b)),
            ({"skip_special_tokens": False}, ("abc0", "stop", None)),
            ({"ignore_eos": True, "skip_special_tokens": False}, ("abc0<|end|>", "length", None)),
        ):
            answer = await server.ok("/v1/completions", prompt="Hi", **options)
            (choice,) = answer["choices"]
            assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == expected


async def test_echo_and_logprobs(tmp_path: Path) -> None:
    async with serving(tmp_path, "xy") as server:
        answer = await server.ok("/v1/completions", prompt="Hü", echo=True, logprobs=3, max_tokens=2)
        (choice,) = answer["choices"]
        assert choice["text"] == "Hüxy"
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == ["H", "\ufffd", "\ufffd", "x", "y"]
        assert logprobs["token_logprobs"] == [None, -1.5, -1.5, -1.5, -1.5]
        assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
        assert logprobs["top_logprobs"][0] is None
        # Best first, minus infinity as a number.
        assert list(logprobs["top_logprobs"][3].items()) == [("y", -0.25), ("x", -1.5), ("z", -9999.0)]
        assert server.engine.requests[0].params.prompt_logprobs == 3


async def test_logprobs_zero_gives_the_chosen_token(tmp_path: Path) -> None:
    async with serving(tmp_path, "xy") as server:
        answer = await server.ok("/v1/completions", prompt="H", logprobs=0, max_tokens=1)
        assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"x": -1.5}]
        chat = await server.ok("/v1/chat/completions", messages=USER, logprobs=True, max_tokens=1)
        (entry,) = chat["choices"][0]["logprobs"]["content"]
        assert entry == {"token": "x", "logprob": -1.5, "bytes": [120], "top_logprobs": []}


async def test_scoring(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        prompts = [[40, 41, 42], [50, 51]]
        answer = await server.ok("/v1/completions", prompt=prompts, echo=True, logprobs=1, max_tokens=0)
        for choice, prompt in zip(answer["choices"], prompts, strict=True):
            assert choice["logprobs"]["token_logprobs"] == [None] + [-1.5] * (len(prompt) - 1)
            assert choice["text"] == server.tokenizer.decode(prompt)
            assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for path, prompt in (("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", {"messages": USER})):
            answer = await server.ok(path, **prompt, prompt_logprobs=1, max_tokens=1)
            first, second, *_ = answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"]
            assert first is None
            token_id = server.engine.requests[-1].prompt_token_ids[1]
            best = logprobs_of(token_id, 1).top[0][0]
            assert second[str(token_id)]["logprob"] == -1.5
            assert second[str(best)] == {
                "logprob": -0.25,
                "rank": 1,
                "decoded_token": server.tokenizer.token_text(best),
            }


async def test_token_ids_instead_of_text(tmp_path: Path) -> None:
    async with serving(tmp_path, "x") as server:
        options = {"return_tokens_as_token_ids": True, "return_token_ids": True, "max_tokens": 1}
        x = server.tokenizer.encode("x")[0]
        answer = await server.ok("/v1/completions", prompt=[40, 41], logprobs=0, **options)
        assert answer["choices"][0]["logprobs"]["tokens"] == [f"token_id:{x}"]
        assert (answer["choices"][0]["prompt_token_ids"], answer["choices"][0]["token_ids"]) == ([40, 41], [x])
        chat = await server.ok("/v1/chat/completions", messages=USER, logprobs=True, **options)
        assert chat["prompt_token_ids"] == server.engine.requests[-1].prompt_token_ids
        chunks = await server.stream("/v1/chat/completions", messages=USER, **options)
        assert [chunk.get("prompt_token_ids") for chunk in chunks] == [chat["prompt_token_ids"], None]


async def test_usage(tmp_path: Path) -> None:
    async with serving(tmp_path, "abc", enable_prompt_tokens_details=True) as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = await server.stream("/v1/completions", prompt="Hi", stream_options=options, ignore_eos=True)
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5]
        assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        alone = await server.stream("/v1/completions", prompt="Hi", stream_options={"continuous_usage_stats": True})
        assert all("usage" not in chunk for chunk in alone)


async def test_chat_prompts(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        messages = [*USER, {"role": "assistant", "content": [{"type": "text", "text": "Well <|end|>"}]}]
        await server.ok("/v1/chat/completions", messages=messages, max_tokens=1)
        ids = server.engine.requests[-1].prompt_token_ids
        assert ids.count(EOS) == 2  # the template's own, not the one in the text
        assert server.tokenizer.decode(ids, skip_special_tokens=False).endswith("<|end|><|end|>\n<|start|>assistant\n")
        await server.ok("/v1/chat/completions", messages=messages, max_tokens=1, continue_final_message=True)
        ids = server.engine.requests[-1].prompt_token_ids
        assert server.tokenizer.decode(ids, skip_special_tokens=False).endswith("Well <|end|>")
        await server.ok("/v1/chat/completions", messages=USER, max_tokens=1, add_generation_prompt=False)
        assert server.engine.requests[-1].prompt_token_ids[-2:] == [EOS, *server.tokenizer.encode("\n")]


async def test_truncation(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        ids = list(range(40, 60))
        for options, expected in (
            ({"truncate_prompt_tokens": 3}, ids[-3:]),
            ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, ids[:3]),
            ({"truncate_prompt_tokens": 100}, ids),
        ):
            await server.ok("/v1/completions", prompt=ids, max_tokens=1, **options)
            assert server.engine.requests[-1].prompt_token_ids == expected
        await server.ok("/v1/completions", prompt=[40] * 500, max_tokens=10, truncate_prompt_tokens=-1)
        assert len(server.engine.requests[-1].prompt_token_ids) == MAX_MODEL_LEN - 10


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": [40] * MAX_MODEL_LEN}, "prompt", f"{MAX_MODEL_LEN} tokens"),
        ({"prompt": "x" * 64 * (MAX_MODEL_LEN + 1)}, "prompt", "bytes of text"),
        ({"prompt": [40] * 190, "max_tokens": 11}, "max_tokens", "leave 10"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": [VOCAB_SIZE]}, "prompt", f"size {VOCAB_SIZE}"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": ["a", ""]}, "prompt", "no tokens"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens", "at most max_tokens 16, got 17"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "at most 20, got 21"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs", "at most 20, got 21"),
        ({"prompt": "a", "best_of": 2}, "best_of", "not supported yet"),
        ({"prompt": "a", "logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", "vocabulary"),
        ({"prompt": "a", "stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "vocabulary"),
        ({"prompt": "a", "allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids", "vocabulary"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "streamed"),
        ({"prompt": "a", "truncate_prompt_tokens": 500}, "truncate_prompt_tokens", "1 to max_model_len 200, got 500"),
        ({"prompt": "a", "n": 16, "max_tokens": 190, "seed": 1}, "max_tokens", "the limit is 3000"),
        ({"prompt": ["a"] * 40, "max_tokens": 1, "n": 16}, "n", "640 choices"),
        ({"prompt": [[40] * 199] * 16, "max_tokens": 1}, "prompt", "3184 prompt tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_refused_by_admission(tmp_path: Path, body: dict[str, Any], param: str, words: str) -> None:
    async with serving(tmp_path, max_num_queued_tokens=3000) as server:
        response = await server.post("/v1/completions", body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert words in error["message"]
        assert not server.engine.requests
        await server.ok("/v1/completions", prompt="still fine")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "prompt"),
        ({"messages": [{"role": "user", "content": "x" * 8000}] * 2}, "messages"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_refused_chats(tmp_path: Path, body: dict[str, Any], param: str) -> None:
    async with serving(tmp_path) as server:
        response = await server.post("/v1/chat/completions", {"messages": USER, **body})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_engine_failure_before_and_after_the_first_byte(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.engine.die_after = 0
        for stream in (False, True):
            response = await server.post("/v1/completions", {"prompt": "a", "stream": stream})
            assert response.status_code == 503
            assert response.json()["error"]["type"] == "server_error"
            assert int(response.headers["retry-after"]) > 0
        server.engine.die_after = 2
        response = await server.post("/v1/completions", {"prompt": "a", "stream": True})
        assert response.status_code == 200
        events = response.text.split("\n\n")
        assert '"error"' in events[-2]
        assert "[DONE]" not in response.text


async def test_values_that_are_not_finite_are_never_output(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        server.engine.fail_after = 1
        response = await server.post("/v1/completions", {"prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "not_finite")


async def test_what_gathers_while_a_reader_is_slow_goes_out_as_one_write(tmp_path: Path) -> None:
    async with serving(tmp_path, "abcdefghij" * 5) as server:
        body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 60}).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        may_go_on = asyncio.Event()
        writes: list[bytes] = []
        requests = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return requests.pop() if requests else await asyncio.sleep(60, {})

        async def send(message: Any) -> None:
            if message.get("body"):
                writes.append(message["body"])
                await may_go_on.wait()

        call = asyncio.create_task(server.app(scope, receive, send))
        await eventually(lambda: bool(writes) and server.engine.num_running == 0)
        may_go_on.set()
        await call
        events = [json.loads(event[6:]) for event in b"".join(writes).split(b"\n\n")[:-2]]
        assert "".join(event["choices"][0]["text"] for event in events) == "abcdefghij" * 5 + "0"
        assert len(writes) <= 3


@pytest.mark.parametrize("num_waits", [0, 1, 2, 3])
@pytest.mark.parametrize("dies", [False, True])
async def test_a_stream_without_a_token_that_waits_for_a_recovery(tmp_path: Path, num_waits: int, dies: bool) -> None:
    """It begins with a comment once that takes long; until then it may still end with a status."""
    async with serving(tmp_path, "abc") as server:
        server.engine.go.clear()
        server.engine.die_after = 0 if dies else None
        post = asyncio.create_task(server.post("/v1/completions", {"prompt": "a", "stream": True}))
        await eventually(lambda: server.engine.num_running == 1)
        for _ in range(num_waits):
            assert server.engine.on_wait is not None
            server.engine.on_wait()
            await asyncio.sleep(0.01)
        server.engine.go.set()
        response = await post
        comments = max(num_waits - 1, 0)
        assert response.text.startswith(": recovering\n\n" * comments)
        assert response.text.count(": recovering") == comments
        if not dies:
            assert response.text.endswith("data: [DONE]\n\n")
        elif comments:
            assert response.status_code == 200 and response.text.rpartition("\n\ndata: ")[2].startswith('{"error"')
        else:
            assert response.status_code == 503


@pytest.mark.parametrize("writable", ["always", "never", "at times"])
@pytest.mark.parametrize("n", [1, 3])
async def test_tokens_are_written_past_the_task_where_the_server_can(tmp_path: Path, writable: str, n: int) -> None:
    @dataclass
    class Body:
        num_asked: int = 0
        num_writes: int = 0

        @property
        def is_writable(self) -> bool:
            self.num_asked += 1
            return writable == "always" or (writable == "at times" and self.num_asked % 3 == 0)

        def write(self, data: bytes) -> None:
            self.num_writes += 1
            sent.append(data)

    async with serving(tmp_path, "abcdefghij" * 5) as server:
        fields = {"prompt": "a", "stream": True, "n": n, "max_tokens": 60, "stream_options": {"include_usage": True}}
        headers = [(b"content-type", b"application/json")]
        sent: list[bytes] = []
        body = Body()
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
        requests = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            return requests.pop() if requests else await asyncio.sleep(60, {})

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if writable == "at times" and len(sent) % 3 == 0:
                await asyncio.sleep(0)  # tokens come while the task sends

        await server.app(scope | {"headers": headers, "state": {BODY: body}}, receive, send)
        events = b"".join(sent).split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        *chunks, usage = [json.loads(event[6:]) for event in events[:-2]]
        assert usage["usage"]["completion_tokens"] == n * 52
        for index in range(n):
            mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            assert "".join(choice["text"] for choice in mine) == "abcdefghij" * 5 + str(index)
            assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert (body.num_writes > 10) == (writable != "never")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "options", [{}, {"n": 2}, {"stream_options": {"include_usage": True}}, {"stop": "zz"}], ids=str
)
async def test_chunks_of_text_alone_have_the_form_of_all_others(
    tmp_path: Path, path: str, options: dict[str, Any]
) -> None:
    prompt = {"messages": USER} if "chat" in path else {"prompt": "Hi", "echo": True}
    for text in ("plain", TEXT, '"?" \\ \n \0 {"text":"?"} </script>'):
        async with serving(tmp_path, text) as server:
            request = {**prompt, **options, "stream": True, "max_tokens": 60, "request_id": "mine"}
            plain = (await server.post(path, request)).text
            general = (await server.post(path, {**request, "return_token_ids": True})).text
            others = [json.loads(event[6:]) for event in general.split("\n\n")[:-2]]
            for chunk in others:
                chunk.pop("prompt_token_ids", None)
                for choice in chunk["choices"]:
                    choice.pop("token_ids", None)
                    choice.pop("prompt_token_ids", None)
            created = json.loads(plain.split("\n\n")[0][6:])["created"]
            expected = b"".join(event(chunk | {"created": created}) for chunk in others) + DONE
            assert plain.encode() == expected


async def test_the_openai_client(tmp_path: Path) -> None:
    async with serving(tmp_path, "Hello ", api_key=("key",)) as server:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=server.app))
        client = openai.AsyncOpenAI(api_key="key", base_url="http://test/v1", http_client=http, max_retries=0)
        chat = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], n=2)
        assert [choice.message.content for choice in chat.choices] == ["Hello 0", "Hello 1"]
        text = ""
        async for chunk in await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        ):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        assert (text, chunk.usage and chunk.usage.completion_tokens) == ("Hello 0", 8)
        completion = await client.completions.create(model="tiny", prompt="Hi", logprobs=1, echo=True)
        assert completion.choices[0].text == "HiHello 0"
        assert [model.id async for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="Hi")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="tiny", prompt="Hi", temperature=3)
        assert caught.value.param == "temperature"
        server.engine.die_after = 1
        with pytest.raises(openai.APIError):
            async for _ in await client.completions.create(model="tiny", prompt="Hi", stream=True):
                pass
        await client.close()
