"""BatchNorm whose statistics rest is a part of the convolution before it.

Folded in anew at every step, weights, gradients and what comes out stay the same, and activations are read and written
once less, forward and backward. (Folding as in Jacob et al. 2018, section 3.2, with running statistics throughout.)
"""

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, fx, nn

_PAYS = 2  # positions a weight of one output channel, from which on a pass over activations costs more than over weights


class ConvolutionAndNorm(nn.Module):
    """A convolution and the BatchNorm behind it, done as one where that is the same and costs less."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = norm

    def forward(self, activations: Tensor) -> Tensor:
        """Return what both give, one after the other."""
        convolution, norm = self.convolution, self.norm
        mean, variance = norm.running_mean, norm.running_var
        size, stride = activations.shape, convolution.stride
        positions = size[0] * (size[2] // stride[0]) * (size[3] // stride[1])
        if norm.training or mean is None or variance is None or positions < _PAYS * convolution.weight[0].numel():
            return norm(convolution(activations))  # type: ignore[no-any-return]
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        if convolution.bias is not None:
            shift = shift + convolution.bias * scale
        out = F.conv2d(
            activations,
            convolution.weight * scale[:, None, None, None],
            shift,
            stride,
            convolution.padding,
            convolution.dilation,
            convolution.groups,
        )
        for step in _AFTER:
            out = getattr(norm, step, nn.Identity())(out)
        return out


_AFTER = ("drop", "act")  # what timm's BatchNormAct2d does besides


def fold_norms(model: nn.Module) -> None:
    """Join every BatchNorm in a model's traced parts with the convolution before it, if nothing else uses that one."""
    for part in list(model.modules()):
        if isinstance(part, fx.GraphModule):
            _fold(part)


def _fold(part: fx.GraphModule) -> None:
    graph = part.graph
    for node in list(graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution, norm = (part.get_submodule(str(one.target)) for one in (before, node))
        if type(convolution) is nn.Conv2d and convolution.padding_mode == "zeros" and _is_plain_norm(norm):
            name = f"{node.target}_folded".replace(".", "_")
            part.add_submodule(name, ConvolutionAndNorm(convolution, norm))
            with graph.inserting_before(node):
                joined = graph.call_module(name, before.args)
            node.replace_all_uses_with(joined)
            graph.erase_node(node)
            graph.erase_node(before)
    part.delete_all_unused_submodules()
    part.recompile()


def _is_plain_norm(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Tell whether a module is BatchNorm with weights and running statistics, with what it does besides known."""
    if not isinstance(norm, nn.BatchNorm2d) or not norm.affine or norm.running_var is None:
        return False
    return type(norm) is nn.BatchNorm2d or all(hasattr(norm, step) for step in _AFTER)
