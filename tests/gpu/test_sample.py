"""sample on a GPU chooses what the native op chooses, and reports the same bits; exp and log are those of vec.h."""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton
import triton.language as tl

from octavo.kernels import backend
from octavo.kernels.cpu.build import FLAGS, FOLDER, VARIANTS
from octavo.kernels.cpu.library import library, variant
from octavo.kernels.gpu import math
from octavo.kernels.gpu import sample as gpu
from octavo.kernels.sample import EDIT, NOT_FINITE, ROW, Sampled, sample

Call = tuple[torch.Tensor, npt.NDArray[np.void], torch.Tensor, npt.NDArray[np.void], npt.NDArray[np.int32]]

BLOCK = gpu.BLOCK
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # row by row, hence slow
NO_EDITS, ALL_ALLOWED = np.array([], EDIT), np.array([], np.int32)
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "num_top": -1, "target": -1}
PLAIN = {**GREEDY, "temperature": 1.0}

needs_native = pytest.mark.skipif(library() is None, reason="no native kernels to compare with")


@pytest.fixture(autouse=True)
def poisoned(device: torch.device) -> None:
    """Nothing may depend on what scratch memory held: NaN, ids far outside, marks of every kind."""
    gpu.scratch(device, 64, 1000).fill_(-1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small vocabulary has several."""
    monkeypatch.setattr(gpu, "BLOCK", 256)


def rows_of(*rows: dict[str, Any]) -> npt.NDArray[np.void]:
    out = np.zeros(len(rows), ROW)
    for i, row in enumerate(rows):
        for name, value in row.items():
            out[name][i] = value
    return out


def on_gpu(call: Call, device: torch.device) -> Sampled:
    logits, rows, tokens, edits, allowed = call
    return sample(logits.to(device), rows, tokens.to(device), edits, allowed)


def natively(call: Call) -> Sampled:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_kernels", "native")
        patch.setattr(backend, "_device", torch.device("cpu"))
        return sample(*call)


def assert_same(got: Sampled, want: Sampled) -> None:
    """In every bit."""
    for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
        np.testing.assert_array_equal(
            np.ascontiguousarray(getattr(got, name)).view(np.int32), getattr(want, name).view(np.int32), name
        )


def random_call(vocab: int, count: int, num_edits: int = 70, num_tokens: int = 300, max_top: int = 40) -> Call:
    """Rows that mix all options."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 3, (count, vocab)).astype(np.float32)
    logits[::7] = logits[::7].round()  # ties, and zeros of both signs
    logits[1::7] *= 0.01  # nearly flat
    logits[::11, : vocab // 2] = -np.inf
    logits[5::31, rng.integers(vocab)] = np.nan
    logits[6::31, rng.integers(vocab)] = np.inf
    tokens = rng.integers(0, vocab, (4, num_tokens))
    tokens[:, ::3] = tokens[:, rng.integers(0, 9, len(tokens[0, ::3]))]  # a few of them often
    edits = np.array(
        list(zip(rng.integers(0, vocab, num_edits), rng.normal(0, 5, num_edits), strict=True))
        + [(token_id, -np.inf) for token_id in range(vocab)],  # bans of everything
        EDIT,
    )
    edits["add"][: num_edits // 8] = -np.inf
    rows = []
    for _ in range(count):
        prompt_len = rng.integers(0, num_tokens + 1)
        edits_begin = rng.choice([0, 0, num_edits - 10])
        allowed_begin = rng.integers(0, 3)
        rows.append(
            {
                "seed": rng.integers(0, 2**64, dtype=np.uint64),
                "temperature": rng.choice([0.0, 0.01, 0.7, 1.0, 2.0], p=[0.1, 0.1, 0.2, 0.3, 0.3]),
                "top_p": rng.choice([1.0, 1.0, 0.95, 0.5, 1e-6, 1 - 2**-24]),
                "min_p": rng.choice([0.0, 0.0, 0.05, 0.9, 1.0]),
                "top_k": rng.choice([0, 0, 1, 5, 50, vocab - 1, vocab, vocab + 9]),
                "presence_penalty": rng.choice([0.0, 0.7, -2.0]),
                "frequency_penalty": rng.choice([0.0, 0.3, -0.3]),
                "repetition_penalty": rng.choice([1.0, 1.3, 0.7]),
                "slot": rng.integers(0, 4),
                "prompt_len": prompt_len,
                "total_len": rng.integers(prompt_len, num_tokens + 1),
                "choice_index": rng.integers(0, 4),
                "num_top": min(vocab, int(rng.choice([-1, 0, 1, max_top]))),
                "target": rng.integers(0, vocab) if rng.random() < 0.1 else -1,
                "edits_begin": edits_begin,
                "edits_end": rng.choice([edits_begin, num_edits, len(edits)], p=[0.4, 0.4, 0.2]),
                "allowed_begin": allowed_begin,
                "allowed_end": allowed_begin + (rng.integers(1, 400) if rng.random() < 0.2 else 0),
            }
        )
    allowed = rng.integers(0, vocab, 402).astype(np.int32)
    return torch.from_numpy(logits), rows_of(*rows), torch.from_numpy(tokens.astype(np.int32)), edits, allowed


@needs_native
@pytest.mark.parametrize(("vocab", "count"), [(2, 40), (65, 60), (320, 60), (1000, 40)])
def test_chooses_what_the_native_op_chooses(vocab: int, count: int, device: torch.device) -> None:
    call = random_call(vocab, 16 if INTERPRETED else count)
    got = on_gpu(call, device)
    assert_same(got, natively(call))
    assert 0 < (got.token_ids == NOT_FINITE).sum() < 9
    assert len(set(got.token_ids.tolist())) > min(vocab, 8)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab", "block"),
    [
        (1, 256),
        (2, 256),
        (63, 256),
        (64, 256),
        (255, 256),
        (256, 256),
        (257, 256),
        (1023, BLOCK),
        (1024, BLOCK),
        (3000, BLOCK),
    ],
)
def test_chooses_what_the_native_op_chooses_widely(
    vocab: int, block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "BLOCK", block)
    call = random_call(vocab, 6 if INTERPRETED else 50, num_tokens=block + 1)
    assert_same(on_gpu(call, device), natively(call))


@needs_native
@pytest.mark.slow
def test_a_large_vocabulary(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BLOCK", BLOCK)
    call = random_call(50257, 2 if INTERPRETED else 8, num_edits=300, num_tokens=8192)
    call[1]["temperature"] = 1.0
    call[1]["top_p"] = 0.9
    call[1]["top_k"][::2] = 0
    assert_same(on_gpu(call, device), natively(call))


def test_a_row_alone_has_the_same_bits(device: torch.device) -> None:
    logits, rows, tokens, edits, allowed = random_call(320, 20)
    rows["num_top"] = 3
    together = on_gpu((logits, rows, tokens, edits, allowed), device)
    for r in (0, 12, 19):
        alone = on_gpu((logits[r : r + 1].clone(), rows[r : r + 1].copy(), tokens, edits, allowed), device)
        part = slice(r, r + 1)
        top_ids, top_logprobs = together.top_ids[part].copy(), together.top_logprobs[part].copy()
        assert_same(
            alone, Sampled(together.token_ids[part].copy(), together.logprobs[part].copy(), top_ids, top_logprobs)
        )


def test_rows_without_a_token_say_why(device: torch.device) -> None:
    logits = torch.zeros((5, 65))
    logits[0, 64] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, :64] = -torch.inf
    rows = rows_of(GREEDY, PLAIN, {**GREEDY, "target": 4}, PLAIN, GREEDY)
    none = torch.zeros((1, 1), dtype=torch.int32)
    got = on_gpu((logits, rows, none, NO_EDITS, ALL_ALLOWED), device)
    assert got.token_ids.tolist() == [NOT_FINITE] * 3 + [64, 0]
    empty = on_gpu((logits[:0], rows[:0], none, NO_EDITS, ALL_ALLOWED), device)
    assert empty.token_ids.shape == (0,) and empty.top_ids.shape == (0, 0)


def test_bans_that_leave_nothing_are_not_applied(device: torch.device) -> None:
    logits = torch.zeros((3, 65))
    logits[:, 7] = 1.0
    logits[2, 3:5] = -torch.inf
    ban = np.array([(i, -np.inf) for i in range(65)], EDIT)
    only = np.array([3, 4], np.int32)
    everything, restricted = {**GREEDY, "edits_end": 65}, {**GREEDY, "edits_end": 65, "allowed_end": 2}
    rows = rows_of(everything, restricted, restricted)
    got = on_gpu((logits, rows, torch.zeros((1, 1), dtype=torch.int32), ban, only), device)
    assert got.token_ids.tolist() == [7, 3, 3]


@needs_native
def test_equals_go_by_id(device: torch.device) -> None:
    """Of equal logits the k first survive, and of those as many as the mass needs; of equal scores the first wins."""
    options: list[tuple[dict[str, Any], int]] = [
        ({"temperature": 0.0}, 1),
        ({"top_k": 1}, 1),
        ({"top_k": 7}, 7),
        ({"top_k": 300}, 300),
        ({"top_p": 0.1}, 61),
        ({"top_p": 0.25, "top_k": 8}, 2),
        ({"min_p": 1.0}, 601),
    ]
    rows = rows_of(*({**PLAIN, **option, "seed": seed} for option, _ in options for seed in range(8)))
    logits = torch.zeros((len(rows), 601))
    call = logits, rows, torch.zeros((1, 1), dtype=torch.int32), NO_EDITS, ALL_ALLOWED
    got = on_gpu(call, device)
    assert_same(got, natively(call))
    for ids, (_, limit) in zip(got.token_ids.reshape(-1, 8), options, strict=True):
        assert 0 <= ids.min() <= ids.max() < limit
        assert len(set(ids.tolist())) >= min(limit, 3)
    logits.fill_(2.0**23)  # noise is rounded to whole numbers
    assert_same(on_gpu(call, device), natively(call))
    two = (logits[:, :2].contiguous(), *call[1:])
    assert_same(on_gpu(two, device), natively(two))


def test_penalties_by_hand(device: torch.device) -> None:
    tokens = torch.tensor([[1, 1, 2, 3, 3, 3]], dtype=torch.int32)  # prompt 1 1 2, output 3 3 3
    penalties = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    row = {**GREEDY, **penalties, "prompt_len": 3, "total_len": 6}
    # The logits become 0, 1, -4, 1 - 0.25 - 1.5.
    logits = torch.tensor([[0.0, 2.0, -2.0, 2.0]]).expand(2, 4).contiguous()
    rows = rows_of({**row, "edits_begin": 0, "edits_end": 1}, {**row, "edits_begin": 1, "edits_end": 2})
    bias = np.array([(3, 1.7), (3, 1.8)], EDIT)
    assert on_gpu((logits, rows, tokens, bias, ALL_ALLOWED), device).token_ids.tolist() == [1, 3]
    # Fused, the penalty of token 3 would be 3, and token 3 behind token 4.
    penalty = np.float32(0.3) + np.float32(0.9) * np.float32(3)
    assert penalty < 3
    logits = torch.tensor([[-9.0, -9.0, -9.0, 0.0, -float(penalty)]])
    rows = rows_of({**row, "repetition_penalty": 1.0, "presence_penalty": 0.3, "frequency_penalty": 0.9})
    assert on_gpu((logits, rows, tokens, NO_EDITS, ALL_ALLOWED), device).token_ids.tolist() == [3]


@needs_native
def test_each_option_alone(device: torch.device) -> None:
    options: list[dict[str, Any]] = [
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"repetition_penalty": 1 + 2.0**-20},
        {"allowed_begin": 0, "allowed_end": 2},
        {"edits_begin": 0, "edits_end": 1},
    ]
    rows = rows_of(*({**GREEDY, "prompt_len": 1, "total_len": 3, **option} for option in options))
    logits = torch.zeros((5, 65))
    logits[:, 7], logits[:, 9] = 2.0, 2.0 - 2.0**-20  # 7 is what is chosen unless an option counts
    tokens, bias = torch.tensor([[7, 7, 7]], dtype=torch.int32), np.array([(9, 2.0)], EDIT)
    call = logits, rows, tokens, bias, np.array([9, 11], np.int32)
    got = on_gpu(call, device)
    assert got.token_ids.tolist() == [9] * 5
    assert_same(got, natively(call))


@triton.jit  # type: ignore[untyped-decorator]
def exp_log_kernel(exps_ptr, logs_ptr, x_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp and log of each."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=1.0)
    tl.store(exps_ptr + at, math.exp(x), mask=at < count)
    tl.store(logs_ptr + at, math.log(x), mask=at < count)


# Bits of numbers whose exp or log is another one where one multiply-add, in its order, is rounded twice; or where the
# last coefficient or the bound of the mantissa is off by 2^-20.
WHERE_DETAILS_SHOW = np.array(
    [
        *(0xC2A2E3BC, 0xC26A48A4, 0xC2A2E3B8, 0xC28E1859, 0xC257283C, 0xC29244D8, 0x4259D03A, 0xC24909C0, 0x429EBB12),
        *(0xC2992F7B, 0xC29BF544, 0x3FAB7F01, 0x3FB37BC3, 0x3FB368AF, 0x3F3618B6, 0x3F9FE5E5, 0x3F3620F0, 0x3F369521),
        *(0x3F35082E, 0x3F350B2E, 0x3F35015F, 0x3F3509AE, 0x3F350417, 0x3F35095D, 0x32E3B165, 0x4AC48D7D, 0x79175F7D),
        *(0x3E68CE8E, 0x3F3504F3, 0x3F3504F4, 0x3FB504F3, 0x3FB504F4, 0x403504F3, 0x403504F4, 0x3EB504F3, 0x3EB504F4),
    ],
    np.uint32,
)


@pytest.fixture(scope="module")
def vec_h(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """exp and log of vec.h, compiled by themselves."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None or variant() is None:
        pytest.skip("no C++ compiler")
    folder: Path = tmp_path_factory.mktemp("vec_h")
    (folder / "vec.cpp").write_text(
        '#include "vec.h"\n'
        + "".join(
            f'extern "C" void {name}_of(float* out, const float* x, int64_t count) {{\n'
            f"    for (int64_t i = 0; i < count; i++) out[i] = octavo::{name}(x[i]);\n}}\n"
            for name in ("exp", "log")
        )
    )
    flags = [*FLAGS, *VARIANTS[variant() or ""][0], f"-I{FOLDER}"]
    subprocess.run([compiler, *flags, str(folder / "vec.cpp"), "-o", str(folder / "vec.so")], check=True)
    yield ctypes.CDLL(str(folder / "vec.so"))


def test_exp_and_log_are_those_of_the_cpu(vec_h: ctypes.CDLL, device: torch.device) -> None:
    """Over every exponent with many fractions, and densely where the sampler uses them."""
    every = np.arange(0, 2**32, 40_009, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = np.linspace(-90, 1, 50_001, dtype=np.float32)
    edges = np.array([0.0, -0.0, -np.inf, np.inf, 1.0, -87.0, 88.0, 2.0**-126, 1 - 2.0**-24], np.float32)
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(-1000)), np.nextafter(edges, np.float32(1000))])
    numbers = np.concatenate([every[~np.isnan(every)], near, edges, WHERE_DETAILS_SHOW.view(np.float32)])
    x = torch.from_numpy(numbers).to(device)
    got = torch.full((2, len(numbers)), torch.nan, device=device)
    grid = (triton.cdiv(len(numbers), 1024),)
    exp_log_kernel[grid](got[0], got[1], x, len(numbers), BLOCK=1024, enable_fp_fusion=False)
    want = np.empty((2, len(numbers)), np.float32)
    for function, out in zip((vec_h.exp_of, vec_h.log_of), want, strict=True):
        function(*(ctypes.c_void_p(array.ctypes.data) for array in (out, numbers)), ctypes.c_int64(len(numbers)))
    exps, logs = got.cpu().numpy().view(np.int32)
    np.testing.assert_array_equal(exps, want[0].view(np.int32))
    valid = (numbers >= 2.0**-126) & (numbers < np.inf)
    np.testing.assert_array_equal(logs[valid], want[1].view(np.int32)[valid])


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_compiled_code_rounds_as_written() -> None:
    """Without a GPU approximate instructions are executed exactly, so that no result would betray them."""
    names = []
    for each in gpu.variants():
        names.append(each.name)
        assert not re.findall(r"\.approx|\.ftz|div\.full", each.compile().asm["ptx"])
    assert len(names) == len(set(names)) == 4
