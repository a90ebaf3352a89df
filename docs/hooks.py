"""What the site shows beside docs/: the files that pages link to, README's measurements, the experiments of the paper.

In: pages as they are in the repository, where relative links lead to files of it. Out: pages whose links stay within
the site (sources as pages of their own, at the line that a link names), and equations as MathML.
"""

import functools
import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# A page that is there only once somebody has run the experiments; pictures lie beside it.
PAPER = "benchmarks/results/paper/paper.md"
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".yml": "yaml"}
# [text](path#anchor), and images; what leads elsewhere has a colon.
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
MEASURED = "<!-- measured: begin (written by make report; do not edit) -->", "<!-- measured: end -->"
PLACE_OF_MEASURED = "<!-- README's measurements -->"


def site_path(path):
    """Where a file of the repository is in the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md" if is_code(path) else f"source/{path}"


def is_code(path):
    return Path(path).suffix in LANGUAGES or Path(path).name in ("Makefile", "run")


@functools.cache
def content(path):
    """The text of a page, from a file of the repository."""
    text = (ROOT / path).read_text()
    if is_code(path):
        language = LANGUAGES.get(Path(path).suffix, "")
        head = "---\nhide: [toc]\nsearch: {exclude: true}\n---\n"
        return f'{head}# {path}\n\n`````{language} linenums="1"\n{text}`````\n'
    return text.replace(PLACE_OF_MEASURED, measured()) if path.startswith("docs/") else text


def measured():
    """README's section of measurements, with links as a page in docs/ has them."""
    begin, end = MEASURED
    found = (ROOT / "README.md").read_text().split(begin)[1].split(end)[0]
    return LINK.sub(lambda m: m[0].replace(f"]({m[2]}", f"](../{m[2]}"), found)


def target(path, link):
    """The file of the repository that a link in `path` leads to, or None."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return found if not found.startswith("..") and (ROOT / found).is_file() else None


def line_of(path, text):
    """An anchor for the first line of a source with what the text of a link names in backquotes, if it does."""
    name = re.search(r"`([^`]+)`", text)
    if not is_code(path) or name is None:
        return ""
    word = re.compile(rf"(?<!\w){re.escape(name[1].removesuffix('()').split('.')[-1])}(?!\w)")
    found = [
        (line.lstrip().startswith(("//", "#", '"')), number)  # comments last
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if word.search(line)
    ]
    return f"#__codelineno-0-{min(found)[1]}" if found else ""


def on_config(config):
    if (ROOT / PAPER).exists():
        config.nav.append({"Experiments of the paper": site_path(PAPER)})
    return config


def on_files(files, config):
    content.cache_clear()  # of another build by `mkdocs serve`
    waiting = [f"docs/{f.src_uri}" for f in files if f.is_documentation_page()]
    if (ROOT / PAPER).exists():
        waiting.append(PAPER)
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen or (path.startswith("docs/") and path.removeprefix("docs/") not in files.src_uris):
            continue
        seen.add(path)
        is_page = path.endswith(".md") or is_code(path)
        if not path.startswith("docs/"):
            source = {"content": content(path)} if is_page else {"abs_src_path": str(ROOT / path)}
            files.append(File.generated(config, site_path(path), **source))
        if path.endswith(".md"):
            waiting += filter(None, (target(path, m[2]) for m in LINK.finditer(content(path))))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    path = uri.removeprefix("source/") if uri.startswith("source/") else f"docs/{uri}"
    if not (ROOT / path).is_file():  # a page made of a source
        return markdown

    def replace(match):
        text, link, anchor = match[1], match[2], match[3] or ""
        found = target(path, link)
        if found is None:
            return match[0]
        there = posixpath.relpath(site_path(found), posixpath.dirname(uri))
        return f"[{text}]({there}{anchor or line_of(found, text)})"

    return LINK.sub(replace, markdown.replace(PLACE_OF_MEASURED, measured()))


def on_page_content(html_text, page, config, files):
    def replace(match):
        block = match[1] == "div"
        return convert(html.unescape(match[2].strip()), display="block" if block else "inline")

    return MATH.sub(replace, html_text)
