"""Records to batches: prompts, the processed data set, micro-batches."""
