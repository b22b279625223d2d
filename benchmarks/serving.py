"""Load on an OpenAI-compatible server, and what it answers: throughput, TTFT, TPOT, ITL and end-to-end latency.

    python benchmarks/serving.py --base-url http://127.0.0.1:8000 --max-concurrency 8 --num-prompts 64

Knows HTTP and nothing of the server behind it, so that peers are measured by the very same client. Needs httpx and
tqdm; `tokenizers` for --tokenizer and matplotlib for --plot. The last line of stdout is JSON, with the keys that
`vllm bench serve` uses where they mean the same.

TTFT is the time from sending a request to its first streamed output, ITL the gap between two streamed outputs (pooled
over all requests), E2EL the time from sending to the last output, and TPOT of a request is
(E2EL - TTFT) / (output tokens - 1).
"""

import argparse
import asyncio
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import httpx
from tqdm import tqdm

Prompt = str | list[int]
METRICS = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
WORDS = (
    "a about after again all and apple are ask at autumn bag bell bird black blue boat book bread bridge bring "
    "but by call carry chair child city clear cloud coat cold come corn cup day deep door down draw dream drink "
    "dry early east egg end every eye face fall far farm field find fire fish flower follow food for from garden "
    "give glass go gold good grass green grow hand hat have he hear hill hold home hope horse hour house how ice "
    "if in iron is island it jump keep key king know lake land last late leaf learn leave letter light like line "
    "listen long look make many map market milk moon morning mountain move music name near new night north not "
    "now of old on open or orange other out over page paper park part path people play press print quiet rain "
    "read red rest ride river road rock roof room rope run salt sand say sea see seed sell send ship shoe short "
    "sing sit sky sleep slow small snow song south spring stand star start stay stone story street summer sun "
    "table take talk tall tea tell that the then they time to town train travel tree turn under up valley very "
    "village visit wait walk wall warm watch water way we west what wheel when where white why will wind window "
    "winter with wood word work world write yard year yellow yes you young"
).split()
# Ids that are ordinary tokens in every vocabulary in use: past bytes and control tokens, below the smallest size.
PLAIN_TOKEN_IDS = range(1000, 10_000)


class BenchmarkError(Exception):
    """The benchmark cannot be run as asked; the text is one line for a person."""


class Codec(Protocol):
    """Text to token ids and back, as the model under test has it."""

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the text."""

    async def decode(self, token_ids: list[int]) -> str:
        """Text of the ids."""


class FolderCodec:
    """The tokenizer of a local Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BenchmarkError(f"--tokenizer: no tokenizer.json in {folder}")
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    async def decode(self, token_ids: list[int]) -> str:
        """Text of the ids, special tokens included."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


class ServerCodec:
    """The server's own /tokenize and /detokenize."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the text. Raises httpx.HTTPError where the route is missing."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": add_special_tokens}
        response = await self._client.post("/tokenize", json=body)
        return list(response.raise_for_status().json()["tokens"])

    async def decode(self, token_ids: list[int]) -> str:
        """Text of the ids. Raises httpx.HTTPError where the route is missing."""
        response = await self._client.post("/detokenize", json={"model": self._model, "tokens": token_ids})
        return str(response.raise_for_status().json()["prompt"])


@dataclass(slots=True)
class Output:
    """What came back for one request. Times are of time.perf_counter, in seconds."""

    sent_s: float = 0.0
    times_s: list[float] = field(default_factory=list)  # arrival of each streamed output
    num_prompt_tokens: int | None = None  # from usage, like the two below
    num_output_tokens: int | None = None
    num_cached_tokens: int = 0
    finished: bool = False
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens by the server's count; without usage every streamed output counts as one token."""
        return len(self.times_s) if self.num_output_tokens is None else self.num_output_tokens

    @property
    def ttft_s(self) -> float:
        """From sending to the first output."""
        return self.times_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """From sending to the last output."""
        return self.times_s[-1] - self.sent_s

    def read(self, data: bytes, now_s: float) -> None:
        """Takes in one event (the bytes behind `data:`). Raises ValueError where it is no JSON object."""
        if data == b"[DONE]":
            self.finished = True
            return
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError("an event is no JSON object")
        if error := event.get("error"):
            self.error = f"error event: {error}"[:300]
        if usage := event.get("usage"):
            self.num_prompt_tokens = usage.get("prompt_tokens")
            self.num_output_tokens = usage.get("completion_tokens")
            self.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            last = choice.get("finish_reason") is not None
            self.finished = self.finished or last
            has_text = choice.get("text") or delta.get("content") or delta.get("reasoning")
            # An answer made of special tokens alone has no text: its end is then its only visible output.
            if has_text or (last and not self.times_s):
                self.times_s.append(now_s)


