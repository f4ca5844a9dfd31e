"""What a run keeps while it trains: its position, checkpoints, records, finished parts, and how it is stopped."""
