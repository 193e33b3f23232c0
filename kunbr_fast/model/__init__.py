"""A Hugging Face causal language model, taken apart: decoder, blocks, prefix cache, streamed layers, patch."""
