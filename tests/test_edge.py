"The edge page computes in a browser what the bundle computes in Python, to the last pixel."

import base64
import functools
import io
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import polars as pl
import pytest
from browser import browser_page, needs_chromium
from mlkit.bundle import Bundle, package
from mlkit.data import ImagePreprocess, load
from mlkit.data.images import encode_png
from mlkit.serve.edge import edge_files
from mlkit.serve.image import DeployError, prepare, write_folder
from PIL import Image
from test_bundle import linear, manifest

pytestmark = needs_chromium


class _Quiet(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A served edge page, its folder and its bundle."
    home = tmp_path_factory.mktemp("edge")
    package(home / "model", linear(), manifest(), load("digits-small").head(8))
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
