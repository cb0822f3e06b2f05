"Models that were made elsewhere become bundles, or it is said why not."

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest

from makers import mlkit
from mlkit.bundle import Bundle, BundleError, from_onnx

KERAS = """
import sys
import keras, numpy as np, polars as pl
from mlkit.bundle import from_keras

place, kind = sys.argv[1:]
rows = pl.DataFrame({"measures": np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)})
layers = [keras.layers.Conv2D(4, 3, activation="relu"), keras.layers.BatchNormalization(), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3, activation="softmax")]
model = keras.Sequential([keras.Input((8, 8, 1)), *layers], name="small")
expected = keras.ops.convert_to_numpy(model(rows["measures"].to_numpy()))
if kind == "saved":
    model.export(place + "/saved", format="tf_saved_model", verbose=False)
    model = place + "/saved"
elif kind == "file":
    model.save(place + "/small.keras")
    model = place + "/small.keras"
bundle = from_keras(place + "/bundle", model, rows, "classification", probabilities=True, labels=("a", "b", "c"))
answers = bundle.predict(rows)["probabilities"].to_numpy()
assert np.allclose(answers, expected, atol=1e-5), (answers, expected)
"""


@pytest.mark.parametrize("backend, kind", [("torch", "live"), ("torch", "file"), ("tensorflow", "live"), ("tensorflow", "saved")])
def test_a_model_of_keras_answers_the_same_as_a_bundle(tmp_path, backend, kind):
    if missing := [name for name in ("keras", backend, *(["tf2onnx"] if backend == "tensorflow" else [])) if not find_spec(name)]:
        pytest.skip(f"{missing[0]} is not installed: pip install 'mlkit[keras]' {backend}")
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", KERAS, str(tmp_path), kind], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    code = "import sys; sys.modules |= dict.fromkeys(('torch', 'keras', 'tensorflow')); from mlkit.bundle import Bundle; print(Bundle.load(sys.argv[1]).manifest.name)"
    assert subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "bundle")], text=True).strip() in ("small", "saved")


def test_what_keras_cannot_open_is_told_in_a_line(tmp_path):
    if not find_spec("keras"):
        pytest.skip("keras is not installed: pip install 'mlkit[keras]'")
    (tmp_path / "half.keras").write_bytes(b"PK")
    pl.DataFrame({"x": [[1.0], [2.0]]}).write_parquet(tmp_path / "rows.parquet")
    for file in ("half.keras", "none.keras"):
        told = mlkit("bundle", "make", tmp_path / file, tmp_path / "rows.parquet", tmp_path / "made", check=2, timeout=300, env={**os.environ, "KERAS_BACKEND": "torch"}).stderr
        assert f"Keras cannot open {tmp_path / file}" in told and len(told.splitlines()) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["light_squeezenet", "light_shufflenet", "light_resnet50", "light_inception_v2"])
def test_old_files_for_one_image_are_set_free_or_refused(tmp_path, name):
    file = Path(onnx.__file__).parent / f"backend/test/data/light/{name}.onnx"
    if not file.exists():
        pytest.skip(f"this onnx ships no {name}")
    rows = pl.DataFrame({"pixels": np.random.default_rng(0).random((2, 3 * 224 * 224), np.float32)})
    [image] = [i.name for i in onnx.load(file).graph.input if i.name not in {w.name for w in onnx.load(file).graph.initializer}]
    try:
        bundle = from_onnx(tmp_path / "model", file, rows, inputs={image: "pixels"})
    except BundleError as error:
        assert "fails on" in str(error) or "batch" in str(error) or "rows" in str(error)
    else:
        assert len(bundle.predict(rows)) == 2


