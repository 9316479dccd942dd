"""Quantization of weights: schemes, packing, and the module that holds a quantized matrix."""

from torchinfer.quantization.matrix import QuantizedMatrix
from torchinfer.quantization.scheme import SCHEMES, Scheme, TensorSpec
from torchinfer.quantization.source import Source

__all__ = ["SCHEMES", "QuantizedMatrix", "Scheme", "Source", "TensorSpec"]
