"""Triton kernels, for NVIDIA GPUs; on the CPU in Triton's interpreter. Triton is imported by the first launch."""
