"A bundle is whole, safe and the same everywhere, or it is not loaded."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
import numpy as np
import onnx
import polars as pl
import pytest
from makers import last_manifest, mlkit, write_stage
from onnx import TensorProto, helper, numpy_helper
from mlkit.bundle import Bundle, BundleError, Manifest, Tensor, inputs, package, read_bundle, write_bundle
from mlkit.core.store import Artifact, Store
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
        ({"schema": True}, "no schema version"),
        ({"schema": 0}, "no mlkit ever wrote"),
        ({"tolerance": float("inf")}, "no JSON"),
        ({"name": "\ud800"}, "no JSON"),
        ({"labels": [1] * 10}, "a label is a word"),
        ({"files": {"C:/model.onnx": {}}}, "not a plain name"),
        ({"files": {"model\0.onnx": {}}}, "not a plain name"),
        ({"files": {"model.onnx": {}, "Model.onnx": {}}}, "both are one file"),
        ({"files": {"caf\u00e9": {}, "cafe\u0301": {}}}, "both are one file"),
        ({"files": {"BUNDLE.json": {}}}, "both are one file"),
        ({"preprocess": {"image": ImagePreprocess(8, 8, 1).to_dict() | {"fit": "bend"}}}, "does not know"),
        ({"labels": 5}, "labels cannot be 5"),
        ({"tolerance": "much"}, "tolerance cannot be"),
        ({"files": {"model.onnx": [1]}}, 'files says of "model.onnx"'),
        ({"preprocess": {"image": []}}, 'preprocess says of "image"'),
        ({"preprocess": {"image": {"kind": []}}}, "unknown here"),
        ({"preprocess": {"image": ImagePreprocess(8, 8, 1).to_dict() | {"height": []}}}, "cannot be answered"),
    ],
)
def test_a_manifest_that_lies_is_refused(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(BundleError, match=words):
        Bundle.load(folder)


GOLDEN_LIES = {
    "no parquet": lambda golden: b"nonsense",
    "no rows": lambda golden: golden.clear(),
    "no question": lambda golden: golden.drop("image"),
    "no answer": lambda golden: golden.select("image"),
    "nulls": lambda golden: golden.with_columns(pl.lit(None).alias("expected:logits")),
}


@pytest.mark.parametrize("lie", GOLDEN_LIES)
def test_golden_rows_that_make_no_sense_are_refused_although_their_digest_is_right(folder, lie):
    said, contents = read_bundle(folder)
    found = GOLDEN_LIES[lie](pl.read_parquet(folder / "golden.parquet"))
    if isinstance(found, pl.DataFrame):
        found.write_parquet(folder / "golden.parquet")
        found = (folder / "golden.parquet").read_bytes()
    write_bundle(folder, said, contents | {"golden.parquet": found})
    with pytest.raises(BundleError, match="golden"):
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


def test_what_is_neither_file_nor_folder_is_refused_unread(folder):
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(BundleError, match="is no file"):
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
    (folder / "bundle.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="no JSON"):
        Bundle.load(folder)


def test_answers_do_not_depend_on_the_batch(folder):
    bundle = Bundle.load(folder, threads=1)
    whole = bundle.predict(DIGITS.head(70), batch_size=70)
    for size in (1, 3, 64):
        other = bundle.predict(DIGITS.head(70), batch_size=size)
        assert other["prediction"].equals(whole["prediction"])
        assert np.allclose(other["probabilities"].to_numpy(), whole["probabilities"].to_numpy(), rtol=1e-4)


def test_a_batch_without_rows_is_no_batch(folder):
    for size in (0, -1):
        with pytest.raises(BundleError, match="batch_size is 1 or more"):
            Bundle.load(folder).predict(DIGITS.head(2), batch_size=size)


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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_cannot_take_the_place_of_a_bundle_leaves_it_there(folder, monkeypatch, error):
    rename, before, waiting = os.replace, (folder / "bundle.json").read_bytes(), [error]

    def dying(source, target):
        if Path(target) == folder and waiting:
            raise waiting.pop()
        rename(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(type(error)):
        write_bundle(folder, manifest(name="other"), {})
    assert not waiting and (folder / "bundle.json").read_bytes() == before and os.listdir(folder.parent) == ["model"]


def test_a_link_to_a_bundle_is_replaced_and_what_it_led_to_stays(folder):
    link, before = folder.with_name("newest"), (folder / "bundle.json").read_bytes()
    link.symlink_to(folder)
    write_bundle(link, manifest(name="other"), {})
    assert read_bundle(link)[0].name == "other" and not link.is_symlink()
    assert (folder / "bundle.json").read_bytes() == before and sorted(os.listdir(folder.parent)) == ["model", "newest"]


def test_a_bundle_needs_something_to_prove_itself(tmp_path):
    with pytest.raises(BundleError, match="golden row"):
        package(tmp_path / "model", linear(), manifest(), pl.DataFrame(schema={"image": pl.Binary}))


def network(nodes, inputs, outputs, constants=()) -> bytes:
    "An ONNX file of a few nodes; inputs and outputs are (name, ONNX type, shape)."
    described = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "small", *described, [numpy_helper.from_array(np.asarray(v), k) for k, v in dict(constants).items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def numbers(task="raw", output="y", shape=(2,), **more) -> Manifest:
    "A manifest of networks that take two numbers a row."
    return Manifest("numbers", task, (Tensor("x", "float32", ("batch", 2)),), (Tensor(output, "float32", ("batch", *shape)),), {"x": {"kind": "numeric", "shape": [2]}}, **more)


PAIRS = pl.DataFrame({"x": [[1.0, 2.0], [3.0, -4.0], [0.5, 0.25], [9.0, 8.0]]})


def rows(*nodes, output="y", **constants) -> bytes:
    return network(nodes, [("x", TensorProto.FLOAT, ["batch", 2])], [(output, TensorProto.FLOAT, ["batch", 2])], constants)


def test_a_model_whose_rows_depend_on_each_other_is_refused(tmp_path):
    mixed = rows(helper.make_node("ReduceMean", ["x", "axes"], ["mean"]), helper.make_node("Sub", ["x", "mean"], ["y"]), axes=np.int64([0]))
    with pytest.raises(BundleError, match="depend on the batch"):
        package(tmp_path / "model", mixed, numbers(), PAIRS)
    assert not (tmp_path / "model").exists()


def test_a_batch_that_the_exporter_baked_in_is_refused(tmp_path):
    baked = rows(helper.make_node("Add", ["x", "offset"], ["y"]), offset=np.ones((2, 2), np.float32))
    with pytest.raises(BundleError, match="the manifest says"):
        package(tmp_path / "model", baked, numbers(), PAIRS)


def test_an_export_that_differs_from_the_original_is_refused(tmp_path):
    doubled, truth = rows(helper.make_node("Add", ["x", "x"], ["y"])), np.array(PAIRS["x"].to_list())
    package(tmp_path / "model", doubled, numbers(), PAIRS, reference={"y": truth * 2})
    with pytest.raises(BundleError, match="not the model that it was made from"):
        package(tmp_path / "other", doubled, numbers(), PAIRS, reference={"y": truth * 2.001})


class Letters:
    "A kind of preprocessing that makes two tensors of one column, as long as the longest text of the batch."

    def __call__(self, values, base=None):
        texts = values.to_list()
        ids, mask = np.zeros((2, len(texts), max(map(len, texts))), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = [ord(c) for c in text], 1
        return {"ids": ids, "mask": mask, "unused": mask}


def test_a_column_may_feed_several_inputs_of_changing_length(tmp_path, monkeypatch):
    monkeypatch.setitem(inputs.PREPROCESS, "letters", lambda settings, contents: Letters())
    nodes = [helper.make_node("Mul", ["ids", "mask"], ["own"]), helper.make_node("Cast", ["own"], ["each"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("ReduceSum", ["each", "axes"], ["value"], keepdims=1)]
    sides = [(n, TensorProto.INT64, ["batch", "length"]) for n in ("ids", "mask")], [("each", TensorProto.FLOAT, ["batch", "length"]), ("value", TensorProto.FLOAT, ["batch", 1])]
    model = network(nodes, *sides, {"axes": np.int64([1])})
    signature = [Tensor(n, "int64", ("batch", "length")) for n in ("ids", "mask")], [Tensor("each", "float32", ("batch", "length")), Tensor("value", "float32", ("batch", 1))]
    said = Manifest("letters", "regression", tuple(signature[0]), tuple(signature[1]), {"text": {"kind": "letters"}})
    words = pl.DataFrame({"text": ["a", "abc", "four", "a", "b" * 50]})
    bundle = package(tmp_path / "model", model, said, words)
    assert bundle.predict(words, batch_size=2)["prediction"].to_list() == [float(sum(map(ord, w))) for w in words["text"]]
    assert bundle.predict(words[:0]).schema == {"prediction": pl.Float32}


@pytest.mark.parametrize(
    "frame, words",
    [
        (pl.DataFrame({"y": [1]}), 'needs a column "x"'),
        (pl.DataFrame({"x": [[1.0]]}), "an array \\(1\\), the network wants an array \\(2\\)"),
        (pl.DataFrame({"x": [[1.0, 2.0], None]}), "null; the first is in row 1"),
        (pl.DataFrame({"x": [[1.0, 2.0], [1.0, None]]}), "null"),
        (pl.DataFrame({"x": ["a"]}), "holds String"),
        (pl.DataFrame({"x": [[1.0], [1.0, 2.0]]}), "differ in length"),
    ],
)
def test_a_frame_that_does_not_fit_is_told_by_column(tmp_path, frame, words):
    bundle = package(tmp_path / "model", rows(helper.make_node("Neg", ["x"], ["y"])), numbers(), PAIRS)
    with pytest.raises(BundleError, match=words):
        bundle.predict(frame)


def test_a_bundle_names_the_run_that_made_it_and_is_still_provable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.onnx").write_bytes(rows(helper.make_node("Neg", ["x"], ["y"])))
    code = """
import polars as pl
from mlkit.bundle import Manifest, Tensor, package
from mlkit.core.digest import path_digest

said = Manifest("m", "raw", (Tensor("x", "float32", ("batch", 2)),), (Tensor("y", "float32", ("batch", 2)),), {"x": {"kind": "numeric", "shape": [2]}}, provenance={"data": {"weights": path_digest(weights)}})
package(bundle, weights.read_bytes(), said, pl.DataFrame({"x": [[1.0, 2.0]]}))
"""
    write_stage(tmp_path / "p", "package", 'weights = Source("../weights.onnx")\nbundle = Output("bundle")\n', code)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "p"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    mlkit("run", "p")
    manifest = last_manifest(tmp_path / ".mlkit")
    job, store = manifest["jobs"]["package"], Store(tmp_path / ".mlkit")
    made = store.link(Artifact.from_dict(job["outputs"]["bundle"]), tmp_path / "bundle")
    said = read_bundle(made)[0].provenance
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    assert said == {"run": manifest["id"], "stage": "package", "key": job["key"], "commit": commit, "data": said["data"]}
    assert Bundle.load("run:p/package/bundle").predict(pl.DataFrame({"x": [[1.0, 2.0]]}))["y"].to_list() == [[-1.0, -2.0]]
    assert "whole" in mlkit("bundle", "check", "run:p/package/bundle").stdout
    for wrong in ("run:p/package/model", "run:q/package/bundle", "run:p", "run:"):
        assert "no good run of" in mlkit("serve", wrong, check=2).stderr
    subprocess.run([*git, "commit", "-qm", "two", "--allow-empty"], check=True)
    assert "proven" in mlkit("verify", "p").stdout


def test_a_task_reads_the_output_that_it_needs(tmp_path):
    negated = rows(helper.make_node("Neg", ["x"], ["logits"]), output="logits")
    bundle = package(tmp_path / "model", negated, numbers("multilabel", "logits", labels=("a", "b")), PAIRS)
    assert bundle.predict(PAIRS)["prediction"].to_list() == [[], ["b"], [], []]
    with pytest.raises(BundleError, match='reads an output "value"'):
        package(tmp_path / "other", negated, numbers("regression", "logits"), PAIRS)