async def send(client: httpx.AsyncClient, endpoint: str, body: bytes) -> Output:
    """One streamed request; every failure ends up in `Output.error`.

    The arrival time is taken once per network read, before anything is parsed, and events are cut from the raw bytes:
    the client shares the machine with the server it measures.
    """
    output = Output(sent_s=time.perf_counter())
    try:
        async with client.stream("POST", endpoint, content=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                output.error = f"HTTP {response.status_code}: {text}"[:300]
                return output
            rest = b""
            async for piece in response.aiter_raw():
                now_s = time.perf_counter()
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        output.read(line[5:].strip(), now_s)
    except (httpx.HTTPError, ValueError) as error:
        output.error = f"{type(error).__name__}: {error}"[:300]
    if output.error is None and not (output.finished and output.times_s):
        output.error = "the stream broke off" if output.times_s else "the stream ended without an output"
    return output


async def drive(
    client: httpx.AsyncClient,
    endpoint: str,
    bodies: Sequence[bytes],
    *,
    max_concurrency: int | None = None,
    request_rate: float = math.inf,
    burstiness: float = 1.0,
    seed: int = 0,
) -> tuple[list[Output], float]:
    """Sends all bodies and waits for all answers: outputs in the order of the bodies, and the duration in seconds.

    Requests arrive at `request_rate` a second with gamma-distributed gaps (burstiness 1: a Poisson process, lower is
    burstier), all at once where it is infinite; no more than `max_concurrency` are in flight.
    """
    rng = random.Random(seed)
    permits = asyncio.Semaphore(max_concurrency or len(bodies))

    with tqdm(total=len(bodies), unit="req", disable=None, leave=False) as bar:

        async def one(body: bytes, at_s: float) -> Output:
            await asyncio.sleep(at_s - (time.perf_counter() - start_s))
            async with permits:
                output = await send(client, endpoint, body)
            bar.update()
            return output

        start_s, at_s, tasks = time.perf_counter(), 0.0, []
        for body in bodies:
            tasks.append(asyncio.create_task(one(body, at_s)))
            if request_rate != math.inf:
                at_s += rng.gammavariate(burstiness, 1 / (request_rate * burstiness))
        outputs = await asyncio.gather(*tasks)
        return outputs, time.perf_counter() - start_s


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the (at least one) values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(
    outputs: Sequence[Output], duration_s: float, percentiles: Sequence[float], output_len: int | None = None
) -> dict[str, Any]:
    """The figures of one run. Latencies are null where no request succeeded.

    `num_wrong_length` counts requests that did not give `output_len` tokens (None: any length is right).
    """
    good = [output for output in outputs if output.error is None]
    num_input = sum(output.num_prompt_tokens or 0 for output in good)
    num_output = sum(output.num_tokens for output in good)
    samples_s = {
        "ttft": [output.ttft_s for output in good],
        "tpot": [(output.e2el_s - output.ttft_s) / (output.num_tokens - 1) for output in good if output.num_tokens > 1],
        "itl": [later - sooner for output in good for sooner, later in pairwise(output.times_s)],
        "e2el": [output.e2el_s for output in good],
    }
    result: dict[str, Any] = {
        "duration": duration_s,
        "percentiles": list(percentiles),
        "completed": len(good),
        "failed": len(outputs) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": _peak_tokens(good),
        "max_concurrent_requests": _peak_requests(good),
        "total_cached_tokens": sum(output.num_cached_tokens for output in good),
        "tokens_counted_from": "usage" if all(output.num_output_tokens is not None for output in good) else "outputs",
        "num_wrong_length": sum(output_len is not None and output.num_tokens != output_len for output in good),
    }
    for name, values_s in samples_s.items():
        values = [value * 1e3 for value in values_s]
        result[f"mean_{name}_ms"] = statistics.fmean(values) if values else None
        result[f"median_{name}_ms"] = statistics.median(values) if values else None
        result[f"std_{name}_ms"] = statistics.pstdev(values) if values else None
        for percent in percentiles:
            result[f"p{percent:g}_{name}_ms"] = percentile(values, percent) if values else None
    errors = Counter(output.error for output in outputs if output.error is not None)
    result["errors"] = [f"{count} x {error}" for error, count in errors.most_common(3)]
    return result


def _peak_tokens(outputs: Sequence[Output]) -> float:
    """Most output tokens in one second of the clock; a request's tokens count evenly over its outputs."""
    tokens: dict[int, float] = {}
    for output in outputs:
        for second, count in Counter(int(time_s) for time_s in output.times_s).items():
            tokens[second] = tokens.get(second, 0.0) + count * output.num_tokens / len(output.times_s)
    return max(tokens.values(), default=0.0)


def _peak_requests(outputs: Sequence[Output]) -> int:
    """Most requests in flight at one time."""
    changes = sorted([(o.sent_s, 1) for o in outputs] + [(o.times_s[-1], -1) for o in outputs])
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


async def make_prompts(
    codec: Codec | None, num_prompts: int, args: argparse.Namespace, *, salt: str
) -> Sequence[Prompt]:
    """Prompts of exactly `args.input_len` tokens, the first `args.shared_prefix_len` alike; equal salts, equal prompts.

    For completions the tokens that the tokenizer adds by itself are counted, for chat the template comes on top.
    Without a codec the prompts are token ids. Raises BenchmarkError where that is impossible or no text is found.
    """
    rngs = [random.Random(f"{salt}/{index}") for index in range(num_prompts)]
    prefix_rng = random.Random(f"{salt}/prefix")
    if codec is None:
        if is_chat(args.endpoint):
            raise BenchmarkError("this server has no /tokenize: give --tokenizer FOLDER for chat")
        start = prefix_rng.choices(PLAIN_TOKEN_IDS, k=args.shared_prefix_len)
        return [start + rng.choices(PLAIN_TOKEN_IDS, k=args.input_len - len(start)) for rng in rngs]
    special = not is_chat(args.endpoint)
    prefix = ""
    if args.shared_prefix_len:
        prefix = await _text(codec, prefix_rng, "", args.shared_prefix_len, special)
    return [await _text(codec, rng, prefix, args.input_len, special) for rng in rngs]


async def _text(codec: Codec, rng: random.Random, prefix: str, length: int, special: bool) -> str:
    with_special = await codec.encode("a", add_special_tokens=special)
    num_added = len(with_special) - len(await codec.encode("a", add_special_tokens=False))
    for _ in range(32):
        words = " ".join(rng.choices(WORDS, k=length))
        token_ids = await codec.encode(f"{prefix} {words}" if prefix else words, add_special_tokens=False)
        text = await codec.decode(token_ids[: length - num_added])
        # A cut inside a word may fall into other tokens when the text is read again.
        if text.startswith(prefix) and len(await codec.encode(text, add_special_tokens=special)) == length:
            return text
    raise BenchmarkError(f"found no text of exactly {length} tokens; try another length")


def make_bodies(
    prompts: Iterable[Prompt],
    *,
    endpoint: str,
    model: str,
    output_len: int,
    temperature: float,
    ignore_eos: bool,
    extra_body: dict[str, Any],
) -> list[bytes]:
    """Request bodies, encoded before the clock starts. A null in `extra_body` removes the key."""
    common = {
        "model": model,
        "max_tokens": output_len,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": ignore_eos or None,
    } | extra_body
    common = {key: value for key, value in common.items() if value is not None}
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": prompt}]} if is_chat(endpoint) else {"prompt": prompt}
        for prompt in prompts
    ]
    return [json.dumps(common | body).encode() for body in bodies]


