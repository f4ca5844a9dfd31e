"""What tools/benchmark.py measures with: pairs of models with random weights, and examples of real lengths."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from pocl.common.errors import UserError
from pocl.common.files import ROOT
from pocl.data.dataset import Split, load_split
from pocl.data.processing import encode
from pocl.data.records import load_records
from pocl.models.loading import DTYPES


def _gpt2(width: int, layers: int, heads: int, vocab_size: int = 50257) -> GPT2Config:
    return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, vocab_size=vocab_size)


def _opt(width: int, layers: int, heads: int, **others: Any) -> OPTConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * width}
    return OPTConfig(vocab_size=50272, **sizes, **others)


def _smollm2(layers: int) -> LlamaConfig:
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, **heads}
    return LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **sizes)


# name -> (student, teacher)
PAIRS: dict[str, Callable[[], tuple[PreTrainedConfig, PreTrainedConfig]]] = {
    "gpt2": lambda: (_gpt2(768, 12, 12), _gpt2(1600, 48, 25)),
    "opt": lambda: (_opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False), _opt(2560, 32, 32)),
    "small": lambda: (_gpt2(256, 4, 4), _gpt2(512, 12, 8)),
    "smollm2": lambda: (_smollm2(8), _smollm2(30)),
    "micro": lambda: (_gpt2(32, 2, 2, 500), _gpt2(48, 3, 3, 500)),
}


def build_model(config: PreTrainedConfig, *, dtype: str, device: torch.device, head_only: bool = False) -> Any:
    """A model of this shape with random weights; ``head_only``: without its layers, for what needs the head alone."""
    # Logits of about the size that a trained model has: with flat ones the divergence would hardly count.
    setattr(config, "init_std" if hasattr(config, "init_std") else "initializer_range", 2.0 / config.hidden_size**0.5)
    torch.manual_seed(config.num_hidden_layers)
    if head_only:
        config.num_hidden_layers = 0
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return model.eval()  # no dropout: the variants must agree


def load_examples(data_dir: Path | None, count: int, *, max_length: int, vocab_size: int) -> Split:
    """``count`` examples, drawn at random, of a processed folder or of the set that ships with the project."""
    whole = load_split(data_dir, "train", max_length=max_length) if data_dir else shipped_split(max_length)
    positions = np.flatnonzero(whole.prompt_lengths < max_length)
    if len(positions) < count:
        raise UserError(
            f"{data_dir or 'data/sample'} has {len(positions)} examples, --batch times --rounds asks for {count}"
        )
    rows = whole.table.select(np.random.default_rng(0).choice(positions, count, replace=False))

    def fitting(row: Mapping[str, Any]) -> dict[str, list[int]]:
        """The tokens of another vocabulary as some of this one: only their number matters here."""
        return {name: [token % vocab_size for token in row[name]] for name in ("prompt_ids", "response_ids")}

    return Split(rows.map(fitting), max_length)


@cache
def shipped_split(max_length: int) -> Split:
    """data/sample in the tokens of a byte-level BPE that is trained on it."""
    raw = ROOT / "data" / "sample" / "raw.jsonl"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([raw.read_text(encoding="utf-8")], vocab_size=8000, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="\n")
    records = load_records(raw)
    return encode(records, tokenizer, template="alpaca", max_length=max_length, max_prompt_length=max_length - 1)
