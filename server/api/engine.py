"""What the HTTP side needs of an engine: `engine.client.EngineClient` has it, and so has the tests' fake."""

from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol

from octavo.server.engine.channel import EngineInfo, EngineStats, StepOutput
from octavo.server.engine.request import Delta, GenerationRequest


class Engine(Protocol):
    """An engine behind a channel.

    Attributes:
        info: facts about the model, once `state` has left "starting".
        stats: the latest; counters are since the engine's start.
        on_step: called with each step's message.
    """

    info: EngineInfo
    stats: EngineStats
    on_step: Callable[[StepOutput], None] | None

    @property
    def state(self) -> Literal["starting", "ok", "stalled", "dead"]:
        """Whether the engine runs and makes progress."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Deltas until every choice has ended. Closing it early aborts; raises EngineError if the engine dies."""

    async def abort(self, request_id: str) -> bool:
        """Ends all choices of a request with `FinishReason.ABORT`, through its stream. False: not known."""

    def abort_choice(self, request_id: str, choice_index: int) -> None:
        """Ends one choice; no more deltas come for it."""
