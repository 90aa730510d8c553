"""Formats of quantised weights, one per file: what is stored, what it means, and how it is checked."""

from gdnfuse.formats import channel, four_bit, fp8_block128, fp8_tensor, int4_group
from gdnfuse.formats.format import FORMATS, Format, acc_dtype, named

__all__ = ["FORMATS", "Format", "acc_dtype", "channel", "four_bit", "fp8_block128", "fp8_tensor", "int4_group", "named"]
