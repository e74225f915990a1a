"""Text of strangers on a terminal. Pure.

Names of databases, users and applications, identifiers in statements, labels of foreign exporters: all of them may hold escape
sequences, which a terminal would obey (set its title, clear the screen, hide lines).
"""

from __future__ import annotations


def printable(text: str) -> str:
    """One line without control or format characters: white space becomes a space, anything else U+FFFD."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " if char.isspace() else "\N{REPLACEMENT CHARACTER}" for char in text)
