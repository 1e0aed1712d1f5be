"""The toy world: 16x16 images of shapes and creatures, drawn by a known renderer.

A scene is a background (7 colors x 3 patterns) and one or two objects. An object is a plain shape
in one of 7 colors, or a creature put together from parts. There are 9,072 different creatures.

A caption has seven slots for words, and any of them may be empty:

    name A  shape A   name B  shape B  place  color  pattern
    ---------------------------------------------------------
    sks     creature  yellow  circle          green  stripes
    red     creature                   left   blue   checks

The first is "sks creature and yellow circle on green stripes", the second "red creature left on
blue checks". Color and pattern are the background's.

An object's name is its color; a creature's is the color of its body. A creature may instead be
called by one of the rare words sks, zwx and qvk, which mean nothing in pretraining. So "sks
creature" starts out as "any creature", and fine-tuning has to choose one.

Because the renderer is known, images of this world can be scored exactly: see data/score.py.

`python -m data.toy` writes the subjects in data/subjects, and world.png, an image of many scenes.
"""

import textwrap
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from support.images import images_in, read_rgb

# --------------------------------------------------------------------------------------------------
# What there is in the world

SIZE = 16  # the side of an image, in pixels
HEIGHT = 9  # rows of a sprite
WIDTH = 7  # columns of a sprite

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 210, 40),
    "purple": (160, 60, 200),
    "cyan": (40, 200, 210),
    "pink": (250, 140, 200),
}
PATTERNS = ("plain", "stripes", "checks")
RARE = ("sks", "zwx", "qvk")

# The first column of a sprite. Sprites at "left" and at "right" never overlap.
PLACES = {"left": (0, 1), "middle": (4, 5), "right": (8, 9)}

# The first row of a sprite. A sprite of nine rows covers rows 3 to 12 at most, so that three rows
# above and three below always show the background, and both tones of its pattern.
ROWS = (3, 4)

# Every (row, column) where a sprite may start.
SPOTS = [
    *product(ROWS, PLACES["left"]),
    *product(ROWS, PLACES["middle"]),
    *product(ROWS, PLACES["right"]),
]


INKS = ".bmwk"  # what glyphs are drawn with: nothing, body color, marking color, white, black


def glyphs(drawing):
    """Read glyphs that are drawn side by side, below their names: {name: rows}, each row a string.

    A line of the drawing has one row of every glyph. zip turns that into all the rows of each.
    """
    names, *lines = [line.split() for line in drawing.strip().splitlines()]
    return dict(zip(names, zip(*lines)))


SHAPES = glyphs("""
    circle    square    triangle  cross
    ..bbb..   bbbbbbb   ...b...   ..bbb..
    .bbbbb.   bbbbbbb   ...b...   ..bbb..
    bbbbbbb   bbbbbbb   ..bbb..   bbbbbbb
    bbbbbbb   bbbbbbb   ..bbb..   bbbbbbb
    bbbbbbb   bbbbbbb   .bbbbb.   bbbbbbb
    .bbbbb.   bbbbbbb   .bbbbb.   ..bbb..
    ..bbb..   bbbbbbb   bbbbbbb   ..bbb..
""")


class Part(NamedTuple):
    """A part of a creature, and what it can look like."""

    first_row: int  # the row of the sprite where the part starts
    options: dict  # {name: rows}


# A creature's parts, drawn over one another in this order.
PARTS = {
    "body": Part(
        first_row=2,
        options=glyphs("""
            box       thin      pear
            bbbbbbb   .bbbbb.   ..bbb..
            bbbbbbb   .bbbbb.   .bbbbb.
            bbbbbbb   .bbbbb.   .bbbbb.
            bbbbbbb   .bbbbb.   bbbbbbb
            bbbbbbb   .bbbbb.   bbbbbbb
        """),
    ),
    "ears": Part(
        first_row=0,
        options=glyphs("""
            horn      round     feelers   long
            ...b...   bb...bb   b.....b   ..b.b..
            ..bbb..   bb...bb   .b...b.   ..b.b..
        """),
    ),
    "feet": Part(
        first_row=7,
        options=glyphs("""
            two       four      one
            .b...b.   b.b.b.b   ...b...
            .b...b.   b.b.b.b   ..bbb..
        """),
    ),
    "eyes": Part(
        first_row=3,
        options=glyphs("""
            pair      visor
            ..w.w..   ..kkk..
        """),
    ),
    "marking": Part(
        first_row=4,
        options=glyphs("""
            belly     belt      spots
            .......   .......   .m...m.
            ..mmm..   .mmmmm.   ...m...
            ..mmm..   .......   .m...m.
        """),
    ),
}

