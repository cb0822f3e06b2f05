"Six independent stages with --jobs 2 against --jobs 1."

import shutil
import sys

from bench import in_turn, own_places, report, summary, timed
from makers import write_stage

busy = "import time\nend = time.process_time() + 2\nwhile time.process_time() < end: sum(range(1000))"

if __name__ == "__main__":
    home = own_places()
    for n in range(6):
        write_stage(home / "six", f"stage{n}", 'out = Output("a.txt")', busy, f'open(out, "w").write("{n}")')

    def run(jobs: int) -> float:
        shutil.rmtree(home / "store", ignore_errors=True)
        return timed([sys.executable, "-m", "mlkit", "run", home / "six", "--jobs", jobs])

    run(2), run(1)  # the servers are warm from here on
    seconds = in_turn(5, **{"--jobs 1": lambda: run(1), "--jobs 2": lambda: run(2)})
    ratio = summary(seconds["--jobs 1"])["median"] / summary(seconds["--jobs 2"])["median"]
    timed([sys.executable, "-m", "mlkit", "kernel", "stop"])
    report("Six stages of two busy seconds each, seconds", [{"what": n, **summary(s)} for n, s in seconds.items()], [f"--jobs 2 is {ratio:.2f} times as fast"])
