"Tables, splits, sources and images keep their promises."
import io
import os
import struct
import subprocess
import sys
import zlib
from datetime import UTC, datetime, timedelta
import buckets
import dataframely as dy
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from mlkit.core.errors import MLKitError
from mlkit.data.contracts import ContractError, check
from mlkit.data.images import ImageError, ImagePreprocess, decode, encode_png, image_table
from mlkit.data.leaks import drop_leaks, find_leaks
from mlkit.data.sources import CATALOGUE, load
from mlkit.data.splits import SplitError, hold_out, split, split_by_time
from mlkit.data.tables import TableError, scan

TORCH_FREE = """
import importlib, pkgutil, sys
for name in ("torch", "pandas", "pytorch_lightning", "timm"):
    sys.modules[name] = None
for room in ("mlkit.data", "mlkit.bundle"):
    package = importlib.import_module(room)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{room}.{module.name}")
    [getattr(package, name) for name in dir(package)]
from mlkit.data import load
assert len(load("digits-small")) == 1797
"""


def test_data_and_bundle_need_neither_torch_nor_pandas():
    subprocess.run([sys.executable, "-c", TORCH_FREE], check=True)


def test_importing_the_front_doors_loads_nothing_heavy():
    code = "import mlkit.data, mlkit.bundle, mlkit.train, mlkit.vision, sys; print([m for m in ('polars', 'numpy', 'torch', 'PIL') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=60, unique=True), st.integers(0, 5))
def test_no_row_ever_changes_its_side(keys, seed):
    frame = pl.DataFrame({"key": keys}, schema={"key": pl.String})
    sides = dict(split(frame, "key", seed=seed).iter_rows())
    for part in (frame[::2], frame.reverse(), frame.with_columns(more=1)):
        assert all(sides[row["key"]] == row["split"] for row in split(part, "key", seed=seed).iter_rows(named=True))


def test_copies_of_an_image_stay_on_one_side():
    digits = load("digits").head(300)
    png = pl.Series("image", [encode_png(a) for a in digits["image"].to_numpy()])
    table = split(pl.concat([pl.DataFrame([png])] * 2), "image")
    assert table.group_by("image").agg(pl.col("split").n_unique())["split"].max() == 1


def test_a_published_test_split_is_left_alone():
    frame = pl.DataFrame({"row": range(500), "split": ["train"] * 400 + ["test"] * 100})
    held = hold_out(frame, "row")
    assert held.filter(split="test")["row"].to_list() == list(range(400, 500))
    assert 20 <= held.filter(split="validation").height <= 60


def test_compressed_tables_are_read(tmp_path):
    import gzip

    for mark in (",", ";", "\t"):
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(f'"a, b"{mark}y\n1{mark}2\n'.encode()))
        assert scan(tmp_path / "a.csv.gz").collect().rows() == [(1, 2)]


