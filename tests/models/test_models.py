"""Trunk and head apart give the model's logits; folders that cannot be trusted or used are refused."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)
from transformers.activations import NewGELUActivation

from pocl.common.errors import UserError
from pocl.data.batch import collate
from pocl.data.templates import Template
from pocl.losses.head import Head
from pocl.models.identity import (
    check_positions,
    check_same_tokenizer,
    count_parameters,
    end_ids,
    shared_vocabulary,
    weights_fingerprint,
)
from pocl.models.loading import load_model, load_tokenizer
from pocl.models.states import check_head, make_head, response_states
from pocl.models.tuning import train_only_last_layers
from tests.tiny import FAMILIES, save_model, tiny_model, tiny_tokenizer

Shake = Callable[[PreTrainedModel], PreTrainedModel]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


class ScaledLlama(LlamaForCausalLM):
    """Multiplies its logits, which no field of its configuration says."""

    factor = 1.5

    def forward(self, *inputs: Any, **options: Any) -> Any:
        output = super().forward(*inputs, **options)
        output.logits = output.logits * self.factor
        return output


def special_model(name: str) -> PreTrainedModel:
    """A model that touches its logits behind the head."""
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(head_dim=8, final_logit_softcapping=0.5, **SIZES))
    if name == "granite":
        return GraniteForCausalLM(GraniteConfig(logits_scaling=8.0, **SIZES))
    return CohereForCausalLM(CohereConfig(logit_scale=0.0625, **SIZES))


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_and_head_apart_give_the_models_logits(models: dict[str, PreTrainedModel], family: str) -> None:
    model = models[family]
    batch = collate([0, 1, 2], [[5, 6, 7], [8], [9, 10]], [[11, 0], [12, 13, 14, 15, 16, 0], [17]], max_length=64)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found = make_head(model)(response_states(model, batch))
    # By hand: the positions before each response token. Row 0: 2, 3. Row 1: 0 to 5. Row 2: 1.
    wanted = torch.cat([logits[0, 2:4], logits[1, 0:6], logits[2, 1:2]])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    assert batch.response_labels().tolist() == [11, 0, 12, 13, 14, 15, 16, 0, 17]


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_caps_and_scales_behind_the_head_are_applied(name: str, shake: Shake) -> None:
    model = shake(special_model(name))
    ids = torch.tensor([[3, 9, 27, 17, 51, 25]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        states = model.base_model(input_ids=ids).last_hidden_state
        bare, found = model.get_output_embeddings()(states), make_head(model)(states)
    assert (bare - wanted).abs().max() > 0.05  # else the test would show nothing
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    check_head(model, name, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_head_passes_the_check(models: dict[str, PreTrainedModel], family: str) -> None:
    check_head(models[family], family, torch.device("cpu"))


@pytest.mark.parametrize("factor", [1.5, 0.9, 1.005])
def test_an_unknown_change_behind_the_head_is_refused(factor: float, shake: Shake) -> None:
    model = shake(ScaledLlama(LlamaConfig(**SIZES))).float()
    model.factor = factor
    with pytest.raises(UserError, match=r"'odd' \(llama\) changes its logits after the head"):
        check_head(model, "odd", torch.device("cpu"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_heads_product_and_its_gradients_are_the_layers_own(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, whole = torch.nn.Linear(24, 600, bias=bias), torch.randn(2 * rows, 3, 24)
    found, wanted = [], []
    for product, results in ((Head(layer), found), (layer, wanted)):
        states = whole[::2, 1].requires_grad_()  # not contiguous, as the last position of a batch is
        logits = product(states)
        (logits**2).sum().backward()
        results += [logits, states.grad, *(parameter.grad for parameter in layer.parameters())]
        layer.zero_grad()
    torch.testing.assert_close(found, wanted)


def test_gpt2s_activation_is_one_kernel_of_the_same_function(gpt2_dir: Path) -> None:
    model = load_model(str(gpt2_dir))
    activations = [layer.mlp.act for layer in model.transformer.h]
    assert activations and all(isinstance(act, nn.GELU) for act in activations)
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    torch.testing.assert_close(activations[0](x), NewGELUActivation()(x), rtol=1e-12, atol=1e-12)
    assert model.config.activation_function == "gelu_new"  # what is saved names the function as before


def test_a_head_that_is_no_linear_layer_is_refused(models: dict[str, PreTrainedModel]) -> None:
    model = copy.deepcopy(models["gpt2"])
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(UserError, match="the head of gpt2 is Sequential; expected a linear layer"):
        make_head(model)


def test_the_head_cuts_off_padded_vocabulary(teacher: PreTrainedModel) -> None:
    states = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert make_head(teacher)(states).shape == (3, 640)
    assert make_head(teacher, 600)(states).equal(make_head(teacher)(states)[:, :600])


def test_a_text_is_as_long_as_the_model_has_positions_for_and_no_longer(gpt2_dir: Path) -> None:
    model, longest = load_model(str(gpt2_dir)), 1024 + 1  # the last token is only predicted

    def read(max_length: int) -> torch.Tensor:
        return response_states(model, collate([0], [[5]], [[7] * max_length], max_length=max_length))

    check_positions(str(gpt2_dir), longest)
    assert read(longest).shape == (1024, 32)
    with pytest.raises(IndexError):
        read(longest + 1)
    with pytest.raises(UserError, match=f"`max_length` {longest + 1}, but .* reads at most 1024 tokens"):
        check_positions(str(gpt2_dir), longest + 1)


@pytest.fixture
def folder(gpt2_dir: Path, tmp_path: Path) -> Path:
    """A copy of a good model folder, to be spoilt."""
    return Path(shutil.copytree(gpt2_dir, tmp_path / "model"))


def refusal(path: str | Path) -> str:
    """The one line with which load_model refuses."""
    with pytest.raises(UserError) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BartConfig(), "bart is an encoder with a decoder"),
        (BertConfig(), "bert sees the tokens behind the one that it writes, too"),
        (T5Config(), "t5 is an encoder with a decoder"),
        (ViTConfig(), "vit has no such model in transformers"),
    ],
    ids=["bart", "bert", "t5", "vit"],
)
def test_what_does_not_write_from_left_to_right_is_refused_for_that(
    config: PretrainedConfig, why: str, folder: Path
) -> None:
    config.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"is no causal language model \({why}\); give one"):
        load_model(str(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(UserError, match="is no causal language model"):
        load_tokenizer(str(folder))


def longrope() -> PreTrainedModel:
    """A model whose rotary embeddings change beyond 12 tokens, though it reads 48."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0, 4.0, 2.0, 8.0]}
    torch.manual_seed(0)
    sizes = SIZES | {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "original_max_position_embeddings": 12,
    }
    return Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=rope)).eval()


