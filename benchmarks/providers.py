"""Who competes. A provider prepares a case and hands back calls to time; one that can't says why, and is listed so."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.subject import Unable, Work

NOT_INSTALLED = "not installed: pip install cvfast[peers]"


@dataclass(frozen=True)
class Prepared:
    """run: the call to time. output: the forward result, to judge it."""

    run: Callable[[], object]
    output: Callable[[], Tensor]


class Provider(ABC):
    """One competitor."""

    name: str
    trains = False
    devices: tuple[str, ...] = ("cpu",)

    def check(self, work: Work) -> None:
        """Raises Unable with the reason why this provider does not take part."""
        if work.direction == "training" and not self.trains:
            raise Unable("inference only")
        if work.device not in self.devices:
            raise Unable(f"measured on {', '.join(self.devices)} only")

    @abstractmethod
    def prepare(self, work: Work) -> Prepared:
        """Everything that is done once. Unable, or the engine's own error, if the case can't be done."""


class Eager(Provider):
    """torch's or cvfast's own operators in one memory format."""

    trains = True
    devices = ("cpu", "cuda")

    def __init__(self, who: str, memory_format: str) -> None:
        self.who, self.memory_format, self.name = who, memory_format, f"{who} {memory_format}"

    def prepare(self, work: Work) -> Prepared:
        if self.memory_format not in work.subject.formats:
            raise Unable(f"{work.subject.name} knows no {self.memory_format}")
        return Prepared(*work.calls(self.who, self.memory_format))


class Compiled(Provider):
    """torch.compile: with frozen weights for inference, and of forward and backward for training."""

    name = "torch.compile"
    trains = True
    devices = ("cpu", "cuda")

    def prepare(self, work: Work) -> Prepared:
        import torch._inductor.config as inductor

        torch._dynamo.reset()
        if work.direction == "training":
            prepared = Prepared(*work.calls("torch", "contiguous", compile=True))
            prepared.run()  # compiles
            return prepared
        model = torch.compile(work.model)
        run = lambda: work.infer(model)  # noqa: E731
        with inductor.patch(freezing=True):
            run()  # compiles
        return Prepared(run, run)


class Peer(Provider):
    """Another inference engine, which runs the case's ONNX file."""

    module: str

    def check(self, work: Work) -> None:
        super().check(work)
        if importlib.util.find_spec(self.module) is None:
            raise Unable(NOT_INSTALLED)


class OnnxRuntime(Peer):
    name, module = "onnxruntime", "onnxruntime"

    def prepare(self, work: Work) -> Prepared:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = work.threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the next one's turn is its own
        session = onnxruntime.InferenceSession(work.onnx(), options, providers=["CPUExecutionProvider"])
        inputs = {name: tensor.numpy() for name, tensor in zip(work.subject.data, work.data, strict=True)}
        run = lambda: session.run(None, inputs)  # noqa: E731
        return Prepared(run, lambda: torch.from_numpy(run()[0]))


class OpenVino(Peer):
    name, module = "OpenVINO", "openvino"

    def prepare(self, work: Work) -> Prepared:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": work.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        request = openvino.Core().compile_model(str(work.onnx()), "CPU", settings).create_infer_request()
        for i, tensor in enumerate(work.data):
            request.set_input_tensor(i, openvino.Tensor(tensor.numpy(), shared_memory=True))
        run = lambda: request.infer()  # noqa: E731
        return Prepared(run, lambda: torch.from_numpy(next(iter(run().values())).copy()))


class Mnn(Peer):
    """MNN at precision high; data is put into its input tensors beforehand and not timed."""

    name, module = "MNN", "MNN"

    def prepare(self, work: Work) -> Prepared:
        with silence():
            import MNN

            self._convert(work.onnx(), work.file(".mnn"))
            net = MNN.Interpreter(str(work.file(".mnn")))
            session = net.createSession({"backend": "CPU", "precision": "high", "numThread": work.threads})
        for name, tensor in zip(work.subject.data, work.data, strict=True):
            net.getSessionInput(session, name).copyFrom(self._tensor(MNN, tensor.numpy()))

        def output() -> Tensor:
            net.runSession(session)
            inside = net.getSessionOutput(session)
            outside = self._tensor(MNN, np.empty(inside.getShape(), np.float32))
            inside.copyToHostTensor(outside)
            return torch.from_numpy(np.array(outside.getNumpyData()).reshape(inside.getShape()))

        return Prepared(lambda: net.runSession(session), output)

    @staticmethod
    def _tensor(MNN, array: np.ndarray):
        return MNN.Tensor(array.shape, MNN.Halide_Type_Float, array, MNN.Tensor_DimensionType_Caffe)

    @staticmethod
    def _convert(source: Path, target: Path) -> None:
        if target.exists():
            return
        # The converter itself: the program mnnconvert wraps it, and installs and calls a logging service besides.
        import _tools

        options = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "cvfast"]
        _tools.mnnconvert(["mnnconvert", *options])


class Ncnn(Peer):
    """ncnn in float32. It knows no batches: the samples run one after another, each a call of its own."""

    name, module = "ncnn", "ncnn"

    def check(self, work: Work) -> None:
        super().check(work)
        if not work.subject.batch_first:
            raise Unable("has no batches, and the samples of this operator can't be taken apart")

    def prepare(self, work: Work) -> Prepared:
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads, net.opt.openmp_blocktime = work.threads, 0
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(net.opt, option, False)
        for load, path in zip((net.load_param, net.load_model), self._convert(work), strict=True):
            if load(str(path)) != 0:
                raise Unable("knows not all of its layers")
        samples = [[ncnn.Mat(array).clone() for array in arrays] for arrays in zip(*(t.numpy() for t in work.data))]  # noqa: B905

        def run() -> list:
            results = []
            for arrays in samples:
                extractor = net.create_extractor()
                for i, array in enumerate(arrays):
                    extractor.input(f"in{i}", array)
                results.append(extractor.extract("out0")[1])
            return results

        return Prepared(run, lambda: torch.from_numpy(np.stack([np.array(result) for result in run()])))

    @staticmethod
    def _convert(work: Work) -> tuple[Path, Path]:
        """(param, bin), made by pnnx from the ONNX file of one sample."""
        files = work.file(".fused.ncnn.param"), work.file(".fused.ncnn.bin")
        if not all(path.exists() for path in files):
            beside = Path(sys.executable).with_name("pnnx")
            pnnx = str(beside) if beside.exists() else shutil.which("pnnx")
            if pnnx is None:
                raise Unable(NOT_INSTALLED)
            others = [f"{name}={work.file('.pnnx.' + name)}" for name in ("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx")]
            command = [pnnx, work.onnx(single=True), "fp16=0", "optlevel=2", f"ncnnparam={files[0]}",
                       f"ncnnbin={files[1]}", f"ncnnpy={work.file('.ncnn.py')}", *others]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True)
        return files


@contextmanager
def silence() -> Iterator[None]:
    """Nothing that native code prints reaches the terminal."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


PROVIDERS: tuple[Provider, ...] = (
    Eager("cvfast", "contiguous"),
    Eager("cvfast", "channels_last"),
    Eager("torch", "contiguous"),
    Eager("torch", "channels_last"),
    Compiled(),
    OnnxRuntime(),
    OpenVino(),
    Mnn(),
    Ncnn(),
)
