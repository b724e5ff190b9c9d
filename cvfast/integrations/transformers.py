"""Hugging Face transformers: cvfast's attention as attn_implementation="cvfast".

import cvfast.integrations.transformers
cvfast.integrations.transformers.register()
model = AutoModel.from_pretrained(name, attn_implementation="cvfast")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvfast import functional

NAME = "cvfast"


def register() -> None:
    """Adds attn_implementation="cvfast" to transformers. Raises ImportError where transformers is missing or too old.

    Models have it that look their attention up in transformers' AttentionInterface, which most do. Masks are those of
    "sdpa". Attention weights are not returned, and a softcap is refused, as "sdpa" does.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention layer; its `is_causal` (default True) counts where the argument is None.
        query: [B, H, L, D]. key: [B, Hk, S, D], value: [B, Hk, S, Dv], where Hk divides H.
        attention_mask: [B, 1 or H, L, S], bool (True: seen) or added to the scores; with one, or a single query,
            nothing else is hidden.
        position_bias: added to the scores, broadcastable to [B, H, L, S].

    Returns:
        ([B, L, H, Dv], None).

    Raises:
        ValueError: a softcap, which the kernel does not know.
    """
    if kwargs.get("softcap") is not None:
        raise ValueError(f"attn_implementation={NAME!r} has no softcap, got {kwargs['softcap']}; use 'eager'")
    queries = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = bool(queries > 1 and attention_mask is None and is_causal)
    output = functional.scaled_dot_product_attention(
        query, key, value, _mask(attention_mask, position_bias), dropout,
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1], window=(None, 0) if is_causal else None,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def _mask(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Both as one mask, bool or added to the scores."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
