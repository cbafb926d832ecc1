"""The torch.library namespace that all operators register in."""

import torch

LIBRARY = torch.library.Library("hierkernels", "FRAGMENT")
