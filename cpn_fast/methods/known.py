"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable

from cpn_fast.config import Config
from cpn_fast.methods.cam import PlainCam
from cpn_fast.methods.cpn import Cpn
from cpn_fast.methods.method import Method
from cpn_fast.methods.seam import Seam

METHODS: dict[str, Callable[[Config], Method]] = {"cam": PlainCam, "cpn": Cpn, "seam": Seam}
"""Value of ``Config.method`` -> a function that makes the method, with random weights."""
