"""What a trained classifier is for: judging it, naming image files, and exporting it."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from rich.console import Console

import cvfast
from cvfast import data
from cvfast.engine import CheckpointError, Classifier, check_export, evaluate, export, load_classifier, predict
from cvfast.engine.classifier import logits_of
from cvfast.engine.evaluate import judge
from cvfast.engine.export import exported_program


@pytest.fixture(scope="module")
def classifier(small_run):
    return load_classifier(small_run.folder)


@pytest.fixture(scope="module")
def images():
    """The 1,000 test images of the embedded data."""
    return data.load("fashion-mnist").test


def test_scores_are_those_counted_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 0])
    logits = 5.0 * torch.nn.functional.one_hot(predicted, 3)
    result = judge(logits, labels, ["a", "b", "c"])
    assert result.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert result.accuracy == pytest.approx(3 / 6)
    assert result.precision.tolist() == pytest.approx([2 / 4, 1 / 2, 0])  # class c is never predicted
    assert result.recall.tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert result.f1.tolist() == pytest.approx([4 / 7, 1 / 2, 0])
    assert result.macro == pytest.approx({"precision": 1 / 3, "recall": 7 / 18, "f1": 5 / 14})
    right, wrong = np.log(1 + 2 * np.exp(-5)), np.log(np.exp(5) + 2)
    assert result.loss == pytest.approx((3 * right + 3 * wrong) / 6, rel=1e-5)
    assert json.loads(json.dumps(result.to_dict()))["confusion"][0] == [2, 1, 0]


def test_the_table_has_a_line_per_class(classifier, images):
    evaluation = evaluate(classifier, images)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(evaluation.table())
    text = console.export_text()
    assert f"accuracy {evaluation.accuracy:.2%}" in text and "1000 images" in text
    for name in (*images.classes, "macro average", "precision", "recall", "F1"):
        assert name in text


def test_classes_that_are_not_the_classifiers_are_refused(classifier, images):
    fewer = images.subset((images.labels < 3).nonzero().flatten())
    for classes in (images.classes[:3], images.classes[::-1]):
        with pytest.raises(ValueError, match="knows 10 classes .* the data has"):
            evaluate(classifier, dataclasses.replace(fewer, classes=classes))


def test_predict_names_image_files(classifier, small_run, images, tmp_path):
    files = []
    for i in range(6):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(images.images[i, 0].numpy()).save(files[-1])
    expected = logits_of(classifier, images.subset(torch.arange(6))).softmax(dim=1)
    predictions = predict(small_run.folder, files, top_k=3)
    for prediction, probabilities, file in zip(predictions, expected, files, strict=True):
        values, indices = probabilities.topk(3)
        assert prediction.file == file
        assert [name for name, _ in prediction.top] == [images.classes[i] for i in indices]
        assert [p for _, p in prediction.top] == pytest.approx(values.tolist(), abs=1e-6)
    assert len(predict(classifier, files[:1], top_k=99)[0].top) == 10


def test_predict_takes_any_size_and_colour_but_only_images(classifier, small_run, tmp_path):
    Image.new("RGBA", (300, 200), "red").save(tmp_path / "large.png")
    assert len(predict(classifier, [tmp_path / "large.png"])[0].top) == 5
    (tmp_path / "broken.png").write_bytes((tmp_path / "large.png").read_bytes()[:80])
    with pytest.raises(ValueError, match="broken.png"):
        predict(classifier, [tmp_path / "broken.png"])
    with pytest.raises(FileNotFoundError, match="missing.png"):
        predict(classifier, [tmp_path / "missing.png"])
    with pytest.raises(CheckpointError):
        predict(tmp_path / "large.png", [tmp_path / "large.png"])


@pytest.fixture(scope="module")
def onnx_file(classifier, tmp_path_factory):
    return export(classifier, tmp_path_factory.mktemp("export") / "model.onnx")


def test_onnx_has_standard_operators_takes_pixels_and_carries_the_classes(onnx_file, images):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert {"Conv", "MaxPool", "Gemm"} <= {node.op_type for node in model.graph.node}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == images.classes
    (entry,) = model.graph.input
    shape = [d.dim_value or "any" for d in entry.type.tensor_type.shape.dim]
    assert (entry.type.tensor_type.elem_type, shape) == (onnx.TensorProto.UINT8, ["any", 1, 28, 28])


def test_onnx_computes_the_same_on_all_test_images_in_batches_of_any_size(onnx_file, classifier, images):
    check = check_export(onnx_file, classifier, images)
    assert check.passed and check.images == 1000 and check.difference <= 1e-4
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    expected = logits_of(classifier, images)
    for n in (1, 7):
        (logits,) = session.run(None, {"images": images.images[:n].numpy()})
        np.testing.assert_allclose(logits, expected[:n].numpy(), atol=1e-4)


def test_the_torch_program_computes_the_same(classifier, images, tmp_path):
    path = export(classifier, tmp_path / "model.pt2", "torch")
    assert check_export(path, classifier, images).passed
    classes = {"classes": ""}
    torch.export.load(str(path), extra_files=classes)
    assert json.loads(classes["classes"]) == images.classes


def test_only_torchs_own_operators_enter_the_graph(classifier):
    with cvfast.use_backend("auto"):
        graph = exported_program(classifier, {"images": torch.zeros(2, 1, 28, 28, dtype=torch.uint8)}).graph
    operators = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert any("conv2d" in name for name in operators)
    assert all(name.startswith("aten.") for name in operators if "." in name), operators


def test_the_check_notices_another_model(onnx_file, classifier, images):
    other = load_classifier_like(classifier)
    check = check_export(onnx_file, other, images)
    assert not check.passed and check.disagreements > 0


def load_classifier_like(classifier):
    """The same architecture with other weights."""
    torch.manual_seed(99)
    other = Classifier(classifier.model_name, classifier.classes, classifier.image_shape, classifier.preparation)
    return other.eval()


def test_export_refuses_other_formats(classifier, tmp_path):
    with pytest.raises(ValueError, match="'tflite'.*onnx"):
        export(classifier, tmp_path / "x", "tflite")
    assert not list(tmp_path.iterdir())


def test_importing_the_engine_stays_light():
    """What only some commands need is imported when they need it."""
    heavy = {"matplotlib", "onnx", "onnxscript", "onnxruntime", "torchmetrics", "typer", "rich", "PIL", "tensorboard"}
    code = f"import sys, cvfast.engine; print(sorted({heavy!r} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
