"""`python -m cvfast` is the command `cvfast`."""

from cvfast.cli import app

if __name__ == "__main__":
    app()
