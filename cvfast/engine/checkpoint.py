"""Checkpoints: one safetensors file with tensors and, in its header, the JSON that makes sense of them.

Nothing in a checkpoint is code, so reading one from a stranger is safe. A file is written next to its place, flushed to
the disk and renamed: whatever happens meanwhile (Ctrl-C, a full disk, a power cut), the place holds the old checkpoint
or the new one, whole.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = "cvfast-checkpoint-1"


class CheckpointError(ValueError):
    """A file that is no checkpoint of cvfast, is damaged, or does not fit what it is asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Attributes:
        tensors: by dotted name: ``model.*``, ``optimizer.<parameter>.<state>``, ``rng.*``.
        meta: JSON types only: how to rebuild the model and where the run stood.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with ``prefix.``, by the rest of their name."""
        start = prefix + "."
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes ``checkpoint`` to ``path``, replacing an earlier one only once the new one is safely on the disk.

    Raises:
        OSError: from the file system, for example ENOSPC on a full disk; an earlier file at ``path`` is untouched.
    """
    header = {"format": FORMAT, "meta": json.dumps(checkpoint.meta)}
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    replace_file(path, safetensors.torch.save(tensors, header))


def replace_file(path: Path, content: bytes) -> None:
    """Makes ``content`` the whole of the file ``path``, or leaves the file as it was and raises OSError."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint: a file, or the folder of a run, whose ``best.safetensors`` is taken.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is not a checkpoint of cvfast, or is damaged.
    """
    path = checkpoint_file(path, "best")
    tensors, header = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of cvfast ({FORMAT})")
    try:
        return Checkpoint(tensors, json.loads(header["meta"]))
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{path} is a damaged checkpoint: {error}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its header; CheckpointError if it is none or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def checkpoint_file(path: str | Path, name: str) -> Path:
    """``path`` itself, or ``<path>/<name>.safetensors`` if it is a folder; FileNotFoundError if that is missing."""
    path = Path(path)
    if path.is_dir():
        path = path / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return path
