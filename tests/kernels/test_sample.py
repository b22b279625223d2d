"""sample against a float64 reading of the same rules, Philox against its published answers, and the distribution."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from octavo.kernels import reference
from octavo.kernels.sample import EDIT, NOT_FINITE, ROW, Sampled, sample

NO_EDITS, ALL_ALLOWED = np.array([], EDIT), np.array([], np.int32)
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "num_top": -1, "target": -1}
PLAIN = {**GREEDY, "temperature": 1.0}


def rows_of(*rows: dict[str, Any]) -> np.ndarray:
    out = np.zeros(len(rows), ROW)
    for i, row in enumerate(rows):
        for name, value in row.items():
            out[name][i] = value
    return out


def draw(
    logits: torch.Tensor,
    rows: np.ndarray,
    tokens: torch.Tensor | None = None,
    edits: np.ndarray = NO_EDITS,
    allowed: np.ndarray = ALL_ALLOWED,
) -> Sampled:
    tokens = torch.zeros((1, 1), dtype=torch.int32) if tokens is None else tokens
    return sample(logits.float(), rows, tokens, edits, allowed)


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ("00000000 00000000 00000000 00000000", 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: int, want: str) -> None:
    def words(text: str) -> np.ndarray:
        return np.array([int(word, 16) for word in text.split()], np.uint32)

    assert reference.philox(words(counter), key).tolist() == words(want).tolist()


@pytest.mark.parametrize("vocab", [1, 2, 17, 63, 64, 1000, 49152])
def test_equals_the_reference(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    count = 400 if vocab < 2000 else 60
    logits = torch.from_numpy(rng.normal(0, 3, (count, vocab)).astype(np.float32))
    logits[::7] = logits[::7].round()  # ties
    logits[::11, : vocab // 2] = -torch.inf
    tokens = torch.from_numpy(rng.integers(0, vocab, (4, 50)).astype(np.int32))
    edits = np.array(list(zip(rng.integers(0, vocab, 30), rng.normal(0, 5, 30), strict=True)), EDIT)
    allowed = np.unique(rng.integers(0, vocab, 40)).astype(np.int32)
    rows = rows_of(
        *(
            {
                "seed": rng.integers(0, 2**63),
                "temperature": rng.choice([0.0, 0.01, 0.7, 1.0, 2.0]),
                "top_p": rng.choice([1.0, 1.0, 0.95, 0.5, 1e-6]),
                "min_p": rng.choice([0.0, 0.0, 0.05, 0.9, 1.0]),
                "top_k": rng.choice([0, 0, 1, 5, 50, vocab, vocab + 9]),
                "presence_penalty": rng.choice([0.0, 0.7, -2.0]),
                "frequency_penalty": rng.choice([0.0, 0.3]),
                "repetition_penalty": rng.choice([1.0, 1.3, 0.7]),
                "slot": rng.integers(0, 4),
                "prompt_len": 20,
                "total_len": rng.integers(20, 51),
                "choice_index": rng.integers(0, 4),
                "num_top": min(vocab, int(rng.choice([-1, 0, 1, 20]))),
                "target": rng.integers(0, vocab) if rng.random() < 0.1 else -1,
                "edits_begin": 0,
                "edits_end": rng.choice([0, 30]),
                "allowed_begin": 0,
                "allowed_end": len(allowed) if rng.random() < 0.2 else 0,
            }
            for _ in range(count)
        )
    )
    got = draw(logits, rows, tokens, edits, allowed)
    max_top = got.top_ids.shape[1]
    ids, logprobs, top_ids, top = reference.sample(logits.numpy(), rows, tokens.numpy(), edits, allowed, max_top)
    assert got.token_ids.tolist() == ids.tolist()
    np.testing.assert_allclose(got.logprobs, logprobs, atol=2e-5)
    for r in range(count):
        wanted = max(rows["num_top"][r], 0) if ids[r] >= 0 else 0
        assert got.top_ids[r, :wanted].tolist() == top_ids[r, :wanted].tolist()
        np.testing.assert_allclose(got.top_logprobs[r, :wanted], top[r, :wanted], atol=2e-5)
    for r in range(0, count, 13):  # a row alone: the very same bits
        alone = draw(logits[r : r + 1].contiguous(), rows[r : r + 1].copy(), tokens, edits, allowed)
        assert alone.token_ids[0] == got.token_ids[r] and alone.logprobs[0] == got.logprobs[r]


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.79}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.81}, [0.5, 0.3, 0.15, 0]),
        ({"min_p": 0.25}, [0.5, 0.3, 0.15, 0]),
        ({"top_k": 3, "top_p": 0.8, "min_p": 0.5}, [0.5, 0.3, 0, 0]),
    ],
)
def test_distribution(change: dict[str, Any], want: list[float]) -> None:
    """Chi-square over 20 000 fixed seeds, at the 1e-6 level with 3 degrees of freedom: 30.7."""
    count = 20_000
    # Spread over the vocabulary, so that vectors and the skipping of hopeless chunks take part.
    places = [3, 64, 250, 999]
    logits = torch.full((1000,), -30.0)
    logits[places] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    rows = rows_of(*({**PLAIN, **change, "seed": seed} for seed in range(count)))
    ids = draw(logits.expand(count, -1).contiguous(), rows).token_ids
    expected = np.array(want) / np.sum(want) * count
    got = np.array([(ids == place).sum() for place in places])
    assert got.sum() == count
    assert (got[expected == 0] == 0).all()
    live = expected > 0
    assert ((got[live] - expected[live]) ** 2 / expected[live]).sum() < 30.7


def test_noise_depends_on_seed_index_and_choice_alone() -> None:
    logits = torch.zeros((1, 5000))
    base = {**PLAIN, "seed": 1, "prompt_len": 4, "total_len": 9, "choice_index": 0}

    def token(**change: Any) -> int:
        return int(draw(logits, rows_of({**base, **change})).token_ids[0])

    assert token() == token(prompt_len=14, total_len=19)  # the output index counts, not the position
    others = [token(seed=2), token(seed=1 + 2**32), token(total_len=10), token(choice_index=1)]
    assert len({token(), *others}) == 5


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros((2, 40))
    logits[1, 20:30] = 1.0
    assert draw(logits, rows_of(GREEDY, GREEDY)).token_ids.tolist() == [0, 20]


def test_rows_without_a_token_say_why() -> None:
    logits = torch.zeros((4, 20))
    logits[0, 3] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    rows = rows_of(GREEDY, PLAIN, GREEDY, GREEDY)
    assert draw(logits, rows).token_ids.tolist() == [NOT_FINITE] * 3 + [0]


def test_bans_that_leave_nothing_are_not_applied() -> None:
    logits = torch.zeros((3, 20))
    logits[:, 7] = 1.0
    logits[2, 3:5] = -torch.inf
    ban = np.array([(i, -np.inf) for i in range(20)], EDIT)
    only = np.array([3, 4], np.int32)
    everything, restricted = {**GREEDY, "edits_end": 20}, {**GREEDY, "edits_end": 20, "allowed_end": 2}
    assert draw(logits, rows_of(everything, restricted, restricted), None, ban, only).token_ids.tolist() == [7, 3, 3]


def test_penalties_by_hand() -> None:
    tokens = torch.tensor([[1, 1, 2, 3, 3, 3]], dtype=torch.int32)  # prompt 1 1 2, output 3 3 3
    logits = torch.tensor([[0.0, 2.0, -2.0, 2.0]])
    place = {"prompt_len": 3, "total_len": 6}
    row = {**GREEDY, **place}
    # repetition 2: [0, 1, -4, 1]; presence 0.25 and frequency 0.5 on the output alone: [0, 1, -4, 1 - 0.25 - 1.5]
    assert draw(logits, rows_of({**row, "repetition_penalty": 2.0}), tokens).token_ids[0] == 1
    bias = np.array([(3, 1.0)], EDIT)
    for add, want in [(0.7, 1), (1.8, 3)]:
        bias["add"] = add
        change = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5, "edits_end": 1}
        assert draw(logits, rows_of({**row, **change}), tokens, bias).token_ids[0] == want


def test_wrong_arguments_are_named() -> None:
    logits, rows, tokens = torch.zeros(1, 8), rows_of(GREEDY), torch.zeros((1, 1), dtype=torch.int32)
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: sample(logits.bfloat16(), rows, tokens, NO_EDITS, ALL_ALLOWED), "logits: dtype"),
        (lambda: sample(torch.zeros(2, 8), rows, tokens, NO_EDITS, ALL_ALLOWED), "logits: shape"),
        (lambda: sample(logits, rows, tokens.long(), NO_EDITS, ALL_ALLOWED), "tokens: dtype"),
        (lambda: sample(logits, rows, tokens, NO_EDITS, np.array([0])), "allowed: expected one dense dimension"),
        (lambda: sample(logits, rows_of({**GREEDY, "num_top": 9}), tokens, NO_EDITS, ALL_ALLOWED), "num_top is 9"),
    ]
    for call, words in wrong:
        with pytest.raises(ValueError, match=words):
            call()
