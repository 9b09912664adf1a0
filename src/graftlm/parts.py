"""What goes with a component: the rows and columns of weights, biases and norms that belong to it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from graftlm.anatomy import Block, Matrix, decoder_layers


@dataclass(frozen=True)
class Part:
    """The part of one parameter that belongs to a block's components."""

    path: str
    """Of the parameter, such as model.layers.0.mlp.up_proj.weight."""
    parameter: nn.Parameter
    matrix: Matrix
    """Where the components lie along `matrix.dim` of the parameter."""

    @property
    def cost(self) -> int:
        """Numbers of the parameter that one component holds."""
        return self.matrix.slots * self.matrix.width * self.parameter.numel() // self.parameter.shape[self.matrix.dim]


def parts(model: nn.Module, block: Block) -> Iterator[Part]:
    """Every part of the parameters that goes when components of `block` go.

    Weights of its projections, biases of those whose rows go (an output projection's bias is nobody's own), and norms
    over the queries or keys of all heads.
    """
    for matrix in (*block.mixed, *block.followers, *block.norms):
        yield from parts_in(model, matrix)


def parts_in(model: nn.Module, matrix: Matrix) -> Iterator[Part]:
    """Of `matrix`, or norm, alone: its weight, and its bias where components are rows and there is one."""
    module = model.get_submodule(matrix.module)
    for name in ("weight", "bias") if matrix.dim == 0 else ("weight",):
        parameter = getattr(module, name, None)
        if parameter is not None:
            yield Part(f"{matrix.module}.{name}", parameter, matrix)


def count_parameters(model: nn.Module) -> int:
    """Of the whole model, embeddings included; what is tied counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_parameters(model: nn.Module) -> list[int]:
    """Parameters of every decoder layer, from outside in."""
    return [count_parameters(layer) for layer in decoder_layers(model)[1]]


def component_cost(model: nn.Module, block: Block) -> int:
    """Parameters of the model that go with one component of `block`."""
    return sum(part.cost for part in parts(model, block))
