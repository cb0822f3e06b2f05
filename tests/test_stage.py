"What a notebook declares is read without running it, values mean what their types say, and mistakes are told with their place."

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import cell, write_stage

from mlkit.core.errors import MLKitError
from mlkit.pipeline.code import parse, read_code
from mlkit.pipeline.contract import MissingInput, plain
from mlkit.pipeline.stage import StageError, coerce, inject, injected_source, load_notebook, read_stage
from mlkit.pipeline.types import Unfit, fit, fit_text, literal, read_type


def type_of(text: str):
    return read_type(ast.parse(text, mode="eval").body)


def refusal(folder: Path, parameters: str, *cells) -> str:
    with pytest.raises(StageError) as caught:
        read_stage(write_stage(folder, "stage", parameters, *cells))
    return str(caught.value)


words = st.text(st.characters(exclude_categories=["Cs"]))
numbers = st.floats(allow_nan=False)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | words, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=12
)
typed = st.one_of(
    st.tuples(st.just("int"), st.integers()), st.tuples(st.just("float"), numbers), st.tuples(st.just("bool"), st.booleans()), st.tuples(st.just("str"), words),
    st.tuples(st.just("list[int]"), st.lists(st.integers())), st.tuples(st.just("dict[str, float]"), st.dictionaries(words, numbers)),
    st.tuples(st.just("tuple[int, str]"), st.tuples(st.integers(), words)), st.tuples(st.just("set[int]"), st.sets(st.integers())),
    st.tuples(st.just("int | None"), st.none() | st.integers()), st.tuples(st.just("list[str] | None"), st.none() | st.lists(words)),
    st.tuples(st.just("Literal[1, 'a', None]"), st.sampled_from([1, "a", None])), st.tuples(st.just("list[dict[str, int | None]]"), st.lists(st.dictionaries(words, st.none() | st.integers()))),
)  # fmt: skip


def spelling(value) -> str:
    "Write a value as a person would type it."
    if isinstance(value, str):
        return value
    if isinstance(value, (set, tuple)):
        return repr(value) if value else "[]"
    return str(value) if isinstance(value, (bool, int, float, type(None))) else json.dumps(value)


def same(a, b) -> bool:
    return type(a) is type(b) and a == b


@given(typed)
def test_what_is_typed_arrives_as_the_type_wants_it(case):
    annotation, value = case
    assert same(fit_text(type_of(annotation), spelling(value)), value)


@given(typed)
def test_a_value_that_fits_stays_as_it_is(case):
    annotation, value = case
    assert same(fit(type_of(annotation), value), value)


@given(words)
def test_text_is_taken_exactly(text):
    assert fit_text(type_of("str"), text) == text


@given(words, st.sampled_from(["int", "float", "bool", "None", "Literal['a', 2]", "list[int]", "dict[str, int]", "tuple[int, ...]", "set[str]", "int | None", "Any", "Path", "float | list[int]"]))
def test_text_fits_or_is_refused_and_what_fits_fits_again(text, annotation):
    type = type_of(annotation)
    try:
        value = fit_text(type, text)
    except (Unfit, TypeError):  # TypeError: a list in a set
        return
    assert same(fit(type, value), value) or value != value or isinstance(value, str)


@given(plain_values)
def test_a_literal_means_exactly_its_value(value):
    assert same(eval(literal(value)), value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, 1e-320, (), ((),), set(), frozenset({1}), Path("/a b/'c'"), {1: {None: (1.5,)}}, "\u2028\0\\'\"\n", "x" * 1_000_000])
def test_odd_values_are_written_exactly(value):
    back = eval(literal(value))
    assert back == value and repr(back) == repr(value) or isinstance(value, frozenset)
    assert math.isnan(eval(literal(math.nan)))


