"A person tries a model on the page at `/`, in a real browser, and sees how the server does."

import json

import numpy as np
import polars as pl
import pytest
from browser import browser_page, needs_chromium
from mlkit.bundle import Bundle, Manifest, Tensor, package
from mlkit.data import load
from mlkit.data.images import encode_png
from mlkit.serve.load import serving
from onnx import TensorProto, helper, numpy_helper
from test_bundle import linear, manifest

pytestmark = needs_chromium
EVIL = "<img src=x onerror=document.title='owned'>"


def sums() -> bytes:
    "A network that gives the sum of three numbers."
    node = helper.make_node("MatMul", ["x", "w"], ["value"])
    sides = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])], [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["batch", 1])]
    graph = helper.make_graph([node], "sums", *sides, [numpy_helper.from_array(np.ones((3, 1), np.float32), "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A server of two models: digits, whose labels are hostile, and sums."
    home = tmp_path_factory.mktemp("page")
    package(home / "digits", linear(), manifest(name="digits", labels=(EVIL, *"123456789")), load("digits-small").head(8))
    signature = {"inputs": (Tensor("x", "float32", ("batch", 3)),), "outputs": (Tensor("value", "float32", ("batch", 1)),)}
    package(home / "sums", sums(), Manifest("sums", "regression", **signature, preprocess={"x": {"kind": "numeric", "shape": [3]}}), pl.DataFrame({"x": [[1.0, 2.0, 3.0]]}))
    with serving(home / "digits", home / "sums") as running:
        yield running, Bundle.load(home / "digits")


def test_a_person_tries_both_models_and_sees_their_answers(server, tmp_path):
    running, bundle = server
    file = tmp_path / "digit.png"
    file.write_bytes(encode_png(load("digits-small")["image"][11].to_numpy()))
    expected = bundle.predict(pl.DataFrame({"image": [file.read_bytes()]})).row(0, named=True)
    with browser_page(running.url) as (page, errors):
        page.wait_for_selector("#try button")
        assert page.is_disabled("#try button"), "there is nothing to ask yet"
        page.set_input_files("input[type=file]", file)
        page.click("#try button")
        page.wait_for_selector(".verdict")
        assert page.inner_text(".verdict").startswith(expected["prediction"]) and page.inner_text(".bars li:first-child b") == f"{100 * expected['confidence']:.1f} %"
        assert page.title() == "mlkit" and page.locator("img[src=x]").count() == 0, "a label is text, whatever it says"
        page.click("nav >> text=sums")
        page.wait_for_selector("#try textarea")
        page.fill("#try textarea", "1.5, 2 3")
        page.press("#try textarea", "Tab")
        page.keyboard.press("Enter")  # the button has the focus
        page.wait_for_selector(".verdict")
        assert page.inner_text(".verdict").strip() == "6.5" and "POST" not in page.inner_text("#example") and "predict/sums" in page.inner_text("#example")
        page.wait_for_function("document.querySelector('#live b') && Number(document.querySelector('#live b').textContent) >= 0")
        assert "answers a second" in page.inner_text("#live") and errors == []


def test_a_mistake_is_told_where_it_was_made_and_nothing_is_lost(server):
    with browser_page(server[0].url) as (page, errors):
        page.click("nav >> text=sums")
        page.wait_for_selector("#try textarea")
        page.fill("#try textarea", "1 2")
        page.click("#try button")
        page.wait_for_selector("section.bad, div.bad")
        assert "3" in page.inner_text("div.bad") and page.input_value("#try textarea") == "1 2"
        page.fill("#try textarea", "1 two 3")
        assert page.is_disabled("#try button")
        page.fill("#try textarea", "1 2 3")
        page.click("#try button")
        page.wait_for_selector(".verdict")
        assert [e for e in errors if "400" not in e] == []


def test_the_page_is_closed_to_scripts_of_others(server):
    with browser_page(server[0].url) as (page, errors):
        page.wait_for_selector("#try button")
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))")
        assert page.title() == "mlkit" and "Content Security Policy" in errors[0]
        assert json.loads(page.evaluate("JSON.stringify(performance.getEntriesByType('resource').map(entry => new URL(entry.name).host))"))
        assert set(page.evaluate("performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)")) == {server[0].url.rstrip("/")}


def test_a_token_is_asked_for_and_used(tmp_path):
    package(tmp_path / "digits", linear(), manifest(name="digits"), load("digits-small").head(8))
    (tmp_path / "tokens").write_text("person:a-secret-of-thirty-two-characters\n")
    (tmp_path / "tokens").chmod(0o600)
    with serving(tmp_path / "digits", options=("--tokens", tmp_path / "tokens")) as running:
        with browser_page(running.url) as (page, _):
            page.wait_for_selector("#secret")
            page.fill("#secret", "a-secret-of-thirty-two-characters")
            page.keyboard.press("Enter")
            page.wait_for_selector("#try button")
            assert page.is_hidden("#secret") and "1 model" in page.inner_text("#state")
