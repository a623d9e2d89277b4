"""What a system says of words that reads none."""

from __future__ import annotations

from limner.text.prompts import Dialect
from limner.types import Request


class Wordless:
    dialects: tuple[Dialect, ...] = ("plain",)
    clip_skip = None

    def condition(self, prompts: list[str], request: Request, negatives: list[str] | None = None) -> None:
        return None

    def words_cut(self, text: str) -> str:
        return ""

    words_unknown = words_cut

    def words_unreached(self, text: str, request: Request) -> list[str]:
        return []

    def widen(self) -> bool:
        return False
