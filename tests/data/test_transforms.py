"""Preparation and augmentation against torch's flip and rot90, closed forms, float64, and onnxruntime."""

import json
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from cvfast.data import Augmentation, Preparation
from cvfast.data.transforms import affine_matrices, warp

from .helpers import random_images

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)

# -- Preparation -----------------------------------------------------------------------------------------------------


def test_values():
    """(pixel / 255 - mean) / std, against float64; the same for uint8 and for floating point in [0, 1]."""
    images = random_images(4, 0)
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (MEAN, STD))
    want = (images.double() / 255 - mean) / std
    prepare = Preparation(None, MEAN, STD)
    for given in (images, images.float() / 255):
        got = prepare(given)
        assert got.dtype == torch.float32 and (got - want).abs().max() < 2e-6
    assert prepare(images.double() / 255).dtype == torch.float64
    assert (prepare.denormalize(prepare(images)) - images / 255).abs().max() < 1e-6


@pytest.mark.parametrize("size, shape", [(32, (32, 32)), ((20, 50), (20, 50)), ([64, 64], (64, 64)), (None, (48, 36))])
def test_size(size, shape):
    assert Preparation(size, MEAN, STD)(random_images(2, 0, size=(48, 36))).shape == (2, 3, *shape)


def test_equal_size_changes_nothing():
    images = random_images(2, 0, size=(32, 40))
    assert torch.equal(Preparation((32, 40), MEAN, STD)(images), Preparation(None, MEAN, STD)(images))


def test_resize_against_pillow():
    """Shrinking and enlarging agree with Pillow's bilinear resize (in floating point), which is antialiased."""
    for source, target in (((64, 48), (20, 30)), ((20, 30), (50, 31))):
        plane = random_images(1, 0, channels=1, size=source)
        resample = Image.fromarray(plane[0, 0].float().numpy()).resize(target[::-1], Image.Resampling.BILINEAR)
        got = Preparation(target, [0.0], [1.0])(plane)
        assert np.abs(got[0, 0].numpy() * 255 - np.asarray(resample)).max() < 1e-3


def test_channels():
    """One plane becomes three, three become one by BT.601's weights; one mean serves all channels."""
    grey, colours = random_images(2, 0, channels=1), random_images(2, 1)
    got = Preparation(None, [0.5], [0.25], channels=3)(grey)
    assert torch.equal(got, ((grey.float() / 255 - 0.5) / 0.25).repeat(1, 3, 1, 1))
    luma = torch.einsum("nchw,c->nhw", colours.double() / 255, torch.tensor([0.299, 0.587, 0.114]).double())
    got = Preparation(None, [0.5], [0.25])(colours)
    assert got.shape == (2, 1, 32, 32) and (got[:, 0] - (luma - 0.5) / 0.25).abs().max() < 2e-6


def test_config():
    """A Preparation survives JSON, and its numbers are not in the model's state_dict."""
    prepare = Preparation(32, MEAN, STD)
    again = Preparation.from_config(json.loads(json.dumps(prepare.to_config())))
    assert again.to_config() == prepare.to_config() and repr(again) == repr(prepare)
    images = random_images(2, 0, size=(40, 40))
    assert torch.equal(again(images), prepare(images))
    assert Preparation.from_config(Preparation(None, [0.5], [0.25], 3).to_config()).channels == 3
    assert prepare.state_dict() == {}
    assert prepare.half().to_config() == again.to_config() and again.to_config()["mean"] == list(MEAN)
    with pytest.raises(ValueError, match=r"keys \['channels', 'mean', 'size', 'std'\], got \['size'\]"):
        Preparation.from_config({"size": 3})


def test_augment_comes_between():
    """The augmentation gets a float batch in [0, 1], resized; its result is normalised."""
    seen = []

    def invert(pixels):
        seen.append(pixels)
        return 1 - pixels

    images = random_images(2, 0, channels=1, size=(8, 8))
    prepare = Preparation(16, [0.5], [0.25], channels=3)
    assert torch.equal(prepare(images, invert), (1 - prepare.pixels(images) - 0.5) / 0.25)
    assert seen[0].shape == (2, 3, 16, 16) and seen[0].dtype == torch.float32
    assert seen[0].min() >= 0 and 0.5 < seen[0].max() <= 1


