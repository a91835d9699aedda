"""The DeepSeek-V2 network: configuration, checkpoint reader, forward pass, latent KV cache,
tokenizer, generation."""
