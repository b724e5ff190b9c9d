"""The recipes: tiny versions of each, what they leave, exact resumption, twins, and what they refuse."""

import csv
import dataclasses
import json
import math
import signal
from contextlib import nullcontext

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from cvfast import data
from cvfast.cli import app
from cvfast.engine import CheckpointError, distributed, load_classifier, load_deployable, load_network, recipes
from cvfast.engine.checkpoint import load_checkpoint
from cvfast.engine.recipes import caption, gan, superres
from cvfast.engine.recipes.running import TWINS, gaps
from cvfast.engine.run import Run

TINY = {
    "classification": {"epochs": 2, "batch_size": 16},
    "gan": {"width": 4, "latent": 8, "batch_size": 16, "epochs": 2},
    "wgan-gp": {"width": 4, "latent": 8, "batch_size": 8, "epochs": 2, "loss": "wgan-gp", "conditional": True},
    "sequence": {"epochs": 2},
    "caption": {"epochs": 2, "batch_size": 8},
    "show_tell": {"epochs": 2, "batch_size": 8, "model": "show_tell", "rows": 1, "columns": 3, "augment": False},
    "superres": {"epochs": 2, "batch_size": 16, "width": 4, "blocks": 1, "images": 50},
}
RECIPE = {"wgan-gp": "gan", "show_tell": "caption"}
PICTURES = {
    "gan": {"samples.png", "real.png", "nearest.png", "learning_curves.png", "samples/epoch_001.png"},
    "wgan-gp": {"samples.png", "samples/epoch_002.png"},
    "sequence": {"learning_curves.png", "confusion_matrix.png", "samples.png"},
    "caption": {"attention_1.png", "attention_4.png", "learning_curves.png"},
    "show_tell": {"learning_curves.png"},
    "superres": {"images.png", "learning_curves.png"},
}
LOOPS = {
    "gan": gan.GanRun,
    "wgan-gp": gan.GanRun,
    "sequence": Run,
    "caption": caption.CaptionRun,
    "superres": superres.SuperresRun,
}


def options(kind, small_data, **changes):
    cls = recipes.find(RECIPE.get(kind, kind)).Options
    return cls(**({"data": small_data, "threads": 1} | TINY[kind] | changes))


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """A function that gives the folder of a finished tiny run, trained once."""
    folders = {}

    @torch.enable_grad()  # whatever the test that asks first
    def run(kind):
        if kind not in folders:
            out = tmp_path_factory.mktemp("recipes") / kind
            folders[kind] = recipes.start(RECIPE.get(kind, kind), options(kind, small_data), out)
        return folders[kind]

    return run


@pytest.mark.parametrize("kind", PICTURES)
def test_a_run_leaves_a_report_with_its_pictures_and_figures(runs, kind):
    folder = runs(kind)
    report = (folder / "report.md").read_text()
    for picture in PICTURES[kind]:
        assert (folder / picture).stat().st_size > 1000
        assert "/" in picture or f"]({picture})" in report
    assert "| epochs | 2 |" in report
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    without = {"attention"} if kind == "show_tell" else set()  # which has none
    assert all(math.isfinite(float(v)) for row in rows for name, v in row.items() if name not in without)