def is_chat(endpoint: str) -> bool:
    """Whether the endpoint takes messages rather than a prompt."""
    return endpoint.endswith("/chat/completions")


def make_client(base_url: str, api_key: str | None, timeout_s: float) -> httpx.AsyncClient:
    """A client without connection limit, proxies and compression."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    url = base_url.rstrip("/").removesuffix("/v1")
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout_s, limits=limits, trust_env=False)


def machine() -> dict[str, Any]:
    """What the client runs on, for the record."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {"cpu": model, "cpu_count": os.cpu_count(), "python": platform.python_version(), "httpx": httpx.__version__}


def report(result: dict[str, Any]) -> str:
    """The result as a table: labels in 40 columns, sections under dashed titles."""
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", result["completed"]),
        ("Failed requests:", result["failed"]),
        ("Requests of another length:", result["num_wrong_length"] or None),
        ("Maximum request concurrency:", result["max_concurrency"]),
        ("Request rate configured (RPS):", None if result["request_rate"] == "inf" else result["request_rate"]),
        ("Benchmark duration (s):", result["duration"]),
        ("Total input tokens:", result["total_input_tokens"]),
        ("Cached input tokens:", result["total_cached_tokens"] or None),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", result["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
        ("Client CPU (% of one core):", result["client_cpu_percent"]),
    ]
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [_row(label, value) for label, value in rows if value is not None]
    for name, (title, short) in METRICS.items():
        if result[f"mean_{name}_ms"] is None:
            continue
        lines.append(f"{title:-^50}")
        lines += [_row(f"{word} {short} (ms):", result[f"{word.lower()}_{name}_ms"]) for word in ("Mean", "Median")]
        lines += [_row(f"P{p:g} {short} (ms):", result[f"p{p:g}_{name}_ms"]) for p in result["percentiles"]]
    lines.append("=" * 50)
    return "\n".join(lines + [f"error: {error}" for error in result["errors"]])


