"An optimised network is faster here, about as good, a bundle again, or it is refused with a reason."

import json
import subprocess
import sys

import numpy as np
import onnx
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import mlkit
from onnx import TensorProto, helper, numpy_helper

from mlkit.bundle import Bundle, BundleError, Manifest, Tensor, package, read_bundle, write_bundle
from mlkit.bundle.predict import open_session
from mlkit.core.errors import MLKitError
from mlkit.data import ImagePreprocess, load
from mlkit.optimize import Budget, Retrain, compare, ratios, search, static_int8, time_in_turn, write_variant
from mlkit.optimize.candidates import as_packaged
from mlkit.optimize.searching import RECIPES

DIGITS = load("digits-small")
QUICK = {"seconds": 0.05, "progress": False}


def network(wide=1024, weights=lambda w: w) -> bytes:
    "A network of two layers with random weights: 8x8 images in, ten scores out."
    random = np.random.default_rng(0)
    first, second = (random.normal(size=shape).astype(np.float32) / 100 for shape in ((64, wide), (wide, 10)))
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "first"], ["wide"]),
        helper.make_node("Relu", ["wide"], ["bent"]),
        helper.make_node("MatMul", ["bent", "second"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    constants = [numpy_helper.from_array(first, "first"), numpy_helper.from_array(weights(second), "second")]
    graph = helper.make_graph(nodes, "two layers", [image], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


MANIFEST = Manifest(
    name="two-layers",
    task="classification",
    inputs=(Tensor("image", "uint8", ("batch", 1, 8, 8)),),
    outputs=(Tensor("logits", "float32", ("batch", 10)),),
    preprocess={"image": ImagePreprocess(8, 8, 1).to_dict()},
    labels=tuple("0123456789"),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return package(tmp_path_factory.mktemp("made") / "model", network(), MANIFEST, DIGITS.head(8), files={"notes.txt": b"kept"})


@pytest.fixture(scope="module")
def rows(bundle):
    "Digits whose label is what the network answers."
    return DIGITS.select("image", label=bundle.predict(DIGITS)["prediction"])


@pytest.fixture(scope="module")
def table(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    rows.write_parquet(path)
    return path


@pytest.fixture(scope="module")
def found(bundle, rows):
    return search(bundle, rows, Budget(max_drop=0.1), label="label", **QUICK)


def test_every_recipe_is_accounted_for_with_numbers_or_a_reason(found):
    assert set(found.table["name"]) == {"as packaged", *(", ".join(r) for r in RECIPES)}
    for trial in found.trials:
        assert trial.refused or trial.loss and trial.ms > 0
    impossible = found.table.filter(name="fused").row(0, named=True)
    assert impossible["verdict"].startswith("not possible") and impossible["ms"] is None
    assert {"cpu", "features", "threads"} <= found.machine.keys()


def test_what_is_chosen_is_never_slower_than_the_original(found):
    assert found.chosen.ratio_low <= 1 and not found.chosen.refused
    for trial in found.trials:
        if trial.ratio_low and trial.ratio_low > 1:
            assert any("slower" in reason for reason in trial.refused)


def test_a_variant_is_a_bundle_that_names_its_parent_and_keeps_what_it_carried(found, bundle, tmp_path):
    taken = found.take("static int8 (minmax)").save(tmp_path / "int8", metrics={"accuracy": 0.9})
    provenance = taken.manifest.provenance
    assert provenance["steps"] == ["static int8 (minmax)"] and len(provenance["parent"]) == 64
    assert taken.manifest.metrics == {"accuracy": 0.9} and taken.manifest.labels == bundle.manifest.labels
    assert read_bundle(tmp_path / "int8")[1]["notes.txt"] == b"kept"
    assert bundle.manifest.tolerance < taken.manifest.tolerance < 0.5
    assert (tmp_path / "int8/model.onnx").stat().st_size < 0.5 * (bundle.folder / "model.onnx").stat().st_size


def test_equal_steps_give_equal_bundles_byte_for_byte(found, tmp_path):
    for name in ("one", "two"):
        found.take("static int8 (minmax)").save(tmp_path / name)
    assert (tmp_path / "one/bundle.json").read_bytes() == (tmp_path / "two/bundle.json").read_bytes()


def test_another_network_in_a_variant_is_noticed(found, tmp_path):
    taken = found.take("static int8 (minmax)").save(tmp_path / "int8")
    _, contents = read_bundle(taken.folder)
    write_bundle(taken.folder, taken.manifest, contents | {"model.onnx": network(weights=lambda w: w[::-1].copy())})
    with pytest.raises(BundleError, match="golden answers differ"):
        Bundle.load(taken.folder)


def test_the_original_is_saved_as_it_is_when_nothing_beats_it(bundle, rows, tmp_path):
    kept = search(bundle, rows, label="label", recipes=(), **QUICK).save(tmp_path / "kept")
    assert (kept.folder / "bundle.json").read_bytes() == (bundle.folder / "bundle.json").read_bytes()


def test_a_network_that_answers_otherwise_is_refused_for_what_it_loses(bundle, rows, monkeypatch):
    from mlkit.optimize import searching

    monkeypatch.setitem(searching.STEPS, "shuffled", lambda model, feeds: network(wide=64))
    trial = search(bundle, rows, label="label", recipes=(("shuffled",),), **QUICK).trials[1]
    assert trial.drop > 0.3 and trial.loss.low > 0.2 and any("loses" in reason for reason in trial.refused)


def test_a_step_that_breaks_the_network_spoils_nothing_else(bundle, rows, monkeypatch):
    from mlkit.optimize import searching

    def crash(model, feeds):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(searching.STEPS, "crashes", crash)
    monkeypatch.setitem(searching.STEPS, "damaged", lambda model, feeds: model[: len(model) // 2])
    result = search(bundle, rows, label="label", recipes=(("crashes",), ("damaged",), ("static int8 (minmax)",)), **QUICK)
    refused = {t.name: t.refused for t in result.trials}
    assert "out of luck" in refused["crashes"][0] and "does not run" in refused["damaged"][0]
    assert result.chosen is not None and len(result.trials) == 4


def test_a_network_that_takes_single_rows_only_spoils_nothing_else(bundle, rows, monkeypatch):
    from mlkit.optimize import searching

    def single(model, feeds):
        made = onnx.load_from_string(model)
        made.graph.node[1].CopyFrom(helper.make_node("Reshape", ["x", "one row"], ["flat"]))
        made.graph.initializer.append(numpy_helper.from_array(np.array([1, 64]), "one row"))
        return made.SerializeToString()

    monkeypatch.setitem(searching.STEPS, "single", single)
    result = search(bundle, rows, label="label", recipes=(("single",), ("static int8 (minmax)",)), **QUICK)
    refused = {t.name: t.refused for t in result.trials}
    assert "does not run" in refused["single"][0] and result.chosen is not None and len(result.trials) == 3


def test_without_labels_the_answers_of_before_count(bundle, rows, monkeypatch):
    from mlkit.optimize import searching

    monkeypatch.setitem(searching.STEPS, "narrow", lambda model, feeds: network(wide=64))  # surely faster, so it is judged
    trial = search(bundle, rows.drop("label"), recipes=(("narrow",),), **QUICK).trials[1]
    assert trial.loss.against == "before" and trial.drop > 0


def test_a_search_needs_no_torch(bundle, table):
    code = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "pytorch_lightning", "timm", "torch_pruning"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
from mlkit.optimize import search
print(search(sys.argv[1], sys.argv[2], label="label", seconds=0.05).table.height)
"""
    done = subprocess.run([sys.executable, "-c", code, str(bundle.folder), str(table)], capture_output=True, text=True)
    assert done.stdout.strip() == str(1 + len(RECIPES)), done.stderr


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: f[:1], "too few"),
        (lambda f: f.rename({"label": "lable"}), 'Did you mean "lable"'),
        (lambda f: f.rename({"image": "imgae"}), 'the data has no column "image". Did you mean "imgae"'),
        (lambda f: f.with_columns(label=pl.lit("cat")), "none of the classes"),
        (lambda f: f.with_columns(label=pl.lit(None, pl.String)), 'have no "label"'),
        (lambda f: f.with_columns(split=pl.lit("train")), "leaves 1797 rows to calibrate with and 0"),
        (lambda f: f.with_columns(image=pl.lit(b"no image")), "cannot be used"),
    ],
)
def test_data_that_do_not_suffice_are_named(bundle, rows, change, words):
    with pytest.raises(MLKitError, match=words):
        search(bundle, change(rows), label="label", **QUICK)


def test_a_network_of_another_signature_is_never_written_over_a_good_variant(found, bundle, tmp_path):
    good = found.take("static int8 (minmax)").save(tmp_path / "int8")
    before = (good.folder / "bundle.json").read_bytes()
    with pytest.raises(BundleError):
        write_variant(bundle.folder, good.folder, as_packaged(bundle.folder).then("renamed", network().replace(b"logits", b"Logits")))
    assert (good.folder / "bundle.json").read_bytes() == before


def test_the_command_line_writes_what_meets_the_budget(bundle, table, tmp_path):
    done = mlkit("optimize", bundle.folder, table, "--max-drop", "0.2", "--seconds", "0.05", "-o", tmp_path / "fast", "--json", tmp_path / "all.json")
    assert "static int8 (entropy)" in done.stdout and "Measured on" in done.stdout
    assert Bundle.load(tmp_path / "fast").predict(DIGITS.head(3)).height == 3
    told = json.loads((tmp_path / "all.json").read_text())
    assert told["chosen"] and len(told["candidates"]) == 1 + len(RECIPES) and "features" in told["machine"]


def test_a_missed_budget_shows_the_best_effort_and_exits_with_1(bundle, table, tmp_path):
    done = mlkit("optimize", bundle.folder, table, "--latency-ms", "0.000001", "--seconds", "0.05", "-o", tmp_path / "fast", check=1)
    assert "Nothing meets the budget. Nearest comes" in done.stdout
    assert not (tmp_path / "fast").exists()


def test_wrong_requests_are_refused_before_any_work(bundle, table, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    for words, told in [
        ((bundle.folder, table, "-o", tmp_path / "mine"), "is no bundle"),
        ((bundle.folder, table, "--max-drop", "50"), "max_drop is a share"),
        ((bundle.folder, table, "--size-mb", "0"), "more than 0"),
        ((bundle.folder, table, "--label", "lable"), 'Did you mean "label"'),
        ((bundle.folder, tmp_path / "none.csv"), "no file"),
        ((tmp_path / "none", table), "no bundle"),
        ((bundle.folder, table, "-o", tmp_path / "mine/notes.txt/below"), "notes.txt is no folder"),
        ((bundle.folder, table, "--json", tmp_path / "mine"), "is a folder"),
        ((bundle.folder, table, "--seconds", "nan"), "more than 0 seconds"),
    ]:
        assert told in mlkit("optimize", *words, check=2).stderr
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_int8_has_no_doubles_and_keeps_the_types_at_its_borders(bundle):
    feeds = [{"image": np.zeros((4, 1, 8, 8), np.uint8) + i} for i in range(4)]
    made = onnx.load_from_string(static_int8(network(), feeds, "minmax"))
    onnx.checker.check_model(made)
    assert made.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert made.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_a_table_of_embeddings_is_rounded_as_well():
    random = np.random.default_rng(0)
    constants = [numpy_helper.from_array(random.normal(size=shape).astype(np.float32), name) for name, shape in (("table", (2000, 64)), ("weights", (64, 8)))]
    nodes = [helper.make_node("Gather", ["table", "ids"], ["each"]), helper.make_node("MatMul", ["each", "weights"], ["scores"])]
    sides = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 5]), helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 5, 8])
    graph = helper.make_graph(nodes, "words", [sides[0]], [sides[1]], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    ids = random.integers(0, 2000, (16, 5))
    made = static_int8(model, [{"ids": ids}], "minmax")
    before, after = (open_session(m).run(None, {"ids": ids})[0] for m in (model, made))
    assert len(made) < 0.3 * len(model) and np.abs(after - before).max() < 0.05 * np.abs(before).max()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=200))
def test_a_comparison_is_honest_about_its_rows(pairs):
    truth = pl.Series(["a"] * len(pairs))
    before, after = (pl.DataFrame({"prediction": ["a" if p[i] else "b" for p in pairs]}) for i in (0, 1))
    there, back = compare("classification", before, after, truth), compare("classification", after, before, truth)
    assert there.drop == pytest.approx(sum(p[0] - p[1] for p in pairs) / len(pairs))
    assert there.low <= there.drop <= there.high and 0 <= there.p <= 1
    assert there.drop == pytest.approx(-back.drop) and there.p == pytest.approx(back.p)


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        times = pl.DataFrame({"a": random.lognormal(0, 0.3, 25), "b": 2 * random.lognormal(0, 0.3, 25)})
        _, _, _, low, high = ratios(times, "a").row(1)
        covered += low <= 2 <= high
    assert 0.92 <= covered / 300 <= 1


def test_calls_take_turns_on_the_same_inputs():
    seen = {"a": [], "b": []}
    time_in_turn({name: lambda given, name=name: seen[name].append(given) for name in seen}, [1, 2, 3], rounds=9, at_least=0)
    assert [dict.fromkeys(values) for values in seen.values()] == [{1: None, 2: None, 3: None}] * 2


def test_pruned_and_aware_networks_are_candidates_too(tmp_path):
    from mlkit.train import fit
    from mlkit.vision import ImageClassifier, ImageData

    data = ImageData(DIGITS.head(300), augment=None, batch_size=32)
    result = fit(ImageClassifier("test_resnet", data), data, epochs=1, threads=1, progress=False)
    parent, digest = result.bundle(tmp_path / "model"), {n: p.clone() for n, p in result.model.state_dict().items()}
    retrain = Retrain(result.model, data, epochs=1, prune=(0.5, 1.5), student=ImageClassifier("test_resnet", data, seed=1), options={"threads": 1, "progress": False})
    found = search(parent, data.frame, Budget(max_drop=0.9), label="label", recipes=(("static int8 (minmax)",),), retrain=retrain, **QUICK)
    sizes = {t.name: t.size_mb for t in found.trials}
    assert sizes["pruned 50%"] < 0.6 * sizes["as packaged"] and "distilled" in sizes
    assert "between 0 and 1" in next(t for t in found.trials if t.name == "pruned 150%").refused[0], "one training that fails spoiled the search, or was left out"
    assert all(bool((p == digest[n]).all()) for n, p in result.model.state_dict().items()), "the original was changed"
    assert found.take("pruned 50%").save(tmp_path / "small").manifest.provenance["steps"] == ["pruned 50%"]
