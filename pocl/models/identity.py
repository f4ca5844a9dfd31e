"""What a model and a tokenizer are, and whether they fit each other: fingerprints, vocabularies, sizes, end tokens."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import value_sha256
from pocl.data.dataset import read_manifest
from pocl.data.templates import Template
from pocl.models.loading import load_config, load_tokenizer

_PROBE = "Below is an instruction.\n\n  naïve 北京 \t 3.14 don't"


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


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's highest id + 1: there may be fewer tokens, since ids may be left out."""
    return max(tokenizer.get_vocab().values()) + 1


def used_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, most: int | None = None) -> int:
    """How many entries of the model's vocabulary are used: those that the tokenizer names, and at most ``most``."""
    return min(filter(None, (vocabulary_size(tokenizer), _vocab_size(model), most)))


def vocab_rows(path: str) -> int | None:
    """How many vocabulary entries a model has by its configuration; None if that does not say."""
    return getattr(load_config(path).get_text_config(), "vocab_size", None)


def check_ids(highest: int, place: str, *models: str) -> None:
    """Raise UserError if a model has no vocabulary entry for the ``highest`` token id of the texts in ``place``."""
    for path in models:
        rows = vocab_rows(path)
        if rows is not None and highest >= rows:
            tokenizer = load_tokenizer(models[0])
            name, wanted = tokenizer.convert_ids_to_tokens(highest), max(highest + 1, vocabulary_size(tokenizer))
            raise UserError(
                f"{place} holds the token {name!r} of id {highest}, but {path!r} has {rows} vocabulary entries; "
                f"resize it: resize_token_embeddings({wanted}) of transformers, then train the new entries"
            )


def check_same_tokenizer(student: str, teacher: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the teacher's tokenizer is not the student's, but for special and other added tokens.

    Those stand in no text. Where the two end texts differently, it is said whose end is trained.
    """
    others = load_tokenizer(teacher)
    differences = _differences(tokenizer, others)
    if differences:
        raise UserError(
            f"student {student!r} ({len(tokenizer)} tokens) and teacher {teacher!r} ({len(others)} tokens) have "
            f"different tokenizers ({differences}); white-box distillation compares them token by token"
        )
    if tokenizer.eos_token != others.eos_token:
        say(
            f"{student} ends texts with {tokenizer.eos_token}, the teacher {teacher} with {others.eos_token}: the "
            f"student's {tokenizer.eos_token} is trained"
        )


def check_same_ids(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, teacher: str) -> None:
    """Raise UserError if one of these ids of a template's texts is another token to the teacher's tokenizer."""
    others = load_tokenizer(teacher)
    for token in sorted(set(ids)):
        mine, theirs = tokenizer.convert_ids_to_tokens(token), others.convert_ids_to_tokens(token)
        if mine != theirs:
            raise UserError(
                f"the template writes {mine!r}, token {token}, which is {theirs!r} to the teacher {teacher!r}; give a "
                f"teacher of the same chat format, or process the data with --template alpaca"
            )


def _differences(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, shown: int = 3) -> str:
    """In which tokens that stand in texts two tokenizers differ, the first of them by id; empty if in none."""
    ids, other_ids = one.get_vocab(), other.get_vocab()
    added = {str(token) for each in (one, other) for token in each.added_tokens_decoder.values()}
    added |= {*one.all_special_tokens, *other.all_special_tokens}
    differing = [token for token in {*ids, *other_ids} - added if ids.get(token) != other_ids.get(token)]
    if differing:
        first = sorted(differing, key=lambda token: (ids.get(token, len(ids)), token))[:shown]
        words = [f"{token!r} is {ids.get(token, 'unknown')} and {other_ids.get(token, 'unknown')}" for token in first]
        return f"{len(differing)} tokens differ: {', '.join(words)}"
    return "" if _split(one) == _split(other) else f"{_PROBE!r} is split differently"


def _split(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(_PROBE, add_special_tokens=False))


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """The tokens that end an answer: the tokenizer's end-of-text, the template's ends of turns, and those that the
    model's own settings name."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, template.ends), *own})


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
    return value_sha256([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, _split(tokenizer)])


def check_tokenizer(data_dir: Path, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Raise UserError where the data was processed for another tokenizer than the model's."""
    manifest = read_manifest(data_dir)
    if manifest["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{data_dir} was tokenised with {manifest['tokenizer']!r}, which differs from {model!r}; "
            f"run tools/process_data.py --tokenizer {model}"
        )


def data_tokenizer(data_dir: Path, model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that data was processed for: that of a teacher that answers it, or one of the same texts.

    Raises UserError where the two differ in more than special and other added tokens.
    """
    manifest, own = read_manifest(data_dir), load_tokenizer(model)
    if manifest["tokenizer_fingerprint"] == tokenizer_fingerprint(own) or not Path(manifest["tokenizer"]).is_dir():
        check_tokenizer(data_dir, own, model)
        return own
    tokenizer = load_tokenizer(manifest["tokenizer"])
    check_tokenizer(data_dir, tokenizer, model)
    check_same_tokenizer(manifest["tokenizer"], model, tokenizer)
    return tokenizer


def check_positions(path: str, max_length: int) -> None:
    """Raise UserError if the model has too few positions for ``max_length`` tokens; the last is only predicted.

    Also where rotary embeddings change with the longest text of a batch, so that an example depends on its neighbours.
    """
    config = load_config(path).get_text_config(decoder=True)
    places = getattr(config, "max_position_embeddings", None)
    if places is not None and max_length - 1 > places:
        raise UserError(f"`max_length` {max_length}, but {path!r} reads at most {places} tokens; lower it")
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        name, first = kind.get("rope_type"), kind.get("original_max_position_embeddings")
        first = first or getattr(config, "original_max_position_embeddings", None) or places
        if name in ("longrope", "dynamic") and first is not None and max_length - 1 > first:
            raise UserError(
                f"`max_length` {max_length}, but beyond {first} tokens {path!r} (rope_type {name!r}) reads a text "
                f"otherwise beside a longer one; lower it to {first + 1}"
            )
