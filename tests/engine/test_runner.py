"""Steps replayed from graphs, filled up with rows that go nowhere, and inputs that are copied, change no token.

On plain torch, where a replay is a run; what a GPU does beside that is told in `octavo.kernels.program`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from octavo.kernels import backend
from octavo.models import batch
from octavo.models.batch import StepInputs
from octavo.models.checkpoint import SafetensorsCheckpoint
from octavo.models.config import read_config
from octavo.models.llama import Llama
from octavo.models.loader import load
from octavo.server.engine import runner
from octavo.server.engine.plan import NewChoice, StepPlan, StepResult
from octavo.server.engine.request import SamplingParams
from octavo.server.engine.runner import Runner

NUM_BLOCKS = 24
Sizes = list[int | tuple[int, ...]]


@pytest.fixture(autouse=True, scope="module")
def torch_kernels() -> Iterator[None]:
    before = backend.kernels()
    backend.select("torch")
    with torch.no_grad():
        yield
    backend.select(before)


def two_memories(num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As on a GPU: what is not copied stays poison."""
    return torch.zeros(num_bytes, dtype=torch.uint8), torch.full((num_bytes,), 0x7F, dtype=torch.uint8)


def make(folder: Path, use_graphs: bool) -> Runner:
    config = read_config(folder)
    model = Llama(config, torch.float32, 64)
    load(SafetensorsCheckpoint(folder), model, tqdm(disable=True))
    return Runner(
        model,
        num_blocks=NUM_BLOCKS,
        block_size=16,
        max_num_seqs=6,
        max_num_batched_tokens=32,
        max_model_len=64,
        use_graphs=use_graphs,
    )


def watched(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Sizes:
    """What the runner launches from now on: the size of a graph that it replays, or the arguments of a whole pass."""
    seen: Sizes = []
    run = runner._forward.run

    def eager(*sizes: int) -> None:
        seen.append(sizes)
        run(*sizes)

    monkeypatch.setattr(runner._forward, "run", eager)
    if runner._graphs is not None:
        replay = runner._graphs.replay

        def replayed(size: int) -> None:
            seen.append(size)
            replay(size)

        monkeypatch.setattr(runner._graphs, "replay", replayed)
    return seen


def plans() -> Iterator[StepPlan]:
    """Prefills of 5, 17 and 9 tokens in slots 3, 1 and 0, decodes of all, a prefill among decodes, fewer choices."""
    params = SamplingParams(
        max_tokens=9, temperature=0.0, logprobs=2, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5
    )
    lens, blocks = {3: 5, 1: 17, 0: 9}, {3: [7], 1: [5, 9], 0: [0]}
    choices = [NewChoice(slot, 0, list(range(n, 2 * n)), n, params, False) for slot, n in lens.items()]
    yield StepPlan(0, 1, choices, list(blocks.items()), list(lens), [0] * 3, list(lens.values()), [True] * 3)
    for step in (2, 3):
        starts = [n + step - 2 for n in lens.values()]
        yield StepPlan(0, step, [], [], list(lens), starts, [1] * 3, [True] * 3)
    late = NewChoice(4, 0, [1] * 20, 20, params, False)
    yield StepPlan(0, 4, [late], [(4, [2, 3])], [3, 4], [7, 0], [1, 12], [True, False])
    yield StepPlan(0, 5, [], [], [4], [12], [8], [True])
    yield StepPlan(0, 6, [], [], [4, 1, 3, 0], [20, 19, 8, 11], [1] * 4, [True] * 4)
    yield StepPlan(0, 7, [], [], [4], [21], [1], [True])


def results(runner: Runner) -> list[StepResult]:
    return [runner.execute(plan) for plan in plans()]


def test_padded_replays_on_copied_inputs_are_as_good_as_whole_passes(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("smollm2")
    eager = make(folder, use_graphs=False)
    eager.warm_up(32)
    eager_sizes = watched(eager, monkeypatch)
    want = results(eager)
    for module in (batch, runner):
        monkeypatch.setattr(module, "host_and_device", two_memories)
    graphed = make(folder, use_graphs=True)
    graphed.warm_up(32)
    sizes = watched(graphed, monkeypatch)
    got = results(graphed)
    assert eager_sizes == [
        (31, 3, 17, 17), (3, 3, 1, 18), (3, 3, 1, 19), (13, 2, 12, 12), (8, 1, 8, 20), (4, 4, 1, 21), (1, 1, 1, 22)
    ]  # fmt: skip
    assert sizes == [(31, 3, 17, 17), 4, 4, (13, 2, 12, 12), (8, 1, 8, 20), 4, 1]
    for a, b in zip(got, want, strict=True):
        assert (a.token_ids, a.failed) == (b.token_ids, b.failed)
        assert a.logprobs.keys() == b.logprobs.keys()
        for key, entry in a.logprobs.items():
            assert entry.logprob == pytest.approx(b.logprobs[key].logprob, abs=1e-5)
    for a_cache, b_cache in zip(graphed.kv_caches, eager.kv_caches, strict=True):
        torch.testing.assert_close(a_cache, b_cache)  # also where nobody was to write


def test_a_gpu_is_warmed_up_with_every_kernel(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = make(tiny_checkpoint("smollm2"), use_graphs=True)
    sizes = watched(warm, monkeypatch)
    monkeypatch.setattr(
        warm, "compile_kernels", lambda: sizes.append(0)
    )  # tests/gpu/test_warm_up.py tells what it does
    monkeypatch.setattr(runner, "device", lambda: torch.device("cuda"))  # of the runner alone: nothing is there
    warm.warm_up(20)
    assert sizes == [0, (20, 1, 20, 20), (1, 1, 1, 21)]
    assert warm._graphs is not None and warm._graphs._sizes == [1, 2, 4, 6]


def test_inputs_are_copied_as_far_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "host_and_device", two_memories)
    inputs = StepInputs(7, 5, 3)
    for name, part in inputs.host.items():
        part[:] = len(name)
    inputs.pad_decodes(2, 4)
    inputs.copy_to_device(4)
    on_device = inputs.batch(4, 4, 1, 40)
    assert on_device.slots.tolist() == [5, 5, -1, -1]
    assert on_device.token_ids.tolist() == [9, 9, 0, 0]
    assert on_device.positions.tolist() == [9, 9, 0, 0]
    assert on_device.token_begins.tolist() == [12, 12, 2, 3, 4]
    assert on_device.context_lens.tolist() == [12, 12, 1, 1]
    assert on_device.block_tables.tolist() == [[12] * 3, [12] * 3, [0, 12, 12], [0, 12, 12]]
    assert (on_device.max_query_len, on_device.max_context_len) == (1, 40)
    assert inputs.part("sampled", 5).tolist() == [7] * 5
    assert inputs.batch(7, 5, 1, 40).block_tables[4].tolist() == [0x7F7F7F7F] * 3
    for part in vars(inputs)["_device"].values():
        assert part.data_ptr() % 16 == inputs._device_bytes.data_ptr() % 16
