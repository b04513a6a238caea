"""A tiny Llama with a tokenizer like SmolLM's, as a GGUF file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "ĠĠ", "ĊĊ", "he", "hel"]
MERGES = ["Ġ Ġ", "Ċ Ċ", "h e", "he l"]
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key weight in the order of llama.cpp, which rotates neighbours and not halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path: Path, pre: str = "smollm") -> LlamaForCausalLM:
    """Write a tiny Llama as GGUF in float32; return the model that the file describes."""
    gguf = pytest.importorskip("gguf")
    model = tiny_llama()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    def add(name: str, weight: torch.Tensor) -> None:
        writer.add_tensor(name, weight.detach().numpy().astype(np.float32))

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    for index, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        add(f"blk.{index}.attn_q.weight", interleaved(attention.q_proj.weight, 4))
        add(f"blk.{index}.attn_k.weight", interleaved(attention.k_proj.weight, 2))
        add(f"blk.{index}.attn_v.weight", attention.v_proj.weight)
        add(f"blk.{index}.attn_output.weight", attention.o_proj.weight)
        add(f"blk.{index}.attn_norm.weight", block.input_layernorm.weight)
        add(f"blk.{index}.ffn_norm.weight", block.post_attention_layernorm.weight)
        add(f"blk.{index}.ffn_gate.weight", mlp.gate_proj.weight)
        add(f"blk.{index}.ffn_up.weight", mlp.up_proj.weight)
        add(f"blk.{index}.ffn_down.weight", mlp.down_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
