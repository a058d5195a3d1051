"""Triton kernels of split attention, for GPUs whose users have no CUDA compiler."""