def test_a_text_is_not_longer_than_where_rotary_embeddings_depend_on_the_batch(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = longrope()
    save_model(model, tokenizer, tmp_path)
    check_positions(str(tmp_path), 13)  # the last token is only predicted
    with pytest.raises(UserError, match=r"`max_length` 14, but beyond 12 tokens .* \(rope_type 'longrope'\).* to 13$"):
        check_positions(str(tmp_path), 14)
    short, long = [5] * 4, [7] * 13

    def states(*prompts: list[int], max_length: int) -> torch.Tensor:
        batch = collate(range(len(prompts)), prompts, [[3, 4]] * len(prompts), max_length=max_length)
        return response_states(model, batch)[:2]

    alone = states(short, max_length=13)
    torch.testing.assert_close(states(short, long[:11], max_length=13), alone)
    assert not torch.allclose(states(short, long, max_length=15), alone, rtol=1e-3)  # what the limit keeps away


def test_a_good_folder_loads_in_evaluation_mode(gpt2_dir: Path) -> None:
    model = load_model(str(gpt2_dir))
    assert not model.training and model.dtype == torch.float32
    assert load_model(str(gpt2_dir), "bf16").dtype == torch.bfloat16


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nothing")
    assert "is not a folder" in refusal("./nothing/here")


@pytest.mark.parametrize(
    ("place", "way"),
    [
        ("checkpoints/gpt2/base", "python tools/fetch.py models downloads those of the scripts"),
        ("results/opt/teacher/sft/seed10/best", "scripts/<family>/sft/teacher.sh trains a teacher"),
    ],
)
def test_a_folder_that_is_not_there_is_told_with_what_makes_it(place: str, way: str, tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / place} is not a folder; a model needs")) as caught:
            load(str(tmp_path / place))
        assert way in str(caught.value)


def unknown_name() -> OSError:
    """What transformers raises where the hub knows no such name."""
    error = OSError("nowhere is not a local folder and is not a valid model identifier")
    error.__cause__ = RepositoryNotFoundError("404", response=MagicMock())
    return error


@pytest.mark.parametrize(
    ("name", "raised", "told"),
    [
        ("nowhere", None, "the hub could not be reached"),  # the tests are offline
        ("some/where", None, "the hub could not be reached"),
        ("my model", None, "the hub has no model of this name"),
        ("nowhere", unknown_name(), "the hub has no model of this name"),
    ],
)
def test_a_name_that_is_no_folder_is_told_to_be_none_before_the_hub_is_named(
    name: str, raised: OSError | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if raised:
        for kind in (AutoConfig, AutoTokenizer):
            monkeypatch.setattr(kind, "from_pretrained", Mock(side_effect=raised))
        monkeypatch.setattr("pocl.models.loading.find_adapter_config_file", lambda path: None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError) as caught:
            load(name)
        assert str(caught.value) == f"there is no folder {name!r} here, and {told}; give a model folder"


def test_what_the_hub_says_of_a_model_that_it_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError("You are trying to access a gated repo.\nMake sure to have access to it")
    error.__cause__ = GatedRepoError("403", response=MagicMock())
    monkeypatch.setattr("pocl.models.loading.find_adapter_config_file", lambda path: None)
    monkeypatch.setattr(AutoConfig, "from_pretrained", Mock(side_effect=error))
    assert refusal("their/model").endswith("'their/model': You are trying to access a gated repo.")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "holds no config.json" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unread(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"no pickle at all: reading it would raise something else")
    assert f"pickled weights ({name})" in refusal(folder)


def test_pickled_weights_beside_safetensors_are_not_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert count_parameters(load_model(str(folder))) > 0


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors_are_refused(folder: Path, kept: float) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else int(kept)])
    assert "damaged" in refusal(folder)


