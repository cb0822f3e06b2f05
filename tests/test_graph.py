"Notebooks make a graph or one clear error; a request makes jobs, each with exactly the inputs that belong to it."

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import write_stage

from mlkit.core.errors import MLKitError
from mlkit.pipeline.graph import GraphError, Sweep, Text, load_pipeline, plan_jobs, split_commas


def write(folder, stages: dict[str, str]):
    "Write a pipeline: names of stages, and what their parameters cells say."
    for name, text in stages.items():
        write_stage(folder, name, text)
    return folder


def refusal(make) -> str:
    with pytest.raises(MLKitError) as caught:
        make()
    return str(caught.value)


@pytest.fixture
def digits(tmp_path):
    return write(
        tmp_path / "digits",
        {
            "01_prepare": 'size: int = 28\nseed: int = 0\nraw = Source(None)\ntable = Output("table.parquet")',
            "02_train": 'table = Input("prepare/table.parquet")\nlr: float = 0.1\nseed: int = 0\narch: str = "small"\nlayers: list[int] = [64]\nkey: Secret[str] = Secret("KEY")\nmodel = Output("model")',
            "03_evaluate": 'model = Input("train/model")\ntable = Input("prepare/table.parquet")\nscore = Output("score.json")',
            "04_compare": 'scores = Input("evaluate/score.json", gather=True)',
        },
    )


def test_stages_stand_in_an_order_in_which_they_can_run(digits):
    pipeline = load_pipeline(digits)
    assert list(pipeline.stages) == ["prepare", "train", "evaluate", "compare"] and pipeline.name == "digits"


graphs = st.integers(1, 7).flatmap(lambda n: st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=12).map(lambda edges: (n, edges)))


@settings(max_examples=60, deadline=None)
@given(graphs)
def test_any_graph_is_ordered_or_its_circle_is_named(tmp_path_factory, graph):
    n, edges = graph
    reads = {i: sorted({a for a, b in edges if b == i}) for i in range(n)}
    folder = write(tmp_path_factory.mktemp("graph"), {f"s{i}": "\n".join(['out = Output("o")', *(f'i{a} = Input("s{a}/o")' for a in reads[i])]) for i in range(n)})
    try:
        order = list(load_pipeline(folder).stages)
    except GraphError as error:
        told = str(error)
        circle = told.split("circle: ")[1].rstrip(".").split(" reads ")
        assert circle[0] == circle[-1] and len(set(circle)) == len(circle) - 1, told
        assert all(int(b[1:]) in reads[int(a[1:])] for a, b in zip(circle, circle[1:])), told
        line = 3 + reads[int(circle[0][1:])].index(int(circle[1][1:]))
        assert told.startswith(f"{circle[0]}.ipynb, cell 1, line {line}: "), told
    else:
        assert len(order) == n and all(order.index(f"s{a}") < order.index(f"s{b}") for b in reads for a in reads[b])


def test_what_no_pipeline_is_is_told_with_notebook_and_line(tmp_path):
    wrong = {
        "circle": ({"a": 'i = Input("b/o")\no = Output("o")', "b": 'i = Input("a/o")\no = Output("o")'}, "a.ipynb, cell 1, line 2: the stages go round in a circle: a reads b reads a."),
        "itself": ({"a": 'o = Output("o")\ni = Input("a/o")'}, "a.ipynb, cell 1, line 3: the stages go round in a circle: a reads a."),
        "stage": ({"train": 'o = Output("o")', "b": 'i = Input("trian/o")'}, 'b.ipynb, cell 1, line 2: there is no stage "trian". Did you mean "train"?'),
        "output": ({"train": 'o = Output("model")', "b": 'i = Input("train/modle")'}, 'b.ipynb, cell 1, line 2: the stage train declares no output "modle". Did you mean "model"?'),
        "twice": ({"a": 'o = Output("model")\np = Output("model/")'}, 'a.ipynb, cell 1, line 3: p and o both write "model": an output has one writer.'),
        "nested": ({"a": 'o = Output("model/weights.bin")\np = Output("model")'}, 'a.ipynb, cell 1, line 3: p and o both write "model": an output has one writer.'),
        "name": ({"01_a": "", "02_a": ""}, "02_a.ipynb, cell 1, line 1: 01_a.ipynb is the stage a already: a stage is one notebook."),
    }
    for name, (stages, told) in wrong.items():
        assert refusal(lambda n=name, s=stages: load_pipeline(write(tmp_path / n, s))) == told
    write(tmp_path / "fine", {"a": 'o = Output("model")\np = Output("model2")', "b": 'i = Input("a/model/weights.bin")'})
    assert list(load_pipeline(tmp_path / "fine").stages) == ["a", "b"]


