"""Public functions that are too long for cvfast/functional.py, which gives them out. No mathematics."""
