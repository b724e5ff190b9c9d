"""Downloads: whole or not at all, resumed where they broke off."""

import hashlib

import pytest

from cvfast.data.download import download

from .helpers import FileServer

CONTENT = bytes(range(256)) * 4096 * 3  # 3 MiB: several chunks
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between these tests and their server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_whole(tmp_path, capsys):
    """The file arrives with its folder, leaves no .part, and progress was shown under its name."""
    with FileServer(CONTENT) as server:
        download(server.url, tmp_path / "new" / "file", MD5)
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["file"]
    assert "file" in capsys.readouterr().out


def test_resumed(tmp_path):
    """A connection that breaks off leaves what arrived; the next call asks for the rest only."""
    cut = 1_500_000
    with FileServer(CONTENT, cut_after=cut) as server:
        with pytest.raises(ConnectionError, match=rf"cannot download {server.url}: .*{cut} of {len(CONTENT)} bytes"):
            download(server.url, tmp_path / "file", MD5)
        assert not (tmp_path / "file").exists()
        server.cut_after = None
        download(server.url, tmp_path / "file", MD5)
    assert server.asked == [None, f"bytes={cut}-"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_resumed_without_ranges(tmp_path):
    """A server that ignores Range sends everything; the part from before is not put in front of it."""
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    with FileServer(CONTENT, ranges=False) as server:
        download(server.url, tmp_path / "file", MD5)
    assert server.asked == ["bytes=1000-"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_part_that_is_whole(tmp_path):
    """A download that was stopped between its last byte and its renaming is only checked."""
    (tmp_path / "file.part").write_bytes(CONTENT)
    with FileServer(CONTENT) as server:
        download(server.url, tmp_path / "file", MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", b"of another file", CONTENT + b"too long"], ids=["fresh", "resumed", "longer"])
def test_wrong_md5(tmp_path, part):
    """Other content than promised is deleted, so that the next call starts afresh; no file appears."""
    if part:
        (tmp_path / "file.part").write_bytes(part)
    with (
        FileServer(CONTENT if part else CONTENT[::-1]) as server,
        pytest.raises(ValueError, match=f"arrived with MD5 [0-9a-f]{{32}} instead of {MD5}"),
    ):
        download(server.url, tmp_path / "file", MD5)
    assert list(tmp_path.iterdir()) == []


def test_refused(tmp_path):
    """An answer of the server that isn't the file is an error, and no file appears."""
    with (
        FileServer(CONTENT, status=404) as server,
        pytest.raises(ConnectionError, match=f"cannot download {server.url}: HTTP Error 404"),
    ):
        download(server.url, tmp_path / "file", MD5)
    assert list(tmp_path.iterdir()) == []


def test_earlier_file_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "file").write_bytes(b"earlier")
    with FileServer(CONTENT, cut_after=10) as server, pytest.raises(ConnectionError):
        download(server.url, tmp_path / "file", MD5)
    assert (tmp_path / "file").read_bytes() == b"earlier"
