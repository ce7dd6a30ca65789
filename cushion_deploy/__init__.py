"""Static per-tensor INT8 for language models at the edge: search a CushionCache, calibrate, export, compile, prove."""

from pathlib import Path

for _name in ("calib", "engines", "export"):
    # git writes a symbolic link that the system does not allow as a text file holding its target.
    if Path(__file__).with_name(_name).is_file():
        raise ImportError(
            f"cushion_deploy/{_name} is a text file and not a symbolic link, because git checked the repository out "
            "without symbolic links: run `git config core.symlinks true` and `git checkout -- cushion_deploy` (on "
            "Windows with Developer Mode on), or install the wheel"
        )
