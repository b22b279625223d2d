"""The routes. Each takes what it needs from the edge (`request.state`) and from the server (`State`)."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from octavo import __version__
from octavo.server.api.admission import Prompt
from octavo.server.api.formats import ChatFormat, CompletionFormat, Format
from octavo.server.api.generation import Generation, TextOptions
from octavo.server.api.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from octavo.server.api.sse import encode_json
from octavo.server.api.state import State
from octavo.server.api.stream import EventStream
from octavo.server.errors import RequestError
from octavo.server.text.tokenizer import Tokenizer

router = APIRouter()
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})  # answer without a key
BODY_TIMEOUT_S = 30.0  # for a body to come whole


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """OpenAI's completions."""
    state = _state(request)
    body = await _body(request, state, CompletionBody)
    permit = request.state.stack.enter_context(state.accept())
    request_id = _name(request, body, "cmpl-")
    prompts = await state.admission.completion(body, permit, request.state.key_id)
    generation = _start(request, state, body, prompts, text_offsets=body.logprobs is not None)
    return await _answer(body, generation, CompletionFormat(body, generation, *_setting(state, request_id)))


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions."""
    state = _state(request)
    body = await _body(request, state, ChatBody)
    permit = request.state.stack.enter_context(state.accept())
    request_id = _name(request, body, "chatcmpl-")
    prompts = await state.admission.chat(body, permit, request.state.key_id)
    generation = _start(request, state, body, prompts, text_offsets=False)
    return await _answer(body, generation, ChatFormat(body, generation, *_setting(state, request_id)))


@router.post("/v1/requests/{request_id}/cancel")
async def cancel(request: Request, request_id: str) -> Response:
    """Ends a running request by the id of its response: its choices finish with reason "abort"."""
    generation = _state(request).live.get((request.state.key_id, request_id))
    if generation is None or not await generation.abort():
        raise RequestError("No running request has this id.", code="request_not_found", status=404)
    return _json({"id": request_id, "cancelled": True})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model."""
    return _json({"object": "list", "data": [_model(_ready(_state(request)))]})


@router.get("/v1/models/{model_id:path}")
async def model(request: Request, model_id: str) -> Response:
    """The model by its name."""
    state = _ready(_state(request))
    _check_model(state, model_id)
    return _json(_model(state))


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The token ids that generation would use for a prompt or a chat."""
    state = _state(request)
    body = await _body(request, state, TokenizeBody)
    request.state.stack.enter_context(state.accept())
    token_ids = await state.admission.tokenize(body)
    texts = await state.admission.token_texts(token_ids) if body.return_token_strs else None
    max_model_len = state.engine.info.max_model_len
    return _json({"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": texts})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    state = _state(request)
    body = await _body(request, state, DetokenizeBody)
    request.state.stack.enter_context(state.accept())
    return _json({"prompt": await state.admission.detokenize(body.tokens)})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """What the tokenizer is and which special tokens it has."""
    return _json(_state(request).tokenizer.info())


@router.get("/version")
async def version() -> Response:
    """Octavo's version."""
    return _json({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(_state(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.api_route("/livez", methods=["GET", "HEAD"])
async def livez() -> Response:
    """The event loop turns."""
    return PlainTextResponse("ok")


@router.api_route("/readyz", methods=["GET", "HEAD"])
async def readyz(request: Request) -> Response:
    """Whether new requests are served at once; else 503 and why not in a word."""
    status = _state(request).status
    return PlainTextResponse(status, 200 if status == "ok" else 503)


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    """Whether the server should be left to live: one that drains should, and one that saves its streams."""
    state, engine = _state(request), _state(request).engine
    payload: dict[str, Any] = {"status": state.status}
    if engine.degraded:
        payload |= {"degraded": True, "ranks": len(engine.info.ranks), "reason": engine.degraded}
    return _json(payload, 200 if state.status in ("ok", "recovering", "draining") else 503)


def _state(request: Request) -> State:
    state: State = request.app.state.server
    return state


def _ready(state: State) -> State:
    state.check_ready()
    return state


def _json(payload: dict[str, Any], status: int = 200) -> Response:
    return Response(encode_json(payload), status, media_type="application/json")


def _model(state: State) -> dict[str, Any]:
    return {
        "id": state.config.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "octavo",
        "root": state.config.model_name,
        "parent": None,
        "max_model_len": state.engine.info.max_model_len,
    }


def _check_model(state: State, name: str | None) -> None:
    if name is not None and name != state.config.model_name:
        raise RequestError(
            f"The model does not exist; this server has {state.config.model_name}.",
            param="model",
            code="model_not_found",
            status=404,
        )


async def _body(request: Request, state: State, body_type: type[Body]) -> Body:
    """The request's body, read as far as the cap and parsed. Raises RequestError (400, 404, 408, 413, 415, 429, 503).

    A full server refuses before it reads; room is taken only for a body that has come (`State.accept`).
    """
    _ready(state).admission.check_room()
    # Other types are what a web page may send to any server without asking; a JSON body needs the server's consent.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("The content type must be application/json.", status=415)
    limit = state.admission.max_body_bytes
    too_large = RequestError(f"The body has more than {limit} bytes.", code="body_too_large", status=413)
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    raw = bytearray()
    try:
        async with state.reading(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > limit:
                    raise too_large
    except TimeoutError:
        _ready(state)
        raise RequestError(f"The body did not come within {BODY_TIMEOUT_S:g} s.", status=408) from None
    body = parse(body_type, bytes(raw))
    _check_model(state, getattr(body, "model", None))
    return body


def _name(request: Request, body: CompletionBody | ChatBody, prefix: str) -> str:
    """The response's id, which the header and the log show too."""
    request_id: str = body.request_id or prefix + request.state.request_id
    request.state.request_id = request_id
    return request_id


def _start(
    request: Request, state: State, body: CompletionBody | ChatBody, prompts: list[Prompt], text_offsets: bool
) -> Generation:
    """The generation, registered for as long as the HTTP request lives."""
    options = TextOptions(
        body.stop_strings,
        body.include_stop_str_in_output,
        body.skip_special_tokens,
        text_offsets,
    )
    generation = Generation(state.engine, state.tokenizer, state.metrics, prompts, options, request.state.arrival_s)
    request.state.stack.enter_context(state.register(request.state.key_id, request.state.request_id, generation))
    return generation


def _setting(state: State, request_id: str) -> tuple[Tokenizer, dict[str, Any], bool]:
    """What a response's format needs of the server: the tokenizer, the head, whether to count cached tokens."""
    head = {
        "id": request_id,
        "object": "",
        "created": int(time.time()),
        "model": state.config.model_name,
        "system_fingerprint": state.fingerprint,
    }
    return state.tokenizer, head, state.config.enable_prompt_tokens_details


async def _answer(body: CompletionBody | ChatBody, generation: Generation, format: Format) -> Response:
    if body.stream:
        return EventStream(generation, format)
    await generation.complete()
    return _json(format.whole(generation.take()))
