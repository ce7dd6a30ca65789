"""What the commands of the edge cost before they do anything: seconds and memory of their imports, in new processes.

Run it with the Python of an environment that has nothing but ``cushion-deploy[cpu]``.
"""

from __future__ import annotations

import platform
import subprocess
import sys

MODULES = ("runtime", "cli.generate", "cli.chat", "cli.serve", "cli.verify", "cli.doctor")
TIMES = 5
MEASURE = """
import importlib, sys, time
start = time.perf_counter()
importlib.import_module(sys.argv[1])
seconds = time.perf_counter() - start
from cushion_deploy.core.host import own_peak_memory
print(seconds, own_peak_memory())
"""


def measure(module: str) -> tuple[float, float]:
    """Return the seconds of the fastest import of a module, and the largest peak of memory in MB."""
    found = []
    for _ in range(TIMES):
        command = [sys.executable, "-I", "-c", MEASURE, f"cushion_deploy.{module}"]
        seconds, memory = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found.append((float(seconds), int(memory) / 1e6))
    return min(seconds for seconds, _ in found), max(memory for _, memory in found)


def main() -> None:
    """Print a line for each module."""
    print(f"Python {platform.python_version()}")
    for module in MODULES:
        seconds, memory = measure(module)
        print(f"{module:14}{seconds:6.2f} s {memory:6.0f} MB")


if __name__ == "__main__":
    main()
