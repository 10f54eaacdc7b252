"""Texts that others have chosen: how much of them is kept, and how they are shown."""

from __future__ import annotations

#: Characters of a text that a stranger has chosen.
MAX_SHOWN = 4096

#: Likewise, of a text of several lines, such as a traceback.
MAX_LINES = 65_536


def printable(text: str) -> str:
    """Cut a text, and show what does not print: a stranger may have chosen it."""
    text = clip(text, MAX_SHOWN)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Likewise, of a text of several lines, which stay such."""
    return "\n".join(map(printable, clip(text, MAX_LINES).split("\n")))


def clip(text: str, limit: int) -> str:
    """Keep both ends of a text that is too long: the first cause and the last word."""
    text = str.__str__(text)  # of a subclass of str, the str alone
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
