"""A hook of MkDocs: files of the repository's root become pages of the site, with links that lead to pages."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def on_files(files, config):
    """Add the pages. Their links into docs/ lose the folder; those to other files of the root lead to pages."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = LINK.sub(lambda link: "](" + PAGES.get(link[1], link[1].removeprefix("docs/")), text)
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of a page in docs/ to a file of the root lead to its page."""
    for source, target in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}")
    return markdown
