"""Backends: `ext` (cvfast's C++ and CUDA C++ kernels), `triton` (Triton kernels), `native` (torch's own operators)."""
