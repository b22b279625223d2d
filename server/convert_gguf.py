"""Turns a GGUF file into a Hugging Face folder: `python convert_gguf.py FILE.gguf FOLDER`.

Run by `octavo pull` as a process of its own, because it loads torch and transformers and holds all weights at once.
Writes config, generation config, tokenizer, chat template and bfloat16 safetensors; makes no outbound request.
"""

import os
import sys
from pathlib import Path


def main(source: Path, folder: Path) -> None:
    """Converts `source` into `folder`, which may exist. Errors are transformers' own."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if not tokenizer.chat_template:
        raise ValueError(f"{source.name} holds no chat template")
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # else the weights stay packed
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it describes the file that was read
    model.config._name_or_path = ""
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
