"""The default model against transformers: greedy tokens in float32, log-probabilities of real text in bfloat16."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from octavo.server.config import EngineConfig
from octavo.server.engine.engine import Engine
from octavo.server.engine.request import FinishReason, GenerationRequest, SamplingParams, TokenLogprobs
from octavo.server.text.tokenizer import Tokenizer

MAX_LEN = 2048
NUM_TOKENS = 64
NEAR_TIE = 1e-4  # float32 logits this close may come in either order
WINDOW_LEN = 512
NUM_TOP = 5

SHORT = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 5, 8, 13,",
    "Q: What is 17 plus 25?\nA:",
    "The three states of matter are",
]
CODE = [
    "def fibonacci(n: int) -> int:\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, count(*) FROM orders\nWHERE",
    '{"id": 1, "name": "Ada", "tags": [',
    "<html>\n<head>\n\t<title>",
]
LANGUAGES = [
    "Il était une fois une petite fille qui",
    "Die Würde des Menschen ist",
    "Буря мглою небо кроет, вихри снежные",
    "床前明月光，",
    "吾輩は猫である。名前は",
    "السلام عليكم 🙂 👩‍🚀",
]
ONE_TOKEN = ["The", "\n", "<|im_start|>"]
CHATS = [
    [("user", "Hello!")],
    [("user", "What is gravity? Answer in one sentence.")],
    [("system", "You are a pirate."), ("user", "Where is the treasure?")],
    [("user", "My name is Ada."), ("assistant", "Hello, Ada!"), ("user", "What is my name?")],
    [("user", "Write a haiku about autumn.")],
    [("user", "Écris une liste de trois fruits."), ("assistant", "Pomme, poire, prune."), ("user", "Encore une.")],
]


def tokens_of(tokenizer: Tokenizer, name: str) -> list[int]:
    """A text in tests/data, which is in the public domain."""
    return tokenizer.encode((Path(__file__).parent / "data" / name).read_text())


def reference(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """30 prompts of 1 token up to what just leaves room for the output."""
    alice, declaration = tokens_of(tokenizer, "alice.txt"), tokens_of(tokenizer, "declaration.txt")
    one_token = [tokenizer.encode(text) for text in ONE_TOKEN]
    assert [len(tokens) for tokens in one_token] == [1] * len(one_token)
    return [
        *one_token,
        *(tokenizer.encode(text) for text in SHORT + CODE + LANGUAGES),
        *(tokenizer.encode_chat([{"role": role, "content": text} for role, text in chat]) for chat in CHATS),
        *(declaration[:200], declaration[-300:], alice[:513], alice[-1000:], alice[: MAX_LEN - NUM_TOKENS]),
    ]


def generate(engine: Engine, which: dict[int, list[int]]) -> dict[int, list[int]]:
    """Greedy outputs, by the prompts' keys, of prompts that are added at once and must then also run at once."""
    out: dict[int, list[int]] = {key: [] for key in which}
    num_running = 0
    for key, prompt in which.items():
        engine.add(GenerationRequest(str(key), prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)))
    while engine.has_work:
        for delta in engine.step():
            assert delta.finish_reason in (None, FinishReason.LENGTH)
            out[int(delta.request_id)] += delta.token_ids
        num_running = max(num_running, engine.stats().num_running)
    assert len(which) == 1 or num_running == len(which)
    return out


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    made = Engine(
        EngineConfig(str(smollm2), device="cpu", dtype="float32", max_model_len=MAX_LEN, enable_prefix_caching=False)
    )
    # Unpaced: how many prompts run at once does not depend on how fast the machine is.
    made._pacer.max_prefill_tokens = lambda *_: 512  # type: ignore[method-assign]
    return made


@pytest.fixture(scope="module")
def which(smollm2: Path) -> dict[int, list[int]]:
    """The prompts, numbered."""
    return dict(enumerate(prompts(Tokenizer(smollm2))))


@pytest.fixture(scope="module")
def alone(engine: Engine, which: dict[int, list[int]]) -> dict[int, list[int]]:
    """The outputs of the prompts, each run by itself."""
    return {key: generate(engine, {key: prompt})[key] for key, prompt in which.items()}


