"""Operator cards: what torch's dispatcher knows of cvfast's operators (schema, fake, derivatives, autocast, vmap)."""

from cvfast.ops import (
    additive_attention,
    attention,
    attention_lstm,
    batch_norm,
    batched_product,
    conv2d,
    conv_transpose2d,
    encoder,
    gelu,
    recurrent,
)

__all__ = [
    "additive_attention",
    "attention",
    "attention_lstm",
    "batch_norm",
    "batched_product",
    "conv2d",
    "conv_transpose2d",
    "encoder",
    "gelu",
    "recurrent",
]
