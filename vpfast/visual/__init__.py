"""Pictures out: labelled films as GIF and MP4, strips of frames and the layers of their codes as PNG."""

from vpfast.visual.corruption import fragment_blur, gaussian_blur, gaussian_noise, salt_and_pepper
from vpfast.visual.curves import Series, write_curves
from vpfast.visual.film import side_by_side
from vpfast.visual.layers import write_code_maps, write_depths, write_heat_maps, write_repairs
from vpfast.visual.strip import write_strip
from vpfast.visual.writers import write_gif, write_mp4

__all__ = [
    "Series",
    "fragment_blur",
    "gaussian_blur",
    "gaussian_noise",
    "salt_and_pepper",
    "side_by_side",
    "write_code_maps",
    "write_curves",
    "write_depths",
    "write_gif",
    "write_heat_maps",
    "write_mp4",
    "write_repairs",
    "write_strip",
]
