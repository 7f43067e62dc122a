"""Parameters of several modules, one behind another in one storage, so that one matmul takes them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .errors import ArgumentError


class PackedRows:
    """Rows of several parameters in one tensor. Each parameter stays what it was, but is a view of its rows.

    ``state_dict``, in-place updates (``load_state_dict``, optimizers) and saving go on working on the views. What
    gives a parameter other storage (``.to()``, ``param.data = …``) shows in its address: ``is_whole``.

    Args:
        parts: parameters, or n for n rows of zeros; at least one parameter, all on one device, of one dtype, no
            parameter twice, each filling its storage (``fills_its_storage``). Giving them one storage takes the
            memory of these rows once more until it is done.

    Raises:
        ValueError: parts that one tensor cannot hold; nothing is changed.
    """

    def __init__(self, parts: Sequence[nn.Parameter | int]):
        self.parameters = [part for part in parts if not isinstance(part, int)]
        first = self.parameters[0]
        alike = {(p.dtype, p.device, p.shape[1:]) for p in self.parameters}
        if len(alike) > 1 or len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ArgumentError(f"parts: got {alike}, allowed different parameters of one dtype, device and row length")
        with torch.no_grad(), torch.inference_mode(False):  # an inference tensor could not be a parameter's storage
            if len(parts) == 1:
                self.tensor = first.data
            else:
                row = first.shape[1:]
                self.tensor = torch.cat([first.new_zeros(p, *row) if isinstance(p, int) else p.data for p in parts])
            self.addresses = []
            start = 0
            for part in parts:
                rows = part if isinstance(part, int) else part.shape[0]
                if not isinstance(part, int):
                    part.data = self.tensor[start : start + rows]
                    # From the tensor, not from the parameter: what else may happen to that must not look right.
                    offset = start * self.tensor.stride(0) * self.tensor.element_size()
                    self.addresses.append(self.tensor.data_ptr() + offset)
                start += rows
        if self.tensor.is_cuda:
            # CUDA graphs copy their inputs but for those that stay where they are, as parameters do.
            torch._dynamo.mark_static_address(self.tensor)

    def is_whole(self) -> bool:
        """Whether every parameter still is its rows."""
        return [parameter.data_ptr() for parameter in self.parameters] == self.addresses

    def in_place(self) -> list[nn.Parameter]:
        """The parameters that still are their rows."""
        return [p for p, address in zip(self.parameters, self.addresses) if p.data_ptr() == address]

    @torch.no_grad()
    def release(self) -> None:
        """Give every parameter that still is its rows a storage of its own again."""
        with torch.inference_mode(False):
            for parameter in self.in_place():
                if not fills_its_storage(parameter.data):
                    parameter.data = parameter.data.clone()


def fills_its_storage(tensor: torch.Tensor) -> bool:
    """Whether no other tensor, or process, can have a part of this one's storage."""
    if tensor.device.type == "cpu" and tensor.is_shared():
        return False
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