def _row(label: str, value: float | int) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws TTFT, ITL and throughput against concurrency (against the peak where none was set)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    loads = [result["max_concurrency"] or result["max_concurrent_requests"] for result in results]
    axes = figure.subplots(1, 3)
    for axis, name in zip(axes, ("ttft", "itl"), strict=False):
        for p in results[0]["percentiles"]:
            axis.plot(loads, [result[f"p{p:g}_{name}_ms"] for result in results], marker="o", label=f"p{p:g}")
        axis.set_title(METRICS[name][0])
        axis.set_ylabel(f"{METRICS[name][1]} (ms)")
        axis.legend()
    axes[2].plot(loads, [r["output_throughput"] for r in results], marker="o")
    axes[2].set_title("Throughput")
    axes[2].set_ylabel("output tokens per second")
    for axis in axes:
        axis.set_xlabel("concurrent requests")
        axis.set_xscale("log", base=2)
        axis.set_xticks(loads, [str(load) for load in loads])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{results[0]['model_id']}: {results[0]['input_len']} + {results[0]['output_len']} tokens")
    figure.savefig(path)


async def find_model(client: httpx.AsyncClient) -> str:
    """The first model that the server lists. Raises BenchmarkError."""
    try:
        response = await client.get("/v1/models")
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise BenchmarkError(
            f"no model from {str(client.base_url).rstrip('/')}/v1/models ({error}); give --model"
        ) from error


async def find_codec(client: httpx.AsyncClient, model: str, tokenizer: Path | None) -> Codec | None:
    """The tokenizer folder, else the server's own routes, else None."""
    if tokenizer is not None:
        return FolderCodec(tokenizer)
    codec = ServerCodec(client, model)
    try:
        await codec.decode(await codec.encode("a", add_special_tokens=False))
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return None
    return codec


async def measure(
    client: httpx.AsyncClient,
    args: argparse.Namespace,
    *,
    model: str,
    warmups: Sequence[Prompt],
    prompts: Sequence[Prompt],
    max_concurrency: int | None = None,
    request_rate: float = math.inf,
    burstiness: float = 1.0,
    ignore_eos: bool = True,
    extra_body: dict[str, Any],
) -> dict[str, Any]:
    """Warms up, drives the server once and gives the result.

    `args` holds endpoint, temperature, seed, percentiles and the three lengths, as the flags are called.
    """
    warmup_bodies, bodies = (
        make_bodies(
            some,
            endpoint=args.endpoint,
            model=model,
            output_len=args.output_len,
            temperature=args.temperature,
            ignore_eos=ignore_eos,
            extra_body=extra_body,
        )
        for some in (warmups, prompts)
    )
    await drive(client, args.endpoint, warmup_bodies, max_concurrency=max_concurrency)
    start_cpu_s = time.process_time()
    outputs, duration_s = await drive(
        client,
        args.endpoint,
        bodies,
        max_concurrency=max_concurrency,
        request_rate=request_rate,
        burstiness=burstiness,
        seed=args.seed,
    )
    cpu_s = time.process_time() - start_cpu_s
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if is_chat(args.endpoint) else "openai",
        "model_id": model,
        "num_prompts": len(prompts),
        "input_len": args.input_len,
        "output_len": args.output_len,
        "shared_prefix_len": args.shared_prefix_len,
        "seed": args.seed,
        "request_rate": "inf" if request_rate == math.inf else request_rate,
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
        **summarize(outputs, duration_s, args.percentiles, args.output_len if ignore_eos else None),
        "client_cpu_percent": 100 * cpu_s / duration_s,
        "machine": machine(),
    }


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Drives the server once per value of --max-concurrency; prints each table. Raises BenchmarkError."""
    results = []
    async with make_client(args.base_url, args.api_key, args.timeout) as client:
        model = args.model or await find_model(client)
        codec = await find_codec(client, model, args.tokenizer)
        for level, max_concurrency in enumerate(args.max_concurrency):
            # Every level and the warm-up have prompts of their own: none may find another's in the prefix cache.
            warmups, prompts = [
                await make_prompts(codec, number, args, salt=f"{args.seed}/{level}/{kind}")
                for kind, number in (("warmup", args.num_warmups), ("prompt", args.num_prompts))
            ]
            result = await measure(
                client,
                args,
                model=model,
                warmups=warmups,
                prompts=prompts,
                max_concurrency=max_concurrency,
                request_rate=args.request_rate,
                burstiness=args.burstiness,
                ignore_eos=args.ignore_eos,
                extra_body=args.extra_body,
            )
            result |= {"label": args.label, "tokenizer_id": str(args.tokenizer) if args.tokenizer else None}
            print(report(result), flush=True)
            results.append(result)
    return results


def count(text: str) -> int:
    """Argument type: a positive integer."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def count_or_zero(text: str) -> int:
    """Argument type: an integer that is not negative."""
    return 0 if int(text) == 0 else count(text)


