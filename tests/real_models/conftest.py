def pytest_addoption(parser):
    parser.addoption("--real-models", action="store_true", help="accelerate other people's trained models, from PyPI")
