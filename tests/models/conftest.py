def pytest_addoption(parser):
    parser.addoption("--all-models", action="store_true", help="also the large models of the zoo, at their own size")
