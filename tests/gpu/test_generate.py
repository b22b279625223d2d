"""A whole model on Triton's kernels, engine and HTTP included: the CPU's tokens, and its logits but for rounding.

Two layers, 9 query heads on 3 KV heads. Without a GPU the kernels are compiled as for one and executed on the CPU, a
launch at a time, so everything here is small.
"""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from api_fakes import make_tokenizer
from safetensors.torch import load_file, save_file
from servers import ROOT, serving

from octavo.kernels import backend
from octavo.kernels.cpu.library import library
from octavo.server.config import EngineConfig
from octavo.server.engine.engine import Engine
from octavo.server.engine.request import GenerationRequest, SamplingParams

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="whole models run on what the compiler emits, here and on GPUs"
)
NATIVE = "torch" if library() is None else "native"
LIMITS = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 32, "kv_cache_memory_bytes": 1 << 22}
TOLERANCE = 1e-4
LONG = [random.Random(0).randrange(256) for _ in range(70)]  # three chunks, the first two in full blocks
SHORT = LONG[::-14]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 checkpoint cut to two layers, with a tokenizer."""
    made = tmp_path_factory.mktemp("generate") / "tiny"
    make_tokenizer(made)
    shutil.copytree(tiny_checkpoint("smollm2"), made, dirs_exist_ok=True)
    config = made / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    tensors = load_file(made / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if ".layers.2." not in k}, made / "model.safetensors")
    return made


def ask(folder: Path, log_path: Path, device: str, dtype: str, **environment: str) -> list[dict[str, Any]]:
    """Answers to two requests of a server: a long prompt beside short ones, then one that begins like it."""
    flags = [text for name, value in LIMITS.items() for text in ("--" + name.replace("_", "-"), str(value))]
    flags += ["--device", device, "--dtype", dtype, "--enable-prompt-tokens-details"]
    options = {"temperature": 0, "ignore_eos": True, "logprobs": 20, "return_tokens_as_token_ids": True}
    with serving(folder, log_path, *flags, **environment) as server:
        bodies: list[dict[str, Any]] = [
            {"prompt": [LONG, SHORT, SHORT[:2]], "max_tokens": 3},
            {"prompt": [*LONG[:67], 1, 2], "max_tokens": 2},
        ]
        return [httpx.post(f"{server.url}/v1/completions", json=body | options, timeout=200).json() for body in bodies]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", TOLERANCE), pytest.param("bfloat16", 0.1, marks=pytest.mark.slow)]
)
def test_http_answers_are_those_of_the_cpu(dtype: str, tolerance: float, folder: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    device = backend.device().type
    got = ask(folder, tmp_path / "got", device, dtype, OCTAVO_KERNELS="triton", PYTHONPATH=path)
    want = ask(folder, tmp_path / "want", "cpu", "float32", OCTAVO_KERNELS=NATIVE)
    num_tokens = 0
    for ours, theirs in zip(got, want, strict=True):
        assert ours["usage"] == theirs["usage"]
        for choice, other in zip(ours["choices"], theirs["choices"], strict=True):
            columns = (part["logprobs"][name] for part in (choice, other) for name in ("tokens", "top_logprobs"))
            for token, top, other_token, other_top in zip(*columns, strict=True):
                common = top.keys() & other_top.keys()
                assert len(common) >= 18
                assert {key: top[key] for key in common} == pytest.approx(
                    {key: other_top[key] for key in common}, abs=tolerance
                )
                if token != other_token:  # bfloat16 may take the other one of two that are as good; then they part
                    assert dtype == "bfloat16" and top[token] - top[other_token] < tolerance
                    break
                num_tokens += 1
    assert num_tokens == 11 if dtype == "float32" else num_tokens >= 4
    assert got[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 64


def logits(folder: Path, dtype: str, kernels: str, device: str) -> torch.Tensor:
    """Of every position of a prompt in two chunks and of three outputs, which are the same whatever the logits."""
    backend.select(kernels, device)
    engine = Engine(EngineConfig(str(folder), device=device, dtype=dtype, **LIMITS))  # type: ignore[arg-type]
    found: list[torch.Tensor] = []
    compute = engine.runner.model.logits

    def watched(hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        found.append(compute(hidden, out).to("cpu", copy=True))
        return out

    engine.runner.model.logits = watched  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=3, temperature=0.0, allowed_token_ids=(7,), prompt_logprobs=0)
    engine.add(GenerationRequest("a", LONG[:36], params))
    while engine.has_work:
        engine.step()
    return torch.cat(found)


def test_logits(folder: Path) -> None:
    device = backend.device().type
    try:
        exact, cpu = (logits(folder, dtype, NATIVE, "cpu") for dtype in ("float32", "bfloat16"))
        ours = [logits(folder, dtype, "triton", device) for dtype in ("float32", "bfloat16")]
    finally:
        backend.select("triton", device)
    assert len(exact) == 35 + 3
    torch.testing.assert_close(ours[0], exact, atol=TOLERANCE, rtol=0)
    for name, of in (("mean", torch.mean), ("p99", lambda distances: distances.quantile(0.99))):
        our_distance, cpu_distance = (of((found - exact).abs()).item() for found in (ours[1], cpu))
        print(f"{name} distance from float32: {our_distance:.5f}, of the CPU's bfloat16 {cpu_distance:.5f}")
        assert 0 < our_distance <= 1.2 * cpu_distance, name
