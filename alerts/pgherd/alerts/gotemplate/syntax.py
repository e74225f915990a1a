"""From the text of a template to its tree.

Actions: pipelines, variables (`:=`, `=`), if / else if / else, with, range (break, continue), define, template, block,
comments and trimming. Unknown functions and variables are errors here, as in Go.
Source: Go documentation, text/template and text/template/parse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Arity = tuple[int, int]  # fewest and most arguments


class TemplateError(ValueError):
    """A text isn't a template, or a template can't be expanded."""


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant; nil is None."""

    value: str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Dot:
    """The current value."""


@dataclass(frozen=True, slots=True)
class Variable:
    """`$name`; `$` alone is the data that expansion began with."""

    name: str


@dataclass(frozen=True, slots=True)
class Fields:
    """`.A.B` of something."""

    of: Operand
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Function:
    """A function by name; called with what follows it."""

    name: str


@dataclass(frozen=True, slots=True)
class Command:
    """An operand, or a function or method with arguments."""

    operands: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Commands, each given the result of the one before; its value is shown or bound to `variables`."""

    commands: tuple[Command, ...]
    variables: tuple[str, ...] = ()
    assigns: bool = False  # `=` rather than `:=`


Operand = Literal | Dot | Variable | Fields | Function | Pipeline


@dataclass(frozen=True, slots=True)
class Text:
    """Shown as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class Show:
    """`{{ pipeline }}`."""

    pipeline: Pipeline


@dataclass(frozen=True, slots=True)
class Branch:
    """`if`, `with` or `range`, by `kind`."""

    kind: str
    pipeline: Pipeline
    then: Nodes
    otherwise: Nodes = ()


@dataclass(frozen=True, slots=True)
class Include:
    """`{{ template "name" pipeline }}`."""

    name: str
    pipeline: Pipeline | None


@dataclass(frozen=True, slots=True)
class Leave:
    """`break` or `continue`."""

    kind: str


Node = Text | Show | Branch | Include | Leave
Nodes = tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """A parsed template and those that it defines."""

    nodes: Nodes
    defined: tuple[tuple[str, Nodes], ...] = ()


