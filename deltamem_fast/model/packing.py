"""Parameters of several modules, one behind another in one storage, so that one matmul takes them all."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from ..errors import ArgumentError

# Address of a packed parameter → what packed it, while that lives. Its storage no longer tells that it is a part.
_packed_at: weakref.WeakValueDictionary[int, PackedRows] = weakref.WeakValueDictionary()


class PackedRows:
    """Rows of several parameters in one tensor. Each parameter stays what it was, but lies on its rows of the tensor.

    ``state_dict``, in-place updates (``load_state_dict``, optimizers) and saving go on working on the parameters: each
    has a storage object that is its rows and nothing more (``rows_with_own_storage``). What gives a parameter other
    memory (``.to()``, ``param.data = …``) shows in its address: ``is_whole``.

    On CUDA such a parameter cannot be sent to another process by handle (CUDA IPC), which takes the start of an
    allocation alone: send a clone.

    Args:
        parts: parameters, or n for n rows of zeros; at least one parameter, all on one device, of one dtype, no
            parameter twice, each filling its storage (``fills_its_storage``), on a device where rows can have a
            storage of their own (``can_pack``). Putting them in one tensor takes the memory of these rows once more
            until it is done.

    Raises:
        ValueError: parts that one tensor cannot hold; nothing is changed.
    """

    def __init__(self, parts: Sequence[nn.Parameter | int]):
        self.parameters = [part for part in parts if not isinstance(part, int)]
        self._alone = len(parts) == 1
        first = self.parameters[0]
        alike = {(p.dtype, p.device, p.shape[1:]) for p in self.parameters}
        if len(alike) > 1 or len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ArgumentError(f"parts: got {alike}, allowed different parameters of one dtype, device and row length")
        with torch.no_grad(), torch.inference_mode(False):  # an inference tensor could not be a parameter's storage
            if self._alone:
                self.tensor = first.data
            else:
                row = first.shape[1:]
                self.tensor = torch.cat([first.new_zeros(p, *row) if isinstance(p, int) else p.data for p in parts])
            self.addresses = []
            start = 0
            for part in parts:
                rows = part if isinstance(part, int) else part.shape[0]
                if not isinstance(part, int):
                    if not self._alone:
                        part.data = rows_with_own_storage(self.tensor, start, rows)
                    # From the tensor, not from the parameter: what else may happen to that must not look right.
                    offset = start * self.tensor.stride(0) * self.tensor.element_size()
                    self.addresses.append(self.tensor.data_ptr() + offset)
                start += rows
        if not self._alone:
            _packed_at.update(dict.fromkeys(self.addresses, self))
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
        if not self._alone:
            with torch.inference_mode(False):
                for parameter in self.in_place():
                    parameter.data = parameter.data.clone()


def rows_with_own_storage(tensor: torch.Tensor, start: int, rows: int) -> torch.Tensor:
    """``tensor[start : start + rows]`` on the same memory, as a tensor whose storage begins and ends with it.

    What saves models (safetensors, accelerate, transformers) takes two views of one storage for one tied weight, and
    leaves one of them out. These have one storage each, and keep the memory alive together with ``tensor``.
    """
    # The protocol's plain functions: Tensor.__dlpack__ refuses a tensor that is not on the current CUDA device.
    return from_dlpack(to_dlpack(tensor.narrow(0, start, rows)))


@lru_cache
def can_pack(device: torch.device) -> bool:
    """Whether ``rows_with_own_storage`` does on a device what it says; tried once on each."""
    with torch.inference_mode(False):
        try:
            tensor = torch.zeros(2, 16, device=device)
            row = rows_with_own_storage(tensor, 1, 1)
        except (RuntimeError, BufferError, TypeError):  # a kind of device that DLPack does not know
            return False
    own = type(row) is torch.Tensor and row.device == tensor.device and row.untyped_storage().nbytes() == row.nbytes
    return own and row.data_ptr() == row.untyped_storage().data_ptr() == tensor[1].data_ptr()


def fills_its_storage(tensor: torch.Tensor) -> bool:
    """Whether no other tensor, or process, can have a part of this one's storage, packed ones included."""
    if tensor.data_ptr() in _packed_at:
        return False
    if tensor.device.type == "cpu" and tensor.is_shared():
        return False
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
