"""The zoo: names, sizes, and the tutorial's own weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cvfast
from cvfast.models import CNN, create_model, input_size, list_models


class TutorialNet(nn.Module):
    """The network as PyTorch's tutorial "Training a Classifier" defines it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


@pytest.mark.parametrize("backend", ["native", "auto"])
def test_the_tutorials_state_dict_loads_and_gives_the_same_logits(backend):
    torch.manual_seed(0)
    tutorial, ours = TutorialNet(), CNN()
    images = torch.randn(5, 3, 32, 32)
    assert list(ours.state_dict()) == list(tutorial.state_dict())
    assert not torch.allclose(ours(images), tutorial(images))
    ours.load_state_dict(tutorial.state_dict())
    with cvfast.use_backend(backend):
        torch.testing.assert_close(ours(images), tutorial(images), rtol=1e-5, atol=1e-6)


def test_convolutions_are_cvfasts():
    assert all(isinstance(layer, cvfast.nn.Conv2d) for layer in (CNN().conv1, CNN().conv2))


def test_channels_and_classes_are_parameters():
    model = create_model("cnn", num_classes=7, in_chans=1)
    assert model(torch.zeros(2, 1, *input_size("cnn"))).shape == (2, 7)
    assert sum(p.numel() for p in create_model("cnn").parameters()) == 62_006


def test_the_registry_names_every_model_and_refuses_others():
    assert "cnn" in list_models()
    for function in (create_model, input_size):
        with pytest.raises(ValueError, match="'lenet'.*cnn"):
            function("lenet")
    with pytest.raises(ValueError, match="positive, got 0 and 3"):
        create_model("cnn", num_classes=0)
