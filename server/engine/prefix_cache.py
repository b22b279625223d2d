"""Which block holds which tokens: a SHA-256 chain over (parent, tokens, salt). Knows the pool, not the choices.

The hash of a block covers every token before it and the salt, so equal hashes mean an equal prefix within one scope,
and a client cannot find out by timing what another scope has cached.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence

from octavo.server.engine.block_pool import BlockPool


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: str) -> None:
    """Appends the hashes of those full blocks of `token_ids` that `hashes` does not cover yet."""
    while (end := (len(hashes) + 1) * block_size) <= len(token_ids):
        parent = hashes[-1] if hashes else hashlib.sha256(salt.encode()).digest()
        tokens = struct.pack(f"<{block_size}I", *token_ids[end - block_size : end])
        hashes.append(hashlib.sha256(parent + tokens).digest())


class PrefixCache:
    """Maps hashes to blocks of `pool`, and forgets a block when the pool hands it out again."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: dict[bytes, int] = {}  # hash -> block
        self._hashes: dict[int, bytes] = {}  # block -> hash
        pool.on_evict = self._forget

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached run from the start. They are not owned: share them before any allocation."""
        blocks = []
        for block_hash in hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, block_hash: bytes, block: int) -> None:
        """Offers an owned block that is full and computed. A second block of a hash is not kept."""
        if block_hash not in self._blocks:
            self._blocks[block_hash] = block
            self._hashes[block] = block_hash
            self._pool.mark_cached(block)

    def remove(self, block: int) -> None:
        """Forgets an owned block, if it is cached: its content is not to be trusted."""
        if block in self._hashes:
            self._forget(block)
            self._pool.unmark_cached(block)

    def clear(self) -> None:
        """Forgets all blocks."""
        self._blocks.clear()
        self._hashes.clear()
        self._pool.unmark_all()

    def check(self) -> None:
        """Raises AssertionError where the maps, or cache and pool, disagree. O(num_blocks)."""
        assert self._blocks == {block_hash: block for block, block_hash in self._hashes.items()}, "maps disagree"
        cached = {block for block in range(self._pool.num_blocks) if self._pool.is_cached(block)}
        assert cached == self._hashes.keys(), "cache and pool disagree on what is cached"

    def _forget(self, block: int) -> None:
        del self._blocks[self._hashes.pop(block)]
