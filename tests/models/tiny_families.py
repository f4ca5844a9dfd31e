"""Tiny, random models of every causal family that the installed transformers has."""

import inspect
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

FAMILIES: dict[str, Any] = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}

# What makes a configuration tiny, wherever it has a setting of this name.
_SIZES: dict[float, str] = {
    96: "vocab_size vocab_size_per_layer_input",
    32: (
        "hidden_size n_embd d_model embed_dim n_embed mamba_d_ssm attention_hidden_size lru_width "
        "projection_size word_embed_proj_dim "
    ),
    4: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head n_heads "
        "num_heads encoder_attention_heads decoder_attention_heads num_experts n_routed_experts "
        "num_local_experts mamba_n_heads mamba_num_heads time_step_rank mamba_dt_rank "
    ),
    2: ("encoder_layers num_key_value_heads num_experts_per_tok linear_num_key_heads linear_num_value_heads "),
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff",
    8: (
        "head_dim kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim "
        "linear_value_head_dim state_size mamba_d_state ssm_state_size mamba_head_dim mamba_chunk_size "
        "chunk_size sliding_window hidden_size_per_layer_input "
    ),
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank mamba_d_head",
    1: "n_group topk_group first_k_dense_replace mamba_n_groups n_groups bos_token_id",
    256: "max_position_embeddings n_positions",
    95: "eos_token_id",
    0.0: (
        "resid_pdrop embd_pdrop attn_pdrop dropout attention_dropout activation_dropout hidden_dropout "
        "hidden_dropout_prob attention_probs_dropout_prob resid_dropout embedding_dropout "
    ),
}
SMALL: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
SMALL["pad_token_id"] = 0

# What a family needs beside those.
OTHERS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "dots1": {"layer_types": ["full_attention"] * 4, "num_key_value_heads": 4, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "falcon_h1": {"mamba_d_ssm": 64},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "moshi": {"sliding_window": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}


def tiny_config(model_type: str, **others: Any) -> PretrainedConfig:
    """A tiny configuration, its parts (``text_config``, ``vision_config``, ...) as well; ``others`` are set in it."""
    made = FAMILIES[model_type]
    return made(**_small(made(), OTHERS.get(model_type, {}) | others))


def _small(defaults: PretrainedConfig, others: dict[str, Any]) -> dict[str, Any]:
    names = set(inspect.signature(type(defaults).__init__).parameters) | set(defaults.to_dict())
    names |= set(defaults.attribute_map)
    settings = {name: value for name, value in SMALL.items() if name in names}
    if "kv_lora_rank" in names:
        settings["num_key_value_heads"] = 4  # latent attention has as many
    if defaults.model_type == "mpt":
        settings.pop("attn_pdrop", None)
    settings |= {name: value for name, value in others.items() if name in names}
    for part in defaults.sub_configs:
        if isinstance(getattr(defaults, part, None), PretrainedConfig):
            settings[part] = _small(getattr(defaults, part), others)
    return settings


def tiny_family(model_type: str, **others: Any) -> PreTrainedModel:
    """A tiny model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **others)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > 3_000_000:
        raise ValueError(f"{size} parameters")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()
