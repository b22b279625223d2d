"""What one forward pass computes and where, passed to the model as an argument."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from octavo.kernels.backend import device
from octavo.kernels.checksum import Rows, checksum
from octavo.kernels.ranks import Ranks, buffer_bytes
from octavo.models.config import ModelConfig
from octavo.models.shard import Shard


@dataclass(slots=True)
class ForwardBatch:
    """Tokens of all sequences of a step, one sequence after the other. All tensors on the model's device."""

    token_ids: Tensor  # [tokens] int32
    positions: Tensor  # [tokens] int32
    slots: Tensor  # [tokens] int64: block * block_size + offset, where the token's KV goes; negative: nowhere
    token_begins: Tensor  # [sequences + 1] int32
    context_lens: Tensor  # [sequences] int32: tokens in the cache after this step
    block_tables: Tensor  # [sequences, max_blocks] int32
    max_query_len: int  # at least the tokens of any sequence, so that nothing need ask the device
    max_context_len: int  # at least any of context_lens


class StepInputs:
    """A step's inputs, written on the host and copied to the device at once; on a CPU there is one memory for both.

    Attributes:
        host: the arrays to write to: those of a `ForwardBatch`; `sampled`, [sequences] int64, which tokens' hidden
            states are followed by a token that is to be sampled; and, where device and host are two, `places`,
            [tokens] int64, where each token belongs among the tokens of all slots.
    """

    def __init__(self, max_tokens: int, max_sequences: int, max_blocks: int) -> None:
        int32, int64 = torch.int32, torch.int64
        layout = {
            "slots": (int64, (max_tokens,)),
            "places": (int64, (max_tokens,)),
            "sampled": (int64, (max_sequences,)),
            "token_ids": (int32, (max_tokens,)),
            "positions": (int32, (max_tokens,)),
            "token_begins": (int32, (max_sequences + 1,)),
            "context_lens": (int32, (max_sequences,)),
            "block_tables": (int32, (max_sequences, max_blocks)),  # last: of these only the rows in use are copied
        }
        # Parts begin at multiples of 16 bytes, as separate tensors would.
        sizes = [-(-math.prod(shape) * dtype.itemsize // 16) * 16 for dtype, shape in layout.values()]
        self._tables_begin, self._table_bytes = sum(sizes[:-1]), 4 * max_blocks
        self._host_bytes, self._device_bytes = host_and_device(sum(sizes))

        def parts(memory: Tensor) -> dict[str, Tensor]:
            return {
                name: part[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                for part, (name, (dtype, shape)) in zip(memory.split(sizes), layout.items(), strict=True)
            }

        self.host = {name: part.numpy() for name, part in parts(self._host_bytes).items()}
        self._device = parts(self._device_bytes)

    def pad_decodes(self, num_sequences: int, size: int) -> None:
        """Write sequences of one token that goes nowhere and sees one token of block 0, until there are `size`."""
        host, rows = self.host, slice(num_sequences, size)
        host["slots"][rows] = -1
        host["token_ids"][rows] = host["positions"][rows] = 0
        host["token_begins"][num_sequences : size + 1] = range(num_sequences, size + 1)
        host["context_lens"][rows] = 1
        host["block_tables"][rows, 0] = 0

    def copy_to_device(self, num_sequences: int) -> None:
        """Returns before the copy is done: what is written on the host before the device got there may be copied."""
        if self._device_bytes is not self._host_bytes:
            used = slice(self._tables_begin + num_sequences * self._table_bytes)
            self._device_bytes[used].copy_(self._host_bytes[used], non_blocking=True)

    def part(self, name: str, count: int) -> Tensor:
        """The first `count` of one part, on the device."""
        return self._device[name][:count]

    def batch(self, num_tokens: int, num_sequences: int, max_query_len: int, max_context_len: int) -> ForwardBatch:
        """The first tokens and sequences, on the device."""
        parts = self._device
        return ForwardBatch(
            token_ids=parts["token_ids"][:num_tokens],
            positions=parts["positions"][:num_tokens],
            slots=parts["slots"][:num_tokens],
            token_begins=parts["token_begins"][: num_sequences + 1],
            context_lens=parts["context_lens"][:num_sequences],
            block_tables=parts["block_tables"][:num_sequences],
            max_query_len=max_query_len,
            max_context_len=max_context_len,
        )


def host_and_device(num_bytes: int) -> tuple[Tensor, Tensor]:
    """Bytes of zeros on the host, from where copies need not wait, and on the device. On a CPU they are one."""
    if device().type == "cpu":
        host = torch.zeros(num_bytes, dtype=torch.uint8)
        return host, host
    return (
        torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True),
        torch.zeros(num_bytes, dtype=torch.uint8, device=device()),
    )


@dataclass(slots=True)
class Activations:
    """What layers hand on, in buffers that all of them share: [tokens, width] each, in the compute type."""

    hidden: Tensor  # the residual stream, the same on every rank
    normed: Tensor  # [tokens, hidden]
    qkv: Tensor
    attended: Tensor  # [tokens, heads * head_size]
    gated: Tensor  # [tokens, intermediate]
    ordered: Tensor  # [tokens, the most inputs of a weight that has its own order, or 0]
    parts: Tensor  # [parts, tokens, hidden] float32: of a sum over ranks, those that are this rank's
    sums: Tensor  # [tokens, hidden]: where ranks put the slices of such a sum that they have added up
    ranks: Ranks
    checks: Iterator[Tensor] | None = None  # of a pass that is checked: where the next checksum goes, [] int64 each

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        max_tokens: int,
        dtype: torch.dtype,
        shard: Shard | None = None,
        ranks: Ranks | None = None,
    ) -> "Activations":
        """Buffers for steps of up to `max_tokens` tokens, by default of a rank alone."""
        shard, ranks = shard or Shard(), ranks or Ranks()
        hidden, normed, qkv, attended, gated, ordered = (
            torch.empty((max_tokens, width), dtype=dtype, device=device())
            for width in activation_widths(shard.local(config))
        )
        parts, sums = (ranks.buffer(shape, kind) for shape, kind in sum_shapes(config, max_tokens, dtype, shard))
        return cls(hidden, normed, qkv, attended, gated, ordered, parts, sums, ranks)

    def first(self, num_tokens: int, checks: Iterator[Tensor] | None = None) -> "Activations":
        """The same memory, cut to the first `num_tokens` tokens."""
        rows = {
            field.name: getattr(self, field.name)[:num_tokens]
            for field in fields(self)
            if field.name not in ("parts", "ranks", "checks")
        }
        return Activations(**rows, parts=self.parts[:, :num_tokens], ranks=self.ranks, checks=checks)

    def check(self) -> None:
        """Take a checksum of what must be the same on every rank, if this pass is checked."""
        if self.checks is not None:
            checksum(Rows([self.hidden, self.normed]), next(self.checks))


def activation_widths(config: ModelConfig) -> tuple[int, int, int, int, int, int]:
    """Elements per token of what a rank has for itself, the first six of `Activations`. config: what it holds."""
    hidden, inner = config.hidden_size, config.intermediate_size
    ordered = max(hidden, config.q_size, inner) if config.quantization.has_orders else 0
    return hidden, hidden, config.q_size + 2 * config.kv_size, config.q_size, inner, ordered


def sum_shapes(
    config: ModelConfig, max_tokens: int, dtype: torch.dtype, shard: Shard
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes of what sums over ranks take: `parts` and `sums` of `Activations`; nothing where nothing is summed."""
    rows = max_tokens if shard.num_parts > 1 else 0
    return [((len(shard.parts), rows, config.hidden_size), torch.float32), ((rows, config.hidden_size), dtype)]


def sum_bytes(config: ModelConfig, max_tokens: int, dtype: torch.dtype, shard: Shard) -> int:
    """Bytes of what sums over ranks take."""
    return sum(buffer_bytes(*shape) for shape in sum_shapes(config, max_tokens, dtype, shard))
