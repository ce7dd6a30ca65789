"""Import of the libraries that HTML and figures need, jinja2 and matplotlib, from the optional extra ``report``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from cushion_deploy.errors import missing_module


def import_extra(module: str) -> ModuleType:
    """Import a module of jinja2 or matplotlib.

    Raises:
        MissingDependency: the library is not installed.
    """
    library = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise missing_module(library) from error
