"""Draw the pictures of `emoji`: Noto Color Emoji at 64x64 with their CLDR names and keywords.

    python examples/train/emoji/data.py

Needs the Debian packages fonts-noto-color-emoji, unicode-cldr-core and unicode-data, and Pillow with Raqm. About 1,000
designs are kept, those that a network of a few megabytes can learn to draw: faces, hearts, persons, hands, animals,
plants, food, vehicles, places, weather, clothes and things, but no flags, letters, clocks, arrows and signs.
"""

import argparse
import json
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/cldr/common")
GROUPS = Path("/usr/share/unicode/emoji/emoji-test.txt")
WORK = Path("runs/emoji")

# Subgroup of emoji-test.txt: the category in words, how often each of its designs is drawn, and may it be mirrored?
CATEGORIES: dict[str, tuple[str, float, bool]] = {
    "face-smiling": ("happy face", 0.9, True),
    "face-affection": ("loving face", 0.9, True),
    "face-tongue": ("face with tongue", 0.9, True),
    "face-hand": ("face with hand", 0.9, True),
    "face-neutral-skeptical": ("neutral face", 0.9, True),
    "face-sleepy": ("sleepy face", 0.9, True),
    "face-unwell": ("sick face", 0.9, True),
    "face-hat": ("face with hat", 0.9, True),
    "face-glasses": ("face with glasses", 0.9, True),
    "face-concerned": ("sad face", 0.9, True),
    "face-negative": ("angry face", 0.9, True),
    "face-costume": ("costume face", 0.9, True),
    "cat-face": ("cat face", 0.9, True),
    "monkey-face": ("monkey face", 0.9, True),
    "heart": ("heart", 1.5, False),
    "emotion": ("symbol", 0.5, False),
    "hand-fingers-open": ("hand", 0.7, True),
    "hand-fingers-partial": ("hand", 0.7, True),
    "hand-single-finger": ("hand", 0.7, True),
    "hand-fingers-closed": ("hand", 0.7, True),
    "hand-prop": ("hand", 0.7, True),
    "body-parts": ("body part", 0.5, True),
    "person": ("person", 0.8, False),
    "person-role": ("person", 0.8, False),
    "person-fantasy": ("person", 0.8, False),
    "animal-mammal": ("animal", 1.3, True),
    "animal-bird": ("bird, animal", 1.3, True),
    "animal-amphibian": ("animal", 1.3, True),
    "animal-reptile": ("reptile, animal", 1.3, True),
    "animal-marine": ("sea animal", 1.3, True),
    "animal-bug": ("bug, animal", 1.3, True),
    "plant-flower": ("flower, plant", 1.2, True),
    "plant-other": ("plant", 1.2, True),
    "food-fruit": ("fruit, food", 1.2, True),
    "food-vegetable": ("vegetable, food", 1.2, True),
    "food-prepared": ("food", 1.1, True),
    "food-asian": ("food", 1.0, True),
    "food-marine": ("sea animal", 1.0, True),
    "food-sweet": ("sweet, food", 1.2, True),
    "drink": ("drink", 1.0, True),
    "dishware": ("dish", 0.7, True),
    "place-geographic": ("landscape", 1.0, True),
    "place-building": ("building", 1.0, False),
    "place-religious": ("building", 1.0, False),
    "place-other": ("place", 1.0, False),
    "transport-ground": ("vehicle", 1.2, False),
    "transport-water": ("ship, vehicle", 1.2, True),
    "transport-air": ("aircraft, vehicle", 1.2, True),
    "sky & weather": ("weather", 1.0, False),
    "event": ("celebration", 1.0, False),
    "award-medal": ("medal", 0.7, False),
    "sport": ("sport", 0.8, False),
    "game": ("game", 0.7, False),
    "arts & crafts": ("art", 0.8, False),
    "clothing": ("clothing", 0.8, False),
    "sound": ("object", 0.5, False),
    "music": ("music", 0.6, False),
    "musical-instrument": ("musical instrument", 0.9, True),
    "phone": ("object", 0.6, False),
    "computer": ("object", 0.5, False),
    "light & video": ("object", 0.6, True),
    "writing": ("object", 0.6, True),
    "tool": ("tool", 0.6, True),
    "science": ("object", 0.6, True),
    "household": ("object", 0.6, True),
    "geometric": ("shape", 0.8, False),
}
CORE = Path(__file__).with_name("core.txt")
LEFT_OUT = {
    "hundred points",
    "mahjong red dragon",
    "ATM sign",
    "bus stop",
    "stop sign",
    "mobile phone off",
    "vibration mode",
}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


class Design(NamedTuple):
    """One picture in words.

    name: the CLDR name in lower case, "woman firefighter, dark skin tone".
    base: the name without the tone.
    tone: "dark skin tone", or "" where the design knows none.
    keywords: the CLDR keywords.
    category: "person", "bird, animal", ...
    weight: how often the picture is drawn; tones share the weight of their design.
    mirror: may the picture be mirrored?
    """

    name: str
    base: str
    tone: str
    keywords: list[str]
    category: str
    weight: float
    mirror: bool


def plain(text: str) -> str:
    """Lower case and ASCII, with a comma for a colon: "woman: dark skin tone" is "woman, dark skin tone"."""
    text = text.lower().replace("’", "'").replace(": ", ", ")
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if c.isascii())
    return re.sub(r"[^a-z0-9 ,'&.!-]", " ", text).strip()


