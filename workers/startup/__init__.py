"""The start of a worker: device, memory, warm-up of kernels, and the knee."""