def test_a_pipeline_that_is_not_there_is_told(digits, monkeypatch):
    monkeypatch.chdir(digits.parent)
    (digits.parent / "empty").mkdir()
    assert 'Did you mean "digits"?' in refusal(lambda: load_pipeline("digist"))
    assert "holds no notebooks" in refusal(lambda: load_pipeline("empty"))
    assert "is a file" in refusal(lambda: load_pipeline("digits/01_prepare.ipynb"))
    assert load_pipeline("digits").folder.is_absolute() and load_pipeline("vision").name == "vision"
    (digits.parent / "vision").mkdir()
    assert load_pipeline("vision").folder != digits.parent / "vision", "a folder without notebooks hides no shipped pipeline"


yaml_errors = {
    "profile:\n  smoke: {}\n": ("line 1", 'no setting "profile"', '"profiles"'),
    "stages:\n  prepare: {cpus: 2}\n  trian: {}\n": ("line 3", 'no stage "trian"', '"train"'),
    "stages:\n  train:\n    timeout: 2h\n    retry: 1\n": ("line 4", 'no setting "retry"', '"retries"'),
    "stages:\n  train:\n    timeout: soon\n": ("line 3", "soon", "30m"),
    "stages:\n  train:\n    timeout: -1\n": ("line 3", "-1", "30m"),
    "stages:\n  train:\n    memory: 4 cats\n": ("line 3", "4 cats", "4GB"),
    "stages:\n  train:\n    cpus: 0.5\n": ("line 3", "0.5"),
    "stages:\n  train:\n    retries: true\n": ("line 3", "True"),
    "stages:\n  train:\n    env: TZ\n": ("line 3", "'TZ'", "[TZ]"),
    "stages: [train]\n": ("line 1", "mapping"),
    "env: TZ\n": ("line 1", "'TZ'"),
    "profiles: 5\n": ("line 1", "mapping"),
    "profiles:\n  smoke: 5\n": ("line 2", "mapping"),
    "profiles:\n  smoke:\n    train.rl: 1\n": ("line 3", 'parameter "rl"', "lr"),
    "# train.lr: 1\nprofiles:\n  smoke:\n    train:\n      lr: fast\n": ("line 5", "fast", "float", "02_train.ipynb, cell 1, line 3"),
    "profiles:\n  smoke:\n    epochs: 1\n": ("line 3", '"epochs"'),
    "profiles:\n  smoke:\n    train.model: x\n": ("line 3", "output"),
    "profiles:\n  smoke:\n    train.key: hunter2\n": ("02_train.ipynb, cell 1, line 7", "env:NAME"),
    "profiles:\n  smoke:\n    lr: {sweep: [1, x]}\n": ("line 3", "'x'"),
    "profiles:\n  smoke: {lr: 1}\n  smoke: {lr: 2}\n": ("line 3", "second time", "line 2"),
    "profiles: {a: [\n": ("line 2", "not YAML"),
    "- a\n": ("line 1", "mapping"),
    "? [a]\n: 1\n": ("line 1", "not YAML"),
}


@pytest.mark.parametrize("text", yaml_errors)
def test_a_wrong_line_of_pipeline_yaml_is_told(digits, text):
    (digits / "pipeline.yaml").write_text(text)
    told = refusal(lambda: load_pipeline(digits))
    assert all(part in told for part in ("pipeline.yaml", *yaml_errors[text])) and "hunter" not in told, told


