"""Generators, recurrent models and captioners leave as torch.export programs and as ONNX that compute the same."""

import logging

import onnxruntime
import pytest
import torch

import cvfast
from cvfast.models import create_model

START = torch.ones(2, 4, dtype=torch.int64)
CASES = {  # name -> options, example inputs
    "dcgan_generator": ({"num_classes": 3, "image_size": 28, "width": 4}, (torch.randn(2, 100), torch.tensor([0, 2]))),
    "dcgan_discriminator": ({"in_chans": 1, "image_size": 28, "width": 4}, (torch.randn(2, 1, 28, 28),)),
    "srresnet": ({"width": 4, "blocks": 1}, (torch.rand(2, 3, 8, 8),)),
    "cnn_lstm": ({"features": 8, "hidden": 8}, (torch.rand(2, 3, 3, 16, 16),)),
    "cnn_gru": ({"features": 8, "hidden": 8}, (torch.rand(2, 3, 3, 16, 16),)),
    "crnn": ({"width": 4, "hidden": 8}, (torch.rand(2, 1, 32, 64),)),
    "show_attend_tell": ({"features": 8, "hidden": 8}, (torch.rand(2, 1, 16, 16), START)),
    "show_tell": ({"features": 8, "hidden": 8}, (torch.rand(2, 1, 16, 16), START)),
}


@pytest.mark.parametrize("name", CASES)
def test_exports_compute_the_same(name, tmp_path, caplog):
    caplog.set_level(logging.ERROR, "torch.onnx")
    options, inputs = CASES[name]
    model = create_model(name, **options).eval()
    with torch.no_grad():
        expected = model(*inputs)
        with cvfast.use_backend("native"):
            program = torch.export.export(model, inputs)
        exported = program.module()(*inputs)
        torch.onnx.export(program, f=str(tmp_path / "model.onnx"), dynamo=True, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    result = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    expected, exported = ([t] if isinstance(t, torch.Tensor) else [x for x in t if x is not None]
                          for t in (expected, exported))  # fmt: skip
    assert expected[0].abs().max() > 1e-3
    for want, got, onnx in zip(expected, exported, map(torch.from_numpy, result), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(onnx, want, rtol=1e-4, atol=1e-4)
