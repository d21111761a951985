"""Hostile input by the thousand: good input of every kind, changed at random, in processes that may die of it.

    python -m tests.fuzz --cases 10000 --seed 1
    python -m tests.fuzz --kind configs weights --minutes 20
    python -m tests.fuzz --repeat configs:1:42

A case may end in our own error, in a picture, or in nothing to draw; anything else is a finding, whose last line tells
how to repeat it. A kind is a module of this package with the function `case(rng) -> Case`, and its name is listed here.
What it needs to import or to load beforehand, so that no single case pays for it, is done by its `warm_up()`.
"""

from __future__ import annotations

KINDS = (
    "configs",
    "weights",
    "calibration",
    "loras",
    "pictures",
    "folders",
    "settings",
    "prompts",
    "jobs",
    "limits",
    "scores",
    "clusters",
    "requests",
    "products",
)
