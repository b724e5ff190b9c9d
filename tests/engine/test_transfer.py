"""Transfer learning: what is frozen stays, weights come from files with clear reports, runs start from other runs."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from cvfast import data
from cvfast.engine import CheckpointError, load_classifier, resume, train
from cvfast.engine.checkpoint import load_checkpoint
from cvfast.engine.transfer import (
    freeze,
    load_weights,
    parameter_groups,
    replace_head,
    stages,
    unfreeze,
    unfreeze_gradually,
)
from cvfast.models import create_model


def small_model(**options):
    torch.manual_seed(0)
    return create_model("resnet20_cifar", width=4, blocks=1, **options)


def step(model):
    """One step of training in train mode, as any loop does it."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def behind(model, start):
    """Names in the state_dict from the first one that begins with ``start`` on."""
    names = list(model.state_dict())
    return set(names[next(i for i, name in enumerate(names) if name.startswith(start)) :])


@pytest.mark.parametrize(("upto", "first"), [("bn1", "layer1"), ("layer2.0.bn1", "layer2.0.conv2"), ("layer3", "fc")])
def test_what_is_frozen_stays_batch_norm_statistics_too(upto, first):
    model = small_model()
    freeze(model, upto)
    before = copy.deepcopy(model.state_dict())
    step(model)
    assert changed(before, model) == behind(model, first)
    unfreeze(model)
    before = copy.deepcopy(model.state_dict())
    step(model)
    assert changed(before, model) == set(before)


def test_frozen_batch_norm_normalises_with_its_statistics_and_frozen_dropout_lets_all_pass():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))
    nn.init.uniform_(model[0].running_mean)
    x = torch.randn(8, 3)
    expected = copy.deepcopy(model).eval()(x)
    freeze(model, "1")
    freeze(model, "1")  # twice is once
    torch.testing.assert_close(model.train()(x), expected)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same.train()(x), expected)
    unfreeze(model)
    assert not torch.allclose(model.train()(x), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_freezing_and_unfreezing_part_of_a_model():
    model = small_model()
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    unfreeze(model, behind="layer2")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith(("layer3", "fc"))
    }
    for function in (freeze, unfreeze):
        for name in ("layer9", ""):
            with pytest.raises(ValueError, match=f"no module called '{name}'; its children are conv1, bn1"):
                function(model, name)


def test_parameters_of_an_enclosing_module_are_frozen_with_the_layers_behind_them():
    model = create_model("vit_tiny_cifar", num_layers=3)
    freeze(model, "encoder.layers.encoder_layer_0")
    learning = {name.split(".")[2] if "layers" in name else name for name, p in model.named_parameters()
                if p.requires_grad}  # fmt: skip
    assert learning == {"encoder_layer_1", "encoder_layer_2", "encoder.ln.weight", "encoder.ln.bias",
                        "heads.head.weight", "heads.head.bias"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet20_cifar", {"blocks": 2}, "conv1 bn1 layer1.0 layer1.1 layer2.0 layer2.1 layer3.0 layer3.1 fc"),
        ("vgg_cifar", {"depth": 11}, "features.0 features.1 features.4 features.5 features.8 features.9 features.11 "
         "features.12 features.15 features.16 features.18 features.19 features.22 features.23 features.25 features.26 "
         "classifier"),
        ("vit_tiny_cifar", {"num_layers": 3}, "conv_proj encoder.layers.encoder_layer_0 encoder.layers.encoder_layer_1 "
         "encoder.layers.encoder_layer_2 encoder.ln heads.head"),
        ("cnn", {}, "conv1 conv2 fc1.weight fc2 fc3".replace(".weight", "")),
    ],
)  # fmt: skip
def test_stages_hold_every_parameter_once_in_order(name, options, expected):
    model = create_model(name, **options)
    found = stages(model)
    assert " ".join(found) == expected
    flat = [p for parameters in found.values() for p in parameters]
    assert len(flat) == len(set(flat)) and set(flat) == set(model.parameters())


