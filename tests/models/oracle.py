"""torchvision's own classes, as an oracle: only its Python runs, so any build of it does beside any build of torch."""

import pytest

from benchmarks import architectures


def torchvision_models():
    """The module torchvision.models; skips the test where torchvision is not installed."""
    if not architectures.INSTALLED:
        pytest.skip("needs torchvision")
    return architectures.models()
