"""Routing policies, the space they are searched in, and their analytic cost. Imports no torch."""

from natsl.space.cost import LayerShape
from natsl.space.policy import LayerPolicy, Op, RoutingPolicy
from natsl.space.space import Control, SearchSpace

__all__ = ["Control", "LayerPolicy", "LayerShape", "Op", "RoutingPolicy", "SearchSpace"]
