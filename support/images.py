"""For data/toy.py and the examples: reads PNG and JPEG files as people have them."""

import sys
from pathlib import Path

from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg")


def images_in(folder):
    """The PNG and JPEG files of a folder, in the order of their names; no hidden ones.

    Says on stderr if other files beside them aren't used; text files may be captions. Raises
    ValueError if there are none.
    """
    files = [file for file in sorted(Path(folder).glob("*")) if not file.name.startswith(".")]
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        raise ValueError(
            f"{folder} is not a folder with PNG or JPEG files; "
            "give one with 3 to 5 images of the subject"
        )
    others = [file for file in files if file.suffix.lower() not in (*SUFFIXES, ".txt")]
    if others:
        print(
            f"{folder}: of {len(files)} files {len(others)} aren't used, such as {others[0].name}; "
            "only PNG and JPEG images are",
            file=sys.stderr,
        )
    return images


def read_rgb(file):
    """Read an image file: a PIL image in RGB, upright, transparency flattened onto black.

    Raises ValueError if it can't be read, is animated, or has more than 8 bits a channel.
    """
    try:
        # other formats stay shut: Pillow reads dozens, and starts another program for some
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if image.mode[0] in "IF":  # modes "I", "I;16" and "F" have 16 or 32 bits
                raise ValueError("it has more than 8 bits a channel")
            is_photo = image.format == "MPO"  # a JPEG as phones write it: a photo and a preview
            if getattr(image, "is_animated", False) and not is_photo:
                raise ValueError("it is animated")
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:
        raise ValueError(f"{file} can't be read ({error}); mend or remove it") from None
    black = Image.new("RGBA", image.size, "black")
    return Image.alpha_composite(black, image).convert("RGB")
