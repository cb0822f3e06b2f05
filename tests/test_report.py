"The report of a run: true, safe with anything that users wrote, readable anywhere, and next to free."

import json
import re
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlkit.core.store import Store
from mlkit.pipeline import report
from mlkit.pipeline.events import EventLog, fold, load_run, read_events, write_manifest

dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
evil = '<script>document.body.innerHTML="owned"</script>"\'><img src=x onerror=alert(1)>|`*_[a](http://evil)\x1b[31m\x00\u202e'


def job(state="done", depends=(), **fields) -> dict:
    "What a job of a made-up run is, and how it will end."
    return {"state": state, "depends": list(depends), **fields}


def tell(store: Store, run_id: str, jobs: dict[str, dict], pipeline="vision", ended=True):
    "Write the events of a run as the runner would; return its folder."
    folder = store.runs / run_id
    folder.mkdir(parents=True)
    log = EventLog(folder)
    declared = {}
    for name, made in jobs.items():
        known = {"stage": name.partition("[")[0], "slug": name, "variant": {}, "parameters": {"epochs": 5}} | made
        declared[name] = {k: known[k] for k in ("stage", "slug", "variant", "parameters", "depends")}
    log.emit(
        "run.started",
        id=run_id,
        pipeline=pipeline,
        folder=pipeline,
        command=["/bin/mlkit", "run", pipeline],
        python="3.11.9",
        jobs=declared,
    )
    for name, made in jobs.items():
        tell_job(log, name, made)
    if ended:
        log.emit("run.ended", state="failed" if any(j["state"] in report.broken for j in jobs.values()) else "done")
        write_manifest(folder, log.manifest)
    log.close()
    return folder


def tell_job(log: EventLog, name: str, made: dict):
    "Write the events of one job."
    told = {k: v for k, v in made.items() if k in ("records", "error", "outputs", "notebook")}
    if made["state"] in ("cached", "skipped", "not run"):
        why = made.get("why", ["made by run r0"])
        log.emit("job.ended", job=name, state=made["state"], why=why, seconds=made.get("seconds", 10.0), **told)
        return
    why, name_of = made.get("why", ["parameter epochs: 3 -> 5"]), {"notebook": made.get("notebook")}
    log.emit("job.started", job=name, key="k", why=why, inputs={"table": "ab" * 32}, **name_of)
    log.emit("job.kernel", job=name, seconds=0.2, warm=True)
    for index in range(3):
        log.emit("job.cell", job=name, index=index, of=3, state="running", first_line=made.get("line", "fit(model)"))
        log.emit(
            "job.cell", job=name, index=index, of=3, state="done", seconds=1.0, peak_memory=10**8, first_line=made.get("line", "fit(model)")
        )
    for words in made.get("warnings", []):
        log.emit("job.warning", job=name, text=words)
    log.emit("job.ended", job=name, state=made["state"], seconds=3.0, peak_memory=10**8, **told)


def notebook(path, *outputs: dict):
    "Write an executed notebook of one code cell."
    drawn = [{"output_type": "display_data", "metadata": {}, "data": d} for d in outputs]
    cells = [
        {"cell_type": "markdown", "id": "m", "metadata": {}, "source": ["# Mistakes\n", "worst first"]},
        {"cell_type": "code", "id": "c", "metadata": {}, "source": "show()", "execution_count": 1, "outputs": drawn},
    ]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / ".mlkit").make()


class Page(HTMLParser):
    "What a browser would see: elements, ids, links; refuses elements that are not closed."

    def __init__(self, html: str):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements if name in attrs]


def hostile(state="done") -> dict:
    "Jobs in which everything that a user can name or write is an attack."
    error = {"cell": 0, "name": evil, "value": evil, "traceback": evil} if state == "failed" else None
    records, outputs = {evil: evil, "n": [evil], "d": {evil: 1.5}}, {evil: {"kind": "file", "digest": evil, "size": 1}}
    told = {"parameters": {evil: evil}, "variant": {evil: evil}, "records": records, "outputs": outputs, "error": error}
    first = job(state, **told, why=[evil], warnings=[evil], line=evil)
    return {evil: first, f"{evil}[x]": first | {"depends": [evil], "variant": {evil: "b"}}, "last": job("skipped", [evil], why=[evil])}


