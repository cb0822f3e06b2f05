"""Fine-tuning MiniLM on the Stanford Sentiment Treebank: quality beside a bag of words, and speed beside the Trainer of transformers.

`python tests/benchmarks/bench_nlp.py quality [--methods words,full,lora] [--seeds 0,1,2]` trains on the 6,920 sentences, keeps the best epoch by the validation part and touches the test part once a seed. `words` is TF-IDF
of words and pairs of words with a logistic regression of scikit-learn, its penalty chosen by the validation part: the floor that a network has to beat.
`... glue` trains on GLUE's 67,349 phrases (validation part only: GLUE publishes no test labels). `... speed [--sentences 1920]` trains one epoch with each side in turn. All need $MLKIT_DATA/sst2.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from bench import in_turn, report

METHODS = {
    "words": {},
    "full": {"model": {}, "epochs": 4},
    "lora": {"model": {"lora": 16}, "epochs": 4},
    "glue": {"model": {"lr": 3e-4}, "epochs": 3, "data": "sst2-glue"},
}


def measured(call: dict) -> dict:
    "Run this file again as a child that does one thing, so that its peak memory is its own."
    done = subprocess.run([sys.executable, __file__, "child", json.dumps(call)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    print(done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def train(data: str, method: str, seed: int, precision: str) -> dict:
    "Fine-tune once."
    from mlkit.data import load
    from mlkit.nlp import TextClassifier, TextData
    from mlkit.train import fit

    settings, started = METHODS[method], time.process_time()
    texts = TextData(load(data))
    result = fit(TextClassifier("minilm", texts, seed=seed, **settings["model"]), texts, epochs=settings["epochs"], seed=seed, progress=False, precision=precision)
    row = {"method": method, "seed": seed, "validation": result.best["validation_accuracy"], "epoch": result.best["epoch"]}
    sides = set(texts.frame["split"])
    row["test"] = result.evaluate("test").accuracy if "test" in sides else None
    return row | {"seconds": result.seconds, "processor seconds": time.process_time() - started, "threads": result.settings["threads"]}


def words(data: str, seed: int, **_) -> dict:
    "TF-IDF and a logistic regression."
    from mlkit.data import load
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    started, wall, frame = time.process_time(), time.perf_counter(), load(data)
    sides = {side: frame.filter(split=side) for side in frame["split"].unique()}
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(sides["train"]["text"].to_list())
    score = lambda model, side: float(model.score(vectors.transform(sides[side]["text"].to_list()), sides[side]["label"].to_list()))
    made = [LogisticRegression(C=c, max_iter=1000, random_state=seed).fit(vectors.transform(sides["train"]["text"].to_list()), sides["train"]["label"].to_list()) for c in (0.3, 1, 3, 10, 30)]
    best = max(made, key=lambda model: score(model, "validation"))
    row = {"method": "words", "seed": seed, "validation": score(best, "validation"), "epoch": None, "test": score(best, "test") if "test" in sides else None}
    return row | {"seconds": time.perf_counter() - wall, "processor seconds": time.process_time() - started, "threads": 1}


def ours(sentences: int) -> dict:
    "One epoch with mlkit, in float32 as the other side."
    import polars as pl
    from mlkit.data import load
    from mlkit.nlp import TextClassifier, TextData
    from mlkit.train import fit

    frame = load("sst2")
    texts = TextData(pl.concat([frame.filter(split="train").head(sentences), frame.filter(split="validation")]))
    result = fit(TextClassifier("minilm", texts), texts, epochs=1, progress=False, limit_val_batches=0, monitor="train_loss", precision="32-true")
    return {"examples/s": sentences / result.history["seconds"][0], "validation": result.model.evaluate(texts, "validation").accuracy}


def theirs(sentences: int) -> dict:
    "One epoch with the Trainer of transformers: the same weights, batches, learning rate and padding to the longest of a batch."
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
    from mlkit.data import load
    from mlkit.nlp.data import locate_model
    from mlkit.train.fitting import use_threads

    use_threads()
    place, frame = locate_model("minilm"), load("sst2")
    tokenizer, sides = AutoTokenizer.from_pretrained(place), {}
    for side, n in (("train", sentences), ("validation", None)):
        rows = frame.filter(split=side).head(n or len(frame))
        coded = tokenizer(rows["text"].to_list(), truncation=True, max_length=256)
        sides[side] = [{"input_ids": ids, "attention_mask": mask, "labels": int(label == "positive")} for ids, mask, label in zip(coded["input_ids"], coded["attention_mask"], rows["label"])]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=2, dtype=torch.float32)
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 1e-4, "warmup_steps": 0.1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, TrainingArguments(folder, **settings), data_collator=DataCollatorWithPadding(tokenizer), train_dataset=sides["train"])
        done = trainer.train()
        right = np.argmax(trainer.predict(sides["validation"]).predictions, 1) == [row["labels"] for row in sides["validation"]]
    return {"examples/s": sentences / done.metrics["train_runtime"], "validation": float(right.mean())}


def child(call: dict) -> dict:
    found = {"train": train, "words": words, "ours": ours, "theirs": theirs}[call.pop("do")](**call)
    return found | {"peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


def quality(args) -> list[dict]:
    methods = ["glue"] if args.part == "glue" else args.methods.split(",")
    calls = [{"do": "words" if m == "words" else "train", "data": METHODS[m].get("data", "sst2"), "method": m, "seed": int(s), "precision": args.precision} for m in methods for s in args.seeds.split(",")]
    rows = [measured(call) for call in calls]
    for method in methods:
        own = [r for r in rows if r["method"] == method]
        mean = {k: statistics.mean(r[k] for r in own) if own[0][k] is not None else None for k in own[0] if k not in ("method", "seed")}
        spread = [r["test"] or r["validation"] for r in own]
        rows.append({"method": method, "seed": f"mean of {len(own)}, {min(spread):.4f} to {max(spread):.4f}", **mean})
    return rows


def speed(args) -> list[dict]:
    kept = {"ours": [], "theirs": []}

    def run(side):
        kept[side].append(measured({"do": side, "sentences": args.sentences}))
        return args.sentences / kept[side][-1]["examples/s"]

    in_turn(args.runs, mlkit=lambda: run("ours"), trainer=lambda: run("theirs"))
    rows = [{"side": side, **{k: statistics.median(r[k] for r in runs) for k in runs[0]}} for side, runs in kept.items()]
    return [row | {"times theirs": row["examples/s"] / rows[1]["examples/s"]} for row in rows]


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
        raise SystemExit
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["quality", "glue", "speed"])
    parser.add_argument("--methods", default="words,full,lora")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--precision", default="auto", help='"32-true" to compare with a processor that has no bfloat16')
    parser.add_argument("--sentences", type=int, default=1920)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    sys.argv[1:] = ["--json", args.json] if args.json else []
    rows = speed(args) if args.part == "speed" else quality(args)
    cores = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    report(f"SST-2 with MiniLM: {args.part}, {cores} threads, {args.precision}", rows, ["aims: 88.0 % test from 6,920 sentences, LoRA within 0.7 points; 91.3 % validation from GLUE's; 1.5 times the examples a second of the Trainer"])
