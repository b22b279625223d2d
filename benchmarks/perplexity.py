"""Perplexity of a model on fixed texts: what quantisation costs in quality.

    python -m octavo.benchmarks.perplexity MODEL --quantization none,nf4,fp4,int4

The engine scores the texts as prompts, in windows, each of which begins without context. The last line of stdout is
JSON.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from octavo.models.config import ConfigError
from octavo.server.config import EngineConfig
from octavo.server.engine.engine import Engine
from octavo.server.engine.request import GenerationRequest, SamplingParams
from octavo.server.errors import OctavoError
from octavo.server.local_model import load_tokenizer
from octavo.server.pull import resolve_model

TEXTS = [Path(__file__).resolve().parent.parent / "tests" / "data" / name for name in ("declaration.txt", "alice.txt")]
WINDOW_LEN = 1024  # tokens


def windows(model: Path, texts: list[Path]) -> list[list[int]]:
    """The texts' tokens in pieces of WINDOW_LEN, and what is left of each."""
    tokenizer = load_tokenizer(model)
    tokens = [tokenizer.encode(text.read_text(encoding="utf-8")) for text in texts]
    return [text[at : at + WINDOW_LEN] for text in tokens for at in range(0, len(text), WINDOW_LEN)]


def measure(config: EngineConfig, prompts: list[list[int]]) -> dict[str, Any]:
    """Perplexity over all tokens but each prompt's first, and the bytes of the weights."""
    engine = Engine(config)
    for index, prompt in enumerate(prompts):
        engine.add(GenerationRequest(str(index), prompt, SamplingParams(max_tokens=0, prompt_logprobs=0)))
    logprobs: list[float] = []
    while engine.has_work:
        for delta in engine.step():
            logprobs += [entry.logprob for entry in delta.prompt_logprobs or [] if entry is not None]
    return {
        "model": Path(config.model).name,
        "quantization": config.quantization,
        "dtype": engine.info.dtype,
        "num_tokens": len(logprobs),
        "perplexity": math.exp(-math.fsum(logprobs) / len(logprobs)),
        "weight_bytes": engine.info.weight_bytes,
    }


def make_parser() -> argparse.ArgumentParser:
    """All flags of this benchmark."""
    parser = argparse.ArgumentParser(description="Perplexity on fixed texts. The last line is JSON.")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a folder, a GGUF file or a pulled name")
    parser.add_argument("--quantization", default="none", metavar="Q,Q", help="none, nf4, fp4, int4 (default: none)")
    parser.add_argument("--quantize-lm-head", action="store_true", help="where --quantization is not none")
    parser.add_argument("--dtype", default="auto", help="as of octavo serve (default: auto)")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=TEXTS, metavar="FILE", help="(default: two of the tests')"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if it could not be run, 2 for wrong flags (by SystemExit)."""
    args = make_parser().parse_args(argv)
    results = []
    try:
        model = resolve_model(args.model)
        prompts = windows(model, args.text)
        print(f"{'quantization':<14}{'perplexity':>12}{'of the first':>14}{'weights MB':>12}")
        for name in args.quantization.split(","):
            wanted = None if name == "none" else name
            config = EngineConfig(
                model=str(model),
                dtype=args.dtype,
                quantization=wanted,
                quantize_lm_head=args.quantize_lm_head and wanted is not None,
                max_model_len=WINDOW_LEN + 1,
            )
            results.append(measure(config, prompts))
            found, first = results[-1], results[0]
            print(
                f"{name:<14}{found['perplexity']:>12.3f}{found['perplexity'] / first['perplexity']:>14.4f}"
                f"{found['weight_bytes'] / 1e6:>12.1f}",
                flush=True,
            )
    except (ConfigError, OctavoError, OSError) as error:
        print(f"perplexity: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
