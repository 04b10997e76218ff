"""cpn-fast: learn semantic segmentation from image-level tags with the Complementary Patch Network."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from cpn_fast.moved import Finder

if TYPE_CHECKING:
    from cpn_fast.commands.trained_model import load as load

__version__ = "0.1.0"
sys.meta_path.append(Finder())


def __getattr__(name: str) -> Any:
    """Import ``cpn_fast.load`` on first use: it needs torch, and ``cpn-fast --help`` does not."""
    if name == "load":
        from cpn_fast.commands.trained_model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "load"]
