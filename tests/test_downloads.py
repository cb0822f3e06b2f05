"What is downloaded is whole or not there, whatever the network, the disk and other processes do."
import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import polars as pl
import pytest

from mlkit.data import sources
from mlkit.data.sources import CATALOGUE, Dataset, SourceError, download, fetch_file, load

CONTENT = bytes(range(256)) * 4000
SHA256, LENGTH = hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)


class Server(http.server.BaseHTTPRequestHandler):
    "Serves CONTENT in as many ways as it has paths, and remembers what was asked for."

    asked: Counter = Counter()

    def do_GET(self):
        self.asked[self.path] += 1
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] else None
        getattr(self, self.path.strip("/"))(start)

    def whole(self, start, status=200, length=LENGTH, sent=CONTENT):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(sent)

    def ranges(self, start, most=None):
        if start and start >= LENGTH:
            return self.send_error(416)
        sent = CONTENT[start or 0 :]
        self.whole(start, 206 if start else 200, len(sent), sent[:most])

    def cut(self, start):
        self.ranges(start, 300_000)

    def cut_without_ranges(self, start):
        self.whole(start, sent=CONTENT if self.asked[self.path] > 2 else CONTENT[:300_000])

    def no_length(self, start):
        self.whole(start, length=None)

    def busy(self, start):
        self.ranges(start) if self.asked[self.path] > 2 else self.send_error(503)

    def moved(self, start):
        self.send_response(302)
        self.send_header("Location", "/ranges")
        self.end_headers()

    def in_a_circle(self, start):
        self.send_response(302)
        self.send_header("Location", self.path)
        self.end_headers()

    def gone(self, start):
        self.send_error(404)

    def slow(self, start):
        self.whole(start, sent=CONTENT[:1000])
        for i in range(1000, LENGTH, 50_000):
            time.sleep(0.02)
            self.wfile.write(CONTENT[i : i + 50_000])

    def log_message(self, *args):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(sources, "PAUSE", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("how, times", [("whole", 1), ("ranges", 1), ("cut", 4), ("cut_without_ranges", 3), ("no_length", 1), ("busy", 3), ("moved", 1)])
def test_a_file_comes_whole_however_it_is_served(url, tmp_path, how, times):
    seen = []
    fetch_file(f"{url}/{how}", tmp_path / "file", SHA256, moved=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"] and Server.asked[f"/{how}"] == times
    assert seen[-1] == (LENGTH, None if how == "no_length" else LENGTH), "the bar ends full"


@pytest.mark.parametrize("part", [CONTENT[:1000], b"of another file", CONTENT, CONTENT + b"and more"])
@pytest.mark.parametrize("how", ["ranges", "whole", "cut"])
def test_whatever_an_earlier_day_has_left_behind_the_file_comes_whole(url, tmp_path, how, part):
    (tmp_path / "file.part").write_bytes(part)
    fetch_file(f"{url}/{how}", tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"]


@pytest.mark.parametrize("how, words, times", [("gone", "404", 1), ("in_a_circle", "infinite loop", 5), ("busy", "broke off 2 times .503", 2)])
def test_a_file_that_cannot_be_had_is_explained_in_a_line(url, tmp_path, how, words, times):
    with pytest.raises(SourceError, match=words) as caught:
        fetch_file(f"{url}/{how}", tmp_path / "file", SHA256, tries=2)
    assert "\n" not in str(caught.value) and names(tmp_path) == [] and Server.asked[f"/{how}"] == times


def test_another_file_is_refused_and_nothing_of_it_stays(url, tmp_path):
    with pytest.raises(SourceError, match="not the file that was expected"):
        fetch_file(f"{url}/whole", tmp_path / "file", "0" * 64)
    assert names(tmp_path) == []


def test_a_full_disk_is_no_broken_connection(url, tmp_path):
    (tmp_path / "file.part").symlink_to("/dev/full")
    with pytest.raises(SourceError, match="cannot be written: No space left on device"):
        fetch_file(f"{url}/whole", tmp_path / "file", SHA256)
    assert Server.asked["/whole"] == 1, "trying again would not mend it"
    (tmp_path / "no folder").write_text("but a file")
    with pytest.raises(SourceError, match="no folder cannot be written"):
        fetch_file(f"{url}/whole", tmp_path / "no folder/file", SHA256)


FETCH = "import sys; from pathlib import Path; from mlkit.data.sources import fetch_file; fetch_file(sys.argv[1], Path(sys.argv[2]), sys.argv[3])"


def test_of_two_processes_that_want_a_file_at_once_one_fetches_it(url, tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", FETCH, f"{url}/slow", tmp_path / "file", SHA256]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (tmp_path / "file").read_bytes() == CONTENT and names(tmp_path) == ["file"] and Server.asked["/slow"] == 1


def test_a_killed_download_goes_on_where_it_stopped(url, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", FETCH, f"{url}/slow", tmp_path / "file", SHA256])
    while not (tmp_path / "file.part").is_file() or not (tmp_path / "file.part").stat().st_size:
        time.sleep(0.02)
    process.kill()
    process.wait()
    there = (tmp_path / "file.part").stat().st_size
    seen = []
    fetch_file(f"{url}/ranges", tmp_path / "file", SHA256, moved=lambda done, total: seen.append(done))
    assert (tmp_path / "file").read_bytes() == CONTENT and seen[0] > there


@pytest.fixture
def numbers(url, tmp_path, monkeypatch):
    "A data set of the catalogue, and two folders of $MLKIT_DATA without it."
    folders = tmp_path / "one", tmp_path / "two"
    [folder.mkdir() for folder in folders]
    monkeypatch.setenv("MLKIT_DATA", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry = Dataset("numbers", "Numbers", "CC0", url, {"file": SHA256}, read=lambda files: pl.DataFrame({"bytes": [files["file"].stat().st_size]}), links={"file": f"{url}/cut"})
    monkeypatch.setitem(CATALOGUE, "numbers", entry)
    return folders


def test_what_lies_in_a_data_folder_is_not_fetched_again(numbers):
    one, two = numbers
    (two / "numbers").mkdir()
    (two / "numbers/file").write_bytes(CONTENT)
    assert download("numbers") == {"file": two / "numbers/file"} and not Server.asked
    assert download("numbers", one) == {"file": one / "numbers/file"} and Server.asked["/cut"] == 4, "unless it must lie elsewhere"


def test_a_damaged_file_is_mended_by_fetching_it(numbers, capsys):
    one, two = numbers
    (two / "file").write_bytes(CONTENT[:1000])
    with pytest.raises(Exception, match="damaged"):
        load("numbers")
    download("numbers")
    assert load("numbers")["bytes"].item() == LENGTH and "file" in capsys.readouterr().out, "with a bar"


@pytest.mark.parametrize("dataset", CATALOGUE.values(), ids=CATALOGUE)
def test_every_entry_of_the_catalogue_says_what_it_is_and_where_it_comes_from(dataset):
    assert CATALOGUE[dataset.name] is dataset and dataset.title and dataset.licence and dataset.url.startswith("https://")
    assert dataset.files and all(len(sha256) == 64 and int(sha256, 16) for sha256 in dataset.files.values())
    assert set(dataset.links) in (set(), set(dataset.files)) and all(link.startswith("https://") for link in dataset.links.values())
    assert bool(dataset.package) == bool(dataset.install), "what a package carries, pip can bring"