@pytest.mark.parametrize("make, words", [(lambda p: None, "no tables and no images"), (lambda p: Image.new("L", (2, 2)).save(p / "1.png"), "no class folders")])
def test_a_folder_without_classes_is_explained(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(TableError, match=words):
        scan(tmp_path)


def test_hidden_files_are_no_images(tmp_path):
    for name in ("cat/1.png", "cat/._1.png", ".thumbs/1.png", "dog/deep/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / name)
    found = scan(tmp_path).collect()
    assert found["label"].to_list() == ["cat", "dog"]


def test_a_missing_data_set_says_where_it_looked_and_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MLKIT_DATA", str(tmp_path))
    with pytest.raises(MLKitError) as caught:
        load("fashion-mnist")
    fashion = CATALOGUE["fashion-mnist"]
    assert all(word in str(caught.value) for word in (str(tmp_path), fashion.url, fashion.licence))


def test_a_data_folder_is_preferred_and_verified(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/mnist_5k.csv.gz").write_bytes(b"something else")
    monkeypatch.setenv("MLKIT_DATA", str(tmp_path))
    with pytest.raises(MLKitError, match="sha256"):
        load("digits")


def _file(mode, size=(4, 3), form="PNG", **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode, form", [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "BMP"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("I;16", "PNG"), ("F", "TIFF")])
def test_every_mode_becomes_grey_or_colour_bytes(mode, form):
    for channels in (1, 3):
        pixels = decode(_file(mode, form=form), channels)
        assert pixels.shape == (3, 4, channels) and pixels.dtype == np.uint8


def test_one_pixel_is_an_image():
    assert ImagePreprocess(8, 8, 1).one(_file("L", (1, 1))).shape == (1, 8, 8)


def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("mlkit.data.images.MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="pixels are more than"):
        decode(_file("L", (11, 10)))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_bytes_crash_the_decoder(junk, cut):
    whole = _file("RGB", (20, 20), "JPEG")
    for data in (junk, whole[:cut], whole[:cut] + junk):
        try:
            decode(data)
        except ImageError:
            pass


def test_broken_images_are_counted_and_named(tmp_path):
    (tmp_path / "good.png").write_bytes(_file("L"))
    (tmp_path / "torn.png").write_bytes(_file("RGB", (50, 50))[:60])
    frame = pl.DataFrame({"path": ["good.png", "torn.png", "gone.png"], "label": ["a", "b", "b"]})
    good, broken = image_table(frame, base=tmp_path)
    assert good["name"].to_list() == ["good.png"] and broken["name"].to_list() == ["torn.png", "gone.png"]


def test_an_unknown_label_column_is_suggested_for():
    with pytest.raises(TableError, match='Did you mean "species"'):
        image_table(pl.DataFrame({"image": [b""], "species": ["cat"]}), label="specis")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("abc")), min_size=1, max_size=80))
def test_a_lazy_split_is_the_eager_one_and_stratifying_keeps_keys_together(rows):
    frame = pl.DataFrame(rows, schema={"key": pl.Int64, "label": pl.String}, orient="row")
    for options in ({}, {"stratify": "label"}):
        table = split(frame, "key", **options)
        assert table.equals(split(frame.lazy(), "key", **options).collect())
        assert table.select("key", "label").equals(frame) and table.group_by("key").agg(pl.col("split").n_unique())["split"].max() == 1


def test_a_split_replaces_the_one_that_was_there():
    frame = pl.DataFrame({"key": range(50), "split": "train"})
    assert split(frame, "key", {"a": 0.5, "b": 0.5})["split"].unique().sort().to_list() == ["a", "b"]
    with pytest.raises(SplitError, match="missing in 1 rows"):
        split(pl.DataFrame({"a": ["x", None], "b": [1, 2]}), ["a", "b"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=10, max_size=60).filter(lambda times: len(set(times)) > 8))
def test_no_row_of_the_past_comes_after_one_of_the_future(times):
    try:
        table = split_by_time(pl.DataFrame({"time": times}), "time", gap=2)
    except SplitError as error:
        assert "must begin later" in str(error)
        return
    spans = {side: (part["time"].min(), part["time"].max()) for (side,), part in table.group_by("split") if side}
    order = [spans[side] for side in ("train", "validation", "test") if side in spans]
    assert all(before[1] + 2 < after[0] for before, after in zip(order, order[1:])), spans


def test_a_photo_in_another_size_and_format_leaks(tmp_path):
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((160, 120), Image.Resampling.BICUBIC) for _ in range(60)]
    files = []
    for photo in photos:
        photo.save(buffer := io.BytesIO(), "PNG")
        files.append(buffer.getvalue())
    photos[7].resize((80, 60)).save(buffer := io.BytesIO(), "JPEG", quality=60)
    table = pl.DataFrame({"image": [*files, buffer.getvalue(), b"torn"], "split": ["train"] * 50 + ["test"] * 12})
    leaks = find_leaks(table, "image")
    assert leaks.select("row", "other").rows() == [(60, 7)]
    for row, content in enumerate(table["image"]):
        (tmp_path / f"{row}.jpg").write_bytes(content)
    paths = table.select("split", path=pl.Series([str(tmp_path / f"{row}.jpg") for row in range(62)]))
    assert find_leaks(paths, "path").equals(leaks), "paths of pictures are no texts"
    assert len(drop_leaks(table, leaks)) == 61


def test_texts_that_differ_in_punctuation_or_a_word_leak():
    texts = load("diagnoses")["text"].head(300).to_list()
    posted = "This film is a long and rather slow but in the end deeply moving story about two brothers."
    table = pl.DataFrame({"text": [*texts, posted, posted.upper() + "!!", posted.replace("brothers", "brother"), "", None], "split": ["train"] * 301 + ["test"] * 4})
    assert find_leaks(table, "text").filter(pl.col("other") == 300)["row"].to_list() == [301, 302]
    assert not find_leaks(table.filter(pl.col("text").is_null() | (pl.col("text") != "")), "text").filter(pl.col("row") > 302).height


class Person(dy.Schema):
    "What a contract of this test asks."

    name = dy.String(primary_key=True, min_length=1)
    age = dy.Int64(nullable=True, min=0, max=120)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "ada", "bob", "eve"]), st.one_of(st.none(), st.integers(-5, 130))), max_size=12))