@pytest.mark.parametrize(
    ("annotation", "text"),
    [("int", "1.0"), ("int", "1e3"), ("int", "five"), ("int", ""), ("int", "true"), ("int", "9" * 5000), ("bool", "2"), ("bool", "falsch"), ("float", "1,5"), ("Literal['a', 'b']", "c"), ("list[int]", "[1, 'x']"),
     ("list[int]", "[1, 2"), ("dict[str, int]", "[1]"), ("tuple[int, int]", "[1, 2, 3]"), ("int | None", "0.5"), ("set[int]", "{[1]}")],
)  # fmt: skip
def test_text_of_another_kind_is_refused(tmp_path, annotation, text):
    default = {"Literal['a', 'b']": "'a'", "list[int]": "[]", "dict[str, int]": "{}", "tuple[int, int]": "(1, 2)", "set[int]": "{1}", "bool": "True"}.get(annotation, "1")
    stage = read_stage(write_stage(tmp_path, "stage", f"\nvalue: {annotation} = {default}"))
    with pytest.raises(StageError) as caught:
        coerce(stage, stage.parameters["value"], text, text=True, origin="-p stage.value")
    told = str(caught.value)
    assert all(part in told for part in ("stage.ipynb, cell 1, line 3", "value", "-p stage.value", text[:20])), told


def test_types_come_from_annotations_else_from_defaults(tmp_path):
    text = 'a = 5\nb = 0.5\nc = True\nd = "x"\ne = [1]\nf = None\ng: "int | None" = None\nh: Literal["x", "y"] = "x"\ni = -2 ** 3\nj: float = 1\nk = Path("data")\nl = 60 * 60'
    parameters = read_stage(write_stage(tmp_path, "stage", text)).parameters
    assert {n: p.type.kind for n, p in parameters.items()} == dict(zip("abcdefghijkl", "int float bool str list any union literal int float path int".split()))
    assert parameters["i"].default == -8 and same(parameters["j"].default, 1.0) and parameters["l"].default == 3600


def test_comments_are_help(tmp_path):
    text = '\n# how long\n# it trains\nepochs = 5\n\nlr = 0.1  # how fast: #1\nname = """\n# not a comment"""\nseed = 1'
    parameters = read_stage(write_stage(tmp_path, "stage", text)).parameters
    assert {n: p.help for n, p in parameters.items()} == {"epochs": "how long it trains", "lr": "how fast: #1", "name": "", "seed": ""}


def test_inputs_outputs_sources_and_secrets_are_found(tmp_path):
    text = 'raw = Source("data/*.csv")\nnone = Source(None)\nt = Input("prepare/data/t.parquet")\nall = Input(ref="train/model", gather=True)\nm = Output("./models/best/")\nk: Secret[str] = Secret("KEY")\nf = Secret("file:~/.key")'
    stage = read_stage(write_stage(tmp_path, "03-stage", text))
    assert stage.name == "stage" and not stage.parameters
    assert {n: (r.stage, r.path, r.gather) for n, r in stage.inputs.items()} == {"t": ("prepare", "data/t.parquet", False), "all": ("train", "model", True)}
    assert {n: r.path for n, r in (stage.sources | stage.outputs | stage.secrets).items()} == {"raw": "data/*.csv", "none": None, "m": "models/best", "k": "KEY", "f": "file:~/.key"}


wrong_cells = {
    "epochs: int = 'five'": "default of epochs",
    "epochs: int = '5'": "default of epochs",
    "lr: float = None": "default of lr",
    "data: np.ndarray = 0": "np.ndarray",
    "data: list[np.ndarray] = []": "np.ndarray",
    "epochs: int": "needs a default",
    "epochs = 5\nepochs = 6": "twice",
    "epochs = 5\nsteps = epochs * 100": "computed from epochs",
    't = Input("a/b")\nframe = read(t)': "computed from t",
    "def f(:": "not Python",
    't = Input("prepare")': "stage/path",
    't = Input("a/../b/c")': "stage/path",
    't = Input(f"{name}/x")': "Input takes one text",
    "name = 'x'\nt = Input(name)": "Input takes one text",
    't = Input("a/b", gather=maybe)': "Input takes one text",
    "o = Output(path / 'x')": "Output takes one text",
    'o = Output("/tmp/x")': "below the stage",
    'o = Output("../x")': "below the stage",
    'o = Output("")': "below the stage",
    "s = Source(find())": "Source takes one text",
    'both = [Input("a/b"), Input("c/d")]': "a line of its own",
    'a, b = Output("a"), Output("b")': "a line of its own",
    "k: Secret[str]": 'Secret("K")',
    "k: Secret[str] = 'hunter2'": 'Secret("K")',
    "k = Secret('hunter 2')": "never stands in a notebook",
}


