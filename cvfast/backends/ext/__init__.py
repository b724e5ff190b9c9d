"""cvfast's own kernels: C++ on the CPU, CUDA C++ on NVIDIA GPUs."""
