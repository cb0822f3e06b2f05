"Statistics are those of scipy, alarms are neither for nothing nor missing, and every strange table gets a clear row."

import datetime
import decimal
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from browser import browser_page, needs_chromium
from makers import mlkit
from scipy import stats

from mlkit.data.images import encode_png
from mlkit.data.profiles import profile
from mlkit.data.tables import scan
from mlkit.monitor import Adwin, Cbpe, Limits, MonitorError, Policy, check, compare, join_labels, judge_health, panes, read_metrics, slide, timeline, watch_level
from mlkit.monitor.drift import ALARMS, STATES
from mlkit.monitor.report import alert_rules, dashboard
from mlkit.monitor.served import read_sketches
from mlkit.monitor.statistics import benjamini_hochberg, chi_squared, ks, ks_pvalue, psi, tell_apart, total_variation, wasserstein

samples = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=80)
counts = st.lists(st.integers(0, 500), min_size=2, max_size=12)
few = settings(max_examples=40, deadline=None)


@few
@given(samples, samples)
def test_distances_of_numbers_are_those_of_scipy(one, other):
    with warnings.catch_warnings(record=True) as gave_up:
        warnings.simplefilter("always")
        theirs = stats.ks_2samp(one, other, method="exact")
    assert ks(one, other) == pytest.approx(theirs.statistic, abs=1e-9)
    assert gave_up or ks_pvalue(ks(one, other), len(one), len(other)) == pytest.approx(theirs.pvalue, abs=1e-9)
    assert wasserstein(one, other) == pytest.approx(stats.wasserstein_distance(one, other), rel=1e-9, abs=1e-9)


@few
@given(counts, counts)
def test_chi_squared_is_that_of_scipy(one, other):
    table = np.array([[*one, *[0] * 12][:12], [*other, *[0] * 12][:12]])
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2 or not table.sum(1).all():
        assert chi_squared(*table) == (0.0, 1.0)
        return
    theirs = stats.chi2_contingency(table, correction=False)
    assert chi_squared(*table) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9, abs=1e-9)


@few
@given(counts)
def test_nothing_differs_from_itself(one):
    assert psi(one, one) == total_variation(one, one) == 0


@few
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_q_values_are_those_of_scipy(pvalues):
    assert benjamini_hochberg(pvalues) == pytest.approx(stats.false_discovery_control(pvalues), abs=1e-12)


def table_of(n: int, seed: int, move: float = 0.0, columns: int = 10) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    numbers = {f"x{i}": rng.normal(move * (i == 0), 1, n) for i in range(columns)}
    return pl.DataFrame({**numbers, "c": rng.choice(list("abcdef"), n)})


def test_no_change_raises_no_alarm():
    alarms = [len(compare(profile(table_of(300, 2 * s), rows=0), profile(table_of(300, 2 * s + 1), rows=0)).alarms) for s in range(60)]
    assert sum(a > 0 for a in alarms) <= 3, "the stated rate of tables with a false alarm is one in a hundred"


def test_the_tests_are_honest_and_strong_by_themselves():
    limits = Limits(effect=0.0, alpha=0.05)
    found = {m: np.mean([(compare(profile(table_of(1000, 2 * s, columns=1), rows=0), profile(table_of(1000, 2 * s + 1, m, columns=1), rows=0), limits).table.filter(column="x0")["state"] == "drift")[0] for s in range(40)]) for m in (0.0, 0.25, 0.5)}
    assert found[0.0] <= 0.15 and found[0.25] >= 0.9 and found[0.5] == 1.0


def test_a_large_table_raises_no_alarm_about_little_and_a_small_one_none_by_accident():
    large = compare(profile(table_of(300_000, 0), rows=0), profile(table_of(300_000, 1, 0.15), rows=0)).table.row(by_predicate=pl.col("column") == "x0", named=True)
    assert large["q"] < 1e-6 and large["state"] == "ok"
    assert set(compare(table_of(5000, 0), table_of(40, 1, 2.0)).table["state"]) == {"few rows"}
    half = compare(profile(table_of(1000, 0), rows=0), profile(table_of(1000, 1, 0.5), rows=0))
    assert half.alarms["column"].to_list() == ["x0"]


def test_a_domain_classifier_is_honest_on_small_samples():
    draws = [tell_apart(*np.random.default_rng(s).normal(size=(2, 80, 6)), shuffles=60).pvalue for s in range(100)]
    assert np.mean(np.array(draws) <= 0.05) <= 0.13


