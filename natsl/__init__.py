"""Neural attention search for linear models: language models that route each chunk to softmax or linear attention.

Importing this package loads nothing heavy; take what is needed from its modules, for example ``natsl.api`` (commands as
functions), ``natsl.space`` (policies, no torch), ``natsl.model``, ``natsl.search`` and ``natsl.kernels``.
"""

__version__ = "0.1.0"

from natsl.hf import register_with_transformers

register_with_transformers()
