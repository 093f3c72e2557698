"""Model cards: what a person who finds a model on the Hub needs to know, from the files that record it."""

from __future__ import annotations

from qlformat.cards.writer import write_card

__all__ = ["write_card"]
