"""README and docs/: every block of Python runs and prints the text below it, and every link leads to what it names.

The blocks of a page run in order, in one namespace that is empty at first. The blocks of README are separate, and each
has the names that names_that_blocks_use gives.
"""

import contextlib
import doctest
import functools
import importlib.util
import io
import re
import runpy
import shlex
import socket
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from test_examples import names_that_blocks_use

import fastbn

ROOT = Path(__file__).parents[2]
HAS_RESULTS = (ROOT / "benchmarks" / "results").is_dir()
pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not HAS_RESULTS, reason="a source distribution has no results")]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
IDS = [page.stem for page in PAGES]
EVERY_PAGE = [README, *PAGES]
NOTES = ROOT / "benchmarks" / "NOTES.md"
LINKING = [*EVERY_PAGE, NOTES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s#:]*)(#[^)\s]*)?\)")
# In docs/api.rst.
NAMED = re.compile(r"^\.\. auto\w+:: (\S+)$", re.MULTILINE)
# Of a block that shows what another machine printed once, in its title: its numbers are not compared.
NUMBER = re.compile(r"\d[\d.,]*|avx\d+|baseline")


class Block(NamedTuple):
    kind: str  # python, text or sh
    once: bool  # text with a title: from one run
    code: str
    line: int
    follows: bool  # the block before, with nothing between


@functools.cache
def blocks_of(page):
    text = page.read_text()
    found, end = [], 0
    for match in FENCE.finditer(text):
        kind, _, more = match[1].partition(" ")
        follows = bool(found) and not text[end : match.start()].strip()
        found.append(Block(kind, "title=" in more, match[2], text.count("\n", 0, match.start()) + 2, follows))
        end = match.end()
    return found


def names(paths):
    return [path.name for path in paths]


# ---- code ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def surroundings(tmp_path, monkeypatch, threads):
    """An empty folder, what torchrun tells the one process that it starts, and no traces afterwards."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    threads(torch.get_num_threads())
    torch.manual_seed(0)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("a process group is left behind")


def run(block, page, scope):
    """What it prints. An error names the line of the page."""
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, scope)
    return out.getvalue()


def without_numbers(text):
    return NUMBER.sub("#", " ".join(text.split()))


def differs(shown, printed, once):
    """What is wrong with an output in a page, or nothing. An ellipsis stands for anything."""
    if once:
        shown, printed = without_numbers(shown), without_numbers(printed)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    right = doctest.OutputChecker().check_output(shown, printed, flags)
    return "" if right else f"the page shows\n{shown}\nbut this is printed\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_page(page, surroundings, monkeypatch):
    module = types.ModuleType(page.stem.replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # for what looks up the globals of a page's functions
    scope = vars(module)
    printed = None
    for block in blocks_of(page):
        if block.kind == "python":
            printed = run(block, page, scope)
        elif block.kind == "text" and block.follows and printed is not None:
            complaint = differs(block.code, printed, block.once)
            assert not complaint, f"{page.name}:{block.line}: {complaint}"
            printed = None
        else:
            printed = None


def test_readme(surroundings):
    blocks = [block for block in blocks_of(README) if block.kind == "python"]
    assert len(blocks) >= 2
    for block in blocks:
        run(block, README, names_that_blocks_use())


def test_outputs_are_compared():
    assert differs("loss 1\n", "loss 2\n", once=False)
    assert not differs("loss  1 ...\n", "loss 1 or so\n", once=False)
    assert not differs("gain 1.50 on avx2\n", "gain 12 on avx512\n", once=True)
    assert differs("gain 1.5\n", "loss 1.5\n", once=True)


@pytest.mark.parametrize("page", EVERY_PAGE, ids=names(EVERY_PAGE))
def test_no_block_escapes(page):
    """Python that is called something else, or is indented, would not be run."""
    text, blocks = page.read_text(), blocks_of(page)
    assert {block.kind for block in blocks} <= {"python", "text", "sh", "toml"}
    assert len(re.findall(r"(```|~~~)", text)) == 2 * len(blocks), "a fence that this test does not understand"
    for before, block in zip([None, *blocks], blocks, strict=False):
        if block.kind == "text":
            assert block.follows and before.kind in ("python", "sh"), f"line {block.line} shows the output of nothing"
    outside = FENCE.sub("", text)
    assert not re.search(r"^(    |\t)(?![-*])\S", outside, re.MULTILINE), "an indented block"


@pytest.mark.parametrize("page", EVERY_PAGE, ids=names(EVERY_PAGE))
def test_settings_can_be_read(page):
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    for block in blocks_of(page):
        if block.kind == "toml":
            assert tomllib.loads(block.code)


# ---- commands ------------------------------------------------------------------------------------------------------

TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z_]+) \??:?=", (ROOT / "Makefile").read_text(), re.MULTILINE))


def wrong_with(command):
    """What a line of shell asks for that is not there, or nothing."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return ""
    program, *rest = words
    if program == "make":
        variables = [word.partition("=")[0] for word in rest if "=" in word]
        targets = [word for word in rest if "=" not in word]
        gone = [*set(targets).difference(TARGETS), *set(variables).difference(VARIABLES)]
        return f"no target or variable {gone}" if gone else ""
    if program in ("python", "torchrun", ".venv/bin/python"):
        if rest[:2] == ["-m", "fastbn"]:
            return ""
        script = next((word for word in rest if word.endswith(".py")), None)
        if script is None or not (ROOT / script).is_file():
            return f"no script {script}"
        source = (ROOT / script).read_text()
        options = [word.partition("=")[0] for word in rest[rest.index(script) :] if word.startswith("--")]
        gone = [option for option in options if option != "--help" and f'"{option}"' not in source]
        return f"{script} has no {gone}" if gone else ""
    if program == "git" and rest[0] == "add":
        return "".join(f"no {path}" for path in rest[1:] if not (ROOT / path).exists())
    return "" if program in ("pip", "uv", "cd") else f"who checks {program}?"


@pytest.mark.parametrize("page", LINKING, ids=names(LINKING))
def test_commands(page):
    for block in blocks_of(page):
        if block.kind == "sh":
            for line in block.code.splitlines():
                assert not wrong_with(line), f"{page.name}:{block.line}: {line}: {wrong_with(line)}"


def test_wrong_commands_are_seen():
    for line in ("make bnech", "make bench BENCH_ARGUMENT=1", "python benchmarks/gone.py", "curl example.org",
                 "torchrun --standalone benchmarks/digits_ranks.py --step 3"):  # fmt: skip
        assert wrong_with(line), line
    assert not wrong_with("torchrun --standalone benchmarks/digits_ranks.py --steps 3  # few")


# ---- links ---------------------------------------------------------------------------------------------------------


@functools.cache
def anchors(page):
    """As GitHub and Sphinx make them of headings; of the reference, its names."""
    text = page.read_text()
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads]
    return {*slugs, *NAMED.findall(text)}