def test_weights_that_lack_a_layer_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({n: w for n, w in load_file(path).items() if ".h.1." not in n}, path, metadata={"format": "pt"})
    refusal(folder)


def test_weights_of_another_size_than_the_config_are_refused(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"n_embd": 64}))
    refusal(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "null", '"gpt2"', '{"model_type": "nope"}', '{"model_type": "gpt2", "n_embd": "wide"}']
)
def test_a_broken_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refusal(folder)


def test_code_that_came_with_a_model_is_not_run(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "odd.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Odd: pass\n")
    refusal(folder)
    assert not (folder / "ran").exists()


def test_what_is_no_models_folder_is_named_by_the_tokenizer_as_well(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is not a folder; a model needs"):
        load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "best").mkdir()
    (tmp_path / "config.json").write_text("{}")
    for load in (load_tokenizer, load_model):
        with pytest.raises(UserError, match=f"{tmp_path} is a run's folder; its student is {tmp_path / 'best'}"):
            load(str(tmp_path))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_the_shared_vocabulary_is_everything_where_sizes_agree(models: dict[str, PreTrainedModel]) -> None:
    assert shared_vocabulary(600, student=models["gpt2"], teacher=models["llama"]) is None
    assert shared_vocabulary(590, student=models["gpt2"], teacher=models["llama"]) == 590  # both pad alike


