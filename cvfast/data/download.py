"""Downloads that survive an interruption and are checked before anybody sees them."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

CHUNK = 1 << 20  # bytes read at a time
TIMEOUT_S = 30.0  # without a single byte


def file_digest(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file's content; `algorithm` as hashlib names it."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, destination: Path, md5: str) -> None:
    """Fetches `url` to `destination`, which appears only once it is whole and its MD5 is `md5`.

    Shows a progress bar. What arrived of an interrupted download stays in `<destination>.part`, and the next call goes
    on from there if the server allows it (HTTP range requests). For one process at a time: two would write to the same
    .part, which the MD5 tells.

    ConnectionError where the server can't be reached, refuses or breaks off; ValueError for another MD5 (the .part file
    is deleted then); OSError where the disk is full or read-only.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(destination.name + ".part")
    try:
        _fetch(url, part)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise ConnectionError(f"cannot download {url}: {error}") from error
    found = file_digest(part, "md5")
    if found != md5:
        part.unlink()
        raise ValueError(f"{url} arrived with MD5 {found} instead of {md5}; deleted. Try again")
    os.replace(part, destination)


def _fetch(url: str, part: Path) -> None:
    """Appends what is missing to `part`."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing beyond what we have: the MD5 will tell whether that is right
            return
        raise
    with response:
        if response.status != 206:  # the server sends everything
            have = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress, part.open("ab" if have else "wb") as file:
            task = progress.add_task(part.stem, total=total, completed=have)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress.update(task, completed=have)
    if total is not None and have < total:
        raise ConnectionError(f"broke off after {have} of {total} bytes; run again to go on from there")
