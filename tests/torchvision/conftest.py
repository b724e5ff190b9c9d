def pytest_addoption(parser):
    parser.addoption("--torchvision", action="store_true", help="accelerate torchvision's architectures (minutes)")