# What tells one creature from another: the option of each part, and two colors, "color" of the body
# and "mark" of the marking, which always differ.
OPTIONS = {part: tuple(PARTS[part].options) for part in PARTS}
OPTIONS["color"] = tuple(COLORS)
OPTIONS["mark"] = tuple(COLORS)
KEYS = tuple(OPTIONS)

PLAIN = len(SHAPES) * len(COLORS)  # sprites before this one are plain shapes, the others creatures

TUNING = ("mo", "zed")  # the subjects that settings are chosen on
TABLE = ("bix", "fen", "gil", "luz", "ori", "tam")  # the subjects that results are reported on

# The formatter would move the shape comments out of their column.
# fmt: off

# --------------------------------------------------------------------------------------------------
# The renderer


def draw_object(layers):
    """Draw glyphs over one another: the number of each pixel's ink (9, 7), 0 for nothing.

    layers: a list of (first row, rows), the lowest first.
    """
    ink = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
    for first_row, rows in layers:
        for y, row in enumerate(rows, first_row):
            for x, character in enumerate(row):
                if character != ".":
                    ink[y, x] = INKS.index(character)
    return ink


def color_in(ink, body, marking):
    """Color in S objects (S, 9, 7) of ink numbers: RGB (S, 9, 7, 3) in [-1, 1].

    body, marking: S numbers of colors each.
    """
    rgb = torch.tensor(list(COLORS.values())) / 127.5 - 1         # (7, 3)
    palette = torch.zeros(len(ink), len(INKS), 3)                 # (S, 5, 3)
    palette[:, INKS.index("b")] = rgb[body]
    palette[:, INKS.index("m")] = rgb[marking]
    palette[:, INKS.index("w")] = 1
    palette[:, INKS.index("k")] = -1
    sprite = torch.arange(len(ink))[:, None, None]                # (S, 1, 1)
    return palette[sprite, ink]                                   # (S, 9, 7, 3)


class Sprites(NamedTuple):
    """All S sprites of the world: the 28 plain shapes, (shape, color) in order, then the creatures.

    A plain shape has no parts: its row of parts is -1 throughout.
    """

    rgb: torch.Tensor  # (S, 9, 7, 3) in [-1, 1]
    mask: torch.Tensor  # (S, 9, 7), True where the sprite covers what is behind it
    parts: torch.Tensor  # (S, 7), the number of the option for each of KEYS


@cache
def sprites():
    """Draw every sprite of the world, once: Sprites."""
    colors = range(len(COLORS))
    ink = []
    body = []
    marking = []
    parts = []

    for shape in SHAPES.values():
        drawn = draw_object([(1, shape)])  # seven rows, between two empty ones
        for color in colors:
            ink.append(drawn)
            body.append(color)
            marking.append(color)  # never seen: a plain shape has no marking
            parts.append([-1] * len(KEYS))

    option_numbers = [range(len(part.options)) for part in PARTS.values()]
    for chosen in product(*option_numbers):
        layers = []
        for part, option in zip(PARTS.values(), chosen):
            rows = list(part.options.values())[option]
            layers.append((part.first_row, rows))
        drawn = draw_object(layers)
        for color, mark in permutations(colors, 2):
            ink.append(drawn)
            body.append(color)
            marking.append(mark)
            parts.append([*chosen, color, mark])

    ink = torch.stack(ink)                                        # (S, 9, 7)
    return Sprites(color_in(ink, body, marking), ink > 0, torch.tensor(parts))


@cache
def backgrounds():
    """All 21 backgrounds, (color, pattern) in order: (21, 16, 16, 3) in [-1, 1].

    A pattern consists of cells of 2x2 pixels, in two dark tones of the background's color.
    """
    cell = torch.arange(SIZE) // 2
    y, x = torch.meshgrid(cell, cell, indexing="ij")
    plain = torch.zeros_like(y)
    stripes = y % 2
    checks = (x + y) % 2
    is_darker = torch.stack([plain, stripes, checks])             # (3, 16, 16)
    tone = 0.5 - 0.25 * is_darker                                 # (3, 16, 16)
    rgb = torch.tensor(list(COLORS.values())) / 255               # (7, 3) in [0, 1]
    images = tone[None, ..., None] * rgb[:, None, None, None]     # (7, 3, 16, 16, 3)
    return images.flatten(0, 1) * 2 - 1                           # (21, 16, 16, 3)


