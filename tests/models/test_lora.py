"""LoRA: adapters train, the base does not; merged equals adapted; adapter folders are read, damaged ones refused."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import evaluate
import train
from pocl.common.errors import UserError
from pocl.data.batch import collate
from pocl.generation.decoding import Sampling, generate
from pocl.losses.head import aligned
from pocl.models.identity import weights_fingerprint
from pocl.models.loading import load_model, load_tokenizer
from pocl.models.lora import adapter_chain, add_adapters, merged_weights, save_adapter
from pocl.models.states import check_head, make_head, response_states, some_logits, trunk
from pocl.models.student import Student
from pocl.models.tuning import layer_stack, recompute_activations
from tests.models.tiny_families import tiny_family
from tests.ranks import on_ranks
from tests.runs import Folders, Result, call, read_jsonl, train_arguments, train_until_stage
from tests.tiny import FAMILIES, save_model, tiny_model, tiny_tokenizer
from tools import generate_seqkd

LORA = ["--lora-rank", 4, "--lr", 1e-2]
# Two stages of 2 and 4 steps, without a ranking.
SHORT = [*LORA, "--curriculum", "random", "--num-train", 16, "--num-stages", 2, "--epochs", 2]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
MERGED = {  # by family: a linear layer with an adapter
    "gpt2": "transformer.h.0.attn.c_attn.weight",
    "opt": "model.decoder.project_in.weight",
    "llama": "model.layers.0.mlp.down_proj.weight",
    "qwen2": "model.layers.0.self_attn.q_proj.weight",
}


def adapt(model: PreTrainedModel, base: str = "base", **options: object) -> PreTrainedModel:
    """The model with adapters whose B is no longer zero, as after some training."""
    settings = {"lora_rank": 3, "lora_alpha": None, "lora_dropout": 0.0, "lora_targets": ["all-linear"], "seed": 1}
    add_adapters(model, base, **(settings | options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def plain(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, vocab_size=600, end_id=0).eval()


@pytest.fixture(scope="module")
def trained(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished POCL run with adapters."""
    output_dir = tmp_path_factory.mktemp("lora")
    result = call(train, train_arguments(folders, output_dir, *LORA))
    assert result.status == 0, result.output
    assert "LoRA of rank 4 on c_attn, c_fc, c_proj: 4.1K trainable parameters" in result.output
    return output_dir / "tfkl" / "seed10"


