"""Build a student from some layers of a larger model: embeddings, head and final norm are kept, the tokenizer copied.

    python tools/make_student.py --model checkpoints/smollm2/teacher --layers 0 1 26 27 28 29 \\
        --output-dir checkpoints/smollm2/student
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from numerize.numerize import numerize
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say
from pocl.common.errors import UserError, first_line
from pocl.models.identity import count_parameters
from pocl.models.loading import load_model, load_template, load_tokenizer
from pocl.models.states import some_logits, text_config
from pocl.models.tuning import layer_stack
from tools.folders import check_place, written_whole

_NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "cross_attention_layers",
)
_FROM_START = ("first_k_dense_replace", "num_dense_layers")  # so many layers are of another kind
_FROM_END = ("num_kv_shared_layers",)


@dataclass(frozen=True)
class StudentOptions:
    """Which layers of which model."""

    _argument_group_name: ClassVar[str] = "student"
    model: str = flag("the larger model: a folder or hub name")
    output_dir: str = flag("folder to write; replaced if it holds a model")
    layers: list[int] | None = flag("layers to keep, counted from 0, in order", None)
    num_layers: int | None = flag(
        "or: how many layers to keep, the first quarter of them from the start", None, above=0
    )

    def check(self) -> None:
        """Raise UserError where neither or both of --layers and --num-layers are given."""
        if (self.layers is None) == (self.num_layers is None):
            raise UserError("give either --layers (which ones) or --num-layers (how many)")


def main() -> None:
    """Load, cut, save."""
    quiet_libraries()
    (what,) = parse([StudentOptions], "Build a student from some layers of a larger model.")
    output_dir = Path(what.output_dir)
    check_output(output_dir, what.model)
    model, tokenizer, template = load_model(what.model), load_tokenizer(what.model), load_template(what.model)
    stack = layer_stack(model)
    layers = default_layers(len(stack), what.num_layers) if what.layers is None else what.layers
    check_layers(layers, len(stack))
    before = count_parameters(model)
    with told(model, layers), written_whole(output_dir) as temporary:
        keep_layers(model, layers)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if template:
            template.save(temporary)
        check_reloaded(model, temporary)
    say(
        f"{output_dir}: layers {' '.join(map(str, layers))} of {len(stack)}, "
        f"{numerize(count_parameters(model))} of {numerize(before)} parameters"
    )


def check_output(output_dir: Path, model: str) -> None:
    """Raise UserError where the folder holds what must not be replaced: the larger model, a run, anything else."""
    if output_dir.resolve() == Path(model).resolve():
        raise UserError(f"--output-dir {output_dir} is the larger model itself; give another --output-dir")
    check_place(output_dir, "a model", "config.json", "*.safetensors")  # a run's folder has the first of them too


def default_layers(total: int, num_layers: int) -> list[int]:
    """The first quarter of the kept layers from the start, the others from the end.

    Measured on SmolLM2-135M (README): the last layers carry the most of what a cut model still knows.
    """
    if num_layers > total:
        raise UserError(f"--num-layers {num_layers}: the model has {total} layers")
    first = max(1, num_layers // 4)
    return [*range(first), *range(total - (num_layers - first), total)]


def check_layers(layers: list[int], total: int) -> None:
    """Raise UserError for layers that are not there, twice there, or out of order."""
    if not layers or min(layers) < 0 or max(layers) >= total:
        raise UserError(f"--layers {' '.join(map(str, layers))}: the model has layers 0 to {total - 1}")
    if sorted(set(layers)) != layers:
        raise UserError(f"--layers {' '.join(map(str, layers))}: give each once, in rising order")


def keep_layers(model: PreTrainedModel, layers: list[int]) -> None:
    """Cut the model down to these layers, in place."""
    stack = layer_stack(model)
    kept = nn.ModuleList(stack[i] for i in layers)
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is stack:
                setattr(parent, name, kept)
    for index, layer in enumerate(kept):  # the key-value cache is addressed by this number
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    cut_settings(text_config(model), layers, len(stack))


def cut_settings(config: PretrainedConfig, layers: list[int], total: int) -> None:
    """Make a configuration of ``total`` layers one of these, in place: every list as long as the layers is cut."""
    for name, value in list(vars(config).items()):
        if name in _NUMBERS and value:
            setattr(config, name, [layers.index(i) for i in value if i in layers])
        elif isinstance(value, list) and len(value) == total and not name.endswith(("token_id", "architectures")):
            setattr(config, name, [value[i] for i in layers])
        elif name in _FROM_START and value:
            setattr(config, name, sum(i < value for i in layers))
        elif name in _FROM_END and value:
            setattr(config, name, sum(i >= total - value for i in layers))
        elif name == "attention_types":  # GPT-Neo: [kinds, how often] each
            kinds = [kind for names, times in value for kind in names * times]
            setattr(config, name, [[[kinds[i]], 1] for i in layers])
    config.num_hidden_layers = len(layers)


def check_reloaded(model: PreTrainedModel, folder: Path) -> None:
    """Raise UserError if the student in ``folder`` is not the model that was cut."""
    wanted, found = some_logits(model), some_logits(load_model(str(folder)))
    off = torch.norm(found - wanted) / torch.norm(wanted)
    if not off < 1e-3:
        raise UserError(f"read again, its logits are {off:.1%} off, since a layer of it depends on its number")


@contextmanager
def told(model: PreTrainedModel, layers: list[int]) -> Iterator[None]:
    """Say of any failure that the model cannot be cut to these layers."""
    try:
        yield
    except (
        UserError,
        StrictDataclassError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:
        raise UserError(
            f"this {model.config.model_type} cannot be cut to the layers {' '.join(map(str, layers))}: "
            f"{first_line(error)}; give other --layers, or a smaller model of its family as the student"
        ) from error


if __name__ == "__main__":
    run_main(main)
