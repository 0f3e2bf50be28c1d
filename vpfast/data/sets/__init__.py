"""The data sets that ``vpfast data prepare`` knows, by name; each reads its own files."""

from vpfast.data.sets.caltech import Caltech
from vpfast.data.sets.folder import Folder
from vpfast.data.sets.human36m import Human36M
from vpfast.data.sets.kitti import KITTI
from vpfast.data.sets.kth import KTH
from vpfast.data.sets.moving_mnist import MovingMNIST
from vpfast.data.sets.source import Recording, Source

SOURCES: dict[str, type[Source]] = {
    "moving-mnist": MovingMNIST,
    "kth": KTH,
    "human36m": Human36M,
    "caltech": Caltech,
    "kitti": KITTI,
    "folder": Folder,
}

__all__ = ["KITTI", "KTH", "SOURCES", "Caltech", "Folder", "Human36M", "MovingMNIST", "Recording", "Source"]
