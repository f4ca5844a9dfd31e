"""Every causal family of the installed transformers, tiny and random: what works, and what is refused and why.

Objective and gradient against the model's own logits, packed against padded, greedy answers against transformers',
adapters against the merged model, a cut student and a saved model against what is read again.
"""

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pocl.data.batch import Batch, collate
from pocl.generation.decoding import Sampling, generate
from pocl.models.attention import attend_by_example
from pocl.models.loading import load_model
from pocl.models.lora import add_adapters, merged_weights
from pocl.models.packing import why_not_packed
from pocl.models.states import check_head, make_head, response_states, some_logits
from pocl.models.student import Student
from tests.models.tiny_families import FAMILIES, tiny_family
from tools.make_student import check_reloaded, keep_layers, told

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 20, 31, 7, 8, 9, 10, 11, 12, 13, 14], [77, 12, 3], [8, 50, 3]]
RESPONSES = [[10, 11, 12, 3], [13, 4, 60], [5, 6]]
GREEDY = Sampling(max_new_tokens=4, temperature=0.0, no_repeat_ngram=0)

# (what, why): which families; what is in no line works.
REFUSED: dict[tuple[str, str], str] = {
    ("adapters", "RuntimeError The size of tensor a (1024) must match the size"): "deepseek_v4",
    ("adapters", "differs"): "falcon_mamba jamba longcat_flash",
    ("answers", "RuntimeError The expanded size of the tensor (8) must match "): "xlstm",
    ("cut", "depends on its number"): "beam diffllama minicpm3",
    ("cut", "is invalid for input of size"): "gemma3n_text gemma4 gemma4_text",
    ("cut", "lack"): (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart whisper xlstm "
    ),
    ("cut", "per_layer_config"): "gemma4_unified gemma4_unified_text",
    ("cut", "stacks of"): "git hrm_text longcat_flash",
    ("loaded", "changes its logits after the head"): "inkling_text modernbert-decoder prophetnet",
    ("loaded", "differs"): "youtu",
    ("loaded", "is no causal language model"): (
        "bert bert-generation big_bird camembert data2vec-text electra emu3 ernie megatron-bert mllama rembert "
        "roberta roberta-prelayernorm roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod "
    ),
    ("packed", "does not keep packed examples apart"): "doge falcon gpt_oss openai-gpt phimoe xglm",
    ("packed", "fails: "): "ctrl git nemotron stablelm",
    ("packed", "has layers of"): (
        "axk2 bailing_hybrid bamba deepseek_v32 deepseek_v4 falcon_h1 glm_moe_dsa granitemoehybrid hy_v4 "
        "inkling2_text jamba lfm2_moe lfm3 llama4 llama4_text minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe "
        "recurrent_gemma qwen3_5_moe_text qwen3_5_text qwen3_next zaya "
    ),
    ("packed", "takes no position_ids"): (
        "bart bigbird_pegasus blenderbot blenderbot-small bloom falcon_mamba mamba mamba2 marian mbart mvp "
        "pegasus plbart rwkv trocr whisper xlstm "
    ),
}
# Whose tiny configuration transformers does not take.
UNBUILT: dict[str, str] = {
    "blt": "96287488 parameters",
    "cohere_compass_text": "'full_attention'",
    "cpmant": "4240672 parameters",
    "dbrx": "'DbrxAttentionConfig' object has no attribute 'rope_theta'",
    "dots3_note": "`per_layer_config` keys must be integer layer indices in the range [0,",
    "dots3_note_text": "76919904 parameters",
    "gemma3n": "TimmWrapperModel requires the timm library but it was not found in you",
    "gemma4_assistant": "ValueError: hidden_size_per_layer_input must be 0, got 256",
    "gemma4_unified_assistant": "The set of layer types producing a cache is different than the set of ",
    "kimi_linear": "6576416 parameters",
    "mpt": "Validation error for field 'attn_pdrop'",
    "musicgen": "'MusicgenConfig' object has no attribute 'dropout'",
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute 'dropout'",
    "phi4_multimodal": "6230992 parameters",
    "qwen4_exp": "unsupported operand type(s) for //: 'NoneType' and 'NoneType'",
    "qwen4_exp_text": "unsupported operand type(s) for //: 'NoneType' and 'NoneType'",
    "reformer": "If you want to use `ReformerModelWithLMHead` make sure that `is_decode",
    "roc_bert": "13510816 parameters",
    "zamba": "There is an issue with your definition of `tie_weights_keys` for ^laye",
    "zamba2": "ValueError: `num_hidden_layers` (4) must be equal to the number of `la",
}


