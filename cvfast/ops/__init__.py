"""Operator cards: what torch's dispatcher knows of cvfast's operators (schema, fake, derivatives, autocast, vmap)."""

from cvfast.ops import conv2d, conv_transpose2d, recurrent

__all__ = ["conv2d", "conv_transpose2d", "recurrent"]
