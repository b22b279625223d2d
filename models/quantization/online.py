"""Quantising weights of 16 or 32 bit: while they are loaded, and for `octavo quantize`.

nf4 and fp4 are bitsandbytes' own: absmax of each group, then the nearest entry of the table. int4 is round to nearest
with a zero point; of a few ranges of each group, shrunk from its least and greatest weight, the one with the least
squared error is taken.
"""

from collections.abc import Mapping
from math import gcd

import torch
from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.checkpoint import FLOATS, Checkpoint, TensorSpec
from octavo.models.quantization.base import EMBEDDING, HEAD, SCALE_DTYPES, UNSIGNED, Quantization, QuantizedRows
from octavo.models.quantization.bitsandbytes import TABLES

METHODS = ("nf4", "fp4", "int4")
GROUP_SIZE = 64
SHRINKS = (1.0, 0.9, 0.8)  # of a group's range, for int4


class Online(Quantization):
    """Quantises every linear layer as it is read; the embedding never, the output head if told to."""

    def __init__(self, method: str, checkpoint: Checkpoint, quantize_head: bool, tied_head: bool) -> None:
        """tied_head: the head's weight is the embedding's; quantised, it is kept beside it."""
        self.description = f"{method}, quantised while loading"
        self._method, self._quantize_head, self._tied_head = method, quantize_head, tied_head
        self._types = {name: info.dtype for name, info in checkpoint.tensors.items()}

    def _holds(self, name: str) -> bool:
        return name != EMBEDDING and (name != HEAD or self._quantize_head)

    def _format(self, name: str, n: int, k: int) -> CodeFormat:
        return form(self._method, k, self._types.get(self._source(name), ""))

    def _tensors(self, name: str, n: int, k: int) -> dict[str, TensorSpec]:
        return {self._source(name): TensorSpec((n, k))}

    def _read(self, name: str, n: int, k: int, tensors: Mapping[str, Tensor]) -> QuantizedRows:
        return quantize(tensors[self._source(name)], self._format(name, n, k))

    def _source(self, name: str) -> str:
        return f"{EMBEDDING if name == HEAD and self._tied_head else name}.weight"


def form(method: str, k: int, dtype: str) -> CodeFormat:
    """What the codes of a weight with `k` inputs mean, stored in the checkpoint as `dtype`."""
    size = gcd(GROUP_SIZE, k)
    if method in TABLES:
        return CodeFormat(TABLES[method], size)
    # Scales of 16 bits times zero points are exact in float32.
    return CodeFormat(UNSIGNED, size, SCALE_DTYPES[dtype] if dtype in FLOATS[1:] else torch.float16, shift="zero")


def quantize(weight: Tensor, form: CodeFormat) -> QuantizedRows:
    """weight: [n, k], of any float dtype."""
    groups = weight.float().unflatten(1, (-1, form.group_size))
    return _quantize_int4(groups, form) if form.shift else _quantize_table(groups, form)


def _quantize_table(groups: Tensor, form: CodeFormat) -> QuantizedRows:
    table = torch.tensor(form.table)
    absmax = groups.abs().amax(dim=2)
    scaled = groups * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(2)
    values, order = torch.sort(table, stable=True)
    nearest = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True)
    return QuantizedRows(form, order.to(torch.uint8)[nearest].flatten(1), absmax)


def _quantize_int4(groups: Tensor, form: CodeFormat) -> QuantizedRows:
    low, high = groups.amin(dim=2).clamp(max=0.0), groups.amax(dim=2).clamp(min=0.0)  # zero is always exact
    best: tuple[Tensor, ...] | None = None
    for shrink in SHRINKS:
        scale = ((high - low) * (shrink / 15)).to(form.scale_dtype).float()
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
        zero = (-low * shrink * inverse).round_().clamp_(0, 15)
        codes = (groups * inverse.unsqueeze(2)).round_().add_(zero.unsqueeze(2)).clamp_(0, 15)
        error = codes.sub(zero.unsqueeze(2)).mul_(scale.unsqueeze(2)).sub_(groups).square_().sum(dim=2)
        if best is None:
            best = codes, scale, zero, error
        else:
            better = error < best[3]
            new = codes, scale, zero, error
            best = tuple(
                torch.where(better.view(better.shape + (1,) * (now.dim() - 2)), now, old)
                for now, old in zip(new, best, strict=True)
            )
    assert best is not None
    codes, scale, zero, _ = best
    return QuantizedRows(form, codes.to(torch.uint8).flatten(1), scale.to(form.scale_dtype), zero.to(form.scale_dtype))
