"""The learning rate as a function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from cvfast.engine.config import RunConfig


def learning_rate(config: RunConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of the optimiser's step number ``step``, counted from 0 over the whole run.

    Linear warm-up to ``config.lr`` over ``config.warmup_epochs``, then constant, a cosine from ``lr`` to 0 (Loshchilov
    and Hutter 2017, without restarts), or ``lr`` times ``step_gamma`` for each ``step_epochs`` since the start.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        remaining = max(1.0, config.epochs * steps_per_epoch - warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / remaining)))
    if config.schedule == "step":
        return config.lr * config.step_gamma ** (step // (config.step_epochs * steps_per_epoch))
    return config.lr