def read_names() -> dict[str, tuple[str, list[str]]]:
    """Name and keywords by code points without variation selectors."""
    found: dict[str, dict[str, str]] = {}
    for part in ("annotations", "annotationsDerived"):
        for note in ElementTree.parse(NAMES / part / "en.xml").getroot().iter("annotation"):
            kind = "name" if note.get("type") == "tts" else "keywords"
            found.setdefault(note.attrib["cp"].replace("\ufe0f", ""), {})[kind] = note.text or ""
    return {
        text: (words["name"], [plain(word) for word in words.get("keywords", "").split(" | ")])
        for text, words in found.items()
        if "name" in words
    }


def read_groups() -> list[tuple[str, str]]:
    """Every fully qualified emoji with its subgroup, in the order of emoji-test.txt."""
    subgroup, found = "", []
    for line in GROUPS.read_text(encoding="utf8").splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif "; fully-qualified" in line:
            found.append(("".join(chr(int(code, 16)) for code in line.split(";")[0].split()), subgroup))
    return found


def draw(text: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """The glyph as (64, 64, 4) uint8 with colours multiplied by alpha, or None where the font has no single glyph."""
    if font.getlength(text) > 140:
        return None
    image = Image.new("RGBA", (136, 136), (255, 255, 255, 0))
    ImageDraw.Draw(image).text((0, 4), text, font=font, embedded_color=True)
    pixels = np.asarray(image, np.float32).copy()
    if pixels[..., 3].mean() <= 5:
        return None
    pixels[..., :3] *= pixels[..., 3:] / 255  # before the reduction, so that edges have no halo
    small = [np.asarray(Image.fromarray(pixels[..., c]).resize((64, 64), Image.Resampling.LANCZOS)) for c in range(4)]
    result = np.stack(small, -1).clip(0, 255)
    result[..., :3] = np.minimum(result[..., :3], result[..., 3:])
    return np.round(result).astype(np.uint8)


def describe(text: str, subgroup: str, name: str, keywords: list[str]) -> Design | None:
    """The design of an emoji, or None for one that is left out."""
    if subgroup not in CATEGORIES or name in LEFT_OUT:
        return None
    parts = plain(name).split(", ")
    tones = [part for part in parts if part.endswith("skin tone")]
    base = ", ".join(part for part in parts if part not in tones)
    if len(tones) > 1:
        return None
    category, weight, mirror = CATEGORIES[subgroup]
    mirror = mirror and not re.search(r"\b(left|right)", base)
    keywords = [word for word in keywords if word and word != plain(name) and "skin tone" not in word]
    return Design(plain(name), base, tones[0] if tones else "", keywords, category, weight, mirror)


def pick(found: list[tuple[Design, np.ndarray]]) -> list[tuple[Design, np.ndarray]]:
    """Drop the genderless twin of a man and a woman, and pictures that hardly differ from an earlier one."""
    bases = {design.base for design, _ in found}
    kept, small = [], np.zeros((0, 32 * 32 * 3), np.float32)
    for design, picture in found:
        if design.category == "person" and f"man {design.base}" in bases and f"woman {design.base}" in bases:
            continue
        white = picture[..., :3] + (255.0 - picture[..., 3:])
        one = white.reshape(32, 2, 32, 2, 3).mean((1, 3)).reshape(1, -1).astype(np.float32)
        if len(small) and np.abs(small - one).mean(1).min() < 1.2:
            continue
        small = np.concatenate([small, one])
        kept.append((design, picture))
    count = {base: sum(design.base == base for design, _ in kept) for base in bases}
    return [(design._replace(weight=design.weight / count[design.base]), picture) for design, picture in kept]


def load(work: Path) -> tuple[list[Design], Tensor]:
    """Designs and their pictures, (N, 4, 64, 64) uint8 with colours multiplied by alpha, as this script wrote them."""
    designs = [Design(**each) for each in json.loads((work / "designs.json").read_text())]
    return designs, load_file(work / "pictures.safetensors")["pictures"]


def chosen(designs: str) -> set[str] | None:
    """The base names of the designs to learn: "core", enough for pictures of every kind and few enough for some hours,
    or "all", which is None."""
    return set(CORE.read_text().splitlines()) if designs == "core" else None


def main() -> None:
    """Draw, choose and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="folder for everything that is made on the way")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    font = ImageFont.truetype(str(FONT), 109, layout_engine=ImageFont.Layout.RAQM)
    names, found = read_names(), []
    for text, subgroup in read_groups():
        name = names.get(text.replace("\ufe0f", ""))
        design = describe(text, subgroup, *name) if name else None
        picture = draw(text, font) if design else None
        if design and picture is not None:
            found.append((design, picture))
    kept = pick(found)
    pictures = torch.from_numpy(np.stack([picture for _, picture in kept])).permute(0, 3, 1, 2).contiguous()
    save_file({"pictures": pictures}, args.work / "pictures.safetensors")
    (args.work / "designs.json").write_text(json.dumps([design._asdict() for design, _ in kept], indent=1))
    bases = {design.base for design, _ in kept}
    print(
        f"{len(found)} drawn, {len(kept)} kept, {len(bases)} designs, {sum(bool(d.tone) for d, _ in kept)} with a tone"
    )


if __name__ == "__main__":
    main()
