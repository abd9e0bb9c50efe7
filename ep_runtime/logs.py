"""Logging of commands and launched ranks. A library use of the package configures nothing."""

from __future__ import annotations

import logging

from ep_runtime import env


def start(rank: int | None = None) -> None:
    """Write the package's log to standard error, from EP_LOG_LEVEL on, each line with its rank.

    rank  None: torchrun's, if it started this process
    """
    settings = env.read()
    rank = settings.rank if rank is None else rank
    who = "ep_runtime" if rank is None else f"ep_runtime rank {rank}"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{who}: %(levelname)s: %(message)s"))
    logger = logging.getLogger("ep_runtime")
    logger.handlers[:] = [handler]
    logger.setLevel(settings.log_level)
    logger.propagate = False
