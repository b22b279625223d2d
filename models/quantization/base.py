"""What a format of quantised weights is to a layer, and what the formats share.

A layer asks which `CodeFormat` a module's weight has, allocates it, and is given the rows when the checkpoint is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from octavo.kernels import reference
from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.checkpoint import Checkpoint, CheckpointError, TensorSpec

UNSIGNED = tuple(float(value) for value in range(16))
SIGNED = tuple(float(value) for value in range(-8, 8))
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"  # modules
SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(slots=True)
class QuantizedRows:
    """Rows of a quantised weight, as `Packed4Bit.write_rows` takes them.

    codes: [rows, k] uint8; scales, and what the format shifts by, if it does: [rows, k / group size].
    """

    format: CodeFormat
    codes: Tensor
    scales: Tensor
    shifts: Tensor | None = None

    def part(self, rows: slice, columns: slice) -> "QuantizedRows":
        """Some rows, and of them the columns in a range that begins and ends with groups."""
        size = self.format.group_size
        groups = slice(columns.start // size, columns.stop // size)
        shifts = None if self.shifts is None else self.shifts[rows, groups]
        return QuantizedRows(self.format, self.codes[rows, columns], self.scales[rows, groups], shifts)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The rows as numbers, [rows, k]."""
        form = self.format
        table = None if form.table is None else torch.tensor(form.table)
        return reference.dequantize_4bit(self.codes, table, self.scales, self.shifts, form.shift, dtype)


class Quantization:
    """How a checkpoint stores the weights [n, k] of its linear layers and embeddings: here, as they are.

    Formats derive from this; a module that they do not find quantised in the checkpoint is read as it is.
    """

    description = ""  # for people; empty where nothing is quantised
    has_orders = False  # whether `order` ever gives one

    def format(self, name: str, n: int, k: int) -> CodeFormat | None:
        """What the codes of a module's weight mean; None: it is kept as numbers, as an embedding always is."""
        return self._format(name, n, k) if self._holds(name) and name != EMBEDDING else None

    def order(self, name: str) -> Tensor | None:
        """[k] int64: which input each column of the rows belongs to, where that is not the column's own number."""
        return None

    def tensors(self, name: str, n: int, k: int) -> dict[str, TensorSpec]:
        """The checkpoint's tensors that the weight consists of."""
        return self._tensors(name, n, k) if self._holds(name) else {f"{name}.weight": TensorSpec((n, k))}

    def read(
        self, name: str, n: int, k: int, tensors: Mapping[str, Tensor], rows: slice, columns: slice
    ) -> "Tensor | QuantizedRows":
        """Some rows and columns of the weight [n, k] from these tensors, as numbers or in the module's format.

        Where they are in the format, columns begin and end with groups. Raises CheckpointError.
        """
        values = self._read(name, n, k, tensors) if self._holds(name) else tensors[f"{name}.weight"]
        return values.part(rows, columns) if isinstance(values, QuantizedRows) else values[rows, columns]

    def ignores(self, name: str) -> bool:
        """Whether a tensor that no module asks for may stay unread."""
        return False

    def _holds(self, name: str) -> bool:
        """Whether the format has this module's weight; only then is it asked what follows."""
        return False

    def _format(self, name: str, n: int, k: int) -> CodeFormat | None:
        raise NotImplementedError

    def _tensors(self, name: str, n: int, k: int) -> dict[str, TensorSpec]:
        raise NotImplementedError

    def _read(self, name: str, n: int, k: int, tensors: Mapping[str, Tensor]) -> "Tensor | QuantizedRows":
        raise NotImplementedError


PLAIN = Quantization()


def form_of(quantization: Quantization, parts: Mapping[str, int], k: int) -> CodeFormat | None:
    """The format of a weight in which several modules' are stacked; None where they do not share one.

    parts: module -> rows. What does not share a format, or an order, is kept as numbers.
    """
    forms = {quantization.format(name, n, k) for name, n in parts.items()}
    orders = [quantization.order(name) for name in parts]
    same_order = all(
        order is orders[0] or (order is not None and orders[0] is not None and torch.equal(order, orders[0]))
        for order in orders
    )
    return forms.pop() if len(forms) == 1 and same_order else None


def regroup(per_group: Tensor, group_size: int, k: int) -> Tensor:
    """What groups of a row share, repeated so that all groups are whole: [rows, groups] -> [rows, k / gcd].

    Groups of 128 do not divide 576 inputs, but groups of 64 do, pairs of which share what the 128 shared.
    """
    repeats = group_size // gcd(group_size, k)
    return per_group.repeat_interleave(repeats, dim=1)[:, : k // gcd(group_size, k)]


def unpack_nibbles(words: Tensor) -> Tensor:
    """The eight codes of each int32, lowest bits first: [rows, words] -> [rows, 8 words] uint8."""
    data = words.contiguous().view(torch.uint8)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def sorted_by_group(codes: Tensor, order: Tensor | None) -> Tensor:
    """Columns in the order in which their groups are whole."""
    return codes if order is None else codes[:, order]


def group_order(groups: Tensor, group_size: int, checkpoint: Checkpoint, name: str) -> Tensor | None:
    """From the group of each input, [k], the inputs sorted by it; None where they are already.

    Raises CheckpointError, unless each group has `group_size` inputs, but the last, which may have less.
    """
    k = len(groups)
    in_order = torch.arange(k) // group_size
    if torch.equal(groups, in_order.to(groups.dtype)):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], in_order.to(groups.dtype)):
        raise CheckpointError(f"{checkpoint.tensors[name]}: expected {-(-k // group_size)} groups of {group_size}")
    return order


def with_scales(form: CodeFormat, checkpoint: Checkpoint, name: str) -> CodeFormat:
    """The format with scales of the type that the checkpoint has."""
    dtype = checkpoint.tensors[name].dtype if name in checkpoint.tensors else "F16"
    return replace(form, scale_dtype=SCALE_DTYPES.get(dtype, torch.float32))
