"""Time of `import nbdeploy` against `import httpx`, each in fresh processes in turns. Goal: at most 2 x.

    python benchmarks/import_time.py [--rounds 15]

Clocked inside the process, around the import statement alone; the interpreter's own start is in neither side. The
package loads its parts at first use, so the import of its functions is measured too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from _measure import Cost, middle, ratio, record, show

GOAL = 2.0
PROGRAM = """
import json, time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


STATEMENTS = {
    "httpx": "import httpx",
    "nbdeploy": "import nbdeploy",
    "functions": "from nbdeploy import connect, deploy",
}


def cost(name: str) -> Cost:
    """Import in a fresh process."""
    program = PROGRAM.format(statement=STATEMENTS[name])
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    return Cost(*json.loads(done.stdout))


def main() -> None:
    """Measure in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    costs: dict[str, list[Cost]] = {name: [] for name in STATEMENTS}
    for name in costs:
        cost(name)  # bytecode and page cache
    for number in range(options.rounds):
        for name in sorted(costs, reverse=number % 2 == 0):
            costs[name].append(cost(name))
    raw = {name: middle([one.wall for one in rows]) * 1e3 for name, rows in costs.items()}
    figures = {}
    for name in ("nbdeploy", "functions"):
        wall, cpu = ratio(costs[name], costs["httpx"])
        figures[name] = {"wall_ratio": wall, "cpu_ratio": cpu}
        words = f"{raw[name]:.0f} ms, httpx {raw['httpx']:.0f} ms"
        show(f"{STATEMENTS[name]} / import httpx, wall", wall, GOAL, words)
        show(f"{STATEMENTS[name]} / import httpx, CPU", cpu)
    record("import_time", {**figures, "milliseconds": raw}, ["httpx"])


if __name__ == "__main__":
    main()
