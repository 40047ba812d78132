"""The ops as Triton kernels, for NVIDIA and AMD GPUs; `impl="triton"`. Not yet timed on a GPU."""
