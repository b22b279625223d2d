"""Who owns which KV block. Knows block ids only: no tokens, no hashes, no tensors.

A block is owned (one or more references) or free. Free blocks stand in eviction order:

1. blocks that hold nothing reusable, the last one released first;
2. cached blocks, the one released longest ago first; a caller that releases a table from its tail to its head has the
   tail evicted before the head, so that what is left is still a usable prefix.

A cached free block keeps its content until `allocate` hands it out again. Every operation is O(1) per block.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """`num_blocks` blocks with the ids 0 to num_blocks - 1, all free and empty at first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.on_evict: Callable[[int], None] = _nothing_to_forget  # told of a cached block that `allocate` takes
        self._num_refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._cached: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, cached ones included."""
        return len(self._free)

    @property
    def free_blocks(self) -> list[int]:
        """Free blocks in eviction order."""
        return list(self._free)

    def is_free(self, block: int) -> bool:
        """Whether nobody owns the block."""
        return not self._num_refs[block]

    def num_refs(self, block: int) -> int:
        """How many tables hold the block."""
        return self._num_refs[block]

    def is_cached(self, block: int) -> bool:
        """Whether the block was marked as reusable and not taken since."""
        return block in self._cached

    def allocate(self, num: int) -> list[int]:
        """The next `num` blocks in eviction order, now owned once each. Raises ValueError if fewer are free."""
        if num > len(self._free):
            raise ValueError(f"{num} blocks asked for, {len(self._free)} are free")
        blocks = []
        for _ in range(num):
            block, _none = self._free.popitem(last=False)
            if block in self._cached:
                self._cached.remove(block)
                self.on_evict(block)
            self._num_refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, block: int) -> None:
        """Adds an owner to a block that is owned or cached; a free one leaves the eviction order."""
        if not self._num_refs[block]:
            assert block in self._cached, f"block {block} is free and holds nothing"
            del self._free[block]
        self._num_refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Takes one owner from each block, in the given order: tail of the table first."""
        for block in blocks:
            assert self._num_refs[block], f"block {block} is already free"
            self._num_refs[block] -= 1
            if not self._num_refs[block]:
                self._free[block] = None
                if block not in self._cached:
                    self._free.move_to_end(block, last=False)

    def mark_cached(self, block: int) -> None:
        """Content of an owned block is reusable from now on."""
        assert self._num_refs[block], f"block {block} is free"
        self._cached.add(block)

    def unmark_cached(self, block: int) -> None:
        """Content of an owned block is not reusable any more."""
        assert self._num_refs[block], f"block {block} is free"
        self._cached.remove(block)

    def unmark_all(self) -> None:
        """No block's content is reusable any more."""
        self._cached.clear()

    def check(self) -> None:
        """Raises AssertionError where the books do not balance. O(num_blocks)."""
        assert min(self._num_refs, default=0) >= 0, "negative reference count"
        unowned = {block for block, num_refs in enumerate(self._num_refs) if not num_refs}
        assert unowned == self._free.keys(), "free order and reference counts disagree"
        reusable = [block in self._cached for block in self._free]
        assert reusable == sorted(reusable), "a cached block would be evicted before an empty one"


def _nothing_to_forget(block: int) -> None:
    pass
