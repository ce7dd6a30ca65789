"""`--version`: the versions that a bug report needs, read without importing a library."""

from __future__ import annotations

import platform

import click

from cushion_deploy.core.libraries import RUNNING, library_versions
from cushion_deploy.store.manifest import tool_version


def show_version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Print the versions and end, if the flag was given (callback of the option)."""
    if not wanted or ctx.resilient_parsing:
        return
    click.echo("\n".join(version_lines()))
    ctx.exit()


def version_lines() -> list[str]:
    """Return the version of cushion-deploy, of Python and the platform, and of the libraries that compute."""
    found = library_versions()
    libraries = [f"{name} {found[name] or 'not installed'}" for name in RUNNING]
    return [
        f"cushion-deploy, version {tool_version()}",
        f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}",
        *libraries,
    ]
