"""How colours look: to every kind of colour vision, in print, and as text on a ground."""

from collections.abc import Iterable
from itertools import combinations

import numpy as np

VISIONS = {  # full severity; Machado, Oliveira and Fernandes 2009, table 1, applied to linear RGB
    "common": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(text: str) -> np.ndarray:
    """sRGB to linear RGB (IEC 61966-2-1)."""
    channels = np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB to CIELAB under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    fx, fy, fz = (np.cbrt(t) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def nearest(colours: Iterable[str], vision: str) -> float:
    """The least distance of two of them in CIELAB; one of 2.3 is just noticeable."""
    seen = [lab(np.array(VISIONS[vision]) @ linear(text)) for text in colours]
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2))


def luminance(text: str) -> float:
    """Relative to white, as WCAG 2.2 defines it."""
    return float(linear(text) @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, as WCAG 2.2 defines it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