def test_learning_rates_fall_towards_the_input():
    model = small_model()
    groups = parameter_groups(model, lr=0.1, decay=0.5)
    assert [group["name"] for group in groups] == ["conv1", "bn1", "layer1.0", "layer2.0", "layer3.0", "fc"]
    assert [group["lr"] for group in groups] == pytest.approx([0.1 / 32, 0.1 / 16, 0.1 / 8, 0.1 / 4, 0.1 / 2, 0.1])
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(groups).step()
    for group in groups:
        name = next(n for n, p in model.named_parameters() if p is group["params"][0])
        moved = before[name] - model.state_dict()[name]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.1 * group["scale"]), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="decay must be in .* got 1.5"):
        parameter_groups(model, 0.1, 1.5)


def test_unfreezing_stage_by_stage_is_a_function_of_the_epoch():
    model = small_model()
    frozen = [unfreeze_gradually(model, "layer3", epoch, every=2) for epoch in range(14)]
    expected = ["layer3", "layer2.0", "layer1.0", "bn1", "conv1", None, None]
    assert frozen == [name for name in expected for _ in range(2)]
    for epoch in (0, 13, 5):  # in any order, as after a resumption
        last = unfreeze_gradually(model, "layer3", epoch, every=2)
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        names = [name for name, _ in model.named_parameters()]
        start = 0 if last is None else 1 + max(i for i, name in enumerate(names) if name.startswith(f"{last}."))
        assert learning == set(names[start:])
    with pytest.raises(ValueError, match="every must be positive, got 0"):
        unfreeze_gradually(model, "layer3", 0, every=0)


@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("resnet20_cifar", {"width": 4}, "fc"),
        ("vit_tiny_cifar", {"num_layers": 1}, "heads.head"),
        ("mobilenet_v2", {"width": 0.25}, "classifier.1"),
        ("unet_small", {"width": 4}, "head"),
    ],
)
def test_a_new_head_has_as_many_outputs_as_asked_for(name, options, head):
    model = create_model(name, **options).double()
    before = copy.deepcopy(model.state_dict())
    freeze(model)
    new = replace_head(model, 7)
    assert model.get_submodule(head) is new
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).shape[1] == 7
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{head}.weight", f"{head}.bias"]
    assert {n for n, t in model.state_dict().items() if t.shape != before[n].shape} == {
        f"{head}.weight",
        f"{head}.bias",
    }


def test_models_without_a_head_and_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="no nn.Linear or nn.Conv2d"):
        replace_head(nn.Sequential(nn.BatchNorm2d(3)), 2)
    with pytest.raises(ValueError, match="no nn.Linear or nn.Conv2d"):
        replace_head(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="num_classes must be positive, got 0"):
        replace_head(small_model(), 0)


def save_safetensors(state, path):
    safetensors.torch.save_file(state, path)


