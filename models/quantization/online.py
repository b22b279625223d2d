"""Quantising weights of 16 or 32 bit: while they are loaded, and for `octavo quantize`.

nf4 and fp4 are bitsandbytes' own: absmax of each group, then the nearest entry of the table. int4 has no zero points:
of a few scales, by which the greatest weight becomes about -8, each group takes the one of least squared error.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import gcd, inf

import torch
from torch import Tensor

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.checkpoint import FLOATS, Checkpoint, TensorSpec
from octavo.models.quantization.base import EMBEDDING, HEAD, SCALE_DTYPES, SIGNED, Quantization, QuantizedRows
from octavo.models.quantization.bitsandbytes import TABLES

GROUP_SIZES = {"nf4": 64, "fp4": 64, "int4": 32}
DIVISORS = (8.0, 8.5, 9.0, 7.5, 7.0)  # of the weight of greatest magnitude, which give the scales that int4 tries
CHUNK = 1 << 16  # weights at a time, which stay in the cache


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

    def read(
        self, name: str, n: int, k: int, tensors: Mapping[str, Tensor], rows: slice, columns: slice
    ) -> Tensor | QuantizedRows:
        """Quantises no more than these."""
        if not self._holds(name):
            return super().read(name, n, k, tensors, rows, columns)
        return quantize(tensors[self._source(name)][rows, columns], self._format(name, n, k))

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
    n, k = weight.shape
    codes = torch.empty((n, k), dtype=torch.uint8)
    scales = torch.empty((n, k // form.group_size), dtype=form.scale_dtype)
    num_rows = max(1, CHUNK // k)
    with one_thread():
        for rows, into, scale in zip(*(part.split(num_rows) for part in (weight, codes, scales)), strict=True):
            # A group to a column, so that what is done to groups is done to neighbours in memory at once.
            groups = rows.reshape(-1, form.group_size).T.float().contiguous()
            found, of_group = _quantize_int4(groups, form) if form.table == SIGNED else _quantize_table(groups, form)
            into.view(-1, form.group_size).copy_(found.T)
            scale.copy_(of_group.view_as(scale))
    return QuantizedRows(form, codes, scales)


@contextmanager
def one_thread() -> Iterator[None]:
    """For work in pieces too small to be divided among threads, which torch would do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _quantize_table(groups: Tensor, form: CodeFormat) -> tuple[Tensor, Tensor]:
    """groups: [group size, groups]. Returns codes of that shape and [groups] scales."""
    absmax = torch.maximum(groups.amax(dim=0), -groups.amin(dim=0))
    scaled = groups * (1.0 / absmax.clamp(min=1e-38))
    values, order = torch.sort(torch.tensor(form.table), stable=True)
    codes = torch.full(groups.shape, int(order[0]), dtype=torch.int8)
    for border, step in zip(((values[:-1] + values[1:]) / 2).tolist(), order.diff().tolist(), strict=True):
        codes += (scaled > border).to(torch.int8) * step
    return codes, absmax


def _quantize_int4(groups: Tensor, form: CodeFormat) -> tuple[Tensor, Tensor]:
    """groups: [group size, groups]. Returns codes of that shape and [groups] scales."""
    most, least = groups.amax(dim=0), groups.amin(dim=0)
    greatest = torch.where(most > -least, most, least)
    best, least_error = greatest, torch.full_like(greatest, inf)
    for divisor in DIVISORS:
        # Negative where the greatest is positive: codes reach further down than up.
        scale = (greatest / -divisor).to(form.scale_dtype).float()
        error = _nearest(groups, scale).mul_(scale).sub_(groups).square_().sum(dim=0)
        best, least_error = torch.where(error < least_error, scale, best), torch.minimum(error, least_error)
    return _nearest(groups, best).add_(8), best


def _nearest(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups * torch.where(scale == 0, 0.0, 1.0 / scale)).round_().clamp_(-8, 7)