@pytest.mark.timeout(600)  # about 70 s on two idle cores, but steps of one token suffer much from busy ones
def test_greedy_tokens_are_those_of_transformers(
    smollm2: Path, which: dict[int, list[int]], alone: dict[int, list[int]]
) -> None:
    model = reference(smollm2, torch.float32)
    wrong: list[str] = []
    near_ties: list[str] = []
    for key, prompt in which.items():
        assert len(alone[key]) == NUM_TOKENS
        with torch.no_grad():  # one pass over prompt and output: row i is what precedes output token i
            logits = model(torch.tensor([prompt + alone[key]]), logits_to_keep=NUM_TOKENS + 1).logits[0, :-1]
        behind = logits.max(-1).values - logits.gather(-1, torch.tensor(alone[key])[:, None])[:, 0]
        for index in behind.nonzero()[:, 0].tolist():
            found = f"prompt {key}, output token {index}: {behind[index]:.1e} below the best logit"
            (near_ties if behind[index] < NEAR_TIE else wrong).append(found)
    print(f"{len(near_ties)} near ties of {len(which) * NUM_TOKENS} tokens", *near_ties, sep="\n")
    assert not wrong
    assert len(which) >= 30


def test_greedy_tokens_are_the_same_under_load(
    engine: Engine, which: dict[int, list[int]], alone: dict[int, list[int]]
) -> None:
    assert generate(engine, which) == alone


@pytest.fixture(scope="module")
def windows(smollm2: Path) -> list[list[int]]:
    """A few thousand tokens of English prose, in pieces of WINDOW_LEN and what is left of each text."""
    tokenizer = Tokenizer(smollm2)
    texts = [tokens_of(tokenizer, name) for name in ("declaration.txt", "alice.txt")]
    return [text[i : i + WINDOW_LEN] for text in texts for i in range(0, len(text), WINDOW_LEN)]


@pytest.fixture(scope="module")
def scored(smollm2: Path, windows: list[list[int]]) -> list[list[TokenLogprobs]]:
    """Prompt logprobs in bfloat16 of every window, the first token left out; the engine computes nothing else."""
    engine = Engine(EngineConfig(str(smollm2), device="cpu", dtype="bfloat16", max_model_len=MAX_LEN))
    out: dict[int, list[TokenLogprobs]] = {}
    for i, window in enumerate(windows):
        engine.add(GenerationRequest(str(i), window, SamplingParams(max_tokens=0, prompt_logprobs=NUM_TOP * (i % 2))))
    while engine.has_work:
        for delta in engine.step():
            assert (delta.token_ids, delta.finish_reason) == ([], FinishReason.LENGTH)
            assert delta.prompt_logprobs is not None and delta.prompt_logprobs[0] is None
            out[int(delta.request_id)] = [entry for entry in delta.prompt_logprobs if entry is not None]
    return [out[i] for i in range(len(windows))]


def reference_logprobs(folder: Path, dtype: torch.dtype, windows: list[list[int]]) -> torch.Tensor:
    """Logprobs [tokens] of all tokens but each window's first, in float32."""
    model = reference(folder, dtype)
    parts = []
    for window in windows:
        tokens = torch.tensor([window])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].float().log_softmax(-1)
        parts.append(logprobs.gather(-1, tokens[0, 1:, None])[:, 0])
    return torch.cat(parts)


def test_bfloat16_logprobs_are_as_close_to_float32_as_those_of_transformers(
    smollm2: Path, windows: list[list[int]], scored: list[list[TokenLogprobs]]
) -> None:
    exact = reference_logprobs(smollm2, torch.float32, windows)
    theirs = reference_logprobs(smollm2, torch.bfloat16, windows)
    ours = torch.tensor([entry.logprob for entries in scored for entry in entries])
    assert len(ours) == len(exact) > 4000
    for name, of in (("mean", torch.mean), ("p99", lambda distances: distances.quantile(0.99))):
        our_distance, their_distance = of((ours - exact).abs()).item(), of((theirs - exact).abs()).item()
        print(f"{name} distance from float32: ours {our_distance:.5f}, transformers' bfloat16 {their_distance:.5f}")
        assert our_distance <= 1.1 * their_distance, name
    perplexity, exact_perplexity = (math.exp(-logprobs.mean()) for logprobs in (ours, exact))
    print(f"perplexity over {len(ours)} tokens: ours {perplexity:.3f}, float32 {exact_perplexity:.3f}")
    assert 2 < exact_perplexity < 30
    assert perplexity == pytest.approx(exact_perplexity, rel=0.01)


def test_top_prompt_logprobs_agree_with_the_tokens(windows: list[list[int]], scored: list[list[TokenLogprobs]]) -> None:
    num_in_top = 0
    for i, (window, entries) in enumerate(zip(windows, scored, strict=True)):
        assert [entry.token_id for entry in entries] == window[1:]
        for entry in entries:
            top = dict(entry.top)
            assert len(top) == len(entry.top) == NUM_TOP * (i % 2)
            assert all(better >= worse for better, worse in pairwise(top.values()))
            assert sum(map(math.exp, (top | {entry.token_id: entry.logprob}).values())) < 1 + 1e-5
            if entry.token_id in top:
                num_in_top += 1
                assert top[entry.token_id] == entry.logprob
            elif top:
                assert entry.logprob <= min(top.values())
    assert num_in_top > 1000