@pytest.mark.parametrize("state", ["done", "failed", "out of memory"])
def test_nothing_that_users_wrote_becomes_markup(store, state):
    before = load_run(store, tell(store, "r1", hostile(), pipeline=evil).name)
    folder = tell(store, "r2", hostile(state), pipeline=evil)
    page = Page(report.write(folder, before).read_text())
    view = Page(report.RunView(load_run(store, "r2"))._repr_html_())
    for tag, attrs in page.elements + view.elements:
        assert tag not in ("script", "iframe", "object", "form") and not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert tag != "img" or attrs["src"].startswith("data:image/")
    assert "\x1b" not in "".join(page.words) and 'document.body.innerHTML="owned"' in "".join(page.words)  # shown, as text
    assert "\x1b" not in report.text(before)


def test_the_page_needs_nothing_from_outside(store):
    folder = tell(
        store, "r1", {"prepare": job("cached", notebook="prepare.ipynb"), "train": job(depends=["prepare"], notebook="train.ipynb")}
    )
    notebook(folder / "prepare.ipynb", {"image/png": dot})
    html = report.write(folder).read_text()
    page = Page(html)
    assert all(link.startswith(("#", "./", "data:")) for name in ("href", "src") for link in page.all(name))
    assert "default-src 'none'" in html and "@import" not in html and "url(" not in html
    assert [link for link in page.all("href") if link.startswith("./")] == ["./prepare.ipynb"]  # the other notebook is not there


def test_every_link_leads_somewhere_and_ids_are_unique(store):
    error = {"cell": 1, "name": "E", "value": "v", "traceback": "t"}
    jobs = {"a": job(), "a[1]": job(depends=["a"]), "a-1": job("failed", ["a"], error=error), "ü": job("skipped", ["a-1"])}
    page = Page(report.write(tell(store, "r1", jobs)).read_text())
    ids = page.all("id")
    assert len(ids) == len(set(ids)) == 4
    assert {link[1:] for link in page.all("href") if link.startswith("#")} == set(ids)


def test_records_are_compared_with_the_run_before(store):
    before = load_run(store, tell(store, "r1", {"train": job(records={"loss": 0.36, "name": "a", "same": 1})}).name)
    html = report.write(tell(store, "r2", {"train": job(records={"loss": 0.31, "name": "b", "same": 1, "more": True})}), before).read_text()
    for words in ("▼ 0.05 (-14 %)", "was a", "<td>=</td>", "<td>new</td>", "compared with"):
        assert words in html


def test_a_failure_is_told_first_with_its_cell_and_its_traceback(store):
    error = {"cell": 1, "name": "ValueError", "value": "lr is 0", "traceback": "\x1b[31mTraceback\x1b[0m\nValueError: lr is 0"}
    jobs = {"prepare": job(), "train": job("failed", ["prepare"], error=error), "evaluate": job("skipped", ["train"])}
    html = report.write(tell(store, "r1", jobs)).read_text()
    assert html.index("train failed: cell 2: ValueError: lr is 0") < html.index("<h2>Graph")
    details = html[html.index("<h2>Details") :]
    assert details.index("<b>train</b>") < details.index("<b>prepare</b>") and "In cell 2: <code>fit(model)</code>" in details
    assert ">Traceback\nValueError: lr is 0</pre>" in details


def test_a_run_that_was_killed_has_a_report_too(store):
    folder = tell(store, "r1", {"prepare": job()}, ended=False)
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"time": 1, "event": "run.en')
    assert "interrupted" in report.write(folder).read_text()


def test_a_sweep_is_compared_by_variant(store):
    jobs = {"prepare": job()}
    for lr, loss in (("0.1", 0.5), ("0.2", 0.25), ("0.4", 0.75)):
        jobs[f"train[lr={lr}]"] = job(depends=["prepare"], variant={"lr": lr}, records={"loss": loss})
        jobs[f"evaluate[lr={lr}]"] = job(depends=[f"train[lr={lr}]"], variant={"train.lr": lr}, records={"accuracy": 1 - loss})
    html = report.write(tell(store, "r1", jobs)).read_text()
    table = html[html.index("Sweep over train.lr") : html.index("<h2>Jobs")]
    assert re.findall(r"--p:(\d+)%", table) == ["50", "50", "0", "100", "100", "0"]
    assert "train.loss" in table and "evaluate.accuracy" in table


