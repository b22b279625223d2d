"""What the front end remembers of a request: all that it takes to continue with another engine. Standard library.

A token is committed by being entered here, before a client sees it, and only if it is the next one of its choice and
comes from the current life of the engine: nothing can be repeated, skipped, or added by an engine given up on.
"""

from dataclasses import dataclass, field

from octavo.server.engine.request import Delta, GenerationRequest


@dataclass(slots=True)
class Entry:
    """A request that has not ended."""

    request: GenerationRequest
    committed: list[list[int]] = field(default_factory=list)  # token ids of each choice
    open_choices: set[int] = field(default_factory=set)
    faults_s: list[float] = field(default_factory=list)  # in a row that found it running: since all choices got on
    stuck: set[int] = field(default_factory=set)  # choices that have no token since the latest of these

    @property
    def num_faults(self) -> int:
        """With how many faults in a row some choice of it that is open has not got on."""
        return len(self.faults_s) if self.stuck & self.open_choices else 0

    def fault(self, now_s: float) -> None:
        """Counts a fault that found it running. Any of its choices may be the cause."""
        if not self.num_faults:
            self.faults_s.clear()
        self.faults_s.append(now_s)
        self.stuck = set(self.open_choices)

    def unfinished(self) -> dict[int, list[int]]:
        """The tokens of its open choices, from which another engine goes on: as `Scheduler.add` takes them."""
        return {index: self.committed[index] for index in sorted(self.open_choices)}


class Journal:
    """Entries by request id, in the order of their arrival, and the epoch whose tokens are accepted."""

    def __init__(self) -> None:
        self.epoch = 0
        self.entries: dict[str, Entry] = {}

    def open(self, request: GenerationRequest) -> Entry:
        """A new entry. Raises ValueError where the id is in use."""
        if request.request_id in self.entries:
            raise ValueError(f"request id {request.request_id} is in use")
        entry = Entry(request, [[] for _ in range(request.n)], set(range(request.n)))
        self.entries[request.request_id] = entry
        return entry

    def commit(self, epoch: int, delta: Delta) -> bool:
        """Enter a delta. False: not accepted, since epoch, request, choice or token index is not the expected one."""
        entry = self.entries.get(delta.request_id)
        if epoch != self.epoch or entry is None or delta.choice_index not in entry.open_choices:
            return False
        committed = entry.committed[delta.choice_index]
        if delta.start != len(committed):
            return False
        committed += delta.token_ids
        entry.stuck.discard(delta.choice_index)
        if delta.finish_reason is not None:
            entry.open_choices.discard(delta.choice_index)
        return True

    def close(self, request_id: str) -> None:
        """Forget a request that has ended, or that nobody waits for."""
        entry = self.entries.pop(request_id, None)
        if entry is not None:
            entry.open_choices.clear()
