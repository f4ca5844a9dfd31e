"""The length of the response: the longer, the harder."""

from collections.abc import Sequence

from pocl.difficulty.measuring import Column, Request, Values

COLUMNS = {"response_tokens": Column("response length", "tokens", "data")}
SIGNALS = {"length": ("response_tokens",)}


def measure(request: Request, columns: Sequence[str]) -> Values:
    """The number of response tokens that are learnt of every example."""
    lengths = zip(request.train.ids.tolist(), request.train.num_labels.tolist(), strict=True)
    return {example_id: {"response_tokens": length} for example_id, length in lengths}
