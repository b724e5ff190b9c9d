"""Functions under @triton.jit, one file per operator. Importing one imports triton."""
