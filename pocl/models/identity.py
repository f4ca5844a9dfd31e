"""What a model and a tokenizer are, and whether they fit each other: fingerprints, vocabularies, sizes, end tokens."""

import hashlib
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.common.errors import UserError
from pocl.common.files import value_sha256
from pocl.data.dataset import read_manifest
from pocl.models.loading import load_config, load_tokenizer


def shared_vocabulary(num_tokens: int, **models: PreTrainedModel) -> int | None:
    """How many logits the models keep: None for all, the tokenizer's size if one of them pads its vocabulary.

    Raises UserError if a model has fewer entries than the tokenizer; its keyword says which.
    """
    sizes = {name: _vocab_size(model) for name, model in models.items()}
    for name, size in sizes.items():
        if size < num_tokens:
            raise UserError(f"the {name} has {size} vocabulary entries, the tokenizer {num_tokens} tokens")
    return None if set(sizes.values()) == {num_tokens} else num_tokens


def _vocab_size(model: PreTrainedModel) -> int:
    return len(model.get_output_embeddings().weight)


def check_same_tokenizer(student: str, teacher: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the teacher's tokenizer is not the student's."""
    others = load_tokenizer(teacher)
    if tokenizer_fingerprint(others) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"student {student!r} ({len(tokenizer)} tokens) and teacher {teacher!r} ({len(others)} tokens) have "
            f"different tokenizers; white-box distillation compares them token by token"
        )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's end-of-text, and those that the model's own settings name."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({tokenizer.eos_token_id, *own})


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and a strided sample of every weight: cheap, and changes with any training step."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> int:
    """How many parameters the model has, counting tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_bytes(model: PreTrainedModel) -> int:
    """The bytes that the model's weights take, counting tied ones once."""
    return count_parameters(model) * model.dtype.itemsize


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, the end-of-text token and how a probe is split: equal tokenizers, equal values."""
    probe = "Below is an instruction.\n\n  naïve 北京 \t 3.14 don't"
    return value_sha256(
        [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, tokenizer.encode(probe, add_special_tokens=False)]
    )


def check_tokenizer(data_dir: Path, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Raise UserError where the data was processed for another tokenizer than the model's."""
    manifest = read_manifest(data_dir)
    if manifest["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{data_dir} was tokenised with {manifest['tokenizer']!r}, which differs from {model!r}; "
            f"run tools/process_data.py --tokenizer {model}"
        )


def check_positions(path: str, max_length: int) -> None:
    """Raise UserError if the model has too few positions for ``max_length`` tokens; the last is only predicted."""
    places = getattr(load_config(path), "max_position_embeddings", None)
    if places is not None and max_length - 1 > places:
        raise UserError(f"`max_length` {max_length}, but {path!r} reads at most {places} tokens; lower it")
