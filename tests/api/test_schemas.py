"""Bodies: every leaf bounded, every form parsed, every refusal a sentence that names the field."""

from typing import Any

import pytest

from octavo.server.api.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from octavo.server.errors import RequestError

CHAT = '"messages": [{"role": "user", "content": "a"}]'


def unbounded(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> list[str]:
    """Paths of leaves of a JSON schema that some value without limit would pass."""
    if "$ref" in schema:
        return unbounded(definitions[schema["$ref"].rpartition("/")[2]], definitions, path)
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return [leaf for part in schema[word] for leaf in unbounded(part, definitions, path)]
    if "enum" in schema or "const" in schema or schema.get("type") in ("null", "boolean"):
        return []
    kind = schema.get("type")
    if kind in ("integer", "number"):
        is_bounded = bool(
            {"minimum", "exclusiveMinimum"} & set(schema) and {"maximum", "exclusiveMaximum"} & set(schema)
        )
        return [] if is_bounded else [path]
    if kind == "string":
        return [] if "maxLength" in schema else [path]
    if kind == "array":
        inner = unbounded(schema["items"], definitions, path + "[]") if schema["maxItems"] else []
        return inner if "maxItems" in schema else [path]
    if kind == "object" and schema.get("additionalProperties") is False:
        return [
            leaf
            for name, part in schema["properties"].items()
            for leaf in unbounded(part, definitions, f"{path}.{name}")
        ]
    if kind == "object" and "maxProperties" in schema:
        values = schema.get("additionalProperties") or next(iter(schema["patternProperties"].values()))
        return unbounded(values, definitions, path + "{}")
    return [path]


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, TokenizeBody, DetokenizeBody])
def test_every_leaf_is_bounded(body: type[CompletionBody]) -> None:
    schema = body.model_json_schema()
    assert unbounded(schema, schema.get("$defs", {}), body.__name__) == []


def test_the_walk_finds_unbounded_leaves() -> None:
    leaves = {"a": {"type": "integer", "minimum": 0}, "b": {"type": "string"}, "c": {"type": "object"}, "d": {}}
    schema = {"type": "object", "additionalProperties": False, "properties": leaves}
    assert unbounded(schema, {}, "x") == ["x.a", "x.b", "x.c", "x.d"]


@pytest.mark.parametrize(
    "prompt", ['"text"', '""', '["a", "b"]', "[1, 2]", "[[1], [2, 3]]", '["a"]', "[0]"], ids=lambda p: p
)
def test_prompt_forms(prompt: str) -> None:
    parse(CompletionBody, f'{{"prompt": {prompt}}}'.encode())


def test_null_means_default_and_ints_may_be_floats() -> None:
    body = parse(
        CompletionBody,
        b'{"prompt": "a", "temperature": null, "n": null, "stop": null, "logit_bias": null, "top_p": 1}',
    )
    assert (body.temperature, body.n, body.stop_strings, body.logit_bias, body.top_p) == (1.0, 1, (), {}, 1.0)


ACCEPTED_WITHOUT_EFFECT = (
    '"user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "flex", "safety_identifier": "s", '
    '"prompt_cache_key": "k", "response_format": {"type": "text"}, "best_of": 1, "priority": 0, '
    '"use_beam_search": false, "length_penalty": 1.0, "session_id": "x", "structured_outputs": null'
)


def test_fields_without_effect_are_accepted() -> None:
    parse(CompletionBody, f'{{"prompt": "a", {ACCEPTED_WITHOUT_EFFECT}}}'.encode())
    extra = '"tools": [], "tool_choice": "none", "parallel_tool_calls": true, "modalities": ["text"], "audio": null'
    parse(ChatBody, f"{{{CHAT}, {extra}, {ACCEPTED_WITHOUT_EFFECT}}}".encode())


