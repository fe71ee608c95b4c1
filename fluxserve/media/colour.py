"""Colour profiles: what the numbers of a picture mean, brought to sRGB, which the models were trained on."""

import io

from PIL import Image, ImageCms

_MODES = {"RGB": ("RGB", "RGBA"), "CMYK": ("CMYK",), "GRAY": ("L",)}
"""By a profile's colour space, the modes of Pillow whose numbers it describes."""


def in_srgb(picture: Image.Image) -> Image.Image:
    """The picture in sRGB, by the profile that its file carries.

    A picture without one is taken as sRGB, as viewers do; so is one whose profile is damaged or of another colour
    space than its pixels.
    """
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    if picture.mode == "P":
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if picture.mode not in _MODES.get(source.profile.xcolor_space.strip(), ()):
            return picture
        if (source.profile.profile_description or "").startswith("sRGB"):
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    assert converted is not None  # it is None only where the picture is changed in place
    return converted
