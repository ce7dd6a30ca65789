"""The optional libraries of the page and figures: imported when first needed, refused with the install line."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from cushion_deploy.errors import MissingDependency

INSTALL = "pip install 'cushion-deploy[report]'"


def require(module: str) -> ModuleType:
    """Import a module of the ``report`` extra.

    Raises:
        MissingDependency: the library that provides it is not installed.
    """
    library = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise MissingDependency(
            f"the report page and figures need {library}, which is not installed", hint=INSTALL
        ) from error
