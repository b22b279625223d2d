"""The journal takes each token once, in order, from the current epoch, and from nobody else."""

import pytest

from octavo.server.engine.journal import Journal
from octavo.server.engine.request import Delta, FinishReason, GenerationRequest, SamplingParams

REQUEST = GenerationRequest("r", [1, 2], SamplingParams(max_tokens=9), n=2)


def delta(start: int, *token_ids: int, choice: int = 0, request_id: str = "r", end: bool = False) -> Delta:
    return Delta(request_id, choice, start, list(token_ids), finish_reason=FinishReason.STOP if end else None)


def test_tokens_are_committed_in_order() -> None:
    journal = Journal()
    entry = journal.open(REQUEST)
    assert journal.commit(0, delta(0, 5, 6))
    assert journal.commit(0, delta(0, 7, choice=1))
    assert journal.commit(0, delta(2, 8, end=True))
    assert entry.committed == [[5, 6, 8], [7]]
    assert entry.open_choices == {1}


@pytest.mark.parametrize(
    ("epoch", "refused"),
    [
        (0, delta(0, 5)),  # again
        (0, delta(2, 5)),  # a gap
        (1, delta(1, 5)),  # an engine that is not the current one
        (0, delta(1, 5, request_id="other")),
        (0, delta(0, 5, choice=1)),  # a choice that has ended
    ],
)
def test_everything_else_is_refused(epoch: int, refused: Delta) -> None:
    journal = Journal()
    entry = journal.open(REQUEST)
    assert journal.commit(0, delta(0, 5))
    assert journal.commit(0, delta(0, 7, choice=1, end=True))
    assert not journal.commit(epoch, refused)
    assert entry.committed == [[5], [7]]


def test_a_name_is_for_one_request() -> None:
    journal = Journal()
    journal.open(REQUEST)
    with pytest.raises(ValueError, match="request id r is in use"):
        journal.open(REQUEST)
    journal.close("r")
    assert not journal.commit(0, delta(0, 5))


def test_a_request_has_faults_until_all_its_choices_got_on() -> None:
    journal = Journal()
    entry = journal.open(REQUEST)
    entry.fault(1.0)
    assert journal.commit(0, delta(0, 5)) and entry.num_faults == 1
    entry.fault(2.0)
    assert journal.commit(0, delta(1, 5)) and journal.commit(0, delta(2, 5)) and entry.num_faults == 2
    assert journal.commit(0, delta(0, 7, choice=1)) and entry.num_faults == 0
    entry.fault(3.0)
    assert entry.faults_s == [3.0]
    assert journal.commit(0, delta(1, 8, choice=1)) and entry.num_faults == 1
    entry.open_choices.discard(0)  # its client has what it wants of it
    assert entry.num_faults == 0