def test_pictures_are_capped_and_what_is_left_out_is_counted(store):
    folder = tell(store, "r1", {"a": job(notebook="a.ipynb"), "b": job(notebook="b.ipynb"), "c": job("cached", notebook="c.ipynb")})
    notebook(folder / "a.ipynb", *[{"image/png": dot}] * 10)
    notebook(folder / "b.ipynb", {"image/png": dot[:12] + "A" * 7_000_000}, {"image/png": ["iVBORw0KGgo\n", dot[11:]]})
    (folder / "c.ipynb").write_text('{"cells": [{"image/png": tor')
    html = report.write(folder).read_text()
    assert html.count("<figure>") == 7 and "4 more pictures in the notebook" in html and "1 more picture in the notebook" in html
    assert "Mistakes · cell 1" in html


def test_a_vector_picture_keeps_no_script_and_no_way_out(store):
    attack = (
        '<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY e "x">]><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'onload="a()"><script>b()</script><SCRIPT>c()</SCRIPT><foreignObject><body/></foreignObject>'
        '<a xlink:href=" java\nscript:d()"><rect onclick="e()"/></a><image href="http://f"/><use xlink:href="#g"/></svg>'
    )
    folder = tell(store, "r1", {"a": job(notebook="a.ipynb")})
    notebook(folder / "a.ipynb", {"image/svg+xml": attack}, {"image/svg+xml": "<svg"}, {"image/svg+xml": attack.split("?>")[1]})
    codes = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", report.write(folder).read_text())
    assert len(codes) == 2
    for svg in (b64decode(c).decode() for c in codes):
        assert not re.search(r"script|\son|foreign|http://f", svg, re.IGNORECASE) and "#g" in svg


# ── other readers ──


def test_junit_keeps_to_the_common_schema(store):
    error = {"cell": 0, "name": "ValueError", "value": "a\nb", "traceback": "t"}
    jobs = {"a": job(), "b": job("failed", error=error, warnings=["w"]), "c": job("killed"), "d": job("skipped", ["c"])}
    jobs |= {"e": job("not run"), "f": job("cached"), "g": job("timed out")}
    tell(store, "r1", jobs)
    root = ElementTree.fromstring(report.junit(load_run(store, "r1")).encode())
    [suite] = root
    assert root.tag == "testsuites" and suite.tag == "testsuite"
    assert set(suite.attrib) == {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname"}
    assert [suite.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["7", "1", "2", "2"]
    assert time.strptime(suite.get("timestamp"), "%Y-%m-%dT%H:%M:%S")
    for case in suite:
        assert case.tag == "testcase" and set(case.attrib) == {"classname", "name", "time"} and float(case.get("time")) >= 0
        assert [child.tag for child in case] in ([], ["failure"], ["error"], ["skipped"], ["system-out"], ["failure", "system-out"])
    assert suite[1].find("failure").get("message") == "cell 1: ValueError: a b" and "warning: w" in suite[1].findtext("system-out")


anything = st.text(st.characters(codec=None), max_size=40)


@settings(max_examples=150, deadline=None)
@given(anything, anything, anything)
def test_any_text_leaves_every_form_whole(name, value, trace):
    error = {"cell": None, "name": name, "value": value, "traceback": trace}
    told = {"records": {value: value}, "parameters": {value: trace}, "error": error, "warnings": [value], "why": [value], "cells": []}
    jobs = {name or "x": {"stage": name, "state": "failed", "depends": [], **told}}
    manifest = {"id": "r", "pipeline": name, "state": "failed", "started": 0.0, "seconds": 1.0, "jobs": jobs}
    ElementTree.fromstring(report.junit(manifest).encode())
    Page(report.page(manifest))
    assert "\x1b" not in report.text(manifest)
    tables = [line for line in report.summary(manifest).splitlines() if line.startswith("|")]
    assert {line.replace(" ", "").count("|") for line in tables} <= {6, 5}
    assert not any(set("<>[]`*@") & set(line) for line in tables)


def test_the_job_summary_stays_below_the_limit_of_github(store):
    error = {"cell": 0, "name": "E", "value": "ü" * 5000, "traceback": "ü" * 50_000}
    tell(store, "r1", {f"s{i}": job("failed", error=error, records={f"r{k}": k for k in range(20)}) for i in range(500)})
    summary = report.summary(load_run(store, "r1"))
    assert len(summary.encode()) < 2**20 and summary.startswith("### ❌ vision: failed")


# ── cost ──


def test_a_report_of_cached_jobs_costs_next_to_nothing_and_grows_linearly(store):
    records = {"loss": 0.3, "accuracy": 0.9, "history": [3, 2, 1]}
    outputs = {"model": {"kind": "file", "digest": "ab" * 32, "size": 10**6}}

    def cost(n: int) -> float:
        told = {"records": records, "outputs": outputs}
        folder = tell(
            store, f"r{n}", {f"s{i}": job("cached", [f"s{i - 7}"] if i > 6 else [], notebook=f"s{i}.ipynb", **told) for i in range(n)}
        )
        for i in range(n):
            notebook(folder / f"s{i}.ipynb", {"text/plain": "x" * 2000})
        took = []
        for _ in range(3):
            start = time.perf_counter()
            report.write(folder, load_run(store, f"r{n}"))
            took.append(time.perf_counter() - start)
        return min(took)

    small, large = cost(125), cost(500)
    assert large < 1.0, large  # 0.1 s when nobody else uses the machine
    assert large < 8 * small + 0.05, (small, large)


def test_the_report_imports_nothing_dear():
    code = "import sys, mlkit.pipeline.report; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {
        "torch",
        "numpy",
        "polars",
        "jinja2",
        "markupsafe",
        "IPython",
        "nbformat",
        "papermill",
        "zmq",
        "rich",
        "yaml",
        "xml",
        "matplotlib",
        "asyncio",
    }


# ── in a browser ──

_chromium = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (p := shutil.which(n))), None)
_look = """<!doctype html><meta charset="utf-8"><iframe id="f" style="width:390px;height:800px;border:0" src="REPORT"></iframe><pre id="out"></pre><script>
const f = document.getElementById("f");
const colour = c => (c.match(/[\\d.]+/g) || []).map(Number);
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
const ground = e => { for (; e; e = e.parentElement) { const c = colour(f.contentWindow.getComputedStyle(e).backgroundColor); if (c.length == 3 || c[3] == 1) return c; } return [255, 255, 255]; };
f.onload = () => {
  const d = f.contentDocument, out = {};
  out.overflow = d.documentElement.scrollWidth - 390;
  out.text = d.body.innerText.slice(0, 200);
  out.background = f.contentWindow.getComputedStyle(d.body).backgroundColor;
  out.contrast = Math.min(...[...d.querySelectorAll("td,th,dt,dd,h1,h2,h3,a,.soft,pre,code,summary b")].filter(e => !e.closest("svg") && e.innerText).map(e => {
    const a = light(colour(f.contentWindow.getComputedStyle(e).color).slice(0, 3)), b = light(ground(e).slice(0, 3)); return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }));
  const closed = [...d.querySelectorAll("details.job")].find(e => !e.open), target = closed.querySelector(".body").id;
  d.querySelector(`td a[href="#${target}"]`).click();
  setTimeout(() => { out.opened = closed.open; out.requests = f.contentWindow.performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).map(e => e.name);
    document.getElementById("out").textContent = JSON.stringify(out); }, 200);
};
</script>"""


