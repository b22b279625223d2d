"""Choosing tokens: penalties, biases, temperature, top-k, top-p, min-p, and a draw that is a function of the seed."""

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.backend import kernels
from octavo.kernels.checks import check
from octavo.kernels.cpu.library import Args, address, launch

# One row of work, in the layout of kernels/cpu/sample.cpp.
ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("temperature", np.float32),  # 0: greedy
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("repetition_penalty", np.float32),
        ("top_k", np.int32),  # 0: off
        ("slot", np.int32),  # row of `tokens`
        ("prompt_len", np.int32),
        ("total_len", np.int32),  # prompt and output so far
        ("choice_index", np.int32),
        ("num_top", np.int32),  # top logprobs wanted; -1: no logprobs at all
        ("target", np.int32),  # >= 0: no draw, the logprob of this token is wanted
        ("edits_begin", np.int32),  # range in `edits`
        ("edits_end", np.int32),
        ("allowed_begin", np.int32),  # range in `allowed`; empty: every token
        ("allowed_end", np.int32),
    ],
    align=True,
)
EDIT = np.dtype([("id", np.int32), ("add", np.float32)], align=True)  # added to a logit; -inf bans the token

NOT_FINITE = -1  # the token id of a row whose logits hold NaN or +inf, or nothing but -inf


class _Args(Args):
    _fields_ = [
        ("num_rows", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("edits", ctypes.c_void_p),
        ("allowed", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("top_ids", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
        ("vocab", ctypes.c_int64),
        ("tokens_stride", ctypes.c_int64),
        ("max_top", ctypes.c_int64),
    ]


@dataclass(slots=True)
class Sampled:
    """Result of `sample`, a row each."""

    token_ids: npt.NDArray[np.int32]  # [rows]; or NOT_FINITE
    logprobs: npt.NDArray[np.float32]  # [rows]; of the token, where num_top >= 0
    top_ids: npt.NDArray[np.int32]  # [rows, max_top]; best first, num_top of them
    top_logprobs: npt.NDArray[np.float32]  # [rows, max_top]


def sample(
    logits: Tensor,
    rows: npt.NDArray[np.void],
    tokens: Tensor,
    edits: npt.NDArray[np.void],
    allowed: npt.NDArray[np.int32],
) -> Sampled:
    """The next token of each row, by its own parameters; a row's result depends on nothing else in the batch.

    logits: [rows, vocab] float32; rows: [rows] of ROW; tokens: [slots, max_len] int32, prompt and output of each slot;
    edits: of EDIT; allowed: token ids. In this order: repetition, presence and frequency penalties, edits (bans that
    leave no token are not applied), the allowed set, then greedy (lowest id among equals) or top-k, top-p of what is
    left, min-p, and the draw argmax(logit / T - log(E)), E = -log(u), u from Philox-4x32-10 with the seed as key and
    (token id / 4, output index, choice index, 0) as counter (Salmon et al., SC 2011). Logprobs come from the raw
    logits. The native op and Triton's agree in every bit. Ids are not checked against the vocabulary. Raises ValueError
    on a wrong argument.
    """
    check(logits, "logits", (len(rows), None), torch.float32)
    check(tokens, "tokens", (None, None), torch.int32)
    for name, array, dtype in (("rows", rows, ROW), ("edits", edits, EDIT), ("allowed", allowed, np.dtype(np.int32))):
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError(f"{name}: expected one dense dimension of {dtype}, got {array.ndim} of {array.dtype}")
    num_rows, vocab = logits.shape
    max_top = int(rows["num_top"].max(initial=0))
    if max_top > vocab:
        raise ValueError(f"rows: num_top is {max_top}, at most the vocabulary of {vocab}")
    if kernels() == "torch":
        return Sampled(*reference.sample(logits.numpy(), rows, tokens.numpy(), edits, allowed, max_top))
    if kernels() == "triton":
        from octavo.kernels.gpu.sample import launch as launch_gpu

        words = launch_gpu(logits, rows, tokens, edits, allowed, max_top)
        floats = words.view(np.float32)
        return Sampled(words[:, 0], floats[:, 1], words[:, 2 : 2 + max_top], floats[:, 2 + max_top :])
    result = Sampled(
        np.empty(num_rows, np.int32),
        np.zeros(num_rows, np.float32),
        np.zeros((num_rows, max_top), np.int32),
        np.zeros((num_rows, max_top), np.float32),
    )
    args = _Args(
        num_rows,
        address(logits),
        rows.ctypes.data,
        address(tokens),
        edits.ctypes.data,
        allowed.ctypes.data,
        result.token_ids.ctypes.data,
        result.logprobs.ctypes.data,
        result.top_ids.ctypes.data,
        result.top_logprobs.ctypes.data,
        vocab,
        tokens.stride(0),
        max_top,
    )
    launch("octavo_sample", args)
    return result
