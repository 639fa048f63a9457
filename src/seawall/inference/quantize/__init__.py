"""Arrays in fewer bits: integers and 8-bit floats, their packing, and what was lost. Numpy only, no torch.

Nothing here knows a model: recipes for whole models build on these functions. `docs/quantization.md` says what each
scheme costs and loses.
"""

from seawall.inference.errors import MissingExtraError

try:
    import numpy as np  # noqa: F401 - every module below needs it; here it is missed with advice
except ImportError as error:
    raise MissingExtraError("numpy") from error

from .arrays import Quantized, dequantize, quantize
from .bits import pack_bits, unpack_bits
from .float8 import decode_e4m3, decode_e5m2, encode_e4m3, encode_e5m2
from .measures import Errors, errors, kl_divergence, top1_agreement
from .refine import refine
from .scheme import Scheme

__all__ = [
    "Errors",
    "Quantized",
    "Scheme",
    "decode_e4m3",
    "decode_e5m2",
    "dequantize",
    "encode_e4m3",
    "encode_e5m2",
    "errors",
    "kl_divergence",
    "pack_bits",
    "quantize",
    "refine",
    "top1_agreement",
    "unpack_bits",
]
