"""Whether tensors share memory, by their addresses."""

from __future__ import annotations

import torch


def memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    """From its first byte to behind its last; what lies between two strided rows counts too."""
    if tensor.numel() == 0:
        return 0, 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    (begin, end), (first, last) = memory_of(one), memory_of(other)
    return begin < last and first < end
