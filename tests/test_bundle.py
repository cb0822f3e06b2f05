"A bundle is whole, safe and the same everywhere, or it is not loaded."
import json
import shutil
import subprocess
import sys
import numpy as np
import onnx
import polars as pl
import pytest
from onnx import TensorProto, helper, numpy_helper
from mlkit.bundle import Bundle, BundleError, Manifest, Tensor, package, read_bundle, write_bundle
from mlkit.data import ImagePreprocess, load

DIGITS = load("digits-small")


def linear(batch="batch") -> bytes:
    "A linear classifier of 8x8 images with fixed random weights."
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32) / 500
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])
    graph = helper.make_graph(nodes, "linear", [image], [logits], [numpy_helper.from_array(weights, "weights")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def manifest(**changes) -> Manifest:
    settings = {
        "name": "linear",
        "task": "classification",
        "inputs": (Tensor("image", "uint8", ("batch", 1, 8, 8)),),
        "outputs": (Tensor("logits", "float32", ("batch", 10)),),
        "preprocess": {"image": ImagePreprocess(8, 8, 1).to_dict()},
        "labels": tuple("0123456789"),
    }
    return Manifest(**{**settings, **changes})


@pytest.fixture
def folder(tmp_path):
    package(tmp_path / "model", linear(), manifest(), DIGITS.head(8))
    return tmp_path / "model"


def edit(folder, **changes):
    "Change fields of bundle.json by hand."
    file = folder / "bundle.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_equal_bundles_are_equal_byte_for_byte(folder, tmp_path):
    package(tmp_path / "again", linear(), manifest(), DIGITS.head(8))
    for name in ("bundle.json", "model.onnx", "golden.parquet"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_any_flipped_byte_is_noticed(folder):
    for name in ("model.onnx", "golden.parquet"):
        whole = (folder / name).read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
            with pytest.raises(BundleError, match="damaged"):
                Bundle.load(folder)
        (folder / name).write_bytes(whole)
    Bundle.load(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"schema": 2}, "newer mlkit"),
        ({"schema": "1"}, "no schema version"),
        ({"task": "magic"}, 'task "magic" is unknown'),
        ({"preprocess": {"image": {"kind": "os.system"}}}, "unknown here"),
        ({"preprocess": {"image": {"kind": "image", "shell": "rm"}}}, "does not know"),
        ({"inputs": [{"name": "image"}]}, "needs name, dtype and shape"),
        ({"inputs": [{"name": "image", "dtype": "uint8", "shape": [1, 1, 8, 8]}]}, "the manifest says"),
        ({"files": {"../model.onnx": {}}}, "not a plain name"),
        ({"files": {}}, "not listed"),
        ({"surprise": 1}, "unknown field"),
    ],
)
def test_a_manifest_that_lies_is_refused(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(BundleError, match=words):
        Bundle.load(folder)


def test_links_and_strangers_are_refused(folder, tmp_path):
    (folder / "extra.txt").write_text("hello")
    with pytest.raises(BundleError, match="not listed"):
        read_bundle(folder)
    (folder / "extra.txt").unlink()
    shutil.move(folder / "model.onnx", tmp_path / "outside.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(BundleError, match="is a link"):
        read_bundle(folder)
    (folder / "model.onnx").unlink()
    (folder / "below").symlink_to(tmp_path)
    with pytest.raises(BundleError, match="is a link"):
        read_bundle(folder)


def test_weights_outside_the_model_file_are_refused(tmp_path):
    onnx.save(onnx.load_from_string(linear()), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(BundleError, match="cannot load"):
        package(tmp_path / "model", (tmp_path / "m.onnx").read_bytes(), manifest(), DIGITS.head(2))
    assert not (tmp_path / "model").exists()


def test_a_fixed_batch_dimension_is_caught(tmp_path):
    with pytest.raises(BundleError, match=r"uint8\[2, 1, 8, 8\]"):
        package(tmp_path / "model", linear(batch=2), manifest(), DIGITS.head(2))


def test_a_truncated_manifest_is_refused(folder):
    (folder / "bundle.json").write_bytes((folder / "bundle.json").read_bytes()[:100])
    with pytest.raises(BundleError, match="no JSON"):
        Bundle.load(folder)


def test_answers_do_not_depend_on_the_batch(folder):
    bundle = Bundle.load(folder, threads=1)
    whole = bundle.predict(DIGITS.head(70), batch_size=70)
    for size in (1, 3, 64):
        other = bundle.predict(DIGITS.head(70), batch_size=size)
        assert other["prediction"].equals(whole["prediction"])
        assert np.allclose(other["probabilities"].to_numpy(), whole["probabilities"].to_numpy(), rtol=1e-4)


def test_other_columns_do_not_disturb_and_none_is_lost(folder):
    answers = Bundle.load(folder).predict(DIGITS.lazy().with_columns(more=1))
    assert answers.columns == ["prediction", "confidence", "probabilities"] and len(answers) == len(DIGITS)
    assert np.allclose(answers["probabilities"].to_numpy().sum(1), 1, atol=1e-5)


def test_a_process_without_torch_loads_and_answers(folder):
    code = """
import sys
for name in ("torch", "pandas", "onnx", "timm"):
    sys.modules[name] = None
from mlkit.bundle import Bundle
from mlkit.data import load
print(len(Bundle.load(sys.argv[1]).predict(load("digits-small"))))
"""
    assert subprocess.check_output([sys.executable, "-c", code, str(folder)], text=True).strip() == "1797"


def test_writing_never_replaces_what_is_no_bundle(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(BundleError, match="is no bundle"):
        write_bundle(tmp_path / "mine", manifest(), {})
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_a_bundle_needs_something_to_prove_itself(tmp_path):
    with pytest.raises(BundleError, match="golden row"):
        package(tmp_path / "model", linear(), manifest(), pl.DataFrame(schema={"image": pl.Binary}))
