"""Two or more servers on the same prompts in one run, one after the other, and the ratios between them.

    python -m octavo.benchmarks.compare --tokenizer MODEL --pairs 3 --case c1 --case c8 --case mine=2,16,512,64,0 \\
        --server "octavo=octavo serve MODEL --port {port}@http://127.0.0.1:{port}" \\
        --server "other=other-server MODEL --port {port}@http://127.0.0.1:{port}" \\
        --server "third=@http://127.0.0.1:8103" --extra-body 'third={"ignore_eos": null}'

In each pair every server is started, measured on all cases and stopped (one without a command runs already, and is left
running); every second pair goes in reverse order, so that a machine that gets slower or faster meanwhile favours
nobody. The ratios are those of the first server to each other one within a pair; what is shown is their median and
their range. Tables are in Markdown; the last line of stdout is JSON.
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
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from octavo.benchmarks import serving
from octavo.benchmarks.serving import BenchmarkError

FIGURES = {
    "output_throughput": "output tok/s",
    "median_ttft_ms": "TTFT p50 ms",
    "median_itl_ms": "ITL p50 ms",
    "p99_itl_ms": "ITL p99 ms",
    "median_tpot_ms": "TPOT p50 ms",
}
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Case:
    """A load: how many requests, how many of them at a time, and their lengths in tokens."""

    max_concurrency: int
    num_prompts: int
    input_len: int
    output_len: int
    shared_prefix_len: int


CASES = {
    "c1": Case(1, 8, 256, 128, 0),
    "c8": Case(8, 64, 256, 128, 0),
    "c32": Case(32, 64, 256, 128, 0),
    "long": Case(4, 16, 2048, 32, 0),
    "prefix": Case(8, 32, 1088, 64, 1024),
    "b1": Case(1, 4, 128, 64, 0),
    "b8": Case(8, 24, 128, 64, 0),
}


@dataclass(frozen=True, slots=True)
class Peer:
    """A server: the command that starts it (empty where it runs already), and where it answers."""

    name: str
    command: str
    url: str


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers /health: its address, and process and launch time (time.perf_counter) if it is ours."""

    url: str
    process_id: int | None = None
    launched_s: float = 0.0


def case(text: str) -> tuple[str, Case]:
    """Argument type: a name of CASES, or NAME=CONCURRENCY,REQUESTS,INPUT,OUTPUT,SHARED."""
    name, equals, sizes = text.partition("=")
    if not equals and name in CASES:
        return name, CASES[name]
    *counts, shared_prefix_len = sizes.split(",")
    max_concurrency, num_prompts, input_len, output_len = map(serving.count, counts)
    found = Case(max_concurrency, num_prompts, input_len, output_len, serving.count_or_zero(shared_prefix_len))
    if not name or found.shared_prefix_len >= input_len:
        raise ValueError
    return name, found


def peer(text: str) -> Peer:
    """Argument type: NAME=COMMAND@URL."""
    name, _, rest = text.partition("=")
    command, _, url = rest.rpartition("@")
    if not (name and url.startswith(("http://", "https://"))):
        raise ValueError
    return Peer(name, command.strip(), url)


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
def running(peer: Peer, ready_timeout_s: float) -> Iterator[Running]:
    """Starts the server, gives it once /health answers 200, and stops it with all its processes.

    `{port}` in command and URL is a free port. A server without a command is given as it is. Raises BenchmarkError with
    the end of its output if it does not come up.
    """
    if not peer.command:
        yield Running(peer.url)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = peer.url.replace("{port}", port)
    with tempfile.TemporaryFile() as log:
        launched_s = time.perf_counter()
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
            yield Running(url, process.pid, launched_s)
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


def resident_bytes(process_id: int) -> int | None:
    """Memory of a process and its descendants, shared pages counted in each; None where there is no /proc."""
    num_pages: dict[int, int] = {}
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name, which may hold anything: state, parent, ..., resident pages as the 22nd.
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        num_pages[int(stat.parent.name)] = int(fields[21])
        children[int(fields[1])].append(int(stat.parent.name))
    tree = [process_id]
    for one in tree:
        tree.extend(children[one])
    return sum(num_pages.get(one, 0) for one in tree) * os.sysconf("SC_PAGE_SIZE") if num_pages else None


