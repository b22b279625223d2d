"""Text in and out of tokens: tokenizer, chat template, incremental detokenizer. Never loads torch."""
