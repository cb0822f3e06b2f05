"Sketches keep their stated errors, profiles of parts add up to the profile of the whole, and no table breaks them."

import datetime
import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.data.profiles import ProfileError, profile, read_profile
from mlkit.data.sketches import CATEGORIES, RANK_ERROR, Counts, Distinct, Numbers, Rows, SketchError, from_dict, hashes, to_dict

numbers = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60)
texts = st.lists(st.one_of(st.none(), st.text(max_size=8)), max_size=60)
laws = settings(max_examples=40, deadline=None)


def same(one, other) -> bool:
    return json.dumps(to_dict(one), sort_keys=True) == json.dumps(to_dict(other), sort_keys=True)


def close(one: Numbers, other: Numbers):
    assert (one.n, one.missing, one.infinite) == (other.n, other.missing, other.infinite)
    assert one.quantiles.points[0].tolist() == other.quantiles.points[0].tolist()
    assert one.moments.mean == pytest.approx(other.moments.mean, rel=1e-9, abs=1e-9 * (1 + abs(one.moments.high)))


@laws
@given(numbers, numbers, numbers)
def test_merging_numbers_is_commutative_and_associative(a, b, c):
    a, b, c = (Numbers().add(np.array(v, np.float64)) for v in (a, b, c))
    close(a + b, b + a)
    close((a + b) + c, a + (b + c))
    assert same(a + Numbers(), a)


@laws
@given(texts, texts, texts)
def test_merging_counts_is_commutative_and_associative(a, b, c):
    whole = Counts().add(pl.Series(a + b + c, dtype=pl.String))
    a, b, c = (Counts().add(pl.Series(v, dtype=pl.String)) for v in (a, b, c))
    assert same(a + b, b + a) and same((a + b) + c, a + (b + c)) and same((a + b) + c, whole)


@laws
@given(st.lists(st.text(max_size=20), max_size=50, unique=True))
def test_different_texts_have_different_hashes(words):
    found = hashes(pl.Series(words, dtype=pl.String))
    assert len(set(found.tolist())) == len(words)
    assert Distinct().add(found).count == len(words)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(["normal", "sorted", "few", "cauchy"]))
def test_ranks_stay_within_the_stated_error_however_the_parts_are_merged(seed, parts, shape):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3000, 90_000))
    values = {"normal": rng.normal(size=n), "sorted": np.sort(rng.normal(size=n)), "few": rng.integers(0, 7, n) * 1.0, "cauchy": rng.standard_cauchy(n)}[shape]
    pieces = [Numbers().add(p) for p in np.array_split(values, parts)]
    while len(pieces) > 1:  # merged in a random tree
        i = int(rng.integers(len(pieces) - 1))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ordered, merged = np.sort(values), pieces[0]
    assert np.abs(merged.quantiles.below(ordered, "right") - np.searchsorted(ordered, ordered, "right") / n).max() <= RANK_ERROR
    assert merged.quantiles.points[1][-1] == n and merged.moments.high == values.max()
    assert merged.moments.deviation == pytest.approx(values.std(ddof=1), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_frequent_categories_are_short_by_no_more_than_said(seed, parts):
    rng = np.random.default_rng(seed)
    values = pl.Series(rng.zipf(1.2, 20_000)).cast(pl.String)
    pieces = [Counts().add(values[i::parts]) for i in range(parts)]
    merged = sum(pieces[1:], pieces[0])
    exact = dict(values.value_counts(name="n").iter_rows())
    assert merged.lost <= merged.n / (CATEGORIES + 1) and merged.n == len(values)
    assert all(exact[v] - merged.lost <= c <= exact[v] for v, c in merged.table.iter_rows())
    kept = set(merged.table["value"])
    assert all(n <= merged.lost for v, n in exact.items() if v not in kept)
    assert merged.distinct.count == pytest.approx(len(exact), rel=0.12)


def test_the_sample_of_rows_is_fair():
    table = pl.DataFrame({"x": np.arange(20_000.0)})
    merged = sum((Rows(800).add(table[i : i + 1000]) for i in range(0, 20_000, 1000)), Rows(800))
    shares = np.histogram(merged.frame["x"], bins=10, range=(0, 20_000))[0]
    assert len(merged.frame) == 800 and (np.abs(shares - 80) < 40).all()


def every_kind(n: int = 50) -> pl.DataFrame:
    zoned = pl.datetime_range(datetime.datetime(2026, 1, 1), datetime.datetime(2027, 1, 1), "1h", time_zone="Asia/Kathmandu", eager=True)
    columns = {"n": range(n), "d": pl.Series(["1.25"] * n).cast(pl.Decimal(12, 2)), "t": zoned[:n], "day": zoned.dt.date()[:n], "c": ["a", None] * (n // 2), "null": [None] * n}
    nested = {"s": [{"a": 1, "b": {"c": "x"}}] * n, "l": [[1, 2], [3]] * (n // 2), "i": [float("inf"), float("nan")] * (n // 2), "u": [2**64 - 1] * n}
    return pl.DataFrame({**columns, **nested}, schema_overrides={"u": pl.UInt64})


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_every_type_of_column_is_told_of_and_survives_the_file(rows, tmp_path):
    table = every_kind()[:rows]
    made = profile(table)
    assert set(made.columns) == {"n", "d", "t", "day", "c", "null", "s.a", "s.b.c", "l", "i", "u"}
    again = read_profile(made.save(tmp_path / "profile.json"))
    assert again.to_json() == made.to_json() == profile(table.lazy()).to_json()
    assert made.rows == rows and "null" in repr(again) and "null" in again._repr_html_()


def test_names_that_meet_after_flattening_are_kept_apart():
    table = pl.DataFrame({"a.b": [1, 2], "a": [{"b": 3}, {"b": 4}]})
    assert list(profile(table).columns) == ["a.b", "a.b_"]


def test_parts_that_see_other_kinds_say_what_to_do():
    prose, short = pl.DataFrame({"t": ["a text of more than a few words it is"] * 3}), pl.DataFrame({"t": ["a"] * 3})
    with pytest.raises(ProfileError, match="like="):
        profile(prose) + profile(short)
    assert (profile(prose) + profile(short, like=profile(prose))).columns["t"].kind == "text"


@laws
@given(st.text(max_size=200))
def test_a_damaged_file_is_said_to_be_damaged(text):
    for content in (text, '{"schema": 1, "rows": 1, "columns": ' + text):
        with pytest.raises(ProfileError):
            read_profile("{" + content if not content.startswith("{") else content)
    with pytest.raises(SketchError):
        from_dict({"is": text})


def test_two_processes_write_the_same_bytes():
    code = "import numpy as np, polars as pl; from mlkit.data.profiles import profile; r = np.random.default_rng(0)\n"
    code += "t = pl.DataFrame({'x': r.normal(size=200_000), 'c': r.choice(list('abc'), 200_000)}); import hashlib; print(hashlib.sha256(profile(t).to_json().encode()).hexdigest())"
    assert len({subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}) == 1
