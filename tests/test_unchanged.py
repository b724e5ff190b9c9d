"""cvfast._accelerate.unchanged: answers that are kept as long as what they hang on is as it was."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from cvfast import _library
from cvfast._accelerate.unchanged import Answer, sample

pytestmark = pytest.mark.skipif(_library.C is None, reason="cvfast._C was not built")


class Asked:
    """An Answer on a batch-norm in a Sequential, and how often its question was asked."""

    def __init__(self) -> None:
        self.outer = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3).eval())
        self.outer.size = (1, 2.5, "text")
        self.norm, self.count = self.outer[1], 0
        self.answer = Answer(self.ask, self.look)
        assert self.answer() and self.answer() and self.count == 1

    def ask(self) -> bool:
        self.count += 1
        return True

    def look(self, snapshot) -> None:
        snapshot.children(self.outer)
        snapshot.attribute(self.outer, "size")
        snapshot.attribute(self.outer, "dump_patches")  # of the class
        snapshot.unwatched(self.norm)
        snapshot.entries(self.norm, ("training", "eps", "missing"))
        snapshot.tensors(self.norm, "_parameters", ("weight", "bias"))
        snapshot.tensors(self.norm, "_buffers", ("running_mean", "missing"))

    def asks_again(self) -> bool:
        before = self.count
        assert self.answer()
        return self.count > before


def other_class(asked):
    asked.norm.__class__ = type("Other", (nn.BatchNorm2d,), {})


def other_dict(asked):
    asked.norm.__dict__ = dict(asked.norm.__dict__)


def class_attribute(asked):
    type(asked.outer).dump_patches = True


def in_place(asked):
    with torch.no_grad():
        asked.norm.weight.add_(1)


def in_place_past_the_version(asked):
    asked.norm.weight.data.mul_(2)


def by_numpy(asked):
    asked.norm.running_mean.numpy()[-1] = 7


def other_data(asked):
    asked.norm.weight.data = torch.ones(3)


def load(asked):
    asked.outer.load_state_dict(copy.deepcopy(asked.outer.state_dict()))


CHANGES = {
    "training": lambda a: a.norm.train(),
    "a number": lambda a: setattr(a.norm, "eps", 0.1),
    "an entry more": lambda a: setattr(a.norm, "missing", 1),
    "a tuple": lambda a: setattr(a.outer, "size", (1, 2.5, "other")),
    "of another type": lambda a: setattr(a.outer, "size", (1, 2.5, object())),
    "a parameter": lambda a: setattr(a.norm, "weight", nn.Parameter(torch.ones(3))),
    "no parameter": lambda a: setattr(a.norm, "bias", None),
    "a buffer": lambda a: setattr(a.norm, "running_mean", torch.zeros(3)),
    "a buffer in place": lambda a: a.norm.running_mean.add_(1),
    "parameters": lambda a: setattr(a.norm, "_parameters", dict(a.norm._parameters)),
    "a module in another's place": lambda a: a.outer.__setitem__(0, nn.Conv2d(2, 3, 1)),
    "a module more": lambda a: a.outer.append(nn.Identity()),
    "forward": lambda a: setattr(a.norm, "forward", lambda x: x),
    "hooks": lambda a: setattr(a.norm, "_forward_hooks", {}),
    "a class": other_class,
    "a __dict__": other_dict,
    "an attribute of the class": class_attribute,
    "in place": in_place,
    "in place past the version": in_place_past_the_version,
    "by NumPy": by_numpy,
    "other data": other_data,
    "loaded": load,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_once(change, monkeypatch):
    monkeypatch.setattr(nn.Sequential, "dump_patches", False, raising=False)
    asked = Asked()
    change(asked)
    assert asked.asks_again()
    assert not asked.asks_again()


@pytest.mark.parametrize(
    "register",
    [
        lambda a: a.norm.register_forward_hook(lambda *args: None),
        lambda a: a.norm.register_forward_pre_hook(lambda *args: None),
        lambda a: a.norm.register_full_backward_hook(lambda *args: None),
        lambda a: nn.modules.module.register_module_forward_hook(lambda *args: None),
        lambda a: nn.modules.module.register_module_forward_pre_hook(lambda *args: None),
    ],
)
def test_nothing_is_kept_while_there_are_hooks(register):
    asked = Asked()
    handle = register(asked)
    assert asked.asks_again() and asked.asks_again()
    handle.remove()
    assert asked.asks_again()
    assert not asked.asks_again()


def test_what_is_equal_or_elsewhere_is_no_change():
    asked = Asked()
    asked.outer.size = tuple([1, float("2.5"), "te" + "xt"])
    asked.outer[0].weight.data.zero_()
    asked.norm.another = 1
    asked.norm.running_var.add_(1)
    assert not asked.asks_again()


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_sample_is_of_both_ends_and_between(size, dtype):
    tensor = (torch.arange(size) % 7).to(dtype)
    samples = [sample(tensor)]
    for place in range(0, size, max(1, size // 4)) if size <= 5 else (0, -1):
        tensor[place] += 1
        samples.append(sample(tensor))
    assert len(set(samples)) == len(samples)
    assert sample(tensor[::2].clone()) == sample(tensor.clone()[::2].contiguous())
    if size > 5:
        tensor *= 2
        assert sample(tensor) not in samples
        assert sample(tensor[::2]) == sample(tensor[1::2])  # apart from each other: out of reach


def test_the_answer_no_is_not_kept():
    answers = [False, True]
    answer = Answer(lambda: answers.pop(0), lambda snapshot: None)
    assert not answer()
    assert answer() and answer()
    assert not answers


def test_forget():
    asked = Asked()
    asked.answer.forget()
    assert asked.asks_again()


def test_tensors_without_a_version_are_asked_for_each_time():
    asked = Asked()
    with torch.inference_mode():
        asked.norm.weight = nn.Parameter(torch.ones(3))
    assert asked.asks_again() and asked.asks_again()


def test_cycles_are_collected():
    asked = Asked()
    asked.outer.answer = asked.answer
    gone = weakref.ref(asked.outer)
    del asked
    gc.collect()
    assert gone() is None


def test_the_objects_are_kept_alive():
    state = _library.C.Unchanged()
    for i in range(100):
        state.item({"key": (i, 1e300)}, "key")
        state.tensor(torch.ones(1))
    gc.collect()
    assert state.holds()


def test_what_cannot_be_noted():
    state = _library.C.Unchanged()
    with pytest.raises(ValueError, match="not empty"):
        state.empty({1: 2})
    with pytest.raises(AttributeError):
        state.tensor(1)
    with pytest.raises(AttributeError):
        state.object(1)
    with pytest.raises(AttributeError):
        state.attribute(1, "missing")
    with pytest.raises(TypeError):
        state.item([], "key")
    assert state.holds()


def test_results_are_compared_with_what_they_shall_be():
    entries = {"number": 1}
    state = _library.C.Unchanged()
    state.result(torch.is_grad_enabled, (), False)
    state.result(entries.get, ("number",), 1)
    assert not state.holds()
    with torch.no_grad():
        assert state.holds()
        entries["number"] = 2
        assert not state.holds()
        entries["number"] = 1
        assert state.holds()
        state.result(entries.__getitem__, ("missing",), None)
        assert not state.holds()


def test_a_dictionary_that_changed_is_looked_at_until_it_is_as_noted():
    values = {"a": 1, "b": [2], "c": "text"}
    state, before = _library.C.Unchanged(), values["b"]
    state.item(values, "b")
    state.item(values, "missing")
    state.values(values)
    for _ in range(2):
        values["b"] = [2]  # equal, but another one
        assert not state.holds() and not state.holds()
        values["b"] = before
        assert state.holds() and state.holds()
        values["missing"] = None
        assert not state.holds() and not state.holds()
        del values["missing"]
        assert state.holds() and state.holds()
        values["c"] = values.pop("c")  # the same entry as before, at the same place
        assert state.holds()
        values["a"] = values.pop("a")  # at another place
        assert not state.holds() and not state.holds()
        values["b"], values["c"] = values.pop("b"), values.pop("c")
        assert state.holds() and state.holds()
