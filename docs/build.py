"""Builds the site of docs/ and of the files that its pages link to: a folder of HTML.

In the repository a page's relative links lead to files, as GitHub follows them. In the site they lead to pages: a
source file becomes a page of its own, opened at the line that the text of the link names in backquotes. The experiments
of the paper are a page too, where they were run.

Usage: build.py FOLDER    (make docs)
"""

import posixpath
import re
import shutil
import sys
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

ROOT = Path(__file__).parents[1]
# Its pictures are beside it. It is written by make paper.
PAPER = "benchmarks/results/paper/paper.md"
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp"}
# [text](path#anchor), and images; what leads out of the repository has a colon.
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
# What a block of code prints, and where it did if that matters.
OUTPUT = re.compile(r'^```text(?: title="(.*)")?$', re.MULTILINE)
# The order of the pages in the site.
CONTENTS = {
    "Use": ("install", "tutorial", "fusing", "training", "ranks", "compiling", "script", "faq"),
    "Understand": ("batch-norm", "kernels", "explain", "numerics", "benchmarks"),
    "Look up": ("api",),
}


def is_source(path: str) -> bool:
    return Path(path).suffix in LANGUAGES


def place(path: str) -> str:
    """Where a file of the repository is in the folder that Sphinx reads."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md" if is_source(path) else f"source/{path}"


def page_of_source(path: str) -> str:
    """A page in Markdown that shows a source, with an anchor at each line."""
    formatter = HtmlFormatter(linenos="inline", linespans="line")
    code = highlight((ROOT / path).read_text(), get_lexer_by_name(LANGUAGES[Path(path).suffix]), formatter)
    return f'---\norphan: true\n---\n\n# {path}\n\n`````{{raw}} html\n<div class="source">{code}</div>\n`````\n'


def text_of(path: str) -> str:
    if is_source(path):
        return page_of_source(path)
    text = (ROOT / path).read_text()
    if not path.startswith("docs/"):
        return text if path == PAPER else f"---\norphan: true\n---\n\n{text}"
    text = OUTPUT.sub(lambda m: "```{code-block} text\n:class: output" + (f"\n:caption: {m[1]}" if m[1] else ""), text)
    return text + contents() if path == "docs/index.md" else text


def contents() -> str:
    """What is in the margin of every page."""
    trees = []
    for caption, pages in CONTENTS.items():
        if caption == "Understand" and (ROOT / PAPER).exists():
            pages = (*pages, f"Experiments of the paper <{place(PAPER).removesuffix('.md')}>")
        trees += ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
    return "\n".join(["", *trees])


def target(path: str, link: str) -> str | None:
    """The file of the repository that a link in `path` leads to."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return found if not found.startswith("..") and (ROOT / found).is_file() else None


def line_named(path: str, text: str) -> str:
    """An anchor for the first line of a source that has the name that `text` has in backquotes; comments come last."""
    if (name := re.search(r"`([^`]+)`", text)) is None:
        return ""
    word = re.compile(rf"(?<!\w){re.escape(name[1].removesuffix('()').split('.')[-1])}(?!\w)")
    found = [
        (line.lstrip().startswith(("//", "#", '"')), number)
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if word.search(line)
    ]
    return f"#line-{min(found)[1]}" if found else ""


def rewritten(path: str, text: str) -> str:
    """The page with links that are right in the site."""

    def replace(match):
        image, words, link, anchor = match[1], match[2], match[3], match[4] or ""
        found = target(path, link)
        if found is None:
            return match[0]
        there = posixpath.relpath(place(found), posixpath.dirname(place(path)) or ".")
        if is_source(found):
            anchor = line_named(found, words)
        elif not link.endswith(".rst"):
            return f"{image}[{words}]({there}{anchor})"
        # Sphinx knows no anchors but those of headings.
        there = there.removesuffix(".md").removesuffix(".rst")
        return f'<a class="reference internal" href="{there}.html{anchor}">{words}</a>'

    return LINK.sub(replace, text)


def prepare(folder: Path) -> None:
    """Fill a folder with all that the site is made of."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    shutil.copy(ROOT / "docs" / "conf.py", folder)
    waiting = [f"docs/{path.relative_to(ROOT / 'docs').as_posix()}" for path in (ROOT / "docs").glob("**/*.md")]
    waiting += [PAPER] if (ROOT / PAPER).exists() else []
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        there = folder / place(path)
        there.parent.mkdir(parents=True, exist_ok=True)
        if is_source(path):
            there.write_text(text_of(path))
        elif path.endswith(".md"):
            text = text_of(path)
            there.write_text(rewritten(path, text))
            new = {target(path, match[3]) for match in LINK.finditer(text)} - {None} - seen
            waiting += new
            seen |= new
        elif not path.startswith("docs/"):
            shutil.copy(ROOT / path, there)


def main() -> int:
    from sphinx.cmd.build import main as sphinx  # what is above is tested without it

    out = Path(sys.argv[1]).resolve()
    source = out.with_name(f"{out.name}-source")
    prepare(source)
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["--quiet", "--fail-on-warning", "--keep-going", "-d", str(out.with_name(f"{out.name}-trees"))]
    return sphinx([*arguments, str(source), str(out)])


if __name__ == "__main__":
    sys.exit(main())
