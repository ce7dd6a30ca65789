"""Send a server what schemathesis derives from its OpenAPI page, sound and unsound, and check every answer.

    python bench/fuzz.py BUNDLE --examples 200

An answer must have a status, a type and a form that the page documents, what the page forbids must be refused, and
nothing may be a failure of the server or leave a traceback in its log. The exit code is schemathesis's, or 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from server import cushion_server

# Sound requests are refused too: for example, a schema that nothing satisfies or a prompt that is too long.
OPTIONS = ("--phases", "coverage,fuzzing", "--exclude-checks", "positive_data_acceptance", "--request-timeout", "300")


def main() -> None:
    """Run schemathesis, and show the log of the server if it has a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--examples", type=int, default=200, help="requests of each route and kind")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with cushion_server(options.bundle, threads=options.threads) as server:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
        done = subprocess.run([*command, *OPTIONS, "--continue-on-failure", "-n", str(options.examples)], check=False)
        log = server.log
    if "Traceback" in log:
        print(log, file=sys.stderr)
    raise SystemExit(done.returncode or int("Traceback" in log))


if __name__ == "__main__":
    main()
