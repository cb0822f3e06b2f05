"A notebook is executed in time linear in its cells, and what became of each cell is told truthfully."

import base64
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from mlkit.pipeline.engine import execute
from mlkit.pipeline.journal import code_cells, read
from mlkit.pipeline.processes import Channel

PYTHON = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(place, *sources) -> str:
    "Write a notebook of code cells; a pair is a source and its tags."
    pairs = [s if isinstance(s, tuple) else (s, []) for s in sources]
    cells = [nbformat.v4.new_code_cell(s, metadata={"tags": tags}) for s, tags in pairs]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=PYTHON), place / "in.ipynb")
    return str(place / "in.ipynb")


@contextmanager
def listener(on_message=None):
    "Yield one end of a channel and a list to which all is added that is sent into it; `on_message(channel, message)` may answer."
    ours, theirs = map(Channel, socket.socketpair())
    heard = []

    def hear():
        for message in iter(ours.receive, None):
            heard.append(message)
            if on_message:
                on_message(ours, message)

    thread = threading.Thread(target=hear)
    thread.start()
    try:
        yield theirs, heard
    finally:
        theirs.close()
        thread.join()
        ours.close()


def stage(place, *sources, on_message=None, warm=True, **more):
    "Execute a notebook as a worker does; return how it ended, what was sent meanwhile, and the executed notebook."
    request = {"notebook": write(place, *sources), "output": str(place / "out.ipynb"), "journal": str(place / "out.journal.jsonl"), "cwd": str(place), "warm": warm, "stage": "s"}
    with listener(on_message) as (channel, heard):
        end = execute(request | more, channel)
    made = nbformat.read(place / "out.ipynb", 4)
    nbformat.validate(made)
    return end, heard, made


def states(notebook) -> list[str]:
    return [c["metadata"]["mlkit"]["state"] for c in code_cells(notebook)]


def at_cell(index: int, do):
    "Call `do(channel)` shortly after a cell has started."

    def on_message(channel, message):
        if message["event"] == "cell" and message["index"] == index and message["state"] == "running":
            time.sleep(0.3)
            do(channel)

    return on_message


def text(cell) -> str:
    return "".join(o.get("text", "") for o in cell.outputs)


def test_all_is_told_of_a_notebook_that_goes_well(place):
    end, heard, made = stage(place, ("a = 6", ["parameters"]), "print(a * 7)\na", "", inject="a = 1")
    assert end["state"] == "done" and end["error"] is None and end["peak_memory"] > 1_000_000
    assert set(states(made)) == {"done"} and made.metadata.papermill.exception is None and made.metadata.mlkit.state == "done"
    assert [m["event"] for m in heard][0] == "kernel" and heard[0]["warm"] is True
    ended = [m for m in heard if m["event"] == "cell" and m["state"] == "done"]
    assert [m["index"] for m in ended] == [0, 1, 2, 3] and all(m["seconds"] >= 0 for m in ended)
    assert [c["state"] for c in read(place / "out.journal.jsonl").cells] == ["done"] * 4


def test_papermill_alone_can_use_it_with_any_kernel(place):
    path = write(place, ("a = 1", ["parameters"]), "print(a)")
    made = papermill.execute_notebook(path, place / "out.ipynb", {"a": 5}, engine_name="mlkit", progress_bar=False, kernel_name="python3")
    assert text(made.cells[-1]) == "5\n" and nbformat.read(place / "out.ipynb", 4).cells[-1].outputs == made.cells[-1].outputs
    write(place, "1 / 0", "2")
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        papermill.execute_notebook(path, place / "out.ipynb", engine_name="mlkit", progress_bar=False)
    assert states(nbformat.read(place / "out.ipynb", 4))[-2:] == ["failed", "not run"]


def test_a_failure_is_told_with_its_cell(place):
    end, _, made = stage(place, "1", "def f():\n    raise ValueError('so what')\nf()", "3")
    assert end["state"] == "failed" and states(made) == ["done", "failed", "not run"]
    assert (end["error"]["cell"], end["error"]["name"], end["error"]["value"]) == (1, "ValueError", "so what")
    assert "f()" in end["error"]["traceback"] and "\x1b" not in end["error"]["traceback"]


