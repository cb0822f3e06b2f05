"The same meaning gives the same key; any change of meaning gives another, and the words for it."

import ast
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import write_stage

from mlkit.pipeline.graph import Sweep, Text, load_pipeline, plan_jobs
from mlkit.pipeline.key import components, explain, imports, key
from mlkit.pipeline.stage import read_stage


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


class Project:
    "A stage and the files beside it."

    def __init__(self, folder: Path):
        self.folder, self.parameters, self.cells, self.tags = folder, 'epochs: int = 5\nlr: float = 0.1\nmodel = Output("model")', ["x = 1", "print(x)"], {}
        folder.mkdir(exist_ok=True)

    def write(self, name: str, text: str):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def parts(self, params=None, inputs=None, sources=None, profile=None) -> dict:
        write_stage(self.folder, "train", self.parameters, *self.cells)
        pipeline = load_pipeline(self.folder)
        return components(plan_jobs(pipeline, params, profile)[0], inputs or {}, sources or {}, pipeline.settings["train"])

    def key(self, *args, **more) -> str:
        return key(json.loads(json.dumps(self.parts(*args, **more))))

    def modules(self, code: str) -> set[str]:
        self.cells = [code]
        return {name for name in self.parts()["modules"] if not name.startswith("mlkit")}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "p")


program = """
import os
from math import pi as π

def clean(rows, *, keep=None):
    '''Clean rows.'''
    return [r.strip() for r in rows if r != "#" and not (keep and r in keep)]

class Model(object):
    size: int = 3
    def fit(self, x, y=None):
        with open(x) as f, open(y) as g:
            for line in f:
                yield line, f"{line!r:>{self.size}}"
        try:
            pass
        except (ValueError, KeyError) as error:
            raise RuntimeError from error
rows = clean(["a", 'b']) + [x ** 2 for x in range(10)][::2]
match rows:
    case [first, *_]:
        print(first, 1_000, 0x10, 1e3)
"""


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([program, "%matplotlib inline\n" + program, "%%time\n" + program]))
def test_formatting_never_counts(tmp_path_factory, chance: random.Random, source: str):
    project = Project(tmp_path_factory.mktemp("p"))
    project.cells = [source]
    before = project.key()
    magic, body = (source.split("\n", 1)[0] + "\n", source.split("\n", 1)[1]) if source.startswith("%") else ("", source)
    lines = []
    for line in (ast.unparse(ast.parse(body)) if chance.random() < 0.5 else body).split("\n"):
        lines.append(line.replace("    ", "  ") + chance.choice(["", "", "   ", "  # a comment"]) if "'''" not in line and '"""' not in line else line.replace("    ", "  "))
        lines += [""] * chance.randint(0, 2) if not line.endswith("\\") else []
    project.cells = [magic + "\n".join(lines)]
    assert project.key() == before


def changes(tree: ast.Module):
    "Yield programs that each differ from `tree` in one thing that means something."
    for node in ast.walk(tree):
        for field in node._fields:
            old = getattr(node, field)
            if isinstance(node, ast.Constant) and field == "value" and isinstance(old, (int, str)):
                new = old + 1 if isinstance(old, int) else old + "x"
            elif field in ("name", "id", "attr", "arg") and isinstance(old, str):
                new = old + "_"
            elif field == "op" and isinstance(old, (ast.Add, ast.Pow)):
                new = ast.Sub()
            elif field == "body" and isinstance(old, list) and len(old) > 1:
                new = old[1:] + old[:1]
            else:
                continue
            setattr(node, field, new)
            try:
                yield ast.unparse(ast.fix_missing_locations(tree))
            finally:
                setattr(node, field, old)


def test_any_change_of_code_counts(project):
    project.cells = [program]
    found = {project.key()}
    programs = [p for p in dict.fromkeys(changes(ast.parse(program))) if ast.dump(ast.parse(p)) != ast.dump(ast.parse(program))]
    for changed in programs:
        project.cells = [changed]
        found.add(project.key())
    assert len(programs) > 60 and len(found) == len(programs) + 1


