"""Draws the two pictures of docs/kernels.md, bytes.svg and channels.svg, into the folder of this file.

Usage: draw.py    (the standard library is enough)
"""

from pathlib import Path

READ, WRITE, CACHE, INK, FAINT = "#2a9d8f", "#e07a3f", "#b9dfda", "#223", "#889"
FONT = 'font-family="DejaVu Sans, Verdana, sans-serif"'


def text(x, y, words, size=13, anchor="start", fill=INK, weight="normal"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">'
        f"{words}</text>"
    )


def box(x, y, width, height, fill, words="", ink="white", stroke="none"):
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="{stroke}"/>'
    return frame + text(x + width / 2, y + height / 2 + 4, words, 11, "middle", ink) if words else frame


def picture(width, height, parts, title):
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f"{FONT}>\n<title>{title}</title>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="white"/>\n{body}\n</svg>\n'
    )


# Reads (lower case) and writes (upper case), one letter a tensor: x, y; s the sum with the residual r; gradients d, e.
TRAFFIC = (
    ("batch norm, forward", (("in two passes", "xxY"), ("least", "xY"))),
    ("batch norm, backward", (("in two passes", "dxdxE"), ("least", "dxE"))),
    ("batch norm + ReLU, forward", (("one after the other", "xxY yZ"), ("least", "xZ"))),
    ("batch norm + ReLU, backward", (("one after the other", "dzE exexG"), ("least", "dxG"))),
    ("batch norm + add + ReLU, forward", (("one after the other", "xxY yrS sZ"), ("least", "xrZ"))),
    ("batch norm + add + ReLU, backward", (("one after the other", "dzE exexG"), ("least", "dxEG"))),
)


def bytes_moved():
    parts, y = [], 34
    for x, fill, what in ((24, READ, "a tensor read from memory"), (260, WRITE, "a tensor written to memory")):
        parts += [box(x, y - 13, 16, 16, fill), text(x + 24, y, what)]
    y += 18
    for name, rows in TRAFFIC:
        y += 30
        parts.append(text(24, y, name, weight="bold"))
        for who, letters in rows:
            y += 26
            parts.append(text(180, y, who, 12, "end", FAINT))
            x = 196
            for letter in letters:
                if letter == " ":
                    x += 14
                    continue
                parts.append(box(x, y - 16, 34, 22, READ if letter.islower() else WRITE))
                x += 38
            parts.append(text(x + 8, y, f"{len(letters.replace(' ', ''))} S", 12))
    return picture(640, y + 28, parts, "Tensors read and written by batch norm and what follows it")


def channels():
    parts = [text(24, 34, "One step for the whole tensor, then the next", weight="bold")]

    def row(y, steps, pitch=48):
        for i, (fill, words, ink) in enumerate(steps):
            parts.append(box(24 + i * pitch, y, pitch - 6, 34, fill, words, ink))

    names = ("1", "2", "3", "4")
    row(50, [(READ, f"sum {n}", "white") for n in names] + [(READ, f"read {n}", "white") for n in names])
    parts.append(
        text(24, 106, "When channel 1 is read again, the cache holds others by now: each channel comes from", 12)
    )
    parts.append(text(24, 123, "memory twice. (The writes, one for each channel, are left out.)", 12))
    parts.append(text(24, 172, "One channel at a time", weight="bold"))
    steps = []
    for n in names:
        steps += [(READ, f"sum {n}", "white"), (CACHE, f"use {n}", INK)]
    row(188, steps)
    parts.append(text(24, 244, "A channel is still in the cache when it is normalized: it comes from memory once.", 12))
    for x, fill, what in ((24, READ, "from memory"), (150, CACHE, "from the cache")):
        parts += [box(x, 268, 16, 16, fill), text(x + 24, 281, what, 12)]
    return picture(640, 304, parts, "Why the order of the work decides how often memory is read")


PICTURES = {"bytes.svg": bytes_moved, "channels.svg": channels}

if __name__ == "__main__":
    for name, make in PICTURES.items():
        (Path(__file__).parent / name).write_text(make())
