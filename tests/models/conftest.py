def pytest_addoption(parser):
    parser.addoption("--all-models", action="store_true", help="export every model of the zoo, at its own size")
