"""The toy world: 16x16 pictures of shapes and creatures, drawn by a known renderer, so that scores are exact.

A scene is a background (7 colors x 3 patterns) and one or two objects. An object is a plain shape in one of 7 colors,
or a creature put together from parts, 9,072 different ones. A caption is seven word slots, any of which may be empty:

    name A, shape A, name B, shape B, place, background color, background pattern
    "sks creature and yellow circle on green stripes",  "red creature left on blue checks"

A creature's caption names its body color only, or one of the rare words sks, zwx, qvk in the color's stead, which mean
nothing in pretraining: "sks creature" starts out as "any creature", and fine-tuning has to choose one.

Scores look for the sprite and the place that explain the picture best: among all sprites, at all places. Objects stay
within rows 3 to 12, so that the background is always read from six rows that no object touches.

`python data/toy.py` writes the subjects of data/subjects, and world.png, a picture that shows the world.
"""
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

SIZE, HEIGHT, WIDTH = 16, 9, 7  # a picture's side; a sprite's rows and columns, in pixels
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (240, 210, 40),
          "purple": (160, 60, 200), "cyan": (40, 200, 210), "pink": (250, 140, 200)}
SHAPES = {"circle": ("..bbb..", ".bbbbb.", "bbbbbbb", "bbbbbbb", "bbbbbbb", ".bbbbb.", "..bbb.."),
          "square": ("bbbbbbb",) * 7,
          "triangle": ("...b...", "...b...", "..bbb..", "..bbb..", ".bbbbb.", ".bbbbb.", "bbbbbbb"),
          "cross": ("..bbb..", "..bbb..", "bbbbbbb", "bbbbbbb", "bbbbbbb", "..bbb..", "..bbb..")}
# A creature's parts, drawn over one another in this order: first row, then rows ('b' body, 'm' marking, 'w' white,
# 'k' black). "color" and "mark" are the colors of the body and of the marking, which always differ.
PARTS = {"body": (2, {"box": ("bbbbbbb",) * 5,
                      "thin": (".bbbbb.",) * 5,
                      "pear": ("..bbb..", ".bbbbb.", ".bbbbb.", "bbbbbbb", "bbbbbbb")}),
         "ears": (0, {"horn": ("...b...", "..bbb.."), "round": ("bb...bb", "bb...bb"),
                      "feelers": ("b.....b", ".b...b."), "long": ("..b.b..", "..b.b..")}),
         "feet": (7, {"two": (".b...b.", ".b...b."), "four": ("b.b.b.b", "b.b.b.b"), "one": ("...b...", "..bbb..")}),
         "eyes": (3, {"pair": ("..w.w..",), "visor": ("..kkk..",)}),
         "marking": (4, {"belly": (".......", "..mmm..", "..mmm.."), "belt": (".......", ".mmmmm.", "......."),
                         "spots": (".m...m.", "...m...", ".m...m.")})}
PATTERNS = ("plain", "stripes", "checks")
RARE = ("sks", "zwx", "qvk")
PLACES = {"left": (0, 1), "middle": (4, 5), "right": (8, 9)}  # a sprite's first column
ROWS = (3, 4)  # a sprite's first row
SPOTS = [(y, x) for xs in PLACES.values() for y in ROWS for x in xs]
VOCAB = ("", *COLORS, *RARE, *SHAPES, "creature", *PLACES, *PATTERNS)
WORD = {word: i for i, word in enumerate(VOCAB)}
SLOTS = 7  # words of a caption
DROP = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1])  # how often pretraining empties each slot
TUNING, TABLE = ("mo", "zed"), ("bix", "fen", "gil", "luz", "ori", "tam")  # subjects to tune on, and to report
PLAIN = len(SHAPES) * len(COLORS)  # sprites before this one are plain shapes
KEYS = ("body", "ears", "feet", "eyes", "marking", "color", "mark")
OPTIONS = {**{part: tuple(rows) for part, (_, rows) in PARTS.items()}, "color": tuple(COLORS), "mark": tuple(COLORS)}


