"""Prompts to answers: decoding, sampling, the key-value cache, vLLM."""
