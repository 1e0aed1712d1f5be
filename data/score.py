"""Exact scores of images of the toy world: does an image follow its prompt, and is it the subject?

The world is drawn by a known renderer, so an image is read by search, and no learned metric is
needed. First its background: the nearest of all 21, in the rows that no object touches. Then each
object: the sprite and the spot that, painted over that background, come nearest to the image. What
is read is then compared with the caption, and with the subject's parts.
"""

import torch

from data import toy

# The formatter would move the shape comments out of their column.
# fmt: off

# --------------------------------------------------------------------------------------------------
# Reading an image


def read_background(images):
    """Find the nearest background of images (N, 3, 16, 16): their numbers (N,).

    Objects stay within rows 3 to 12, so three rows above and three below show only background.
    """
    first = toy.ROWS[0]
    last = toy.ROWS[-1] + toy.HEIGHT - 1
    free = [y for y in range(toy.SIZE) if y < first or y > last]
    seen = images.permute(0, 2, 3, 1)[:, free].flatten(1)         # (N, 6 * 16 * 3)
    known = toy.backgrounds()[:, free].flatten(1)                 # (21, 6 * 16 * 3)

    # cdist measures the distances to all 21 at once, and argmin finds the shortest. A generated
    # image equals none of them exactly, so the nearest one counts.
    distance = torch.cdist(seen, known)                           # (N, 21)
    return distance.argmin(1)                                     # (N,)


def read_object(images, spots=toy.SPOTS, creatures=False):
    """Find the sprite, and its spot, that explain each of images (N, 3, 16, 16) best.

    spots: the (row, column) to look at. creatures: look for creatures only, not for plain shapes.
    Returns two tensors (N,): the sprites' numbers, and the numbers of their spots in `spots`.

    The best sprite is the one that, painted over the background, takes away the most squared error.
    The error changes only at the pixels that the sprite covers. At each of them it falls by

        |box - background|^2 - |box - sprite|^2
            = |box - background|^2 - |box|^2  +  2 box . sprite  -  |sprite|^2

    The first two terms need no more of a sprite than which pixels it covers, and the last nothing
    of the image. So the sums over covered pixels are two matrix products with all S sprites at
    once, of masks and of colors. Computed directly, the differences would be N * S * 189 numbers
    for each spot.
    """
    first = toy.PLAIN if creatures else 0
    world = toy.sprites()
    mask = world.mask[first:].flatten(1).float()                  # (S, 63)
    rgb = world.rgb[first:].flatten(1)                            # (S, 189)
    rgb = rgb * mask.repeat_interleave(3, 1)                      # (S, 189), 0 if not covered
    sprite_norm = rgb.square().sum(1)                             # (S,)

    background = toy.backgrounds()[read_background(images)]       # (N, 16, 16, 3)
    images = images.permute(0, 2, 3, 1)                           # (N, 16, 16, 3)
    gains = []
    sprites = []
    for y, x in spots:
        rows = slice(y, y + toy.HEIGHT)
        columns = slice(x, x + toy.WIDTH)
        box = images[:, rows, columns].flatten(1, 2)              # (N, 63, 3)
        behind = background[:, rows, columns].flatten(1, 2)       # (N, 63, 3)
        error = (box - behind).square().sum(-1)                   # (N, 63)
        box_norm = box.square().sum(-1)                           # (N, 63)
        overlap = box.flatten(1) @ rgb.T                          # (N, S)
        gain = (error - box_norm) @ mask.T + 2 * overlap - sprite_norm
        best_gain, sprite = gain.max(1)                           # (N,) each
        gains.append(best_gain)
        sprites.append(sprite)

    spot = torch.stack(gains).argmax(0)                           # (N,)
    image = torch.arange(len(images))
    sprite = torch.stack(sprites)[spot, image]                    # (N,)
    return first + sprite, spot


# --------------------------------------------------------------------------------------------------
# Comparing it with the caption and the subject


def spots_at(place):
    """The spots of a place: a list of (row, column)."""
    return [(y, x) for y, x in toy.SPOTS if x in toy.PLACES[place]]


def has_two_objects(words):
    """True for captions (N, SLOTS) that have a second object: (N,)."""
    return words[:, toy.SHAPE_SLOTS[1]] > 0