def test_markdown_outputs_tags_and_empty_cells_do_not_count(project):
    before = project.key()
    path = write_stage(project.folder, "train", project.parameters, *project.cells)
    notebook = json.loads(path.read_text())
    notebook["cells"].insert(1, {"cell_type": "markdown", "metadata": {}, "source": "# A note"})
    notebook["cells"].insert(1, {"cell_type": "code", "metadata": {}, "source": "# only a comment", "outputs": [], "execution_count": None})
    notebook["cells"][-1] |= {"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}], "execution_count": 7, "metadata": {"tags": ["hide-input"]}}
    path.write_text(json.dumps(notebook, indent=4))
    job = plan_jobs(pipeline := load_pipeline(project.folder))[0]
    assert key(components(job, {}, {}, pipeline.settings["train"])) == before
    notebook["cells"][-1]["metadata"] = {"tags": ["raises-exception"]}
    path.write_text(json.dumps(notebook))
    assert key(components(plan_jobs(load_pipeline(project.folder))[0], {}, {}, pipeline.settings["train"])) != before, "a tag that changes what running means does"


def test_a_default_is_no_more_than_the_value_it_gives(project):
    project.write("pipeline.yaml", "profiles: {five: {train.epochs: 5, lr: 1}}\n")
    five = project.key({"train.lr": 1})
    same = [project.key({"epochs": Text("5"), "lr": Text("1.0")}), project.key(profile="five"), project.key({"lr": 1.0, "epochs": Sweep([5, Text("5")])})]
    project.parameters = 'lr = 1.0  # how fast\n\nepochs: int = 5\nmodel = Output("model")'
    assert {five, *same, project.key()} == {five}
    project.parameters = project.parameters.replace("5", "6")
    assert project.key() != five and project.key({"epochs": 5}) == five


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2, width=16) | st.text("ab1", max_size=2), lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text("ab", max_size=1), v, max_size=2), max_leaves=4
)


@settings(max_examples=100, deadline=None)
@given(values, values)
def test_parameters_count_by_what_they_mean(tmp_path_factory, a, b):
    project = Project(tmp_path_factory.getbasetemp() / "values")
    project.parameters = "value: object = None"
    means = [json.dumps(v, sort_keys=True) for v in (a, b)]
    assert (project.key({"value": a}) == project.key({"value": b})) == (means[0] == means[1])


def test_contents_versions_variables_and_outputs_count(project, monkeypatch):
    project.parameters += '\nt = Source("t.csv")'
    project.write("pipeline.yaml", "env: [SEASON]\n")
    monkeypatch.delenv("SEASON", raising=False)
    base = project.parts(sources={"t": "aa"})
    found = [base, project.parts(sources={"t": "bb"}), project.parts(sources={"t": None}), project.parts({"epochs": 6}, sources={"t": "aa"}), base | {"python": "CPython 3.99"}, base | {"distributions": {"x": "1"}}]
    for value in ("summer", "winter", ""):
        monkeypatch.setenv("SEASON", value)
        found.append(project.parts(sources={"t": "aa"}))
    project.parameters = project.parameters.replace('Output("model")', 'Output("other")')
    monkeypatch.delenv("SEASON")
    found.append(project.parts(sources={"t": "aa"}))
    assert len({key(f) for f in found}) == len(found)
    assert "winter" not in json.dumps(found), "the value of a variable is not written down"
    monkeypatch.setenv("UNDECLARED", "1")
    assert key(project.parts(sources={"t": "aa"})) == key(found[-1])


def test_secrets_paths_and_places_never_count(project, tmp_path, monkeypatch):
    project.parameters += '\ntoken: Secret[str] = Secret("TOKEN")'
    monkeypatch.setenv("TOKEN", "hush")
    here = project.key()
    monkeypatch.setenv("TOKEN", "other")
    assert project.key() == project.key({"token": "file:/elsewhere"}) == here
    (tmp_path / "moved").mkdir()
    moved = Project(tmp_path / "moved" / "q")
    moved.parameters = project.parameters
    assert moved.key() == here