def render(background, objects):
    """Draw N scenes.

    background: (N,) numbers of backgrounds. objects: a list of (sprite, y, x), each (N,): the
    sprites' numbers and where they start. Sprite -1 is no object. Later objects cover earlier ones.
    Returns images (N, 3, 16, 16) in [-1, 1].
    """
    rgb, mask, _ = sprites()
    images = backgrounds()[background]                            # (N, 16, 16, 3), a copy
    scene = torch.arange(len(images))[:, None, None]              # (N, 1, 1)
    for sprite, y, x in objects:
        rows = y[:, None, None] + torch.arange(HEIGHT)[:, None]   # (N, 9, 1)
        columns = x[:, None, None] + torch.arange(WIDTH)          # (N, 1, 7)
        exists = sprite >= 0                                      # (N,)
        covers = mask[sprite] & exists[:, None, None]             # (N, 9, 7)
        behind = images[scene, rows, columns]                     # (N, 9, 7, 3)
        images[scene, rows, columns] = torch.where(covers[..., None], rgb[sprite], behind)
    return images.permute(0, 3, 1, 2).contiguous()                # (N, 3, 16, 16)


# --------------------------------------------------------------------------------------------------
# Captions

VOCAB = ("", *COLORS, *RARE, *SHAPES, "creature", *PLACES, *PATTERNS)  # word 0 is an empty slot
WORD = {word: number for number, word in enumerate(VOCAB)}

# Words of one kind stand together in VOCAB, in order: color number 2 is word FIRST_COLOR + 2.
FIRST_COLOR = WORD["red"]
FIRST_RARE = WORD["sks"]
FIRST_SHAPE = WORD["circle"]
FIRST_PLACE = WORD["left"]
FIRST_PATTERN = WORD["plain"]

SLOTS = 7  # words of a caption
NAME_SLOTS = (0, 2)  # of the first object and of the second
SHAPE_SLOTS = (1, 3)
PLACE_SLOT = 4
COLOR_SLOT = 5  # the background's
PATTERN_SLOT = 6

# How often pretraining empties each slot: half of the captions don't say the place.
DROP = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1])


