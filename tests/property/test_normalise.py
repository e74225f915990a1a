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
# Not a letter, a digit or white space to PostgreSQL as it is to Unicode; all of it can end a name, so no $$ behind it opens one.
ODD = ["\u00a0", "\u3000", "\u2028", "\x85", "\u200b", "😀", "€", "½", "٣", "é", "a", "1a", "1é", "0x1"]
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


@pytest.mark.parametrize("odd", ODD)
def test_dollars_behind_a_name_of_any_characters_open_no_literal(odd: str) -> None:
    for before in ("SELECT ", "SELECT", "SELECT 1", "SELECT $1", "SELECT a", "SELECT +"):
        text = f"{before}{odd}$$ '$$ {SECRET}'"
        assert SECRET not in normalise(text), text
    if odd[0] not in "01":  # a tag is a name
        assert SECRET not in normalise(f"SELECT ${odd}$ ' ${odd}$, '{SECRET}'")
        assert SECRET not in normalise(f"SELECT ${odd}$ {SECRET} ${odd}$")


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u200b", "\x1f", "\v"])
def test_a_value_of_set_stays_hidden_behind_pasted_spaces(space: str) -> None:
    for statement in (f"SET app.token TO {SECRET}", f"ALTER ROLE bob SET app.token = {SECRET}"):
        assert SECRET not in normalise(statement.replace(" ", space))
        assert SECRET not in normalise(statement.replace(" TO ", f"{space}TO{space}"))


def test_a_comment_behind_half_a_number_is_one() -> None:
    assert SECRET not in normalise(f"SELECT 1e--{SECRET}")


@given(statements, st.sampled_from(ODD), statements)
def test_odd_characters_between_statements_leak_nothing_but_what_they_quote(before: str, odd: str, after: str) -> None:
    assert "secret" not in normalise(f"{before} {odd} {after}")


@given(st.text(max_size=200) | st.text(alphabet="a1$'\"?,…é\u00a0\u2028😀٣ e-+.\\=;", max_size=40))
@example("a'b\\")
@example("1e+5 .5 1_000 0xFF 1.e5-2 $1$2$ a$1$")
def test_normalising_twice_is_normalising_once_and_digits_of_numbers_go(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert len(once.splitlines()) <= 1
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


def test_what_follows_the_first_eight_thousand_characters_costs_nothing_and_a_literal_cut_there_is_gone() -> None:
    assert normalise("/*" + 8_000 * " " + "*/ SELECT a") == ""
    assert normalise("SELECT " + 7_980 * " " + f"a, '{SECRET}', b") == "SELECT a, ?"
