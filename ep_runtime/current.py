"""What is current on this thread: asked before every launch.

torch.cuda.current_stream() makes a Stream object for every answer, which takes 5 to 8 us, and
torch.cuda.current_device() first looks whether CUDA was initialised. Here are the functions below
them, which compilers on top of torch call as well; nothing else in this package names those.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_streams: dict[int, torch.cuda.Stream] = {}  # by device: the answer given last


def stream_handle(device: torch.device) -> int:
    """The cudaStream_t of `device`'s current stream, as native calls take it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def stream(device: torch.device) -> torch.cuda.Stream:
    """torch.cuda.current_stream(device), an object that is made when it changes."""
    last = _streams.get(device.index)
    if last is None or last.cuda_stream != stream_handle(device):
        last = _streams[device.index] = torch.cuda.current_stream(device)
    return last


def is_current(device: torch.device) -> bool:
    """`device` is the current one."""
    return torch._C._cuda_getDevice() == device.index


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one, which it mostly is already: then it costs nothing."""
    return nullcontext() if is_current(device) else torch.cuda.device(device)


def capturing(device: torch.device) -> bool:
    """`device`'s current stream is being captured. False on the CPU."""
    if device.type == "cpu":
        return False
    with on(device):
        return torch.cuda.is_current_stream_capturing()
