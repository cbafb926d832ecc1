"""Models built from the operators of hierkernels, with data, training and sampling."""

from python_models.megabyte import MEGABYTE

__all__ = ["MEGABYTE"]
