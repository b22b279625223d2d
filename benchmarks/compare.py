"""Two or more servers on the same prompts in one run, started one after the other, and the ratios between them.

    python -m octavo.benchmarks.compare --tokenizer MODEL --pairs 3 \\
        --server "octavo=octavo serve MODEL --port {port}@http://127.0.0.1:{port}" \\
        --server "other=other-server MODEL --port {port}@http://127.0.0.1:{port}" \\
        --extra-body 'other={"ignore_eos": null}'

In each pair every server is started, warmed up, driven and stopped; every second pair goes in reverse order, so that a
machine that gets slower or faster meanwhile favours nobody. The ratios are those of the first server to each other one
within a pair; what is shown is their median and their range. The last line of stdout is JSON.
"""

import argparse
import asyncio
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from octavo.benchmarks import serving
from octavo.benchmarks.serving import BenchmarkError

COMPARED = {
    "output_throughput": "output tok/s",
    "median_ttft_ms": "TTFT p50 ms",
    "median_itl_ms": "ITL p50 ms",
    "median_tpot_ms": "TPOT p50 ms",
    "median_e2el_ms": "E2EL p50 ms",
}
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to start: its command line, and where it then answers."""

    name: str
    command: str
    url: str


def peer(text: str) -> Peer:
    """Argument type: NAME=COMMAND@URL."""
    name, _, rest = text.partition("=")
    command, _, url = rest.rpartition("@")
    if not (name and command.strip() and url.startswith(("http://", "https://"))):
        raise ValueError
    return Peer(name, command, url)


def named(text: str) -> tuple[str, str]:
    """Argument type: NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError
    return name, value


def named_object(text: str) -> tuple[str, dict[str, Any]]:
    """Argument type: NAME=JSON object."""
    name, value = named(text)
    return name, serving.json_object(value)


@contextmanager
def running(peer: Peer, ready_timeout_s: float) -> Iterator[str]:
    """Starts the server, gives its URL once /health answers 200, and stops it with all its processes.

    `{port}` in command and URL is a free port. Raises BenchmarkError with the end of its output if it does not come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = peer.url.replace("{port}", port)
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                shlex.split(peer.command.replace("{port}", port)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise BenchmarkError(f"{peer.name} cannot be started: {error}") from error
        try:
            _wait_ready(process, url, ready_timeout_s)
            yield url
        except TimeoutError as error:
            log.seek(0)
            tail = log.read()[-2000:].decode(errors="replace").strip()
            raise BenchmarkError(f"{peer.name} {error}; its last words:\n{tail}") from error
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise TimeoutError(f"ended with status {process.returncode} before it was ready")
            try:
                if client.get(f"{url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
    raise TimeoutError(f"was not ready within {timeout_s:g} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    # The group outlives its leader: what the server left behind must not slow the next one down.
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_TIMEOUT_S)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def ratios(pairs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Other server -> figure -> median, min and max over the pairs of first server / other server.

    A figure that a failed run lacks is left out.
    """
    first, *others = pairs[0]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for other in others:
        found[other] = {}
        for key in COMPARED:
            values = [pair[first][key] / pair[other][key] for pair in pairs if pair[first][key] and pair[other][key]]
            if values:
                found[other][key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found


def table(pairs: Sequence[dict[str, dict[str, Any]]]) -> str:
    """A row per pair and server, then the ratios."""
    lines = [f"{'pair':<5}{'server':<20}" + "".join(f"{title:>14}" for title in COMPARED.values()) + f"{'failed':>8}"]
    for number, pair in enumerate(pairs, 1):
        for name, result in pair.items():
            cells = "".join(f"{result[key]:>14.2f}" if result[key] else f"{'-':>14}" for key in COMPARED)
            lines.append(f"{number:<5}{name:<20}{cells}{result['failed']:>8}")
    first = next(iter(pairs[0]))
    for other, figures in ratios(pairs).items():
        lines.append(f"{first} / {other}:")
        lines += [
            f"  {COMPARED[key]:<20}{ratio['median']:>7.3f}  ({ratio['min']:.3f} to {ratio['max']:.3f})"
            for key, ratio in figures.items()
        ]
    return "\n".join(lines)


async def drive(args: argparse.Namespace, peer: Peer, url: str, number: int) -> dict[str, Any]:
    """One server's result in pair `number`; the prompts depend on the pair and not on the server."""
    async with serving.make_client(url, None, args.timeout) as client:
        codec = serving.FolderCodec(args.tokenizer)
        warmups, prompts = [
            await serving.make_prompts(codec, count, args, salt=f"{args.seed}/{number}/{kind}")
            for kind, count in (("warmup", args.num_warmups), ("prompt", args.num_prompts))
        ]
        return await serving.measure(
            client,
            args,
            model=dict(args.model).get(peer.name) or await serving.find_model(client),
            warmups=warmups,
            prompts=prompts,
            max_concurrency=args.max_concurrency,
            extra_body=dict(args.extra_body).get(peer.name, {}),
        )


def run(args: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """Pairs in order, each of server name -> result in the order of the flags. Raises BenchmarkError."""
    pairs = []
    for number in range(args.pairs):
        results = {}
        for one in args.server if number % 2 == 0 else reversed(args.server):
            print(f"pair {number + 1} of {args.pairs}: {one.name}", file=sys.stderr, flush=True)
            with running(one, args.ready_timeout) as url:
                results[one.name] = asyncio.run(drive(args, one, url, number))
        pairs.append({one.name: results[one.name] for one in args.server})
    return pairs


def make_parser() -> argparse.ArgumentParser:
    """All flags of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="compare", description="Start servers in turn and measure them on the same prompts. The last line is JSON."
    )
    add = parser.add_argument
    add("--server", type=peer, action="append", required=True, metavar="NAME=COMMAND@URL", help="{port}: a free port")
    add("--model", type=named, action="append", default=[], metavar="NAME=MODEL", help="(default: the first it lists)")
    add(
        "--extra-body",
        type=named_object,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="fields to add to requests for this server; null removes a field",
    )
    add("--tokenizer", type=Path, required=True, metavar="FOLDER", help="the model's folder, to count prompt tokens")
    add("--pairs", type=serving.count, default=3, help="how often each server is measured (default: %(default)s)")
    add("--max-concurrency", type=serving.count, default=8, help="most requests in flight (default: %(default)s)")
    add("--ready-timeout", type=serving.positive, default=600.0, metavar="S", help="for a start (default: %(default)s)")
    add("--save-result", type=Path, metavar="FILE", help="write the JSON to a file as well")
    serving.add_load_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; 1 if a request failed or it could not be run, 2 for wrong flags (by SystemExit)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    serving.check_lens(parser, args)
    names = [one.name for one in args.server]
    if len(names) < 2 or len(set(names)) < len(names):
        parser.error("--server: two or more, each with a name of its own")
    for name, _ in [*args.model, *args.extra_body]:
        if name not in names:
            parser.error(f"--model, --extra-body: no server is called {name}")
    try:
        pairs = run(args)
        print(table(pairs))
        line = json.dumps({"servers": names, "pairs": pairs, "ratios": ratios(pairs)})
        if args.save_result:
            args.save_result.write_text(line + "\n")
    except (BenchmarkError, OSError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(line)
    return 1 if any(result["failed"] for pair in pairs for result in pair.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
