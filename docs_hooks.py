"""The site's pages of the project's own files: where a page links out of docs/, the file is shown, in colour, on a page of its own.

On a code host those links lead to the files themselves; here `../launch/cli.py` of docs/plan.md becomes `source/launch/cli.py.md`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)#\s]+)(?=[)#])")
LANGUAGES = {
    "": "text",
    ".py": "python",
    ".yaml": "yaml",
    ".json": "json",
    ".sbatch": "bash",
    ".sh": "bash",
    ".jinja": "html",
}


def outside(page: str, target: str) -> str | None:
    """What a page's link points to, from the project's root, when that is not in docs/.

    >>> outside("docs/plan.md", "../benchmarks/memory_plan.py")
    'benchmarks/memory_plan.py'
    >>> outside("docs/plan.md", "large-batches.md")
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def shown_as(path: str) -> str:
    """The page of a file of the project, or of a folder: Markdown is a page already."""
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def content_of(path: str) -> str:
    """What a file of the project holds; of a folder, a list of its files."""
    if not (ROOT / path).is_dir():
        return (ROOT / path).read_text()
    names = sorted(file.name for file in (ROOT / path).iterdir() if file.is_file())
    return f"# {path}\n\n" + "".join(f"* [{name}]({path.rpartition('/')[2]}/{name})\n" for name in names)


def links(page: str, text: str) -> set[str]:
    """The files of the project, outside docs/, that a page links to."""
    found = {outside(page, target) for target in LINK.findall(text)} - {None}
    for path in found:
        if not (ROOT / path).exists():
            raise PluginError(f"{page} links to {path}, which is not in this project")
    return found


def rewrite(page: str, text: str, shown_at: str) -> str:
    """The page's text, its links leading to where this site shows what they mean."""

    def lead(match: re.Match) -> str:
        path = outside(page, match[1])
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[1])).removeprefix("docs/")
        return posixpath.relpath(shown_as(path) if path else meant, posixpath.dirname(shown_at) or ".")

    return LINK.sub(lead, text)


def page_of(path: str, text: str) -> str:
    """A file as a page that search leaves out."""
    if path.endswith(".md") or (ROOT / path).is_dir():
        return rewrite(path, text, shown_as(path))
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n# {path}\n\n`````{{.{language} linenums=1}}\n{text}\n`````\n"


def on_files(files: Files, config) -> Files:
    """Adds a page for each file that a page links to, and for those that these link to in turn."""
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files if file.is_documentation_page()]
    made: set[str] = set()
    while waiting:
        page, text = waiting.pop()
        for path in links(page, text) - made:
            made.add(path)
            content = content_of(path)
            files.append(File.generated(config, shown_as(path), content=page_of(path, content)))
            if path.endswith(".md") or (ROOT / path).is_dir():
                waiting.append((path, content))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Leads the links of a page of docs/ to those pages."""
    uri = page.file.src_uri
    return markdown if uri.startswith("source/") else rewrite(f"docs/{uri}", markdown, uri)
