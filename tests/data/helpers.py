"""Tiny files in CIFAR-10's two layouts, and a web server to download them from."""

from __future__ import annotations

import io
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def random_images(count: int, seed: int, channels: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    """uint8 [count, channels, *size]"""
    return torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8, generator=torch.manual_seed(seed))


def binary_batch(images: Tensor, labels: Tensor) -> bytes:
    """CIFAR-10's binary records."""
    return torch.cat((labels.to(torch.uint8)[:, None], images.flatten(1)), dim=1).numpy().tobytes()


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its strings, so that the layout is that of the original files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_python2_string(self, value: str | bytes) -> None:
        content = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(value)

    dispatch[str] = save_python2_string
    dispatch[bytes] = save_python2_string


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def pickled_batch(images: Tensor, labels: Tensor) -> bytes:
    """CIFAR-10's pickled dict, with the keys of the original."""
    names = [f"image_{i}.png" for i in range(len(images))]
    data = images.flatten(1).numpy()
    batch = {"batch_label": "training batch", "labels": labels.tolist(), "data": data, "filenames": names}
    return python2_pickle(batch)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    """A .tar.gz with `files` in `folder`."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_image(path: Path, pixels: Tensor) -> Path:
    """Pixels uint8 [C, H, W] as the file type of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())).save(path)
    return path


class FileServer:
    """Serves one file on 127.0.0.1, and can misbehave.

    ranges: obey Range. cut_after: bytes after which the connection breaks off. status: answer with this error only.
    `asked` lists the Range header of every request, None without one.
    """

    def __init__(self, content: bytes, *, ranges: bool = True, cut_after: int | None = None, status: int = 200) -> None:
        self.content, self.ranges, self.cut_after, self.status = content, ranges, cut_after, status
        self.asked: list[str | None] = []
        serve = self._serve

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                serve(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers["Range"]
        self.asked.append(wanted)
        if self.status != 200:
            request.send_error(self.status)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if start and start >= len(self.content):
            request.send_error(416)
            return
        body = self.content[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: self.cut_after])

    def __enter__(self) -> FileServer:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
