"""What optimisation brings over torch eager, one thread: latency of a convolution network and a transformer, latency and quality of three trained models.

`python tests/benchmarks/bench_optimize.py [resnet] [digits] [transformer] [fashion] [text] [series] [--json FILE]`; all of them without a name. Networks take turns, ratios are medians within rounds. The weights of
`resnet` and `transformer` are random: what they answer is compared with the float network only. The others are trained here for minutes (data from $MLKIT_DATA) and scored on test rows that nothing was chosen by: accuracy, or
minus the mean squared error, whose drop is a share of the error. A score is that of a short training; the drop is what optimisation costs.
"""

import copy
import sys
import tempfile
import warnings

import numpy as np
import polars as pl
import torch
from bench import report

from mlkit.bundle import Bundle
from mlkit.bundle.predict import open_session
from mlkit.optimize import RECIPES, Budget, Retrain, compare, dynamic_int8, fuse_transformer, ratios, search, static_int8, time_in_turn
from mlkit.optimize.measurement import pinned
from mlkit.optimize.pruning import take_out
from mlkit.optimize.quantization import calibration_feeds

ROUNDS = 21


def timed(model: str, eager, networks: dict[str, bytes], feed: dict, expected: np.ndarray) -> list[dict]:
    "Time networks against torch eager; a row for each."
    with pinned(1), torch.inference_mode():
        sessions = {name: open_session(content, 1) for name, content in networks.items()}
        calls = {"torch eager": lambda _: eager()} | {name: lambda given, s=session: s.run(None, given) for name, session in sessions.items()}
        table = ratios(time_in_turn(calls, [feed], rounds=ROUNDS), "torch eager")
    found = {name: session.run(None, feed)[0] for name, session in sessions.items()}
    moved = {name: float(np.abs(answer - expected).max() / np.abs(expected).max()) for name, answer in found.items() if not name.startswith("pruned")}
    return [
        {"model": model, "network": r["name"], "ms": r["ms"], "times as fast": 1 / r["ratio"], "low": 1 / r["ratio_high"], "high": 1 / r["ratio_low"],
         "MB": len(networks[r["name"]]) / 1e6 if r["name"] in networks else None, "answers move": moved.get(r["name"]), **dict.fromkeys(("score", "drop, %", "drop_low, %", "drop_high, %"))}
        for r in table.to_dicts()
    ]  # fmt: skip


def resnet() -> list[dict]:
    "ResNet-18 on one image of 224 x 224."
    import timm

    from mlkit.vision import to_onnx
    from mlkit.vision.models import Network

    torch.manual_seed(0)
    network = Network(timm.create_model("resnet18"), [124.0] * 3, [58.0] * 3).eval()
    images = np.random.default_rng(0).integers(0, 256, (16, 3, 224, 224), dtype=np.uint8)
    feeds = [{"image": images[i : i + 4]} for i in range(0, 16, 4)]
    example = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    smaller = copy.deepcopy(network)
    take_out(smaller, (example,), {}, 0.5)
    floats, pruned = to_onnx(network, example), to_onnx(smaller, example)
    networks = {"onnx float": floats, "dynamic int8": dynamic_int8(floats), "static int8": static_int8(floats, feeds, "minmax")}
    networks |= {"pruned 50%": pruned, "pruned 50%, static int8": static_int8(pruned, feeds, "minmax")}
    one = torch.from_numpy(images[:1])
    with torch.inference_mode():
        expected = network(one).numpy()
    return timed("ResNet-18 at 224", lambda: network(one), networks, {"image": images[:1]}, expected)


def transformer() -> list[dict]:
    "A transformer of the shape of MiniLM-L6 on one text of 128 tokens."
    import onnx
    from transformers import BertConfig, BertForSequenceClassification

    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = BertForSequenceClassification(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).logits

    torch.manual_seed(0)
    network, random = Scores().eval(), np.random.default_rng(0)
    given = {"input_ids": random.integers(0, 30_000, (4, 128)), "attention_mask": np.ones((4, 128), np.int64)}
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=512)}
    arguments = tuple(torch.from_numpy(v) for v in given.values())
    program = torch.onnx.export(network, arguments, dynamic_shapes=(sizes, sizes), input_names=list(given), output_names=["logits"], dynamo=True, verbose=False)
    floats = onnx.ModelProto.SerializeToString(program.model_proto)
    fused = fuse_transformer(floats)
    networks = {"onnx float": floats, "fused": fused, "dynamic int8": dynamic_int8(floats), "fused, dynamic int8": dynamic_int8(fused)}
    networks["static int8"] = static_int8(floats, [given], "minmax")
    single = {name: values[:1] for name, values in given.items()}
    one = [torch.from_numpy(v) for v in single.values()]
    with torch.inference_mode():
        expected = network(*one).numpy()
    return timed("6 layers of 384, 128 tokens", lambda: network(*one), networks, single, expected)


