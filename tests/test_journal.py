"The record of a notebook under execution tells the truth, whatever is killed and whenever."

import json
import random
import subprocess
import sys
import time

import nbformat

from mlkit.pipeline.journal import Journal, NotebookFile, code_cells, complete, read

WRITER = """
import sys
from mlkit.pipeline.engine import Chronicle
from mlkit.pipeline.journal import Journal, NotebookFile
import json

folder = sys.argv[1]
cells = [{"cell_type": "code", "id": f"c{n}", "metadata": {}, "source": f"{n}", "outputs": [], "execution_count": None} for n in range(200)]
notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
book = Chronicle(notebook, Journal(folder + "/journal.jsonl"), NotebookFile(folder + "/out.ipynb"))
book.start()
print("started", flush=True)
for number, cell in enumerate(cells):
    book.begin(number)
    cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": "x" * (5_000_000 if number == 0 else 10)})
    book.end(number, "done")
    if book.file.due() or number < 5:
        book.save()
book.finish("done", None)
"""


def sample(folder):
    "Make a notebook of three cells on disk, and its journal, open."
    cells = [nbformat.v4.new_code_cell(str(n)) for n in range(3)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("A word."), *cells])
    NotebookFile(folder / "out.ipynb").save(notebook)
    journal = Journal(folder / "journal.jsonl")
    journal.begin(notebook)
    return notebook, journal


def shown(folder) -> list[str]:
    "List the states that the notebook on disk shows."
    notebook = json.loads((folder / "out.ipynb").read_bytes())
    return [c["metadata"]["mlkit"]["state"] for c in code_cells(notebook)]


def test_a_hundred_kills_leave_no_torn_notebook(tmp_path):
    "The writers are forked from one parent that has imported all, since a hundred interpreters would take minutes."
    parent = (
        "import os, sys, random, signal, time, mlkit.pipeline.engine\n"
        "code = compile(sys.argv[2], 'writer', 'exec')\n"
        "for n in range(100):\n"
        "    folder = os.path.join(sys.argv[1], str(n)); os.mkdir(folder)\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        os.dup2(os.open(os.devnull, os.O_WRONLY), 1); sys.argv[1] = folder; exec(code, {}); os._exit(0)\n"
        "    time.sleep(random.Random(n).uniform(0.005, 0.25)); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)\n"
    )
    subprocess.run([sys.executable, "-c", parent, tmp_path, WRITER], check=True, timeout=120)
    ends = set()
    for folder in tmp_path.iterdir():
        account = complete(folder / "out.ipynb", folder / "journal.jsonl", "killed")
        ends.add(account.state)
        if (folder / "out.ipynb").exists():
            nbformat.validate(nbformat.read(folder / "out.ipynb", 4))
            assert shown(folder) == [c["state"] for c in account.cells]
            assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []
        assert "running" not in {c["state"] for c in account.cells}
    assert "killed" in ends


def test_each_line_survives_the_death_of_its_writer(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"started\n"
    time.sleep(random.uniform(0, 0.05))
    writer.kill()
    writer.communicate()
    states = [c["state"] for c in read(tmp_path / "journal.jsonl").cells]
    done = states.count("done")
    assert states[:done] == ["done"] * done and set(states[done + 1 :]) <= {"not run"}


def test_a_cell_that_was_running_ends_as_the_run_did(tmp_path):
    for state in ("killed", "interrupted", "timed out", "out of memory"):
        notebook, journal = sample(tmp_path)
        journal.write(cell=0, state="running")
        journal.write(cell=0, state="done", seconds=1.0)
        journal.write(cell=1, state="running")
        journal.close()
        account = complete(tmp_path / "out.ipynb", tmp_path / "journal.jsonl", state)
        assert account.state == state and shown(tmp_path) == ["done", state, "not run"]
        made = nbformat.read(tmp_path / "out.ipynb", 4)
        assert made.metadata.mlkit.state == state and made.metadata.papermill.exception is True
        assert "before the last outputs" in made.cells[1].metadata.mlkit.note


def test_completing_twice_changes_nothing(tmp_path):
    _, journal = sample(tmp_path)
    journal.write(cell=0, state="running")
    journal.close()
    complete(tmp_path / "out.ipynb", tmp_path / "journal.jsonl", "killed")
    before = (tmp_path / "out.ipynb").read_bytes()
    complete(tmp_path / "out.ipynb", tmp_path / "journal.jsonl", "killed")
    assert (tmp_path / "out.ipynb").read_bytes() == before


def test_a_journal_torn_in_a_line_is_read_up_to_it(tmp_path):
    _, journal = sample(tmp_path)
    journal.write(cell=0, state="running")
    journal.close()
    whole = (tmp_path / "journal.jsonl").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "torn.jsonl").write_bytes(whole[:size])
        account = read(tmp_path / "torn.jsonl")
        assert [c["state"] for c in account.cells] in ([], ["not run"] * 3, ["running", "not run", "not run"])


def test_the_last_attempt_counts(tmp_path):
    notebook, journal = sample(tmp_path)
    journal.write(cell=0, state="running")
    journal.write(cell=0, state="failed")
    journal.write(state="failed", error={"name": "ValueError"})
    journal.begin(notebook)
    journal.close()
    account = read(tmp_path / "journal.jsonl")
    assert account.state == "running" and account.error is None and [c["state"] for c in account.cells] == ["not run"] * 3


def test_a_journal_costs_a_cell_next_to_nothing(tmp_path):
    _, journal = sample(tmp_path)
    started = time.perf_counter()
    for _ in range(2000):
        journal.write(cell=0, state="running")
    seconds = (time.perf_counter() - started) / 2000
    journal.close()
    assert seconds < 0.001 and len(read(tmp_path / "journal.jsonl").cells) == 3


def test_saving_takes_a_small_share_of_the_time(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text="x" * 5_000_000)])])
    file, spent, started = NotebookFile(tmp_path / "out.ipynb"), 0.0, time.perf_counter()
    while time.perf_counter() < started + 2:
        if file.due():
            before = time.perf_counter()
            file.save(notebook)
            spent += time.perf_counter() - before
        time.sleep(0.001)
    assert spent < 0.5
