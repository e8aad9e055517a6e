"""`from paris_p2p.diffusion import ParisPipeline` is all a Python user needs.

Imported on first use: the trainer child runs this file too and needs no pipeline.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paris_p2p.diffusion.pipeline import ParisPipeline

__all__ = ["ParisPipeline"]


def __getattr__(name: str) -> Any:
    if name == "ParisPipeline":
        from paris_p2p.diffusion.pipeline import ParisPipeline

        return ParisPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