def test_settings_and_profiles_are_read(digits):
    (digits / "pipeline.yaml").write_text("env: [TZ]\nstages:\n  train: {timeout: 1.5h, memory: 2GiB, retries: 1, cpus: 2, env: [HF_HOME, TZ]}\nprofiles:\n  flat: {train.lr: 1e-3, seed: 3}\n  nested: {train: {lr: 1, layers: [8, 8]}}\n  none:\n")
    pipeline = load_pipeline(digits)
    train = pipeline.settings["train"]
    assert (train.timeout, train.memory, train.retries, train.cpus, train.env) == (5400, 2**31, 1, 2, ("TZ", "HF_HOME")) and pipeline.settings["prepare"].env == ("TZ",)
    flat, nested = (plan_jobs(pipeline, profile=name)[1].parameters for name in ("flat", "nested"))
    assert (flat["lr"], flat["seed"], nested["lr"], nested["layers"]) == (0.001, 3, 1.0, [8, 8])
    assert plan_jobs(pipeline, {"train.seed": Text("4")}, profile="flat")[1].parameters["seed"] == 4, "the request wins"
    assert plan_jobs(pipeline, profile="none")[0].parameters == plan_jobs(pipeline)[0].parameters
    assert 'Did you mean "flat"' in refusal(lambda: plan_jobs(pipeline, profile="falt"))


def test_five_is_five_wherever_it_comes_from(digits):
    (digits / "pipeline.yaml").write_text("profiles: {p: {train.lr: 5}}\n")
    pipeline = load_pipeline(digits)
    jobs = [plan_jobs(pipeline, *request)[1] for request in (({"train.lr": Text("5")},), ({"train.lr": 5},), ({"train.lr": 5.0},), ({"lr": Text("5.0")},), (None, "p"), ({"train.lr": Sweep([Text("5"), 5.0])},))]
    assert {repr(job.parameters["lr"]) for job in jobs} == {"5.0"} and {job.id for job in jobs} == {"train"}


def test_a_sweep_fans_out_what_follows_and_is_gathered(digits):
    jobs = {j.id: j for j in plan_jobs(load_pipeline(digits), {"train.lr": Text("0.1,0.2"), "prepare.size": Sweep([8, 16])})}
    assert len(jobs) == 2 + 4 + 4 + 1
    job = jobs["evaluate[prepare.size=8, train.lr=0.2]"]
    assert job.inputs == {"model": [("train[prepare.size=8, lr=0.2]", "model")], "table": [("prepare[size=8]", "table.parquet")]}
    assert job.variant == {"prepare.size": 8, "train.lr": 0.2}
    assert len(jobs["compare"].inputs["scores"]) == 4


def test_what_is_swept_under_one_name_is_one_axis(digits):
    jobs = plan_jobs(load_pipeline(digits), {"seed": Text("1,2,3")})
    assert [j.id for j in jobs if j.stage.name == "train"] == ["train[seed=1]", "train[seed=2]", "train[seed=3]"]
    assert all(j.inputs["table"] == [(f"prepare[seed={j.parameters['seed']}]", "table.parquet")] for j in jobs if j.stage.name == "train")


def test_a_gathering_stage_that_reads_a_swept_one_gathers_what_agrees(digits):
    write_stage(digits, "05_best", 'scores = Input("evaluate/score.json", gather=True)\ntable = Input("prepare/table.parquet")')
    jobs = [j for j in plan_jobs(load_pipeline(digits), {"train.lr": Text("1,2"), "prepare.size": Text("8,16")}) if j.stage.name == "best"]
    assert [j.id for j in jobs] == ["best[prepare.size=8]", "best[prepare.size=16]"]
    assert [[i for i, _ in j.inputs["scores"]] for j in jobs] == [[f"evaluate[prepare.size={s}, train.lr={lr}]" for lr in (1.0, 2.0)] for s in (8, 16)]


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [("lr", "1e-3,3e-3", [1e-3, 3e-3]), ("lr", "0.1,1e-1", [0.1]), ("arch", "a,b", ["a", "b"]), ("arch", "hello, world", ["hello, world"]), ("arch", "a b,c", ["a b,c"]), ("arch", '"a,b"', ['"a,b"']), ("arch", "", [""]),
     ("layers", "64,32", [[64, 32]]), ("layers", "[64],[32,16]", [[64], [32, 16]]), ("layers", "[64]", [[64]])],
)  # fmt: skip
def test_commas_are_a_sweep_where_they_cannot_be_a_value(digits, name, text, values):
    jobs = [j for j in plan_jobs(load_pipeline(digits), {f"train.{name}": Text(text)}) if j.stage.name == "train"]
    assert [j.parameters[name] for j in jobs] == values


