"""The one ``torch.library`` namespace that every operator of vpfast is registered in."""

import torch

LIBRARY = torch.library.Library("vpfast", "FRAGMENT")
