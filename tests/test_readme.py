"""Every command and code block of the README runs: here, or as a line of .ci/run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cvfast import data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
IN_CI = ("make demo", "make test", "make bench", "pip install .")  # they make environments or take minutes


def test_every_block_is_of_a_kind_that_runs():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert all(line.startswith((*IN_CI, "cvfast ")) for line in COMMANDS), COMMANDS


@pytest.mark.parametrize("command", IN_CI)
def test_slow_commands_are_in_ci(command):
    """.ci/run calls the make targets; `pip install .` is run by tests/install, which it calls as well."""
    assert command in COMMANDS
    ci = (ROOT / ".ci" / "run").read_text()
    if command == "pip install .":
        assert "make test-install" in ci
        assert '"install", ' in (ROOT / "tests" / "install" / "test_install.py").read_text()
    else:
        assert re.search(rf"^{command}\b", ci, re.M)


def test_python_blocks(capsys):
    """All Python blocks, one after the other, in one namespace; what a comment says is printed is printed."""
    code = "\n".join(text for language, text in BLOCKS if language == "python")
    exec(compile(code, "README.md", "exec"), {})
    promised = re.findall(r"print\(.*?\)  # (.*)", code)
    assert capsys.readouterr().out.splitlines() == promised


def test_cvfast_commands(tmp_path):
    """The command lines, in their order, in one folder with a picture.png."""
    image = data.load("fashion-mnist").test.images[0, 0]
    Image.fromarray(image.numpy()).save(tmp_path / "picture.png")
    commands = [shlex.split(line) for line in COMMANDS if line.startswith("cvfast ")]
    assert [c[1] for c in commands] == ["info", "train", "eval", "predict", "export"]
    for _, *arguments in commands:
        done = subprocess.run(
            [sys.executable, "-m", "cvfast", *arguments],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    assert list((tmp_path / "runs" / "first").glob("*.onnx"))


def test_linked_pages_exist():
    for page in re.findall(r"\]\((docs/[^)#]+)", README):
        assert (ROOT / page).is_file(), page