def judged(title: str, parent: Bundle, frame: pl.DataFrame, label: str, eager, **options) -> list[dict]:
    "What `search` makes of a trained network: each candidate timed against torch eager on one row, and scored on test rows that nothing was chosen by."
    found = search(parent, frame, Budget(max_drop=0.005), label, **options)
    print(found, file=sys.stderr)
    test, networks = frame.filter(split="test"), {t.name: t.candidate.model for t in found.trials if t.loss}
    feed, before, losses = calibration_feeds(parent, test, rows=9, batch=1)[4], parent.predict(test), {}
    with tempfile.TemporaryDirectory() as home:
        for name in networks:
            losses[name] = compare(parent.manifest.task, before, found.take(name).save(f"{home}/variant").predict(test), test[label])
    given = {name: torch.from_numpy(values) for name, values in feed.items()}
    with torch.inference_mode():
        expected = eager(**given).numpy()
    rows, chosen = timed(title, lambda: eager(**given), networks, feed, expected), found.chosen and found.chosen.name
    scores = {name: {"score": loss.score, "drop, %": 100 * loss.drop, "drop_low, %": 100 * loss.low, "drop_high, %": 100 * loss.high} for name, loss in losses.items()}
    return [row | scores.get(row["network"], {}) | {"network": row["network"] + (" (chosen)" if row["network"] == chosen else "")} for row in rows]


def fashion() -> list[dict]:
    "The recipe for small images, trained on Fashion-MNIST for a few epochs."
    from mlkit.data import hold_out, load
    from mlkit.vision import RECIPES as VISION

    table = hold_out(load("fashion-mnist").sample(12_000, seed=0), "image", seed=0)
    result = VISION["small"].but(fit={"epochs": 2, "average": None}).train(table, threads=1)
    with tempfile.TemporaryDirectory() as home:
        parent, model = result.bundle(f"{home}/model"), result.model
        retrain = Retrain(model, result.data, epochs=2, prune=(0.5,), aware=False, options={"threads": 1})
        return judged("small_resnet on Fashion-MNIST", parent, table, "label", lambda image: model(image), retrain=retrain)


def digits() -> list[dict]:
    "ResNet-18 trained on digits that are blown up to 224 x 224; half of its channels taken out, and trained on."
    from mlkit.data import load
    from mlkit.train import fit
    from mlkit.vision import ImageClassifier, ImageData

    table = load("digits").sample(1_200, seed=0)
    table = table.with_columns(split=pl.Series(["train"] * 700 + ["validation"] * 200 + ["test"] * 300))
    options, learning = {"size": 224, "channels": 3, "batch_size": 20, "augment": None}, {"threads": 1, "precision": "bf16-mixed"}
    data, growing = ImageData(table, **options), ImageData(table, grow=0.25, **options)
    model = fit(ImageClassifier("resnet18", data, lr=2e-3), growing, epochs=4, **learning).model
    with tempfile.TemporaryDirectory() as home:
        parent = model.export_bundle(f"{home}/model", data)
        retrain = Retrain(model, data, epochs=3, prune=(0.5,), aware=False, options=learning)
        return judged("ResNet-18 on digits at 224", parent, table, "label", lambda image: model(image), recipes=[("static int8 (minmax)",)], retrain=retrain)


def text() -> list[dict]:
    "MiniLM with its real weights, fine-tuned on a part of SST-2's sentences."
    from mlkit.data import hold_out, load
    from mlkit.nlp import TextClassifier, TextData
    from mlkit.train import fit

    table = load("sst2")
    table = pl.concat([table.filter(split="train").sample(1_000, seed=0), table.filter(pl.col("split") != "train")])
    column = next(c for c in ("text", "sentence") if c in table.columns)
    table = hold_out(table, column, seed=0).rename({column: "text"}, strict=False)
    data = TextData(table, length=128, batch_size=32)
    result = fit(TextClassifier("minilm", data), data, epochs=1, threads=1)
    with tempfile.TemporaryDirectory() as home:
        parent, model = result.bundle(f"{home}/model"), result.model
        recipes = [r for r in RECIPES if "static" not in r[0]]
        return judged("MiniLM on SST-2", parent, table, "label", lambda **tokens: model.network(**tokens), recipes=recipes)


def series() -> list[dict]:
    "A perceptron for the seven variables of ETTh1, 336 hours to look back and 96 ahead."
    from mlkit.data import load
    from mlkit.timeseries import SeriesData, forecaster, request_rows

    frame = load("etth1").head(14_400)
    data = SeriesData(frame, [c for c in frame.columns if c != "time"], horizon=96, context=336, validation=2880, test=2880, calendar=False)
    made = forecaster(data, "perceptron", epochs=2, windows=20_000, threads=1)

    def asked(side: str, most: int) -> pl.DataFrame:
        windows = data.windows(side)
        numbers = np.linspace(0, len(windows) - 1, most).astype(int)
        return request_rows(made, data, windows, numbers).with_columns(actual=pl.Series(windows[numbers]["target"].numpy()), split=pl.lit(side))

    rows = pl.concat([asked("train", 256), asked("validation", 1000), asked("test", 2000)])
    with tempfile.TemporaryDirectory() as home:
        parent = made.export_bundle(f"{home}/model", data)
        return judged("perceptron on ETTh1", parent, rows, "actual", lambda history: made.calibrated(history))


SECTIONS = {"resnet": resnet, "digits": digits, "transformer": transformer, "fashion": fashion, "text": text, "series": series}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    asked = [word for word in sys.argv[1:] if word in SECTIONS] or list(SECTIONS)
    sys.argv = [word for word in sys.argv if word not in SECTIONS]
    rows = [row for name in asked for row in SECTIONS[name]()]
    aims = ["aims: ResNet-18 int8 3 times, 6 times pruned; transformer 1.8 times; Fashion-MNIST 3 times, MiniLM 1.8 times at a quarter of the size, both within 0.5 points; ETTh1 5 times within 1 % of the error"]
    report("Optimised against torch eager, one thread", rows, aims)
