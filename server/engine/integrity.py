"""Memory that is not what it was: what ranks look at beside their work, to find bits that changed by themselves."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.backend import device
from octavo.kernels.checksum import Rows, checksum
from octavo.kernels.ranks import Ranks
from octavo.models.memory import MAX_CHANGED_BLOCKS

SLICE_BYTES = 1 << 20  # of a weight, that are looked at at once
MAX_ARREARS_S = 0.02  # of scrubbing, that are made up for at once
RECHECK_STEPS = 256  # before a KV block that was looked at is looked at again
MAX_DROPPED_BLOCKS = 4  # of a rank, before it is not trusted any more


class Corruption(RuntimeError):
    """A rank has found bits that are not what they must be: nothing that it has computed is to be trusted.

    Attributes:
        detector: which of `epoch.DETECTORS` found it.
        rank: whose bits they are; -1: of the rank that raises this; None: that cannot be said.
    """

    def __init__(self, detector: str, text: str, rank: int | None = -1) -> None:
        super().__init__(text)
        self.detector, self.rank = detector, rank


class WeightScrub:
    """Goes round and round the weights and compares their checksums with those at the beginning."""

    def __init__(self, tensors: Mapping[str, Tensor], share: float) -> None:
        """tensors: what never changes, by name; share: of the time, to be spent on looking at them; 0: none."""
        self._share = share if tensors else 0.0
        self._slices: list[tuple[str, int, Rows, Tensor]] = []  # name, first byte, slices, their checksums
        if self._share:
            for name, tensor in tensors.items():
                data = tensor.view(-1).view(torch.uint8)
                whole = len(data) // SLICE_BYTES * SLICE_BYTES
                for begin, part in ((0, data[:whole].view(-1, SLICE_BYTES)), (whole, data[None, whole:])):
                    if part.numel():
                        sums = torch.empty(len(part), dtype=torch.int64, device=device())
                        rows = Rows([part])
                        self._slices.append((name, begin, rows, checksum(rows, sums)))
        self._next = cycle((part, i) for part in self._slices for i in range(len(part[3])))
        self._index, self._found = (torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(2))
        self._due_s, self._at_s = 0.0, time.monotonic()
        self.num_checked = 0  # slices
        self.seconds = 0.0

    @property
    def num_slices(self) -> int:
        """Slices of all weights: how many are looked at until the first one is again."""
        return sum(len(sums) for *_, sums in self._slices)

    def run(self) -> None:
        """Look at as much as is due since the last call. Raises Corruption."""
        if not self._share:
            return
        now_s = time.monotonic()
        self._due_s = min(self._due_s + self._share * (now_s - self._at_s), MAX_ARREARS_S)
        self._at_s = now_s
        while self._due_s > 0:
            before_s = now_s
            self.check_next()
            now_s = time.monotonic()
            self._due_s -= now_s - before_s
            self.seconds += now_s - before_s

    def check_next(self) -> None:
        """Look at the next slice. Raises Corruption."""
        (name, begin, rows, sums), i = next(self._next)
        self.num_checked += 1
        self._index[0] = i
        if not torch.equal(checksum(rows, self._found, self._index), sums[i : i + 1]):
            begin += i * SLICE_BYTES
            raise Corruption("weights", f"{name} has changed, within bytes {begin} to {begin + rows.row_bytes}")


class KvChecksums:
    """Checksums of full KV blocks, taken when the last token is written, compared when another choice begins with them.

    A rank has its own part of each block, so any rank may find that a block has changed: rank 0 hears of it.
    """

    def __init__(self, kv_caches: list[Tensor], changed: Tensor, ranks: Ranks) -> None:
        """changed: [1 + MAX_CHANGED_BLOCKS] int64, a buffer of `ranks`: how many blocks, and which."""
        self._rows, self._changed, self._ranks = Rows(kv_caches), changed, ranks
        num_blocks = len(kv_caches[0])
        self._sums = np.zeros(num_blocks, np.int64)
        self._checked_at = np.zeros(num_blocks, np.int64)  # the step
        self._num_dropped = [0] * ranks.num_ranks
        self.num_checked = 0  # blocks compared
        self.seconds = 0.0

    def take(self, blocks: np.ndarray, step: int) -> None:
        """Blocks, [n] int64, are full from this step on."""
        begin_s = time.monotonic()
        self._sums[blocks] = self._sums_of(blocks)
        self._count(blocks, step, begin_s)

    def compare(self, blocks: np.ndarray, step: int) -> bool:
        """A choice begins with these blocks. False: all of them were looked at a little while ago."""
        blocks = np.unique(blocks)
        blocks = blocks[step - self._checked_at[blocks] >= RECHECK_STEPS]
        if not len(blocks):
            return False
        begin_s = time.monotonic()
        changed = blocks[self._sums_of(blocks) != self._sums[blocks]]
        self._changed[0] = len(changed)
        some = torch.from_numpy(changed[:MAX_CHANGED_BLOCKS])
        self._changed[1 : 1 + len(some)] = some
        self.num_checked += len(blocks)
        self._count(blocks, step, begin_s)
        return True

    def changed(self) -> list[int]:
        """After the step's last collective which blocks `compare` has found to be changed on any rank; rank 0 is told.

        Raises Corruption where a rank's have changed so often that this is not by chance.
        """
        found: set[int] = set()
        said = self._ranks.of_all(self._changed)
        if self._ranks.rank:
            return []
        for rank, (count, *blocks) in enumerate(said.tolist()):
            self._num_dropped[rank] += count
            if self._num_dropped[rank] > MAX_DROPPED_BLOCKS:
                raise Corruption("kv", f"{self._num_dropped[rank]} KV blocks have changed", rank)
            found.update(blocks[:count])
        return sorted(found)

    def _sums_of(self, blocks: np.ndarray) -> np.ndarray:
        sums = np.empty(len(blocks), np.int64)
        checksum(self._rows, torch.from_numpy(sums), torch.from_numpy(blocks))
        return sums

    def _count(self, blocks: np.ndarray, step: int, begin_s: float) -> None:
        self._checked_at[blocks] = step
        self.seconds += time.monotonic() - begin_s


class Replicas:
    """What every rank computes for itself and must be the same on all: the residual stream, and the norms of it.

    The checksums of a step are taken before each sum over ranks, which makes the residual stream the same again.
    """

    def __init__(self, sums: Tensor, interval: int, ranks: Ranks) -> None:
        """sums: [checks of a forward pass] int64, a buffer of `ranks`; interval: steps between two that are checked."""
        self._sums, self._ranks = sums, ranks
        self.interval = interval if ranks.num_ranks > 1 else 0
        self.num_checked = 0  # steps

    def is_due(self, step: int) -> bool:
        """Whether this step is to be checked."""
        return self.interval > 0 and step % self.interval == 0

    def places(self) -> Iterator[Tensor]:
        """Where the checksums of a forward pass go, one after the other."""
        return iter(self._sums)

    def compare(self) -> None:
        """After the last collective of a checked step. On rank 0 raises Corruption where ranks differ."""
        self.num_checked += 1
        sums = self._ranks.of_all(self._sums)
        if self._ranks.rank:
            return
        differs = (sums != sums[0]).any(dim=0)
        if not differs.any():
            return
        place = int(differs.nonzero()[0])
        values = sums[:, place].tolist()
        ((value, count), *_) = Counter(values).most_common()
        others = [rank for rank, other in enumerate(values) if other != value]
        part = ("attention", "MLP")[place % 2]
        where = "at the end" if place == sums.shape[1] - 1 else f"in layer {place // 2} before the {part}'s sum"
        if count > len(others) == 1:
            raise Corruption("ranks", f"another residual stream than the other ranks', {where}", others[0])
        raise Corruption("ranks", f"ranks do not agree on the residual stream, {where}", None)
