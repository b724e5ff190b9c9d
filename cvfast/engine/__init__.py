"""The main job: train a classifier on images, judge it, use it, and take it elsewhere.

From images to a deployed model:

    result = train(TrainConfig(data="fashion-mnist"))
    classifier = load_classifier(result.folder)
    print(evaluate(classifier, cvfast.data.load("fashion-mnist").test).accuracy)
    export(classifier, "classifier.onnx")

`cvfast.engine.transfer` starts from other weights; `cvfast.engine.recipes` holds what else `cvfast train` trains.
"""

from cvfast.engine.checkpoint import CheckpointError
from cvfast.engine.classifier import Classifier, load_classifier
from cvfast.engine.config import TrainConfig
from cvfast.engine.evaluate import Evaluation, evaluate
from cvfast.engine.export import (
    ExportCheck,
    NetworkCheck,
    check_export,
    check_network,
    export,
    export_network,
    signature,
)
from cvfast.engine.networks import load_deployable, load_network
from cvfast.engine.predict import Prediction, predict
from cvfast.engine.train import TrainResult, resume, train

__all__ = [
    "CheckpointError",
    "Classifier",
    "Evaluation",
    "ExportCheck",
    "NetworkCheck",
    "Prediction",
    "TrainConfig",
    "TrainResult",
    "check_export",
    "check_network",
    "evaluate",
    "export",
    "export_network",
    "load_classifier",
    "load_deployable",
    "load_network",
    "predict",
    "resume",
    "signature",
    "train",
]
