"""Denoises many requests at once: they join and leave at every step, and each makes the picture it would make alone."""

from instantbooth.engine.engine import Engine, EngineConfig, EngineStats
from instantbooth.engine.ticket import Progress, Ticket

__all__ = ["Engine", "EngineConfig", "EngineStats", "Progress", "Ticket"]
