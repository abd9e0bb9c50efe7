"""Where heaps come from: one provider per way in which ranks can reach each other's memory."""

from __future__ import annotations

from ep_runtime.memory.base import MemorySizes, RankMemory

__all__ = ["MemorySizes", "RankMemory"]
