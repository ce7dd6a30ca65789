"""The files of the page at `/`: no build step, and no request to anywhere else."""

from __future__ import annotations

from importlib.resources import files

FILES = {
    "index.html": ("/", "text/html; charset=utf-8"),
    "page.css": ("/page.css", "text/css; charset=utf-8"),
    "page.js": ("/page.js", "text/javascript; charset=utf-8"),
    "stream.js": ("/stream.js", "text/javascript; charset=utf-8"),
}
"""Path and media type of each file."""


def read_file(name: str) -> bytes:
    """Return the bytes of one of :data:`FILES`."""
    return files(__package__).joinpath(name).read_bytes()