async def drive(args: argparse.Namespace, peer: Peer, server: Running, number: int) -> dict[str, Any]:
    """One server's results in pair `number`; prompts depend on seed, pair and case, and not on the server.

    `start_s` is the time from the launch to the end of a first completion, `resident_bytes` is taken right after it and
    after each case; both are null for a server that ran before. Raises BenchmarkError if it gives no completion.
    """
    extra_body = dict(args.extra_body).get(peer.name, {})
    async with serving.make_client(server.url, None, args.timeout) as client:
        model = dict(args.model).get(peer.name) or await serving.find_model(client)
        (body,) = serving.make_bodies(
            ["The capital of France is"],
            endpoint=args.endpoint,
            model=model,
            output_len=16,
            temperature=args.temperature,
            ignore_eos=True,
            extra_body=extra_body,
        )
        output = await serving.send(client, args.endpoint, body)
    if output.error is not None:
        raise BenchmarkError(f"{peer.name} gives no completion: {output.error}")
    found: dict[str, Any] = {"start_s": None, "resident_bytes": None, "cases": {}}
    if server.process_id is not None:
        found["start_s"] = time.perf_counter() - server.launched_s
        found["resident_bytes"] = resident_bytes(server.process_id)
    codec = serving.FolderCodec(args.tokenizer)
    for name, case in args.case:
        flags = argparse.Namespace(**vars(args), **asdict(case), percentiles=[50.0, 95.0, 99.0])
        warmups, prompts = [
            await serving.make_prompts(codec, count, flags, salt=f"{args.seed}/{number}/{name}/{kind}")
            for kind, count in (("warmup", args.num_warmups), ("prompt", case.num_prompts))
        ]
        # A client of its own: a server may just be closing what has been idle while the prompts were made.
        async with serving.make_client(server.url, None, args.timeout) as client:
            result = await serving.measure(
                client,
                flags,
                model=model,
                warmups=warmups,
                prompts=prompts,
                max_concurrency=case.max_concurrency,
                extra_body=extra_body,
            )
        result["resident_bytes"] = None if server.process_id is None else resident_bytes(server.process_id)
        found["cases"][name] = result
        figures = ", ".join(f"{title} {_cell(spread([result[key]]))}" for key, title in FIGURES.items())
        errors = "".join(f"; {error}" for error in result["errors"])
        print(f"pair {number + 1} of {args.pairs}, {peer.name}, {name}: {figures}{errors}", file=sys.stderr)
    return found


