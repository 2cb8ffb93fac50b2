"""CLIP's text tower as Hugging Face writes it: CLIPTextModel, and the files of its tokenizer."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.clip import Clip

WHOLE = {  # open_clip's names and theirs
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
PADDING = "<|padding|>"
TOKENS = "text_model.embeddings.token_embedding.weight"
QKV = ("q_proj", "k_proj", "v_proj")  # one tensor, attn.in_proj_weight or _bias, in open_clip


def text_to_hugging_face(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """State dict of a CLIPTextModel with the first `layers` layers of open_clip's text tower.

    Args:
        weights: open_clip's state dict; other towers in it are left out.
    """
    made = {f"text_model.{theirs}": weights[ours] for ours, theirs in WHOLE.items()}
    for layer in range(layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for a, b in LAYER.items():
                made[f"{theirs}.{b}.{kind}"] = weights[f"{ours}.{a}.{kind}"]
            for name, part in zip(QKV, weights[f"{ours}.attn.in_proj_{kind}"].chunk(3), strict=True):
                made[f"{theirs}.self_attn.{name}.{kind}"] = part
    return made


def text_from_hugging_face(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Names of open_clip for weights of Hugging Face: the part of open_clip's state dict that the text states need."""
    made = {ours: weights[f"text_model.{theirs}"] for ours, theirs in WHOLE.items()}
    for layer in range(layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for a, b in LAYER.items():
                made[f"{ours}.{a}.{kind}"] = weights[f"{theirs}.{b}.{kind}"]
            made[f"{ours}.attn.in_proj_{kind}"] = torch.cat([weights[f"{theirs}.self_attn.{n}.{kind}"] for n in QKV])
    return made


def with_padding(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a CLIPTextModel that knows the padding of `tokenizer_files`: one more token, which looks like 0."""
    tokens = weights[TOKENS]
    return {**weights, TOKENS: torch.cat([tokens, tokens[:1]])}


def text_config(clip: Clip) -> dict[str, Any]:
    """`config.json` of the CLIPTextModel whose last hidden states are the tower's text states (`with_padding`)."""
    sizes, tokenizer = clip.config, clip.tokenizer
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tokenizer.vocab_size + 1,
        "hidden_size": sizes.text_width,
        "intermediate_size": 4 * sizes.text_width,
        "num_hidden_layers": sizes.text_layers - sizes.skip_last,
        "num_attention_heads": sizes.text_heads,
        "max_position_embeddings": sizes.context_length,
        "projection_dim": sizes.embed_dim,
        "hidden_act": "quick_gelu" if clip.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.vocab_size,
    }


def tokenizer_files(clip: Clip) -> dict[str, str]:
    """File name -> content of the CLIPTokenizer that makes the tower's tokens.

    The tower pads with token 0. That is "!" inside a word, which as the name of the padding would be taken for it
    wherever a text says "!", and of two names for one number transformers saves one; so padding is a token of its own.
    """
    tokenizer = clip.tokenizer
    special = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
    vocabulary = {special.get(number, word): number for word, number in tokenizer.encoder.items()}
    vocabulary[PADDING] = tokenizer.vocab_size
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    start, end = special.values()
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": clip.context_length,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": PADDING,
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs)]) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps({k: v for k, v in config.items() if k.endswith("_token")}, indent=2),
    }
