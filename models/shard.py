"""Which part of a model a rank holds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from octavo.kernels.matmul_4bit import CodeFormat
from octavo.models.config import ConfigError, ModelConfig
from octavo.models.quantization.base import Quantization, form_of

COLUMNS = 16  # of an MLP, and rows of a vocabulary, that stay together: kernels store weights in panels of as many
LOGICAL_PARTS = 8  # of sums that are not to depend on the number of ranks


@dataclass(frozen=True, slots=True)
class Span:
    """Places [begin, end) of a dimension of `whole`."""

    begin: int
    end: int
    whole: int

    def __len__(self) -> int:
        return self.end - self.begin

    def __mul__(self, size: int) -> "Span":
        """The same where each place stands for `size` of them."""
        return Span(self.begin * size, self.end * size, self.whole * size)

    @property
    def slice(self) -> slice:
        """As an index."""
        return slice(self.begin, self.end)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the dimension."""
        return len(self) == self.whole


def whole(size: int) -> Span:
    """All of a dimension."""
    return Span(0, size, size)


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank r of R holds units [floor(r n / R), floor((r + 1) n / R)) of n; by default a rank alone has all.

    Units are query heads, with the KV heads that they need, and COLUMNS columns of an MLP or rows of a vocabulary. The
    split nests where one number of ranks divides another.

    num_parts: of every sum over ranks, each rank's as many: one of each rank, or LOGICAL_PARTS whatever the ranks.
    """

    rank: int = 0
    num_ranks: int = 1
    num_parts: int = 1

    def span(self, size: int, unit: int = 1) -> Span:
        """This rank's places of `size`, in multiples of `unit`; the last unit may be short."""
        num_units = -(-size // unit)
        begin, end = (min(rank * num_units // self.num_ranks * unit, size) for rank in (self.rank, self.rank + 1))
        return Span(begin, end, size)

    def heads(self, config: ModelConfig) -> Span:
        """Query heads."""
        return self.span(config.num_heads)

    def kv_heads(self, config: ModelConfig) -> Span:
        """KV heads that the query heads need; where ranks are many, several have the same."""
        group, heads = config.num_heads // config.num_kv_heads, self.heads(config)
        return Span(heads.begin // group, -(-heads.end // group), config.num_kv_heads)

    def columns(self, config: ModelConfig) -> Span:
        """Columns of the MLP; quantised ones by whole groups, if there are enough."""
        size = config.intermediate_size
        form = config.quantization.format("model.layers.0.mlp.down_proj", config.hidden_size, size)
        group = COLUMNS if form is None else form.group_size
        return self.span(size, group if size // group >= max(self.num_ranks, self.num_parts) else COLUMNS)

    def vocab(self, config: ModelConfig) -> Span:
        """Rows of the vocabulary."""
        return self.span(config.vocab_size, COLUMNS)

    def local(self, config: ModelConfig) -> ModelConfig:
        """What this rank holds, described as a model of its own; a rank alone: the same."""
        return replace(
            config,
            num_heads=len(self.heads(config)),
            num_kv_heads=len(self.kv_heads(config)),
            intermediate_size=len(self.columns(config)),
            vocab_size=len(self.vocab(config)),
        )

    @property
    def parts(self) -> "list[Shard]":
        """The parts of every sum over ranks that this rank holds, as shards of their own; together they are this one.

        One where nothing is to be added: a rank alone whose sums have one part.
        """
        each = self.num_parts // self.num_ranks
        return [Shard(i, self.num_parts, self.num_parts) for i in range(self.rank * each, (self.rank + 1) * each)]

    @property
    def peers(self) -> "list[Shard]":
        """The shards of all ranks."""
        return [replace(self, rank=rank) for rank in range(self.num_ranks)]


def form_of_part(quantization: Quantization, parts: Mapping[str, Span], inputs: list[Span]) -> CodeFormat | None:
    """The format of a weight, or of each that takes some of the inputs; None where it is kept as numbers.

    parts: module -> rows. Inputs that are not whole groups, or not in the checkpoint's order, are kept as numbers.
    """
    form = form_of(quantization, {name: span.whole for name, span in parts.items()}, inputs[0].whole)
    if form is None or inputs[0].is_whole:
        return form
    has_order = any(quantization.order(name) is not None for name in parts)
    return (
        None
        if has_order or any(span.begin % form.group_size or len(span) % form.group_size for span in inputs)
        else form
    )


def shard_model(config: ModelConfig, rank: int, num_ranks: int, rank_invariant: bool) -> Shard:
    """The shard of a rank. rank_invariant: sums have LOGICAL_PARTS parts.

    Raises ConfigError where a rank, or a part, would be left without a query head, a column or a row.
    """
    num_parts = LOGICAL_PARTS if rank_invariant else num_ranks
    if num_parts % num_ranks:
        raise ConfigError(
            f"results that do not depend on the number of ranks need 1, 2, 4 or 8 of them, not {num_ranks}"
        )
    for what, size, unit in (
        ("query heads", config.num_heads, 1),
        ("MLP columns", config.intermediate_size, COLUMNS),
        ("vocabulary rows", config.vocab_size, COLUMNS),
    ):
        if (num_units := -(-size // unit)) < num_parts:
            at_a_time = f", divided {unit} at a time" if unit > 1 else ""
            limit = (
                f"at most {num_units} ranks" if num_parts == num_ranks else f"too few for {num_parts} parts of a sum"
            )
            raise ConfigError(f"the model has {size} {what}{at_a_time}: {limit}")
    return Shard(rank, num_ranks, num_parts)