@pytest.fixture(scope="module")
def short(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``SHORT``."""
    output_dir = tmp_path_factory.mktemp("short")
    result = call(train, train_arguments(folders, output_dir, *SHORT, "--num-dev", 0))
    assert result.status == 0, result.output
    return output_dir / "tfkl" / "seed10"


def curve(run: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("plain", FAMILIES, indirect=True)
def test_fresh_adapters_change_no_answer_and_depend_on_the_seed_alone(plain: PreTrainedModel) -> None:
    wanted, settings = logits(plain), {"lora_rank": 3, "lora_alpha": None, "lora_dropout": 0.0}
    states = []
    for seed in (1, 1, 2):
        model, torch_state = copy.deepcopy(plain), torch.get_rng_state()
        add_adapters(model, "base", lora_targets=["all-linear"], seed=seed, **settings)
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert torch.equal(logits(model), wanted)
        states.append({name: weight for name, weight in model.state_dict().items() if "lora_A" in name})
        torch.rand(3)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("plain", FAMILIES, indirect=True)
def test_every_adapter_gets_a_gradient_and_nothing_else_does(plain: PreTrainedModel, checkpointed: bool) -> None:
    model = adapt(plain).train()
    if checkpointed:
        recompute_activations(model)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    batch = collate([0, 1], [[5, 6], [7, 8, 9]], [[10, 11, 12], [13, 0]], max_length=16)
    make_head(model)(response_states(model, batch)).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    # Two blocks of q, k, v, output and the feed-forward layers, which gpt2 has as 4 layers; opt projects in and out.
    num_linear = {"gpt2": 2 * 4, "opt": 2 * 6 + 2, "llama": 2 * 7, "qwen2": 2 * 7}[model.config.model_type]
    assert sum(".lora_" in name for name, _ in model.named_parameters()) == 2 * num_linear
    optimiser.step()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == (".lora_" not in name), name


@pytest.mark.parametrize("plain", FAMILIES, indirect=True)
def test_the_merged_weights_are_the_adapted_model_and_leave_it_as_it_is(plain: PreTrainedModel) -> None:
    family = plain.config.model_type
    base, twin = copy.deepcopy(plain.state_dict()), copy.deepcopy(plain)
    model = adapt(plain, lora_alpha=5.0)
    before, wanted = copy.deepcopy(model.state_dict()), logits(model)
    weights = merged_weights(model, model.state_dict())
    assert weights.keys() == base.keys()
    twin.load_state_dict(weights)
    torch.testing.assert_close(logits(twin), wanted, atol=1e-5, rtol=1e-5)
    assert (logits(twin) - logits(tiny_model(family, vocab_size=600, end_id=0))).abs().max() > 1e-3
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    # By hand: W + alpha / rank * B A, the transpose of it in a Conv1D.
    name = MERGED[family]
    a, b = (before[name.replace("weight", f"lora_{side}.default.weight")] for side in "AB")
    change = 5.0 / 3.0 * b @ a
    torch.testing.assert_close(weights[name], base[name] + (change.T if family == "gpt2" else change))


def test_a_model_without_adapters_keeps_its_weights(models: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    state = models["gpt2"].state_dict()
    merged = merged_weights(models["gpt2"], state)
    assert merged.keys() == state.keys() and all(merged[name] is state[name] for name in state)
    assert not save_adapter(models["gpt2"], state, tmp_path / "adapter") and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("plain", FAMILIES, indirect=True)
def test_an_adapted_model_has_trunk_head_layers_and_answers_as_the_merged_one(
    plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    twin = copy.deepcopy(plain)
    model = adapt(plain).eval()
    twin.load_state_dict(merged_weights(model, model.state_dict()))
    assert type(model) is type(twin) and type(trunk(model)) is type(trunk(twin))
    check_head(model, "adapted", torch.device("cpu"))
    assert len(layer_stack(model)) == 2
    fingerprint = weights_fingerprint(model)
    answers = [
        generate(Student(m, tokenizer), [[5, 6, 7], [8]], [0, 1], Sampling(8, temperature=0.0)) for m in (model, twin)
    ]
    assert answers[0] == answers[1] and max(map(len, answers[0])) > 0
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1.0)
    assert weights_fingerprint(model) != fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_read_by_peft_and_by_load_model(family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    base = save_model(tiny_model(family, vocab_size=600, end_id=0), tokenizer, tmp_path / "base")
    model = adapt(load_model(str(base)), str(base))
    assert save_adapter(model, model.state_dict(), tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(by_peft), logits(model), atol=1e-6, rtol=1e-6)
    loaded = load_model(str(tmp_path / "adapter"))
    wanted = merged_weights(model, model.state_dict())
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in loaded.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    assert weights_fingerprint(loaded) != weights_fingerprint(load_model(str(base)))
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == tokenizer.get_vocab()
    half = load_model(str(tmp_path / "adapter"), "bf16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(half).float(), logits(loaded), atol=0.05, rtol=0.05)


def test_an_adapters_own_tokenizer_goes_before_its_bases(gpt2_dir: Path, tmp_path: Path) -> None:
    model = adapt(load_model(str(gpt2_dir)), str(gpt2_dir))
    save_adapter(model, model.state_dict(), tmp_path / "adapter")
    tiny_tokenizer(500).save_pretrained(tmp_path / "adapter")
    assert len(load_tokenizer(str(tmp_path / "adapter"))) == 500


def test_a_base_is_looked_for_as_it_stands_then_from_the_adapters_folder(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a folder named base beside the project would be found
    model = adapt(load_model(str(gpt2_dir)), "../base")
    save_adapter(model, model.state_dict(), tmp_path / "run" / "adapter")
    assert adapter_chain(str(tmp_path / "run" / "adapter")) == ("../base", [tmp_path / "run" / "adapter"])
    shutil.copytree(gpt2_dir, tmp_path / "run" / "base")
    load_model(str(tmp_path / "run" / "adapter"))
    (tmp_path / "base").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # now ../base is a folder as it stands
    with pytest.raises(UserError, match=r"\.\./base holds no config\.json.*; the adapter .*adapter uses it"):
        load_model(str(tmp_path / "run" / "adapter"))


FOREIGN: dict[str, dict[str, object]] = {
    "rank-stabilised": {"use_rslora": True, "rank_pattern": {"c_fc": 5}},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_an_adapter_that_others_trained_is_merged(kind: str, gpt2_dir: Path, tmp_path: Path) -> None:
    settings = {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, **FOREIGN[kind]}
    base = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(load_model(str(tmp_path / "whole"))), logits(loaded))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe"])
def test_the_experts_of_a_mixture_get_adapters(
    family: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Merged here, and saved, read by peft and merged by it, they are the adapted model."""
    save_model(tiny_family(family, vocab_size=len(tokenizer)), tokenizer, tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    plain = some_logits(model)
    add_adapters(
        model,
        str(tmp_path / "base"),
        lora_rank=2,
        lora_alpha=None,
        lora_dropout=0.0,
        lora_targets=["all-linear"],
        seed=0,
    )
    adapted = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert any("lora_A" in name and ("experts" in name or "input_linear" in name) for name in adapted)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    wanted = some_logits(model)
    assert torch.norm(wanted - plain) > 1e-2 * torch.norm(plain)
    merged = load_model(str(tmp_path / "base"))
    merged.load_state_dict(merged_weights(model, model.state_dict()))
    torch.testing.assert_close(some_logits(merged), wanted, atol=1e-5, rtol=1e-4)
    save_adapter(model, model.state_dict(), tmp_path / "adapter")
    torch.testing.assert_close(some_logits(load_model(str(tmp_path / "adapter"))), wanted, atol=1e-5, rtol=1e-4)


TIED: dict[str, dict[str, object]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("kind", sorted(TIED))
def test_an_adapter_on_a_tied_head_or_embedding_changes_what_it_is_on(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Against peft's own model, unmerged; saved and read again (peft#2777)."""
    size = {"vocab_size": len(tokenizer), "end_id": tokenizer.eos_token_id}
    save_model(tiny_model("qwen2", **size), tokenizer, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=3, **TIED[kind]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(load_model(str(tmp_path / "whole"))), logits(merged))
    assert aligned(make_head(merged)).num_logits == len(tokenizer)


def test_an_adapter_that_is_not_merged_rightly_is_refused(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(gpt2_dir),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda model, **_: model.unload())
    with pytest.raises(UserError, match=r"merged into its base, the adapter in .* gives logits that are .*% off"):
        load_model(str(tmp_path / "adapter"))


def test_an_adapter_of_another_size_is_refused_with_both_sizes(
    gpt2_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    wide = tiny_model("gpt2", vocab_size=len(tokenizer), end_id=0, width=48)
    adapted = get_peft_model(wide, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.peft_config["default"].base_model_name_or_path = str(gpt2_dir)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"size mismatch for .*c_attn.*48.*32"):
        load_model(str(tmp_path / "adapter"))


def test_a_run_trains_adapters_and_leaves_best_merged_beside_them(trained: Path, folders: Folders) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders.student)
    best = AutoModelForCausalLM.from_pretrained(trained / "best")
    before, after = base.state_dict(), best.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.{layer}.{name}.weight" for layer in (0, 1) for name in linear}
    by_peft = PeftModel.from_pretrained(base, trained / "adapter")
    torch.testing.assert_close(logits(by_peft), logits(best), atol=1e-5, rtol=1e-5)
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 8, "LORA")
    assert settings["base_model_name_or_path"] == str(folders.student)
    assert weights_fingerprint(load_model(str(trained / "adapter"))) == weights_fingerprint(best)
    assert curve(trained)[-1] < curve(trained)[0]


def test_best_and_adapter_evaluate_alike(trained: Path, folders: Folders, tmp_path: Path) -> None:
    for name in ("best", "adapter"):
        arguments = ["--model", trained / name, "--sets", "short", "--data-root", folders.data_root, "--seeds", 1]
        arguments += ["--max-length", 192, "--max-prompt-length", 160, "--output-dir", tmp_path / name]
        result = call(evaluate, arguments)
        assert result.status == 0, result.output
    records = [read_jsonl(tmp_path / name / "short" / "1.jsonl") for name in ("best", "adapter")]
    assert len(records[0]) == 5 and records[0] == records[1]


def test_an_adapter_teaches_as_the_merged_model_does(trained: Path, folders: Folders, tmp_path: Path) -> None:
    curves, caches = {}, folders.data / "teacher-cache"
    before = len(list(caches.glob("*/manifest.json")))
    for name, teacher in {"base": folders.student, "adapter": trained / "adapter", "best": trained / "best"}.items():
        extra = ["--teacher", teacher, "--model", folders.teacher, "--num-dev", 0, "--curriculum", "whole-pool"]
        result = call(train, train_arguments(folders, tmp_path / name, *extra, "--num-train", 16))
        assert result.status == 0, result.output
        curves[name] = curve(tmp_path / name / "tfkl" / "seed10")
    assert curves["adapter"] == curves["best"] != curves["base"]
    assert (
        len(list(caches.glob("*/manifest.json"))) == before + 2
    )  # base and adapter have a cache each, best has the adapter's


def test_an_adapter_answers_for_seqkd(trained: Path, folders: Folders, tmp_path: Path) -> None:
    arguments = ["--model", trained / "adapter", "--data-dir", folders.data, "--output-dir", tmp_path / "seqkd"]
    result = call(generate_seqkd, [*arguments, "--num-train", 3, "--max-length", 170])
    assert result.status == 0, result.output
    assert (tmp_path / "seqkd" / "manifest.json").is_file()


def test_adapters_train_on_what_they_themselves_make_the_student_write(folders: Folders, tmp_path: Path) -> None:
    extra = [*SHORT, "--type", "tjsd", "--num-dev", 0, "--on-policy", "mixed", "--mixed-alpha", 1.0]
    result = call(train, train_arguments(folders, tmp_path, *extra))
    assert result.status == 0, result.output
    records = read_jsonl(tmp_path / "tjsd" / "seed10" / "metrics.jsonl")
    assert all(record["student_text"] == 1.0 for record in records)
    weights = load_file(tmp_path / "tjsd" / "seed10" / "adapter" / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for weight in weights.values())


def test_a_new_adapter_stands_on_a_merged_one(trained: Path, folders: Folders, tmp_path: Path) -> None:
    extra = ["--model", trained / "adapter", "--lora-rank", 2, "--lora-targets", "c_fc", "--lora-dropout", 0.1]
    extra += ["--type", "sft", "--num-stages", 1, "--curriculum", "whole-pool", "--num-dev", 0]
    result = call(train, train_arguments(folders, tmp_path, *extra, teacher=False))
    assert result.status == 0, result.output
    run = tmp_path / "sft" / "seed10"
    base, adapters = adapter_chain(str(run / "adapter"))
    assert (base, adapters) == (str(folders.student), [trained / "adapter", run / "adapter"])
    loaded, best = load_model(str(run / "adapter")), load_model(str(run / "best"))
    assert weights_fingerprint(loaded) == weights_fingerprint(best)
    before = load_model(str(trained / "best")).state_dict()
    changed = {name for name, weight in best.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"transformer.h.{layer}.mlp.c_fc.weight" for layer in (0, 1)}


@pytest.mark.parametrize(
    ("extra", "tolerance"),
    [
        (["--deepspeed-config", "scripts/deepspeed/zero0.json"], 1e-4),
        (["--deepspeed-config", "scripts/deepspeed/zero2.json"], 1e-4),
        (["--gradient-checkpointing", "--batch-size", 2], 1e-4),
        (["--dtype", "bf16"], 2e-2),
    ],
    ids=["zero0", "zero2", "checkpointing", "bf16"],
)
def test_other_ways_to_train_adapters_follow_the_same_curve(
    short: Path, folders: Folders, tmp_path: Path, extra: list[object], tolerance: float
) -> None:
    result = call(train, train_arguments(folders, tmp_path, *SHORT, "--num-dev", 0, *extra))
    assert result.status == 0, result.output
    run = tmp_path / "tfkl" / "seed10"
    assert curve(run) == pytest.approx(curve(short), rel=tolerance)
    best, adapter = (load_model(str(run / name)) for name in ("best", "adapter"))
    torch.testing.assert_close(logits(best), logits(adapter), atol=10 * tolerance, rtol=tolerance)


def test_two_ranks_that_share_the_weights_train_the_same_adapters_as_one(folders: Folders, tmp_path: Path) -> None:
    extra = [*SHORT, "--num-dev", 2, "--eval-every", 2]
    assert call(train, train_arguments(folders, tmp_path / "one", *extra)).status == 0
    extra += ["--deepspeed-config", "scripts/deepspeed/zero3.json"]
    result = on_ranks("train.py", train_arguments(folders, tmp_path / "two", *extra), num_ranks=2)
    assert result.status == 0, result.output
    one, two = (tmp_path / name / "tfkl" / "seed10" for name in ("one", "two"))
    assert curve(two) == pytest.approx(curve(one), rel=1e-4)
    # The dev prompts are answered by a whole, merged copy.
    scores = [[r["dev_rouge_l"] for r in read_jsonl(d / "metrics.jsonl") if "dev_rouge_l" in r] for d in (one, two)]
    assert len(scores[0]) == 2 and scores[1] == pytest.approx(scores[0])
    whole = load_model(str(two / "best"))
    for folder in (one / "best", two / "adapter"):
        torch.testing.assert_close(logits(load_model(str(folder))), logits(whole), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_lora_run_that_is_cut_off_ends_with_the_same_weights(folders: Folders, tmp_path: Path, stage: int) -> None:
    extra = [*SHORT, "--lora-dropout", 0.1, "--num-dev", 0]
    extra += ["--deepspeed-config", f"scripts/deepspeed/zero{stage}.json"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    train_until_stage(train_arguments(folders, cut, *extra), 1)
    (weights,) = (cut / "tfkl" / "seed10" / "checkpoints").glob("step-*/weights.safetensors")
    assert weights.stat().st_size < 600 * 32 * 4  # less than the frozen embedding alone
    assert call(train, train_arguments(folders, cut, *extra)).status == 0
    assert call(train, train_arguments(folders, whole, *extra)).status == 0
    cut, whole = cut / "tfkl" / "seed10", whole / "tfkl" / "seed10"
    assert curve(cut) == curve(whole)
    for name in ("best/model.safetensors", "adapter/adapter_model.safetensors", "ledger.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(folders.student).state_dict()
    best = AutoModelForCausalLM.from_pretrained(cut / "best").state_dict()
    assert all(torch.equal(best[name], base[name]) for name in base if "attn.c_" not in name and "mlp.c_" not in name)
    on_base = load_model(str(cut / "adapter")).state_dict()  # the adapted layers' own weights are the base's, too
    assert all(torch.equal(on_base[name], best[name]) for name in best)


FLAG_MISTAKES: list[tuple[list[object], list[str]]] = [
    (["--lora-rank", 0], ["--lora-rank is 0", "above 0"]),
    (["--lora-rank", "big"], ["--lora-rank", "big"]),
    (["--lora-alpha", 8], ["--lora-rank as well"]),
    (["--lora-targets", "c_fc"], ["--lora-rank as well"]),
    (["--lora-rank", 4, "--lora-alpha", 0], ["--lora-alpha is 0", "above 0"]),
    (["--lora-rank", 4, "--lora-alpha", "inf"], ["--lora-alpha is inf"]),
    (["--lora-rank", 4, "--lora-dropout", 1], ["--lora-dropout is 1"]),
    (["--lora-rank", 4, "--train-last-layers", 1], ["--train-last-layers", "give only one of them"]),
    (["--lora-rank", 4, "--lora-targets", "c_fcc"], ["'c_fcc'", "did you mean 'c_fc'", "c_attn, c_fc, c_proj"]),
    (["--lora-rank", 4, "--lora-targets", "lm_head"], ["'lm_head'", "no linear layer"]),
    (["--lora-rank", 4, "--lora-targets", "wte"], ["'wte'", "no linear layer"]),
]


@pytest.mark.parametrize(("extra", "words"), FLAG_MISTAKES, ids=lambda value: " ".join(map(str, value))[:40])
def test_train_refuses_lora_flags(folders: Folders, tmp_path: Path, extra: list[object], words: list[str]) -> None:
    extra = ["--type", "sft", "--num-stages", 1, "--curriculum", "whole-pool", *extra]
    refused(call(train, train_arguments(folders, tmp_path, *extra, teacher=False)), *words)
    assert not list(tmp_path.rglob("best"))


def refused(result: Result, *words: str) -> None:
    assert result.status == 2, result.output
    assert "Traceback" not in result.output and result.last_line.startswith("error: ")
    for word in words:
        assert word in result.last_line, result.last_line


def settings(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"no pickle at all: reading it would raise something else")


def cut(folder: Path, kept: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])


def ia3(folder: Path) -> None:
    IA3Config(base_model_name_or_path="x", target_modules=["c_fc"], feedforward_modules=["c_fc"]).save_pretrained(
        folder
    )


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
ADAPTER_MISTAKES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no-weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ["no weights (adapter_model.safetensors)"]),
    "pickled": (pickle, ["pickled weights (adapter_model.bin)", "save_pretrained"]),
    "empty-file": (lambda f: cut(f, 0), ["are damaged"]),
    "cut-header": (lambda f: cut(f, 100), ["are damaged"]),
    "cut-weights": (lambda f: cut(f, -1), ["are damaged"]),
    "lacks-a-tensor": (weights(lambda w: w.pop(FIRST)), ["does not fit its base", "lacks", "c_attn.lora_A"]),
    "no-tensor": (weights(lambda w: w.clear()), ["does not fit its base", "lacks"]),
    "one-layer-more": (
        weights(lambda w: w.update({FIRST.replace("h.0", "h.9"): w[FIRST].clone()})),
        ["does not fit its base", "holds", "h.9"],
    ),
    "not-finite": (weights(lambda w: w[FIRST].fill_(float("nan"))), ["is damaged", "NaN"]),
    "wider-base": (weights(lambda w: w.update({FIRST: torch.zeros(4, 99)})), ["does not fit its base"]),
    "json": (lambda f: (f / "adapter_config.json").write_text("{"), ["adapter_config.json", "JSON"]),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), ["adapter_config.json", "type None"]),
    "no-base": (settings(base_model_name_or_path=None), ["names no base model", "base_model_name_or_path"]),
    "number-as-base": (settings(base_model_name_or_path=3), ["names no base model"]),
    "base-is-gone": (settings(base_model_name_or_path="/gone/base"), ["/gone/base", "the adapter", "uses it"]),
    "base-is-nowhere": (settings(base_model_name_or_path="no/where"), ["'no/where'", "the adapter", "uses it"]),
    "own-base": (lambda f: settings(base_model_name_or_path=str(f))(f), ["is an adapter on itself"]),
    "revision": (settings(revision="v2"), ["revision 'v2'", "download"]),
    "other-type": (ia3, ["'IA3'", "LORA"]),
    "no-type": (settings(peft_type=None), ["an adapter of type None", "LORA"]),
    "other-rank": (settings(r=7), ["does not fit its base, or is damaged"]),
    "text-as-rank": (settings(r="many"), ["does not fit its base, or is damaged"]),
    "unknown-targets": (settings(target_modules=["q_proj"]), ["does not fit its base"]),
    "broken-pattern": (settings(target_modules="(("), ["does not fit its base, or is damaged"]),
    "whole-model-too": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        ["holds a whole model and an adapter"],
    ),
}


@pytest.mark.parametrize("mistake", sorted(ADAPTER_MISTAKES))
def test_a_damaged_or_unsafe_adapter_is_refused(trained: Path, folders: Folders, tmp_path: Path, mistake: str) -> None:
    change, words = ADAPTER_MISTAKES[mistake]
    folder = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    change(folder)
    extra = ["--teacher", folder, "--model", folders.student, "--num-dev", 0]
    refused(call(train, train_arguments(folders, tmp_path / "results", *extra)), *words)
    assert not (tmp_path / "results").exists()


def test_an_adapter_on_the_hub_is_to_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocl.models.loading.find_adapter_config_file", lambda name: "adapter_config.json")
    with pytest.raises(UserError, match="some/adapter is an adapter on the hub; download it"):
        load_model("some/adapter")
