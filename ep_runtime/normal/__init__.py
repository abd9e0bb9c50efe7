"""Normal operations: dispatch and combine of thousands of tokens, for prefill and training."""

from __future__ import annotations

from ep_runtime.normal.autograd import combine_autograd, dispatch_autograd
from ep_runtime.normal.buffer import NormalBuffer
from ep_runtime.normal.config import NormalConfig
from ep_runtime.normal.handles import Layout, NormalHandle, NormalReceived, NormalStats
from ep_runtime.normal.tuned import TunedSms, tuned_num_sms
from ep_runtime.normal.virtual import virtual_normal_ranks

__all__ = [
    "Layout",
    "NormalBuffer",
    "NormalConfig",
    "NormalHandle",
    "NormalReceived",
    "NormalStats",
    "TunedSms",
    "combine_autograd",
    "dispatch_autograd",
    "tuned_num_sms",
    "virtual_normal_ranks",
]