def test_no_row_is_lost_between_good_and_bad(rows):
    frame = pl.DataFrame(rows, schema={"name": pl.String, "age": pl.Int64}, orient="row").with_row_index("number")
    checked = check(frame, Person, refers={"name": ["ada", "bob"]})
    assert sorted(checked.good["number"].to_list() + checked.bad["number"].to_list()) == list(range(len(rows)))
    assert checked.bad["broken_row"].to_list() == checked.bad["number"].to_list() and all(len(r) for r in checked.bad["broken_rules"])
    names = [name for name, _ in rows]
    nobody = checked.bad.filter(pl.col("broken_rules").list.contains("name: points to nothing"))
    assert nobody["number"].to_list() == [row for row, name in enumerate(names) if name not in ("ada", "bob")], "a row that breaks another rule is looked up as well"
    for name, age in checked.good.select("name", "age").iter_rows():
        assert name in ("ada", "bob") and names.count(name) == 1 and (age is None or 0 <= age <= 120)


def test_a_strict_contract_says_what_is_wrong_and_keeps_the_rows(tmp_path):
    frame = pl.DataFrame({"name": ["ada", "bob"], "age": [200, 30]})
    with pytest.raises(ContractError, match="(?s)1 of 2 rows break Person.*age: max.*200.*bad.parquet"):
        check(frame, Person, strict=True, quarantine=tmp_path / "bad.parquet")
    assert pl.read_parquet(tmp_path / "bad.parquet")["name"].to_list() == ["ada"]


def bomb(width: int, height: int) -> bytes:
    "A PNG of a few bytes that says it is large."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX systems")
def test_what_is_no_image_is_refused_in_words_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for value, words in (
        (bomb(60_000, 60_000), "an image has more than 100,000,000 pixels"), (bomb(12_000, 10_000), "12000 x 10000 pixels are more than 100,000,000"),
        (str(tmp_path / "pipe.png"), "there is no file"), (tmp_path, "there is no file"), (5, "not 5"), (None, "a null"), (b"", "0 bytes: no image"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=words):
            decode(value)


@pytest.fixture(params=["s3", "gs", "az"])
def cloud(request, tmp_path):
    "A bucket of an emulated cloud: what its addresses begin with, and how to put something there."
    if request.param == "az":
        obstore, store = pytest.importorskip("obstore"), pytest.importorskip("obstore.store")
        with buckets.azure("shop", tmp_path):
            there = store.from_url("az://shop")
            yield "az://", lambda key, content: obstore.put(there, key, content)
    else:
        emulated = buckets.s3("shop") if request.param == "s3" else buckets.gs("shop", tmp_path)
        with emulated as client:
            yield f"{request.param}://", lambda key, content: client.put_object(Bucket="shop", Key=key, Body=content, ACL="public-read")


def test_tables_in_a_bucket_are_read_like_files(cloud):
    scheme, put = cloud
    parts = [pl.DataFrame({"x": [i, i + 1]}) for i in (1, 3)]
    for i, part in enumerate(parts):
        part.write_parquet(buffer := io.BytesIO())
        put(f"events/{i}.parquet", buffer.getvalue())
        put(f"lists/{i}.csv", part.write_csv().encode())
        put(f"logs/{i}.jsonl", part.write_ndjson().encode())
    for source in ("events/*.parquet", "lists/*.csv", "logs/*.jsonl", "events/**/*.parquet"):
        assert scan(f"{scheme}shop/{source}").filter(pl.col("x") > 1).collect()["x"].sort().to_list() == [2, 3, 4]
    assert scan(f"{scheme}shop/events/1.parquet").collect().equals(parts[1])


WRONG = {  # what is asked for, and what is answered
    "events": "the ending '' is no table format",
    "events/9.parquet": "There is no file .*events/9.parquet, or no such bucket",
    "none/*.parquet": "No file matches .*none",
    "empty/*.csv": "No file matches .*empty.*, or all that do are empty",
    "torn/1.parquet": "torn/1.parquet cannot be read: parquet: File out of specification",
}


def test_what_cannot_be_read_in_a_bucket_is_named_before_any_query_runs(cloud):
    scheme, put = cloud
    put("empty/1.csv", b"")
    put("torn/1.parquet", b"PAR1 and no more than this")
    for source, words in WRONG.items():
        with pytest.raises(TableError, match=words) as caught:
            scan(f"{scheme}shop/{source}")
        assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)
    with pytest.raises(TableError, match=f"There is no bucket {scheme}nobody"):
        scan(f"{scheme}nobody/events/*.parquet")


