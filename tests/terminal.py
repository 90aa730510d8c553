"""A terminal to print to."""

from __future__ import annotations

import io


class Terminal(io.TextIOWrapper):
    """Says that it is one, and keeps what is printed."""

    def __init__(self, encoding: str = "utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)
