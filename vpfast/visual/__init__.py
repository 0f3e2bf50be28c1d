"""Writing pictures: videos as GIF and MP4; strips, curves and layers of codes as PNG; HTML pages with all of them."""

from vpfast.visual.corruption import fragment_blur, gaussian_blur, gaussian_noise, salt_and_pepper
from vpfast.visual.curves import Series, write_curves, write_frame_curves
from vpfast.visual.film import beside, side_by_side
from vpfast.visual.layers import write_code_maps, write_depths, write_heat_maps, write_repairs
from vpfast.visual.page import Clip, Curves, Page, Table, write_page
from vpfast.visual.strip import write_strip
from vpfast.visual.writers import growing_mp4, write_gif, write_mp4

__all__ = [
    "Clip",
    "Curves",
    "Page",
    "Series",
    "Table",
    "beside",
    "fragment_blur",
    "gaussian_blur",
    "gaussian_noise",
    "growing_mp4",
    "salt_and_pepper",
    "side_by_side",
    "write_code_maps",
    "write_curves",
    "write_depths",
    "write_frame_curves",
    "write_gif",
    "write_heat_maps",
    "write_mp4",
    "write_page",
    "write_repairs",
    "write_strip",
]
