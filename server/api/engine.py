"""What the HTTP side needs of an engine: `engine.client.EngineClient` has it, and so has the tests' fake."""

from collections.abc import Callable
from typing import Protocol

from octavo.server.engine.channel import EngineInfo, EngineStats, StepOutput
from octavo.server.engine.progress import RankFigures
from octavo.server.engine.request import Delta, GenerationRequest
from octavo.server.engine.supervisor import EngineState, Recovery
from octavo.server.errors import OctavoError


class Engine(Protocol):
    """An engine behind a channel.

    Attributes:
        stats: the latest; counters are since the server's start.
        on_step: called with each step's message.
        on_wait: called from time to time while requests wait for a recovery.
        on_recovered: called when they go on.
    """

    stats: EngineStats
    on_step: Callable[[StepOutput], None] | None
    on_wait: Callable[[], None] | None
    on_recovered: Callable[[Recovery], None] | None

    @property
    def info(self) -> EngineInfo:
        """Facts about the model, once `state` has left "starting"."""

    @property
    def figures(self) -> list[RankFigures]:
        """What each rank has done; none while they load."""

    @property
    def degraded(self) -> str:
        """With how many ranks it goes on and why, in words; empty where it has all that were asked for."""

    @property
    def left_out(self) -> list[str]:
        """Why devices are not used, for each of them: reasons of `devices.LEFT_OUT`."""

    @property
    def state(self) -> EngineState:
        """Whether the engine runs."""

    def begin(
        self,
        request: GenerationRequest,
        on_deltas: Callable[[list[Delta]], None],
        on_error: Callable[[OctavoError], None],
    ) -> None:
        """Runs a request: deltas to `on_deltas` until every choice has ended, `on_error` if it is given up first.

        Neither is called before this returns, nor after `end`; neither may raise. Raises EngineError.
        """

    def end(self, request_id: str) -> None:
        """Forgets a request, and aborts what of it still runs. Unknown ids are ignored."""

    async def abort(self, request_id: str) -> bool:
        """Ends all choices of a request with `FinishReason.ABORT`, as a delta says. False: not known."""

    def abort_choice(self, request_id: str, choice_index: int) -> None:
        """Ends one choice; no more deltas come for it."""
