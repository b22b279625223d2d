"""One rank's work: holds the model, the KV cache and the state of each slot; turns a step plan into tokens.

Knows nothing of queues or requests. State of a slot: its tokens, its block table, its sampling parameters; all
preallocated, gathered by whole columns, so that a step has no loop over its choices but for those with rare options.
It lies on the host; on a GPU a step's inputs are copied there at once, the forward pass is launched, and what sampling
needs is prepared while it runs.
"""

import time
import traceback
from functools import partial

import numpy as np
import torch

from octavo.kernels.backend import device
from octavo.kernels.program import Graphs, Program, graph_sizes
from octavo.kernels.ranks import Ranks
from octavo.kernels.sample import EDIT, ROW, Sampled, sample
from octavo.models.batch import Activations, StepInputs, host_and_device
from octavo.models.config import ModelConfig
from octavo.models.llama import Llama
from octavo.models.memory import LOGITS_ROWS, check_sizes, kv_block_shape, logits_shape
from octavo.models.resident import resident_tensors
from octavo.server.engine.faults import Faults
from octavo.server.engine.integrity import KvChecksums, Replicas, WeightScrub
from octavo.server.engine.plan import NewChoice, StepPlan, StepResult
from octavo.server.engine.progress import RankFigures
from octavo.server.engine.request import SamplingParams, TokenLogprobs


