"""Masks of padded batches: which elements count. ``True`` keeps, as in Keras and Flax."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.layout import roles


def blanked(
    what: str,
    over: str | None,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    *,
    trailing: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Input and residual of one call with 0 where nothing counts, and the mask, with as many axes as they have.

    Whatever was there, NaN included, reaches neither an output nor a gradient.

    Args:
        what: the norm, for messages.
        over: its pattern, which says along which axes a sample may be padded.
        x: the input.
        residual: of the same shape; another one is left for the norm to refuse.
        mask: see :func:`as_mask`.
        lengths: see :func:`as_mask`.
        trailing: as in :func:`normkit.layout.solve`.

    Raises:
        ValueError, TypeError: as :func:`as_mask`.
    """
    assert over is not None
    keep = as_mask(x, mask, lengths, axes=roles(over, x.dim(), trailing)[2], what=what)
    assert keep is not None
    if residual is not None and residual.shape == x.shape:
        residual = torch.where(keep, residual, 0)
    return torch.where(keep, x, 0), residual, keep


def as_mask(
    x: Tensor, mask: Tensor | None, lengths: Tensor | None, *, axes: tuple[int, ...], what: str
) -> Tensor | None:
    """The mask of one call, with as many axes as ``x``; ``None`` where nothing is masked.

    Args:
        x: the input.
        mask: of bool, ``True`` where an element counts; broadcasts against ``x`` once it has as many axes. With fewer
            axes it has the samples' and those of ``axes``: everything but the channels.
        lengths: (n,) valid positions along the one axis of ``axes``, or (n, len(axes)) along each of them.
        axes: the axes of ``x`` along which samples may be padded.
        what: the layer, for messages.

    Raises:
        ValueError: a shape that does not fit, a length beyond the width, both arguments at once, a mask elsewhere.
        TypeError: a mask that is not of bool, lengths that are no integers.
    """
    if mask is None and lengths is None:
        return None
    if mask is not None and lengths is not None:
        raise ValueError(f"{what}: mask= and lengths= say the same thing; give one of them")
    if lengths is not None:
        return _from_lengths(x, lengths, axes, what)
    assert mask is not None
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{what}: the mask is of {mask.dtype}; it must be of torch.bool, True where an element counts.\n"
            "  mask.bool() makes it one; where 1 means padding, (mask == 0)"
        )
    if mask.device != x.device:
        raise ValueError(
            f"{what}: the mask is on {mask.device}, the input on {x.device}.\n"
            "  move it there once, where the batch is made: mask.to(input.device)"
        )
    if mask.dim() < x.dim() and mask.shape == _without(x.shape, axes):
        mask = mask.reshape([size if axis == 0 or axis in axes else 1 for axis, size in enumerate(x.shape)])
    if mask.dim() != x.dim() or any(m not in (1, size) for m, size in zip(mask.shape, x.shape, strict=True)):
        raise ValueError(
            f"{what}: the mask has the shape {tuple(mask.shape)}, the input {tuple(x.shape)}.\n"
            f"  give it {tuple(_without(x.shape, axes))} (one value per position), or a shape that broadcasts to the "
            "input's with as many axes"
        )
    return mask


def _without(shape: torch.Size, axes: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *(shape[axis] for axis in axes))


def _from_lengths(x: Tensor, lengths: Tensor, axes: tuple[int, ...], what: str) -> Tensor:
    lengths = torch.as_tensor(lengths)
    if lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise TypeError(f"{what}: lengths are numbers of positions; {lengths.dtype} is no integer type")
    if not axes:
        raise ValueError(
            f"{what}: lengths say where samples end, and an input of the shape {tuple(x.shape)} has only samples and "
            "channels.\n  give a mask=, of a shape that broadcasts to the input's with as many axes"
        )
    expected = (x.shape[0], len(axes))
    table = lengths.unsqueeze(1) if lengths.dim() == 1 and len(axes) == 1 else lengths
    if tuple(table.shape) != expected:
        wanted = expected[:1] if len(axes) == 1 else expected
        raise ValueError(
            f"{what}: lengths have the shape {tuple(lengths.shape)}; an input of {tuple(x.shape)} needs {wanted}: "
            "one length per sample" + (" and padded axis" if len(axes) > 1 else "")
        )
    keep = torch.ones((), dtype=torch.bool, device=x.device)
    for column, axis in enumerate(axes):
        width = x.shape[axis]
        along = [1] * x.dim()
        along[axis] = width
        _check_width(table[:, column], width, axis, what)  # before they go to a device, where nobody waits for them
        each = table[:, column].to(x.device).reshape(-1, *[1] * (x.dim() - 1))
        keep = keep & (torch.arange(width, device=x.device).reshape(along) < each)
    return keep


def _check_width(lengths: Tensor, width: int, axis: int, what: str) -> None:
    if torch.compiler.is_compiling() or not lengths.numel() or lengths.device.type != "cpu":
        return  # nothing waits for a device; there a longer length counts as the whole width
    if torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        return  # under vmap nobody knows them either
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > width:
        raise ValueError(
            f"{what}: a length is {high if high > width else low}, and axis {axis} of the input has {width} places.\n"
            f"  lengths lie between 0 and {width}: cut the input later, or the lengths with .clamp(0, {width})"
        )
