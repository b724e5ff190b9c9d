"""torch's own operators: the backend that never refuses."""
