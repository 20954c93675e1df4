"""Colours as RGB triples, 0-255."""

import colorsys

RGB = tuple[int, int, int]


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """`first` with `share` (0-1) of `second` stirred in."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def lit(colour: RGB, factor: float) -> RGB:
    """Darker (factor < 1) or brighter (factor > 1), clipped to 0-255."""
    return tuple(max(0, min(255, round(channel * factor))) for channel in colour)


def from_hsv(hue: float, saturation: float, value: float) -> RGB:
    """Hue (wraps around 1), saturation and value (clipped to 0-1) as RGB."""
    red_green_blue = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return tuple(round(channel * 255) for channel in red_green_blue)


def luminance(colour: RGB) -> float:
    """Perceived brightness, 0-1 (Rec. 601 weights)."""
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


def shifted(colour: RGB, hue: float, saturation: float, value: float) -> RGB:
    """Hue moved by `hue` turns, saturation and value multiplied."""
    h, s, v = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    return from_hsv(h + hue, s * saturation, v * value)
