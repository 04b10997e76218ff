"""Training methods: what a method adds to the trainer is its network, the views it makes of a batch, and its losses."""

from __future__ import annotations

from collections.abc import Callable

from cpn_fast.config import Config
from cpn_fast.methods.cam import PlainCam
from cpn_fast.methods.cpn import Cpn
from cpn_fast.methods.method import Losses, Method, Views
from cpn_fast.methods.seam import Seam

__all__ = ["METHODS", "Losses", "Method", "Views"]

METHODS: dict[str, Callable[[Config], Method]] = {"cam": PlainCam, "cpn": Cpn, "seam": Seam}
"""Values of ``Config.method``: each makes a method with a network of random weights."""
