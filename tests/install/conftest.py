"""These tests build and install cvfast in fresh environments, which takes minutes: only with --install-tests."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--install-tests", action="store_true", help="build and install cvfast in fresh environments")


@pytest.fixture(autouse=True)
def _wanted(request):
    if not request.config.getoption("--install-tests", default=False):
        pytest.skip("installs in fresh environments: make test-install runs these")
