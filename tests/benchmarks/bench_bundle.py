"""What a bundle costs beside the bare onnxruntime call, how long it takes to load, and how soon a fresh process answers.

`predict` starts from what a user has: pixels, and texts that are tokenized. Aims: it adds under 10 % at batch 32; a MiniLM (6 layers, 384 wide, 90 MB) loads in under 0.5 s, golden replay included; from the start of a process to its first
answer, without torch, under 1.0 s.
"""

import os
import statistics
import subprocess
import sys
import time

import numpy as np
import polars as pl
import torch
from bench import in_turn, own_places, report, summary

from mlkit.bundle import Bundle, Manifest, Tensor, package, read_bundle
from mlkit.bundle.inputs import feeds, prepared
from mlkit.data import ImagePreprocess, load
from mlkit.nlp import Embedder
from mlkit.vision.models import to_onnx

TOKENS = 128
FIRST = """
import sys
from mlkit.bundle import Bundle
import polars as pl
print(Bundle.load(sys.argv[1]).predict(pl.read_parquet(sys.argv[2])).to_dicts(), flush=True)
assert "torch" not in sys.modules
"""


def minilm(place) -> tuple[Bundle, pl.DataFrame]:
    "The MiniLM that comes in a package, made an embedder of texts that fill its 128 tokens."
    names = load("diagnoses")["text"].to_list()
    frame = pl.DataFrame({"text": [" and ".join(names[i * 40 : i * 40 + 40]) for i in range(32)]})
    return Embedder.pretrained("minilm", length=TOKENS).export_bundle(place, pl.DataFrame({"text": names[:8]})), frame


def images(place, arch: str, channels: int, side: int) -> tuple[Bundle, pl.DataFrame]:
    "A network of timm with random weights."
    import timm

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = timm.create_model(arch, num_classes=10, in_chans=channels)

        def forward(self, image):
            return self.network(image.float() / 255)

    torch.manual_seed(0)
    model = to_onnx(Scaled(), torch.zeros(2, channels, side, side, dtype=torch.uint8))
    pixels = np.random.default_rng(0).integers(0, 255, (32, side, side, *([3] if channels == 3 else [])), dtype=np.uint8)
    frame = pl.DataFrame({"image": pl.Series(pixels, dtype=pl.Array(pl.UInt8, pixels.shape[1:]))})
    said = Manifest(
        arch, "classification", (Tensor("image", "uint8", ("batch", channels, side, side)),), (Tensor("logits", "float32", ("batch", 10)),),
        {"image": ImagePreprocess(side, side, channels).to_dict()}, tuple("0123456789"),
    )  # fmt: skip
    return package(place, model, said, frame[:4], threads=1), frame


def overhead(bundle: Bundle, frame: pl.DataFrame, runs: int) -> dict:
    "Time `predict` beside the bare call with the tensors at hand, in turn."
    values = feeds(bundle.manifest.inputs, prepared(frame, bundle.prepare))

    def clock(call) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    seconds = in_turn(runs, bare=lambda: clock(lambda: bundle.session.run(None, values)), predict=lambda: clock(lambda: bundle.predict(frame)))
    added = [p - b for p, b in zip(seconds["predict"], seconds["bare"])]
    bare = summary(seconds["bare"])["median"]
    return {"what": f"{bundle.manifest.name}, batch {len(frame)}", "bare, ms": bare * 1000, "predict, ms": summary(seconds["predict"])["median"] * 1000, "added, %": 100 * statistics.median(added) / bare}


def first_answer(*words) -> tuple[float, float]:
    "Seconds until a fresh process has answered, and until it has ended."
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", FIRST, *map(str, words)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        answered = time.perf_counter() - started
    assert process.returncode == 0
    return answered, time.perf_counter() - started


if __name__ == "__main__":
    home = own_places()
    _, texts = minilm(home / "minilm")
    made = [images(home / "digits", "resnet10t", 1, 28), images(home / "resnet18", "resnet18", 3, 224), (Bundle.load(home / "minilm", threads=1), texts)]
    rows = [overhead(bundle, frame, runs) for (bundle, frame), runs in zip(made, (40, 4, 4))]

    def loading(replay: bool) -> float:
        started = time.perf_counter()
        Bundle.load(home / "minilm", threads=1, replay=replay)
        return time.perf_counter() - started

    def read() -> float:
        started = time.perf_counter()
        read_bundle(home / "minilm")
        return time.perf_counter() - started

    texts[:1].write_parquet(home / "texts.parquet")
    made[0][1][:1].write_parquet(home / "image.parquet")
    ended = {"minilm": [], "digits": []}

    def first(name: str, rows: str) -> float:
        answered, whole = first_answer(home / name, home / rows)
        ended[name].append(whole)
        return answered

    calls = {"load of minilm, replay included": lambda: loading(True), "  without replay": lambda: loading(False), "  reading and digests alone": read}
    calls |= {f"process start to first answer, {n}": lambda n=n, f=f: first(n, f) for n, f in (("minilm", "texts.parquet"), ("digits", "image.parquet"))}
    seconds = in_turn(5, **calls) | {f"process start to end, {n}": s for n, s in ended.items()}
    size = sum(os.path.getsize(home / "minilm" / f) for f in os.listdir(home / "minilm")) / 1e6
    notes = [f"{what}: median {summary(s)['median']:.3f} s, fastest {summary(s)['min']:.3f} s" for what, s in seconds.items()]
    report(f"Bundle, one thread; minilm is {size:.0f} MB", rows, [*notes, "aims: added under 10 %, load under 0.5 s, first answer under 1.0 s"])