def strange(n: int = 200) -> pl.DataFrame:
    zoned = pl.datetime_range(datetime.datetime(2026, 1, 1), datetime.datetime(2026, 3, 1), "1h", time_zone="Asia/Tokyo", eager=True)[:n]
    return pl.DataFrame({
        "constant": [5] * n, "null": [None] * n, "nothing": pl.Series([None] * n, dtype=pl.Float64), "infinite": [float("inf"), 1.0] * (n // 2), "nan": [float("nan")] * n,
        "zoned": zoned, "decimal": [decimal.Decimal("1.25")] * n, "nested": [{"a": 1, "b": {"c": "x"}}] * n, "list": [[1, 2], [3]] * (n // 2), "tokens": [["a"], []] * (n // 2),
        "yes": [True, False] * (n // 2), "text": ["a long text with many words in it", None] * (n // 2), "bytes": [b"12", None] * (n // 2), "vector": [[1.0, 2.0]] * n, "id": [f"id {i}" for i in range(n)],
        "object": [object()] * n, "huge": [1e308, -1e308] * (n // 2), "day": zoned.dt.date(), "took": pl.Series(range(n)).cast(pl.Duration("ms")), "choice": pl.Series(["a", "b"] * (n // 2), dtype=pl.Categorical),
    })  # fmt: skip


def test_a_strange_table_compared_with_itself_has_a_clear_row_for_each_column():
    drift = compare(strange(), strange())
    rows = {(r["column"], r["part"]): r for r in drift.table.rows(named=True)}
    assert {c for c, _ in rows} - {"(all together)"} == set(profile(strange()).columns)
    assert not len(drift.alarms) and all(r["state"] in STATES for r in rows.values())
    said = {c: r["state"] for (c, _), r in rows.items()}
    assert said["constant"] == said["infinite"] == said["decimal"] == said["nested.b.c"] == said["yes"] == said["huge"] == "ok"
    assert said["null"] == said["nothing"] == said["nan"] == "empty"
    assert said["zoned"] == said["day"] == said["object"] == said["id"] == "not compared"
    check(strange(), strange()).page()


@pytest.mark.parametrize("change", ["other constant", "all null now", "infinite now", "retyped", "gone", "new", "categories", "wider vector", "other zone", "other hour", "unreadable images"])
def test_each_change_is_told_by_its_name(change):
    before = pl.DataFrame({"x": [1.0, 2.0] * 200, "c": ["a", "b"] * 200, "v": [[1.0, 2.0]] * 400, "t": pl.Series([datetime.datetime(2026, 1, 1)] * 400).dt.replace_time_zone("UTC"), "h": [datetime.time(8, i % 60) for i in range(400)], "p": [encode_png(np.full((8, 8, 1), i % 256, np.uint8)) for i in range(400)]})
    changes = {
        "other constant": (before.with_columns(x=pl.lit(9.0)), "x", "drift"),
        "all null now": (before.with_columns(x=pl.lit(None, pl.Float64)), "x", "drift"),
        "infinite now": (before.with_columns(x=pl.lit(float("inf"))), "x", "drift"),
        "retyped": (before.with_columns(x=pl.lit("one")), "x", "retyped"),
        "gone": (before.drop("x"), "x", "gone"),
        "new": (before.with_columns(y=pl.lit(1)), "y", "new"),
        "categories": (before.with_columns(c=pl.lit("z")), "c", "drift"),
        "wider vector": (before.with_columns(v=pl.lit([1.0, 2.0, 3.0])), "v", "drift"),
        "other hour": (before.with_columns(h=pl.lit(datetime.time(20, 30))), "h", "drift"),
        "unreadable images": (before.with_columns(p=pl.lit(b"\x89PNG torn")), "p", "drift"),
        "other zone": (before.with_columns(pl.col("t").dt.convert_time_zone("Asia/Tokyo")), "t", "not compared"),
    }
    now, column, state = changes[change]
    drift = compare(before, now)
    mine = drift.table.filter(column=column)
    assert state in mine["state"].to_list(), mine
    assert mine["note"].str.len_chars().max() > 0 or change in ("other constant", "other hour")
    assert (state in ALARMS) == bool(len(drift.alarms.filter(column=column)))
    assert change != "unreadable images" or mine.filter(part="content")["note"].item() == "too few rows in the samples"
    check(before, now).page()


def test_sketches_of_many_workers_say_the_same_as_the_rows(tmp_path):
    rows, limits = table_of(6000, 3, 0.3), Limits(effect=0.05)
    made = [profile(rows[i::6], like=profile(table_of(2000, 0)), rows=0) for i in range(6)]
    for i, one in enumerate(made):
        one.save(tmp_path / f"20260601T{10 + i // 2}-0000000{i}-1.json")
    hours, left_out = read_sketches(tmp_path)
    report = check(table_of(2000, 0), None, limits=limits, time="time", every="1d", seen=hours)
    straight = compare(table_of(2000, 0), rows, limits)
    effects = [dict(t.filter(pl.col("kind") != "rows").select("column", "effect").iter_rows()) for t in (report.drift.table, straight.table)]
    assert left_out == 0 and [w.profile.rows for w in hours.panes] == [2000] * 3 and report.drift.now.rows == 6000
    assert effects[0].keys() == effects[1].keys() and max(abs(effects[0][k] - effects[1][k]) for k in effects[0]) < 0.02
    assert report.timeline["start"].n_unique() == 1 and set(report.drift.alarms["column"]) - {"(all together)"} == set(straight.alarms["column"]) - {"(all together)"}


def test_a_csv_without_rows_has_lost_no_column_its_type(tmp_path):
    (tmp_path / "now.csv").write_text("x0,c\n")
    drift = compare(table_of(200, 0, columns=1), scan(tmp_path / "now.csv"))
    assert set(drift.table["state"]) == {"few rows"}


@pytest.mark.parametrize("rows", [0, 1, 2, 99])
def test_few_rows_give_no_verdict_and_no_crash(rows):
    whole = strange()
    for before, now in ((whole, whole[:rows]), (whole[:rows], whole), (whole[:rows], whole[:rows])):
        report = check(before, now, policy=Policy("fail"))
        assert report.verdict.exit_code == 0
        json.loads(report.to_json())


def test_a_baseline_from_a_file_says_the_same_as_the_rows(tmp_path):
    from mlkit.data.profiles import read_profile

    before, now = table_of(3000, 0), table_of(3000, 1, 0.6)
    kept = read_profile(profile(before).save(tmp_path / "baseline.json"))
    assert compare(kept, now).table.drop("p", "q").equals(compare(before, now).table.drop("p", "q"))


def test_windows_see_when_it_happened_and_rows_without_a_time_are_counted():
    n = 6000
    rng = np.random.default_rng(0)
    log = pl.DataFrame({"row": pl.Series(range(n)).cast(pl.Int64).replace({7: None}), "x": rng.normal(np.where(np.arange(n) >= 4000, 1, 0), 1)})
    made = panes(log, "row", 1000)
    assert made.timeless == 1
    against = timeline(slide(made, width=2), made.panes[0].profile).filter(column="x")
    assert against["state"].to_list() == ["ok", "ok", "ok", "drift", "drift"]
    assert timeline(slide(made), "previous").filter(column="x", state="drift")["start"].to_list() == [4000]


@few
@given(st.integers(0, 10**6), st.lists(st.integers(1, 400), min_size=1, max_size=6))
def test_a_watcher_says_the_same_however_the_stream_is_cut(seed, cuts):
    scores = np.random.default_rng(seed).normal(0.3, 1, sum(cuts))
    whole, parts = watch_level(0.5, 500).add(scores), watch_level(0.5, 500)
    for part in np.split(scores, np.cumsum(cuts)[:-1]):
        parts = parts.add(part)
    assert parts.alarms == whole.alarms and parts.up == pytest.approx(whole.up) and parts.n == whole.n
    whole, parts = Adwin(-4, 4).add(scores), Adwin(-4, 4)
    for part in np.split(scores, np.cumsum(cuts)[:-1]):
        parts = parts.add(part)
    assert (parts.alarms, parts.width, parts.waiting) == (whole.alarms, whole.width, whole.waiting)


def test_estimates_refuse_what_they_cannot_learn_from():
    tiny = pl.DataFrame({"label": ["a"] * 9, "prediction": ["a"] * 9, "confidence": [0.9] * 9})
    with pytest.raises(MonitorError, match="too few"):
        Cbpe.fit(tiny)
    with pytest.raises(MonitorError, match="stand twice"):
        join_labels(pl.DataFrame({"k": [1, 1], "prediction": ["a", "a"]}), pl.DataFrame({"k": [1], "label": ["a"]}), "k")


def test_a_server_that_says_nonsense_is_refused():
    with pytest.raises(MonitorError, match="no page of Prometheus"):
        read_metrics("<html></html>")
    assert judge_health({})["state"].is_in(["ok", "unknown"]).all()


@pytest.fixture
def files(tmp_path):
    table_of(2000, 0).write_parquet(tmp_path / "train.parquet")
    table_of(2000, 1, 1.0).write_parquet(tmp_path / "today.parquet")
    return tmp_path


def test_the_command_compares_writes_and_exits_as_the_policy_says(files):
    assert "x0" in mlkit("monitor", "train.parquet", "--save", "baseline.json", cwd=files).stdout
    for policy, code in (("warn", 0), ("fail", 1), ("retrain", 1)):
        mlkit("monitor", "baseline.json", "today.parquet", "--policy", policy, "--verdict", "verdict.json", check=code, cwd=files)
        assert json.loads((files / "verdict.json").read_text())["state"] == policy
    outputs = ("--html", "out/drift.html", "--json", "out/drift.json", "--prometheus", "out/drift.prom", "--alert-rules", "out/rules.yml", "--dashboard", "out/grafana.json")
    mlkit("monitor", "train.parquet", "today.parquet", *outputs, cwd=files)
    assert all((files / name).stat().st_size > 500 for name in outputs[1::2])
    assert json.loads(mlkit("monitor", "train.parquet", "train.parquet", "--json", "-", cwd=files).stdout)["verdict"]["state"] == "ok"
    mlkit("monitor", "train.parquet", "today.parquet", "--ignore", "x0", "--policy", "fail", check=None, cwd=files)
    mlkit("monitor", "train.parquet", "today.parquet", "--limit", "x0=0.9", "--limit", "(all together)=1", "--policy", "fail", cwd=files)


def test_late_labels_tell_their_delay_and_the_report_since_when(files):
    n, when = 2000, pl.datetime(2026, 1, 1) + pl.duration(minutes=pl.int_range(pl.len()))
    now = table_of(n, 3).with_columns(x0=pl.col("x0") + pl.when(pl.int_range(n) < 1500).then(0.0).otherwise(1.5), id=pl.int_range(n), prediction=pl.lit("a"), asked=when)
    now.write_parquet(files / "log.parquet")
    labels = now.select("id", label=pl.when(pl.int_range(n) < 1000).then(pl.lit("a")).otherwise(pl.lit("b")), came=pl.col("asked").dt.offset_by("2h"))[:1500]
    pl.concat([labels.with_columns(label=pl.lit("early"), came=pl.col("came").dt.offset_by("-1h")), labels]).write_csv(files / "labels.csv")
    words = ("monitor", "train.parquet", "log.parquet", "--labels", "labels.csv", "--key", "id", "--labelled", "came", "--time", "asked")
    found = json.loads(mlkit(*words, "--html", "page.html", "--json", "-", cwd=files).stdout)
    assert {r["measure"]: r["value"] for r in found["health"]} == {"labels that have come": 0.75, "delay of labels, half": 7200.0, "delay of labels, 90 %": 7200.0}
    changes = {(r["column"], r["direction"]): r["since"] for r in found["changes"]}
    assert set(changes) == {("x0", "up"), ("wrong answers", "up")}
    assert "2026-01-02 00:" in changes["x0", "up"] or "2026-01-02 01:" in changes["x0", "up"]
    assert "changed since" in (files / "page.html").read_text() and "Since when" in (files / "page.html").read_text()
    assert "CUSUM" in mlkit(*words, cwd=files).stdout
    for column, said in (("gone", "gone"), ("id", "times are needed")):
        assert said in mlkit(*words[:-4], "--labelled", column, "--time", "asked", check=2, cwd=files).stderr


def test_a_wrong_request_names_what_is_wrong(files):
    (files / "odd.json").write_text("{}")
    wrong = {
        ("train.parquet", "nowhere.csv"): "nowhere.csv", ("odd.json", "today.parquet"): "no profile", (): "name a baseline", ("train.parquet", "today.parquet", "--limit", "x0"): "COLUMN=EFFECT",
        ("train.parquet", "today.parquet", "--time", "x00"): "x00", ("train.parquet", "today.parquet", "--metrics", "gone.prom"): "gone.prom", ("train.parquet", "today.parquet", "--bundle", "gone"): "gone",
        ("train.parquet", "today.parquet", "--ignore", "x00"): 'a column "x00" that neither table has', ("train.parquet", "today.parquet", "--limit", "x0=7"): "from 0 to 1", ("train.parquet", "today.parquet", "--html", "."): "cannot be written",
    }  # fmt: skip
    for words, said in wrong.items():
        assert said in mlkit("monitor", *words, check=2, cwd=files).stderr
    assert "from 0 to 1" in mlkit("monitor", "train.parquet", "today.parquet", "--effect", "7", check=2, cwd=files).stderr
    assert "0 or more, is needed" in mlkit("monitor", "train.parquet", "today.parquet", "--min-rows", "-5", check=2, cwd=files).stderr


def test_folders_of_images_are_compared_by_what_the_images_show(tmp_path):
    for name, light in (("was", 0), ("same", 0), ("brighter", 90)):
        (tmp_path / name / "cats").mkdir(parents=True)
        for i in range(120):
            pixels = np.random.default_rng([i, name == "was"]).normal(90 + light, 20, (8, 8, 1)).clip(0, 255)
            (tmp_path / name / "cats" / f"{i}.png").write_bytes(encode_png(pixels.astype(np.uint8)))
    assert "OK" in mlkit("monitor", "was", "same", "--policy", "fail", cwd=tmp_path).stdout
    assert "image/brightness" in mlkit("monitor", "was", "brighter", "--policy", "fail", check=1, cwd=tmp_path).stdout


def test_times_may_be_text_as_in_csv_and_text_that_is_no_time_is_named(tmp_path):
    rows = pl.DataFrame({"id": range(200), "x": np.random.default_rng(0).normal(size=200), "at": ["2026-01-01 10:00:00"] * 200, "prediction": ["a", "b"] * 100})
    labels = pl.DataFrame({"id": range(100), "label": ["a", "b"] * 50, "came": ["2026-01-02 10:00:00"] * 100})
    rows.write_csv(tmp_path / "was.csv")
    rows.write_csv(tmp_path / "now.csv")
    rows.with_columns(at=pl.lit("monday")).write_csv(tmp_path / "odd.csv")
    labels.write_csv(tmp_path / "labels.csv")
    asked = "--labels", "labels.csv", "--key", "id", "--labelled", "came", "--time", "at"
    said = mlkit("monitor", "was.csv", "now.csv", *asked, cwd=tmp_path).stdout
    assert "1 d 0 h" in said and "50% of 200" in said and "retyped" not in said
    assert '"at" holds texts such as "monday" where times are needed' in mlkit("monitor", "was.csv", "odd.csv", *asked, check=2, cwd=tmp_path).stderr


def test_prometheus_accepts_rules_and_gauges(tmp_path):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    (tmp_path / "rules.yml").write_text(alert_rules())
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], check=True, capture_output=True)
    gauges = check(table_of(500, 0), table_of(500, 1, 1.0)).prometheus()
    subprocess.run(["promtool", "check", "metrics"], input=gauges, text=True, check=True, capture_output=True)
    assert {"templating", "panels", "title"} <= json.loads(dashboard()).keys()


@needs_chromium
def test_the_page_works_in_a_browser_without_a_network_and_with_the_keyboard(tmp_path):
    rng = np.random.default_rng(0)
    before, now = (table_of(2000, s, move).with_columns(prediction="c", label="c", day=pl.datetime(2026, 1, 1) + pl.duration(days=pl.int_range(pl.len()) // 400)) for s, move in ((0, 0.0), (1, 1.0)))
    now = now.with_columns(label=pl.when(pl.Series(rng.random(2000)) < 0.7).then("label").otherwise(pl.lit("f")))
    path = tmp_path / "page.html"
    path.write_text(check(before, now, time="day").page(), encoding="utf-8")
    assert path.stat().st_size < 500_000 and not re.search(r"<script|src=|https?://", path.read_text())
    with browser_page(path.as_uri(), offline=True) as (page, errors):
        assert page.locator("h1").inner_text() == "Something has changed" and not errors
        assert page.locator("h2").all_inner_texts()[:3] == ["Quality", "Quality over time", "Columns"]
        closed = page.locator("details:not([open])").first
        name = closed.locator("b").first.inner_text()
        closed.locator("summary").focus()
        page.keyboard.press("Enter")
        assert page.locator("details[open]", has=page.get_by_text(name, exact=True)).locator("svg").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
