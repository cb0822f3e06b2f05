"Texts become models become bundles, whatever the texts are."

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from huggingface_hub import constants
from mlkit.bundle import Bundle
from mlkit.core.errors import MLKitError
from mlkit.data.texts import TOKENIZER, TextPreprocess
from mlkit.nlp import Embedder, LengthBatches, NLPError, SemanticIndex, TextClassifier, TextData, TextModel, TextRegressor, TokenClassifier, build_index, from_words
from mlkit.nlp.data import read_tokenizer
from mlkit.nlp.networks import make_encoder
from mlkit.nlp.spans import SPAN, evaluate_spans, mark_tokens
from mlkit.train import fit, use_threads, weights_digest
from pytorch_lightning import Callback
from servers import serving

use_threads(1)
QUIET = {"progress": False, "threads": 1}
SHAPE = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
WORDS = "film plot actors music story end begins slowly then drags on and on".split()


def reviews(n: int = 120, longest: int = 20) -> pl.DataFrame:
    "Reviews in which one word decides."
    random, rows = np.random.default_rng(0), []
    for i in range(n):
        words = random.choice(WORDS, random.integers(1, longest)).tolist()
        label = ("good", "bad")[i % 2]
        words.insert(int(random.integers(0, len(words) + 1)), {"good": "wonderful", "bad": "terrible"}[label])
        rows.append({"text": " ".join(words), "label": label, "split": "train" if i < n * 0.7 else "validation" if i < n * 0.85 else "test"})
    return pl.DataFrame(rows)


def marked(text: str) -> list[dict]:
    "The deciding word as a span."
    place = max(text.find("wonderful"), text.find("terrible"))
    return [{"start": place, "end": place + (9 if "wonderful" in text else 8), "label": "verdict"}]


LABELS = {
    "classification": pl.col("label"),
    "multilabel": pl.concat_list("label", pl.when(pl.col("text").str.contains("music")).then(pl.lit("music")).otherwise(pl.lit("no music"))),
    "regression": (pl.col("label") == "good").cast(pl.Float64) * 100,
    "token-classification": pl.col("text").map_elements(marked, pl.List(SPAN)),
}
KINDS = {"classification": TextClassifier, "multilabel": TextClassifier, "regression": TextRegressor, "token-classification": TokenClassifier}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A tiny encoder in a folder, as transformers keeps models."
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    make_encoder(SHAPE).save_pretrained(folder)
    (folder / TOKENIZER).write_bytes(read_tokenizer("minilm"))
    return folder


def data(small, frame=None, **more) -> TextData:
    return TextData(reviews() if frame is None else frame, **{"tokenizer": small, "length": 64, "batch_size": 8} | more)


@pytest.mark.parametrize(
    "task, longest, windows, options",
    [("classification", 60, 4, {}), ("multilabel", 20, 2, {"lora": 4}), ("regression", 12, 1, {"frozen": 1}), ("token-classification", 60, 4, {})],
)
def test_a_model_answers_alike_trained_saved_and_packaged(small, tmp_path, task, longest, windows, options):
    own = data(small, reviews(longest=longest).with_columns(label=LABELS[task]), length=24)
    assert own.task == task and own.prepare.windows == windows
    result = fit(KINDS[task](small, own, lr=5e-3, **options), own, epochs=1, **QUIET)
    model, texts = result.model, pl.Series("text", ["a wonderful film", "", "terrible " * 500, "das Ende 🎬 çok iyi"])
    result.evaluate("test").metrics()
    model.save(tmp_path / "model")
    loaded = TextModel.load(tmp_path / "model")
    assert type(loaded) is KINDS[task] and loaded.predict(texts).equals(model.predict(texts))
    bundle = result.bundle(tmp_path / "bundle")
    alone = pl.concat([bundle.predict(texts[i : i + 1].to_frame()) for i in range(len(texts))])
    for answers in (alone, bundle.predict(texts.to_frame())):
        assert same(answers, model.predict(texts))


def same(answers: pl.DataFrame, others: pl.DataFrame) -> bool:
    "Whether answers are the same but for the last digits of their numbers."
    if "probabilities" in answers.columns:
        assert np.abs(answers["probabilities"].to_numpy() - others["probabilities"].to_numpy()).max() < 1e-4
    if answers.schema["prediction"].is_float():
        return np.allclose(answers["prediction"], others["prediction"], rtol=1e-3, atol=1e-2)
    if "probabilities" in answers.columns:
        return answers["prediction"].equals(others["prediction"])
    places = pl.col("prediction").list.eval(pl.struct(pl.element().struct.field("start", "end", "label")))
    return answers.select(places).equals(others.select(places))


