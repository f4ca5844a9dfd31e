"""PAPER  The objective: divergences, one token, chunks of tokens from hidden states (torch alone)."""
