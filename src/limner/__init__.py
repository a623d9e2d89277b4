"""Limner: image generation you can read, train, load and draw with. `limner.load("icons").generate("a red fox")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limner.pipeline import Pipeline, load
    from limner.types import GeneratedImage

__version__ = "0.1.0"
__all__ = ["GeneratedImage", "Pipeline", "__version__", "load"]

_HOMES = {"load": "limner.pipeline", "Pipeline": "limner.pipeline", "GeneratedImage": "limner.types"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import limner` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'limner' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
