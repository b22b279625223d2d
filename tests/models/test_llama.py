"""Every architecture against transformers on tiny random checkpoints: whole prefill, chunks, decode, mixed batches."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import transformers
from model_tensors import tensors_of
from tiny_models import TINY_MODELS
from tqdm import tqdm

from octavo.models.batch import Activations, ForwardBatch
from octavo.models.checkpoint import SafetensorsCheckpoint
from octavo.models.config import read_config
from octavo.models.llama import Llama
from octavo.models.loader import load
from octavo.models.memory import kv_block_bytes, kv_block_shape, num_parameters, weight_bytes

MAX_LEN = 160
TOLERANCE = 1e-4  # float32 logits against transformers


class Paged:
    """A model with a paged cache in which sequences own scattered blocks; unused slots hold poison."""

    def __init__(self, folder: Path, dtype: torch.dtype, block_size: int, num_sequences: int = 1) -> None:
        config = read_config(folder)
        self.model = Llama(config, dtype, MAX_LEN)
        load(SafetensorsCheckpoint(folder), self.model, tqdm(disable=True))
        self.block_size = block_size
        width = -(-MAX_LEN // block_size)
        shape = kv_block_shape(config, width * num_sequences, block_size)
        self.kv_caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(config.num_layers)]
        order = torch.randperm(width * num_sequences, generator=torch.Generator().manual_seed(1))
        self.tables = order.view(num_sequences, width).int()

    def logits(self, chunks: Iterable[tuple[int, torch.Tensor, int]]) -> list[torch.Tensor]:
        """One step over chunks (sequence, all its tokens, start); each computes the tokens from start on."""
        chunks = list(chunks)
        rows = [sequence for sequence, _, _ in chunks]
        lens = torch.tensor([len(tokens) for _, tokens, _ in chunks])
        starts = torch.tensor([start for _, _, start in chunks])
        positions = torch.cat([torch.arange(start, len(tokens)) for _, tokens, start in chunks])
        blocks = torch.cat(
            [self.tables[s, torch.arange(start, len(tokens)) // self.block_size] for s, tokens, start in chunks]
        )
        batch = ForwardBatch(
            token_ids=torch.cat([tokens[start:] for _, tokens, start in chunks]).int(),
            positions=positions.int(),
            slots=blocks.long() * self.block_size + positions % self.block_size,
            token_begins=torch.cat([torch.tensor([0]), (lens - starts).cumsum(0)]).int(),
            context_lens=lens.int(),
            block_tables=self.tables[rows].contiguous(),
            max_query_len=int((lens - starts).max()),
            max_context_len=int(lens.max()),
        )
        config, num_tokens = self.model.config, len(positions)
        activations = Activations.empty(config, num_tokens, self.model.dtype)
        self.model.forward(activations, batch, self.kv_caches)
        out = self.model.logits(activations.normed, torch.empty((num_tokens, config.vocab_size)))
        return list(out.split((lens - starts).tolist()))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterable[None]:
    with torch.no_grad():
        yield


def reference(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logits: torch.Tensor = model(tokens.long()[None]).logits[0]
    return logits


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_equal_transformers(name: str, block_size: int, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint(name)
    tokens = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(0))
    want = reference(folder, tokens)
    paged = Paged(folder, torch.float32, block_size)
    (whole,) = paged.logits([(0, tokens, 0)])
    torch.testing.assert_close(whole, want, atol=TOLERANCE, rtol=0)
    paged = Paged(folder, torch.float32, block_size)
    start, parts = 0, []
    for end in (1, 15, 16, 17, 64, 65, 66, 129, 148, 149, 150):  # chunks and single tokens, at and around block edges
        parts += paged.logits([(0, tokens[:end], start)])
        start = end
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["smollm2", "mistral", "qwen3"])
def test_mixed_batch_has_the_bits_of_each_sequence_alone(
    name: str, dtype: torch.dtype, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tiny_checkpoint(name)
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(0, 320, (n,), generator=generator) for n in (1, 63, 100, 150)]
    alone = []
    for tokens in sequences:
        alone += Paged(folder, dtype, 16).logits([(0, tokens, 0)])
    paged = Paged(folder, dtype, 16, num_sequences=4)
    first = paged.logits([(i, tokens[:-1], 0) for i, tokens in enumerate(sequences) if len(tokens) > 1])
    decode = paged.logits([(i, tokens, len(tokens) - 1) for i, tokens in enumerate(sequences)])
    for got, want in zip(first, alone[1:], strict=True):
        assert torch.equal(got, want[:-1])
    for got, want in zip(decode, alone, strict=True):
        assert torch.equal(got[-1], want[-1])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_memory_functions_predict_what_is_allocated(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint(name)
    config = read_config(folder)
    for dtype in (torch.float32, torch.bfloat16):
        model = Llama(config, dtype, MAX_LEN)
        allocated = sum(tensor.nbytes for tensor in tensors_of(model)) - model.cos_sin.nbytes
        assert allocated == weight_bytes(config, dtype)
        cache = torch.empty(kv_block_shape(config, 7, 16), dtype=dtype)
        assert cache.nbytes * config.num_layers == 7 * kv_block_bytes(config, 16, dtype)
    stored = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert num_parameters(config) == sum(p.numel() for p in stored.parameters())
