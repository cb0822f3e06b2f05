"What `import mlkit` and `mlkit --help` cost over a bare interpreter."

import sys
from pathlib import Path

from bench import in_turn, own_places, report, summary, timed

if __name__ == "__main__":
    own_places()
    script = Path(sys.executable).with_name("mlkit")
    calls = {
        "python -c pass": lambda: timed([sys.executable, "-c", "pass"]),
        "import mlkit": lambda: timed([sys.executable, "-c", "import mlkit"]),
        "mlkit --help": lambda: timed([script, "--help"]),
        "from mlkit.pipeline import Input": lambda: timed([sys.executable, "-c", "from mlkit.pipeline import Input"]),
    }
    seconds = in_turn(15, **calls)
    bare = summary(seconds["python -c pass"])["median"]
    rows = [{"what": n, **summary(s), "over bare, ms": (summary(s)["median"] - bare) * 1000} for n, s in seconds.items()]
    report("Start-up, seconds", rows, ["aims: import under 50 ms over bare, --help under 0.25 s"])
