"""What optimisation brings over torch eager: latency of a convolution network and a transformer, latency and accuracy of a trained one; one thread.

`python tests/benchmarks/bench_optimize.py [resnet] [transformer] [fashion] [--json FILE]`; all three without a name. Networks take turns, ratios are medians within rounds. The weights of the first
two are random: what they answer is compared with the float network only. The third is trained here on Fashion-MNIST (from $MLKIT_DATA) and judged on test images that nothing was chosen by.
"""

import copy
import sys
import tempfile
import warnings

import numpy as np
import torch
from bench import report

from mlkit.bundle.predict import open_session
from mlkit.optimize import Budget, Retrain, dynamic_int8, fuse_transformer, ratios, search, static_int8, time_in_turn
from mlkit.optimize.measurement import pinned
from mlkit.optimize.pruning import take_out

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
         "MB": len(networks[r["name"]]) / 1e6 if r["name"] in networks else None, "answers move": moved.get(r["name"]), "accuracy": None}
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


def fashion() -> list[dict]:
    "A small network trained on Fashion-MNIST, and what `search` makes of it."
    import polars as pl

    from mlkit.data import hold_out, load
    from mlkit.train import evaluate, fit
    from mlkit.vision import Augment, ImageClassifier, ImageData

    table = hold_out(load("fashion-mnist").sample(24_000, seed=0), "image", seed=0)
    data = ImageData(table, augment=Augment(flip=True))
    result = fit(ImageClassifier("resnet10t", data), data, epochs=3, threads=1)
    with tempfile.TemporaryDirectory() as home:
        parent = result.bundle(f"{home}/model")
        retrain = Retrain(result.model, data, epochs=3, prune=(0.5,), options={"threads": 1})
        found = search(parent, table, Budget(max_drop=0.005), label="label", retrain=retrain)
        print(found, file=sys.stderr)
        test = table.filter(split="test")
        networks = {t.name: t.candidate.model for t in found.trials if t.loss}
        accuracies = {}
        for name in networks:
            answers = found.take(name).save(f"{home}/variant").predict(test)
            accuracies[name] = evaluate(answers.with_columns(test["label"].cast(pl.String))).accuracy
        one = data.dataset("test").pixels[:1]
        with torch.inference_mode():
            expected = result.model(one).numpy()
        rows = timed("resnet10t on Fashion-MNIST", lambda: result.model(one), networks, {"image": one.numpy()}, expected)
        chosen = found.chosen and found.chosen.name
    return [row | {"network": row["network"] + (" (chosen)" if row["network"] == chosen else ""), "accuracy": accuracies.get(row["network"])} for row in rows]


SECTIONS = {"resnet": resnet, "transformer": transformer, "fashion": fashion}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    asked = [word for word in sys.argv[1:] if word in SECTIONS] or list(SECTIONS)
    sys.argv = [word for word in sys.argv if word not in SECTIONS]
    rows = [row for name in asked for row in SECTIONS[name]()]
    aims = ["aims: ResNet-18 int8 3 times, 6 times pruned; transformer 1.8 times; Fashion-MNIST 3 times within 0.5 points"]
    report("Optimised against torch eager, one thread", rows, aims)
