"""The `octavo` command: its verbs and flags, and errors that a person can act on.

The flags of `octavo serve` are the fields of `ServerConfig`. Knows nothing of HTTP or models: each verb imports what it
runs only when it runs, so that `octavo --help` answers at once.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from difflib import get_close_matches
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_args, get_type_hints

from octavo import __version__
from octavo.server.config import ServerConfig
from octavo.server.errors import StartupError

BENCHMARKS = {"serve": "serving", "offline": "offline"}  # name on the command line -> module in octavo.benchmarks

# field -> (least, most) allowed value
RANGES: dict[str, tuple[float, float]] = {
    "max_model_len": (2, inf),
    "max_num_seqs": (1, inf),
    "max_num_batched_tokens": (1, inf),
    "kv_cache_memory_bytes": (1, inf),
    "gpu_memory_utilization": (0.05, 1),
    "tensor_parallel_size": (1, 8),
    "weight_scrub": (0, 0.5),
    "rank_check_interval": (0, inf),
    "audit": (0, 1),
    "step_deadline": (0, 86400),
    "max_recovery_time": (0, 86400),
    "max_faults": (0, 10**6),
    "max_device_faults": (0, 10**6),
    "canary_interval": (0, 86400),
    "nnodes": (1, 8),
    "node_rank": (0, 7),
    "master_port": (1, 65535),
    "port": (0, 65535),
    "seed": (0, 2**64 - 1),
    "max_num_queued_reqs": (0, inf),
    "max_num_queued_tokens": (1, inf),
    "max_logprobs": (0, 100),
    "shutdown_timeout": (0, 86400),
    "temperature": (0, 2),
    "max_tokens": (1, inf),
}
MACHINES = {"nnodes": "WORLD_SIZE", "node_rank": "RANK", "master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT"}
_NUMBER = re.compile(r"(-?[0-9]{1,20}(?:\.[0-9]{1,20})?)([kKmMgGtT]?)")
_METRICS_PREFIX = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of `octavo serve`, as the parser, the help and the README show it."""

    field: str
    type: type  # bool, int, float or str
    repeatable: bool
    default: str  # as text; empty where `help` tells it
    help: str
    choices: tuple[Any, ...] | None
    metavar: str | None

    @property
    def name(self) -> str:
        """The flag as it is typed: `--max-num-seqs`."""
        return "--" + self.field.replace("_", "-")


def parse_int(text: str) -> int:
    """A whole number; suffixes k, m, g, t count in thousands and K, M, G, T in 1024s. Raises ArgumentTypeError."""
    if match := _NUMBER.fullmatch(text):
        number, suffix = match.groups()
        power = " kmgt".index(suffix.lower() or " ")
        value = Decimal(number) * (1000 if suffix.islower() else 1024) ** power
        if value == int(value):
            return int(value)
    raise argparse.ArgumentTypeError(f"not a whole number: {text!r} (suffixes: 1k = 1000, 1K = 1024, also m M g G)")


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None


def _parse_str(text: str) -> str:
    if not text:  # most often an unset shell variable
        raise argparse.ArgumentTypeError("must not be empty")
    return text


_PARSERS: dict[type, Callable[[str], Any]] = {int: parse_int, float: _parse_float, str: _parse_str}


def _checked(field: str, kind: type) -> Callable[[str], Any]:
    """Converter of a flag's text that also holds the field's range."""
    parse = _PARSERS[kind]
    low, high = RANGES.get(field, (-inf, inf))

    def convert(text: str) -> Any:
        value = parse(text)
        if field in RANGES and not low <= value <= high:  # also refuses NaN
            limit = f"between {low} and {high}" if high < inf else f"{low} or more"
            raise argparse.ArgumentTypeError(f"must be {limit}, not {text}")
        if field == "metrics_prefix" and not _METRICS_PREFIX.fullmatch(value):
            raise argparse.ArgumentTypeError(f"must be letters, digits, _ and : without a leading digit, not {text!r}")
        return value

    return convert


