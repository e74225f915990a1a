"""SQL text without what people put into it: literals become `?`, comments and layout go. Pure.

Never broken, for any text, cut off anywhere, whatever `standard_conforming_strings` is:
- nothing from inside a string (plain, E'', U&'', N'', B'', X'', dollar-quoted), a number or a comment comes out;
- the value of SET, also below ALTER SYSTEM | ROLE | DATABASE | FUNCTION … and CREATE FUNCTION, doesn't either, quoted or not;
- what can be read in two ways is taken for a literal from there to the end of the text;
- normalising twice gives what once gave.

Identifiers, keywords, operators and parameters ($1) stay: they are what makes a statement recognisable. Characters are
classed as the server's lexer does it, not as Unicode does: digits and white space are ASCII, everything from U+0080 on is
part of a name (a no-break space, an emoji), and a `$$` right behind a name opens no literal.
Source: PostgreSQL docs, "Lexical Structure"; its scan.l (ident_start, dolq_start, space).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

TEXT_CHARS_MAX: Final = 1_000
_INPUT_CHARS_MAX: Final = 8_000  # some milliseconds of the event loop
_CUT: Final = "…"

_SPACE_RE: Final = re.compile(r"[\x00-\x20\x7f]+|--[^\n\r]*")  # a control character ends a token, too
_CONTROL_RE: Final = re.compile(r"[\s\x00-\x1f\x7f]")
_COMMENT_EDGE_RE: Final = re.compile(r"/\*|\*/")
_ESCAPED_RE: Final = re.compile(r"(?:[^'\\]|''|\\.)*('?)", re.DOTALL)  # after E'
_QUOTED_NAME_RE: Final = re.compile(r'(?:[Uu]&)?"(?:[^"]|"")*"?')
_STRING_START_RE: Final = re.compile(r"(?:([Ee])|[BbXxNn]|[Uu]&)?'")
_LETTER: Final = r"A-Za-z_\x80-\U0010ffff"
_DOLLAR_RE: Final = re.compile(rf"\$(?:[{_LETTER}][{_LETTER}0-9]*)?\$")
_NUMBER_RE: Final = re.compile(rf"\.?[0-9][{_LETTER}0-9.]*(?:(?<=[eE])[+-][0-9][{_LETTER}0-9.]*)?")
_WORD_RE: Final = re.compile(rf"[{_LETTER}][{_LETTER}0-9$]*")
_PARAMETER_RE: Final = re.compile(r"\$[0-9]+")
_LIST_RE: Final = re.compile(r"\?(?:, ?\?)+(?:, ?…)?")
_MAY_SET: Final = frozenset({"alter", "create"})


def normalise(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    """`text` without literals, on one line, at most `chars_max` characters (the last is … where it was cut)."""
    pieces: list[str] = []
    for piece in _without_values(_tokens(text[:_INPUT_CHARS_MAX])):
        if piece != " " or (pieces and pieces[-1] != " "):
            pieces.append(piece)
    line = _LIST_RE.sub("?, …", "".join(pieces).strip())
    return line if len(line) <= chars_max else line[: chars_max - 1] + _CUT


def _without_values(tokens: Iterator[str]) -> Iterator[str]:
    """Cut what SET gives a parameter: it needn't be quoted to be a secret."""
    verb = ""  # the statement's first word
    sets = hidden = False
    for piece in tokens:
        if piece == ";":
            verb, sets, hidden = "", False, False
        elif not hidden and piece != " ":
            word = piece.lower()
            verb = verb or word
            sets = sets or (word == "set" and (verb == "set" or verb in _MAY_SET))
        if hidden:
            continue
        yield piece
        if sets and piece.lower() in ("=", "to"):
            hidden = True
            yield " ?"


def _tokens(text: str) -> Iterator[str]:
    """Names, operators and ` ` as they are, `?` for each literal; stops where the rest can't be read with certainty."""
    at, end = 0, len(text)
    while at < end:
        if match := _SPACE_RE.match(text, at):
            at = match.end()
            yield " "
        elif text.startswith("/*", at):
            at = _after_comment(text, at)
            yield " "
        elif match := _STRING_START_RE.match(text, at):
            yield "?"
            after = _after_escaped(text, match.end()) if match[1] else _after_plain(text, match.end())
            if after is None:
                return
            at = after
        elif match := _QUOTED_NAME_RE.match(text, at) or _PARAMETER_RE.match(text, at):
            at = match.end()
            yield _CONTROL_RE.sub(" ", match[0])
        elif match := _DOLLAR_RE.match(text, at):
            close = text.find(match[0], match.end())
            at = end if close < 0 else close + len(match[0])
            yield "?"
        elif match := _NUMBER_RE.match(text, at):
            at = match.end()
            yield "?"
            if text.startswith("$", at):  # 1a$$: before 15 it is 1 and the name a$$, since then 1a and a literal
                return
        elif match := _WORD_RE.match(text, at):
            at = match.end()
            if not match[0].isprintable():  # to whoever pasted the no-break space it is two words: SET, and whose value?
                yield "?"
                return
            yield match[0]
        else:
            yield text[at]
            at += 1


def _after_comment(text: str, at: int) -> int:
    """Past a comment that may hold comments; the end of the text when it isn't closed."""
    depth = 0
    for edge in _COMMENT_EDGE_RE.finditer(text, at):
        depth += 1 if edge[0] == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(text)


def _after_escaped(text: str, at: int) -> int | None:
    """Past an E'' string whose content begins at `at`; None when it isn't closed."""
    match = _ESCAPED_RE.match(text, at)
    return match.end() if match is not None and match[1] else None


def _after_plain(text: str, at: int) -> int | None:
    """Past a string without E; None when it isn't closed, or when a backslash before a quote leaves open whether it is."""
    while (quote := text.find("'", at)) >= 0:
        backslashes = len(text[at:quote]) - len(text[at:quote].rstrip("\\"))
        if backslashes % 2:
            return None
        if not text.startswith("'", quote + 1):
            return quote + 1
        at = quote + 2
    return None
