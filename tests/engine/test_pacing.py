"""Pacing against machines whose step times are known. Nothing here waits or looks at a clock."""

import pytest

from octavo.server.engine.pacing import MIN_SLOWDOWN, MOST_MIXED, NUM_ALONE, ROW_TILE, Pacer

BUDGET = 512


class Machine:
    """A step costs `base_s`, and so much per decode and per prefill token."""

    def __init__(self, base_s: float = 9e-3, decode_s: float = 0.65e-3, token_s: float = 0.3e-3) -> None:
        self.base_s, self.decode_s, self.token_s = base_s, decode_s, token_s
        self.pacer = Pacer(BUDGET)
        self.num_prefills = 0

    def step_s(self, num_decodes: int, num_prefill_tokens: int) -> float:
        return self.base_s + num_decodes * self.decode_s + num_prefill_tokens * self.token_s

    def run(self, num_decodes: int, num_prefill_tokens: int, *, times: int = 1, disturbance: float = 1.0) -> None:
        for _ in range(times):
            step_s = self.step_s(num_decodes, num_prefill_tokens) * disturbance
            self.pacer.observe(num_decodes, num_prefill_tokens, step_s)

    def prefill(self, num_decodes: int, num_steps: int) -> list[int]:
        """Prefill tokens of the next steps, as paced."""
        nums = []
        for _ in range(num_steps):
            nums.append(self.pacer.max_prefill_tokens(num_decodes, self.num_prefills))
            self.run(num_decodes, nums[-1])
        return nums

    def slowdown(self, num_decodes: int, num_prefill_tokens: int) -> float:
        return self.step_s(num_decodes, num_prefill_tokens) / self.step_s(num_decodes, 0)


def test_the_whole_budget_where_nothing_decodes() -> None:
    machine = Machine()
    assert machine.prefill(0, 3 * MOST_MIXED) == [BUDGET] * 3 * MOST_MIXED


@pytest.mark.parametrize("num_decodes", [1, 2, 8, 31, 32])
@pytest.mark.parametrize("token_s", [0.1e-3, 0.3e-3])
def test_a_step_takes_about_twice_as_long_as_its_decodes_alone(num_decodes: int, token_s: float) -> None:
    machine = Machine(token_s=token_s)
    machine.run(0, BUDGET)
    machine.run(num_decodes, 0, times=NUM_ALONE)
    nums = machine.prefill(num_decodes, 20)
    half_a_tile = 0.5 * ROW_TILE * token_s / machine.step_s(num_decodes, 0)
    assert max(machine.slowdown(num_decodes, num) for num in nums) <= MIN_SLOWDOWN + 1.01 * half_a_tile
    assert machine.slowdown(num_decodes, nums[-1]) >= MIN_SLOWDOWN - 1.01 * half_a_tile
    assert {(num_decodes + num) % ROW_TILE for num in nums} == {0}


def test_before_anything_is_known_the_decodes_are_timed_first() -> None:
    nums = Machine().prefill(8, 20)
    assert nums[:NUM_ALONE] == [0] * NUM_ALONE
    assert nums[NUM_ALONE] == ROW_TILE
    assert min(nums[NUM_ALONE + 5 :]) > ROW_TILE


def test_prefill_that_never_ends_does_not_keep_the_decodes_from_being_timed() -> None:
    machine = Machine()
    machine.run(0, BUDGET)
    nums = machine.prefill(8, 4 * (MOST_MIXED + NUM_ALONE))
    assert nums.count(0) == 4 * NUM_ALONE
    machine.base_s = 40e-3  # contexts have grown
    nums = machine.prefill(8, 2 * (MOST_MIXED + NUM_ALONE))
    assert machine.slowdown(8, nums[-1]) == pytest.approx(MIN_SLOWDOWN, abs=0.1)


def test_one_disturbed_step_changes_nothing() -> None:
    machine = Machine()
    machine.run(0, BUDGET)
    machine.run(8, 0, times=NUM_ALONE)
    machine.run(8, 48, times=5)
    before = machine.pacer.max_prefill_tokens(8, 1)
    machine.run(8, 0, disturbance=20)
    assert machine.pacer.max_prefill_tokens(8, 1) == before
    machine.run(8, 48, disturbance=20)
    assert machine.pacer.max_prefill_tokens(8, 1) == before


def test_the_cost_of_a_token_is_followed_both_ways() -> None:
    machine = Machine()
    machine.run(0, BUDGET)
    machine.run(8, 0, times=NUM_ALONE)
    usual = machine.prefill(8, 10)[-1]
    machine.token_s *= 2  # attention to a longer context
    dear = machine.prefill(8, 10)[-1]
    assert dear < usual and machine.slowdown(8, dear) < 1.25 * MIN_SLOWDOWN
    machine.token_s /= 2
    assert machine.prefill(8, 10)[-1] == usual


def test_decodes_that_have_become_cheaper_do_not_free_the_budget() -> None:
    machine = Machine(base_s=60e-3)
    machine.run(0, BUDGET)
    machine.run(8, 0, times=NUM_ALONE)
    machine.base_s = 9e-3
    nums = machine.prefill(8, MOST_MIXED + 10)
    assert max(nums) < BUDGET / 2
    assert machine.slowdown(8, nums[-1]) == pytest.approx(MIN_SLOWDOWN, abs=0.2)


def test_there_is_progress_on_the_slowest_machine() -> None:
    machine = Machine(token_s=1.0)
    machine.run(0, BUDGET)
    assert set(machine.prefill(8, MOST_MIXED)[NUM_ALONE:]) == {ROW_TILE}


def test_prefill_comes_in_tiles_of_the_size_that_kernels_have() -> None:
    machine = Machine(token_s=1.0)
    machine.pacer = Pacer(BUDGET, 128)
    machine.run(0, BUDGET)
    assert set(machine.prefill(8, MOST_MIXED)[NUM_ALONE:]) == {128}
    machine = Machine(token_s=0.05e-3)
    machine.pacer = Pacer(BUDGET, 128)
    machine.run(0, BUDGET)
    assert {(8 + num) % 128 for num in machine.prefill(8, 50)[NUM_ALONE + 5 :]} == {0}


def test_never_over_the_budget() -> None:
    machine = Machine(token_s=1e-9)
    assert max(machine.prefill(200, 50)) + 200 <= BUDGET


def test_few_decodes_do_not_hold_up_many_prompts() -> None:
    machine = Machine()
    machine.run(0, BUDGET)
    assert machine.slowdown(8, machine.prefill(8, 10)[-1]) == pytest.approx(MIN_SLOWDOWN, abs=0.2)
    machine.num_prefills = 4
    assert machine.slowdown(8, machine.prefill(8, 10)[-1]) == pytest.approx(5.0, abs=0.5)
    machine.num_prefills = 100
    assert machine.prefill(8, 10)[-1] + 8 == BUDGET
