"""Other people's trained models on real pictures and real speech: the same decisions before and after accelerate().

They are installed from PyPI without their dependencies, into pytest's cache, hence run only with --real-models; with
-s, the times of both are printed.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tarfile
import types
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import cvfast
from cvfast._accelerate.measure import least_seconds

pytestmark = pytest.mark.skipif(
    "not config.getoption('--real-models', default=False)", reason="pytest tests/real_models --real-models runs these"
)

PACKAGES = ("ccexam==1.0.0", "facenet-pytorch==2.6.0", "resemblyzer==0.1.4", "silero-vad==6.2.3")  # weights inside
SPEECH = "tests/data/test.wav"  # a minute of several people, in silero-vad's source archive
PICTURE = "skimage/data/astronaut.png"  # Eileen Collins, by NASA, in scikit-image's wheel
RATE = 16_000  # samples a second


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def packages(request) -> Path:
    """The folder with the packages."""
    folder = request.config.cache.mkdir("cvfast-real-models")
    if not (folder / "complete").exists():
        pip("install", "--no-deps", "--target", folder, *PACKAGES)
        pip("download", "--no-deps", "--no-binary", ":all:", "--dest", folder, PACKAGES[-1])
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, "scikit-image")
        (folder / "complete").touch()
    return folder


@pytest.fixture
def load(packages, monkeypatch):
    """A function that imports a module without running its package's __init__, which wants what is not installed."""
    monkeypatch.syspath_prepend(str(packages))

    def load(name: str):
        package = types.ModuleType(name.split(".")[0])
        package.__path__ = [str(packages / package.__name__)]
        monkeypatch.setitem(sys.modules, package.__name__, package)
        return importlib.import_module(name)

    yield load
    for name in list(sys.modules):
        if name.startswith(("ccexam", "facenet_pytorch", "resemblyzer")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def speech(packages) -> Tensor:
    """[samples] in [-1, 1]."""
    with tarfile.open(next(packages.glob("silero_vad-*.tar.gz"))) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith(SPEECH))
        with wave.open(archive.extractfile(member)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return torch.from_numpy(samples / np.float32(2**15))


@pytest.fixture(scope="module")
def picture(packages) -> Image.Image:
    with zipfile.ZipFile(next(packages.glob("scikit_image-*.whl"))) as wheel, wheel.open(PICTURE) as file:
        return Image.open(file).convert("RGB")


def compare(model: nn.Module, decide, *, change=cvfast.accelerate, kernels: int) -> tuple:
    """decide()'s results before and after `change` of the model, of which `kernels` layers then are cvfast's.

    decide: calls the model, in eval mode.
    """
    model.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        before = decide()
        change(model)
        after = decide()
        assert sum(type(m).__module__ == "cvfast._accelerate.layers" for m in model.modules()) == kernels

        def torchs():
            with cvfast.use_backend("native"):
                decide()

        ours, theirs = least_seconds(decide, torchs, seconds=2.0)
    torch.set_num_threads(threads)
    name = type(model).__name__
    print(f"\n{name}: torch {theirs * 1e3:.2f} ms, cvfast {ours * 1e3:.2f} ms, {theirs / ours:.2f} times faster")
    return before, after


@pytest.mark.parametrize(("data", "network"), [("mnist", "MNISTNet"), ("usps", "USPSNet"), ("svhn", "SVHNNet")])
def test_ccexam_reads_digits(data, network, load, packages):
    """Three CNNs, on the pictures that the package brings; the file's name says the digit."""
    facts = load("ccexam.constants").DATASET_STATS[data]
    model = getattr(load("ccexam.models"), network)(facts["image_size"])
    model.load_state_dict(torch.load(packages / "ccexam" / "weights" / f"{data}.pth", map_location="cpu"))
    files = sorted((packages / "ccexam" / "samples").glob(f"{data}_*.png"))
    labels = torch.tensor([int(re.search(r"_(\d)\.png", file.name)[1]) for file in files])
    mean, std = (torch.tensor(facts[key])[:, None, None] for key in ("mean", "std"))
    pictures = [Image.open(f).convert("L" if facts["grayscale"] else "RGB") for f in files]
    sized = [np.asarray(p.resize([facts["image_size"]] * 2, Image.Resampling.BILINEAR), np.float32) for p in pictures]
    images = [torch.from_numpy(p).reshape(*p.shape[:2], -1).permute(2, 0, 1) / 255 for p in sized]
    inputs = torch.stack([(image - mean) / std for image in images])
    before, after = compare(model, lambda: model(inputs), kernels=6 + 2 if data == "svhn" else 2 + 2)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(after.argmax(1), before.argmax(1)) and torch.equal(after.argmax(1), labels)


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, limit: float) -> Tensor:
    """torchvision's: boxes that no better box of their group overlaps by more than `limit`, the best first."""
    kept = []
    for i in scores.argsort(descending=True).tolist():
        others = boxes[kept]
        low, high = torch.maximum(boxes[i, :2], others[:, :2]), torch.minimum(boxes[i, 2:], others[:, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        areas = (boxes[i, 2:] - boxes[i, :2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared
        if not ((shared > limit * areas) & (groups[kept] == groups[i])).any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


def test_mtcnn_finds_faces(load, picture, monkeypatch):
    """Three CNNs in a cascade, on the picture as it is, mirrored, smaller and turned a little."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.ops", "torchvision.ops.boxes"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["torchvision.transforms"].functional = None  # asked for when faces are cut out
    sys.modules["torchvision.ops.boxes"].batched_nms = batched_nms
    mtcnn = load("facenet_pytorch.models.mtcnn").MTCNN(keep_all=True)
    pictures = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), picture.rotate(15),
                picture.resize((256, 256)).convert("L").convert("RGB").resize(picture.size)]  # fmt: skip

    def detect() -> list:
        """Boxes (pixels), scores and landmarks (pixels) of each picture."""
        return [[np.asarray(part, float) for part in found] for found in zip(*mtcnn.detect(pictures, landmarks=True))]  # noqa: B905

    before, after = compare(mtcnn, detect, kernels=5 + 3 + 4 + 7)  # convolutions of three networks, and linear layers
    for found, found_after in zip(before, after, strict=True):
        assert found[1].max() > 0.99
        for part, part_after, close in zip(found, found_after, (0.05, 1e-4, 0.05), strict=True):
            np.testing.assert_allclose(part_after, part, rtol=0, atol=close)
    left, top, right, bottom = after[0][0][0]
    assert 160 < left < 190 < 240 < right < 290 and 50 < top < 80 < 170 < bottom < 200  # her face


def mel_spectrogram(samples: Tensor, bands: int = 40) -> Tensor:
    """[frames, bands]: the power in bands of Slaney's mel scale, frames of 25 ms every 10 ms, as librosa forms it."""
    length, step = RATE // 40, RATE // 100
    power = torch.stft(
        samples, length, step, window=torch.hann_window(length), pad_mode="constant", return_complex=True
    )
    linear, octave = 200 / 3, np.log(6.4) / 27  # hertz per mel below 1 kHz, and the logarithm per mel above
    top = 15 + np.log(RATE / 2 / 1000) / octave
    mels = np.linspace(0, top, bands + 2)
    corners = torch.from_numpy(np.where(mels < 15, mels * linear, 1000 * np.exp((mels - 15) * octave)))
    hertz = torch.linspace(0, RATE / 2, length // 2 + 1, dtype=torch.float64)
    rising = (hertz - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - hertz) / (corners[2:] - corners[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0) * (2 / (corners[2:] - corners[:-2]))[:, None]
    return (filters.float() @ power.abs().square()).T


def test_resemblyzer_tells_voices_apart(load, packages, speech, monkeypatch):
    """LSTM 40 -> 256, three layers: which window of 1.6 s sounds most like which other one."""
    bare = types.ModuleType("resemblyzer.audio")  # wants librosa; here `mel_spectrogram` stands for it
    monkeypatch.setitem(sys.modules, "resemblyzer.audio", bare)
    module = load("resemblyzer.voice_encoder")
    encoder = module.VoiceEncoder("cpu", verbose=False, weights_fpath=packages / "resemblyzer" / "pretrained.pt")
    windows = mel_spectrogram(speech).unfold(0, 160, 80).transpose(1, 2).contiguous()
    before, after = compare(encoder, lambda: encoder(windows), kernels=1 + 1)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    alike = [embeds @ embeds.T - 2 * torch.eye(len(windows)) for embeds in (before, after)]
    assert torch.equal(alike[1].argmax(1), alike[0].argmax(1))
    assert (alike[0] > 0.75).any(1).float().mean() > 0.9  # neighbours overlap by half
    assert (alike[0] < 0.6).float().mean() > 0.1  # there are several people


class SileroVad(nn.Module):
    """The network of silero-vad for 16 kHz, for its weights: it comes as TorchScript, whose layers nobody can change.

    A chunk [N, 576] of samples (64 of the chunk before) and the LSTM's state in, probability of speech [N, 1] and state
    out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, 1, 1), nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, 2, 1), nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, chunk: Tensor, state=None):
        spectrum = self.stft_conv(F.pad(chunk[:, None], (0, 64), "reflect")).unflatten(1, (2, 129))
        x = spectrum.square().sum(1).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        h, c = self.lstm_cell(x[:, :, 0], state)
        return self.final_conv(h[:, :, None].relu()).sigmoid()[:, :, 0], (h, c)


def test_silero_hears_speech(packages, speech):
    """Conv1d, which cvfast does not have, and an LSTM cell, step by step: where there is speech."""
    theirs = torch.jit.load(packages / "silero_vad" / "data" / "silero_vad.jit").eval()
    weights = [tensor for name, tensor in theirs.state_dict().items() if name.startswith("_model.")]  # in model's order
    model = SileroVad()
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    chunks = F.pad(speech, (64, -len(speech) % 512)).unfold(0, 576, 512)[:600]

    def probabilities() -> Tensor:
        state, found = None, []
        for chunk in chunks:
            probability, state = model(chunk[None], state)
            found.append(probability)
        return torch.cat(found).flatten()

    before, after = compare(model, probabilities, kernels=1)
    assert [type(m) for m in model.children()].count(nn.Conv1d) == 6
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert torch.equal(after > 0.5, before > 0.5) and 0.2 < (after > 0.5).float().mean() < 0.98
    with torch.no_grad():
        published = torch.stack([theirs(chunk[None, 64:], RATE).flatten()[0] for chunk in chunks[:100]])
    torch.testing.assert_close(after[:100], published, rtol=0, atol=1e-4)  # it is their network
