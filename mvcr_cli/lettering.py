"""Text in drawn pictures, in Pillow's built-in font: which characters it has, and at which sizes."""

from __future__ import annotations

import functools
import unicodedata

from PIL import ImageFont

from mvcr_cli.paths import display_name

NAME_CHARS = 22


def drawable(label: str, number: int, limit: int = NAME_CHARS) -> str:
    """The label in glyphs that the built-in font has: accents go, and where letters are lost the number helps."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", display_name(label)) if not unicodedata.combining(c))
    kept = "".join(char for char in plain if _has_glyph(char)).strip()
    name = kept if kept and kept == plain.strip() else f"#{number} {kept}".strip()
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-limit // 2 + 1 :]}"


@functools.cache
def _has_glyph(char: str) -> bool:
    font = load_font(20)
    return char == " " or bytes(font.getmask(char)) != bytes(font.getmask("\U0010ffff"))


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this build of Pillow has no FreeType")
    return font
