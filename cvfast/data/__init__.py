"""Data sets of images, the way to a batch, and the transforms on it.

From pixels to a model's output:

    splits = cvfast.data.load("fashion-mnist")            # or "cifar10", a folder, an .npz
    train, validation = cvfast.data.split(splits.train)
    prepare = cvfast.data.Preparation(size=32, mean=splits.mean, std=splits.std, channels=3)
    augment = cvfast.data.Augmentation(flip=0.5, rotation=10)
    for images, labels in cvfast.data.batches(train, 64, shuffle=True, generator=epoch_generator(seed, epoch)):
        output = model(prepare(images, augment))

Data sets in memory are uint8; images in folders stay on disk until their batch is asked for.
"""

from cvfast.data.batching import Batches, batches, epoch_generator
from cvfast.data.dataset import DataSplits, ImageData, few, split
from cvfast.data.folders import decode_image
from cvfast.data.loading import load
from cvfast.data.transforms import Augmentation, Preparation

__all__ = [
    "Augmentation",
    "Batches",
    "DataSplits",
    "ImageData",
    "Preparation",
    "batches",
    "decode_image",
    "epoch_generator",
    "few",
    "load",
    "split",
]