def objects_of(words):
    """The objects of captions (N, SLOTS), and where to look for them.

    A caption's only object may be anywhere. Of two, the first is on the left.
    Returns a list of (has_it, obj, spots), for the three cases. has_it: (N,), True for the captions
    that have such an object. obj: 0 for the first of a caption, 1 for the second. spots: a list of
    (row, column).
    """
    two = has_two_objects(words)
    return [
        (~two, 0, toy.SPOTS),
        (two, 0, spots_at("left")),
        (two, 1, spots_at("right")),
    ]


def read_words(images, words):
    """Read what images (N, 3, 16, 16) show into the slots of captions: word numbers (N, SLOTS).

    words: the images' own captions (N, SLOTS). They only say how many objects to look for.
    """
    shown = torch.zeros_like(words)
    color, pattern = toy.background_words(read_background(images))
    shown[:, toy.COLOR_SLOT] = color
    shown[:, toy.PATTERN_SLOT] = pattern
    for has_it, obj, spots in objects_of(words):
        sprite, spot = read_object(images[has_it], spots)
        color, shape = toy.sprite_words(sprite)
        places = torch.tensor([toy.place_word(x) for _, x in spots])
        shown[has_it, toy.NAME_SLOTS[obj]] = color
        shown[has_it, toy.SHAPE_SLOTS[obj]] = shape
        shown[has_it, toy.PLACE_SLOT] = places[spot]
    return shown


def visible_words(words):
    """What captions (N, SLOTS) say that an image can show: (N, SLOTS), the other slots empty.

    A rare word names no color. Two objects have no single place. Without a second shape there is no
    second object, so its name doesn't count.
    """
    is_rare = (words >= toy.FIRST_RARE) & (words < toy.FIRST_SHAPE)
    words = words.masked_fill(is_rare, 0)
    two = has_two_objects(words)
    words[two, toy.PLACE_SLOT] = 0
    words[~two, toy.NAME_SLOTS[1]] = 0
    return words


def prompt_score(images, words):
    """The share of what captions (N, SLOTS) say that images (N, 3, 16, 16) show: (N,).

    It counts background color, pattern, place, and each object's color and shape.
    """
    asked = visible_words(words)
    said = asked > 0                                              # (N, SLOTS)
    right = said & (asked == read_words(images, words))           # (N, SLOTS)
    return right.sum(1) / said.sum(1).clamp(min=1)


def right_parts(images, words, parts, name):
    """Which of its parts (7,) the creature called name has in images (N, 3, 16, 16): (N, 7).

    1 if a part is right, 0 if it is wrong, NaN if the caption has no object of this name.
    """
    right = torch.full((len(images), len(toy.KEYS)), float("nan"))
    for has_it, obj, spots in objects_of(words):
        mine = has_it & (words[:, toy.NAME_SLOTS[obj]] == name)
        # a subject is a creature: its parts are read even if a plain shape comes nearer
        creature, _ = read_object(images[mine], spots, creatures=True)
        right[mine] = (toy.sprites().parts[creature] == parts).float()
    return right


def score(images, words, parts=None, name=None):
    """Score images (N, 3, 16, 16) that were drawn for captions (N, SLOTS): a dict of tensors (N,).

    "prompt": the share of what the caption says that the image shows.

    With the parts (7,) of a subject, and name, the number of the word that captions call it by:
    "parts": the share of the subject's parts that are right; NaN if the caption doesn't name it.
    "identity": 1 if all parts are right, else 0.
    """
    images = images.float().cpu().clamp(-1, 1)
    scores = {"prompt": prompt_score(images, words)}
    if parts is not None:
        right = right_parts(images, words, parts, name)
        scores["parts"] = right.mean(1)
        scores["identity"] = (right == 1).all(1).float()
    return scores


def matches(images, tolerance=0.25):
    """Which of images (N, 3, 16, 16) are scenes of the world with one object, pixel by pixel: (N,).

    An image is read and drawn again. It matches if no channel of any pixel, on a scale from 0 to 1,
    differs by more than tolerance. The default is larger than the difference between the two tones
    of a background: one in the place of the other still matches.
    """
    images = images.float().cpu().clamp(-1, 1)
    sprite, spot = read_object(images)
    y, x = torch.tensor(toy.SPOTS)[spot].T                        # (N,) each
    background = read_background(images)                          # (N,)
    drawn = toy.render(background, [(sprite, y, x)])              # (N, 3, 16, 16)
    error = (drawn - images).abs().amax((1, 2, 3))                # (N,), on a scale from 0 to 2
    return error <= 2 * tolerance