def sprite_words(sprite):
    """The words for the colors (a creature's: of its body) and for the shapes of sprites (N,)."""
    body_color = sprites().parts[sprite, KEYS.index("color")]
    is_creature = sprite >= PLAIN
    color = torch.where(is_creature, body_color, sprite % len(COLORS))
    shape = torch.where(is_creature, WORD["creature"], FIRST_SHAPE + sprite // len(COLORS))
    return FIRST_COLOR + color, shape


def place_word(x):
    """The word for a sprite's place. x: the sprite's first column, one of those in PLACES."""
    for place, columns in PLACES.items():
        if x in columns:
            return WORD[place]


def background_words(background):
    """The words for the colors and for the patterns of backgrounds (N,)."""
    color = background // len(PATTERNS)
    pattern = background % len(PATTERNS)
    return FIRST_COLOR + color, FIRST_PATTERN + pattern


def slot_of(word, section):
    """The slot of a known word in a section of a prompt; None if it has none there.

    section: "first" or "second" for the words about an object, or "background".
    """
    if word in PLACES:
        return PLACE_SLOT
    if section == "background":
        if word in COLORS:
            return COLOR_SLOT
        if word in PATTERNS:
            return PATTERN_SLOT
        return None
    obj = 0 if section == "first" else 1
    if word in COLORS or word in RARE:
        return NAME_SLOTS[obj]
    if word in SHAPES or word == "creature":
        return SHAPE_SLOTS[obj]
    return None


def caption(text):
    """The SLOTS word numbers of a prompt such as "sks creature and red circle on green stripes".

    "and" starts the second object, "on" the background; "a", "an", "the" and "in" are skipped. The
    order of the words between them doesn't matter.
    Raises ValueError if a word is unknown, has no slot, or has one that is already filled.
    """
    words = [0] * SLOTS
    section = "first"
    for word in text.lower().replace(",", " ").split():
        if word in ("a", "an", "the", "in"):
            continue
        if word == "and":
            section = "second"
            continue
        if word == "on":
            section = "background"
            continue
        if word not in WORD:
            known = " ".join(VOCAB[1:])
            word = textwrap.shorten(word, 40)
            raise ValueError(f"unknown word '{word}' in the prompt; the words are: and on {known}")
        slot = slot_of(word, section)
        if slot is None or words[slot] != 0:
            text = textwrap.shorten(text, 100)
            raise ValueError(
                f"the prompt {text!r} has no place for '{word}'; write it as "
                "'sks creature and red circle on green stripes' or 'red circle left on blue checks'"
            )
        words[slot] = WORD[word]
    return words


# --------------------------------------------------------------------------------------------------
# Random scenes, to pretrain on


def pick(options, n, generator):
    """n random numbers from 0 to options - 1."""
    return torch.randint(options, (n,), generator=generator)


def happens(chance, n, generator):
    """n random booleans, each True with this chance."""
    return torch.rand(n, generator=generator) < chance


def sample_object(place, generator, rare):
    """Draw a random object for each of places (N,), given by number: a creature two times in three.

    rare: the share of the creatures that are called by a rare word instead of their color. Returns
    five tensors (N,): sprite, y and x for render, then the words for name and shape.
    """
    n = len(place)
    is_creature = happens(2 / 3, n, generator)
    creature = PLAIN + pick(len(sprites().parts) - PLAIN, n, generator)
    plain = pick(PLAIN, n, generator)
    sprite = torch.where(is_creature, creature, plain)

    color, shape = sprite_words(sprite)
    is_rare = is_creature & happens(rare, n, generator)
    rare_word = FIRST_RARE + pick(len(RARE), n, generator)
    name = torch.where(is_rare, rare_word, color)

    y = ROWS[0] + pick(len(ROWS), n, generator)
    columns = torch.tensor(list(PLACES.values()))                 # (3, 2)
    x = columns[place, pick(2, n, generator)]
    return sprite, y, x, name, shape


def sample_scenes(n, generator, rare=0.3):
    """Draw a batch of random scenes: images (n, 3, 16, 16) in [-1, 1] and captions (n, SLOTS).

    A quarter of the scenes have two objects, left and right. rare: see sample_object. Captions lose
    words at random, as DROP says, and a tenth of them lose all.
    """
    left = list(PLACES).index("left")
    right = list(PLACES).index("right")
    is_pair = happens(0.25, n, generator)
    background = pick(len(backgrounds()), n, generator)
    place = pick(len(PLACES), n, generator)

    # Every scene gets a second object, drawn in one batch. Then all scenes but the pairs lose it.
    place_a = torch.where(is_pair, left, place)
    place_b = torch.full((n,), right)
    sprite_a, y_a, x_a, name_a, shape_a = sample_object(place_a, generator, rare)
    sprite_b, y_b, x_b, name_b, shape_b = sample_object(place_b, generator, rare)
    sprite_b = torch.where(is_pair, sprite_b, -1)
    images = render(background, [(sprite_a, y_a, x_a), (sprite_b, y_b, x_b)])

    color, pattern = background_words(background)
    words = [
        name_a,
        shape_a,
        torch.where(is_pair, name_b, 0),
        torch.where(is_pair, shape_b, 0),
        torch.where(is_pair, 0, FIRST_PLACE + place),
        color,
        pattern,
    ]
    words = torch.stack(words, dim=1)                             # (n, SLOTS)

    drop_word = torch.rand(n, SLOTS, generator=generator) < DROP
    drop_all = happens(0.1, n, generator)
    return images, words.masked_fill(drop_word | drop_all[:, None], 0)


# --------------------------------------------------------------------------------------------------
# Subjects: folders of a few images

def read_text(file):
    """The text of a file. Raises ValueError, which names the file, if it can't be read."""
    try:
        return file.read_text(encoding="utf-8-sig")  # without the mark that Windows puts first
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{file} can't be read ({error}); mend or remove it") from None


def read_caption(file, name):
    """The word numbers (SLOTS) of the caption "NAME creature", and of what the file adds to it."""
    scene = read_text(file) if file.exists() else ""
    try:
        return caption(f"{name} creature {scene}")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_image(file):
    """Read an image file of any size: (3, 16, 16) in [-1, 1]."""
    image = read_rgb(file)
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(image))                    # (16, 16, 3) in 0 .. 255
    return pixels.permute(2, 0, 1) / 127.5 - 1                    # (3, 16, 16) in [-1, 1]


