"A stage that reads a file which it did not declare is told so by name, and only then."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlkit.core.digest import file_digest
from mlkit.pipeline.watch import Watcher, named_files, warnings


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A project folder outside the temporary folder of the watched process, whose young files are nobody's."
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "raw.csv").write_text("a,b\n1,2\n")
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def watched(place, code: str, declared=()) -> list[str]:
    "Run code in an interpreter that is watched; return the names that it was warned about."
    start = f"from mlkit.pipeline.watch import start; start('watch.jsonl', {list(map(str, declared))!r})\n"
    subprocess.run([sys.executable, "-c", start + code], check=True, env={**os.environ, "TMPDIR": str(place / "temporary")})
    return [json.loads(line) for line in (place / "watch.jsonl").read_text().splitlines()]


def test_a_file_that_is_read_is_named_once(place):
    assert watched(place, "for _ in range(3): open('data/raw.csv').read()") == ["data/raw.csv"]
    assert 'add `raw = Source("data/raw.csv")` to its parameters cell' in warnings("watch.jsonl")[0]


def test_what_is_declared_is_not_named(place):
    for declared in (place / "data" / "raw.csv", place / "data", place / "data" / "*.csv"):
        (place / "watch.jsonl").unlink(missing_ok=True)
        assert watched(place, "open('data/raw.csv').read()", [declared]) == []


def test_a_file_beside_a_declared_one_is_named(place):
    (place / "data" / "raw.csv.bak").write_text("x")
    (place / "data2").mkdir()
    (place / "data2" / "other.csv").write_text("x")
    assert watched(place, "open('data/raw.csv.bak').read()", [place / "data" / "raw.csv"]) == ["data/raw.csv.bak"]
    (place / "watch.jsonl").unlink()
    assert watched(place, "open('data2/other.csv').read()", [place / "data"]) == ["data2/other.csv"]


def test_what_a_declared_folder_links_to_is_not_named(place):
    (place / "elsewhere.csv").write_text("x")
    (place / "data" / "link.csv").symlink_to(place / "elsewhere.csv")
    assert watched(place, "open('data/link.csv').read()", [place / "data"]) == []


def test_what_the_stage_wrote_itself_is_not_named(place):
    assert watched(place, "open('made.txt', 'w').write('x'); open('made.txt').read(); import os; os.close(os.open('b.bin', os.O_CREAT | os.O_RDWR)); open('b.bin').read()") == []


def test_what_comes_with_the_system_is_not_named(place):
    (place / "helper.py").write_text("x = 1")
    code = "import sys; sys.path.insert(0, '.'); import helper, json, sqlite3, tempfile, socket, ssl\nopen('/etc/passwd').read(); open('/proc/self/status').read(); open(json.__file__).read(); open('/dev/null').read()\nwith tempfile.NamedTemporaryFile('w+') as f: open(f.name).read()"
    assert watched(place, code) == []


def test_a_pinned_file_is_not_named(place):
    code = "from mlkit.core.digest import verify; verify('data/raw.csv', '{}'); open('data/raw.csv').read()"
    assert watched(place, code.format(file_digest("data/raw.csv"))) == []


def test_the_watch_never_breaks_what_it_watches(place):
    code = "import os\nfor odd in (b'data/raw.csv', os.open('data/raw.csv', os.O_RDONLY)): open(odd).close()\nfor bad in ('no/such', 'a\\0b', ''):\n    try: open(bad)\n    except (OSError, ValueError): pass\nos.chdir('/'); import shutil; shutil.rmtree(%r)\ntry: open('gone')\nexcept OSError: print('fine')"
    (place / "inner").mkdir()
    assert watched(place, code % str(place / "inner")) == ["data/raw.csv"]


def test_a_report_that_cannot_be_written_breaks_nothing(place):
    code = "import os; os.closerange(3, 20); print(open('data/raw.csv').read())"
    assert watched(place, code) == []


def test_code_that_names_files_is_found(place):
    assert named_files("import polars as pl\npl.read_csv('data/raw.csv')") == ["data/raw.csv"]
    assert named_files("pl.scan_csv('data/*.csv')") == ["data/*.csv"]
    assert named_files("frame.write_csv('data/raw.csv'); x = 'raw'; y = 'no/such.csv'") == []
    assert named_files("%time\n!ls\npl.read_csv('data/raw.csv')") == ["data/raw.csv"]
    assert named_files("this is no Python") == [] and named_files("x = '\\0/' + '*' * 9") == []


def test_a_pattern_that_matches_nothing_walks_no_disk(place):
    deep = place / "deep"
    for n in range(30):
        (deep / str(n) / "inner" / "most").mkdir(parents=True)
    began = time.perf_counter()
    assert named_files("x = '/**/no*such*.csv'; y = '**/no*such*.csv'") == [] and time.perf_counter() - began < 0.1


def test_it_costs_nothing_measurable(place):
    code = "import time\nfor n in range(100): open(f'/proc/self/{\"status\"}').close()\nt = time.perf_counter()\nfor n in range(2000): open('/proc/self/status').close()\nprint((time.perf_counter() - t) / 2000)"
    bare = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    start = "from mlkit.pipeline.watch import start; start('watch.jsonl', [])\n"
    watching = float(subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=True).stdout)
    assert watching - bare < 200e-6


def test_it_brings_no_heavy_module(place):
    code = "import sys; import mlkit.pipeline.watch; print(sorted({'torch', 'polars', 'numpy', 'IPython', 'zmq', 'papermill'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_names_make_good_python(place):
    Path("odd.jsonl").write_text('"data/2024 sales-final.csv"\n')
    (line,) = warnings("odd.jsonl")
    name = line.split("`")[1].split(" = ")[0]
    assert name.isidentifier()
    assert Watcher(os.devnull, []).counts("/no/such/file") is False