@pytest.mark.parametrize("text", wrong_cells)
def test_a_wrong_parameters_cell_is_told_with_cell_and_line(tmp_path, text):
    told = refusal(tmp_path, "\n" + text, "1")
    line = 2 + len(text.split("\n"))
    assert told.startswith(f"stage.ipynb, cell 1, line {line}: ") and wrong_cells[text] in told, told
    assert "hunter" not in told or "hunter" not in text


def test_a_wrong_notebook_is_told_with_its_place(tmp_path):
    path = tmp_path / "stage.ipynb"
    for text, told in {
        '{\n "cells": [\n  {,\n': "line 3", '{"cells": [\n<<<<<<< HEAD\n': "conflict", "": "line 1", "[]": "line 1", '{"cells": [1]}': "line 1", "\xff": "line 1",
        json.dumps({"cells": [cell("1"), cell("2")]}): "no cell tagged", json.dumps({"cells": [cell("1", "parameters"), cell("2", "parameters")]}): "cell 2, line 1",
    }.items():  # fmt: skip
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(StageError) as caught:
            read_stage(path)
        assert str(caught.value).startswith("stage.ipynb, ") and told in str(caught.value), str(caught.value)
    with pytest.raises(StageError, match="cannot be read"):
        read_stage(tmp_path / "none.ipynb")


def test_code_that_is_no_python_is_told_before_anything_runs(tmp_path):
    assert refusal(tmp_path, "", "x = 1", "y = 2\nz = = 3").startswith("stage.ipynb, cell 3, line 2: this is not Python")
    read_stage(write_stage(tmp_path, "stage", "", cell("z = = 3", "raises-exception")))


def test_an_output_that_no_run_would_see_is_told(tmp_path):
    assert "belongs into the cell" in refusal(tmp_path, "", "x = 1\nmodel = Output('model')")
    elsewhere = "import keras\nfrom keras import Input\nx = keras.Input((1,))"
    path = write_stage(tmp_path, "stage", "", elsewhere)
    path.write_text(path.read_text().replace("from mlkit.pipeline import Input, Output, Secret, Source, record", ""))
    assert read_stage(path).code[0].source == elsewhere


magics = ["%matplotlib inline", "!ls -l | grep 'x", "x = %time f(1)", "files = !ls {folder}", "f?", "?f", "x.y??", "%%bash\nls (", "%%html\n<b>", "%%time\ny = 1\n!ls", "!echo \\\n  'a' \\\n  b", "if True:\n    %pip list\n    !ls", "%load_ext autoreload\n%autoreload 2"]


@pytest.mark.parametrize("magic", magics)
def test_magics_are_read_and_count(magic):
    assert not read_code(magic).error and not read_code("x = (7\n     % 2)\n" * (not magic.startswith("%%")) + magic).error
    assert read_code(magic).definitions != read_code(magic + "1").definitions


def test_magics_keep_lines_where_they_are():
    assert [s.lineno for s in parse("%a b\n!c \\\n  d\n\nx = 1\ny?\nz = 2").body] == [1, 2, 5, 6, 7]


def test_injecting_copies_the_notebook_and_replaces_what_was_injected(tmp_path):
    path = write_stage(tmp_path, "stage", "epochs: int = 5", "epochs")
    before = path.read_bytes()
    notebook = load_notebook(path)
    once = inject(notebook, injected_source({"epochs": 6}))
    twice = inject(once, injected_source({"epochs": 7}, {"key": "env:KEY"}))
    assert path.read_bytes() == before and len(notebook["cells"]) == 2 and len(once["cells"]) == len(twice["cells"]) == 3
    assert [c["metadata"]["tags"] for c in twice["cells"]] == [["parameters"], ["injected-parameters"], []]
    assert "epochs = 7" in twice["cells"][1]["source"] and "Secret('env:KEY')" in twice["cells"][1]["source"]
    (tmp_path / "stage.ipynb").write_text(json.dumps(twice))
    assert read_stage(path).parameters["epochs"].default == 5, "an injected cell is no part of the stage"


def test_records_become_plain_data():
    np = pytest.importorskip("numpy")
    import datetime

    values = {"a": np.float32(0.5), "b": np.arange(3), "c": (np.bool_(True), {1}), "d": {np.int64(1): math.inf}, "e": datetime.date(2026, 11, 24), "f": np.array(2), "g": None, "h": Path("a/b")}
    assert plain(values) == {"a": 0.5, "b": [0, 1, 2], "c": [True, [1]], "d": {"1": "inf"}, "e": "2026-11-24", "f": 2, "g": None, "h": "a/b"}
    assert json.loads(json.dumps(plain(values))) == plain(values)
    for wrong in (object(), {"x": [open]}, b"bytes", type("Odd", (), {"item": lambda self: self})()):
        with pytest.raises(MLKitError, match="record"):
            plain(wrong)


