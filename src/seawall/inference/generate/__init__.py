"""Generation: sampling, the decoder, and sequences that advance one bounded step at a time."""

from seawall.inference.errors import MissingExtraError

try:
    import numpy as np  # noqa: F401 - every module below needs it; here it is missed with advice
except ImportError as error:
    raise MissingExtraError("numpy") from error
