"""DeepEP's `Buffer` (V1) on ep_runtime: same names, arguments, results and meaning.

    from ep_runtime.integrations.deep_ep import install
    install()                       # before the first `import deep_ep`

or, without a change to the program, `python -m ep_runtime.integrations.deep_ep SCRIPT ARGS`.
docs/deep_ep.md says what differs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from ep_runtime import __version__ as _own_version
from ep_runtime.integrations.deep_ep.install import install

if TYPE_CHECKING:
    from ep_runtime.integrations.deep_ep.buffer import Buffer
    from ep_runtime.integrations.deep_ep.config import Config
    from ep_runtime.integrations.deep_ep.events import EventHandle, EventOverlap
    from ep_runtime.integrations.deep_ep.group import check_nvlink_connections

topk_idx_t = torch.int64
# The interface is that of DeepEP's last V1 commit, 567632d, which called itself 1.2.1.
__version__ = f"1.2.1+ep.runtime.{_own_version}"

_HOME = {
    "Buffer": "buffer",
    "Config": "config",
    "EventHandle": "events",
    "EventOverlap": "events",
    "check_nvlink_connections": "group",
}

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "check_nvlink_connections",
    "install",
    "topk_idx_t",
]


def __getattr__(name: str) -> object:
    # Loaded on first use: install() must work before the native module and CUDA are touched.
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
