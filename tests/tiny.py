"""Tiny models with random weights and a tiny tokenizer, saved as real model folders.

    python tests/tiny.py gpt2 STUDENT_DIR TEACHER_DIR [--tokenizer DIR]

The tokenizer is a byte-level BPE trained on the shipped instruction set; --tokenizer takes another one.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("gpt2", "opt", "llama", "qwen2")
END_OF_TEXT = "<|endoftext|>"


def tiny_tokenizer(vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the shipped instruction set."""
    lines = (ROOT / "data" / "sample" / "raw.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    texts = (f"{record['instruction']}\n{record['input']}\n{record['output']}" for record in records)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT)


def tiny_model(
    family: str, *, vocab_size: int, end_id: int, num_layers: int = 2, width: int = 32, seed: int = 0
) -> PreTrainedModel:
    """A causal language model of this family's shape with random weights, without dropout."""
    torch.manual_seed(seed)
    common = {"vocab_size": vocab_size, "bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    if family == "gpt2":
        config = GPT2Config(
            n_embd=width, n_layer=num_layers, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common
        )
        return GPT2LMHeadModel(config)
    sizes = {"hidden_size": width, "num_hidden_layers": num_layers, "num_attention_heads": 4}
    if family == "opt":
        # As opt-350m: the embeddings are narrower than the layers.
        config = OPTConfig(ffn_dim=2 * width, word_embed_proj_dim=width // 2, dropout=0.0, **sizes, **common)
        return OPTForCausalLM(config)
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 2 * width}
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **sizes, **common))
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **sizes, **common))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Save both as one model folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_pair(family: str, student_dir: Path, teacher_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tiny student and a wider, deeper teacher with the same tokenizer."""
    size = {"vocab_size": len(tokenizer), "end_id": tokenizer.eos_token_id}
    save_model(tiny_model(family, **size), tokenizer, student_dir)
    save_model(tiny_model(family, num_layers=3, width=48, seed=1, **size), tokenizer, teacher_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("student_dir", type=Path)
    parser.add_argument("teacher_dir", type=Path)
    parser.add_argument("--tokenizer", help="tokenizer folder")
    arguments = parser.parse_args()
    loaded = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else tiny_tokenizer()
    save_pair(arguments.family, arguments.student_dir, arguments.teacher_dir, loaded)
