"""The memory plan: numbers in, numbers out."""

import pytest

from octavo.models.memory import MemoryPlan, plan_memory

FIXED = {"weight_bytes": 500, "workspace_bytes": 60, "reserve_bytes": 40, "block_bytes": 7}


@pytest.mark.parametrize(
    ("kv_bytes", "limit_bytes", "min_blocks", "num_blocks"),
    [
        (70, 10_000, 1, 10),  # what was asked for
        (69, 10_000, 1, 9),
        (70, 10_000, 11, 11),  # at least a request of full length
        (70, 100, 1, 10),  # the limit does not lower what was asked for: it is exceeded
        (None, 670, 1, 10),  # what the limit leaves
        (None, 669, 1, 9),
        (None, 669, 10, 10),
        (None, 600, 1, 1),
        (None, 10, 3, 3),
    ],
)
def test_blocks(kv_bytes: int | None, limit_bytes: int, min_blocks: int, num_blocks: int) -> None:
    plan = plan_memory(**FIXED, kv_bytes=kv_bytes, limit_bytes=limit_bytes, min_blocks=min_blocks)
    assert plan == MemoryPlan(**FIXED, num_blocks=num_blocks)
    assert plan.kv_bytes == 7 * num_blocks
    assert plan.total_bytes == 600 + 7 * num_blocks
