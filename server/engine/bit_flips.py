"""Bits that change by themselves, on demand: for tests alone."""

import ctypes
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.kernels.cpu.library import library
from octavo.kernels.program import Program
from octavo.models.resident import resident_tensors
from octavo.server.engine.runner import Runner


def flip_bit(tensor: Tensor, rng: random.Random) -> int:
    """Flips one bit of a dense tensor, any as likely as another. Returns its index."""
    data = tensor.view(-1).view(torch.uint8)
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    return bit


class BitFlips:
    """Flips bits in what a rank holds. Activations and logits are flipped while the next step computes them."""

    def __init__(self, runner: Runner, seed: int | None = None) -> None:
        self._runner, self._rng = runner, random.Random(seed)
        self._weights = resident_tensors(runner.model)

    def flip(self, where: str) -> None:
        """Flips a bit of weights, kv (of blocks that choices hold), activations or logits."""
        if where == "weights":
            self.weights()
        elif where == "kv":
            runner = self._runner
            tables = [row[:count] for row, count in zip(runner._table_rows, runner._table_lens, strict=True)]
            self.kv([int(block) for table in tables for block in table])
        elif where == "activations":
            self.activations()
        else:
            self.logits()

    def weights(self) -> str:
        """Returns the name of the tensor."""
        (name,) = self._rng.choices([*self._weights], [tensor.nbytes for tensor in self._weights.values()])
        flip_bit(self._weights[name], self._rng)
        return name

    def kv(self, blocks: Sequence[int]) -> int:
        """In any layer of one of these blocks, whose number is returned."""
        block = self._rng.choice(blocks)
        flip_bit(self._rng.choice(self._runner.kv_caches)[block], self._rng)
        return block

    def activations(self) -> None:
        """Before any op of the next forward pass, in any buffer."""
        runner = self._runner
        programs = [p for p in (runner._forward, runner._checked_forward) if p is not None]

        def run(program: Program, num_rows: int) -> None:
            for one in programs:
                vars(one).pop("run")
            lib, calls = library(), program._calls
            assert lib is not None
            a = runner._activations.first(num_rows)
            parts = [a.hidden, a.normed, a.qkv, a.attended, a.gated, *a.parts]
            (part,) = self._rng.choices(parts, [part.nbytes for part in parts])
            at = self._rng.randrange(len(calls))
            lib.octavo_run_program(calls, ctypes.c_int64(at), ctypes.c_int64(num_rows))
            flip_bit(part, self._rng)
            rest = ctypes.byref(calls, at * ctypes.sizeof(calls) // len(calls))
            lib.octavo_run_program(rest, ctypes.c_int64(len(calls) - at), ctypes.c_int64(num_rows))

        for program in programs:
            vars(program)["run"] = lambda num_rows, *_, program=program: run(program, num_rows)

    def logits(self) -> None:
        """Of the next rows that are sampled."""
        model = self._runner.model

        def logits(hidden: Tensor, out: Tensor) -> Tensor:
            del vars(model)["logits"]
            model.logits(hidden, out)
            flip_bit(out, self._rng)
            return out

        vars(model)["logits"] = logits
