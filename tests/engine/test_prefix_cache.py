"""Hashes and matches of the prefix cache, and what eviction leaves of them."""

import pytest

from octavo.server.engine.block_pool import BlockPool
from octavo.server.engine.prefix_cache import PrefixCache, extend_hashes

TOKENS = list(range(100, 112))


def hashes_of(token_ids: list[int], salt: str = "", block_size: int = 4) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids, block_size, salt)
    return hashes


def cache_with(num_blocks: int, token_ids: list[int]) -> tuple[BlockPool, PrefixCache, list[int]]:
    """A pool, and a cache in which one owner has computed all full blocks of the tokens."""
    pool = BlockPool(num_blocks)
    cache = PrefixCache(pool)
    hashes = hashes_of(token_ids)
    table = pool.allocate(len(hashes))
    for block_hash, block in zip(hashes, table, strict=True):
        cache.insert(block_hash, block)
    return pool, cache, table


def test_only_full_blocks_have_hashes() -> None:
    assert [len(hashes_of(TOKENS[:num])) for num in (0, 3, 4, 5, 8, 11, 12)] == [0, 0, 1, 1, 2, 2, 3]


def test_hashes_grow_in_place_and_known_ones_are_not_computed_again() -> None:
    hashes = hashes_of(TOKENS[:8])
    known = list(hashes)
    extend_hashes(hashes, [-1] * 8 + TOKENS[8:], 4, "")  # -1 cannot be packed: it would raise if it were read
    assert hashes == hashes_of(TOKENS)
    assert all(a is b for a, b in zip(hashes[:2], known, strict=True))


def test_a_hash_covers_all_tokens_before_it_and_the_salt() -> None:
    base = hashes_of(TOKENS)
    assert hashes_of(list(TOKENS)) == base
    for changed in range(12):
        other = hashes_of([*TOKENS[:changed], 7, *TOKENS[changed + 1 :]])
        assert [a == b for a, b in zip(base, other, strict=True)] == [block < changed // 4 for block in range(3)]
    assert not set(base) & set(hashes_of(TOKENS, salt="a"))
    assert not set(hashes_of(TOKENS, salt="a")) & set(hashes_of(TOKENS, salt="b"))
    # The same tokens at another place are another block.
    assert len(set(hashes_of([1, 2, 3, 4] * 3))) == 3


def test_hashes_do_not_depend_on_the_process() -> None:
    # Pinned: a front end that outlives the engine may compare hashes across processes.
    assert hashes_of([1, 2, 3, 4], salt="s")[0].hex()[:16] == "b7b11be9696ad918"


def test_match_gives_the_longest_run_from_the_start() -> None:
    _, cache, table = cache_with(8, TOKENS)
    assert cache.match(hashes_of(TOKENS)) == table == [0, 1, 2]
    assert cache.match(hashes_of(TOKENS[:8])) == [0, 1]
    assert cache.match(hashes_of([*TOKENS[:8], 1, 2, 3, 4])) == [0, 1]
    assert cache.match(hashes_of([1, *TOKENS[1:]])) == []
    assert cache.match(hashes_of(TOKENS, salt="other")) == []


def test_a_match_stops_at_a_gap() -> None:
    _, cache, _ = cache_with(8, TOKENS)
    cache.remove(1)
    assert cache.match(hashes_of(TOKENS)) == [0]
    cache.check()


def test_the_first_block_of_a_hash_stays() -> None:
    pool, cache, table = cache_with(8, TOKENS)
    second = pool.allocate(3)
    for block_hash, block in zip(hashes_of(TOKENS), second, strict=True):
        cache.insert(block_hash, block)
    assert cache.match(hashes_of(TOKENS)) == table
    pool.release(reversed(second))
    assert pool.free_blocks == [3, 4, 5, 6, 7]  # not cached, hence at the front
    cache.check()


def test_eviction_shortens_a_prefix_from_its_tail() -> None:
    pool, cache, table = cache_with(4, TOKENS)
    pool.release(reversed(table))
    assert pool.free_blocks == [3, 2, 1, 0]
    for num_allocated, left in ((1, [0, 1, 2]), (1, [0, 1]), (1, [0]), (1, [])):
        pool.allocate(num_allocated)
        assert cache.match(hashes_of(TOKENS)) == left
        cache.check()


def test_remove_ignores_a_block_that_is_not_cached() -> None:
    pool, cache, _ = cache_with(4, TOKENS)
    (block,) = pool.allocate(1)
    cache.remove(block)
    cache.check()


def test_check_finds_a_cache_that_disagrees_with_the_pool() -> None:
    pool, cache, _ = cache_with(4, TOKENS)
    cache.check()
    pool.unmark_cached(0)
    with pytest.raises(AssertionError, match="what is cached"):
        cache.check()
