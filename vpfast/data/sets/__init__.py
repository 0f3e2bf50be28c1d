"""The data sets that ``vpfast data prepare`` knows, by name; each reads its own files."""

from vpfast.data.sets.folder import Folder
from vpfast.data.sets.kth import KTH
from vpfast.data.sets.moving_mnist import MovingMNIST
from vpfast.data.sets.source import Recording, Source

SOURCES: dict[str, type[Source]] = {
    "moving-mnist": MovingMNIST,
    "kth": KTH,
    "folder": Folder,
}

__all__ = ["KTH", "SOURCES", "Folder", "MovingMNIST", "Recording", "Source"]