class Runner:
    """Executes step plans in order, the same ones on every rank. Rank 0 alone samples and has results."""

    def __init__(
        self,
        model: Llama,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        use_graphs: bool = False,
        ranks: Ranks | None = None,
        weight_scrub: float = 0.0,
        kv_checksums: bool = False,
        rank_check_interval: int = 0,
    ) -> None:
        """use_graphs: once warmed up, replay steps in which every choice decodes, filled up to one of a few sizes.

        ranks: by default this rank is alone; weight_scrub: share of the time to be spent on `weights`; kv_checksums:
        compare those of KV blocks; rank_check_interval: every so many steps ranks compare what they have, 0: never.
        """
        self.model, self._ranks = model, ranks or Ranks()
        self.weights = WeightScrub(resident_tensors(model), weight_scrub)
        self.faults = Faults()  # none, unless a test asks for some
        self.figures = RankFigures()  # since it is warm
        self._block_size = block_size
        config: ModelConfig = model.config
        shape = kv_block_shape(model.shard.local(config), num_blocks, block_size)
        # Zeros are written, so that the memory is there from the start.
        self.kv_caches = [
            torch.empty(shape, dtype=model.dtype, device=device()).zero_() for _ in range(config.num_layers)
        ]
        self._inputs = StepInputs(max_num_batched_tokens, max_num_seqs, -(-max_model_len // block_size))
        self._activations = Activations.empty(config, max_num_batched_tokens, model.dtype, model.shard, self._ranks)
        self._widths = [len(peer.vocab(config)) for peer in model.shard.peers]  # of each rank's logits
        self._own_logits = self._ranks.buffer(logits_shape(config, model.shard), torch.float32).view(-1)
        self._own_token_ids = self._ranks.buffer((LOGITS_ROWS,), torch.int32)
        changed, sums = (self._ranks.buffer((size,), torch.int64) for size in check_sizes(config))
        self.kv_checksums = KvChecksums(self.kv_caches, changed, self._ranks) if kv_checksums else None
        self.replicas = Replicas(sums, rank_check_interval, self._ranks)
        whole = LOGITS_ROWS if self._ranks.num_ranks > 1 and self._ranks.rank == 0 else 0
        self._logits = torch.empty((whole, config.vocab_size), dtype=torch.float32, device=device())
        largest = max_num_batched_tokens, max_num_seqs, max_num_batched_tokens, max_model_len
        self._forward = Program(partial(self._launch, False), *largest)
        self._checked_forward = Program(partial(self._launch, True), *largest) if self.replicas.interval else None
        self._decode_sizes = graph_sizes(min(max_num_seqs, max_num_batched_tokens))
        self._use_graphs = use_graphs
        self._graphs: Graphs | None = None
        host_tokens, device_tokens = (
            memory.view(torch.int32).view(max_num_seqs, max_model_len)
            for memory in host_and_device(4 * max_num_seqs * max_model_len)
        )
        self._token_rows, self._tokens = host_tokens.numpy(), device_tokens  # the latter is for sampling alone
        self._has_two_memories = device_tokens.data_ptr() != host_tokens.data_ptr()
        self._table_rows = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._table_lens = [0] * max_num_seqs
        self._rows = np.zeros(max_num_seqs, ROW)  # sampling parameters
        self._params: list[SamplingParams | None] = [None] * max_num_seqs
        # Slots with options that need a look at each step: logit_bias, allowed_token_ids, bad_words, min_tokens.
        self._special: set[int] = set()
        self._wants_prompt_logprobs: set[int] = set()
        self._audits: set[int] = set()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises nothing for a single choice's sake: non-finite logits fail that choice alone.

        Raises Corruption where bits have changed and nothing that the step has computed is to be trusted.
        """
        begin_s, collective_s = time.monotonic(), self._ranks.collective_s
        self.faults.begin_step("prefill" if max(plan.nums) > 1 else "decode")
        for choice in plan.new_choices:
            self._place(choice)
        for slot, blocks in plan.new_blocks:
            begin = self._table_lens[slot]
            self._table_rows[slot, begin : begin + len(blocks)] = blocks
            self._table_lens[slot] = begin + len(blocks)
        slots, starts = np.array(plan.slots), np.array(plan.starts)
        nums, samples = np.array(plan.nums), np.array(plan.samples)
        ends, sampled = np.cumsum(nums), np.flatnonzero(samples)
        compares = self._compare_blocks(plan)
        checks = self.replicas.is_due(plan.step)
        self._run(*self._fill_batch(slots, starts, nums, ends, sampled), checks)
        self._take_checksums(plan)
        hidden = self._activations.normed
        result = StepResult(plan.epoch, plan.step)
        for index in self._prompt_logprob_indices(plan):
            self._prompt_logprobs(result, plan, index, hidden[ends[index] - nums[index] : ends[index]])
        for index in [i for i, slot in enumerate(plan.slots) if slot in self._audits] if self._audits else ():
            self._audit(result, plan, index, hidden[ends[index] - nums[index] : ends[index]])
        if len(sampled):
            hidden = hidden.index_select(0, self._inputs.part("sampled", len(sampled)))
            self._sample(result, sampled, slots, starts + nums, hidden)
        else:
            self._ranks.wait()
        if not len(sampled) and device().type == "cuda":
            torch.cuda.synchronize()  # nothing else has waited: the inputs are free again, the step's duration is known
        if compares and self.kv_checksums is not None:
            result.changed_blocks = self.kv_checksums.changed()
        if checks:
            self.replicas.compare()
        self.faults.end_step()
        self.figures.num_steps += 1
        self.figures.step_s += time.monotonic() - begin_s
        self.figures.collective_s += self._ranks.collective_s - collective_s
        return result

    def _compare_blocks(self, plan: StepPlan) -> bool:
        """Whether any of the blocks that choices begin with were looked at."""
        if self.kv_checksums is None or not plan.new_choices:
            return False
        begins = dict(zip(plan.slots, plan.starts, strict=True))
        blocks = [self._table_rows[c.slot, : begins[c.slot] // self._block_size] for c in plan.new_choices]
        return self.kv_checksums.compare(np.concatenate(blocks).astype(np.int64), plan.step)

    def _take_checksums(self, plan: StepPlan) -> None:
        """Of the blocks that this step has filled."""
        if self.kv_checksums is None:
            return
        size = self._block_size
        full = [
            self._table_rows[slot, start // size : (start + num) // size]
            for slot, start, num in zip(plan.slots, plan.starts, plan.nums, strict=True)
            if start // size < (start + num) // size
        ]
        if full:
            self.kv_checksums.take(np.concatenate(full).astype(np.int64), plan.step)

    def _launch(
        self, checks: bool, num_tokens: int, num_sequences: int, max_query_len: int, max_context_len: int
    ) -> None:
        batch = self._inputs.batch(num_tokens, num_sequences, max_query_len, max_context_len)
        activations = self._activations.first(num_tokens, self.replicas.places() if checks else None)
        self.model.forward(activations, batch, self.kv_caches)

    def _run(self, num_tokens: int, num_sequences: int, max_query_len: int, max_context_len: int, checks: bool) -> None:
        """The forward pass of what `_fill_batch` wrote. On a GPU it is launched, not done."""
        size = 0
        if self._graphs is not None and num_tokens == num_sequences and not checks:
            size = self._graphs.size_for(num_sequences)
            self._inputs.pad_decodes(num_sequences, size)
        self._inputs.copy_to_device(max(num_sequences, size))
        if self._has_two_memories:
            places, token_ids = (self._inputs.part(name, num_tokens) for name in ("places", "token_ids"))
            self._tokens.view(-1).index_copy_(0, places, token_ids)
        if self._graphs is not None and size:
            self._graphs.replay(size)
        else:
            program = self._checked_forward if checks and self._checked_forward is not None else self._forward
            program.run(num_tokens, num_sequences, max_query_len, max_context_len)

    def _place(self, choice: NewChoice) -> None:
        slot, params = choice.slot, choice.params
        self._token_rows[slot, : len(choice.token_ids)] = choice.token_ids
        if self._has_two_memories:  # prefix hits are never computed, so not all of these come with a step's inputs
            row = self._token_rows[slot, : len(choice.token_ids)]
            self._tokens[slot, : len(row)] = torch.from_numpy(row)
        self._table_lens[slot] = 0
        self._params[slot] = params
        row = self._rows[slot]
        for name in ROW.names or ():
            if hasattr(params, name):
                row[name] = getattr(params, name)
        row["slot"] = slot
        row["prompt_len"] = choice.num_prompt_tokens
        row["choice_index"] = choice.choice_index
        row["num_top"] = -1 if params.logprobs is None else params.logprobs
        row["target"] = -1
        special = params.logit_bias or params.allowed_token_ids or params.bad_words or params.min_tokens
        (self._special.add if special else self._special.discard)(slot)
        (self._wants_prompt_logprobs.add if choice.scores_prompt else self._wants_prompt_logprobs.discard)(slot)
        (self._audits.add if choice.is_audit else self._audits.discard)(slot)

    def _fill_batch(
        self, slots: np.ndarray, starts: np.ndarray, nums: np.ndarray, ends: np.ndarray, sampled: np.ndarray
    ) -> tuple[int, int, int, int]:
        """Writes a step's inputs. Returns the number of tokens and of sequences, and the largest query and context."""
        batch, num_tokens, num_sequences = self._inputs.host, int(ends[-1]), len(slots)
        sequence = np.repeat(np.arange(num_sequences), nums)  # [tokens]
        positions = np.arange(num_tokens) - np.repeat(ends - nums - starts, nums)
        of_token = slots[sequence]
        blocks = self._table_rows[of_token, positions // self._block_size].astype(np.int64)
        context_lens = starts + nums
        max_context_len = int(context_lens.max())
        width = -(-max_context_len // self._block_size)
        batch["token_ids"][:num_tokens] = self._token_rows[of_token, positions]
        batch["positions"][:num_tokens] = positions
        batch["slots"][:num_tokens] = blocks * self._block_size + positions % self._block_size
        batch["token_begins"][1 : num_sequences + 1] = ends
        batch["context_lens"][:num_sequences] = context_lens
        batch["block_tables"][:num_sequences, :width] = self._table_rows[slots, :width]
        batch["sampled"][: len(sampled)] = ends[sampled] - 1
        if self._has_two_memories:
            batch["places"][:num_tokens] = of_token.astype(np.int64) * self._token_rows.shape[1] + positions
        return num_tokens, num_sequences, int(nums.max()), max_context_len

    def _sample_rows(
        self, hidden: torch.Tensor, rows: np.ndarray, edits: np.ndarray, allowed: np.ndarray
    ) -> Sampled | None:
        """On ranks but the first: None."""
        width = self._widths[self._ranks.rank]
        own_logits = self._own_logits[: len(rows) * width].view(len(rows), width)
        self.model.logits(hidden[: len(rows)], own_logits)
        logits = self._ranks.gather(own_logits, self._widths, self._logits[: len(rows)])
        return sample(logits, rows, self._tokens, edits, allowed) if self._ranks.rank == 0 else None

    def _sample(
        self, result: StepResult, indices: np.ndarray, slots: np.ndarray, lens: np.ndarray, hidden: torch.Tensor
    ) -> None:
        """The next token of each plan index in `indices`; lens: tokens of every plan index after this step."""
        self.faults.at("sampling")
        rows = self._rows[slots[indices]]
        rows["total_len"] = lens[indices]
        edits, allowed, broken = self._edits(rows)
        result.failed += indices[broken].tolist()
        for begin in range(0, len(rows), LOGITS_ROWS):
            part = rows[begin : begin + LOGITS_ROWS]
            out = self._sample_rows(hidden[begin:], part, edits, allowed)
            token_ids = self._agree_on(None if out is None else np.maximum(out.token_ids, 0), len(part))
            fits = part["total_len"] < self._token_rows.shape[1]
            self._token_rows[part["slot"][fits], part["total_len"][fits]] = token_ids[fits]
            if out is None:
                continue
            result.token_ids += token_ids.tolist()
            result.failed += indices[begin : begin + LOGITS_ROWS][out.token_ids < 0].tolist()
            for i in np.flatnonzero(part["num_top"] >= 0):
                top = part["num_top"][i]
                result.logprobs[int(indices[begin + i])] = TokenLogprobs(
                    int(token_ids[i]),
                    float(out.logprobs[i]),
                    list(zip(out.top_ids[i, :top].tolist(), out.top_logprobs[i, :top].tolist(), strict=True)),
                )

    def _agree_on(self, token_ids: np.ndarray | None, count: int) -> np.ndarray:
        """Rank 0's token ids, on every rank; the step's last collective."""
        if token_ids is not None and self._ranks.num_ranks == 1:
            return token_ids
        told = self._own_token_ids[:count]
        if token_ids is not None:
            told.copy_(torch.from_numpy(token_ids))
        self._ranks.broadcast(told)
        return told.cpu().numpy()

    def _edits(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """What is added to logits, and the sets of allowed ids, of those rows that have such options.

        Also the rows for which that failed: whatever their tokens are, they are not what was asked for.
        """
        edits: list[tuple[int, float]] = []
        allowed: list[int] = []
        broken: list[int] = []
        if self._special:
            for index, row in enumerate(rows):
                if (slot := int(row["slot"])) in self._special:
                    params = self._params[slot]
                    assert params is not None
                    row["edits_begin"], row["allowed_begin"] = len(edits), len(allowed)
                    length, prompt_len = int(row["total_len"]), int(row["prompt_len"])
                    try:
                        edits += [*params.logit_bias, *_banned(params, self._token_rows[slot, prompt_len:length])]
                    except Exception:
                        traceback.print_exc()
                        broken.append(index)
                    allowed += params.allowed_token_ids
                    row["edits_end"], row["allowed_end"] = len(edits), len(allowed)
        return np.array(edits, EDIT), np.array(allowed, np.int32), broken

    def _prompt_logprob_indices(self, plan: StepPlan) -> list[int]:
        if not self._wants_prompt_logprobs:
            return []
        return [
            index
            for index, slot in enumerate(plan.slots)
            if slot in self._wants_prompt_logprobs and plan.starts[index] + 1 < self._rows[slot]["prompt_len"]
        ]

    def _prompt_logprobs(self, result: StepResult, plan: StepPlan, index: int, hidden: torch.Tensor) -> None:
        """Logprobs of prompt tokens at [start + 1, start + num], each from the hidden state before it."""
        slot, start = plan.slots[index], plan.starts[index]
        params = self._params[slot]
        assert params is not None and params.prompt_logprobs is not None
        targets = self._token_rows[slot, start + 1 : min(start + plan.nums[index] + 1, self._rows[slot]["prompt_len"])]
        rows = np.repeat(self._rows[slot : slot + 1], len(targets))
        rows["target"] = targets
        rows["num_top"] = params.prompt_logprobs
        found: list[TokenLogprobs] = []
        is_finite = True
        none = np.array([], EDIT), np.array([], np.int32)
        for begin in range(0, len(rows), LOGITS_ROWS):
            part = rows[begin : begin + LOGITS_ROWS]
            out = self._sample_rows(hidden[begin:], part, *none)
            if out is None:
                continue
            if (out.token_ids < 0).any():
                is_finite = False
            columns = (out.token_ids, out.logprobs, out.top_ids, out.top_logprobs)
            for token_id, logprob, top_ids, top in zip(*(column.tolist() for column in columns), strict=True):
                found.append(TokenLogprobs(token_id, logprob, list(zip(top_ids, top, strict=True))))
        if is_finite:
            result.prompt_logprobs[index] = found
        else:
            result.failed.append(index)

    def _audit(self, result: StepResult, plan: StepPlan, index: int, hidden: torch.Tensor) -> None:
        """What is sampled after each position from the prompt's last on, whatever the token there is."""
        slot, start, end = plan.slots[index], plan.starts[index], plan.starts[index] + plan.nums[index]
        begin = max(start, int(self._rows[slot]["prompt_len"]) - 1)
        if begin >= end:
            return
        rows = np.repeat(self._rows[slot : slot + 1], end - begin)
        rows["total_len"], rows["num_top"] = np.arange(begin, end) + 1, -1
        edits, allowed, _ = self._edits(rows)
        found: list[int] = []
        for at in range(0, len(rows), LOGITS_ROWS):
            out = self._sample_rows(hidden[begin - start + at :], rows[at : at + LOGITS_ROWS], edits, allowed)
            if out is not None:
                found += out.token_ids.tolist()
        result.audited[index] = found

    def warm_up(self, num_tokens: int) -> float:
        """Touch what a step uses: one prefill of `num_tokens` tokens and one decode, on blocks that nobody owns yet.

        Returns the seconds that the prefill took.
        On a GPU every kernel is compiled before, and graphs are captured after.
        """
        if device().type == "cuda":
            self.compile_kernels()
        num_tokens = min(num_tokens, self._tokens.shape[1] - 1)
        choice = NewChoice(0, 0, [0] * num_tokens, num_tokens, SamplingParams(max_tokens=2, temperature=0.0), False)
        blocks = list(range(-(-(num_tokens + 1) // self._block_size)))
        begin_s = time.monotonic()
        self.execute(StepPlan(0, 0, [choice], [(0, blocks)], [0], [0], [num_tokens], [True]))
        prefill_s = time.monotonic() - begin_s
        self.execute(StepPlan(0, 0, [], [], [0], [num_tokens], [1], [True]))
        if self._use_graphs:
            self._inputs.pad_decodes(0, self._decode_sizes[-1])
            self._inputs.copy_to_device(self._decode_sizes[-1])
            self._graphs = Graphs(
                lambda size: self._launch(False, size, size, 1, self._tokens.shape[1]), self._decode_sizes
            )
        self.figures = RankFigures()
        return prefill_s

    def compile_kernels(self) -> None:
        """Launch each of Triton's kernels in every form that a step may need, so that none is compiled meanwhile.

        There are forms for few rows and for many, for a sequence's few or many new tokens, and for short or long
        contexts. Where they part, it is between a power of two and the next number.
        """
        host, max_len = self._inputs.host, self._tokens.shape[1]
        for part in host.values():
            part[...] = 0
        host["slots"][:] = -1  # padding alone: attention and the cache have nothing to do
        self._inputs.copy_to_device(1)
        for num_tokens in _around_powers_of_two(len(host["slots"])):
            self._launch(False, num_tokens, 1, num_tokens, 1)
            self._launch(False, 1, 1, num_tokens, max_len)
        rows = np.zeros(min(LOGITS_ROWS, len(host["slots"])), ROW)
        rows["num_top"] = 1
        for num_rows in _around_powers_of_two(len(rows)):
            self._sample_rows(self._activations.normed, rows[:num_rows], np.array([], EDIT), np.array([], np.int32))


def _around_powers_of_two(largest: int) -> list[int]:
    """Every power of two and the number after it, none above `largest`, which is the last."""
    powers = [1 << shift for shift in range(largest.bit_length())]
    return sorted({size for power in powers for size in (power, power + 1) if size < largest} | {largest})


def _banned(params: SamplingParams, output: np.ndarray) -> list[tuple[int, float]]:
    """Bans that depend on the output so far: ends before min_tokens, the last token of a bad word."""
    bans = []
    if len(output) < params.min_tokens:
        bans += [*params.eos_token_ids, *params.stop_token_ids]
    for word in params.bad_words:
        before = len(word) - 1
        if len(output) >= before and output[len(output) - before :].tolist() == list(word[:-1]):
            bans.append(word[-1])
    return [(token_id, -np.inf) for token_id in bans]
