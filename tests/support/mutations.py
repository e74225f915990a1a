"""Damage done to real input: what a fuzzer changes, drawn by Hypothesis so that a failure shrinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import strategies as st

S = TypeVar("S", str, bytes)


def mutated(draw: st.DrawFn, whole: S, corpus: Sequence[S], atoms: Sequence[S]) -> S:
    """A piece cut out, doubled, replaced by an atom or by a piece of another of the corpus; up to four times."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(whole)))
        end = min(len(whole), start + draw(st.integers(0, 12)))
        match draw(st.integers(0, 3)):
            case 0:
                piece = whole[:0]
            case 1:
                piece = whole[start:end] + whole[start:end]
            case 2:
                piece = draw(st.sampled_from(atoms))
            case _:
                other = draw(st.sampled_from(corpus))
                place = draw(st.integers(0, len(other)))
                piece = other[place : place + draw(st.integers(0, 40))]
        whole = whole[:start] + piece + whole[end:]
    return whole
