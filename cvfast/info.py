"""`python -m cvfast.info`: what this installation can do. The function is `cvfast.info()`."""

from cvfast._info import info

if __name__ == "__main__":
    info()
