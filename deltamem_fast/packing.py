"""Parameters of several modules, one behind another in one storage, so that one matmul takes them all."""

from __future__ import annotations

import torch
from torch import nn


class PackedRows:
    """Rows of several parameters in one tensor. Each parameter stays what it was, but is a view of its rows.

    ``state_dict``, in-place updates (``load_state_dict``, optimizers) and saving go on working on the views. What
    gives a parameter other storage (``.to()``, ``copy.deepcopy``, ``param.data = …``) is seen by its address, and
    the rows are packed again.

    Args:
        members: (module, parameter's name), or (None, n) for n rows of zeros; all on one device, of one dtype.
    """

    def __init__(self, members: list[tuple[nn.Module | None, str | int]]):
        self.members = members
        self.tensor: torch.Tensor | None = None
        self._places: list[tuple[dict, str]] = []
        self._addresses: list[int] = []

    def parameters(self) -> list[nn.Parameter]:
        """The packed parameters, in order."""
        return [owner._parameters[name] for owner, name in self.members if owner is not None]

    def is_whole(self) -> bool:
        """Whether every parameter still is its rows."""
        if self.tensor is None:
            return False
        return [parameters[name].data_ptr() for parameters, name in self._places] == self._addresses

    def get(self) -> torch.Tensor:
        """The packed rows, off the autograd graph; packed again where a parameter has moved."""
        # A compiled region cannot ask for addresses: what moves weights outside of it packs them again there.
        if not torch.compiler.is_compiling() and not self.is_whole():
            self.pack()
        return self.tensor

    @torch.no_grad()
    def pack(self) -> None:
        """Give the parameters one storage. Takes the memory of these rows once more until it is done."""
        with torch.inference_mode(False):  # an inference tensor could not take a parameter's place
            parameters = self.parameters()
            if len(self.members) == 1:
                self.tensor = parameters[0].data
            else:
                first = parameters[0]
                blocks = [
                    first.new_zeros(name, *first.shape[1:]) if owner is None else owner._parameters[name].data
                    for owner, name in self.members
                ]
                self.tensor = torch.cat(blocks)
                start = 0
                for (owner, name), block in zip(self.members, blocks):
                    if owner is not None:
                        owner._parameters[name].data = self.tensor[start : start + block.shape[0]]
                    start += block.shape[0]
            if self.tensor.is_cuda:
                # CUDA graphs copy their inputs but for those that stay where they are, as parameters do.
                torch._dynamo.mark_static_address(self.tensor)
        self._places = [(owner._parameters, name) for owner, name in self.members if owner is not None]
        self._addresses = [places[name].data_ptr() for places, name in self._places]

    @torch.no_grad()
    def unpack(self) -> None:
        """Give every parameter that still is its rows a storage of its own again."""
        if len(self.members) > 1:
            with torch.inference_mode(False):
                for (parameters, name), address in zip(self._places, self._addresses):
                    if parameters[name].data_ptr() == address:
                        parameters[name].data = parameters[name].data.clone()
        self.tensor, self._places, self._addresses = None, [], []


def has_own_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor fills its storage, so that no other tensor can be a view of the rest of it."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