def test_the_projects_own_modules_are_followed(project):
    for name, text in {
        "helpers.py": "def clean(x):\n    from deep.inner import f\n    return f(x)\n",
        "deep/__init__.py": "from . import side\n",
        "deep/side.py": "from .inner import f\n",
        "deep/inner.py": "import deep.side\nfrom deep import side as s\nimport os\ndef f(x): ...\n",
        "deep/unused.py": "",
        "space/part.py": "import helpers\n",
        "alone.py": "",
    }.items():
        project.write(name, text)
    helpers = {"helpers", "deep", "deep.side", "deep.inner"}
    for code, found in {
        "from helpers import clean": helpers, "import helpers as h": helpers, "import deep.inner": helpers - {"helpers"}, "from deep import unused": {"deep", "deep.side", "deep.inner", "deep.unused"},
        "import deep\ndeep.unused.g()": {"deep", "deep.side", "deep.inner", "deep.unused"}, "import space.part": {"space.part", *helpers}, "from space import part": {"space.part", *helpers},
        "def f():\n    import alone": {"alone"}, "if True:\n    try:\n        import alone\n    except ImportError: pass": {"alone"}, "%%time\nimport alone": {"alone"}, "%%bash\nimport alone": set(),
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import alone": {"alone"}, "import os, json": set(), "import not_there": set(), "from helpers import *": helpers,
    }.items():  # fmt: skip
        assert project.modules(code) == found, code


def test_a_change_in_a_module_is_seen_at_once_and_named(project):
    project.write("helpers.py", "LIMIT = 1\ndef clean(x):\n    return x\ndef other(): ...\n")
    project.cells = ["from helpers import clean", "clean(1)"]
    before = project.parts()
    for text, why in {
        "LIMIT = 1\ndef clean(x):\n    return -x\ndef other(): ...\n": ["clean in module helpers changed"],
        "LIMIT = 2\ndef clean(x):\n    return x\ndef other(): ...\n": ["module helpers changed"],
        "LIMIT = 1\ndef tidy(x):\n    return x\ndef other(): ...\n": ["clean in module helpers is gone", "module helpers changed", "tidy in module helpers is new"],
        "# notes\nLIMIT = 1\ndef clean(x):  # same\n    return x\ndef other():\n    ...\n": None,
    }.items():
        project.write("helpers.py", text)
        after = project.parts()
        assert (key(after) != key(before)) == bool(why)
        assert not why or sorted(explain(before, after)) == sorted(why)


def test_a_module_that_comes_later_is_found(project):
    project.cells = ["import pkg.late"]
    before = project.key()
    project.write("pkg/__init__.py", "")
    middle = project.key()
    project.write("pkg/late.py", "x = 1")
    after = project.key()
    project.write("pkg/late.py", "x = 2")
    assert len({before, middle, after, project.key()}) == 4


def test_a_lazy_front_room_opens_only_the_rooms_that_are_asked_for(project):
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from room.a import one\n    from room.b import two\nimport room.always\n"
    for name, text in {"a.py": "one = 1", "b.py": "two = 2", "always.py": "", "__init__.py": lazy + "def __getattr__(name): ..."}.items():
        project.write(f"room/{name}", text)
    base = {"room", "room.always"}
    for code, found in {"from room import one": {"room.a"}, "import room\nroom.two": {"room.b"}, "from room import *": {"room.a", "room.b"}, "import room": set(), "import room.b": {"room.b"}}.items():
        assert project.modules(code) == base | found, code
    project.write("room/__init__.py", lazy)
    assert project.modules("from room import one") == base | {"room.a", "room.b"}, "a room without a lazy door has all of its imports"


def test_the_contract_brings_no_engine_into_the_key(project):
    found = {name for name in project.parts()["modules"] if name.startswith("mlkit.")}
    assert "mlkit.pipeline.contract" in found or not found  # installed from a wheel, its version counts
    assert not found & {"mlkit.pipeline.runner", "mlkit.pipeline.stage", "mlkit.pipeline.events", "mlkit.core.store"}


def test_a_folder_of_files_hides_no_package(project):
    (project.folder / "polars").mkdir()
    project.write("secrets.py", "x = 1")
    project.cells = ["import polars, secrets"]
    found = project.parts()
    assert "polars" in found["distributions"], "wandb leaves a folder called wandb beside each notebook"
    assert "secrets" in found["modules"], "a module beside the notebook is imported instead of the standard one"


def test_third_party_modules_to_have_at_hand_are_named(project):
    pytest.importorskip("torch")
    project.cells = ["import json\nfrom torch import nn, tensor\nimport polars as pl, not_there\nfrom torch.utils.data import DataLoader"]
    project.write("helpers.py", "import numpy as np")
    project.cells.append("import helpers")
    write_stage(project.folder, "train", project.parameters, *project.cells)
    assert {"torch", "torch.nn", "polars", "torch.utils.data", "numpy"} == set(imports(read_stage(project.folder / "train.ipynb")).third_party) - {"IPython.display"}