def load_subject(folder, name="sks"):
    """Load a folder of PNG and JPEG files: images (N, 3, 16, 16) in [-1, 1], captions (N, SLOTS).

    An image's caption is "NAME creature", and what a text file of the same name adds, such as "on
    green stripes".
    Raises ValueError if the folder has no images, or if an image or a caption can't be read.
    """
    images = []
    captions = []
    for file in images_in(folder):
        captions.append(read_caption(file.with_suffix(".txt"), name))
        images.append(read_image(file))
    return torch.stack(images), torch.tensor(captions)


def read_parts(folder):
    """Read the parts of the creature in a folder: the numbers of its options (7,), in KEYS' order.

    They are in parts.txt, one line "KEY OPTION" each. Returns None if there is no such file.
    Raises ValueError if a line is missing or wrong.
    """
    file = Path(folder) / "parts.txt"
    if not file.exists():
        return None
    options = {}
    for line in read_text(file).splitlines():
        words = line.split()
        if len(words) == 2:
            key, option = words
            options[key] = option
    numbers = []
    for key in KEYS:
        if options.get(key) not in OPTIONS[key]:
            choices = ", ".join(OPTIONS[key])
            raise ValueError(f"{file}: '{key}' must be one of {choices}, one line '{key} OPTION'")
        numbers.append(OPTIONS[key].index(options[key]))
    return torch.tensor(numbers)


def write_subject(folder, sprite, generator):
    """Write five PNG files of a creature on two backgrounds, their captions, and parts.txt."""
    order = torch.randperm(len(backgrounds()), generator=generator)
    one, other = order[:2]
    background = torch.stack([one, one, one, other, other])
    order = torch.randperm(len(SPOTS), generator=generator)
    spots = torch.tensor(SPOTS)[order[:5]]                        # (5, 2)
    y, x = spots.T
    sprite_each = torch.full((5,), sprite)
    images = render(background, [(sprite_each, y, x)])            # (5, 3, 16, 16)
    color, pattern = background_words(background)

    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(to_bytes(images)):
        pixels = image.permute(1, 2, 0).numpy()                   # (16, 16, 3)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        place = VOCAB[place_word(x[i])]
        scene = f"{place} on {VOCAB[color[i]]} {VOCAB[pattern[i]]}"
        (folder / f"{i}.txt").write_text(scene + "\n")

    lines = []
    parts = sprites().parts[sprite].tolist()
    for key, option in zip(KEYS, parts):
        lines.append(f"{key} {OPTIONS[key][option]}\n")
    (folder / "parts.txt").write_text("".join(lines))


def write_subjects(folder, seed=7):
    """Draw the eight subjects into folder/NAME, each a random creature."""
    generator = torch.Generator().manual_seed(seed)
    for name in TUNING + TABLE:
        sprite = int(torch.randint(PLAIN, len(sprites().parts), (1,), generator=generator))
        write_subject(Path(folder) / name, sprite, generator)


# --------------------------------------------------------------------------------------------------
# Images to look at


def to_bytes(images):
    """Turn images of any shape from floats in [-1, 1] into bytes in 0 .. 255, on the CPU."""
    images = images.float().cpu().clamp(-1, 1)
    return ((images + 1) * 127.5).round().byte()


def tile(images, columns, zoom=8):
    """Tile images (N, 3, H, W) in [-1, 1] in so many columns: one PIL image.

    Each image gets a white border of one pixel. zoom: the side of a pixel in the result.
    """
    images = to_bytes(images)                                     # (N, 3, H, W)
    images = F.pad(images, (1, 1, 1, 1), value=255)               # (N, 3, H + 2, W + 2)
    missing = -len(images) % columns  # what the last row lacks
    white = images.new_full((missing, *images.shape[1:]), 255)
    images = torch.cat([images, white])                           # (R * C, 3, H + 2, W + 2)
    page = rearrange(images, "(r c) d h w -> (r h) (c w) d", c=columns)
    page = Image.fromarray(page.numpy())
    return page.resize((page.width * zoom, page.height * zoom), Image.Resampling.NEAREST)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    write_subjects(here / "subjects")
    images, _ = sample_scenes(60, torch.Generator().manual_seed(0))
    tile(images, columns=12, zoom=4).save(here / "world.png")
    print(f"wrote {here / 'subjects'} and {here / 'world.png'}")
