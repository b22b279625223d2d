"""What crosses the edge between scheduler and ranks in a step. Standard library only.

Plans name choices by *slot*: a row of the ranks' own state, held from admission until the choice ends or is
preempted. A plan never carries sampled token ids: each rank keeps the tokens of a slot itself, so that the next step
can be planned before this one's tokens are known.
"""

from dataclasses import dataclass, field

from octavo.server.engine.request import SamplingParams, TokenLogprobs


@dataclass(slots=True)
class NewChoice:
    """State that a rank sets up for a slot before the step runs (also when a preempted choice comes back)."""

    slot: int
    choice_index: int
    token_ids: list[int]  # prompt, then committed tokens
    num_prompt_tokens: int
    params: SamplingParams
    scores_prompt: bool  # params.prompt_logprobs are wanted
    is_audit: bool = (
        False  # the tokens behind the prompt are all known; what would be sampled in their places is wanted
    )


@dataclass(slots=True)
class StepPlan:
    """What one forward pass computes. The columns `slots`, `starts`, `nums`, `samples` have one entry per choice."""

    epoch: int
    step: int
    new_choices: list[NewChoice] = field(default_factory=list)
    new_blocks: list[tuple[int, list[int]]] = field(default_factory=list)  # (slot, block ids appended to its table)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # computed tokens before this step
    nums: list[int] = field(default_factory=list)  # tokens to compute: positions [start, start + num)
    samples: list[bool] = field(default_factory=list)  # True: the last position yields the next token


@dataclass(slots=True)
class StepResult:
    """What a step produced; columns follow the plan's choices that sample, in the plan's order."""

    epoch: int
    step: int
    token_ids: list[int] = field(default_factory=list)
    # plan index -> logprobs of the sampled token, for choices that asked
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    # plan index -> logprobs of prompt positions [start + 1, start + num], as far as they are prompt tokens
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)  # plan indices whose logits were not finite
    changed_blocks: list[int] = field(default_factory=list)  # cached blocks whose content is not what it was
    # plan index of an audit -> what is sampled in the place of each token behind the prompt that this step leads to
    audited: dict[int, list[int]] = field(default_factory=dict)
