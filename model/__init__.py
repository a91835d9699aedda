"""The DeepSeek-V2 network: configuration, checkpoints, forward pass, caches, tokenizer, answers."""
