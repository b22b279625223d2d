"""The block pool alone: exact ids, exact eviction order."""

import pytest

from octavo.server.engine.block_pool import BlockPool


def pool_with_evictions(num_blocks: int) -> tuple[BlockPool, list[int]]:
    pool, evicted = BlockPool(num_blocks), list[int]()
    pool.on_evict = evicted.append
    return pool, evicted


def test_a_fresh_pool_hands_out_ids_from_zero_upwards() -> None:
    pool = BlockPool(5)
    assert pool.num_free == 5
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(0) == []
    assert pool.allocate(3) == [2, 3, 4]
    assert pool.num_free == 0
    pool.check()


def test_asking_for_too_many_changes_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 are free"):
        pool.allocate(3)
    assert pool.free_blocks == [1, 2]
    pool.check()


def test_blocks_that_hold_nothing_are_reused_first() -> None:
    pool, evicted = pool_with_evictions(6)
    table = pool.allocate(4)
    for block in table[:2]:
        pool.mark_cached(block)
    pool.release(reversed(table))  # 3, 2 hold nothing; 1, 0 are cached
    assert pool.free_blocks == [2, 3, 4, 5, 1, 0]
    assert pool.allocate(5) == [2, 3, 4, 5, 1]
    assert evicted == [1]
    assert not pool.is_cached(1) and pool.is_cached(0)
    pool.check()


def test_cached_blocks_are_evicted_oldest_release_first_and_tail_before_head() -> None:
    pool, evicted = pool_with_evictions(6)
    old, new = pool.allocate(3), pool.allocate(3)
    for block in old + new:
        pool.mark_cached(block)
    pool.release(reversed(old))
    pool.release(reversed(new))
    assert pool.allocate(6) == [2, 1, 0, 5, 4, 3]
    assert evicted == [2, 1, 0, 5, 4, 3]


def test_sharing_protects_a_free_cached_block_and_refreshes_it() -> None:
    pool, evicted = pool_with_evictions(4)
    table = pool.allocate(3)
    for block in table:
        pool.mark_cached(block)
    pool.release(reversed(table))
    assert pool.free_blocks == [3, 2, 1, 0]
    pool.share(1)  # from the middle of the order
    assert pool.free_blocks == [3, 2, 0]
    assert not pool.is_free(1)
    pool.release([1])
    assert pool.free_blocks == [3, 2, 0, 1]
    assert evicted == []
    pool.check()


def test_a_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.share(block)
    assert pool.num_refs(block) == 2
    pool.release([block])
    assert not pool.is_free(block) and pool.free_blocks == [1]
    pool.release([block])
    assert pool.is_free(block) and pool.free_blocks == [0, 1]
    pool.check()


def test_content_that_is_not_trusted_any_more_is_not_kept() -> None:
    pool, evicted = pool_with_evictions(3)
    table = pool.allocate(2)
    for block in table:
        pool.mark_cached(block)
    pool.unmark_cached(1)
    pool.release(reversed(table))
    assert pool.free_blocks == [1, 2, 0]
    pool.allocate(2)
    assert evicted == []


def test_misuse_is_an_assertion() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="already free"):
        pool.release([0])
    with pytest.raises(AssertionError, match="holds nothing"):
        pool.share(0)
    with pytest.raises(AssertionError, match="is free"):
        pool.mark_cached(0)


@pytest.mark.parametrize("broken", ["owned block in the free order", "free block lost", "order"])
def test_check_finds_broken_books(broken: str) -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    pool.check()
    match broken:
        case "owned block in the free order":
            pool._free[0] = None
        case "free block lost":
            del pool._free[1]
        case "order":
            pool._cached.add(1)
    with pytest.raises(AssertionError):
        pool.check()