def wrong_link(page, text, link, anchor):
    """What is wrong with a link, or nothing."""
    where = (page.parent / link).resolve() if link else page
    if not where.is_file():
        return f"there is no {link}"
    if not where.is_relative_to(ROOT):
        return f"{link} is outside of the repository"
    if where.suffix in (".md", ".rst"):
        return f"{link} has no {anchor}" if anchor and anchor[1:] not in anchors(where) else ""
    source = where.read_text()
    for name in re.findall(r"`([^`]+)`", text):
        word = name.removesuffix("()").split(".")[-1]
        if not (name.endswith(where.name) or re.search(rf"(?<!\w){re.escape(word)}(?!\w)", source)):
            return f"there is no {name} in {link}"
    return ""


@pytest.mark.parametrize("page", LINKING, ids=names(LINKING))
def test_links(page):
    for text, link, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        complaint = wrong_link(page, text, link, anchor)
        assert not complaint, f"{page.name}: [{text}]({link}{anchor}): {complaint}"


def test_wrong_links_are_seen():
    page = ROOT / "docs" / "index.md"
    assert wrong_link(page, "here", "gone.md", "")
    assert wrong_link(page, "here", "install.md", "#gone")
    assert wrong_link(page, "`gone`", "../csrc/core/formula.h", "")
    assert not wrong_link(page, "`normalization`", "../csrc/core/formula.h", "")


