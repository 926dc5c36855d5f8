"""One tiny configuration of every architecture that the table of docs/internals.md names."""

from transformers import AutoConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
HEAD = {"head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}

# Name in that table -> model type and what it needs beside the sizes.
ARCHITECTURES = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral, window 96": ("mistral", {"sliding_window": 96}),
    "Mistral, window 8": ("mistral", {"sliding_window": 8}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", HEAD),
    "Gemma": ("gemma", HEAD),
    "Gemma 2": ("gemma2", {**HEAD, "sliding_window": 96}),
    "Gemma 3": ("gemma3_text", {**HEAD, "sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"]}),
    "Phi": ("phi", {}),
    "Phi-3": ("phi3", {"pad_token_id": 0}),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-J": ("gptj", {"rotary_dim": 4}),
    "OPT": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "Falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "BLOOM": ("bloom", {"n_head": 4}),
    "MPT": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "StableLM": ("stablelm", {}),
    "Cohere 2": ("cohere2", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 96}),
    "OLMo 2": ("olmo2", {}),
    "Granite": ("granite", {}),
    "StarCoder 2": ("starcoder2", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Qwen2-MoE": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3-MoE": ("qwen3_moe", {**EXPERTS, **HEAD}),
    "DeepSeek V3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt-oss": ("gpt_oss", {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 96}),
    "GLM 4": ("glm4", {**HEAD, "pad_token_id": 0}),
    "EXAONE 4": ("exaone4", {**HEAD, "sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"]}),
    "Mamba": ("mamba", {"state_size": 8}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
}


def configuration(name, vocabulary):
    """A configuration of this architecture for a tokenizer of so many tokens."""
    model_type, more = ARCHITECTURES[name]
    return AutoConfig.for_model(
        model_type, **{**SIZES, "vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, **more}
    )