def test_why_tells_what_changed_in_words(project):
    project.cells = ["import os", "def clean(x):\n    return x\ny = 1", "z = 2"]
    project.parameters += "\nimport sys"
    old = project.parts(inputs={"t": "aa"}, sources={"s": "bb"})
    project.cells = ["import os", "def clean(x):\n    return -x\ny = 1", "new = 1", "z = 2"]
    assert explain(old, project.parts(inputs={"t": "aa"}, sources={"s": "bb"})) == ["clean in cell 3 changed", "cell 4 is new"]
    project.cells = ["import os", "def clean(x):\n    return x\ny = 2"]
    new = project.parts({"epochs": 6, "lr": 1}, inputs={"t": "ab"}, sources={"s": None})
    assert explain(old, new) == ["cell 3 changed", "a cell is gone", "parameter epochs: 5 -> 6", "parameter lr: 0.1 -> 1.0", "the content of input t changed", "source s is gone"]
    project.parameters = 'epochs: int = 5\nnames: list = ["a", 1.5]\nother = Output("other")\nimport sys, os'
    told = explain(old, project.parts(inputs={"t": "aa"}, sources={"s": "bb"}))
    assert {"the parameters cell changed", "parameter lr: 0.1 -> None", "parameter names: None -> ['a', 1.5]", "output model is gone", "output other is new"} <= set(told), told
    assert explain(old | {"distributions": {"polars": "1.0", "x": "1"}}, old | {"distributions": {"polars": "2.0"}, "environment": {"TZ": "1"}}) == ["polars: 1.0 -> 2.0", "x: 1 -> None", "environment variable TZ was set"]
    assert explain(None, old) == ["it has no earlier result"] and explain({"schema": 0}, old) == ["its earlier result is of another version of mlkit"]
    assert explain(old, old | {"python": "CPython 4.0"})[0].endswith("-> CPython 4.0")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a = 1", "b = 2", "def f(): ...", "c()", "# note"]), max_size=5), st.lists(st.sampled_from(["a = 1", "b = 2", "def f(): pass", "c()", ""]), max_size=5))
def test_another_key_always_has_a_reason(tmp_path_factory, before, after):
    project = Project(tmp_path_factory.getbasetemp() / "reasons")
    project.cells = before
    old = project.parts()
    project.cells = after
    new = project.parts()
    assert (explain(old, new) == ["its earlier result is no longer there"]) == (key(old) == key(new))


def test_the_key_is_the_same_in_another_process_and_with_an_empty_memory(project):
    project.parameters += "\nmany: set[str] = {'a', 'b', 'c', 'd'}"
    here = project.key()
    code = (
        "from mlkit.pipeline.graph import *; from mlkit.pipeline.key import *\np = load_pipeline('.'); j = plan_jobs(p)[0]\nprint(key(components(j, {}, {}, p.settings['train'])))\n"
        "import sys; assert not {'IPython', 'polars', 'numpy', 'nbformat', 'torch'} & set(sys.modules)"
    )
    for seed in ("1", "2", "2"):
        done = subprocess.run([sys.executable, "-c", code], cwd=project.folder, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert done.stdout.strip() == here, done.stderr
    assert len(os.listdir(Path(os.environ["XDG_CACHE_HOME"]) / "mlkit")) == 2, "one file for code, one for versions"
    for memory in (Path(os.environ["XDG_CACHE_HOME"]) / "mlkit").iterdir():
        memory.write_text("torn {")
    done = subprocess.run([sys.executable, "-c", code], cwd=project.folder, capture_output=True, text=True)
    assert done.stdout.strip() == here, done.stderr


def test_fifty_stages_are_keyed_before_a_person_notices(tmp_path):
    for i in range(50):
        write_stage(tmp_path / "p", f"s{i:02}", (f't = Input("s{i - 1:02}/o")\n' if i else "") + 'o = Output("o")', "import polars as pl", *(f"def f{n}(x):\n    return [x + {n}, {i}]" for n in range(4)))
    code = (
        "import time; started = time.perf_counter()\nfrom mlkit.pipeline.graph import *; from mlkit.pipeline.key import *\np = load_pipeline('p')\n"
        "for j in plan_jobs(p): key(components(j, {}, {}, p.settings[j.stage.name]))\nprint(time.perf_counter() - started)"
    )
    time.sleep(0.2)
    times = [float(subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    assert min(times) < 0.3, times  # about 0.1 s on a quiet machine