@cache
def sprites():
    """Every sprite of the world: RGB (S, 9, 7, 3) in [-1, 1], mask (S, 9, 7), parts (S, 7).

    The first 28 are the plain shapes, (shape, color) in order, their parts -1. The rest are all the creatures; parts
    holds the option's number for each of KEYS.
    """
    rgb = torch.tensor(list(COLORS.values())) / 127.5 - 1
    glyphs, bodies, marks, parts = [], [], [], []
    for shape, color in product(SHAPES.values(), range(len(rgb))):
        glyphs.append(("." * WIDTH, *shape, "." * WIDTH))
        bodies.append(color), marks.append(color), parts.append([-1] * len(KEYS))
    for pick in product(*(range(len(options)) for _, options in PARTS.values())):
        glyph = [["."] * WIDTH for _ in range(HEIGHT)]
        for (top, options), i in zip(PARTS.values(), pick):
            for y, row in enumerate(tuple(options.values())[i], top):
                glyph[y] = [new if new != "." else old for new, old in zip(row, glyph[y])]
        for color, mark in product(range(len(rgb)), repeat=2):
            if color != mark:
                glyphs.append(glyph), bodies.append(color), marks.append(mark), parts.append([*pick, color, mark])
    ink = torch.tensor([[[".bmwk".index(c) for c in row] for row in glyph] for glyph in glyphs])
    inks = torch.tensor([0.0, 0, 0, 1, -1])[:, None].repeat(len(glyphs), 1, 3)  # (S, 5, 3): the color of each sprite's inks
    inks[:, 1], inks[:, 2] = rgb[bodies], rgb[marks]
    images = inks[torch.arange(len(glyphs))[:, None, None], ink]
    return images, ink > 0, torch.tensor(parts)


