"""Taking a classifier to where it is used: ONNX for any runtime, torch.export for PyTorch's own.

The exported graph takes uint8 images as the data set has them, [N, C, H, W] with any N, and returns logits [N, K]: the
preparation is part of it. The class names travel along.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cvfast.backend import use_backend
from cvfast.data import ImageData, batches
from cvfast.engine.checkpoint import replace_file
from cvfast.engine.classifier import Classifier, logits_of

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4  # of logits up to 1, of larger ones as a share of the largest: float32 has no more digits


def export(classifier: Classifier, path: str | Path, format: str = "onnx") -> Path:
    """Writes ``classifier`` to ``path``.

    Args:
        format: "onnx" (standard operators only; class names in the metadata, a JSON list under "classes") or "torch"
            (a ``torch.export`` program for ``torch.export.load``; class names in its extra file "classes").

    Returns:
        ``path``.

    Raises:
        ValueError: for another format.
        OSError: if the file cannot be written.
    """
    inputs = {INPUT: torch.zeros(2, *classifier.image_shape, dtype=torch.uint8)}
    metadata = {"classes": json.dumps(classifier.classes)}
    return export_network(classifier, inputs, path, format, outputs=[OUTPUT], metadata=metadata)


def export_network(
    network: nn.Module,
    inputs: dict[str, Tensor],
    path: str | Path,
    format: str = "onnx",
    *,
    outputs: Sequence[str] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes any network to ``path``; it is moved to the CPU and into eval mode.

    Args:
        inputs: an example of each input of ``forward``, by its name, in its order; only dtype and shape count. The
            first dimension, 2 or more in the example, becomes that of a batch of any size, the others stay.
        format: "onnx" or "torch", as in :func:`export`.
        outputs: names of the outputs in ONNX; default: the exporter's.
        metadata: words that travel along, in ONNX's metadata or in files of the torch.export program.

    Returns, raises: as :func:`export`.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    path, metadata = Path(path), metadata or {}
    program = exported_program(network, inputs)
    if format == "torch":
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=metadata)
        replace_file(path, buffer.getvalue())
    else:
        replace_file(path, _onnx_bytes(program, list(inputs), outputs, metadata))
    return path


def exported_program(network: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """The network as a graph of torch's own operators (so the backend is `native`), with a dynamic batch size."""
    batch = torch.export.Dim("batch")
    with use_backend("native"):
        return torch.export.export(
            network.cpu().eval(), tuple(inputs.values()), dynamic_shapes={name: {0: batch} for name in inputs}
        )


@dataclass(frozen=True)
class ExportCheck:
    """An exported file beside the classifier that it came from, on the same images.

    Attributes:
        images: how many were compared.
        difference: the largest absolute difference of a logit; a share of the largest logit where that exceeds 1.
        disagreements: images whose likeliest class differs.
    """

    images: int
    difference: float
    disagreements: int

    @property
    def passed(self) -> bool:
        """Whether all likeliest classes are the same and ``difference`` is at most ``TOLERANCE``."""
        return self.disagreements == 0 and self.difference <= TOLERANCE

    def __str__(self) -> str:
        return (
            f"same likeliest class for {self.images - self.disagreements} of {self.images} images, "
            f"logits differ by at most {self.difference:.1e} (allowed: {TOLERANCE:.0e})"
        )


def check_export(path: str | Path, classifier: Classifier, data: ImageData) -> ExportCheck:
    """Runs an exported file, with onnxruntime or as a torch.export program, on all images of ``data``."""
    run = _torch_runner(path) if Path(path).suffix == FORMATS["torch"] else _onnx_runner(path)
    exported = torch.cat([run(images) for images, _ in batches(data, 500)])
    expected = logits_of(classifier.cpu().eval(), data)
    disagreements = (exported.argmax(dim=1) != expected.argmax(dim=1)).sum().item()
    difference = (exported - expected).abs().max() / expected.abs().max().clamp(min=1)
    return ExportCheck(len(data), difference.item(), disagreements)


def _onnx_runner(path: str | Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _torch_runner(path: str | Path) -> Callable[[Tensor], Tensor]:
    return torch.no_grad()(torch.export.load(str(path)).module())


def _onnx_bytes(
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str] | None,
    metadata: dict[str, str],
) -> bytes:
    with _quiet_exporter():
        onnx_program = torch.onnx.export(
            program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False, optimize=True
        )
    model = onnx_program.model_proto
    foreign = {node.domain for node in model.graph.node} - {""}
    if foreign:
        raise RuntimeError(f"the exported graph needs operators outside of the ONNX standard: {sorted(foreign)}")
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's notes about packages that it looks for and does not need."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(before)