def serve_flags() -> list[Flag]:
    """The flags of `octavo serve`, in the order of `ServerConfig`'s fields."""
    hints = get_type_hints(ServerConfig)
    flags = []
    for f in fields(ServerConfig):
        if f.metadata.get("positional") or f.metadata.get("hidden"):
            continue
        hint = hints[f.name]
        repeatable = getattr(hint, "__origin__", None) is tuple
        kind = get_args(hint)[0] if repeatable or isinstance(hint, UnionType) else hint
        flags.append(
            Flag(
                field=f.name,
                type=kind,
                repeatable=repeatable,
                default=_default_text(f.default),
                help=f.metadata["help"],
                choices=f.metadata.get("choices"),
                metavar=f.metadata.get("metavar"),
            )
        )
    return flags


def _default_text(default: Any) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage before it."""

    def __init__(self, **options: Any) -> None:
        # An absent flag leaves no attribute: defaults have one home, the dataclass.
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the command with status 2."""
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")

    def refuse_unknown(self, arguments: list[str]) -> NoReturn:
        """Names the first argument that nothing took and the flag that may have been meant. Status 2."""
        unknown = next((argument for argument in arguments if argument.startswith("-")), arguments[0]).split("=")[0]
        near = get_close_matches(unknown, self._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
        self.error(f"unknown {'flag' if unknown.startswith('-') else 'argument'} {unknown}; {hint}")


def build_parser() -> _Parser:
    """The parser of the whole command. What it parses holds `run`, the verb's function, and `parser`, the verb's."""
    parser = _Parser(prog="octavo", description="Octavo, an LLM inference server.")
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", title="commands")

    def verb(name: str, run: Callable[[argparse.Namespace], int], help: str, usage: str, example: str) -> _Parser:
        sub: _Parser = verbs.add_parser(
            name,
            help=help,
            description=help,
            usage=f"octavo {name} {usage}",
            epilog=f"example:\n  octavo {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    serve = verb(
        "serve",
        _serve,
        "serve a model over the OpenAI API",
        "[MODEL] [FLAGS]",
        "./my-model --port 9000 --max-num-seqs 128 --kv-cache-memory-bytes 4G",
    )
    serve.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a Hugging Face folder, a GGUF file or a pulled name (default: the default model)",
    )
    for flag in serve_flags():
        _add_flag(serve, flag)
    serve.add_argument("--test-faults", action="store_true", help=argparse.SUPPRESS)

    pull = verb(
        "pull", _pull, "fetch a model once and print its folder", "[NAME]", "HuggingFaceTB/SmolLM2-360M-Instruct"
    )
    pull.add_argument("name", nargs="?", metavar="NAME", help="ORG/NAME on the hub (default: the default model)")

    quantize = verb(
        "quantize",
        _quantize,
        "write a 4-bit copy of a checkpoint that transformers loads, too",
        "SRC DST --format FORMAT",
        "./my-model ./my-model-nf4 --format nf4",
    )
    quantize.add_argument("source", metavar="SRC", help="a Hugging Face folder or a pulled name")
    quantize.add_argument("target", metavar="DST", help="the folder to make")
    quantize.add_argument(
        "--format", choices=("nf4", "int4"), required=True, help="nf4: bitsandbytes; int4: compressed-tensors"
    )
    quantize.add_argument(
        "--quantize-lm-head", action="store_true", default=False, help="quantise the output head as well"
    )

    quantize.add_argument(
        "--calibrate",
        metavar="FILE",
        nargs="?",
        const="",
        default=None,
        help="choose the codes for the inputs that the layers get on a text, or without FILE on what the model writes",
    )

    chat = verb("chat", _chat, "talk to a running server", "[FLAGS]", '--system "Answer in one sentence."')
    chat.add_argument("--base-url", metavar="URL", default="http://127.0.0.1:8000", help="default: %(default)s")
    chat.add_argument("--model", metavar="NAME", default=None, help="default: the first that the server lists")
    chat.add_argument(
        "--api-key", metavar="KEY", default=os.environ.get("OCTAVO_API_KEY"), help="default: $OCTAVO_API_KEY"
    )
    chat.add_argument("--system", metavar="TEXT", default=None, help="system message")
    chat.add_argument(
        "--temperature", metavar="X", type=_checked("temperature", float), default=None, help="0: greedy; up to 2"
    )
    chat.add_argument(
        "--max-tokens", metavar="N", type=_checked("max_tokens", int), default=None, help="most tokens in an answer"
    )

    bench = verb(
        "bench",
        _bench,
        "measure a running server (serve) or the engine alone (offline)",
        "{serve,offline} [ARGUMENTS]",
        "serve --base-url http://127.0.0.1:8000",
    )
    bench.add_argument("benchmark", metavar="BENCHMARK", choices=BENCHMARKS, help="each has its own --help")
    return parser


