"""Files that are replaced as a whole."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write text to path: a process that is stopped meanwhile leaves the old file, and readers see one or the other."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)
