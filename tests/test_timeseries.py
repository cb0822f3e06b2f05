"Series become windows become forecasts become bundles, whatever the series are."

import json
import subprocess
import sys
import tracemalloc
import warnings
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlkit.bundle import Bundle, BundleError
from mlkit.data.series import Grid, Panel, SeriesError, SeriesPreprocess, TimePreprocess, make_panel, open_panel, write_panel
from mlkit.timeseries import Baseline, Forecaster, SeriesData, anomalies, backtest, draw_anomalies, ensemble, evaluate_forecasts, forecaster, request_rows, solve
from mlkit.timeseries.data import permuted
from mlkit.timeseries.hierarchy import METHODS, Hierarchy, make_hierarchy, projection, reconcile
from mlkit.timeseries.networks import FAMILIES, fill
from mlkit.train import fit, use_threads, weights_digest

use_threads(1)
QUIET = {"progress": False, "threads": 1}


def hourly(n: int = 600, series=("a", "b"), seed: int = 0) -> pl.DataFrame:
    "Days that look alike, with noise, a level for each series and what drives it."
    random, parts = np.random.default_rng(seed), []
    for k, name in enumerate(series):
        hours, warm = np.arange(n), random.normal(size=n)
        value = 100 * (k + 1) + 10 * np.sin(hours / 24 * 2 * np.pi) + 3 * warm + random.normal(size=n)
        time = [datetime(2026, 1, 1) + timedelta(hours=int(h)) for h in hours]
        parts.append(pl.DataFrame({"time": time, "id": [name] * n, "value": value, "warm": warm, "size": [float(k)] * n, "kind": [f"kind {name}"] * n}))
    return pl.concat(parts)


def data(frame=None, **more) -> SeriesData:
    return SeriesData(hourly() if frame is None else frame, **{"series": "id", "horizon": 12, "context": 48, "validation": 96, "test": 96, "batch_size": 64} | more)


def test_a_permutation_needs_no_memory_and_loses_nothing():
    for n in (1, 7, 4096, 4097):
        assert np.array_equal(np.sort(permuted(np.arange(n), n, 3)), np.arange(n))
    assert permuted(np.array([0, 10**12 - 1]), 10**12, 1).max() < 10**12


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.randoms())
def test_every_window_is_the_slice_that_it_says(lengths, context, horizon, stride, chance):
    values = [[chance.choice([float("nan"), float(i)]) for i in range(n)] for n in lengths]
    values[0][-1] = 1.0
    flat, offsets = np.concatenate(values).astype(np.float32), np.concatenate([[0], np.cumsum(lengths)])
    panel = Panel(tuple(map(str, range(len(lengths)))), offsets, np.zeros(len(lengths), np.int64), Grid(1, "n"), {"value": flat}, "value")
    own = SeriesData(panel, horizon=horizon, context=context, validation=horizon, test=horizon, stride=stride, train=False)
    for side in ("train", "validation", "test", "future"):
        windows = own.windows(side)
        if not len(windows):
            continue
        batch, (series, origin) = windows[np.arange(len(windows))], windows.places(np.arange(len(windows)))
        for row, s, o in zip(range(len(series)), series, origin - offsets[series]):
            padded = np.concatenate([np.full(context, np.nan), values[s], np.full(horizon, np.nan)])
            expected = padded[o : o + context + horizon]
            found = torch.cat([batch["history"][row], batch["target"][row]]).numpy()
            assert np.array_equal(found, expected.astype(np.float32), equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-5, 5, width=32)), min_size=1, max_size=30), st.integers(1, 7))
def test_filling_keeps_what_was_seen_and_leaves_no_gap(values, season):
    x = torch.tensor([[float("nan") if v is None else v for v in values]])
    filled = fill(x, season)
    assert filled.isfinite().all() and torch.equal(filled[x.isfinite()], x[x.isfinite()])