def run(args: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """Pairs in order, each of server name -> what `drive` gives, in the order of the flags. Raises BenchmarkError."""
    pairs = []
    for number in range(args.pairs):
        results = {}
        for one in args.server if number % 2 == 0 else reversed(args.server):
            print(f"pair {number + 1} of {args.pairs}, {one.name}: starting", file=sys.stderr)
            with running(one, args.ready_timeout) as server:
                results[one.name] = asyncio.run(drive(args, one, server, number))
        pairs.append({one.name: results[one.name] for one in args.server})
    return pairs


def ratios(pairs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Case -> other server -> figure -> spread over the pairs of first server / other server.

    A pair in which one of the two lacks the figure, because its run failed, is left out.
    """
    first, *others = pairs[0]

    def ratio(pair: dict[str, dict[str, Any]], other: str, case: str, key: str) -> float | None:
        mine, theirs = (pair[name]["cases"][case][key] for name in (first, other))
        return mine / theirs if mine and theirs else None

    return {
        case: {
            other: {key: spread(ratio(pair, other, case, key) for pair in pairs) for key in FIGURES} for other in others
        }
        for case in pairs[0][first]["cases"]
    }


def spread(values: Iterable[float | None]) -> dict[str, float]:
    """Median, min and max of the values that are known; empty where none is."""
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "min": min(known), "max": max(known)} if known else {}


def tables(pairs: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Start and memory of each server, figures of each case and server, and the ratios, as Markdown.

    A cell is the median over the pairs, with the range behind it where there are several.
    """
    first = next(iter(pairs[0]))
    cases = list(pairs[0][first]["cases"])
    starts, figures = [], []
    for name in pairs[0]:
        runs = [pair[name] for pair in pairs]
        memory = [[run, *run["cases"].values()] for run in runs]
        sizes_mib = [[one["resident_bytes"] / 2**20 for one in some if one["resident_bytes"]] for some in memory]
        starts.append(
            [
                name,
                _cell(spread(run["start_s"] for run in runs)),
                _cell(spread(sizes[0] for sizes in sizes_mib if sizes), 0),
                _cell(spread(max(sizes) for sizes in sizes_mib if sizes), 0),
            ]
        )
    for case in cases:
        for name in pairs[0]:
            results = [pair[name]["cases"][case] for pair in pairs]
            cells = [_cell(spread(result[key] for result in results)) for key in FIGURES]
            counts = [str(sum(result[key] for result in results)) for key in ("failed", "num_wrong_length")]
            figures.append([case, name, *cells, *counts])
    compared = [
        [case, f"{first} / {other}", *(_cell(one, 2) for one in by_figure.values())]
        for case, by_other in ratios(pairs).items()
        for other, by_figure in by_other.items()
    ]
    return "\n\n".join(
        (
            _markdown(["server", "start s", "RSS after start MiB", "RSS at most MiB"], starts),
            _markdown(["case", "server", *FIGURES.values(), "failed", "wrong length"], figures),
            _markdown(["case", "ratio", *FIGURES.values()], compared),
        )
    )


def _cell(spread: dict[str, float], num_digits: int = 1) -> str:
    if not spread:
        return "-"
    median, low, high = (f"{value:.{num_digits}f}" for value in spread.values())
    return median if low == high else f"{median} ({low} to {high})"


def _markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def make_parser() -> argparse.ArgumentParser:
    """All flags of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="compare", description="Measure servers in turn on the same prompts. The last line is JSON."
    )
    add = parser.add_argument
    add(
        "--server",
        type=peer,
        action="append",
        required=True,
        metavar="NAME=COMMAND@URL",
        help="{port}: a free port; without COMMAND the server runs already",
    )
    add(
        "--case",
        type=case,
        action="append",
        required=True,
        metavar="NAME[=CONCURRENCY,REQUESTS,INPUT,OUTPUT,SHARED]",
        help=f"a load, lengths in tokens; known by name: {', '.join(CASES)}",
    )
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
    add("--ready-timeout", type=serving.positive, default=600.0, metavar="S", help="for a start (default: %(default)s)")
    serving.add_common_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; 1 if a request failed or it could not be run, 2 for wrong flags (by SystemExit)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    names = [one.name for one in args.server]
    if len(names) < 2 or len(set(names)) < len(names):
        parser.error("--server: two or more, each with a name of its own")
    if len(dict(args.case)) < len(args.case):
        parser.error("--case: each needs a name of its own")
    for name, _ in [*args.model, *args.extra_body]:
        if name not in names:
            parser.error(f"--model, --extra-body: no server is called {name}")
    try:
        if args.save_result and not args.save_result.parent.is_dir():  # better said before the run than after
            raise BenchmarkError(f"{args.save_result.parent} is not a folder")
        pairs = run(args)
        print(tables(pairs))
        cases = {name: asdict(case) for name, case in args.case}
        line = json.dumps({"servers": names, "cases": cases, "pairs": pairs, "ratios": ratios(pairs)})
        print(line)
        if args.save_result:
            args.save_result.write_text(line + "\n")
    except (BenchmarkError, OSError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    results = [result for pair in pairs for server in pair.values() for result in server["cases"].values()]
    return 1 if any(result["failed"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