def test_a_student_that_pads_learns_and_ranks_over_the_tokenizers_entries(models: dict[str, PreTrainedModel]) -> None:
    assert shared_vocabulary(590, student=models["gpt2"]) == 590
    assert shared_vocabulary(600, student=models["gpt2"]) is None


def test_the_shared_vocabulary_is_the_tokenizers_where_one_model_pads(
    models: dict[str, PreTrainedModel], teacher: PreTrainedModel
) -> None:
    assert shared_vocabulary(600, student=models["gpt2"], teacher=teacher) == 600
    assert shared_vocabulary(600, student=teacher, teacher=models["gpt2"]) == 600
    assert shared_vocabulary(590, student=models["gpt2"], teacher=teacher) == 590


def test_a_model_smaller_than_its_tokenizer_is_refused(
    models: dict[str, PreTrainedModel], teacher: PreTrainedModel
) -> None:
    with pytest.raises(UserError, match="the student has 600 vocabulary entries, the tokenizer 620 tokens"):
        shared_vocabulary(620, student=models["gpt2"], teacher=teacher)
    with pytest.raises(UserError, match="the teacher has 600 vocabulary entries, the tokenizer 620 tokens"):
        shared_vocabulary(620, student=teacher, teacher=models["gpt2"])


def test_another_tokenizer_is_refused(gpt2_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    check_same_tokenizer("student", str(gpt2_dir), tokenizer)
    tiny_tokenizer(500).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'student' \(600 tokens\) and teacher .* \(500 tokens\)"):
        check_same_tokenizer("student", str(tmp_path), tokenizer)


def test_a_tokenizer_of_the_same_size_with_other_merges_is_refused(
    gpt2_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    first, second = [token for token, number in vocabulary.items() if number in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="different tokenizers"):
        check_same_tokenizer("student", str(tmp_path), tokenizer)


@pytest.mark.parametrize(("own", "wanted"), [(None, [0]), (0, [0]), (7, [0, 7]), ([9, 7], [0, 7, 9])])
def test_answers_end_at_the_tokenizers_and_the_models_own_tokens(
    tokenizer: PreTrainedTokenizerBase, own: Any, wanted: list[int]
) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert tokenizer.eos_token_id == 0
    assert end_ids(model, tokenizer, Template()) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_survives_saving_and_loading(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, family: str
) -> None:
    model = tiny_model(family, vocab_size=len(tokenizer), end_id=0)
    save_model(model, tokenizer, tmp_path)
    assert weights_fingerprint(load_model(str(tmp_path))) == weights_fingerprint(model)
    assert weights_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == weights_fingerprint(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_changes_with_one_optimiser_step(models: dict[str, PreTrainedModel], family: str) -> None:
    model = copy.deepcopy(models[family])
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(models[family])
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-5).step()
    assert weights_fingerprint(model) != before


def test_tied_parameters_are_counted_once() -> None:
    # Embedding 64 x 16, two layers of: q 16x16, k and v 16x8 each, o 16x16, mlp 3 x 16x32, two norms; one last norm.
    layers = 2 * (256 + 128 + 128 + 256 + 3 * 512 + 2 * 16) + 16
    assert count_parameters(LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SIZES))) == 1024 + layers
    assert count_parameters(LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SIZES))) == 2048 + layers


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_last_layers_of_opt_have_their_final_norm(norm_first: bool) -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    width = 16 if norm_first else 8
    model = OPTForCausalLM(OPTConfig(do_layer_norm_before=norm_first, word_embed_proj_dim=width, **sizes))
    train_only_last_layers(model, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    outside = {name.split(".")[-2] for name in trained if ".layers." not in name}
    assert outside == ({"final_layer_norm"} if norm_first else set())
    assert all(".layers.1." in name for name in trained if ".layers." in name)
