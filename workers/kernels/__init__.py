"""Triton kernels of the GPU path. Importing this package needs Triton; nothing on the CPU path does.

Tiles have fixed shapes and a row's numbers never depend on the rows beside it, so results are the same to the
bit in any batch. Without a GPU the kernels run in Triton's interpreter (`TRITON_INTERPRET=1`).
"""