def test_no_window_of_training_sees_the_test_part():
    spoilt = hourly().with_columns(value=pl.when(pl.int_range(pl.len()).over("id") >= 600 - 96).then(1e9).otherwise("value"))
    for side in ("train", "validation"):
        for batch in data(spoilt).loader(side):
            assert batch["history"].max() < 1e6 and batch["target"].max() < 1e6


SCRIPT = """
import resource, sys
import numpy as np
from mlkit.data.series import Grid, Panel
from mlkit.timeseries import Forecaster, SeriesData
from mlkit.train import fit
series, points = 32, 50_000
def train(points):
    values = np.random.default_rng(0).normal(size=series * points).astype(np.float32)
    panel = Panel(tuple(map(str, range(series))), np.arange(series + 1) * points, np.zeros(series, np.int64), Grid(1, "n"), {"value": values}, "value")
    data = SeriesData(panel, horizon=96, context=336, season=24, batch_size=1024)
    assert len(data.windows("train")) > series * (points - 1000)
    fit(Forecaster("linear", data), data, epochs=1, threads=1, progress=False, limit_train_batches=20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = train(1_000)
print((train(points) - small) / 1024)
"""


def test_memory_is_that_of_the_data_not_of_its_windows():
    megabytes = float(subprocess.check_output([sys.executable, "-c", SCRIPT], text=True, stderr=subprocess.DEVNULL).split()[-1])
    assert megabytes < 60, "32 series of 50,000 points are 6.4 MB; their windows would be 2.7 GB"


def test_a_mapped_panel_trains_without_being_read_into_memory(tmp_path):
    mapped = write_panel(hourly().lazy(), tmp_path, "value", series="id", covariates=["warm"], statics=["kind"], rows=700)
    assert isinstance(mapped.values["value"], np.memmap)
    own = SeriesData(open_panel(tmp_path), known=["warm"], statics=["kind"], horizon=12, context=48, validation=96, test=96, season=24)
    inside = SeriesData(hourly(), series="id", known=["warm"], statics=["kind"], horizon=12, context=48, validation=96, test=96)
    models = [fit(Forecaster("linear", d), d, epochs=1, **QUIET).model for d in (own, inside)]
    assert weights_digest(models[0].network) == weights_digest(models[1].network)


def test_a_mapped_series_is_measured_piece_by_piece(tmp_path):
    values = np.random.default_rng(0).normal(5, 2, 12_000_000).astype(np.float32)
    values[3_000_000:3_000_500] = values[-40:] = np.nan
    values.tofile(tmp_path / "values")
    panel = Panel(("one",), np.array([0, len(values)]), np.zeros(1, np.int64), Grid(1, "n"), {"value": np.memmap(tmp_path / "values", np.float32, "r")}, "value")
    tracemalloc.start()
    own = SeriesData(panel, horizon=24, context=96, season=24)
    units, peak = own.units, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seen = values[: own.borders["train"][1][0]].astype(np.float64)
    assert own.borders["future"][0] == len(values) - 40 and peak < values.nbytes
    assert np.allclose(units["deviation"], np.nanstd(seen)) and np.allclose(units["seasonal_error"], np.nanmean(np.abs(seen[24:] - seen[:-24])))


def test_every_family_learns_and_a_bundle_of_all_of_them_answers_alike(tmp_path):
    own = data(known=["warm"], statics=["kind", "size"], calendar=True)
    models = []
    for arch in FAMILIES:
        untrained = Forecaster(arch, own, lr=5e-3, seed=1)
        before = untrained.evaluate(own, "validation").metrics()["mae"]
        models.append(fit(untrained, own, epochs=2, **QUIET).model)
        assert models[-1].evaluate(own, "validation").metrics()["mae"] < before, arch
    model = ensemble(models).calibrate(own)
    bundle, windows = model.export_bundle(tmp_path / "bundle", own), own.windows("test")
    rows = request_rows(model, own, windows, [0, 40, 100])
    rows = rows.with_columns(history=pl.Series([[None, *row[1:]] for row in rows["history"].to_list()]))
    batch = windows[[0, 40, 100]]
    batch["history"][:, 0] = float("nan")
    assert np.allclose(bundle.predict(rows)["prediction"].to_numpy(), model.forecast(batch)[..., 3], rtol=1e-3, atol=1e-2)
    assert set(Bundle.load(tmp_path / "bundle").manifest.preprocess) == {"history", "warm", "time", "kind", "size"}