def shaken(family: str) -> PreTrainedModel:
    """A model in which no bias is zero and no norm is one."""
    model = tiny_family(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.config.use_cache = False
    return model


def difference(found: Tensor, wanted: Tensor) -> str | None:
    off = float(torch.norm(found - wanted) / torch.norm(wanted))
    return None if off < 1e-3 else "differs"


def learns(model: PreTrainedModel) -> str | None:
    """The cross-entropy of a padded batch and its gradient, against the model's own logits of each text alone."""
    gradients = []
    own = torch.zeros(())
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response[:-1]]), use_cache=False).logits
        own = own + cross_entropy(logits[0, len(prompt) - 1 :], torch.tensor(response), reduction="sum")
    batch = collate(range(3), PROMPTS, RESPONSES, max_length=32)
    for loss in (own, objective(model, batch)):
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        gradients.append(loss.detach()[None])
    model.zero_grad()
    return difference(gradients[2], gradients[0]) or difference(gradients[3], gradients[1])


def objective(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits = make_head(model)(response_states(model, batch))
    return cross_entropy(logits, batch.response_labels(), reduction="sum")


def packs(model: PreTrainedModel) -> str | None:
    """Packed examples are refused with a reason, or give the padded objective."""
    why = why_not_packed(model, CPU)
    if why is not None:
        return why
    batch = collate(range(3), PROMPTS, RESPONSES, max_length=32)
    with torch.no_grad():
        return difference(objective(model, batch.packed()), objective(model, batch))


def answers(model: PreTrainedModel, by_example: PreTrainedModel) -> str | None:
    """Greedy answers of one batch are those of transformers, one by one."""
    wanted = []
    for prompt in PROMPTS[:2]:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "forced_eos_token_id": None}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, use_cache=True, **options)
        wanted.append(text[0, len(prompt) :].tolist())
    model.config.use_cache = False

    class Answering(Student):
        end_ids = ()
        head = make_head(by_example)

    found = generate(Answering(by_example, None), PROMPTS[:2], [0, 1], GREEDY)
    return None if found == wanted else "differs"


def adapts(model: PreTrainedModel, adapted: PreTrainedModel) -> str | None:
    """The merged weights are the adapted model, a copy; the model has them afterwards."""
    plain = some_logits(model)
    add_adapters(adapted, "x", lora_rank=2, lora_alpha=None, lora_dropout=0.0, lora_targets=["all-linear"], seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wanted = some_logits(adapted)
    if difference(wanted, plain) is None:
        return "changes nothing"
    model.load_state_dict(merged_weights(adapted, adapted.state_dict()))
    return difference(some_logits(model), wanted)


def cuts(folder: Path, model: PreTrainedModel) -> str | None:
    model = copy.deepcopy(model)
    with told(model, [0, 3]):
        keep_layers(model, [0, 3])
        model.save_pretrained(folder / "cut")
        check_reloaded(model, folder / "cut")
    return None


def tried(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        return f"{type(error).__name__} {error}".replace("\n", " ")


def findings(family: str, folder: Path) -> dict[str, str]:
    """What does not work, by name, and why."""
    model = shaken(family)
    model.save_pretrained(folder / "saved")

    def loads() -> str | None:
        loaded = load_model(str(folder / "saved"))
        check_head(loaded, family, CPU)
        return difference(some_logits(loaded), some_logits(model))

    refused = tried(loads)
    if refused is not None:
        return {"loaded": refused}
    by_example, adapted = copy.deepcopy(model), copy.deepcopy(model)  # before a forward pass leaves states in it
    attend_by_example(by_example)
    found = {
        "packed": tried(partial(packs, by_example)),
        "answers": tried(partial(answers, model, by_example)),
        "cut": tried(partial(cuts, folder, model)),
        "trained": tried(partial(learns, model)),
        "adapters": tried(partial(adapts, model, adapted)),
    }
    return {name: why for name, why in found.items() if why is not None}


def test_the_tables_name_families_that_there_are() -> None:
    named = [family for families in REFUSED.values() for family in families.split()]
    assert {*named, *UNBUILT} <= FAMILIES.keys() and not {*named} & UNBUILT.keys()


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - UNBUILT.keys()))
def test_a_family_works_but_for_what_is_named(family: str, tmp_path: Path) -> None:
    wanted = {what: why for (what, why), families in REFUSED.items() if family in families.split()}
    with warnings.catch_warnings(action="ignore"):
        found = findings(family, tmp_path)
    assert found.keys() == wanted.keys(), found
    for what, why in wanted.items():
        assert why in found[what]


@pytest.mark.parametrize("family", sorted(UNBUILT))
def test_what_is_not_tried_cannot_be_built(family: str) -> None:
    with pytest.raises(Exception, match=re.escape(UNBUILT[family])):
        tiny_family(family)