@cache
def backgrounds():
    """All 21 backgrounds, (color, pattern) in order: (21, 16, 16, 3) in [-1, 1], two dark tones of the color."""
    y, x = torch.meshgrid(torch.arange(SIZE) // 2, torch.arange(SIZE) // 2, indexing="ij")
    dark = torch.stack([torch.zeros_like(y), y % 2, (x + y) % 2])  # (3, 16, 16), 1 where the tone is the darker one
    tone = 0.5 - 0.25 * dark
    rgb = torch.tensor(list(COLORS.values())) / 255
    return (tone[None, ..., None] * rgb[:, None, None, None]).flatten(0, 1) * 2 - 1


def render(background, objects):
    """Draw N scenes.

    background: (N,) numbers of backgrounds. objects: a list of (sprite, y, x), each (N,); a negative sprite is no object.
    Returns (N, 3, 16, 16) in [-1, 1].
    """
    images, (rgb, mask, _) = backgrounds()[background].clone(), sprites()
    n = torch.arange(len(images))[:, None, None]
    for sprite, y, x in objects:
        ys = (y[:, None] + torch.arange(HEIGHT))[:, :, None]
        xs = (x[:, None] + torch.arange(WIDTH))[:, None, :]
        seen = (mask[sprite] & (sprite >= 0)[:, None, None])[..., None]
        images[n, ys, xs] = torch.where(seen, rgb[sprite], images[n, ys, xs])
    return images.permute(0, 3, 1, 2).contiguous()


def sample_scenes(n, generator, rare=0.3):
    """A pretraining batch: images (n, 3, 16, 16) in [-1, 1] and captions (n, SLOTS) of word numbers, 0 an empty slot.

    A quarter of the scenes have two objects, left and right; two thirds of the objects are creatures, and `rare` is
    the share of them whose color word gives way to a rare one.
    """
    rand = lambda high: torch.randint(high, (n,), generator=generator)
    chance = lambda p: torch.rand(n, generator=generator) < p
    two, background, place = chance(0.25), rand(len(backgrounds())), rand(len(PLACES))
    columns, parts = torch.tensor(list(PLACES.values())), sprites()[2]
    words, objects = torch.zeros(n, SLOTS, dtype=torch.long), []
    for k, at in enumerate((torch.where(two, 0, place), torch.full((n,), 2))):
        creature = chance(2 / 3)
        sprite = torch.where(creature, PLAIN + rand(len(parts) - PLAIN), rand(PLAIN))
        color = torch.where(creature, parts[sprite, KEYS.index("color")], sprite % len(COLORS))
        named = creature & chance(rare)
        words[:, 2 * k] = torch.where(named, WORD[RARE[0]] + rand(len(RARE)), WORD["red"] + color)
        words[:, 2 * k + 1] = torch.where(creature, WORD["creature"], WORD["circle"] + sprite // len(COLORS))
        objects.append((sprite, ROWS[0] + rand(len(ROWS)), columns[at, rand(2)]))
    words[~two, 2:4], words[:, 4] = 0, torch.where(two, 0, WORD["left"] + place)
    words[:, 5], words[:, 6] = WORD["red"] + background // len(PATTERNS), WORD["plain"] + background % len(PATTERNS)
    drop = (torch.rand(n, SLOTS, generator=generator) < DROP) | chance(0.1)[:, None]
    objects[1] = (torch.where(two, objects[1][0], -1), *objects[1][1:])
    return render(background, objects), words.masked_fill(drop, 0)


def caption(text):
    """The SLOTS word numbers of a prompt such as "sks creature and red circle on green stripes".

    Order within a part doesn't matter, "and" starts the second object, "on" the background; a, an, the, in are skipped.
    Raises ValueError for an unknown word, and where a slot is filled twice or a word has no slot.
    """
    words, section = [0] * SLOTS, 0
    for word in text.lower().replace(",", " ").split():
        if word in ("a", "an", "the", "in"):
            continue
        if word in ("and", "on"):
            section = 1 if word == "and" else 2
            continue
        if word not in WORD:
            raise ValueError(f"unknown word '{word}' in the prompt; the words are: {' '.join(VOCAB[1:])} and on")
        if word in PLACES:
            slot = 4
        elif section == 2:
            slot = 5 if word in COLORS else 6 if word in PATTERNS else None
        else:
            slot = 2 * section + (0 if word in (*COLORS, *RARE) else 1) if word not in PATTERNS else None
        if slot is None or words[slot]:
            raise ValueError(f"the prompt {text!r} has no place for '{word}'; write it as "
                             "'sks creature and red circle on green stripes' or 'red circle left on blue checks'")
        words[slot] = WORD[word]
    return words


def read_background(images):
    """The nearest background's number for each of images (N, 3, 16, 16), by the rows that no object touches."""
    rows = [y for y in range(SIZE) if y < ROWS[0] or y >= ROWS[-1] + HEIGHT]
    seen = images.permute(0, 2, 3, 1)[:, rows].flatten(1)
    return torch.cdist(seen, backgrounds()[:, rows].flatten(1)).argmin(1)


def read_object(images, spots=SPOTS, creatures=False):
    """The sprite that explains each picture best, out of all (or all creatures), and its spot: two (N,) tensors.

    A sprite at a spot explains the squared error that painting it over the background takes away.
    """
    first = PLAIN if creatures else 0
    rgb, mask = sprites()[0][first:].flatten(1), sprites()[1][first:].flatten(1).float()
    rgb = rgb * mask.repeat_interleave(3, 1)
    norm = rgb.square().sum(1)
    under, images = backgrounds()[read_background(images)], images.permute(0, 2, 3, 1)
    gains = []
    for y, x in spots:
        box = images[:, y:y + HEIGHT, x:x + WIDTH].flatten(1, 2)
        empty = (box - under[:, y:y + HEIGHT, x:x + WIDTH].flatten(1, 2)).square().sum(-1) - box.square().sum(-1)
        gains.append((empty @ mask.T + 2 * box.flatten(1) @ rgb.T - norm).max(1))
    best = torch.stack([gain.values for gain in gains]).argmax(0)
    return first + torch.stack([gain.indices for gain in gains])[best, torch.arange(len(images))], best


def spots_of(words, obj):
    """Where object number obj (0 or 1) of a caption may stand: one side of a scene of two, else anywhere."""
    if words[3] == 0:
        return list(range(len(SPOTS)))
    side = PLACES["left" if obj == 0 else "right"]
    return [i for i, (_, x) in enumerate(SPOTS) if x in side]


def score(images, words, parts=None, name=None):
    """Exact scores of images (N, 3, 16, 16) that were drawn for captions words (N, SLOTS).

    parts (7,) and name (a word number) say that objects called name should be the creature of these parts. Returns
    (N,) tensors. "prompt": the share of what the caption says that the picture shows, of background color, background
    pattern, place, and each object's color and shape (the subject: its shape). With parts, also "parts": the share of
    the subject's parts that are right, and "identity": 1 where all are.
    """
    images = images.float().cpu().clamp(-1, 1)
    background, table = read_background(images), sprites()[2]
    said, right = torch.zeros(len(images)), torch.zeros(len(images))
    found = torch.full((len(images), len(KEYS)), float("nan"))

    def check(rows, wanted, got):
        said[rows] += (wanted > 0).float()
        right[rows] += ((wanted > 0) & (wanted == got)).float()

    check(slice(None), words[:, 5], WORD["red"] + background // len(PATTERNS))
    check(slice(None), words[:, 6], WORD["plain"] + background % len(PATTERNS))
    column = torch.tensor([list(PLACES).index(p) for p, xs in PLACES.items() for _ in ROWS for _ in xs])
    for obj, two in product((0, 1), (False, True)):
        rows = ((words[:, 3] > 0) == two).nonzero()[:, 0]
        if len(rows) == 0 or obj > two:
            continue
        w, spots = words[rows], [SPOTS[i] for i in spots_of(words[rows[0]], obj)]
        sprite, spot = read_object(images[rows], spots)
        creature = sprite >= PLAIN
        color = torch.where(creature, table[sprite, KEYS.index("color")], sprite % len(COLORS))
        check(rows, w[:, 2 * obj + 1], torch.where(creature, WORD["creature"], WORD["circle"] + sprite // len(COLORS)))
        check(rows, w[:, 2 * obj] * (w[:, 2 * obj] < WORD[RARE[0]]), WORD["red"] + color)
        if not two:
            check(rows, w[:, 4], WORD["left"] + column[spot])
        if parts is not None:
            mine = w[:, 2 * obj] == name
            nearest = read_object(images[rows[mine]], spots, creatures=True)[0] if mine.any() else sprite[:0]
            found[rows[mine]] = (table[nearest] == parts).float()
    scores = {"prompt": right / said.clamp(min=1)}
    return scores if parts is None else {**scores, "parts": found.mean(1), "identity": (found == 1).all(1).float()}


def matches(images, tolerance=0.25):
    """True for pictures (N, 3, 16, 16) of one object that are a scene of the world: no pixel's channel (0 .. 1) is off by
    more than tolerance from the redrawn picture. Returns (N,)."""
    images = images.float().cpu().clamp(-1, 1)
    sprite, spot = read_object(images)
    y, x = torch.tensor(SPOTS)[spot].T
    return (render(read_background(images), [(sprite, y, x)]) - images).abs().amax((1, 2, 3)) <= 2 * tolerance


def read_parts(folder):
    """The parts (7,) of the creature in folder, from its parts.txt of lines "part option"; None where there is none.

    Raises ValueError where a line is missing or wrong.
    """
    file = Path(folder) / "parts.txt"
    if not file.exists():
        return None
    lines = dict(line.split() for line in file.read_text(errors="replace").splitlines() if len(line.split()) == 2)
    for key in KEYS:
        if lines.get(key) not in OPTIONS[key]:
            raise ValueError(f"{file}: '{key}' must be one of {', '.join(OPTIONS[key])}, one line '{key} OPTION'")
    return torch.tensor([OPTIONS[key].index(lines[key]) for key in KEYS])


def load_subject(folder, name="sks"):
    """All PNG and JPEG files of a folder: images (N, 3, 16, 16) in [-1, 1], alpha flattened onto black, and captions
    (N, SLOTS). A picture's caption is "NAME creature", and what a text file of its name adds, such as "on green stripes".

    Raises ValueError where there is no such folder, no image in it, one that can't be read, or a caption that can't be.
    """
    files = sorted(f for f in Path(folder).glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise ValueError(f"{folder} is not a folder with PNG or JPEG files; give one with 3 to 5 pictures of the subject")
    images, captions = [], []
    for file in files:
        path = file.with_suffix(".txt")
        try:
            captions.append(caption(f"{name} creature {path.read_text() if path.exists() else ''}"))
            image = Image.open(path := file)
            if image.mode[0] in "IF" or image.format != "MPO" and getattr(image, "is_animated", False):
                raise ValueError("it is animated, or has more than 8 bits a channel")
            image = ImageOps.exif_transpose(image).convert("RGBA")
        except Exception as error:
            raise ValueError(f"{path} can't be read ({error}); mend or remove it") from None
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(images), torch.tensor(captions)


def to_grid(images, columns, zoom=8):
    """A PIL picture of images (N, 3, H, W) in [-1, 1], `columns` in a row, enlarged with nearest neighbour."""
    images = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=255)  # a white border
    images = torch.cat([images, images.new_full((-len(images) % columns, *images.shape[1:]), 255)])
    grid = torch.cat([torch.cat(list(row), 2) for row in images.split(columns)], 1)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def write_subjects(folder, seed=7):
    """Draw the eight subjects into folder/NAME: five PNG files on two backgrounds, with captions, and parts.txt."""
    generator, table = torch.Generator().manual_seed(seed), sprites()[2]
    for name in TUNING + TABLE:
        sprite = int(torch.randint(PLAIN, len(table), (1,), generator=generator))
        a, b = torch.randperm(len(backgrounds()), generator=generator)[:2].tolist()
        spots = torch.tensor(SPOTS)[torch.randperm(len(SPOTS), generator=generator)[:5]]
        images = render(torch.tensor([a, a, a, b, b]), [(torch.full((5,), sprite), spots[:, 0], spots[:, 1])])
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(target / f"{i}.png")
            place = next(place for place, columns in PLACES.items() if spots[i, 1] in columns)
            color, pattern = divmod((a, a, a, b, b)[i], len(PATTERNS))
            (target / f"{i}.txt").write_text(f"{place} on {list(COLORS)[color]} {PATTERNS[pattern]}\n")
        (target / "parts.txt").write_text("".join(f"{key} {OPTIONS[key][i]}\n" for key, i in zip(KEYS, table[sprite].tolist())))


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    write_subjects(here / "subjects")
    to_grid(sample_scenes(60, torch.Generator().manual_seed(0))[0], 12, 4).save(here / "world.png")
    print(f"wrote {here / 'subjects'} and {here / 'world.png'}")