ALONE = """
import sys, polars as pl
from mlkit.bundle import Bundle
print(Bundle.load(sys.argv[1]).predict(pl.DataFrame({"text": ["wonderful", ""]}))["prediction"].to_list())
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def test_a_classifier_learns_and_its_bundle_needs_no_torch(small, tmp_path):
    own = data(small, reviews(300, 12))
    result = fit(TextClassifier(small, own, lr=1e-2), own, epochs=5, **QUIET)
    assert result.evaluate("test").accuracy > 0.9
    result.bundle(tmp_path / "bundle", metrics={"accuracy": 1.0})
    said = subprocess.check_output([sys.executable, "-c", ALONE, str(tmp_path / "bundle")], text=True)
    assert said.startswith("['good', ")
    assert Bundle.load(tmp_path / "bundle").manifest.provenance["transformers"]


def test_marked_words_are_found_at_their_characters(small, tmp_path):
    frame = reviews(200, longest=40).with_columns(text=pl.lit("🎬 ") + pl.col("text")).with_columns(label=LABELS["token-classification"])
    own = data(small, frame, length=24, stride=6)
    result = fit(TokenClassifier(small, own, lr=5e-3), own, epochs=6, **QUIET)
    assert result.evaluate("test").metrics()["f1"] > 0.9
    text = "🎬 a film 🎬 and a wonderful plot"
    (span,) = result.bundle(tmp_path / "bundle").predict(pl.DataFrame({"text": [text]}))["prediction"][0]
    assert (text[span["start"] : span["end"]], span["label"]) == ("wonderful", "verdict")


@pytest.fixture(scope="module")
def prepare():
    return TextPreprocess(read_tokenizer("minilm"), length=16, windows=20, stride=4, places=True)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["pneumonia", "otitis", "a", "x-ray", "ü", "🎬"]), st.sampled_from(["O", "B-X", "I-X", "B-Y"])), min_size=1, max_size=40))
def test_marks_of_tokens_say_the_spans_that_they_were_made_of(prepare, words):
    frame = from_words(pl.Series([[w for w, _ in words]]), pl.Series([[t for _, t in words]]))
    classes, (spans,) = ("O", "B-X", "I-X", "B-Y", "I-Y"), frame["label"].to_list()
    marks, found = mark_tokens(prepare.encode(frame["text"]), frame["label"], classes), {}
    windows = [w for text in prepare.encode(frame["text"]) for w in text]
    offsets = [o for w in windows for o in w.offsets]
    for mark, (start, _) in zip(marks, offsets):
        if mark > 0 and classes[mark].startswith("B"):
            found[start] = classes[mark][2:]
    assert found == {s["start"]: s["label"] for s in spans}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(1, 33), st.booleans())
def test_every_text_is_in_one_batch(lengths, size, shuffle):
    batches = list(LengthBatches(np.array(lengths, int), size, shuffle))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths))) and len(batches) == -(-len(lengths) // size)


def test_an_answer_does_not_depend_on_what_stands_beside_it(small):
    own = data(small, reviews(longest=60), length=16)
    model = TextClassifier(small, own).eval()
    texts = own.frame["text"][:20]
    together, alone = model.predict(texts), pl.concat([model.predict(texts[i : i + 1]) for i in range(20)])
    assert np.abs(together["probabilities"].to_numpy() - alone["probabilities"].to_numpy()).max() < 1e-5


def test_lora_learns_a_few_weights_and_costs_production_nothing(small, tmp_path):
    own = data(small)
    model = TextClassifier(small, own, lora=4, lr=1e-2)
    before = {n: p.clone() for n, p in model.network.named_parameters() if not p.requires_grad}
    learning = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    result = fit(model, own, epochs=1, **QUIET)
    after = dict(result.model.network.named_parameters())
    assert learning < sum(p.numel() for p in before.values()) / 20 and all(torch.equal(after[n], p) for n, p in before.items())
    content = (result.bundle(tmp_path / "bundle").folder / "model.onnx").read_bytes()
    assert b"lora" not in content and len(content) < 4.2 * sum(p.numel() for p in before.values())


class Killed(Callback):
    "Ends the process in the middle of the second epoch, as a power cut does."

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 15:
            os.kill(os.getpid(), signal.SIGKILL)


def learn_with_lora(small, folder, callbacks=()) -> str:
    own = data(small)
    return weights_digest(fit(TextClassifier(small, own, lora=4), own, epochs=2, folder=folder, resume=True, save_every=0.0, callbacks=list(callbacks), **QUIET).model)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such kill here")
def test_lora_that_is_killed_within_an_epoch_ends_like_one_that_was_left_alone(small, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=learn_with_lora, args=(small, tmp_path / "cut", [Killed()]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and torch.load(tmp_path / "cut/resume.ckpt", weights_only=False)["global_step"] in (14, 15)
    assert learn_with_lora(small, tmp_path / "cut") == learn_with_lora(small, tmp_path / "whole")


def test_rare_classes_can_count_as_much_as_common_ones(small):
    rare = reviews(200).filter((pl.col("label") == "good") | (pl.int_range(pl.len()) % 10 == 1))
    own = data(small, rare)
    model = TextClassifier(small, own, class_weights="balanced")
    share = rare.filter(split="train")["label"].value_counts(normalize=True).sort("label")["proportion"].to_numpy()
    assert np.allclose(model.class_weights.numpy() * share, 0.5) and "class_weights" not in model.state_dict()
    with pytest.raises(NLPError, match="3 class_weights do not fit the 2 classes"):
        TextClassifier(small, own, class_weights=[1, 2, 3])
    assert np.isfinite(float(model.loss(torch.zeros(2, 2), torch.tensor([0, 1]))))


def test_the_same_seed_gives_the_same_weights(small):
    own = data(small)
    digests = [weights_digest(fit(TextClassifier(small, own, seed=s, lr=1e-2), own, epochs=1, seed=s, **QUIET).model) for s in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_search_finds_what_means_the_same_and_survives_saving(tmp_path):
    frame = pl.DataFrame({"text": ["Heart attack", "Broken leg", "Loss of memory", ""], "score": [1, 2, 3, 4]})
    index = build_index(frame)
    found = index.search(["myocardial infarction", "he cannot remember"], k=2)
    assert found.filter(rank=1)["text"].to_list() == ["Heart attack", "Loss of memory"] and "row_score" in found.columns
    assert found.columns[:3] == ["query", "rank", "score"] and (found["score"] <= 1.00001).all()
    again = SemanticIndex.load(index.save(tmp_path / "index"), index.embedder)
    assert again.search(["myocardial infarction", "he cannot remember"], k=2).equals(found)
    assert index.search([], k=2).height == 0 and index.search("leg", least=2.0).height == 0 and build_index(frame.clear()).search("leg").height == 0


WRONG_SEARCHES = {
    "a number": ({"queries": 3}, "not int"),
    "nothing": ({"queries": None}, "not NoneType"),
    "bytes": ({"queries": b"leg"}, "not bytes"),
    "a number among texts": ({"queries": ["leg", 3]}, "number 1 of the 2 is 3"),
    "a missing text": ({"queries": ["leg", None]}, "1 of 2 rows"),
    "no rows": ({"queries": "leg", "k": 0}, "1 or more, not 0"),
    "half a row": ({"queries": "leg", "k": 0.5}, "1 or more, not 0.5"),
}


@pytest.mark.parametrize("name", WRONG_SEARCHES)
def test_a_search_for_what_is_no_text_is_refused_in_words(small, name):
    options, words = WRONG_SEARCHES[name]
    with pytest.raises(MLKitError, match=words):
        build_index(pl.DataFrame({"text": ["a", "b"]}), embedder=Embedder.pretrained(small, length=64)).search(**options)


def test_a_search_for_more_rows_than_there_are_finds_all(small):
    index = build_index(pl.DataFrame({"text": ["a", "b"]}), embedder=Embedder.pretrained(small, length=64))
    assert index.search("leg", k=10).height == 2 and index.search("leg", k=np.int64(1)).height == 1


def test_an_index_is_searched_with_the_embedder_that_it_was_built_with(small, tmp_path):
    tiny = Embedder.pretrained(small, length=64)
    build_index(pl.DataFrame({"text": ["a"]}), embedder=tiny).save(tmp_path)
    with pytest.raises(NLPError, match="of 32 numbers, the embedder makes 384"):
        SemanticIndex.load(tmp_path, Embedder.pretrained("minilm"))


def test_an_embedder_as_a_bundle_gives_the_same_vectors(small, tmp_path):
    embedder, frame = Embedder.pretrained(small, length=16, windows=4), reviews(12, 60)
    bundle = embedder.export_bundle(tmp_path / "bundle", frame)
    assert np.abs(bundle.predict(frame)["embedding"].to_numpy() - embedder(frame["text"])).max() < 1e-5


ONE = reviews()
SPANS = ONE.with_columns(label=LABELS["token-classification"])
BAD = {
    "no rows": (ONE.clear(), {}, "no rows"),
    "no texts": (ONE.with_columns(text=pl.lit(None, pl.String)), {}, "120 of 120 rows .* have no text"),
    "numbers for texts": (ONE.with_columns(text=pl.lit(1)), {}, "texts are String"),
    "a column that is not there": (ONE, {"text": "review"}, 'no column "review"'),
    "one class": (ONE.with_columns(label=pl.lit("good")), {}, "only the class 'good'"),
    "no labels": (ONE.with_columns(label=pl.lit(None, pl.String)), {}, "120 of 120 rows have no label"),
    "a label unseen in training": (ONE.with_columns(label=pl.when(pl.col("split") == "test").then(pl.lit("fair")).otherwise("label")), {}, "'fair' occurs, but never in the training"),
    "NaN for a value": (ONE.with_columns(label=pl.lit(float("nan"))), {}, "no finite numbers"),
    "one value": (ONE.with_columns(label=pl.lit(2.5)), {}, "all rows have the same label, 2.5"),
    "no training rows": (ONE.with_columns(split=pl.lit("test")), {}, "training split has no rows"),
    "a task that is none": (ONE, {"task": "clasification"}, 'Did you mean "classification"'),
    "dates for labels": (ONE.with_columns(label=pl.date(2026, 1, 1)), {}, "labels are strings or integers"),
    "windows that overlap wholly": (reviews(longest=60), {"length": 8, "stride": 9, "windows": 2}, "do not fit"),
    "no batch": (ONE, {"batch_size": 0}, "batch_size must be 1 or more"),
    "no room for a token": (ONE, {"length": 2}, "do not fit"),
    "a length in words": (ONE, {"length": "long"}, "length must be 1 or more, not 'long'"),
    "no window": (ONE, {"windows": 0}, "windows must be 1 or more"),
    "classes for several labels": (ONE, {"task": "multilabel"}, "lists of strings, and \"label\" holds String"),
    "classes for marked words": (ONE, {"task": "token-classification"}, "lists of spans .* holds String: from_words"),
    "a span beyond its text": (SPANS.with_columns(label=pl.concat_list(pl.struct(start=0, end=10_000, label=pl.lit("x")))), {}, "row 0 .* 10000"),
    "a span of nothing": (SPANS.with_columns(label=pl.concat_list(pl.struct(start=3, end=3, label=pl.lit("x")))), {}, "row 0 "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_texts_and_labels_get_one_clear_error(small, name):
    frame, options, words = BAD[name]
    with pytest.raises(MLKitError, match=words):
        data(small, frame, **options)


def close_to(value):
    "What equals a value but for the last digits of its numbers."
    if isinstance(value, dict):
        return {name: close_to(v) for name, v in value.items()}
    if isinstance(value, list):
        return [close_to(v) for v in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def test_a_server_answers_texts_as_the_bundles_do_each_by_its_name(small, tmp_path):
    texts, bundles = ["", "wonderful plot", "a terrible film with music " * 30, "ünïcode 🎬 film"], {}
    for task in ("multilabel", "regression", "token-classification"):
        own = data(small, reviews(60).with_columns(label=LABELS[task]))
        bundles[task] = KINDS[task](small, own).export_bundle(tmp_path / task, own, name=task)
    with serving(*(bundle.folder for bundle in bundles.values())) as server:
        for name, bundle in bundles.items():
            status, found = server.json(f"/predict/{name}", [{"text": text} for text in texts])
            expected = bundle.predict(pl.DataFrame({"text": texts})).to_dicts()
            assert status == 200 and found["predictions"] == close_to(expected)
            for wrong in ([{"text": None}], [{"text": 3}], [{"txt": "a"}], []):
                assert server.json(f"/predict/{name}", wrong)[0] == 400


def test_a_model_that_does_not_fit_is_refused_in_words(small, tmp_path):
    own = data(small)
    for make, words in (
        (lambda: TextRegressor(small, own), "is for regression; .* classification"),
        (lambda: TextClassifier("no/such-model", own), 'no model "no/such-model"'),
        (lambda: TextClassifier(small, data(small, length=256)), "reads 128 tokens at once, the data ask for 256"),
        (lambda: TextModel.load(tmp_path), "no model.json"),
        (lambda: TextClassifier(small, own, lora=-1), "must be 1 or more, not -1"),
        (lambda: TextClassifier(small, own, lora=0), "must be 1 or more, not 0"),
        (lambda: TextClassifier(small, own, class_weights="balance"), 'class_weights are "balanced"'),
        (lambda: TextClassifier(small, own, layers=9), "layers is how many of the lowest"),
        (lambda: TextClassifier(small, own).predict(["\ud800"]), "half of a character"),
        (lambda: TextClassifier(small, own, frozen="none"), "how many of the lowest layers"),
        (lambda: TextClassifier(small, own, frozen=9), 'has 3 layers that can be frozen, the embeddings among them, not 9'),
        (lambda: TextClassifier(small, own, layers="two"), "layers is how many of the lowest"),
        (lambda: TextClassifier(small, own, lora=1.5), "must be 1 or more, not 1.5"),
        (lambda: TextClassifier(small, own, lr="fast"), "lr must be above 0, not 'fast'"),
        (lambda: TextClassifier(small, own, weight_decay=-1), "weight_decay must be 0 or more"),
        (lambda: TextClassifier(small, own, layer_decay=2), "layer_decay must be above 0 and 1 at most"),
        (lambda: TextClassifier(small, own, dropout=1.5), "dropout must be 0 or more and below 1"),
        (lambda: TextClassifier(small, own, schedule="linear"), 'no schedule "linear"'),
        (lambda: TextClassifier(small, own, class_weights=[-1.0, 1.0]), "class_weights are 0 or more, not -1"),
        (lambda: TextClassifier(small, ONE), "prepared first, TextData"),
        (lambda: TextClassifier(small, own).evaluate(ONE), "prepared first, TextData"),
        (lambda: TextClassifier(small, own).predict(["a"], batch_size=0), "batch_size must be 1 or more"),
        (lambda: Embedder.pretrained(small, length=64)(["a"], batch_size=0), "batch_size must be 1 or more"),
        (lambda: Embedder.pretrained(small, length=64).export_bundle(tmp_path / "bundle", ONE, nme="words"), 'Did you mean "name"'),
        (lambda: TextClassifier(small, own).export_bundle(tmp_path / "bundle", own, name="my model"), '"my model" cannot be the name of a bundle'),
        (lambda: TextClassifier("minilmm", own), 'Did you mean "minilm"'),
        (lambda: TextClassifier(small, own).predict([1, 2]), "texts are String"),
        (lambda: TextClassifier(small, own).predict(["a", None]), "1 of 2 rows"),
        (lambda: build_index(ONE, "txt"), 'no column "txt"'),
        (lambda: TextClassifier(small, own).data(ONE.with_columns(label=pl.lit("fair"))), "does not know the label 'fair'"),
    ):
        with pytest.raises(MLKitError, match=words):
            make()


@pytest.mark.parametrize("ask", [lambda own: data("nobody/nothing"), lambda own: TextClassifier("nobody/nothing", own), lambda own: Embedder.pretrained("nobody/nothing")])
def test_a_name_of_the_hub_is_not_waited_for_where_nobody_answers(small, monkeypatch, ask):
    own, waits = data(small), []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(NLPError, match='no model "nobody/nothing"'):
        ask(own)
    assert not waits


def test_what_the_hub_has_once_given_is_there_without_a_network(small, tmp_path, monkeypatch):
    place = tmp_path / "models--somebody--tiny"
    shutil.copytree(small, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert TextClassifier("somebody/tiny", data("somebody/tiny")).config["arch"] == "somebody/tiny"


def chunks(tags: list[str]) -> set[tuple]:
    "The entities of tags as seqeval's get_entities defines them."
    found, begin, before, kind = set(), 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        mark, own = tag[0], tag[2:]
        if before != "O" and (mark in "BO" or own != kind):
            found.add((kind, begin, i - 1))
        if mark == "B" or mark == "I" and (before == "O" or own != kind):
            begin = i
        before, kind = mark, own
    return found


TAGS = st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"])


@given(st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=8), min_size=1, max_size=5))
@settings(deadline=None, max_examples=100)
def test_marked_words_are_judged_as_seqeval_does(rows):
    words = pl.Series([["word"] * len(row) for row in rows])
    true, found = ([[pair[side] for pair in row] for row in rows] for side in (0, 1))
    spans = [from_words(words, pl.Series(tags))["label"] for tags in (true, found)]
    made = evaluate_spans(pl.DataFrame({"label": spans[0], "prediction": spans[1]})).metrics()
    one, two = ({(i, *chunk) for i, row in enumerate(tags) for chunk in chunks(row)} for tags in (true, found))
    expected = {"precision": len(one & two) / max(1, len(two)), "recall": len(one & two) / max(1, len(one)), "f1": 2 * len(one & two) / (len(one) + len(two)) if one or two else 1.0}
    assert {name: made[name] for name in expected} == pytest.approx(expected)


# --- the pipeline
STAGES = Path(__file__).parent.parent / "nbs/pipelines/nlp"


def prepare_stage(tmp_path, **parameters) -> pl.DataFrame:
    "What the first stage makes of a table, under plain papermill."
    papermill = pytest.importorskip("papermill")
    parameters = {"table": str(tmp_path / "table.parquet"), **parameters}
    papermill.execute_notebook(STAGES / "prepare.ipynb", tmp_path / "prepare.ipynb", parameters, cwd=STAGES, kernel_name="python3", progress_bar=False)
    return pl.read_parquet(tmp_path / "table.parquet")


def test_prepare_takes_class_folders_of_texts(tmp_path):
    for i, (text, label) in enumerate(reviews().select("text", "label").iter_rows()):
        (tmp_path / "texts" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / label / f"{i}.txt").write_text(text)
    (tmp_path / "texts/good/empty.txt").write_text("\n")
    table = prepare_stage(tmp_path, texts=str(tmp_path / "texts"))
    assert len(table) == 120 and table.columns == ["name", "text", "label", "split"] and "good/empty.txt" in (tmp_path / "prepare.ipynb").read_text()


def test_prepare_takes_words_with_tags_and_labels_with_separators(tmp_path):
    words = pl.DataFrame({"tokens": [["see", "Paris", str(i)] for i in range(40)], "tags": [["O", "B-LOC", "O"]] * 40})
    words.write_ndjson(tmp_path / "words.jsonl")
    table = prepare_stage(tmp_path, texts=str(tmp_path / "words.jsonl"), text_column="tokens", label_column="tags")
    assert table["label"][0].to_list() == [{"start": 4, "end": 9, "label": "LOC"}]
    pl.DataFrame({"review": [f"text {i}" for i in range(60)], "topics": ["plot; music", "music", "", None] * 15, "author": [str(i // 6) for i in range(60)]}).write_csv(tmp_path / "topics.csv")
    table = prepare_stage(tmp_path, texts=str(tmp_path / "topics.csv"), text_column="review", label_column="topics", separator=";", group_column="author", seed=3)
    assert len(table) == 45 and set(table["label"].list.len()) == {0, 1, 2}, "an empty string is no label, null is unlabelled"
    assert table.group_by("author").agg(pl.col("split").n_unique())["split"].max() == 1


def test_fifty_texts_are_passed_over_often_enough_to_be_learnt(small, tmp_path):
    papermill = pytest.importorskip("papermill")
    reviews(50).write_parquet(tmp_path / "table.parquet")
    parameters = {"table": str(tmp_path / "table.parquet"), "pretrained": str(small), "length": 64, "threads": 1, "model": str(tmp_path / "model"), "training": str(tmp_path / "training")}
    papermill.execute_notebook(STAGES / "train.ipynb", tmp_path / "train.ipynb", parameters, cwd=STAGES, kernel_name="python3", progress_bar=False)
    assert len(pl.read_parquet(tmp_path / "training/history.parquet")) == 30, "two batches to a pass"
