"A folder of notebooks runs as a pipeline: only what changed, in the right order, and it says what it did."

import json
import os
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from makers import cell, digests, last_manifest, mlkit, write_chain, write_stage


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("MLKIT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def states(place) -> dict:
    return {name: job["state"] for name, job in last_manifest(place / "store")["jobs"].items()}


def edit(path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_second_run_executes_nothing(place):
    write_chain(place / "chain")
    mlkit("run", "chain")
    assert states(place) == dict.fromkeys(["first", "second", "third"], "done")
    mlkit("run", "chain")
    assert states(place) == dict.fromkeys(["first", "second", "third"], "cached")


def test_only_what_an_edit_reaches_runs_again(place):
    write_chain(place / "chain")
    mlkit("run", "chain")
    edit(place / "chain" / "second.ipynb", "* 1000", "* 1001")
    mlkit("run", "chain")
    assert states(place) == {"first": "cached", "second": "done", "third": "done"}


def test_a_comment_or_a_note_reruns_nothing(place):
    write_chain(place / "chain")
    mlkit("run", "chain")
    edit(place / "chain" / "second.ipynb", "import time", "# look at the clock\\nimport   time  # the clock")
    notebook = json.loads((place / "chain" / "first.ipynb").read_text())
    notebook["cells"].append({"cell_type": "markdown", "id": "note", "metadata": {}, "source": "A note."})
    (place / "chain" / "first.ipynb").write_text(json.dumps(notebook, indent=4))
    mlkit("run", "chain")
    assert set(states(place).values()) == {"cached"}


def test_a_stage_that_makes_the_same_as_before_stops_the_rerun(place):
    write_chain(place / "chain")
    mlkit("run", "chain")
    edit(place / "chain" / "first.ipynb", "import time", "import time, json")
    mlkit("run", "chain")
    assert states(place) == {"first": "done", "second": "cached", "third": "cached"}


def test_an_edit_of_a_helper_module_is_seen_at_once(place):
    write_stage(place / "p", "stage", 'out = Output("a.txt")', "from helper import word", 'open(out, "w").write(word())', "record(word=word())")
    (place / "p" / "helper.py").write_text("def word():\n    return 'one'\n")
    mlkit("run", "p")
    (place / "p" / "helper.py").write_text("def word():\n    return 'two'\n")
    assert "word" in mlkit("why", "stage").stdout and "helper" in mlkit("why", "stage").stdout
    mlkit("run", "p")
    assert last_manifest(place / "store")["jobs"]["stage"]["records"] == {"word": "two"}


def test_why_names_the_parameter(place):
    write_chain(place / "chain")
    mlkit("run", "chain")
    out = mlkit("why", "second", "-p", "second.pause=0.01").stdout
    assert "pause" in out and "0.01" in out and "would run" in out
    assert "nothing changed" in mlkit("why", "chain", "second").stdout


def test_plan_and_dry_run_run_nothing(place):
    write_chain(place / "chain")
    for words in (("plan", "chain"), ("run", "chain", "--dry-run")):
        out = mlkit(*words).stdout
        assert "would run" in out and "first runs first" in out
    assert not (place / "store").exists()


def test_to_only_and_force(place):
    write_chain(place / "chain")
    assert "second" in mlkit("run", "chain", "--only", "third", check=2).stderr
    mlkit("run", "chain", "--to", "second")
    assert states(place) == {"first": "done", "second": "done"}
    mlkit("run", "chain", "--only", "second", "--force")
    assert states(place) == {"first": "cached", "second": "done"}
    assert 'Did you mean "third"' in mlkit("run", "chain", "--to", "thrid", check=2).stderr


def test_a_failure_is_shown_and_the_branches_beside_it_go_on_when_asked(place):
    write_stage(place / "p", "bad", 'out = Output("a.txt")', "numbers = [1]", "numbers[7]")
    write_stage(place / "p", "after", 'a = Input("bad/a.txt")', "1")
    write_stage(place / "p", "beside", 'out = Output("b.txt")', 'open(out, "w").write("b")')
    done = mlkit("run", "p", "--jobs", "1", check=1)
    assert "IndexError" in done.stdout and "numbers[7]" in done.stdout and "bad.ipynb" in done.stdout
    mlkit("run", "p", "--keep-going", check=1)
    assert states(place)["beside"] in ("done", "cached") and states(place)["after"] == "skipped" and states(place)["bad"] == "failed"


def test_independent_stages_run_side_by_side(place):
    for name in "abc":
        write_stage(place / "p", name, 'out = Output("a.txt")', f'import time; time.sleep(1); open(out, "w").write("{name}")')
    mlkit("run", "p", "--jobs", "3")
    jobs = last_manifest(place / "store")["jobs"].values()
    assert max(j["started"] for j in jobs) < min(j["started"] + j["seconds"] for j in jobs)


def test_a_sweep_fans_out_and_is_gathered(place):
    write_stage(place / "p", "train", 'lr: float = 0.1\nout = Output("metrics.json")', 'import json; json.dump({"lr": lr}, open(out, "w"))', "record(lr=lr)")
    write_stage(place / "p", "each", 'metrics = Input("train/metrics.json")\nout = Output("copy.json")', 'open(out, "w").write(open(metrics).read())')
    write_stage(place / "p", "best", 'all = Input("each/copy.json", gather=True)\nout = Output("best.txt")', "import json\nrates = [json.load(open(p))['lr'] for p in all]", 'open(out, "w").write(str(rates))', "record(rates=rates)")
    mlkit("run", "p", "-p", "train.lr=0.1,0.2,0.3")
    jobs = last_manifest(place / "store")["jobs"]
    assert len(jobs) == 7 and jobs["best"]["records"]["rates"] == [0.1, 0.2, 0.3]
    mlkit("run", "p", "-p", "train.lr=0.1,0.2,0.4")
    assert sorted(states(place).values()) == ["cached"] * 4 + ["done"] * 3


def test_nasty_values_arrive_exactly(place, tmp_path):
    values = {
        "text": 'it\'s "quoted",\nwith a \\ and ünïcödé 🎉 and {braces} and $HOME and %d',
        "nothing": None,
        "nested": {"a": [1, 2.5, {"b": None, "c": [True, "x,y"]}], "é": "ö"},
        "infinite": float("inf"),
        "long": "x, " * 40_000,
        "leading": "007",
        "no": "false",
    }
    parameters = "text: str = ''\nnothing: str | None = 'x'\nnested: dict = {}\ninfinite: float = 1.0\nlong: str = ''\nleading: str = ''\nno: str = ''\nout = Output('a.pickle')"
    write_stage(place / "p", "stage", parameters, "import pickle", "with open(out, 'wb') as f: pickle.dump(dict(text=text, nothing=nothing, nested=nested, infinite=infinite, long=long, leading=leading, no=no), f)")
    import pickle

    from mlkit.pipeline import run

    result = run("p", {f"stage.{name}": value for name, value in values.items()})
    assert result.ok
    assert pickle.loads(result.output("stage", "a.pickle").read_bytes()) == values
    words = [w for n, v in values.items() for w in ("-p", f"stage.{n}={v if isinstance(v, str) else json.dumps(v)}")]
    mlkit("run", "p", *words)
    assert states(place) == {"stage": "cached"}


def test_mistakes_are_told_before_anything_runs(place):
    write_chain(place / "chain")
    wrong = {
        ("run", "chian"): "chian",
        ("run", "chain", "-p", "first.puase=1"): "pause",
        ("run", "chain", "-p", "first.pause=soon"): "soon",
        ("run", "chain", "-p", "frist.pause=1"): "first",
        ("run", "chain", "-p", "pause"): "stage.name=value",
        ("run", "chain", "--profile", "smoke"): "smoke",
        ("why", "frist"): "Nothing was run yet",
        ("status",): "Nothing was run yet",
        ("open", "first"): "Nothing was run yet",
    }
    for words, told in wrong.items():
        done = mlkit(*words, check=2)
        assert told in done.stderr and done.stderr.startswith("mlkit: "), (words, done.stderr)
    assert not (place / "store").exists()


def test_a_password_is_never_taken_as_a_plain_parameter(place):
    write_stage(place / "p", "pull", 'password: str | None = None\nurl: str = "https://host/x"\noptions: dict = {}\nout = Output("a.txt")', "open(out, 'w').write(url)")
    for given in ("password=hunter2", "password=a,hunter2", "url=https://me:hunter2@host/x", 'options={"api_key": "hunter2"}'):
        done = mlkit("run", "p", "-p", f"pull.{given}", check=2)
        assert "holds a secret" in done.stderr and "env:NAME" in done.stderr and "hunter2" not in done.stdout + done.stderr
    assert not (place / "store").exists()
    mlkit("run", "p", "-p", "pull.password=none", "-p", "pull.url=https://host/y")


def test_profiles_set_parameters(place):
    write_chain(place / "chain")
    (place / "chain" / "pipeline.yaml").write_text("profiles:\n  quick:\n    first.pause: 0.01\n    second: {pause: 0.02}\n")
    mlkit("run", "chain", "--profile", "quick", "-p", "second.pause=0.03")
    jobs = last_manifest(place / "store")["jobs"]
    assert [jobs[n]["parameters"]["pause"] for n in ("first", "second", "third")] == [0.01, 0.03, 0.0]


def test_a_source_that_changes_reruns_its_stage(place):
    write_stage(place / "p", "read", 'raw = Source("raw.csv")\nout = Output("a.txt")', 'open(out, "w").write(open(raw).read())', 'record(text=open(raw).read())')
    assert "raw.csv" in mlkit("run", "p", check=2).stderr
    (place / "p" / "raw.csv").write_text("1")
    mlkit("run", "p")
    (place / "p" / "raw.csv").write_text("2")
    (place / "other.csv").write_text("1")
    mlkit("run", "p")
    assert last_manifest(place / "store")["jobs"]["read"]["records"] == {"text": "2"}
    mlkit("run", "p", "-p", "read.raw=other.csv")
    assert states(place) == {"read": "cached"}, "the same content under another name is the same source"


def test_secrets_are_nowhere_on_disk_or_screen(place, monkeypatch):
    secret = "s3cr3t-with-Ünicode-and-'quotes'"
    monkeypatch.setenv("API_KEY", secret)
    write_stage(place / "p", "call", 'key: Secret[str] = Secret("API_KEY")\nout = Output("a.txt")', 'open(out, "w").write(str(len(key)))', "print(key)", "key", "{'key': str(key)}", "record(length=len(key))", "raise ValueError(f'refused {key}')")
    done = mlkit("run", "p", check=1)
    assert secret not in done.stdout + done.stderr
    for path in (place / "store").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content and json.dumps(secret)[1:-1].encode() not in content and repr(secret)[1:-1].encode() not in content, path
    assert last_manifest(place / "store")["jobs"]["call"]["records"] == {"length": len(secret)}
    monkeypatch.delenv("API_KEY")
    assert "API_KEY" in mlkit("run", "p", check=2).stderr


def test_ci_gets_junit_and_a_job_summary(place, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place / "summary.md"))
    write_chain(place / "chain")
    write_stage(place / "chain", "bad", "", "1 / 0")
    mlkit("run", "chain", "--keep-going", "--junit", "reports/junit.xml", check=1)
    suite = ElementTree.parse(place / "reports" / "junit.xml").getroot()
    cases = list(suite.iter("testcase"))
    assert len(cases) == 4 and len(list(suite.iter("failure"))) == 1
    assert "ZeroDivisionError" in (place / "summary.md").read_text()


def test_a_report_stands_by_itself(place):
    write_stage(place / "p", "stage", 'out = Output("a.txt")', 'open(out, "w").write("a")', "record(accuracy=0.5, note='<script>alert(1)</script>')")
    mlkit("run", "p")
    report = place / "store" / "runs" / last_manifest(place / "store")["id"] / "report.html"
    page = report.read_text()
    assert "accuracy" in page and "<svg" in page and "<script>alert" not in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_status_open_and_report_point_to_the_last_run(place):
    write_chain(place / "chain")
    mlkit("run", "chain")
    assert "third" in mlkit("status").stdout and "done" in mlkit("status", "chain").stdout
    assert mlkit("open", "second", "--no-browser").stdout.strip().endswith("second.ipynb")
    assert mlkit("report", "--no-browser").stdout.strip().endswith("report.html")
    assert 'Did you mean "second"' in mlkit("open", "secnod", check=2).stderr


def test_old_runs_go_and_what_is_kept_stays_cached(place):
    write_chain(place / "chain")
    for pause in ("0.001", "0.002", "0.003"):
        mlkit("run", "chain", "-p", f"first.pause={pause}")
    mlkit("gc", "--keep", "1")
    assert len(os.listdir(place / "store" / "runs")) == 1
    mlkit("run", "chain", "-p", "first.pause=0.003")
    assert set(states(place).values()) == {"cached"}


def test_a_pipeline_can_be_copied_to_edit(place):
    write_chain(place / "chain")
    mlkit("new", "chain", "mine")
    assert sorted(os.listdir("mine")) == ["first.ipynb", "second.ipynb", "third.ipynb"]
    mlkit("run", "mine")
    assert "not empty" in mlkit("new", "chain", "mine", check=2).stderr


def test_a_run_does_not_mind_who_started_it(place):
    write_chain(place / "chain", ["first"])  # posix_spawn, used by make and by Python from 3.13 on, hands down two ignored signals that nobody may touch
    started = os.posix_spawn(sys.executable, [sys.executable, "-m", "mlkit", "run", "chain"], os.environ)
    assert os.waitstatus_to_exitcode(os.waitpid(started, 0)[1]) == 0
    assert last_manifest(place / "store")["jobs"]["first"]["warm"]


def test_cold_and_warm_make_the_same(place):
    write_chain(place / "chain")
    mlkit("run", "chain")
    warm = digests(last_manifest(place / "store"))
    mlkit("run", "chain", "--force", "--cold")
    assert digests(last_manifest(place / "store")) == warm


def test_an_undeclared_file_is_warned_about_by_name(place):
    (place / "p").mkdir()
    (place / "p" / "hidden.csv").write_text("1")
    write_stage(place / "p", "stage", 'out = Output("a.txt")', 'text = open("hidden.csv").read()', 'open(out, "w").write(text)')
    assert "hidden.csv" in mlkit("run", "p").stdout
    assert any("hidden.csv" in w for w in last_manifest(place / "store")["jobs"]["stage"]["warnings"])


def test_a_cell_tagged_as_failing_does_not_fail_the_stage(place):
    write_stage(place / "p", "stage", 'out = Output("a.txt")', cell("1 / 0", "raises-exception"), 'open(out, "w").write("a")')
    mlkit("run", "p")
    assert states(place) == {"stage": "done"}
