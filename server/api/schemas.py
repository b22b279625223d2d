"""Request bodies as they come over the wire, and what is said about a body that is refused.

Every field that OpenAI or vLLM document for these routes is known here: with an effect, accepted without one (said
beside it), or refused as "not supported yet". Any other field is refused by name. Every leaf is bounded on both sides;
limits that depend on the model are admission's. Where a key comes twice, the last one counts.
"""

import re
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from octavo.server.errors import RequestError

MAX_TEXT_LEN = 1 << 26  # characters; far over any body cap, so that the schema is bounded by itself
MAX_LIST_LEN = 1 << 24  # token ids
MAX_PROMPTS = 4096
MAX_N = 16
MAX_INT = 2**31 - 1

Body = TypeVar("Body", bound=BaseModel)


def _null(default: Any) -> BeforeValidator:
    """An explicit null means the default: some clients send every field they know."""
    return BeforeValidator(lambda value: default if value is None else value)


Text = Annotated[str, Field(max_length=MAX_TEXT_LEN)]
Name = Annotated[str, Field(max_length=1024)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LIST_LEN, fail_fast=True)]
Off = Annotated[bool, _null(False)]
On = Annotated[bool, _null(True)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TopLogprobs = Annotated[int, Field(ge=0, le=100)]
NotYet: TypeAlias = (
    None  # the type of a field that is known, changes the output and is not implemented: only null passes
)


class Strict(BaseModel):
    """Base of all bodies: no coercion, no NaN, no unknown field."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: Off = False
    continuous_usage_stats: Off = False
    include_obfuscation: Off = False  # without effect: no padding is sent


class TextFormat(Strict):
    """The only `response_format` so far."""

    type: Literal["text"]


class TemplateKwargs(Strict):
    """Arguments for the chat template that are known to be harmless; any other is refused."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    preserve_thinking: bool | None = None
    clear_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    date_string: Annotated[str, Field(max_length=64)] | None = None


class Generation(Strict):
    """Fields that both generation routes know."""

    model: Name | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT), _null(0)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_N), _null(1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2), _null(1.0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), _null(1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT), _null(0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1), _null(0.0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2), _null(0.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2), _null(0.0)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10), _null(1.0)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256), _null([])] = []
    include_stop_str_in_output: Off = False
    ignore_eos: Off = False
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$", max_length=10)], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=1024),
        _null({}),
    ] = {}
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=1 << 18)] | None = None
    bad_words: Annotated[list[StopString], Field(max_length=256), _null([])] = []
    prompt_logprobs: TopLogprobs | None = None
    skip_special_tokens: On = True
    spaces_between_special_tokens: bool | None = None  # without effect: decoders put no spaces there
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    stream: Off = False
    stream_options: StreamOptions | None = None
    return_token_ids: Off = False
    return_tokens_as_token_ids: Off = False
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", max_length=64)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None

    # Known and without effect here.
    user: Name | None = None
    session_id: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None  # of beam search only
    return_token_offsets: bool | None = None  # of the render routes only

    # Known, not supported yet: only what asks for nothing passes.
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None  # must equal n
    response_format: TextFormat | None = None
    priority: Literal[0] | None = None
    use_beam_search: Literal[False] | None = None
    watermarking: Literal[False] | None = None
    routed_experts_prompt_start: Literal[0] | None = None
    structured_outputs: NotYet = None
    guided_json: NotYet = None
    guided_regex: NotYet = None
    guided_choice: NotYet = None
    guided_grammar: NotYet = None
    logprob_token_ids: NotYet = None
    logits_processors: NotYet = None
    repetition_detection: NotYet = None
    kv_transfer_params: NotYet = None
    ec_transfer_params: NotYet = None
    vllm_xargs: NotYet = None
    stream_interval: NotYet = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` in its one form."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Generation):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        Text
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
        Field(union_mode="left_to_right"),
    ]
    echo: Off = False
    logprobs: TopLogprobs | None = None
    add_special_tokens: On = True

    suffix: NotYet = None
    prompt_embeds: NotYet = None


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One message of a chat. Parts of text are joined with line breaks."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=4096, fail_fast=True)]
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_call_id: Annotated[str, Field(max_length=64)] | None = None
    refusal: Text | None = None  # without effect
    annotations: Annotated[list[None], Field(max_length=0)] | None = None  # without effect; our own answers have none
    tool_calls: Annotated[list[None], Field(max_length=0)] | None = None
    function_call: NotYet = None
    audio: NotYet = None
    reasoning: NotYet = None
    reasoning_content: NotYet = None

    def for_template(self) -> dict[str, str]:
        """The message as the chat template sees it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=16384, fail_fast=True)]


class Template(Strict):
    """How messages become a prompt."""

    # Default: true, unless the final message is to be continued.
    add_generation_prompt: bool | None = None
    continue_final_message: Off = False
    chat_template_kwargs: TemplateKwargs | None = None

    chat_template: NotYet = None
    documents: NotYet = None
    tools: Annotated[list[None], Field(max_length=0)] | None = None


class ChatBody(Generation, Template):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None  # wins over max_tokens
    logprobs: Off = False
    top_logprobs: TopLogprobs | None = None

    parallel_tool_calls: bool | None = None  # without effect: there are no tools
    return_mm_kwargs: bool | None = None  # of the render routes only

    add_special_tokens: Literal[False] | None = None  # the template brings its own
    echo: Literal[False] | None = None
    tool_choice: Literal["none"] | None = None
    functions: Annotated[list[None], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None  # OpenAI's default
    include_reasoning: Literal[True] | None = None
    return_prompt_text: Literal[False] | None = None
    thinking_token_budget: NotYet = None
    audio: NotYet = None
    prediction: NotYet = None
    moderation: NotYet = None
    prompt_cache_options: NotYet = None
    web_search_options: NotYet = None
    media_io_kwargs: NotYet = None
    mm_processor_kwargs: NotYet = None


class TokenizeBody(Template):
    """Body of POST /tokenize: a prompt or messages, never both."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # for a prompt; default: true
    return_token_strs: Off = False


class DetokenizeBody(Strict):
    """Body of POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_LIST_LEN, fail_fast=True)]


# Fields whose every refusal means the same: what they ask for is not there.
_NOT_YET = frozenset(
    name
    for body in (CompletionBody, ChatBody, Message)
    for name, info in body.model_fields.items()
    if info.annotation is type(None)
) | {
    *("response_format", "priority", "use_beam_search", "watermarking", "routed_experts_prompt_start", "tools"),
    *("tool_choice", "tool_calls", "functions", "function_call", "modalities", "reasoning_effort", "verbosity"),
    *("include_reasoning", "return_prompt_text", "echo", "add_special_tokens"),
}

# Fields with several forms: one sentence for all of them, since a union reports an error per form.
_FORMS = {
    "prompt": (
        f"must be a text, a list of up to {MAX_PROMPTS} texts, a list of token ids, or a list of up to {MAX_PROMPTS} "
        "lists of token ids; no list may be empty"
    ),
    "stop": "must be a text of 1 to 256 characters or a list of up to 16 of them",
    "content": "must be a text or a list of parts of type 'text'",
}

_SENTENCES = {
    "missing": "is required",
    "extra_forbidden": "is not a known field",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have at least {min_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing_size": "is out of range",
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}

_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def parse(body_type: type[Body], raw: bytes) -> Body:
    """The body as its type. Raises RequestError (400) that names field, limit and, for a number, the value."""
    try:
        return body_type.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _refusal(error: ErrorDetails) -> RequestError:
    """A complaint of pydantic's as a sentence of ours; of the client's text only a plain field name is repeated."""
    kind = error["type"]
    if kind == "json_invalid":
        return RequestError("The body is not valid JSON.", code="invalid_json")
    if not error["loc"]:
        return RequestError("The body must be a JSON object.")
    template = _SENTENCES.get(kind, "is not valid")
    sentence = template.format(**error.get("ctx", {}))
    value = error["input"]
    if "{" in template and type(value) in (int, float) and abs(value) < 1e18:
        sentence += f", got {value:g}"
    path = ""
    for part in error["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        if part == "[key]":  # pydantic's word for: the key, not the value
            continue
        plain = part if _PLAIN.fullmatch(part) else "(a name that is not plain)"
        path += f".{plain}" if path else plain
        if kind in ("missing", "extra_forbidden"):
            continue
        # What follows in `loc` are pydantic's names for the forms tried.
        if part in _NOT_YET and kind != "bool_type":
            sentence = "is not supported yet"
            break
        if part in _FORMS:
            sentence = _FORMS[part]
            break
    return RequestError(f"{path} {sentence}.", param=path)
