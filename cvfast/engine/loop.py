"""The loop that all training shares: epochs of steps, and a checkpoint between any two of them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cvfast.data import Batches
from cvfast.engine import distributed
from cvfast.engine.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from cvfast.engine.config import RunConfig
from cvfast.engine.logs import EpochFigures, RunLog
from cvfast.engine.schedule import learning_rate

BEST, LAST = "best", "last"
AUGMENTATION_STREAM = 2**31  # keeps other random numbers of a step apart from those of the images' order


class Loop:
    """A training run. Between two steps, :meth:`checkpoint` is all of its state.

    A subclass says what a batch is (:meth:`_batches`), what a step does with it (:meth:`_train_step`, which adds its
    figures to ``totals``), and what an epoch's figures are (:meth:`_figures`).

    Args:
        config: the settings.
        model: all that learns; its ``state_dict`` is kept. Networks with optimisers of their own are its children.
        optimizers: each over some of the model's parameters; the schedule sets the learning rate of all.
        totals: how many sums a step adds to; the last one counts samples.

    Raises:
        RuntimeError: if torchrun started several processes and the run is not for several.
    """

    Figures: ClassVar[type[EpochFigures]]
    PARALLEL: ClassVar[bool] = False  # whether several processes can share the work
    NOISE: ClassVar[dict[str, float]]  # figure -> how far two runs that differ in rounding only may end apart

    def __init__(
        self, config: RunConfig, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], totals: int
    ) -> None:
        if distributed.world_size() > 1 and not self.PARALLEL:
            raise RuntimeError(f"{config.name} trains in one process, but {distributed.world_size()} were started")
        self.config = config
        self.model = model
        self.optimizers = list(optimizers)
        self.device = next(model.parameters()).device
        self.local_batch_size = _local_batch_size(config.batch_size)
        self.steps_per_epoch = len(self._batches(0))
        torch.manual_seed(config.seed + distributed.rank())  # the models' dropout differs from process to process
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch at hand
        self.totals = torch.zeros(totals, dtype=torch.float64, device=self.device)  # of the epoch at hand
        self.history: list[EpochFigures] = []
        self.best_epoch = 0

    def _batches(self, epoch: int) -> Batches:
        """The batches of epoch ``epoch``, counted from 0: a function of the seed and the epoch."""
        raise NotImplementedError

    def _train_step(self, *batch: Tensor) -> None:
        """Changes the model, and adds to ``totals``."""
        raise NotImplementedError

    def _figures(self, means: list[float], common: dict[str, Any]) -> EpochFigures:
        """The figures of the epoch at hand: ``means`` are the totals per sample, ``common`` those that all have."""
        raise NotImplementedError

    def _before_epoch(self) -> None:
        """Called before an epoch's first step, and before the first one after a resumption."""

    def _after_epoch(self, folder: Path) -> None:
        """Called in the first process when an epoch is over and saved: for pictures."""

    def description(self) -> dict[str, Any]:
        """What it takes to rebuild the model without this run, in JSON types; goes into the checkpoint."""
        return {}

    @property
    def noise(self) -> dict[str, float]:
        """``NOISE``, or what this very run is known to have."""
        return self.NOISE

    @property
    def global_step(self) -> int:
        """Finished steps of the whole run."""
        return self.epoch * self.steps_per_epoch + self.step

    def fit(self, folder: Path, log: RunLog, interrupted: Callable[[], bool]) -> None:
        """Trains to the end, or raises KeyboardInterrupt with a checkpoint of the very step."""
        while self.epoch < self.config.epochs and not self._out_of_patience():
            self._before_epoch()
            start = time.perf_counter()
            remaining = itertools.islice(self._batches(self.epoch), self.step, None)
            for batch in log.progress(remaining, self.epoch, self.steps_per_epoch - self.step):
                self._set_learning_rate()
                self._train_step(*batch)
                self.step += 1
                if distributed.in_any_process(interrupted(), self.device):
                    self._save(folder, LAST)
                    raise KeyboardInterrupt(f"stopped in epoch {self.epoch + 1}, step {self.step}")
            self._finish_epoch(time.perf_counter() - start)
            if self.best_epoch == self.epoch:
                self._save(folder, BEST)
            self._save(folder, LAST)
            if distributed.rank() == 0:
                log.add(self.history)
                self._after_epoch(folder)

    def _set_learning_rate(self) -> None:
        lr = learning_rate(self.config, self.global_step, self.steps_per_epoch)
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers):
            group["lr"] = lr * group.get("scale", 1.0)

    def _finish_epoch(self, seconds: float) -> None:
        *sums, samples = distributed.sum_over_processes(self.totals).tolist()
        means = [value / samples for value in sums]
        if not all(map(math.isfinite, means)):
            raise FloatingPointError(
                f"a training loss of epoch {self.epoch + 1} is not finite ({means[0]}); try a smaller learning rate"
            )
        lr = learning_rate(self.config, (self.epoch + 1) * self.steps_per_epoch - 1, self.steps_per_epoch)
        figures = self._figures(means, {"epoch": self.epoch + 1, "lr": lr, "seconds": seconds})
        self.epoch += 1
        self.step = 0
        self.totals.zero_()
        self.history.append(figures)
        if self.best_epoch == 0 or figures.score > self.history[self.best_epoch - 1].score:
            self.best_epoch = self.epoch

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.epoch - self.best_epoch >= self.config.patience

    def _save(self, folder: Path, name: str) -> None:
        checkpoint = self.checkpoint()  # in every process: it gathers from all
        if distributed.rank() == 0:
            save_checkpoint(folder / f"{name}.safetensors", checkpoint)

    def checkpoint(self) -> Checkpoint:
        """All of the run's state."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for optimizer, names in self._optimized():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{names[index]}.{key}": t for key, t in state.items() if isinstance(t, Tensor)}
        tensors["rng.cpu"] = distributed.gather(torch.get_rng_state().to(self.device)).cpu()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = distributed.gather(torch.cuda.get_rng_state().to(self.device)).cpu()
        tensors["totals"] = distributed.gather(self.totals).cpu()
        meta = self.description() | {
            "config": asdict(self.config),
            "epoch": self.epoch,
            "step": self.step,
            "best_epoch": self.best_epoch,
            "history": [asdict(entry) for entry in self.history],
        }
        return Checkpoint(tensors, meta)

    def restore(self, checkpoint: Checkpoint) -> None:
        """The inverse of :meth:`checkpoint`; CheckpointError where it does not fit."""
        world, rank = distributed.world_size(), distributed.rank()
        processes = len(checkpoint.tensors["totals"])
        if processes != world:
            raise CheckpointError(f"the run was started with {processes} processes and cannot go on with {world}")
        try:
            self.model.load_state_dict(checkpoint.part("model"))
            for optimizer, names in self._optimized():
                state = {index: checkpoint.part(f"optimizer.{name}") for index, name in enumerate(names)}
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": state, "param_groups": groups})
            torch.set_rng_state(checkpoint.tensors["rng.cpu"][rank])
            if self.device.type == "cuda" and "rng.cuda" in checkpoint.tensors:
                torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"][rank])
            self.totals = checkpoint.tensors["totals"][rank].to(self.device)
            self.epoch, self.step, self.best_epoch = (checkpoint.meta[key] for key in ("epoch", "step", "best_epoch"))
            self.history = [self.Figures(**entry) for entry in checkpoint.meta["history"]]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint does not fit its own run: {error}") from error

    def _optimized(self) -> list[tuple[torch.optim.Optimizer, list[str]]]:
        """Each optimiser with the names of its parameters, in its order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [
            (optimizer, [names[p] for group in optimizer.param_groups for p in group["params"]])
            for optimizer in self.optimizers
        ]


def _local_batch_size(batch_size: int) -> int:
    world = distributed.world_size()
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {world} processes")
    return batch_size // world