def test_torch_and_polars_scalars_are_recorded():
    torch, pl = pytest.importorskip("torch"), pytest.importorskip("polars")
    assert plain({"loss": torch.tensor(0.5, requires_grad=True), "many": torch.ones(2, dtype=torch.int64), "series": pl.Series([1, None])}) == {"loss": 0.5, "many": [1, 1], "series": [1, None]}
    with pytest.raises(MLKitError, match="DataFrame"):
        plain(pl.DataFrame({"a": [1, 2]}))


def test_a_missing_input_says_how_to_make_it():
    missing = MissingInput("prepare/table.parquet")
    for use in (str, open, lambda p: p.exists(), lambda p: p.read_bytes(), lambda p: p / "x" and open(p / "x"), lambda p: f"{p}", lambda p: list(p.glob("*"))):
        with pytest.raises(MLKitError, match="mlkit run .* --to prepare"):
            use(missing)
    assert "table.parquet" in repr(missing) and missing.name == "table.parquet"


kinds = "print(*(type(v).__name__.replace('Posix', '') for v in (raw, maybe, table, model, key)), type(all).__name__, epochs, key == 'hush', raw, isinstance(raw, Path))"


@pytest.fixture
def three_ways(tmp_path, monkeypatch):
    "A stage that says what its names hold; every way of running it has a store of its own."
    monkeypatch.setenv("MLKIT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("STAGE_KEY", "hush")
    names = 'raw = Source("raw.csv")\nmaybe = Source(None)\ntable = Input("first/t.txt")\nall = Input("first/t.txt", gather=True)\nmodel = Output("m/x.txt")\nkey: Secret[str] = Secret("STAGE_KEY")\nepochs: int = 5'
    write_stage(tmp_path / "p", "first", 'out = Output("t.txt")', 'open(out, "w").write("t")')
    write_stage(tmp_path / "p", "second", names, "from pathlib import Path", kinds, 'open(model, "w").write("m")')
    (tmp_path / "p" / "raw.csv").write_text("1")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path


def printed(path: Path) -> str:
    return "".join("".join(o.get("text", "")) for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", []))


def papermill(*words) -> str:
    subprocess.run([sys.executable, "-m", "papermill", "second.ipynb", "out.ipynb", "--kernel", "python3", *words], check=True, capture_output=True)
    return printed(Path("out.ipynb"))


def test_names_hold_the_same_types_by_hand_under_papermill_and_under_mlkit(three_ways):
    assert papermill().split() == ["Path", "NoneType", "MissingInput", "Path", "Secret", "list", "5", "True", "raw.csv", "True"]
    from mlkit.pipeline import run

    assert run(three_ways / "p").ok
    assert papermill().split()[:6] == ["Path", "NoneType", "Path", "Path", "Secret", "list"], "the newest good result"
    told = papermill("-p", "raw", "/else/where.csv", "-p", "maybe", "/m.csv", "-p", "key", "env:STAGE_KEY", "-p", "table", "/t", "-y", "all: [/a, /b]", "-p", "model", str(three_ways / "model"), "-p", "epochs", "6")
    assert told.split() == ["Path", "Path", "Path", "Path", "Secret", "list", "6", "True", "/else/where.csv", "True"]
    run_folder = next((three_ways / "store" / "runs").iterdir())
    assert printed(run_folder / "second.ipynb").split()[:8] == ["Path", "NoneType", "Path", "Path", "Secret", "list", "5", "True"]


def test_text_that_a_notebook_gives_a_name_later_stays_text(three_ways):
    write_stage(three_ways / "p", "second", 'model = Output("m")', 'model = "resnet18"', "print(type(model).__name__)")
    assert papermill().split() == ["str"]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), plain_values, min_size=1))
def test_defaults_are_read_as_python_reads_them(tmp_path_factory, values):
    source = "\n".join(f"{name} = {literal(value)}" for name, value in values.items())
    stage = read_stage(write_stage(tmp_path_factory.mktemp("stage"), "stage", source))
    assert {n: p.default for n, p in stage.parameters.items()} == values