def test_augment_may_work_in_place():
    images = random_images(2, 0, channels=1, size=(8, 8))
    want = images.clone()
    Preparation(None, [0.5], [0.25], channels=3)(images, lambda pixels: pixels.mul_(0.5))
    assert torch.equal(images, want)


@pytest.mark.parametrize("result", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8).byte(), None])
def test_wrong_augment(result):
    prepare = Preparation(None, MEAN, STD)
    with pytest.raises(ValueError, match=r"augment must return a floating-point batch of shape \[2, 3, 8, 8\], got"):
        prepare(random_images(2, 0, size=(8, 8)), lambda pixels: result)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((0, MEAN, STD), "size must be a positive number"),
        ((32, [0.5, 0.5], [1, 1]), "channels must be 1 .* or 3 .*, got 2"),
        ((32, MEAN, STD, 4), "channels must be 1 .* or 3 .*, got 4"),
        ((32, MEAN, STD, 1), "mean must have 1 or 1 values"),
        ((32, MEAN, [0.2, 0.2]), r"std must have 1 or 3 values, one per channel, got \[0.2, 0.2\]"),
        ((32, MEAN, (0.2, 0, 0.2)), r"std must be positive, got \[0.2, 0, 0.2\]"),
        ((32, (0.2, math.nan, 0.2), STD), "mean must be finite"),
    ],
)
def test_wrong_preparation(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Preparation(*arguments)


def test_wrong_images():
    prepare = Preparation(32, MEAN, STD)
    with pytest.raises(TypeError, match=r"uint8 \(0 to 255\) or floating point \(0 to 1\), got torch.int64"):
        prepare(torch.zeros(1, 3, 4, 4, dtype=torch.int64))
    for shape in ((3, 4, 4), (1, 2, 4, 4), (1, 4, 4, 3)):
        with pytest.raises(ValueError, match=r"images must be \[N, 1 or 3, H, W\]"):
            prepare(torch.zeros(shape))


@pytest.mark.parametrize(
    "source, channels, dtype",
    [((45, 33), (3, 3), torch.uint8), ((28, 28), (1, 3), torch.uint8), ((64, 48), (3, 1), torch.float32)],
    ids=["uint8", "grey to colours", "colours to grey"],
)
def test_export(tmp_path, source, channels, dtype):
    """In front of a model it is exported with a free batch size: torch.export and ONNX give what torch gives.

    The ONNX graph holds operators of the standard only.
    """
    images = random_images(6, 0, channels=channels[0], size=source)
    if dtype.is_floating_point:
        images = images.to(dtype) / 255
    model = nn.Sequential(Preparation(32, MEAN[: channels[1]], STD[: channels[1]]), nn.Flatten()).eval()
    free = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=free)
    assert torch.equal(program.module()(images), model(images))
    torch.onnx.export(
        model, (images[:2],), tmp_path / "model.onnx", dynamic_shapes=free, dynamo=True, opset_version=18, verbose=False
    )
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert np.abs(got - model(images).numpy()).max() < 1e-5


# -- Augmentation ----------------------------------------------------------------------------------------------------


def matrices(count: int, size: tuple[int, int], angle=0.0, scale=1.0, shift=(0.0, 0.0)) -> torch.Tensor:
    """The same change for `count` images."""
    same = torch.ones(count)
    return affine_matrices(same * angle, same * scale, torch.tensor([shift] * count), size)


