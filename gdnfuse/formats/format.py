"""What a format of quantised weights is, and the table of all formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gdnfuse.errors import Refused


@dataclass(frozen=True)
class Format:
    """How weights of one kind are stored.

    Attributes:
        name: its name in the dialect's dequantize.
        about: a description for reports.
        supported: what `check` accepts, in words.
        dequantize: computes the weight from data, scale, the dtype to compute in (float32 or float64), and what else is stored.
            The result has that dtype and is what the format's own library has before it rounds.
        check: raises Refused unless data, scale and what else is stored fit the format. Sizes may be those of fake tensors.
        quantize: computes data, scale and what else is stored from a floating weight. None if only the format's own library can.
        rows: weights that consist of whole blocks of so many rows may be placed in one buffer one after the other, and so may
            their scales and what else is stored. None if rows share some of that.
        columns: the number of columns of a weight must be a multiple of this.
        more: what is stored besides data and scale, in words.
        bits: bits of one element of a weight. If an element of data has more bits, it holds several.
    """

    name: str
    about: str
    supported: str
    dequantize: Callable[..., torch.Tensor]
    check: Callable[..., None]
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None
    rows: int | None
    bits: int
    columns: int = 1
    more: tuple[str, ...] = ()

    def shape(self, data: torch.Tensor) -> tuple[int, ...]:
        """The shape of the weight that data represent."""
        return (*data.shape[:-1], data.shape[-1] * (8 * data.element_size() // self.bits))


FORMATS: dict[str, Format] = {}


def register(**attributes: object) -> Format:
    """Add a format to the table."""
    made = Format(**attributes)
    FORMATS[made.name] = made
    return made


def named(name: str) -> Format:
    """The format with a name.

    Raises:
        Refused: there is none.
    """
    if name not in FORMATS:
        raise Refused(f"The format of a quantised weight must be one of {', '.join(FORMATS)}, found {name!r}.")
    return FORMATS[name]


def acc_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to dequantise in: float64 if any of these is float64, which reference computations need, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def require_dtypes(
    fmt: str, data: torch.Tensor, scale: torch.Tensor, of_data: torch.dtype, of_scale: tuple[torch.dtype, ...]
) -> None:
    """Raise Refused unless data and scale have these dtypes."""
    if data.dtype != of_data:
        raise Refused(f"Data of {fmt} must be {_short(of_data)}, found {_short(data.dtype)}.")
    if scale.dtype not in of_scale:
        raise Refused(f"The scale of {fmt} must be {' or '.join(map(_short, of_scale))}, found {_short(scale.dtype)}.")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