DENIED = """
import sys
import zlib
from mlkit.data.tables import TableError, scan
try:
    scan(sys.argv[1])
except TableError as error:
    print(error)
"""


def told(source: str) -> str:
    "What a process of its own is told: polars keeps connections, and with them what let it in."
    return subprocess.check_output([sys.executable, "-W", "ignore", "-c", DENIED, source], text=True)


def test_who_may_not_read_a_bucket_is_told_how_to_say_who_they_are(cloud, monkeypatch):
    scheme, put = cloud
    put("list.csv", b"x\n1\n")
    assert told(f"{scheme}shop/list.csv") == ""
    if scheme == "s3://":
        monkeypatch.setattr("moto.core.responses.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
        names = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    elif scheme == "gs://":
        monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        names = "GOOGLE_SERVICE_ACCOUNT"
    else:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
        names = "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
    said = told(f"{scheme}shop/list.csv")
    assert f"{scheme}shop/list.csv may not be read: access is denied" in said and names in said and said.count("\n") == 1


HOURS = pl.DataFrame({"time": pl.datetime_range(datetime(2026, 10, 24), datetime(2026, 10, 26), "1h", time_zone="Europe/Berlin", eager=True)})


def test_a_moment_is_the_same_in_every_zone():
    "Two hours of the night on which summer ends have one name, and still they part where the moment is."
    start = datetime(2026, 10, 25, 1, tzinfo=UTC)
    table = split_by_time(HOURS, "time", starts={"test": start}).with_columns(pl.col("time").dt.convert_time_zone("UTC"))  # Python calls doubled hours unequal across zones
    assert table.filter(split="test")["time"].min() == start and table.filter(split="train")["time"].max() == start - timedelta(hours=1)
    with pytest.raises(SplitError, match="no moment of"):
        split_by_time(HOURS, "time", starts={"test": datetime(2026, 10, 25)})


@pytest.mark.parametrize("values, words", [([1.0, float("nan"), 2.0], "missing in 1 of 3"), ([[1], [2]], "no time")])
def test_what_is_no_time_cannot_be_split_by(values, words):
    with pytest.raises(SplitError, match=words):
        split_by_time(pl.DataFrame({"time": values}), "time")


@pytest.mark.parametrize("key, words", [([], "a column or several"), ("split", "receives the sides"), ("duration", "no key"), (["bytes", "number"], "no key")])
def test_what_is_no_key_is_told(key, words):
    frame = pl.DataFrame({"split": ["a"], "duration": [timedelta(1)], "bytes": [b"\xff"], "number": [1]})
    with pytest.raises(SplitError, match=words):
        split(frame, key)
    assert split(frame, "bytes", column="side")["side"].item() in ("train", "validation", "test")


def test_a_key_is_the_same_as_a_number_a_text_or_a_category():
    numbers = split(pl.DataFrame({"key": range(200)}), "key")["split"]
    for dtype in (pl.UInt8, pl.Int64, pl.String, pl.Categorical):
        values = pl.Series("key", range(200)).cast(pl.String if dtype == pl.Categorical else dtype).cast(dtype)
        assert split(values.to_frame(), "key")["split"].equals(numbers), dtype