def photos(count: int = 3, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return random_images(count, 0, size=size).float() / 255


def test_nothing_to_do():
    """With all amounts at their default the batch itself comes back."""
    images = photos()
    assert Augmentation()(images) is images


def test_flip_is_exact():
    """With probability 1 all images are torch.flip's; with 0.5 each is either itself or that, bit for bit."""
    images = photos(64)
    assert torch.equal(Augmentation(flip=1)(images), images.flip(-1))
    got = Augmentation(flip=0.5)(images, torch.manual_seed(0))
    flipped = (got == images.flip(-1)).flatten(1).all(1)
    kept = (got == images).flatten(1).all(1)
    assert bool((flipped ^ kept).all()) and 15 < int(flipped.sum()) < 49


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_rotation_against_rot90(quarter_turns):
    """Quarter turns, anticlockwise, are torch.rot90's."""
    images = photos()
    got = warp(images, matrices(3, (16, 16), angle=90.0 * quarter_turns))
    assert (got - images.rot90(quarter_turns, (2, 3))).abs().max() < 1e-5


def test_half_turn_of_an_oblong_image():
    images = photos(size=(12, 20))
    got = warp(images, matrices(3, (12, 20), angle=180.0))
    assert (got - images.rot90(2, (2, 3))).abs().max() < 1e-5


def test_quarter_turn_of_an_oblong_image_keeps_its_shape():
    """Turning does not shear: the middle square of an oblong image turns as a square image would."""
    images = photos(size=(12, 20))
    got = warp(images, matrices(3, (12, 20), angle=90.0))
    middle = slice(4, 16)
    assert (got[..., middle] - images[..., middle].rot90(1, (2, 3))).abs().max() < 1e-5


@pytest.mark.parametrize("shift, pixels", [((0.25, 0.0), (0, 4)), ((0.0, -0.125), (-2, 0)), ((0.5, 0.25), (4, 8))])
def test_shift(shift, pixels):
    """A shift by whole pixels, to the right and down, against torch's pad (which crops where it is negative)."""
    images, (down, right) = photos(), pixels
    got = warp(images, matrices(3, (16, 16), shift=shift), padding="zeros")
    assert (got - F.pad(images, (right, -right, down, -down))).abs().max() < 1e-5


def test_shift_of_a_turned_image():
    """An image is turned first and shifted then, so the shift is along the picture's edges."""
    images = photos()
    got = warp(images, matrices(3, (16, 16), angle=90.0, shift=(0.25, 0.0)), padding="zeros")
    assert (got[..., 4:] - images.rot90(1, (2, 3))[..., :12]).abs().max() < 1e-5


def test_scale():
    """A linear ramp about the centre gets 1/scale of its slope: above 1 enlarges. Odd size: the centre stays."""
    columns = torch.arange(17.0) - 8
    ramp = columns.expand(1, 1, 17, 17)
    for scale in (2.0, 1.25):
        got = warp(ramp, matrices(1, (17, 17), scale=scale))
        assert (got - ramp / scale).abs().max() < 1e-4
    shrunk = warp(ramp, matrices(1, (17, 17), scale=0.5), padding="zeros")
    assert (shrunk[0, 0, 8, 5:12] - 2 * columns[5:12]).abs().max() < 1e-4 and shrunk[0, 0, 8, :3].abs().max() == 0


def test_padding():
    """Reflection fills what is outside from the image, zeros leave it black."""
    white = torch.ones(8, 1, 16, 16)
    generator = torch.manual_seed(0)
    turned = Augmentation(rotation=45, translation=0.3)(white, generator)
    assert (turned - 1).abs().max() < 1e-5
    black = Augmentation(rotation=45, translation=0.3, padding="zeros")(white, generator)
    assert black.min() == 0 and black.max() > 0.99


def test_reproducible_and_different_per_image():
    """The same state of the generator gives the same batch; images of a batch are changed differently."""
    augment = Augmentation(flip=0.5, rotation=15, scaling=(0.9, 1.1), translation=0.1)
    images = photos(1).repeat(8, 1, 1, 1)
    first, second = (augment(images, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(torch.unique(first.flatten(1), dim=0)) == 8
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(8)))
    state = torch.get_rng_state()
    augment(images, torch.Generator().manual_seed(7))
    assert torch.equal(state, torch.get_rng_state())


def test_amounts_do_not_change_each_others_draws():
    """The flip of an image is the same whether other amounts are on or off."""
    images = photos(32)
    alone = Augmentation(flip=0.5)(images, torch.Generator().manual_seed(1))
    slightly = Augmentation(flip=0.5, rotation=1e-4)(images, torch.Generator().manual_seed(1))
    assert (alone - slightly).abs().max() < 1e-3


def test_statistics():
    """Angle, scale and shift, recovered from where three points of a coordinate image go, spread as promised."""
    count, size = 2000, 33
    x = (torch.arange(size) - size // 2).float().expand(size, size)
    coordinates = torch.stack((x, x.T)).expand(count, 2, size, size)  # channels: x and y of each pixel
    augment = Augmentation(rotation=20, scaling=(0.8, 1.25), translation=0.1)
    got = augment(coordinates, torch.Generator().manual_seed(0))
    centre = size // 2
    origin, right = got[:, :, centre, centre], got[:, :, centre, centre + 4]
    step = (right - origin) / 4  # the input's step for one pixel to the right: (cos, -sin) / scale with y downwards
    scale = 1 / step.norm(dim=1)
    angle = torch.rad2deg(torch.atan2(step[:, 1], step[:, 0]))
    rotation = torch.stack((torch.stack((step[:, 0], -step[:, 1]), 1), torch.stack((step[:, 1], step[:, 0]), 1)), 1)
    shift = -torch.linalg.solve(rotation, origin.unsqueeze(2)).squeeze(2) / size
    for values, low, high in ((angle, -20, 20), (scale.log(), math.log(0.8), math.log(1.25)), (shift, -0.1, 0.1)):
        tolerance = (high - low) * 1e-3
        assert low - tolerance <= values.min() and values.max() <= high + tolerance
        assert values.min() < low + 0.02 * (high - low) and values.max() > high - 0.02 * (high - low)
        # Even: mean in the middle, variance a twelfth of the width squared, each within five standard errors.
        n = values.numel()
        assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * n)
        assert abs(values.var() * 12 / (high - low) ** 2 - 1) < 5 * math.sqrt(0.8 / n)
    draws = torch.stack((angle, scale.log(), shift[:, 0], shift[:, 1]))
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 5 / math.sqrt(count)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_shape_stay(dtype):
    images = photos(size=(10, 14)).to(dtype)
    got = Augmentation(0.5, 10, (0.9, 1.1), 0.1)(images)
    assert got.dtype == dtype and got.shape == images.shape


def test_low_precision():
    """Places are computed in float32 at least: bfloat16 images, and autocast, lose no more than their rounding."""
    augment = Augmentation(0.5, 10, (0.9, 1.1), 0.1)
    images = photos(8, (64, 64)).bfloat16()
    want = augment(images.double(), torch.Generator().manual_seed(0))
    assert (augment(images, torch.Generator().manual_seed(0)) - want).abs().max() < 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        got = augment(images.float(), torch.Generator().manual_seed(0))
    assert got.dtype == torch.float32 and (got - want).abs().max() < 1e-4


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"flip": 1.5}, "flip is a probability from 0 to 1, got 1.5"),
        ({"rotation": -1}, "rotation is an angle from 0 to 180 degrees, got -1"),
        ({"scaling": (1.1, 0.9)}, r"0 < smallest <= largest, got \(1.1, 0.9\)"),
        ({"scaling": (0, 1)}, "0 < smallest"),
        ({"translation": 2}, "translation is a share .* got 2"),
        ({"padding": "border"}, "padding must be 'reflection' or 'zeros', got 'border'"),
        ({"flip": math.nan}, "flip"),
    ],
)
def test_wrong_augmentation(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Augmentation(**arguments)


def test_wrong_batch():
    for images in (torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"images must be floating point \[N, C, H, W\], got"):
            Augmentation(flip=1)(images)
