"""No literal survives normalisation, whatever the text, wherever it is cut; what identifies a statement does."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgherd.agent.probes.normalise import normalise

SECRET = "zqsecretqz"

# Ways to write a secret into SQL. Each keeps it inside one literal or comment.
_noise = st.text(alphabet='ab1 \n;-*/$"éλ', max_size=6).filter(
    lambda text: "*/" not in text and "\n" not in text and "$" not in text
)
literals = st.one_of(
    _noise.map(lambda noise: f"'{noise}{SECRET}''{noise}'"),
    _noise.map(lambda noise: f"E'{noise}\\'{SECRET}\\\\{noise}'"),
    _noise.map(lambda noise: f"e'\\n{SECRET}''{noise}'"),
    _noise.map(lambda noise: f"U&'{noise}{SECRET}\\0061'"),
    _noise.map(lambda noise: f"N'{noise}{SECRET}'"),
    _noise.map(lambda noise: f"$${noise}{SECRET}'{noise}$$"),
    _noise.map(lambda noise: f"$tag${noise}{SECRET}$$ $other$ '{noise}$tag$"),
    _noise.map(lambda noise: f"/* {noise}{SECRET} /* nested ' */ {SECRET} */"),
    st.just(f"-- it's {SECRET}\n"),
)
glue = st.sampled_from([" ", ", ", " = ", "\n", "(", ")", " AND ", "::text ", "||", ";", ' "Quoted Name" ', " $1 ", " t1.c2 "])
statements = st.lists(st.one_of(literals.map(" {}".format), glue, st.just("SELECT "), st.just("col_1")), max_size=14).map(
    "".join
)


@given(statements, st.integers(0, 400))
@example(f"SELECT 'a\\' || '{SECRET}'", 400)  # closed or not, by standard_conforming_strings
@example(f"SELECT 'a\\'' || '{SECRET}'", 400)
@example(f"SELECT E'a'\n'b\\'{SECRET}'", 400)  # a continued string keeps its escapes
@example(f"SELECT '{SECRET}", 400)
@example(f"SELECT $a$ {SECRET}", 400)
@example(f"SELECT /* {SECRET}", 400)
def test_nothing_of_a_literal_comes_out_wherever_the_text_is_cut(statement: str, cut: int) -> None:
    assert "secret" not in normalise(statement[:cut])
    assert "secret" not in normalise(statement)


@given(st.text(max_size=200))
@example("a'b\\")
@example("1e+5 .5 1_000 0xFF 1.e5-2 $1$2$ a$1$")
def test_normalising_twice_is_normalising_once_and_digits_of_numbers_go(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert "\n" not in once
    assert len(once) <= 1000


@given(st.integers(0, 10**12), st.floats(0.001, 1e9), st.text(alphabet="abc '", max_size=8))
def test_statements_that_differ_in_literals_are_one(number: int, real: float, text: str) -> None:
    quoted = text.replace("'", "''")
    given_one = normalise(f"SELECT a1, b FROM t2 WHERE x = {number} AND y<{real!r} AND z = '{quoted}' AND k IN ({number},2, 3)")
    assert given_one == "SELECT a1, b FROM t2 WHERE x = ? AND y<? AND z = ? AND k IN (?, …)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("select  *\n\tfrom t -- why\n where id=5;", "select * from t where id=?;"),
        ("SELECT 0x1F, 0b11, 1_000, 1.5e-3, .5, t.c3, $1, $2::int4", "SELECT ?, …, t.c3, $1, $2::int4"),
        ("SELECT B'1010', X'1FF', a-1, -2", "SELECT ?, …, a-?, -?"),
        ("ALTER ROLE bob PASSWORD 'hunter2'", "ALTER ROLE bob PASSWORD ?"),
        ("ALTER ROLE bob SET app.token = hunter2", "ALTER ROLE bob SET app.token = ?"),
        ("ALTER FUNCTION f() SET app.token = hunter2", "ALTER FUNCTION f() SET app.token = ?"),
        ("CREATE FUNCTION f() RETURNS int SET app.token TO hunter2 AS $$x$$", "CREATE FUNCTION f() RETURNS int SET app.token TO ?"),
        ('SET app.token TO "hunter2", b', "SET app.token TO ?"),
        ("set app.token=hunter2; select a", "set app.token= ?; select a"),
        ("UPDATE t SET a = b, c = 'x' WHERE d = e", "UPDATE t SET a = b, c = ? WHERE d = e"),
        ("DO $do$ BEGIN PERFORM 'x'; END $do$", "DO ?"),
        ("SELECT \"na me\"\"x\", U&\"d\\0061t\"", "SELECT \"na me\"\"x\", U&\"d\\0061t\""),
        ("SELECT 'open", "SELECT ?"),
        ("VALUES (1, 'a', 2.0), (3, 'b', 4)", "VALUES (?, …), (?, …)"),
    ],
)  # fmt: skip
def test_examples(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_long_texts_are_cut() -> None:
    assert normalise("SELECT " + "a," * 10_000).endswith("…")
    assert len(normalise("SELECT " + "a," * 10_000)) == 1000
