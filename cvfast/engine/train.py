"""Training, and its exact resumption.

A run is a function of its :class:`TrainConfig`. The weights come from the seed, the order of the images from (seed,
epoch), the augmentation from (seed, step, process), the learning rate from the step. What is left, the state of the
optimiser and of torch's random numbers (dropout), is in the checkpoint; so a resumed run repeats the uninterrupted one
bit for bit, on the same machine with the same number of processes and threads.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cvfast.backend import use_backend
from cvfast.engine import distributed
from cvfast.engine.checkpoint import Checkpoint, CheckpointError, checkpoint_file, load_checkpoint
from cvfast.engine.config import RunConfig, TrainConfig
from cvfast.engine.logs import EpochFigures, RunLog
from cvfast.engine.loop import LAST, Loop
from cvfast.engine.run import Run

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        folder: holds ``best.safetensors``, ``last.safetensors`` and ``log.csv``.
        history: the figures of every epoch.
        best_epoch: the epoch, counted from 1, whose weights are in ``best.safetensors``.
        first_process: whether this is the process that writes the files, if torchrun started several.
        noise: figure -> how far apart two runs may end that differ in rounding only.
    """

    config: RunConfig
    folder: Path
    history: list[EpochFigures]
    best_epoch: int
    first_process: bool
    noise: dict[str, float]


def train(
    config: TrainConfig,
    *,
    augmentation: Callable[[Tensor], Tensor] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Trains a model from random weights.

    Seeds torch's random numbers. Runs as one of several processes where torchrun started it. Ctrl-C finishes the step
    at hand and leaves a checkpoint for :func:`resume`; a second Ctrl-C stops at once, with the last epoch's checkpoint.

    Args:
        config: the settings.
        augmentation: changes a batch [N, C, H, W] of pixels in [0, 1], instead of the one that ``config`` describes.
        console: where to show progress; None is silent.

    Raises:
        FileExistsError: if ``config.out`` holds a run already.
        FloatingPointError: if the loss is not finite.
        KeyboardInterrupt: after Ctrl-C.
        OSError: if a checkpoint cannot be written; the earlier one is still whole.
        ValueError: if the settings do not fit the data or the number of processes.
    """
    return run_loop(config, lambda device: Run(config, device, augmentation), None, console)


def resume(
    run: str | Path,
    *,
    augmentation: Callable[[Tensor], Tensor] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Continues the run in the folder ``run`` from its last checkpoint, with its own settings.

    Args, results and errors are those of :func:`train`; besides:

    Raises:
        FileNotFoundError: if the folder holds no ``last.safetensors``.
        CheckpointError: if the checkpoint is damaged, or was made with another number of processes.
    """
    checkpoint = load_checkpoint(checkpoint_file(run, LAST))
    config = replace(saved_config(checkpoint), out=str(run))
    return run_loop(config, lambda device: Run(config, device, augmentation), checkpoint, console)


def saved_config(checkpoint: Checkpoint) -> TrainConfig:
    """The settings of a classifier's run; CheckpointError if it is another's, or damaged."""
    try:
        return TrainConfig(**checkpoint.meta["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint does not hold a run that can be resumed: {error}") from error


def run_loop(
    config: RunConfig, make: Callable[[torch.device], Loop], checkpoint: Checkpoint | None, console: Console | None
) -> TrainResult:
    """Runs the loop that ``make`` builds, from its start or from ``checkpoint``; errors as :func:`train`'s."""
    device = choose_device(config.device)
    with distributed.process_group(device), use_backend(config.backend), _threads(config.threads):
        loop = make(distributed.local_device(device))
        if checkpoint is not None:
            loop.restore(checkpoint)
        folder = distributed.from_first(lambda: run_folder(config, new=checkpoint is None))
        first = distributed.rank() == 0
        log = RunLog(folder, config.epochs, config.tensorboard and first, console if first else None)
        try:
            with _interruptible() as interrupted:
                loop.fit(folder, log, interrupted)
        finally:
            log.close()
        return TrainResult(config, folder, loop.history, loop.best_epoch, first, loop.noise)


def run_folder(config: RunConfig, new: bool) -> Path:
    """Creates and returns the run's folder; FileExistsError if a new run would overwrite another one."""
    if config.out is not None:
        folder = Path(config.out)
        if new and (folder / f"{LAST}.safetensors").exists():
            raise FileExistsError(f"{folder} holds a run already: resume it, or choose another folder")
    else:
        folder, number = Path("runs") / config.name, 1
        while folder.exists():
            number += 1
            folder = Path("runs") / f"{config.name}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def choose_device(name: str) -> torch.device:
    """The device that ``RunConfig.device`` names; RuntimeError where "cuda" is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device 'cuda' was asked for, but torch finds no CUDA GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C within the block into a flag, whose value the yielded function returns."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: False
        return
    seen = threading.Event()

    def on_interrupt(signum, frame) -> None:
        seen.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)
