"""Taking a model to where it is used: ONNX for any runtime, torch.export for PyTorch's own.

A classifier's exported graph takes uint8 images as the data set has them, [N, C, H, W] with any N, and returns logits
[N, K]: the preparation is part of it. The class names travel along. Any other network takes and returns what it does.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
import zipfile
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
TOLERANCE = 1e-4  # of outputs up to 1, of larger ones as a share of the largest: float32 has no more digits
_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int64)": "int64"}  # of onnxruntime


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
        inputs: an example of each input of ``forward``, in its order, by the name that it gets in ONNX; only dtype and
            shape count. The first dimension, 2 or more in the example, becomes that of a batch of any size, the others
            stay.
        format: "onnx" or "torch", as in :func:`export`.
        outputs: names of the outputs in ONNX; default: "output", or "output_0", "output_1", ...
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
            network.cpu().eval(), tuple(inputs.values()), dynamic_shapes=tuple({0: batch} for _ in inputs)
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
    run = _runner(path)
    exported = torch.cat([run([images])[0] for images, _ in batches(data, 500)])
    expected = logits_of(classifier.cpu().eval(), data)
    disagreements = (exported.argmax(dim=1) != expected.argmax(dim=1)).sum().item()
    return ExportCheck(len(data), _difference(exported, expected).item(), disagreements)


@dataclass(frozen=True)
class NetworkCheck:
    """An exported file beside the network that it came from, on the same inputs.

    Attributes:
        samples: how many were compared.
        difference: the largest absolute difference in an output; a share of the output's largest number where that
            exceeds 1.
    """

    samples: int
    difference: float

    @property
    def passed(self) -> bool:
        """Whether ``difference`` is at most ``TOLERANCE``."""
        return self.difference <= TOLERANCE

    def __str__(self) -> str:
        return f"outputs for {self.samples} inputs differ by at most {self.difference:.1e} (allowed: {TOLERANCE:.0e})"


@torch.no_grad()
def check_network(path: str | Path, network: nn.Module, inputs: dict[str, Tensor]) -> NetworkCheck:
    """Runs an exported file, with onnxruntime or as a torch.export program, on a batch, and on its first sample alone.

    Args:
        network: what the file was written from.
        inputs: a batch of each input of ``network.forward``, in its order.

    Raises:
        RuntimeError: if the shapes of an output differ.
    """
    run, network = _runner(path), network.cpu().eval()
    samples = len(next(iter(inputs.values())))
    differences = []
    for count in (samples, 1):
        batch = [tensor[:count] for tensor in inputs.values()]
        for exported, expected in zip(run(batch), _tensors(network(*batch)), strict=True):
            if exported.shape != expected.shape:
                raise RuntimeError(f"{path} returns {list(exported.shape)}, the network {list(expected.shape)}")
            differences.append(_difference(exported, expected))
    return NetworkCheck(samples, torch.stack(differences).max().item())


def signature(path: str | Path) -> str:
    """What an exported file takes and returns, in words: names (of ONNX's outputs, too), dtypes, and shapes with N for
    a batch of any size.
    """
    if zipfile.is_zipfile(path):
        program = _program(path)
        values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
        inputs, outputs = program.graph_signature.user_inputs, program.graph_signature.user_outputs
        sides = (
            [_words(name, values[name].dtype, values[name].shape) for name in inputs if name in values],
            [_words("", values[name].dtype, values[name].shape) for name in outputs if name in values],
        )
    else:
        session = _onnx_session(path)
        sides = (
            [_words(value.name, _DTYPES.get(value.type, value.type), value.shape) for value in values]
            for values in (session.get_inputs(), session.get_outputs())
        )
    return " -> ".join(map(", ".join, sides))


def _words(name: str, dtype: object, shape: Sequence[object]) -> str:
    sizes = ", ".join(str(size) if isinstance(size, int) else "N" for size in shape)
    return f"{name} {dtype} [{sizes}]".replace("torch.", "").strip()


def _difference(exported: Tensor, expected: Tensor) -> Tensor:
    return (exported - expected).abs().max() / expected.abs().max().clamp(min=1)


def _tensors(outputs: Tensor | Sequence[Tensor | None]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [output for output in outputs if output is not None]


def _program(path: str | Path) -> torch.export.ExportedProgram:
    return torch.export.load(io.BytesIO(Path(path).read_bytes()))  # of a path, torch asks that it ends in .pt2


def _runner(path: str | Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Runs an exported file on its inputs, in their order; returns its outputs."""
    if zipfile.is_zipfile(path):
        program = torch.no_grad()(_program(path).module())
        return lambda inputs: _tensors(program(*inputs))
    session = _onnx_session(path)
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run


def _onnx_session(path: str | Path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _onnx_bytes(
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str] | None,
    metadata: dict[str, str],
) -> bytes:
    if outputs is None:
        count = sum(isinstance(name, str) for name in program.graph_signature.user_outputs)
        outputs = ["output"] if count == 1 else [f"output_{number}" for number in range(count)]
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
