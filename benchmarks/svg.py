"""Figures of matplotlib as small SVG files: text stays text, coordinates have one decimal, styles are shared."""

import collections
import io
import re
from pathlib import Path
from xml.etree import ElementTree

from matplotlib.figure import Figure

NAMESPACE = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
NUMBERS = re.compile(r"-?\d+\.\d+")


def one_decimal(value: str) -> str:
    value = NUMBERS.sub(lambda n: f"{float(n[0]):.1f}".removesuffix(".0"), " ".join(value.split()))
    return re.sub(r" ?([MLCQz]) ?", r"\1", value)


def flattened(element: ElementTree.Element) -> list[ElementTree.Element]:
    """The element with coordinates of one decimal; a group without attributes is replaced by its children."""
    for name in ("d", "x", "y", "transform"):
        if name in element.attrib:
            element.set(name, one_decimal(element.get(name)))
    if "clip-path" in element.attrib:
        element.set("style", f"{element.get('style', '')}; clip-path: {element.attrib.pop('clip-path')}".strip("; "))
    if LINK in element.attrib:
        element.set("href", element.attrib.pop(LINK))
    children = [kept for child in element for kept in flattened(child) if not child.tag.endswith("metadata")]
    element[:] = children
    element.tail = None
    if not (element.text or "").strip():
        element.text = None
    if element.tag == f"{NAMESPACE}g":
        element.attrib.pop("id", None)
        return [element] if element.attrib else children
    return [element]


def smaller(svg: str) -> str:
    ElementTree.register_namespace("", NAMESPACE.strip("{}"))
    (root,) = flattened(ElementTree.fromstring(svg))
    styles = collections.Counter(e.get("style") for e in root.iter() if e.get("style"))
    names = {style: f"s{number}" for number, style in enumerate(style for style in styles if styles[style] > 1)}
    for element in root.iter():
        if element.get("style") in names:
            element.set("class", names[element.attrib.pop("style")])
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    sheet = next(root.iter(f"{NAMESPACE}style"))
    sheet.text = f"{sheet.text}{rules}".replace("; ", ";").replace(": ", ":")
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>").replace("><", ">\n<") + "\n"


def save(drawing: Figure, path: Path) -> None:
    """The same figure gives the same bytes: there is no date in it."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None})
    path.write_text(smaller(buffer.getvalue()))