@pytest.mark.parametrize("way", ["import sys; sys.exit(0)", "exit()", "raise SystemExit"])
def test_leaving_early_is_a_failure(place, way):
    end, _, made = stage(place, way, "2")
    assert end["state"] == "failed" and "may-exit" in end["error"]["value"] and states(made) == ["failed", "not run"]


def test_a_cell_may_leave_early_if_it_says_so(place):
    end, _, made = stage(place, ("import sys; sys.exit(0)", ["may-exit"]), "1 / 0")
    assert end["state"] == "done" and states(made) == ["done", "not run"]
    assert stage(place, ("import sys; sys.exit(3)", ["may-exit"]), "2")[0]["state"] == "failed"


def test_an_error_that_is_meant_is_no_failure(place):
    end, _, made = stage(place, ("1 / 0", ["raises-exception"]), "2")
    assert end["state"] == "done" and states(made) == ["done", "done"] and made.cells[0].outputs[0].ename == "ZeroDivisionError"


@pytest.mark.parametrize("warm", [True, False])
def test_a_dead_kernel_is_noticed_at_once(place, warm):
    end, heard, made = stage(place, "1", "print('last words', flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "3", warm=warm)
    died = next(m for m in heard if m["event"] == "cell" and m["state"] == "killed")
    assert end["state"] == "killed" and states(made) == ["done", "killed", "not run"] and died["seconds"] < 1.0
    assert "SIGKILL" in end["error"]["value"]
    assert read(place / "out.journal.jsonl").state == "killed"


def test_a_kernel_that_ends_by_itself_has_failed(place):
    end, _, made = stage(place, "import os; os._exit(3)", "2")
    assert end["state"] == "failed" and "exit code 3" in end["error"]["value"] and states(made) == ["failed", "not run"]


@pytest.mark.parametrize("reason", ["timed out", "interrupted"])
def test_a_stage_that_is_told_to_stop_stops(place, reason):
    began = time.monotonic()
    end, _, made = stage(place, "1", "import time\nprint('here', flush=True)\ntime.sleep(60)", "3", on_message=at_cell(1, lambda c: c.send({"stop": reason})))
    assert end["state"] == reason and states(made) == ["done", reason, "not run"] and time.monotonic() - began < 10
    assert "here" in text(made.cells[1]) and made.metadata.papermill.exception is True


def test_a_stage_that_will_not_stop_is_killed(place):
    stubborn = "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass"
    end, heard, made = stage(place, stubborn, on_message=at_cell(0, lambda c: c.send({"stop": "timed out"})))
    assert end["state"] == "timed out" and states(made) == ["timed out"] and 2 < heard[-1]["seconds"] < 6


def test_a_launcher_that_is_gone_ends_the_stage(place):
    ours, theirs = map(Channel, socket.socketpair())
    threading.Timer(1.5, ours.close).start()
    request = {"notebook": write(place, "import time; time.sleep(60)"), "output": str(place / "out.ipynb"), "journal": str(place / "j"), "cwd": str(place), "stage": "s"}
    assert execute(request, theirs)["state"] == "interrupted"
    theirs.close()


def test_a_hundred_megabytes_of_prints_are_bounded(place):
    end, heard, made = stage(place, "for n in range(100):\n    print(('line %d ' % n + 'x' * 90 + '\\n') * 10_000)\nprint('the end')")
    shown = text(made.cells[0])
    assert end["state"] == "done" and len(shown) < 11_000_000 and "left out" in shown
    assert shown.startswith("line 0 ") and shown.rstrip().endswith("the end") and heard[-1]["seconds"] < 30


def test_displays_are_updated_and_cleared(place):
    end, _, made = stage(
        place,
        "from IPython.display import display, clear_output\nh = display('10 %', display_id=True)\nh.update('20 %')",
        "h.update('30 %')",
        "print('gone')\nclear_output()\nprint('kept')",
        "for n in range(1000): print(n, end='\\r')\nprint('done ')",
    )
    assert end["state"] == "done" and made.cells[0].outputs[0].data["text/plain"] == "'30 %'"
    assert text(made.cells[2]) == "kept\n" and text(made.cells[3]) == "done \n"


def test_a_question_is_refused_and_not_waited_for(place):
    end, _, _ = stage(place, "input('Who?')")
    assert end["state"] == "failed" and "input" in end["error"]["value"]


def test_what_was_registered_for_the_end_is_done(place):
    end, _, _ = stage(place, "import atexit\natexit.register(lambda: open('farewell', 'w').write('bye'))")
    assert end["state"] == "done" and (place / "farewell").read_text() == "bye"


def test_records_are_collected_and_later_ones_win(place):
    end, _, _ = stage(place, "from mlkit.pipeline import record\nrecord(a=1, b=2)", "record(b=3, c=[1, None])")
    assert end["records"] == {"a": 1, "b": 3, "c": [1, None]}


def test_memory_is_told_for_each_cell(place):
    end, _, _ = stage(place, "a = b'x' * 150_000_000", "del a", "1")
    first, _, last = [c["peak_memory"] for c in end["cells"]]
    assert first > 150_000_000 > last and end["peak_memory"] >= first


def test_secrets_are_nowhere(place, monkeypatch):
    secret = "s3cr3t-Ü&'\"\\ 5"
    monkeypatch.setenv("TOKEN_X", secret)
    code = [
        "import os, json, base64, urllib.parse, sys\ns = os.environ['TOKEN_X']\nprint(s, repr(s), [s], json.dumps(s), urllib.parse.quote(s), base64.b64encode(('user:' + s).encode()))",
        "print('in two ', end='')\nfor c in s: print(c, end='', flush=True)\nprint(s, file=sys.stderr)\ns",
        "from IPython.display import display\ndisplay({'text/plain': s, 'application/json': {'k': [s]}}, raw=True)",
        "raise ValueError(s)",
    ]
    end, heard, _ = stage(place, *code, secrets={"token": "env:TOKEN_X"})
    everything = (place / "out.ipynb").read_text() + (place / "out.journal.jsonl").read_text() + repr(heard) + repr(end)
    assert end["state"] == "failed" and "s3cr3t" not in everything and "***" in everything
    assert base64.b64encode(b"s3cr3t")[1:-2].decode() not in everything


def test_a_file_that_was_not_declared_is_named(place):
    (place / "raw.csv").write_text("a\n1\n")
    os.utime(place / "raw.csv", (1e9, 1e9))
    (place / "frame.csv").write_text("a\n1\n")
    os.utime(place / "frame.csv", (1e9, 1e9))
    end, heard, _ = stage(place, "open('raw.csv').read()", "x = 'frame.csv'  # as polars would read it")
    told = [m["text"] for m in heard if m["event"] == "warning"]
    assert end["state"] == "done" and len(told) == 2
    assert told[0].startswith("read raw.csv,") and 'frame = Source("frame.csv")' in told[1]
    end, heard, _ = stage(place, "open('raw.csv').read()", declared=[str(place / "raw.csv")])
    assert [m for m in heard if m["event"] == "warning"] == []


@pytest.fixture
def interruptible():
    "Hear of interrupts, which a job in the background of a shell ignores."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_of_papermill_alone_is_truthful(place, interruptible):
    write(place, "import time; time.sleep(60)", "2")
    threading.Timer(2.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        papermill.execute_notebook(place / "in.ipynb", place / "out.ipynb", engine_name="mlkit", progress_bar=False)
    assert states(nbformat.read(place / "out.ipynb", 4)) == ["interrupted", "not run"]


def test_cost_is_linear_in_cells(place):
    "Four times the cells take at most six times the time for cells, with an output of 5 MB in front."

    def seconds(cells: int) -> float:
        end, heard, _ = stage(place, "print('\\n'.join(['x' * 99] * 50_000))", *(f"x = {n}" for n in range(cells)))
        assert end["state"] == "done"
        return sum(m["seconds"] for m in heard if m["event"] == "cell" and m["state"] == "done" and m["index"])

    few = seconds(50)
    assert seconds(200) < 6 * few + 0.5
