def pytest_addoption(parser):
    parser.addoption("--install-tests", action="store_true", help="build and install cvfast in fresh environments")