_TOKEN_RE = re.compile(
    r"""(?P<space>\s+)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)
      | (?P<char>'(?:[^'\\\n]|\\.)')
      | (?P<number>[-+]?(?:0[xX][0-9a-fA-F]+|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?))
      | (?P<variable>\$\w*)
      | (?P<field>\.[A-Za-z_]\w*)
      | (?P<dot>\.)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<sign>:=|[()|=,])""",
    re.VERBOSE,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "'": "'", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_DEPTH_MAX = 100


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    spaced: bool  # something stood before it that it isn't part of


def parse(text: str, arity: Callable[[str], Arity | None], variables: tuple[str, ...]) -> Tree:
    """The tree of `text`. `arity` knows the functions, `variables` are given from outside. Raises TemplateError."""
    reader = _Reader(list(_pieces(text)), arity)
    nodes, end = reader.nodes([*variables])
    if end:
        raise TemplateError(f"unexpected {{{{{end}}}}}")
    return Tree(nodes, tuple(reader.defined.items()))


def _pieces(text: str) -> Iterator[Text | str]:
    """Literal text and the insides of actions, comments left out and trimming done."""
    position, trim_next = 0, False
    while True:
        start = text.find("{{", position)
        literal = text[position:] if start < 0 else text[position:start]
        if trim_next:
            literal = literal.lstrip()
        if start < 0:
            yield Text(literal)
            return
        begin = start + 2
        if re.match(r"-\s", text[begin : begin + 2]):
            literal, begin = literal.rstrip(), begin + 1
        yield Text(literal)
        end = _comment_end(text, begin) or _action_end(text, begin)
        action = text[begin:end]
        trim_next = re.search(r"\s-$", action) is not None
        action = (action[:-1] if trim_next else action).strip()
        if not action.startswith("/*"):
            yield action
        position = end + 2


def _comment_end(text: str, position: int) -> int | None:
    start = re.compile(r"\s*/\*").match(text, position)
    if start is None:
        return None
    end = re.compile(r"\*/(\s+-)?\}\}").search(text, start.end())
    if end is None:
        raise TemplateError("unclosed comment")
    return end.end() - 2


def _action_end(text: str, position: int) -> int:
    """Where the "}}" of an action stands that begins at `position`; strings may hold braces."""
    while position < len(text):
        if text.startswith("}}", position):
            return position
        match = _TOKEN_RE.match(text, position)
        position = match.end() if match is not None and match.lastgroup == "string" else position + 1
    raise TemplateError("unclosed action: {{ without }}")


def _tokens(action: str) -> list[_Token]:
    tokens: list[_Token] = []
    position, spaced = 0, True
    while position < len(action):
        match = _TOKEN_RE.match(action, position)
        if match is None or match.lastgroup is None:
            raise TemplateError(f"unexpected {action[position:]!r}")
        if match.lastgroup == "space":
            spaced = True
        else:
            tokens.append(_Token(match.lastgroup, match[0], spaced))
            spaced = False
        position = match.end()
    return tokens


class _Reader:
    """Reads pieces into nodes, keeping track of which variables are known where."""

    def __init__(self, pieces: list[Text | str], arity: Callable[[str], Arity | None]) -> None:
        self._pieces = pieces
        self._position = 0
        self._arity = arity
        self._depth = 0
        self.defined: dict[str, Nodes] = {}

    def nodes(self, known: list[str], *, in_range: bool = False) -> tuple[Nodes, str]:
        """Nodes up to `end`, `else …` or the end of the text, and which of those came."""
        self._depth += 1
        if self._depth > _DEPTH_MAX:
            raise TemplateError(f"nested deeper than {_DEPTH_MAX}")
        nodes: list[Node] = []
        while self._position < len(self._pieces):
            piece = self._pieces[self._position]
            self._position += 1
            if isinstance(piece, Text):
                nodes += [piece] if piece.text else []
                continue
            word = piece.split(None, 1)[0] if piece else ""
            if word in ("end", "else"):
                self._depth -= 1
                return tuple(nodes), piece
            node = self._action(word, piece, known, in_range=in_range)
            if node is not None:
                nodes.append(node)
        self._depth -= 1
        return tuple(nodes), ""

    def _action(self, word: str, piece: str, known: list[str], *, in_range: bool) -> Node | None:
        match word:
            case "if" | "with" | "range":
                return self._branch(word, piece[len(word) :], known, in_range=in_range)
            case "break" | "continue":
                if not in_range or piece != word:
                    raise TemplateError(f"{{{{{piece}}}}} outside range")
                return Leave(word)
            case "template" | "block" | "define":
                return self._named(word, piece[len(word) :], known)
        return Show(self._expression(piece, known))

    def _branch(self, kind: str, rest: str, known: list[str], *, in_range: bool) -> Branch:
        inner = [*known]
        pipeline = self._expression(rest, inner, in_range=kind == "range")
        inside = in_range or kind == "range"
        then, end = self.nodes([*inner], in_range=inside)
        otherwise: Nodes = ()
        if end.startswith("else"):
            more = end[4:].strip()
            if more:
                word = more.split(None, 1)[0]
                if word != kind or kind == "range":
                    raise TemplateError(f"unexpected {{{{{end}}}}}")
                return Branch(kind, pipeline, then, (self._branch(word, more[len(word) :], [*inner], in_range=in_range),))
            otherwise, end = self.nodes([*inner], in_range=inside)
        if end != "end":
            raise TemplateError(f"{kind} without end")
        return Branch(kind, pipeline, then, otherwise)

    def _named(self, kind: str, rest: str, known: list[str]) -> Include | None:
        tokens = _tokens(rest)
        if not tokens or tokens[0].kind != "string":
            raise TemplateError(f"{kind} needs a name in quotes")
        name = _unquote(tokens[0].text)
        after = rest.strip()[len(tokens[0].text) :].strip()
        pipeline = self._expression(after, known) if after and kind != "define" else None
        if kind != "template":
            nodes, end = self.nodes([])
            if end != "end" or (kind == "define" and after):
                raise TemplateError(f"{kind} without end")
            self.defined[name] = nodes
        return None if kind == "define" else Include(name, pipeline)

    # --- expressions ---

    def _expression(self, text: str, known: list[str], *, in_range: bool = False) -> Pipeline:
        tokens = _tokens(text)
        variables, assigns, tokens = self._declaration(tokens, known, in_range=in_range)
        pipeline, rest = self._pipeline(tokens, known)
        if rest:
            raise TemplateError(f"unexpected {rest[0].text!r}")
        if not assigns:
            known += [name for name in variables if name not in known]
        return Pipeline(pipeline.commands, variables, assigns)

    def _declaration(
        self, tokens: list[_Token], known: list[str], *, in_range: bool
    ) -> tuple[tuple[str, ...], bool, list[_Token]]:
        texts = [token.text for token in tokens[:4]]
        names: tuple[str, ...]
        if tokens and tokens[0].kind == "variable":
            if in_range and len(tokens) > 3 and texts[1] == "," and tokens[2].kind == "variable" and texts[3] in (":=", "="):
                names, sign, rest = (texts[0], texts[2]), texts[3], tokens[4:]
            elif len(tokens) > 1 and texts[1] in (":=", "="):
                names, sign, rest = (texts[0],), texts[1], tokens[2:]
            else:
                return (), False, tokens
            for name in names:
                if sign == "=" and name not in known:
                    raise TemplateError(f"undefined variable {name}")
            return names, sign == "=", rest
        return (), False, tokens

    def _pipeline(self, tokens: list[_Token], known: list[str]) -> tuple[Pipeline, list[_Token]]:
        self._depth += 1
        if self._depth > _DEPTH_MAX:
            raise TemplateError(f"nested deeper than {_DEPTH_MAX}")
        commands: list[Command] = []
        while True:
            command, tokens = self._command(tokens, known, is_first=not commands)
            commands.append(command)
            if not tokens or tokens[0].text != "|" or tokens[0].kind != "sign":
                self._depth -= 1
                return Pipeline(tuple(commands)), tokens
            tokens = tokens[1:]

    def _command(self, tokens: list[_Token], known: list[str], *, is_first: bool) -> tuple[Command, list[_Token]]:
        operands: list[Operand] = []
        while tokens and not (tokens[0].kind == "sign" and tokens[0].text in ("|", ")")):
            if operands and not tokens[0].spaced:
                raise TemplateError(f"unexpected {tokens[0].text!r}")
            operand, tokens = self._operand(tokens, known)
            operands.append(operand)
        if not operands:
            raise TemplateError("an expression is missing")
        head = operands[0]
        count = len(operands) - 1 + (0 if is_first else 1)
        if isinstance(head, Function):
            self._check_count(head.name, count)
        elif isinstance(head, Literal | Dot | Variable | Pipeline) and count:
            raise TemplateError(f"{_shown(head)} isn't a function")
        for operand in operands[1:]:
            if isinstance(operand, Function):
                self._check_count(operand.name, 0)
        return Command(tuple(operands)), tokens

    def _check_count(self, name: str, count: int) -> None:
        fewest, most = self._arity(name) or (0, 0)
        if not fewest <= count <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            raise TemplateError(f"{name} takes {wanted} argument{'s' if wanted != '1' else ''}, not {count}")

    def _operand(self, tokens: list[_Token], known: list[str]) -> tuple[Operand, list[_Token]]:
        token, rest = tokens[0], tokens[1:]
        operand: Operand
        match token.kind:
            case "string":
                return Literal(_unquote(token.text)), rest
            case "char":
                return Literal(ord(_unquote(f'"{token.text[1:-1]}"'))), rest
            case "number":
                return Literal(_constant(token.text)), rest
            case "field":
                operand = Fields(Dot(), (token.text[1:],))
            case "dot":
                operand = Dot()
            case "variable":
                if token.text not in known and token.text != "$":
                    raise TemplateError(f"undefined variable {token.text}")
                operand = Variable(token.text)
            case "name":
                if token.text in ("true", "false", "nil"):
                    return Literal({"true": True, "false": False, "nil": None}[token.text]), rest
                if self._arity(token.text) is None:
                    raise TemplateError(f"function {token.text} isn't defined")
                operand = Function(token.text)
            case _ if token.text == "(":
                pipeline, rest = self._pipeline(rest, known)
                if not rest or rest[0].text != ")":
                    raise TemplateError("a closing parenthesis is missing")
                operand, rest = pipeline, rest[1:]
            case _:
                raise TemplateError(f"unexpected {token.text!r}")
        names: list[str] = []
        while rest and rest[0].kind == "field" and not rest[0].spaced:
            names.append(rest[0].text[1:])
            rest = rest[1:]
        if names:
            before = operand.names if isinstance(operand, Fields) else ()
            operand = Fields(operand.of if isinstance(operand, Fields) else operand, (*before, *names))
        return operand, rest


def _shown(operand: Operand) -> str:
    match operand:
        case Variable(name):
            return name
        case Literal(value):
            return repr(value)
        case Dot():
            return "."
    return "an expression"


def _constant(text: str) -> int | float:
    if "0x" in text.lower():
        return int(text, 16)
    return float(text) if re.search(r"[.eE]", text) else int(text)


def _unquote(token: str) -> str:
    if token[0] == "`":
        return token[1:-1]

    def replacement(match: re.Match[str]) -> str:
        if match[1]:
            return _sign(int(match[1][1:], 16))
        if match[2] not in _ESCAPES:
            raise TemplateError(f"unknown escape {match[0]}")
        return _ESCAPES[match[2]]

    return re.sub(r"\\(?:(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2})|(.))", replacement, token[1:-1])


def _sign(number: int) -> str:
    if number > 0x10FFFF or 0xD800 <= number < 0xE000:
        raise TemplateError(f"{number:#x} isn't a character")
    return chr(number)