@pytest.mark.parametrize("kind", LOOPS)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(runs, kind, small_data, tmp_path, monkeypatch):
    loop = LOOPS[kind]
    original, calls = loop._train_step, []

    def step(self, *batch):
        original(self, *batch)
        calls.append(None)
        if len(calls) == self.steps_per_epoch + 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="epoch 2, step 2"):
        patch.setattr(loop, "_train_step", step)
        recipes.start(RECIPE.get(kind, kind), options(kind, small_data), tmp_path / "run")
    torch.manual_seed(12345)  # the random state of the new process must not matter
    recipes.resume(tmp_path / "run")
    whole, resumed = (load_checkpoint(folder / "last.safetensors") for folder in (runs(kind), tmp_path / "run"))
    assert whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())
    for one, other in zip(whole.meta["history"], resumed.meta["history"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_networks_come_back_from_checkpoints(runs, tmp_path):
    assert load_network(runs("wgan-gp"), "generator").num_classes == 10
    assert not load_network(runs("gan"), "discriminator").training
    assert load_classifier(runs("sequence")).model_name == "row_lstm"
    with pytest.raises(CheckpointError, match="holds no 'captioner'; it holds generator, discriminator"):
        load_network(runs("gan"), "captioner")
    with pytest.raises(CheckpointError, match="none of a recipe"):
        load_network(runs("sequence"), "captioner")


def loop_of(kind):
    return LOOPS.get(RECIPE.get(kind, kind), Run)


EXPORTED = {  # what the file takes and returns
    "gan": "z float32 [N, 8] -> output float32 [N, 1, 28, 28]",
    "wgan-gp": "z float32 [N, 8], labels int64 [N] -> output float32 [N, 1, 28, 28]",
    "sequence": "images uint8 [N, 1, 28, 28] -> logits float32 [N, 10]",
    "show_tell": "images uint8 [N, 1, 28, 84], sentences int64 [N, 12] -> output float32 [N, 12, 18]",
    "superres": "images uint8 [N, 1, 7, 7] -> output float32 [N, 1, 28, 28]",
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_runs_are_exported(runs, kind, tmp_path):
    code, words = cli("export", "--checkpoint", runs(kind), "--out", tmp_path / "model.onnx")
    assert code == 0 and EXPORTED[kind] in words and "checked: " in words, words
    if kind == "show_tell":
        metadata = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
        assert json.loads(metadata["vocabulary"]) == load_checkpoint(runs(kind)).meta["vocabulary"]


@torch.no_grad()
def test_exported_networks_prepare_images_themselves(runs):
    network, inputs, _ = load_deployable(runs("show_tell"), 3)
    expected = load_network(runs("show_tell"), "captioner")(inputs["images"] / 255 * 2 - 1, inputs["sentences"])[0]
    assert (network(**inputs)[0] - expected).abs().max() < 1e-5
    network, inputs, _ = load_deployable(runs("superres"))
    expected = load_network(runs("superres"), "upscaler")(inputs["images"] / 255)
    assert (network(**inputs) - expected).abs().max() < 1e-5


def history_of(folder, kind):
    return [loop_of(kind).Figures(**entry) for entry in load_checkpoint(folder / "last.safetensors").meta["history"]]


@pytest.mark.parametrize("kind", ["wgan-gp", "sequence", "caption", "superres"])
def test_torchs_operators_and_cvfasts_train_alike(runs, kind, small_data, tmp_path):
    """From one seed: after the first epoch the same but for rounding, at the end within noise."""
    native = recipes.start(RECIPE.get(kind, kind), options(kind, small_data, backend="native"), tmp_path / "native")
    found = gaps(history_of(native, kind), history_of(runs(kind), kind), loop_of(kind).NOISE)
    assert all(gap.is_noise and gap.first <= 1e-3 for gap in found), found


@pytest.mark.parametrize("kind", ["classification", "gan", "show_tell"])
def test_twins(kind, small_data, tmp_path, undrawn):
    with nullcontext() if kind == "gan" else undrawn():
        folder = recipes.start(RECIPE.get(kind, kind), options(kind, small_data, twin=True), tmp_path / "twins")
    for name, backend in TWINS.items():
        assert load_checkpoint(folder / name / "last.safetensors").meta["config"]["backend"] == backend
    native, ours = (history_of(folder / name, kind) for name in TWINS)
    found = gaps(native, ours, loop_of(kind).NOISE)
    assert native != ours and all(gap.is_noise and gap.first <= 1e-3 for gap in found), found
    report = (folder / "report.md").read_text()
    assert all(f"| {gap.figure} | {gap.first:.2g} |" in report for gap in found) and "| NO |" not in report
    before = (folder / "native" / "last.safetensors").read_bytes()
    recipes.resume(folder)  # finished: both are left as they are
    assert (folder / "native" / "last.safetensors").read_bytes() == before


def test_gaps_are_seen():
    def history(*losses):
        return [
            gan.GanFigures(epoch=k, lr=1.0, seconds=0.0, discriminator_loss=v, generator_loss=0.0, distance=0.0)
            for k, v in enumerate(losses)
        ]

    one, other = history(1, 1, 1, 1, 1, 1, 2, 4), history(1.5, 9, 9, 9, 9, 9, 3, 2)
    (gap,) = gaps(one, other, {"discriminator_loss": 0.4})
    assert (gap.first, gap.last, gap.is_noise) == (0.5, 0.5, False)
    assert gaps(one, other, {"discriminator_loss": 0.6})[0].is_noise


def test_learning_lowers_the_loss_and_superres_beats_bicubic(small_data, tmp_path):
    changes = {"epochs": 12, "width": 8, "images": 160}
    folder = recipes.start("superres", options("superres", small_data, **changes), tmp_path / "run")
    history = load_checkpoint(folder / "last.safetensors").meta["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["psnr"] > history[-1]["bicubic_psnr"] + 0.2


def test_psnr_of_known_errors():
    truth = torch.full((2, 3, 4, 4), 0.5019607843137255)  # 128 / 255
    ratio = superres.psnr(torch.stack((truth[0] + 16 / 255, truth[1])), truth)
    assert ratio[0].item() == pytest.approx(20 * math.log10(255 / 16), abs=1e-3) and ratio[1] > 90


def test_sliced_distance_and_neighbours():
    images = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert gan.sliced_distance(images, images[torch.randperm(50)]) < 1e-6
    near, far = gan.sliced_distance(images, images + 0.1), gan.sliced_distance(images, images + 0.5)
    assert 0.05 < near < 0.2 and far == pytest.approx(5 * near, rel=1e-3)
    labels = torch.arange(50) % 2
    assert gan.same_class_share(images + 1e-3, labels, images, labels) == 1
    assert gan.same_class_share(images, 1 - labels, images, labels) == 0


def test_sentences_name_pictures_in_order_and_words_know_their_picture():
    vocabulary = caption.Vocabulary(["Ankle boot", "Bag", "T-shirt/top"])
    numbers, owners = vocabulary.sentence([1, 0, 0, 2])
    text = vocabulary.text(numbers)
    assert text == "a bag , an ankle boot , an ankle boot and a t-shirt/top"
    words = ["<start>", *text.split(), "<end>"]
    assert [(word, owner) for word, owner in zip(words, owners, strict=True) if owner >= 0] == [
        ("bag", 0), ("ankle", 1), ("boot", 1), ("ankle", 2), ("boot", 2), ("t-shirt/top", 3),
    ]  # fmt: skip
    assert vocabulary.named(text) == ["bag", "ankle boot", "ankle boot", "t-shirt/top"]
    assert vocabulary.named("and a bag a") == ["bag"] and vocabulary.named("") == []
    with pytest.raises(ValueError, match="cannot be called 'an'"):
        caption.Vocabulary(["an end"])
    assert vocabulary.longest(2) == len(vocabulary.sentence([0, 0])[0][:-1])


def test_grids_and_attention_have_the_same_places():
    pictures = torch.arange(6.0).reshape(1, 6, 1, 1, 1).expand(-1, -1, -1, 8, 8)  # 2 rows of 3, each even
    image = caption.tiled(pictures, 3)
    assert image.shape == (1, 1, 16, 24) and image[0, 0, ::8, ::8].tolist() == [[0, 1, 2], [3, 4, 5]]
    weights = torch.zeros(4, 6)  # a map of 4 x 6 places, each 4 x 4 pixels
    weights[3, 4], weights[0, 1] = 0.75, 0.25
    assert caption.by_cell(weights.flatten()[None], (16, 24), (2, 3)).tolist() == [[0.25, 0, 0, 0, 0, 0.75]]


def test_every_epoch_has_new_grids_of_every_picture_that_fills_one(small_data):
    run = caption.CaptionRun(options("caption", small_data), torch.device("cpu"))
    epochs = [torch.cat([cells.flatten() for cells in run._batches(epoch).batches]) for epoch in (0, 1, 0)]
    assert len(epochs[0]) == len(epochs[0].unique()) == len(run.train_data) // 4 * 4
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("kind", ["gan", "caption", "superres"])
def test_images_held_out_are_not_trained_on_and_test_images_not_chosen_by(kind, small_data):
    """Training images of a run are a part of the training data; the test data could be anything."""
    run = LOOPS[kind](options(kind, small_data, **({"images": 200} if kind == "superres" else {})), torch.device("cpu"))
    train = data.load(small_data).train
    used = {image.numpy().tobytes() for image in run.train_data.images}
    assert len(run.train_data) < len(train) and used < {image.numpy().tobytes() for image in train.images}
    held_out = {
        "gan": lambda: (255 * run.real).round().byte(),
        "caption": lambda: run.validation.pictures.flatten(0, 1),
        "superres": lambda: run.validation_data.images,
    }[kind]()
    kept = {image.numpy().tobytes() for image in held_out}
    assert kept and not kept & used and kept < {image.numpy().tobytes() for image in train.images}


def cli(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def oblong(tmp_path):
    """Path of an .npz of images that are neither square nor a multiple of four high."""
    images, labels = np.zeros((20, 30, 28), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "oblong.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return tmp_path / "oblong.npz"


def test_what_cannot_be_is_refused_in_one_line(small_data, oblong, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = ("--out", tmp_path / "run")
    for code, message, *arguments in (
        (2, "unknown loss 'hinge'; choose one of dcgan, wgan-gp", "gan", "--loss", "hinge"),
        (2, "epochs must be positive, got 0", "caption", "--epochs", 0),
        (2, "unknown model 'cnn'; choose one of show_attend_tell, show_tell", "caption", "--model", "cnn"),
        (2, "blocks must be positive, got 0", "superres", "--blocks", 0),
        (2, "penalty must not be negative, got -1.0", "gan", "--penalty", -1),
        (3, "nowhere/data", "gan", "--data", "nowhere/data"),
        (4, "images must be square, got 30x28", "gan", "--data", oblong),
        (4, "sides must be multiples of 4, got 30x28", "superres", "--data", oblong),
        (4, "one step needs 500 images", "gan", "--data", small_data, "--batch-size", 500),
        (4, "too few images for one grid of 49", "caption", "--data", small_data, "--rows", 7, "--columns", 7),
    ):
        assert (code, True) == ((found := cli("train", *arguments, *out))[0], message in found[1]), found
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "recipe.json").write_bytes((runs("gan") / "recipe.json").read_bytes())
    (tmp_path / "damaged" / "last.safetensors").write_bytes((runs("gan") / "last.safetensors").read_bytes()[:99])
    assert cli("train", "--resume", tmp_path / "damaged")[0] == 5


@pytest.mark.parametrize("kind", ["gan", "caption", "superres"])
def test_several_processes_are_refused_where_they_cannot_share(kind, small_data, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="trains in one process, but 2 were started"):
        LOOPS[kind](options(kind, small_data), torch.device("cpu"))


def test_the_commands_say_what_was_reached(small_data, tmp_path):
    code, words = cli(
        "train", "superres", "--data", small_data, "--epochs", 1, "--width", 4, "--blocks", 1, "--images", 32,
        "--threads", 1, "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0 and "best epoch 1: test PSNR" in words and "against bicubic's" in words and "report.html" in words


def test_settings_that_differ_are_in_the_help():
    code, words = cli("train", "gan", "--help")
    assert code == 0 and "--critic-steps" in words and "--twin" in words
    assert dataclasses.replace(gan.Options(), loss="wgan-gp").name == "gan"
