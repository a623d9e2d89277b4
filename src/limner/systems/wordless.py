"""What a system says that reads no words and is one network, or none but its autoencoder."""

from __future__ import annotations

from collections.abc import Callable

from limner.text.prompts import Dialect
from limner.types import Request


class Wordless:
    dialects: tuple[Dialect, ...] = ("plain",)
    clip_skip = None
    vae: dict[str, str] = {}  # noqa: RUF012 (put anew, never changed)
    """What a picture remembers of an autoencoder that is not the model's own."""
    weights_hash: Callable[[], str] = staticmethod(lambda: "")
    """Where it was read from files: waits for their hash, which is made beside the loading."""
    works_on = None
    stays = True
    """It has one part, which is always at work."""

    @property
    def model_hash(self) -> str:
        return self.weights_hash()

    def condition(self, prompts: list[str], request: Request, negatives: list[str] | None = None) -> None:
        return None

    def words_cut(self, text: str) -> str:
        return ""

    words_unknown = words_cut

    def words_unreached(self, text: str, request: Request) -> list[str]:
        return []

    def widen(self) -> bool:
        return False