def _add_flag(parser: argparse.ArgumentParser, flag: Flag) -> None:
    help = flag.help.replace("%", "%%") + (f" (default: {flag.default})" if flag.default else "")
    if flag.type is bool:
        parser.add_argument(flag.name, action=argparse.BooleanOptionalAction, help=help)
        return
    parser.add_argument(
        flag.name,
        type=_checked(flag.field, flag.type),
        action="append" if flag.repeatable else "store",
        choices=flag.choices,
        metavar=flag.metavar or (None if flag.choices else {int: "N", float: "X"}.get(flag.type, "TEXT")),
        help=help,
    )


def _serve(args: argparse.Namespace) -> int:
    from octavo.server.pull import resolve_model
    from octavo.server.serve import run

    given = {flag.field: getattr(args, flag.field) for flag in serve_flags() if hasattr(args, flag.field)}
    if faults := os.environ.get("OCTAVO_FAULTS"):
        if not hasattr(args, "test_faults"):
            raise StartupError("OCTAVO_FAULTS is set, which is for tests alone: with --test-faults")
        given["faults"] = faults
    if "api_key" in given:
        given["api_key"] = tuple(given["api_key"])
    given = _machines(given)
    if given.get("nnodes", 1) == 1 and (others := [name for name in MACHINES if name != "nnodes" and name in given]):
        args.parser.error(f"--{others[0].replace('_', '-')} is for several machines, but --nnodes is 1")
    return run(ServerConfig(model=str(resolve_model(getattr(args, "model", None))), **given))


def _machines(given: dict[str, Any]) -> dict[str, Any]:
    """The flags with what the environment says of a group of several machines. Raises StartupError."""
    types = {flag.field: flag.type for flag in serve_flags()}
    found: dict[str, Any] = {}
    for field, variable in MACHINES.items():
        if text := os.environ.get(variable):
            try:
                found[field] = _checked(field, types[field])(text)
            except argparse.ArgumentTypeError as error:
                raise StartupError(f"{variable}: {error}") from None
        if (found | given).get("nnodes", 1) == 1:  # whatever else the environment says
            return given
    found |= given
    nnodes, node_rank, num_ranks = found["nnodes"], found.get("node_rank", 0), found.get("tensor_parallel_size", 1)
    if node_rank >= nnodes:
        raise StartupError(f"--node-rank is {node_rank}, but --nnodes {nnodes}: they are numbered from 0")
    if num_ranks < nnodes:
        raise StartupError(f"--tensor-parallel-size is {num_ranks}, but --nnodes {nnodes}: each needs a rank")
    if (text := os.environ.get("LOCAL_WORLD_SIZE", "1")) != "1":
        raise StartupError(f"LOCAL_WORLD_SIZE is {text}, but one octavo serve starts all ranks of a machine")
    return found


def _pull(args: argparse.Namespace) -> int:
    from octavo.server.pull import DEFAULT_MODEL, pull

    print(pull(getattr(args, "name", DEFAULT_MODEL)))
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from octavo.server.pull import resolve_model
    from octavo.server.quantize import run

    return run(resolve_model(args.source), Path(args.target), args.format, args.quantize_lm_head, args.calibrate)


def _chat(args: argparse.Namespace) -> int:
    from octavo.server.chat import chat

    return chat(
        args.base_url,
        model=args.model,
        api_key=args.api_key,
        system=args.system,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
    )


def _bench(args: argparse.Namespace) -> int:
    status: int = importlib.import_module(f"octavo.benchmarks.{BENCHMARKS[args.benchmark]}").main(args.rest)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status. Raises SystemExit(2) on wrong usage, as argparse does."""
    own, rest = list(sys.argv[1:] if argv is None else argv), []
    if own[:1] == ["bench"]:  # a benchmark parses its arguments itself
        own, rest = own[:2], own[2:]
    parser = build_parser()
    args, unknown = parser.parse_known_args(own, argparse.Namespace(rest=rest))
    if unknown:
        getattr(args, "parser", parser).refuse_unknown(unknown)
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    try:
        status: int = args.run(args)
        return status
    except StartupError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