def test_an_export_with_weights_outside_of_its_folder_is_refused(tmp_path):
    weights = onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", d]) for n, d in (("x", 4), ("y", 3)))
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "below").mkdir()
    onnx.save(model, tmp_path / "below/m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "below/w.bin").rename(tmp_path / "w.bin")
    rows = pl.DataFrame({"x": [[1.0, 2.0, 3.0, 4.0]]})
    with pytest.raises(BundleError, match="no ONNX file that can be read"):
        from_onnx(tmp_path / "bundle", tmp_path / "below/m.onnx", rows)
    moved = onnx.load(tmp_path / "below/m.onnx", load_external_data=False)
    moved.graph.initializer[0].external_data[0].value = "../w.bin"
    onnx.save(moved, tmp_path / "below/m.onnx")
    with pytest.raises(BundleError, match="no ONNX file that can be read"):
        from_onnx(tmp_path / "bundle", tmp_path / "below/m.onnx", rows)
    assert not (tmp_path / "bundle").exists() and not list(tmp_path.glob(".bundle*"))
    with pytest.raises(BundleError):
        Bundle.load(tmp_path / "bundle")


def test_the_command_line_packages_what_it_is_given(tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", d]) for n, d in (("x", 4), ("chances", 4)))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Softmax", ["x"], ["chances"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), tmp_path / "sure.onnx")
    rows = pl.DataFrame({"x": [[0.0, 0.0, 9.0, 0.0], [1.0, 2.0, 3.0, 4.0]], "other": [1, 2]})
    rows.write_parquet(tmp_path / "rows.parquet")
    given = ("bundle", "make", tmp_path / "sure.onnx", tmp_path / "rows.parquet", tmp_path / "made", "--column", "x")
    assert "Bundle sure" in mlkit(*given, "--task", "classification", "--probabilities", "--labels", "a,b,c,d").stdout
    assert Bundle.load(tmp_path / "made").predict(rows)["prediction"].to_list() == ["c", "d"]
    assert "4 labels" in mlkit(*given, "--task", "classification", "--labels", "a,b", check=2).stderr
    assert 'no column "y"' in mlkit(*given[:-1], "y", "--task", "raw", check=2).stderr
    assert "Not a directory" in mlkit(*given[:4], tmp_path / "sure.onnx/below", "--column", "x", check=2).stderr
    assert "no folder with the config.json" in mlkit("bundle", "make", tmp_path / "none", tmp_path / "rows.parquet", tmp_path / "x", check=2).stderr
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    assert "are for ONNX and Keras" in mlkit("bundle", "make", tmp_path, tmp_path / "rows.parquet", tmp_path / "x", "--task", "raw", check=2).stderr
    assert not (tmp_path / "x").exists() and len(Bundle.load(tmp_path / "made").predict(rows)) == 2


def made_of(*nodes, given=onnx.TensorProto.FLOAT, gives=onnx.TensorProto.FLOAT, outputs=None) -> bytes:
    "An ONNX file that takes two numbers a row as x and gives as many as y, or whatever outputs are said."
    x, y = onnx.helper.make_tensor_value_info("x", given, ["n", 2]), onnx.helper.make_tensor_value_info("y", gives, ["n", 2])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("ai.onnx.ml", 3)]
    return onnx.helper.make_model(onnx.helper.make_graph(list(nodes), "made", [x], outputs or [y]), opset_imports=opsets, ir_version=10).SerializeToString()


PAIRS, NODE = pl.DataFrame({"x": [[1.0, 2.0], [3.0, -4.0]]}), onnx.helper.make_node