def look(folder, profile, dark: bool) -> dict:
    "Open a report in a narrow browser window, follow a link in it and tell what is seen."
    (folder / "look.html").write_text(_look.replace("REPORT", "report.html"))
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --allow-file-access-from-files"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [
        _chromium,
        *quiet.split(),
        scheme,
        f"--user-data-dir={profile}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        (folder / "look.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    words = []
    parser = HTMLParser()
    parser.handle_data = words.append
    parser.feed(dom[dom.index('<pre id="out">') : dom.index("<script>")])
    return json.loads("".join(words))


@pytest.mark.skipif(_chromium is None, reason="no chromium here")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_readable_in_a_narrow_window_light_and_dark(store, tmp_path, dark):
    error = {"cell": 1, "name": "ValueError", "value": "lr is 0", "traceback": "x" * 500}
    folder = tell(
        store, "r1", {**hostile(), "train-with-a-rather-long-name[learning_rate=0.001]": job("failed", error=error, warnings=["w"])}
    )
    report.write(folder, load_run(store, "r1"))
    seen = look(folder, tmp_path / "profile", dark)
    assert seen["overflow"] <= 0 and seen["opened"] and seen["requests"] == [], seen
    assert seen["contrast"] >= 4.5, seen
    assert "failed" in seen["text"] and seen["text"] != "owned"
    assert (sum(map(int, re.findall(r"\d+", seen["background"])[:3])) < 200) == dark


def test_the_report_tells_what_the_events_told(store):
    folder = tell(store, "r1", {"a": job(), "b": job("cached", ["a"])})
    assert fold(read_events(folder))["jobs"] == load_run(store, "r1")["jobs"]
    assert "2 jobs" in report.write(folder).read_text()