# body of a completion beside its prompt -> the message, or its beginning
REFUSED = [
    ('"temperature": NaN', "temperature must be finite."),
    ('"temperature": 1e400', "temperature must be finite."),
    ('"temperature": Infinity', "temperature must be finite."),
    ('"temperature": 2.5', "temperature must be at most 2.0, got 2.5."),
    ('"temperature": -1', "temperature must be at least 0.0, got -1."),
    ('"temperature": "1"', "temperature must be a number."),
    ('"temperature": true', "temperature must be a number."),
    ('"top_p": 0', "top_p must be greater than 0.0, got 0."),
    ('"top_k": -2', "top_k must be at least -1, got -2."),
    ('"min_p": 1.1', "min_p must be at most 1.0, got 1.1."),
    ('"presence_penalty": -3', "presence_penalty must be at least -2.0, got -3."),
    ('"frequency_penalty": 3', "frequency_penalty must be at most 2.0, got 3."),
    ('"repetition_penalty": 0', "repetition_penalty must be at least 0.01, got 0."),
    ('"max_tokens": true', "max_tokens must be an integer."),
    ('"max_tokens": "7"', "max_tokens must be an integer."),
    ('"max_tokens": 1e3', "max_tokens must be an integer."),
    ('"max_tokens": -1', "max_tokens must be at least 0, got -1."),
    ('"max_tokens": 10000000000000000000000', "max_tokens must be at most 2147483647."),
    (f'"max_tokens": {"9" * 5000}', "The body is not valid JSON."),
    ('"n": 17', "n must be at most 16, got 17."),
    ('"n": 0', "n must be at least 1, got 0."),
    ('"seed": 18446744073709551616', "seed must be at most 18446744073709551615."),
    ('"logprobs": 1001', "logprobs must be at most 100, got 1001."),
    ('"logprobs": true', "logprobs must be an integer."),
    ('"prompt_logprobs": -1', "prompt_logprobs must be at least 0, got -1."),
    ('"stream": 1', "stream must be true or false."),
    ('"stop": ""', "stop must be a text of 1 to 256 characters"),
    ('"stop": ["a", ""]', "stop must be a text of 1 to 256 characters"),
    (f'"stop": {["a"] * 17}'.replace("'", '"'), "stop must be a text of 1 to 256 characters"),
    (f'"stop": "{"a" * 257}"', "stop must be a text of 1 to 256 characters"),
    ('"stop_token_ids": [-1]', "stop_token_ids[0] must be at least 0, got -1."),
    ('"logit_bias": {"1": 101}', "logit_bias.1 must be at most 100.0, got 101."),
    ('"logit_bias": {"one": 1}', "logit_bias.one must match"),
    ('"allowed_token_ids": []', "allowed_token_ids must have at least 1 entries."),
    ('"bad_words": [""]', "bad_words[0] must have at least 1 characters."),
    ('"request_id": "a b"', "request_id must match"),
    ('"request_id": "a\\n"', "request_id must match"),
    ('"cache_salt": ""', "cache_salt must have at least 1 characters."),
    ('"truncate_prompt_tokens": -2', "truncate_prompt_tokens must be at least -1, got -2."),
    ('"stream_options": {"include": true}', "stream_options.include is not a known field."),
    ('"tempreature": 1', "tempreature is not a known field."),
    ('"\\u00e9<b>": 1', "(a name that is not plain) is not a known field."),
    ('"suffix": "x"', "suffix is not supported yet."),
    ('"best_of": 17', "best_of must be at most 16, got 17."),
    ('"use_beam_search": true', "use_beam_search is not supported yet."),
    ('"structured_outputs": {"json": {}}', "structured_outputs is not supported yet."),
    ('"guided_regex": "(a+)+"', "guided_regex is not supported yet."),
    ('"response_format": {"type": "json_object"}', "response_format is not supported yet."),
    ('"priority": 1', "priority is not supported yet."),
    ('"user": "\\ud800"', "The body is not valid JSON."),
    ('"metadata": ' + "[" * 100_000, "The body is not valid JSON."),
    ('"echo": "yes"', "echo must be true or false."),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[fields[:40] for fields, _ in REFUSED])
def test_refused_completion(fields: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(CompletionBody, f'{{"prompt": "a", {fields}}}'.encode())
    assert caught.value.message.startswith(message)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"a"', None),
        (b"\xff", None),
        (b"{}", "prompt"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": [[]]}', "prompt"),
        (b'{"prompt": ["a", 1]}', "prompt"),
        (b'{"prompt": [1, "a"]}', "prompt"),
        (b'{"prompt": [1.0]}', "prompt"),
        (b'{"prompt": null}', "prompt"),
        (b'{"prompt": {"a": 1}}', "prompt"),
        (b'{"prompt": "a", "n": 0, "n": 99}', "n"),
    ],
)
def test_refused_bodies(raw: bytes, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse(CompletionBody, raw)
    assert caught.value.param == param


def test_the_last_of_duplicate_keys_counts() -> None:
    assert parse(CompletionBody, b'{"prompt": "a", "n": 99, "n": 2}').n == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (CHAT + ', "tools": [{"type": "function"}]', "tools is not supported yet."),
        (CHAT + ', "tool_choice": "auto"', "tool_choice is not supported yet."),
        (CHAT + ', "modalities": ["audio"]', "modalities is not supported yet."),
        (CHAT + ', "audio": {}', "audio is not supported yet."),
        (CHAT + ', "chat_template": "{{ x }}"', "chat_template is not supported yet."),
        (CHAT + ', "documents": [{}]', "documents is not supported yet."),
        (CHAT + ', "reasoning_effort": "high"', "reasoning_effort is not supported yet."),
        (CHAT + ', "echo": true', "echo is not supported yet."),
        (CHAT + ', "chat_template_kwargs": {"tokenize": true}', "chat_template_kwargs.tokenize is not a known field."),
        (CHAT + ', "logprobs": 1', "logprobs must be true or false."),
        (CHAT + ', "prompt": "a"', "prompt is not a known field."),
        ('"messages": []', "messages must have at least 1 entries."),
        ('"messages": [{"role": "user"}]', "messages[0].content is required."),
        ('"messages": [{"role": "robot", "content": "a"}]', "messages[0].role must be 'system', "),
        ('"messages": [{"role": "user", "content": null}]', "messages[0].content must be a text or a list"),
        ('"messages": [{"role": "user", "content": []}]', "messages[0].content must be a text or a list"),
        (
            '"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]',
            "messages[0].content must be a text or a list of parts of type 'text'.",
        ),
        (
            '"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]',
            "messages[0].tool_calls is not supported yet.",
        ),
    ],
)
def test_refused_chat(fields: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(ChatBody, f"{{{fields}}}".encode())
    assert caught.value.message.startswith(message)


def test_content_parts_are_joined() -> None:
    content = '[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]'
    body = parse(ChatBody, f'{{"messages": [{{"role": "user", "content": {content}, "name": "N"}}]}}'.encode())
    assert body.messages[0].for_template() == {"role": "user", "content": "a\nb", "name": "N"}