def test_comments_point_to_sections_of_the_notes():
    """Measured claims in comments name a section; the table of contents has each of them."""
    sources = [path for folder in ("csrc", "fastbn", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.*")]
    texts = {path: path.read_text() for path in sources if path.suffix in (".h", ".cpp", ".cuh", ".cu", ".py", ".md")}
    named = [(path, anchor) for path, text in texts.items() for anchor in re.findall(r"NOTES\.md\)?#([\w-]+)", text)]
    assert named
    for path, anchor in named:
        assert anchor in anchors(NOTES), f"{path}: NOTES.md has no #{anchor}"
    listed = {anchor[1:] for _, link, anchor in LINK.findall(NOTES.read_text()) if not link and anchor}
    assert anchors(NOTES) - {"optimizations-that-were-tried"} == listed


# ---- the site ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site():
    """The module docs/build.py."""
    spec = importlib.util.spec_from_file_location("build_of_docs", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_has_every_page(site):
    listed = [page for pages in site.CONTENTS.values() for page in pages]
    assert sorted(["index", *listed]) == sorted([*IDS, "api"])


def test_links_lead_to_pages_of_the_site(site):
    line = 1 + (ROOT / "csrc/core/formula.h").read_text().split("A> normalization(")[0].count("\n")
    for link, right in (
        (
            "[`normalization`](../csrc/core/formula.h)",
            f'"source/csrc/core/formula.h.html#line-{line}">`normalization`<',
        ),
        ("[`explain`](api.rst#fastbn.explain)", 'href="api.html#fastbn.explain">`explain`<'),
        ("[CUDA](../README.md#cuda)", "[CUDA](source/README.md#cuda)"),
        ("[Install](install.md)", "[Install](install.md)"),
        (
            "![times](../benchmarks/results/pictures/limit.svg)",
            "![times](source/benchmarks/results/pictures/limit.svg)",
        ),
        ("[elsewhere](https://example.org/x.md)", "[elsewhere](https://example.org/x.md)"),
        ("[gone](gone.md)", "[gone](gone.md)"),
    ):
        assert right in site.rewritten("docs/kernels.md", f"See {link}.")


def test_the_site_is_complete(site, tmp_path, monkeypatch):
    """Every file that a page links to is there, pictures too, and the paper's experiments once they were run."""
    paper = "docs/numerics.md"  # stands in for a page that another program writes
    for path in (site.PAPER, paper):
        monkeypatch.setattr(site, "PAPER", path)
        site.prepare(tmp_path / "site")
        shown = "Experiments of the paper" in (tmp_path / "site" / "index.md").read_text()
        assert shown == (ROOT / path).exists()
    assert (tmp_path / "site/source/csrc/core/formula.h.md").read_text().startswith("---\norphan: true")
    assert "| float32, contiguous |" in (tmp_path / "site/benchmarks.md").read_text()
    for page in (tmp_path / "site").glob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)\s#]+)", FENCE.sub("", page.read_text())):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"
        for link in re.findall(r'href="([^"#]+)\.html', page.read_text()):
            assert any((page.parent / f"{link}{kind}").is_file() for kind in (".md", ".rst")), f"{page.name}: {link}"


def test_the_reference_has_every_public_name():
    shown = NAMED.findall((ROOT / "docs" / "api.rst").read_text())
    public = [f"fastbn.{name}" for name in fastbn.__all__ if name != "functional"]
    public += [f"fastbn.functional.{name}" for name in fastbn.functional.__all__]
    assert sorted(shown) == sorted(public)


def test_the_pictures_are_those_of_their_script():
    folder = ROOT / "docs" / "pictures"
    drawn = runpy.run_path(str(folder / "draw.py"))["PICTURES"]
    assert {path.name for path in folder.glob("*.svg")} == set(drawn)
    for name, draw in drawn.items():
        assert (folder / name).read_text() == draw(), f"run {folder / 'draw.py'}"


def test_nothing_comes_from_elsewhere():
    """A page that is read without a network looks as it does with one."""
    for path in [*PAGES, *(ROOT / "docs").glob("**/*.css"), *(ROOT / "docs").glob("**/*.svg")]:
        text = path.read_text().replace("http://www.w3.org/", "")
        assert not re.search(r"(src|href|url)[=(:]\W*https?://|!\[[^\]]*\]\(https?:", text), path