def test_a_covariate_that_drives_the_series_is_used():
    with_it, without = data(known=["warm"], batch_size=32), data(batch_size=32)
    errors = [fit(Forecaster("linear", d, lr=1e-2), d, epochs=8, **QUIET).evaluate("test").metrics()["mae"] for d in (with_it, without)]
    assert errors[0] < 0.75 * errors[1]


def test_scales_of_series_past_covariates_and_quantiles_travel_with_the_bundle(tmp_path):
    own = data(past=["warm"])
    model = fit(Forecaster("linear", own, quantiles=(0.1, 0.5, 0.9), scale="series", lr=1e-2), own, epochs=3, **QUIET).model
    assert model.evaluate(own).metrics()["crps"] > 0 and model.calibrate(own).evaluate(own).metrics()["coverage"] > 0.75
    bundle = model.export_bundle(tmp_path / "bundle", own)
    rows = request_rows(model, own, own.windows("test"), [3])
    assert np.allclose(bundle.predict(rows)["prediction"].to_numpy(), model.forecast(own.windows("test")[[3]])[..., 3], rtol=1e-4)
    with pytest.raises(BundleError, match="does not know 'c'"):
        bundle.predict(rows.with_columns(series=pl.lit("c")))


def test_a_forecaster_that_needs_nothing_but_history_is_packaged(tmp_path):
    own = data()
    model = solve(own).calibrate(own)
    bundle, windows = model.export_bundle(tmp_path / "bundle", own), model.suited(own).windows("test")
    rows = request_rows(model, own, windows, [3])
    assert rows.columns == ["history"]
    assert np.allclose(bundle.predict(rows)["prediction"].to_numpy(), model.forecast(windows[[3]])[..., 3], rtol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    own = data()
    digests = [weights_digest(fit(Forecaster("perceptron", own, width=16, seed=s), own, epochs=1, seed=s, **QUIET).model.network) for s in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_intervals_cover_what_they_promise_on_fresh_series():
    own = data(hourly(1500, seed=1), validation=400, test=400)
    found = evaluate_forecasts(solve(own).calibrate(own), own).metrics()
    assert 0.86 <= found["coverage"] <= 0.94


def test_a_constant_series_is_forecast_as_itself_and_breaks_nothing():
    flat = pl.DataFrame({"time": range(300), "value": [5.0] * 300})
    own = SeriesData(flat, horizon=6, context=24)
    for model in (solve(own, contexts=[24]), fit(Forecaster("linear", own), own, epochs=1, **QUIET).model):
        assert np.allclose(model.predict(flat)["forecast"], 5.0, atol=1e-3)
    metrics = evaluate_forecasts(Baseline("naive", own.spec), own).metrics()
    assert metrics["mae"] == 0 and json.dumps(metrics)


def test_quantiles_never_cross_before_or_after_calibration(tmp_path):
    own = data(hourly(400))
    model = fit(Forecaster("perceptron", own, quantiles=(0.1, 0.3, 0.5, 0.7, 0.9), width=16, lr=3e-2), own, epochs=1, **QUIET).model
    batch = next(iter(own.loader("test")))
    assert (np.diff(model.forecast(batch)) >= 0).all()
    assert (np.diff(model.calibrate(own).forecast(batch)) >= 0).all()
    rows = request_rows(model, own, own.windows("test"), [3])
    found = model.export_bundle(tmp_path / "bundle", own).predict(rows)
    assert np.allclose(found["q0.95"].to_numpy(), model.forecast(own.windows("test")[[3]])[..., -1], rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*series are not forecast")
def test_a_series_without_a_value_is_neither_trained_on_nor_forecast():
    silent = hourly(400).with_columns(value=pl.when(pl.col("id") == "a").then("value"))
    own = data(silent)
    assert len(own.windows("train")) == len(data(silent.filter(id="a")).windows("train"))
    model = solve(own)
    assert model.predict(silent)["series"].unique().to_list() == ["a"]
    few = silent.with_columns(value=pl.when((pl.col("id") == "a") | (pl.int_range(pl.len()).over("id") < 11)).then(1.0))
    assert model.predict(few)["series"].unique().to_list() == ["a"], "11 points are fewer than one horizon"
    with pytest.raises(SeriesError, match="12 known values are needed before the horizon, the longest series has 1"):
        model.predict(hourly(1))


def test_the_error_scaled_by_a_constant_past_is_not_a_number_rather_than_perfect():
    step = pl.DataFrame({"time": range(300), "value": [5.0] * 290 + [9.0] * 10})
    own = SeriesData(step, horizon=6, context=24, validation=20, test=20)
    metrics = evaluate_forecasts(Baseline("naive", own.spec), own).metrics()
    assert np.isnan(metrics["mase"]) and metrics["mae"] > 0


def test_a_missing_static_number_counts_as_average_and_leaves_the_others_their_say():
    frame = hourly(400, ("a", "b", "c"))
    holed = data(frame.with_columns(size=pl.when(pl.col("id") != "c").then("size")), statics=["size"])
    beside = Forecaster("linear", holed).network.beside
    assert beside.centre.tolist() == [0.5] and beside.spread.tolist() == [0.5]


def test_the_calendar_is_that_of_the_zone_that_was_trained_in():
    times = pl.datetime_range(datetime(2026, 3, 20), datetime(2026, 4, 10), "1h", time_zone="Europe/Berlin", eager=True)
    local = pl.DataFrame({"time": times, "value": np.sin(np.arange(len(times)) / 24 * 2 * np.pi)})
    own = SeriesData(local, horizon=6, context=24, calendar=True)
    model = fit(Forecaster("linear", own), own, epochs=1, **QUIET).model
    with pytest.raises(SeriesError, match="in UTC, the model knows the calendar in Europe/Berlin"):
        model.predict(local.with_columns(pl.col("time").dt.convert_time_zone("UTC")))


def forecaster_of(**more):
    return Forecaster("linear", data(), **more)


MISTAKES = {
    "a target that is also known": (lambda: data(known=["value"]), '"value" is named twice'),
    "a target twice": (lambda: SeriesData(hourly(100, "a"), ["value", "value"], horizon=2), "named twice"),
    "a horizon of a half": (lambda: data(horizon=2.5), "horizon must be a whole number"),
    "a season of nothing": (lambda: data(season=0), "season must be a whole number"),
    "levels that fall": (lambda: forecaster_of(quantiles=(0.9, 0.1)), "levels must rise"),
    "no levels": (lambda: forecaster_of(quantiles=()), "levels must rise"),
    "an option of another network": (lambda: forecaster_of(width=3), 'linear network has no option "width"'),
    "a covariate unseen in training": (lambda: Forecaster("linear", data(hourly().with_columns(warm=pl.when(pl.int_range(pl.len()).over("id") > 560).then("warm")), known=["warm"])), "no number in the training part"),
    "a series without its kind": (lambda: data(hourly().with_columns(kind=pl.when(pl.col("id") == "a").then("kind")), statics=["kind"]), "no name for 1 of 2 series"),
    "a pandas frame": (lambda: data(hourly().to_pandas()), "not from DataFrame: use pl.from_pandas"),
    "numbers beyond 32 bits": (lambda: data(hourly().with_columns(pl.col("value") * 1e300)), "replace infinities"),
    "a backtest of nothing": (lambda: backtest(data(), {}), "nothing to backtest"),
    "a backtest without a step": (lambda: backtest(data(), {"naive": Baseline("naive", data().spec)}, step=0), "folds and step"),
    "no lead": (lambda: anomalies(Baseline("naive", data().spec), data(), lead=0), "lead must be between"),
    "a horizon of True": (lambda: data(horizon=True), "horizon must be a whole number"),
    "a side that begins at no time": (lambda: data(test="yesterday"), '"test" holds \'yesterday\', which is no time'),
    "epochs of no windows": (lambda: data(windows_per_epoch=0), "windows_per_epoch must be"),
    "a recipe of no windows": (lambda: forecaster(data(), "linear", windows=-1, progress=False), "windows_per_epoch must be"),
    "a recipe of nothing": (lambda: forecaster(data(), None), 'no recipe "None"'),
    "a frame that is not laid out": (lambda: forecaster(hourly()), "laid out first, SeriesData"),
    "a frame to judge by": (lambda: solve(data()).evaluate(hourly()), "laid out first, SeriesData"),
    "a name for a forecaster": (lambda: backtest(data(), {"ridge": "ridge"}), "is no forecaster"),
    "a backtest without names": (lambda: backtest(data(), solve(data())), "give models by name"),
    "a backtest of a half": (lambda: backtest(data(), {"naive": Baseline("naive", data().spec)}, folds=1.5), "folds and step must be whole"),
    "a baseline of data": (lambda: Baseline("naive", data()), "spec of the data"),
    "one level": (lambda: forecaster_of(quantiles=0.5), "levels must rise"),
    "levels in per cent": (lambda: solve(data()).calibrate(data(), levels=(5, 50, 95)), "levels must rise"),
    "a learning rate below 0": (lambda: forecaster_of(lr=-1), "lr must be a number above 0"),
    "a network without width": (lambda: Forecaster("perceptron", data(), width=0), "width must be a whole number"),
    "a network that drops all": (lambda: Forecaster("mixer", data(), dropout=1.0), "dropout must be 0 or more and below 1"),
    "heads that do not fit": (lambda: Forecaster("patch", data(), width=30), "multiple of the heads: 30 is none of 4"),
    "no context": (lambda: solve(data(), contexts=[0]), "contexts are whole numbers"),
    "one context": (lambda: solve(data(), contexts=24), "contexts are a list"),
    "a centre that is none": (lambda: solve(data(), centres=["median"]), 'Did you mean "mean"'),
    "no penalty": (lambda: solve(data(), penalties=[]), "penalties are a list"),
    "an ensemble of one": (lambda: ensemble(solve(data())), "made of a list of forecasters"),
    "a picture of no series": (lambda: draw_anomalies(anomalies(solve(data()), data()), "c"), 'no series "c". There are: a, b'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_meant_is_refused_in_words(name):
    call, words = MISTAKES[name]
    with pytest.raises(SeriesError, match=words):
        call()


def test_forecasts_start_after_the_last_known_value_of_each_series():
    short = hourly().filter((pl.col("id") == "a") | (pl.col("time") < datetime(2026, 1, 20)))
    ahead = solve(data()).predict(short)
    firsts = ahead.group_by("series").agg(pl.col("time").min()).sort("series")["time"].to_list()
    assert firsts == [short.filter(id=name)["time"].max() + timedelta(hours=1) for name in ("a", "b")]


def test_a_name_for_a_list_of_columns_is_one_column():
    own = data(known="warm", statics="kind", calendar="hour")
    assert (own.spec.known, own.spec.statics, own.spec.cycles) == (("warm",), ("kind",), ("hour",))
    assert make_hierarchy(hourly(50), [[], "id"])[1].nodes == ("total", "a", "b")


def test_series_that_are_too_short_to_be_forecast_are_named_and_may_be_forecast_all_the_same():
    short, model = pl.concat([hourly(), hourly(5, series=("new",))]), solve(data())
    with pytest.warns(UserWarning, match='1 of 3 series are not forecast, such as "new"'):
        assert set(model.predict(short)["series"]) == {"a", "b"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(model.predict(model.data(short, train=False, validation=0, test=0, least=1))["series"]) == {"a", "b", "new"}


def test_a_series_never_seen_in_training_can_be_forecast():
    other = hourly(100, series=("new",), seed=5)
    assert solve(data()).predict(other)["forecast"].is_finite().all()
    with pytest.raises(SeriesError, match="does not know the kind 'kind new'"):
        own = data(statics=["kind"])
        fit(Forecaster("linear", own), own, epochs=1, **QUIET).model.predict(other)


def test_gaps_cost_accuracy_and_nothing_else():
    random = np.random.default_rng(0)
    holes = hourly().filter(pl.Series(random.random(1200) > 0.2))
    assert solve(data(holes)).evaluate(data(holes)).metrics()["skill"] > 0
    trained = forecaster(data(holes), "linear", epochs=1, progress=False).evaluate(data(holes)).metrics()
    assert np.isfinite([v for k, v in trained.items()]).all()


def test_a_recipe_takes_enough_steps_on_few_data():
    few = data(hourly(260), validation=48, test=48)
    assert forecaster(few, "linear", progress=False, threads=1).evaluate(few).metrics()["skill"] > 0
    assert forecaster(few, "linear", epochs=1, progress=False, threads=1).evaluate(few).metrics()["skill"] < 0


def test_backtests_and_ensembles_refuse_what_cannot_be():
    own = data()
    model = solve(own)
    with pytest.raises(SeriesError, match="folds and step"):
        backtest(own, {"m": model}, folds=0)
    with pytest.raises(SeriesError, match="at least one model"):
        ensemble([])
    with pytest.raises(SeriesError, match="same horizon"):
        ensemble([model, solve(data(horizon=6))])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(0, 5), st.sampled_from(METHODS), st.integers(0, 2**32 - 1))
def test_reconciled_forecasts_add_up_and_are_the_nearest_that_do(bottom, upper, method, seed):
    random = np.random.default_rng(seed)
    sums = np.vstack([np.ones((1, bottom)), random.integers(0, 2, (upper, bottom)), np.eye(bottom)]).astype(float)
    nodes = tuple(str(i) for i in range(len(sums)))
    sums[:, 0] = np.maximum(sums[:, 0], sums.sum(1) == 0)
    tree, errors, made = Hierarchy(nodes, sums, nodes), random.normal(size=(40, len(sums))), random.normal(size=len(sums))
    found = projection(tree, method, errors) @ made
    assert np.allclose(found, sums @ found[-bottom:])
    assert np.allclose(projection(tree, method, errors) @ found, found)
    if method == "variance":
        spread = np.sqrt((errors**2).mean(0))
        nearest = np.linalg.lstsq(sums / spread[:, None], made / spread, rcond=None)[0]
        assert np.allclose(found, sums @ nearest)


def test_tables_that_do_not_add_up_are_refused():
    frame = hourly(100)
    with pytest.raises(SeriesError, match="share their time"):
        make_hierarchy(pl.concat([frame, frame]), [[], ["id"]])
    with pytest.raises(SeriesError, match='6 of 200 rows have no "id"'):
        make_hierarchy(frame.with_columns(id=pl.when(pl.int_range(pl.len()) > 5).then("id")), [[], ["id"]])
    table, tree = make_hierarchy(frame, [[], ["id"]])
    made = table.filter(pl.col("time") < datetime(2026, 1, 2)).select("series", "time", forecast="value")
    assert np.allclose(reconcile(made, tree)["forecast"], made["forecast"])
    with pytest.raises(SeriesError, match='"total" has no forecast for 2026-01-01'):
        reconcile(made.filter((pl.col("series") != "total") | (pl.col("time") > datetime(2026, 1, 1))), tree)


BAD = {
    "empty": (hourly().clear(), "no rows"),
    "all null": (hourly().with_columns(value=pl.lit(None, pl.Float64)), "holds no number at all"),
    "NaN": (hourly().with_columns(value=pl.lit(float("nan"))), "holds no number at all"),
    "infinite": (hourly().with_columns(value=pl.when(pl.int_range(pl.len()) == 7).then(float("inf")).otherwise("value")), "replace infinities"),
    "text": (hourly().with_columns(value=pl.col("value").cast(pl.String)), "numbers are needed"),
    "duplicates": (pl.concat([hourly(), hourly().head(3)]), "3 times occur twice"),
    "no series column named": (hourly().drop("id").with_columns(id=pl.lit("one")), "occur twice"),
    "mixed frequencies": (pl.concat([hourly(), hourly(200, ("c",)).with_columns(time=pl.datetime_range(datetime(2026, 1, 1), datetime(2026, 1, 1), "1h", eager=True).first() + pl.duration(minutes=15) * pl.int_range(200))]), "frequencies are mixed"),
    "null time": (hourly().with_columns(time=pl.when(pl.int_range(pl.len()) > 5).then("time")), '6 of 1,200 rows have no "time"'),
    "too short": (hourly(30), "no series is long enough"),
    "wild time": (pl.concat([hourly(), hourly(1, ("a",)).with_columns(time=pl.lit(datetime(2250, 1, 1)).cast(pl.Datetime("us")))]), "nearly all of them gaps"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_series_get_one_clear_error(name):
    frame, words = BAD[name]
    with pytest.raises(SeriesError, match=words):
        data(frame)


def test_unsorted_rows_make_no_difference():
    shuffled = make_panel(hourly().sample(fraction=1.0, shuffle=True, seed=3), "value", series="id")
    assert np.array_equal(shuffled.values["value"], make_panel(hourly(), "value", series="id").values["value"])


@pytest.mark.parametrize("values", [[[None, None]], [[]], [["x"]], [[1.0, float("inf")]], [None]])
def test_a_request_without_usable_history_is_refused_by_row(values):
    with pytest.raises(SeriesError, match="row 0|lists of numbers"):
        SeriesPreprocess(4)(pl.Series("history", values, strict=False))


def test_an_hour_that_no_clock_has_shown_is_refused_by_row_and_a_day_without_midnight_is_a_day():
    hourly_there, daily_there = TimePreprocess("1h", 3, 2, ("hour",), "Europe/Berlin"), TimePreprocess("1d", 3, 2, ("weekday",), "America/Sao_Paulo")
    with pytest.raises(SeriesError, match="row 1: there was no 2025-03-30 02:30:00 in Europe/Berlin"):
        hourly_there(pl.Series(["2025-03-30T01:30:00", "2025-03-30T02:30:00"]))
    assert np.isfinite(daily_there(pl.Series(["2018-11-04"]))).all(), "clocks there were put forward at midnight"


def test_a_year_of_clock_changes_is_one_grid():
    times = pl.datetime_range(datetime(2026, 1, 1), datetime(2026, 12, 31), "1h", time_zone="Europe/Berlin", eager=True)
    panel = make_panel(pl.DataFrame({"time": times, "value": np.arange(len(times))}), "value")
    assert panel.grid.every == "1h" and panel.lengths[0] == len(times)
    days = times.filter(times.dt.hour() == 0)
    daily = make_panel(pl.DataFrame({"time": days, "value": np.arange(len(days))}), "value")
    assert daily.grid.every == "1d" and daily.lengths[0] == len(days) and daily.frame()["time"].to_list() == days.to_list()
