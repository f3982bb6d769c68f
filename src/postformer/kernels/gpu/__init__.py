"""What kernels for GPUs share: whether they run, and pieces of Triton code."""
