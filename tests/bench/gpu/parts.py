"""The parts of the GPU bench, in order of worth: first what is right, then how fast it is."""

from __future__ import annotations

from tests.bench.gpu import attention, ceilings, forms, learning, neighbours, speed
from tests.bench.gpu.driver import Part

PARTS = [
    Part("attention", 100, attention.run, fills=True),
    Part("neighbours", 45, neighbours.run, fills=True),
    Part("learning", 75, learning.run, fills=True),
    Part("joint", 30, learning.run_joint, fills=True),
    Part("ceilings", 25, ceilings.run),
    Part("rca", 80, speed.run_rca),
    Part("knn", 60, speed.run_knn),
    Part("lightgcn", 90, speed.run_lightgcn),
    Part("crane", 110, speed.run_crane),
    Part("ranking", 35, speed.run_ranking),
    Part("faiss", 25, neighbours.run_faiss),
    Part("forms", 90, forms.run),
]
"""Together more than the whole run may take: a part seldom needs its limit, and the last ones are worth least."""
