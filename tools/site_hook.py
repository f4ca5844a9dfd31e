"""For mkdocs: gives the site what docs/ links to outside of itself, so that one link is right in both places."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("data/README.md", "examples/quickstart.ipynb")
PLACE = "repository"


def on_files(files: Files, config: Any) -> Files:
    """Add them, as pages or downloads."""
    for path in LINKED:
        files.append(File.generated(config, f"{PLACE}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead ``../`` of a page of docs/ there."""
    return markdown.replace("](../", f"]({PLACE}/")