def counts(text: str) -> list[int]:
    """Argument type: positive integers with commas between."""
    return [count(part) for part in text.split(",")]


def positive(text: str) -> float:
    """Argument type: a number above 0, or inf."""
    if not (value := float(text)) > 0:
        raise ValueError
    return value


def percents(text: str) -> list[float]:
    """Argument type: numbers from 0 to 100 with commas between."""
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 100 for value in values):
        raise ValueError
    return values


def json_object(text: str) -> dict[str, Any]:
    """Argument type: a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that compare.py has too."""
    add = parser.add_argument
    add("--endpoint", default="/v1/completions", choices=["/v1/completions", "/v1/chat/completions"])
    add("--num-warmups", type=count_or_zero, default=1, help="requests before the clock starts (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of prompts and arrivals; a repeated run finds its prompts cached")
    add("--timeout", type=positive, default=600.0, metavar="S", help="longest silence of a server (default: 600)")
    add("--save-result", type=Path, metavar="FILE", help="write the JSON to a file as well")


def make_parser() -> argparse.ArgumentParser:
    """All flags of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="octavo bench serve",
        description="Measure a running OpenAI-compatible server. The last line printed is JSON.",
    )
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="(default: %(default)s)")
    add("--model", help="(default: the first of /v1/models)")
    add("--tokenizer", type=Path, metavar="FOLDER", help="counts prompt tokens (default: the server's /tokenize)")
    add("--api-key", default=os.environ.get("OCTAVO_API_KEY"), help="(default: $OCTAVO_API_KEY)")
    add(
        "--max-concurrency",
        type=counts,
        default=[None],
        metavar="N,N",
        help="most requests in flight; several: a run each",
    )
    add("--request-rate", type=positive, default=math.inf, help="requests a second (default: all at once)")
    add("--burstiness", type=positive, default=1.0, help="1: Poisson arrivals, lower: burstier (default: %(default)s)")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="generate to the full length")
    add("--extra-body", type=json_object, default={}, metavar="JSON", help="fields to add; null removes a field")
    add("--label", help="a name for the result")
    add("--plot", type=Path, metavar="FILE", help="draw latency and throughput against concurrency (.png, .svg, .pdf)")
    add("--num-prompts", type=count, default=64, help="requests to measure (default: %(default)s)")
    add("--input-len", type=count, default=256, help="prompt tokens of a request (default: %(default)s)")
    add("--output-len", type=count, default=128, help="tokens to generate for a request (default: %(default)s)")
    add("--shared-prefix-len", type=count_or_zero, default=0, help="prompt tokens that all requests have in common")
    add("--percentiles", type=percents, default=[50.0, 95.0, 99.0], metavar="P,P", help="(default: 50,95,99)")
    add_common_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a request failed or it could not be run, 2 for wrong flags (by SystemExit)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.shared_prefix_len >= args.input_len:
        parser.error(f"--shared-prefix-len {args.shared_prefix_len} is not below --input-len {args.input_len}")
    try:
        for path in filter(None, (args.plot, args.save_result)):  # better said before the run than after
            if not path.parent.is_dir():
                raise BenchmarkError(f"{path.parent} is not a folder")
        if args.plot:
            import matplotlib  # noqa: F401
        results = asyncio.run(run(args))
        answered = [result for result in results if result["completed"]]
        line = json.dumps(results[0] if len(results) == 1 else {"runs": results})
        print(line)
        if args.plot and answered:
            plot(answered, args.plot)
        if args.save_result:
            args.save_result.write_text(line + "\n")
    except (BenchmarkError, ImportError, OSError) as error:
        print(f"serving: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 1 if any(result["failed"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
