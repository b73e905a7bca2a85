"""Planning: what a training step takes in memory and work, before anything is loaded."""

from espalier.planning.estimate import Plan, plan

__all__ = ["Plan", "plan"]