def test_values_from_python_are_values(digits):
    pipeline = load_pipeline(digits)
    assert plan_jobs(pipeline, {"train.arch": "a,b"})[1].parameters["arch"] == "a,b"
    assert "at least one value" in refusal(lambda: plan_jobs(pipeline, {"train.lr": Sweep()}))
    assert len(plan_jobs(pipeline, {"train.lr": Sweep([float("nan"), 1])})) == 1 + 2 + 2 + 1, "a value that does not equal itself finds its inputs"


def test_sources_and_secrets_are_set_as_places(digits, monkeypatch):
    monkeypatch.chdir(digits.parent)
    pipeline = load_pipeline("digits")
    assert plan_jobs(pipeline)[0].sources == {"raw": None} and plan_jobs(pipeline)[1].secrets == {"key": "env:KEY"}
    assert plan_jobs(pipeline, {"raw": Text("x.csv")})[0].sources == {"raw": os.path.join(os.getcwd(), "x.csv")}, "typed paths start where one types"
    assert plan_jobs(pipeline, {"raw": "x.csv"})[0].sources == {"raw": str(digits / "x.csv")}
    assert plan_jobs(pipeline, {"raw": Text("None")})[0].sources == {"raw": None}
    assert plan_jobs(pipeline, {"key": Text("file:/run/key")})[1].secrets == {"key": "file:/run/key"}
    for secret in ("hunter2", "env:"):
        told = refusal(lambda s=secret: plan_jobs(pipeline, {"train.key": Text(s)}))
        assert "env:NAME or file:PATH" in told and "hunter2" not in told


def test_a_wrong_request_is_told(digits):
    pipeline = load_pipeline(digits)
    for params, told in {
        "train.rl": 'no parameter "rl"', "trian.lr": 'Did you mean "train"', "epochs": 'no stage has a parameter "epochs"', "train.table": "It is an input", "train.model": "It is an output", ".lr": "no stage",
    }.items():  # fmt: skip
        assert told in refusal(lambda p=params: plan_jobs(pipeline, {p: Text("1")}))
    assert "float" in refusal(lambda: plan_jobs(pipeline, {"lr": Text("0.1,fast")}))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), min_size=2, max_size=4, unique=True))
def test_every_job_has_a_name_of_its_own_that_any_file_system_takes(tmp_path_factory, values):
    folder = write(tmp_path_factory.mktemp("sweep"), {"a": 'x: str = ""\no = Output("o")', "b": 'i = Input("a/o")'})
    jobs = plan_jobs(load_pipeline(folder), {"a.x": Sweep(values)})
    assert len({j.id for j in jobs}) == len({j.slug.lower() for j in jobs}) == 2 * len(values)
    assert all(j.slug.isascii() and len(j.slug) < 120 and not set(j.slug) & set('/\\:*?"<>| \n\0') and not j.slug.startswith(".") for j in jobs)
    assert [j.inputs["i"] for j in jobs[len(values) :]] == [[(j.id, "o")] for j in jobs[: len(values)]]


@given(st.lists(st.one_of(st.integers().map(str), st.lists(st.integers()).map(str), st.text("ab ").map(repr)), min_size=1))
def test_commas_split_only_at_the_top_level(pieces):
    assert split_commas(",".join(pieces)) == pieces


def test_five_hundred_stages_are_loaded_in_linear_time(tmp_path):
    import time

    def seconds(n: int) -> float:
        folder = write(tmp_path / str(n), {f"s{i:03}": (f'i = Input("s{i - 1:03}/o")\n' if i else "") + 'o = Output("o")\nseed: int = 0' for i in range(n)})
        best = []
        for _ in range(3):
            started = time.perf_counter()
            assert len(plan_jobs(load_pipeline(folder), {"seed": Text("1")})) == n
            best.append(time.perf_counter() - started)
        return min(best)

    assert seconds(400) < 8 * seconds(100)
