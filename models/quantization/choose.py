"""Which quantization a checkpoint has, by its own configuration, or is to be given while it is loaded."""

from dataclasses import replace

from octavo.models.checkpoint import Checkpoint, GgufCheckpoint
from octavo.models.config import ConfigError, ModelConfig
from octavo.models.quantization.awq import Awq
from octavo.models.quantization.base import Quantization
from octavo.models.quantization.bitsandbytes import BitsAndBytes
from octavo.models.quantization.compressed_tensors import CompressedTensors
from octavo.models.quantization.gguf import Gguf
from octavo.models.quantization.gptq import Gptq
from octavo.models.quantization.online import Online, common_group_size

# quant_method in config.json -> who reads it
METHODS = {"bitsandbytes": BitsAndBytes, "awq": Awq, "gptq": Gptq, "compressed-tensors": CompressedTensors}


def with_quantization(
    config: ModelConfig, checkpoint: Checkpoint, wanted: str | None = None, quantize_head: bool = False
) -> ModelConfig:
    """The configuration with what its quantization_config, or the GGUF file, or `wanted` (nf4, fp4, int4) says.

    quantize_head: the output head, too, is quantised while loading. Raises ConfigError for what is not supported,
    CheckpointError for a checkpoint that contradicts its configuration.
    """
    raw = config.quantization_config
    if quantize_head and wanted is None:
        raise ConfigError("--quantize-lm-head needs --quantization, which says how")
    if wanted is not None:
        if raw is not None or isinstance(checkpoint, GgufCheckpoint):
            method = "GGUF" if raw is None else raw.get("quant_method")
            raise ConfigError(f"--quantization is {wanted}, but {checkpoint.path} is quantised already: {method}")
        size = common_group_size(wanted, config.hidden_size, config.q_size, config.intermediate_size)
        online = Online(wanted, size, checkpoint, quantize_head, config.tie_word_embeddings)
        return replace(config, quantization=online)
    if isinstance(checkpoint, GgufCheckpoint):
        return replace(config, quantization=Gguf(checkpoint))
    if raw is None:
        return replace(config, quantization=Quantization())
    method = raw.get("quant_method")
    if method not in METHODS:
        raise ConfigError(
            f"{checkpoint.path}: quantization {method!r} is not supported; supported: {', '.join(METHODS)}"
        )
    try:
        return replace(config, quantization=METHODS[method](raw, checkpoint))
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.path / 'config.json'}: {error}") from None
