"""Quantising weights of 16 or 32 bit: while they are loaded, and for `octavo quantize`.

nf4 and fp4 are bitsandbytes' own: absmax of each group, then the nearest entry of the table. int4 has no zero points:
of a few scales, by which the greatest weight becomes about -8, each group takes the one of least squared error.
"""

from collections.abc import Mapping
from math import gcd

import torch
from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.checkpoint import FLOATS, Checkpoint, TensorSpec
from octavo.models.quantization.base import EMBEDDING, HEAD, SCALE_DTYPES, SIGNED, Quantization, QuantizedRows
from octavo.models.quantization.bitsandbytes import TABLES

GROUP_SIZES = {"nf4": 64, "fp4": 64, "int4": 32}
DIVISORS = (8.0, 8.5, 9.0, 7.5, 7.0)  # of the weight of greatest magnitude, which give the scales that int4 tries


class Online(Quantization):
    """Quantises every linear layer as it is read; the embedding never, the output head if told to."""

    def __init__(
        self, method: str, group_size: int, checkpoint: Checkpoint, quantize_head: bool, tied_head: bool
    ) -> None:
        """tied_head: the head's weight is the embedding's; quantised, it is kept beside it."""
        self.description = f"{method}, quantised while loading"
        self._method, self._group_size = method, group_size
        self._quantize_head, self._tied_head = quantize_head, tied_head
        self._types = {name: info.dtype for name, info in checkpoint.tensors.items()}

    def _holds(self, name: str) -> bool:
        return name != EMBEDDING and (name != HEAD or self._quantize_head)

    def _format(self, name: str, n: int, k: int) -> CodeFormat:
        return form(self._method, self._group_size, self._types.get(self._source(name), ""))

    def _tensors(self, name: str, n: int, k: int) -> dict[str, TensorSpec]:
        return {self._source(name): TensorSpec((n, k))}

    def _read(self, name: str, n: int, k: int, tensors: Mapping[str, Tensor]) -> QuantizedRows:
        return quantize(tensors[self._source(name)], self._format(name, n, k))

    def _source(self, name: str) -> str:
        return f"{EMBEDDING if name == HEAD and self._tied_head else name}.weight"


def common_group_size(method: str, *inputs: int) -> int:
    """The method's, or as much of it as divides the inputs of every module."""
    return gcd(GROUP_SIZES[method], *inputs)


def form(method: str, group_size: int, dtype: str) -> CodeFormat:
    """What the codes of a weight mean that the checkpoint stores as `dtype`."""
    if method in TABLES:
        return CodeFormat(TABLES[method], group_size)
    return CodeFormat(SIGNED, group_size, SCALE_DTYPES[dtype] if dtype in FLOATS[1:] else torch.float16)


def quantize(weight: Tensor, form: CodeFormat) -> QuantizedRows:
    """weight: [n, k], of any float dtype."""
    groups = weight.float().unflatten(1, (-1, form.group_size))
    return _quantize_int4(groups, form) if form.table == SIGNED else _quantize_table(groups, form)


def _quantize_table(groups: Tensor, form: CodeFormat) -> QuantizedRows:
    table = torch.tensor(form.table)
    absmax = groups.abs().amax(dim=2)
    scaled = groups * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(2)
    values, order = torch.sort(table, stable=True)
    nearest = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True)
    return QuantizedRows(form, order.to(torch.uint8)[nearest].flatten(1), absmax)


def _quantize_int4(groups: Tensor, form: CodeFormat) -> QuantizedRows:
    absmax, at = groups.abs().max(dim=2, keepdim=True)
    greatest = groups.gather(2, at).squeeze(2)
    best_codes = best_scale = least_error = absmax  # of the first divisor, once it is through
    for divisor in DIVISORS:
        # Negative where the greatest is positive: codes reach further down than up.
        scale = (greatest / -divisor).to(form.scale_dtype).float()
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        codes = (groups * inverse.unsqueeze(2)).round_().clamp_(-8, 7)
        error = (codes * scale.unsqueeze(2)).sub_(groups).square_().sum(dim=2)
        if divisor == DIVISORS[0]:
            best_codes, best_scale, least_error = codes, scale, error
            continue
        better = error < least_error
        best_codes = torch.where(better.unsqueeze(2), codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
        least_error = torch.where(better, error, least_error)
    codes = best_codes.add_(8).to(torch.uint8).flatten(1)
    return QuantizedRows(form, codes, best_scale.to(form.scale_dtype))