@pytest.mark.parametrize("kind, name", [(onnx.TensorProto.STRING, "string"), (onnx.TensorProto.BFLOAT16, "bfloat16")])
def test_what_numpy_has_no_numbers_for_is_named(tmp_path, kind, name):
    with pytest.raises(BundleError, match=f"y: {name}.*only numbers"):
        from_onnx(tmp_path / "model", made_of(NODE("Cast", ["x"], ["y"], to=kind), gives=kind), PAIRS)
    with pytest.raises(BundleError, match=f"x: {name}.*only numbers"):
        from_onnx(tmp_path / "model", made_of(NODE("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT), given=kind), PAIRS)
    assert not (tmp_path / "model").exists()


def test_yes_and_no_are_answers_too(tmp_path):
    bundle = from_onnx(tmp_path / "model", made_of(NODE("Cast", ["x"], ["y"], to=onnx.TensorProto.BOOL), gives=onnx.TensorProto.BOOL), PAIRS)
    assert bundle.predict(pl.DataFrame({"x": [[0.0, 2.0]]}))["y"].to_list() == [[False, True]]


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_probabilities_in_half_precision_that_are_0_or_1_stay_what_they_are(tmp_path, task):
    half, certain = onnx.TensorProto.FLOAT16, [[0.0, 1.0], [1.0, 0.0]]
    bundle = from_onnx(tmp_path / "model", made_of(NODE("Identity", ["x"], ["y"]), given=half, gives=half), pl.DataFrame({"x": certain}), task, probabilities=True, labels=("a", "b"))
    assert np.allclose(bundle.predict(pl.DataFrame({"x": certain}))["probabilities"].to_numpy(), certain, atol=2e-3)


def test_a_classifier_of_scikit_learn_is_read_without_the_words_beside_its_probabilities(tmp_path):
    words = NODE("LabelEncoder", ["best"], ["label"], domain="ai.onnx.ml", keys_int64s=[0, 1], values_strings=["no", "yes"])
    nodes = [NODE("Softmax", ["x"], ["probabilities"]), NODE("ArgMax", ["x"], ["best"], axis=1, keepdims=0), words]
    label, probabilities = onnx.helper.make_tensor_value_info("label", onnx.TensorProto.STRING, ["n"]), onnx.helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, ["n", 2])
    bundle = from_onnx(tmp_path / "model", made_of(*nodes, outputs=[label, probabilities]), PAIRS, "classification", output="probabilities", probabilities=True, labels=("no", "yes"))
    assert bundle.predict(PAIRS)["prediction"].to_list() == ["yes", "no"]
    wrapped = onnx.helper.make_tensor_sequence_value_info("maps", onnx.TensorProto.FLOAT, None)
    with pytest.raises(BundleError, match="no tensor.*zipmap"):
        from_onnx(tmp_path / "other", made_of(NODE("SequenceConstruct", ["x"], ["maps"]), outputs=[wrapped]), PAIRS, "classification", output="maps")


TWICE = made_of(NODE("Add", ["x", "x"], ["y"]))
WRONG = {
    "rows that have no answer": (TWICE, pl.DataFrame({"x": [[1.0, 2.0], [1.0, float("nan")]]}), {}, "golden row 1 with NaN or infinity in y"),
    "rows in a dict": (TWICE, {"x": [[1.0, 2.0]]}, {}, "DataFrame of polars, not dict"),
    "numbers for labels": (TWICE, PAIRS, {"task": "classification", "labels": (0, 1)}, "a label is a word, not 0"),
    "a word for labels": (TWICE, PAIRS, {"task": "classification", "labels": "ab"}, "labels cannot be 'ab'"),
    "a metric that is no number": (TWICE, PAIRS, {"metrics": {"accuracy": float("nan")}}, "metrics cannot be written.*nan"),
    "a metric of numpy": (TWICE, PAIRS, {"metrics": {"accuracy": np.float32(0.9)}}, "metrics cannot be written.*float32"),
    "a field of another name": (TWICE, PAIRS, {"lables": ("a", "b")}, 'Did you mean "labels"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_packaged_is_told_and_nothing_is_written(tmp_path, name):
    model, golden, more, words = WRONG[name]
    with pytest.raises(BundleError, match=words) as told:
        from_onnx(tmp_path / "model", model, golden, **more)
    assert len(str(told.value).splitlines()) == 1 and not list(tmp_path.iterdir())
