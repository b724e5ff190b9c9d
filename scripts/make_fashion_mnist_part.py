"""Makes the part of Fashion-MNIST that ships inside the package.

    apt-get install dataset-fashion-mnist
    python scripts/make_fashion_mnist_part.py /usr/share/datasets/fashion-mnist cvfast/data/files

Takes the first 500 training and the first 100 test images of every class, in the original order, so that the
same input always gives the same file, byte for byte (with the same zlib). The MIT (Expat) notice beside it,
FASHION_MNIST_LICENSE, is written from the package's own copyright file.
"""

from __future__ import annotations

import argparse
import gzip
import io
import textwrap
import zipfile
from pathlib import Path

import numpy as np

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PER_CLASS = {"train": 500, "test": 100}
ORIGINAL_PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file: two zero bytes, type 0x08, the rank, big-endian sizes, the data."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first `count` images of every class, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(len(CLASSES))]))


def select(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the .npz: {train,test}_{images,labels} and classes."""
    arrays: dict[str, np.ndarray] = {}
    for part, prefix in ORIGINAL_PREFIX.items():
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = first_of_each_class(labels, PER_CLASS[part])
        arrays[f"{part}_images"] = images[chosen]
        arrays[f"{part}_labels"] = labels[chosen]
    arrays["classes"] = np.array(CLASSES)
    return arrays


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """numpy.savez_compressed with zlib's highest level and without the time of day or the system's name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system = 3  # Unix, whatever the system
            member.external_attr = 0o644 << 16
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            archive.writestr(member, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def license_notice(debian_copyright: str) -> str:
    """The Expat notice of the data set, from a Debian copyright file: its first holder and its last paragraph."""
    holder = next(line for line in debian_copyright.splitlines() if line.startswith("Copyright:"))
    text = debian_copyright.split("\nLicense: Expat\n")[-1]
    paragraphs = textwrap.dedent(text).rstrip().replace("\n.\n", "\n\n")
    lines = "\n".join(line.rstrip() for line in paragraphs.splitlines())
    title = "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist"
    return f"{title}\n{holder}\n\nThe MIT (Expat) License\n\n{lines}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the four *-ubyte.gz files")
    parser.add_argument("destination", type=Path, help="folder to write fashion_mnist_part.npz and its licence to")
    parser.add_argument(
        "--copyright", type=Path, default=Path("/usr/share/doc/dataset-fashion-mnist/copyright"),
        help="the Debian package's copyright file",
    )  # fmt: skip
    arguments = parser.parse_args()
    output = arguments.destination / "fashion_mnist_part.npz"
    write_npz(output, select(arguments.source))
    notice = license_notice(arguments.copyright.read_text(encoding="utf-8"))
    (arguments.destination / "FASHION_MNIST_LICENSE").write_text(notice, encoding="utf-8")
    print(f"{output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