FILES = {
    "weights.safetensors": save_safetensors,
    "weights.pth": torch.save,
    "nested.pt": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "parallel.pth": lambda state, path: torch.save({f"module.{name}": t for name, t in state.items()}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_come_from_files_of_each_kind(name, tmp_path):
    source = small_model()
    nn.init.uniform_(source.bn1.running_mean)
    FILES[name](source.state_dict(), tmp_path / name)
    model = create_model("resnet20_cifar", width=4, blocks=1)
    report = load_weights(model, tmp_path / name)
    assert report.fits and str(report) == f"{len(source.state_dict())} tensors fit"
    assert not changed(source.state_dict(), model)


def test_files_without_counters_of_batches_fit(tmp_path):
    state = {n: t for n, t in small_model().state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert load_weights(small_model(), tmp_path / "old.pth").fits


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    state = small_model(num_classes=7).state_dict()
    state["fc.scale"] = state.pop("bn1.weight")
    save_safetensors(state, tmp_path / "weights.safetensors")
    model = create_model("resnet20_cifar", width=4, blocks=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as error:
        load_weights(model, tmp_path / "weights.safetensors")
    for words in ("weights.safetensors does not fit", "1 missing: bn1.weight", "1 unexpected: fc.scale",
                  "2 mismatched: fc.weight (file [7, 16], model [10, 16]), fc.bias"):  # fmt: skip
        assert words in str(error.value)
    assert not changed(before, model)

    report = load_weights(model, tmp_path / "weights.safetensors", strict=False)
    assert not report.fits and report.missing == ["bn1.weight"] and report.unexpected == ["fc.scale"]
    assert report.mismatched["fc.bias"] == ([7], [10])
    counters = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed(before, model) <= set(report.loaded)
    assert {"conv1.weight", "layer3.0.conv2.weight"} <= changed(before, model) | counters
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_another_head_does_not_matter_where_the_head_is_left_out(tmp_path):
    torch.save(small_model(num_classes=7).state_dict(), tmp_path / "weights.pth")
    model = create_model("resnet20_cifar", width=4, blocks=1)
    before = copy.deepcopy(model.state_dict())
    report = load_weights(model, tmp_path / "weights.pth", head=False)
    assert report.fits and "fc.weight" not in report.loaded
    assert "conv1.weight" in changed(before, model) and not {"fc.weight", "fc.bias"} & changed(before, model)


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("code.pth", lambda path: torch.save({"a": Harmful()}, path), "holds more than tensors; not loaded"),
        ("broken.pth", lambda path: path.write_bytes(b"PK\x03\x04 nothing"), "damaged"),
        ("broken.safetensors", lambda path: path.write_bytes(b"nothing at all"), "damaged"),
        ("list.pth", lambda path: torch.save([torch.zeros(1)], path), "holds no state_dict"),
        ("empty.pth", lambda path: torch.save({}, path), "holds no state_dict"),
    ],
)
def test_files_that_cannot_be_read_are_refused(name, write, message, tmp_path, capsys):
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        load_weights(small_model(), tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_weights(small_model(), tmp_path / "nowhere.pth")


def test_few_images_of_each_class():
    train_data = data.load("fashion-mnist").train
    chosen = data.few(train_data, 7, seed=3)
    assert chosen.labels.bincount().tolist() == [7] * 10
    assert torch.equal(chosen.images, data.few(train_data, 7, seed=3).images)
    assert not torch.equal(chosen.images, data.few(train_data, 7, seed=4).images)
    with pytest.raises(ValueError, match="600 images of each class are wanted, T-shirt/top has 500"):
        data.few(train_data, 600)
    with pytest.raises(ValueError, match="per_class must be positive, got 0"):
        data.few(train_data, 0)


def test_a_run_starts_from_another_ones_weights_and_unfreezes_them_step_by_step(settings):
    first = train(settings("first", model="cnn", epochs=2))
    config = settings("second", epochs=3, weights=str(first.folder), freeze="fc2", unfreeze_every=1, layer_decay=0.5,
                      per_class=8, lr=0.01, seed=1)  # fmt: skip
    frozen_source = load_checkpoint(first.folder).part("model")
    result = train(config)
    end = load_checkpoint(result.folder / "last.safetensors")
    moved = {n for n, t in end.part("model").items() if not torch.equal(t, frozen_source[n])}
    assert moved == {"fc3.weight", "fc3.bias", "fc2.weight", "fc2.bias", "fc1.weight", "fc1.bias"}
    learned = {name.split(".")[1] for name in end.tensors if name.startswith("optimizer.")}
    assert learned == {"fc1", "fc2", "fc3"}
    before = (result.folder / "last.safetensors").read_bytes()
    resume(result.folder)
    assert (result.folder / "last.safetensors").read_bytes() == before


def test_a_resumed_run_freezes_what_was_frozen(settings, monkeypatch):
    from cvfast.engine.run import Run

    first = train(settings("first", epochs=1))
    options = {"weights": str(first.folder), "freeze": "fc2", "unfreeze_every": 1, "layer_decay": 0.5, "epochs": 3}
    whole = train(settings("whole", **options))
    original, count = Run._train_step, iter(range(1, 100))

    def stop(self, *batch):
        if next(count) == 13:  # in the second epoch
            raise SystemError("power cut")
        original(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Run, "_train_step", stop)
        train(settings("cut", **options))
    resumed = resume(settings("cut").out)
    one, other = (load_checkpoint(r.folder / "last.safetensors").tensors for r in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_grey_images_feed_a_model_of_three_channels(settings):
    result = train(settings(epochs=1, channels=3))
    classifier = load_classifier(result.folder)
    assert classifier.model.conv1.in_channels == 3
    assert classifier(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_class": 1}, "per_class must be 2 or more, .* got 1"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1, got 0.0"),
        ({"unfreeze_every": 1}, "unfreeze_every needs freeze"),
        ({"freeze": "fc2", "unfreeze_every": 0}, "unfreeze_every must be positive, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_a_module_that_the_model_has_not_is_refused_before_training(settings, tmp_path):
    with pytest.raises(ValueError, match="no module called 'layer2'; its children are conv1"):
        train(settings(freeze="layer2"))
