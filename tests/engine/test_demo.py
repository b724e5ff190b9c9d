"""The demo: two trainings, the report with its pictures, and promises that can be broken."""

import io

import pytest
from PIL import Image
from rich.console import Console

from cvfast.engine import demo
from cvfast.engine.demo import Plan, run_demo

PICTURES = ("learning_curves.png", "epoch_times.png", "confusion_matrix.png", "samples.png")


def run(folder):
    console = Console(file=io.StringIO(), width=200)
    return run_demo(folder, seed=0, threads=1, quick=True, console=console), console.file.getvalue()


@pytest.fixture(autouse=True)
def _small(monkeypatch, small_data):
    """Less data and fewer epochs than even the quick demo has; the rest is the demo as it is."""
    monkeypatch.setattr(demo, "DATA", small_data)
    monkeypatch.setattr(demo, "QUICK", Plan(epochs=2, accuracy=0.05))


def test_the_quick_demo_keeps_its_promises_and_leaves_a_report(tmp_path):
    kept, output = run(tmp_path)
    assert kept and output.count("kept") == 3 and "BROKEN" not in output
    report, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    for picture in PICTURES:
        assert f"]({picture})" in report and f'src="{picture}"' in page
        with Image.open(tmp_path / picture) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(maxcolors=10**6)) > 20
    assert (tmp_path / "model.onnx").is_file()
    assert all((tmp_path / name / "best.safetensors").is_file() for name in ("native", "cvfast"))


def test_a_broken_promise_fails_the_demo_and_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "QUICK", Plan(epochs=2, accuracy=0.99))
    kept, output = run(tmp_path)
    assert not kept and output.count("BROKEN") == 1
    assert "| NO |" in (tmp_path / "report.md").read_text()
