"""What of a network trains, and what is put into it before; the processes that train together.

Low-rank updates beside weights (LoRA: Hu et al. 2022) are peft's, and merged into them when training is over, so that a
checkpoint is always timm's. BatchNorm whose statistics rest is a part of the convolution before it: folded in anew at every
step, weights, gradients and results stay the same, and activations are read and written once less, forward and backward
(as in Jacob et al. 2018, section 3.2, with running statistics throughout).
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from featcache.display import logger
from featcache.errors import SetupError, UsageError
from featcache.evaluation.splits import Index
from featcache.finetuning import Unfreeze
from featcache.specs import INPUT

if TYPE_CHECKING:
    from featcache.backbones.base import Stage

_PATIENCE = timedelta(days=7)  # the first process may extract for long while the others wait; the default is 30 minutes


@dataclass(frozen=True)
class Trainable:
    """The stages that train, in forward order, each with those of its parameters that do, and the cut before them.

    Where low-rank updates train, the parameters are the weights that they stand beside.
    """

    stages: "tuple[Stage, ...]"
    cut: str
    spec: Unfreeze


def select_trainable(stages: "Sequence[Stage]", spec: Unfreeze, module: nn.Module | None = None) -> Trainable:
    """Return which stages and parameters train, and the cut before them.

    ``P%`` is the fewest last stages that hold at least P percent of the parameters. Norms and low-rank updates are told
    by the layers of ``module``.

    Raises:
        UsageError: the backbone has no such stage, or not that many, or nothing of that kind in them.
    """
    first = _first_trained(stages, spec)
    allowed = _allowed(module, spec) if module is not None and spec.what != "weights" else None
    picked = [
        replace(stage, parameters=tuple(name for name in stage.parameters if allowed is None or name in allowed))
        for stage in stages[first:]
    ]
    empty = next((number for number, stage in enumerate(picked) if stage.parameters), None)
    if empty is None:
        raise UsageError(
            f"`unfreeze` {spec.text}: there is nothing of that kind in {', '.join(stage.name for stage in picked)}."
        )
    first += empty  # stages with nothing of that kind before the first that has some stay frozen: the cut comes after them
    return Trainable(tuple(picked[empty:]), stages[first - 1].name if first else INPUT, spec)


def _allowed(module: nn.Module, spec: Unfreeze) -> set[str]:
    if spec.what == "bias":
        return {name for name, _ in module.named_parameters() if name.endswith("bias")}
    if spec.what == "norm":
        return {
            f"{path}.{name}"
            for path, layer in module.named_modules()
            if "norm" in type(layer).__name__.lower()  # timm's norms have no class in common
            for name, _ in layer.named_parameters(recurse=False)
        }
    # the paper updates linear layers; a convolutional network has none but its classifier, which is replaced
    return _weights(module, nn.Linear) or _weights(module, nn.Conv2d)


def _weights(module: nn.Module, kind: type[nn.Module]) -> set[str]:
    """Return the names of the weights of ungrouped layers of a kind."""
    return {
        f"{path}.weight"
        for path, layer in module.named_modules()
        if isinstance(layer, kind) and getattr(layer, "groups", 1) == 1
    }


def _first_trained(stages: "Sequence[Stage]", spec: Unfreeze) -> int:
    names = [stage.name for stage in stages]
    if spec.kind == "all":
        return 0
    if spec.kind == "last":
        if spec.amount > len(stages):
            raise UsageError(f"`unfreeze` {spec.text}: the backbone has {len(stages)} stages ({', '.join(names)}).")
        return len(stages) - int(spec.amount)
    if spec.kind == "stage":
        if spec.stage not in names:
            raise UsageError(f"`unfreeze` {spec.text}: the backbone's stages are {', '.join(names)}.")
        return names.index(spec.stage)
    least = math.ceil(spec.amount * sum(stage.size for stage in stages))
    first, parameters = len(stages), 0
    while parameters < least:
        first -= 1
        parameters += stages[first].size
    return first


_SCALE = 2  # of the update, times its rank: peft's and the paper's alpha over r


def add_lora(
    suffix: nn.Module, weights: Collection[int], rank: int, seed: int, example: Tensor | None = None
) -> list[tuple[int, list[nn.Parameter]]]:
    """Put an update beside each layer whose weight is listed; it changes nothing yet.

    A weight that is read as a tensor, such as Swin V2's of queries, keys and values, or that belongs to a layer of another
    type than PyTorch's own, gets none: what is left out is said.

    Args:
        suffix: is changed in place.
        weights: ``id`` of each weight's tensor.
        rank: of the updates.
        seed: of their random half.
        example: what the suffix takes, (1, ...), where it is no traced graph.

    Returns:
        The identity of each weight, with the parameters of its update.

    Raises:
        SetupError: peft is not installed.
        UsageError: no layer can be updated so.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise SetupError("`unfreeze` lora:R needs peft: `pip install 'featcache[peft]'`.") from None
    names = _layers_to_update(suffix, weights, example)
    with torch.random.fork_rng(devices=[]):  # the updates' random half comes from the seed, not from what was drawn before
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=names), suffix)
    layers = [module for module in suffix.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        _dilate(layer)
    return [
        (id(layer.get_base_layer().weight), [value for name, value in layer.named_parameters() if "lora_" in name])
        for layer in layers
    ]


def _layers_to_update(suffix: nn.Module, weights: Collection[int], example: Tensor | None) -> list[str]:
    """Return the names of the layers of some weights that can take an update; say which cannot."""
    called = _called(suffix, example)
    of_weights = {name: module for name, module in suffix.named_modules() if id(getattr(module, "weight", None)) in weights}
    names = [name for name, module in of_weights.items() if name in called and _takes_update(module)]
    if not names:
        raise UsageError(
            "`unfreeze` lora: no layer of these stages can take a low-rank update: their weights are handed to functions, "
            "or their layers are not plain ones. Unfreeze more stages, or train norms, biases or weights themselves."
        )
    covered = {id(of_weights[name].weight) for name in names}
    if without := sorted(name for name, module in of_weights.items() if id(module.weight) not in covered):
        logger.warning(
            "low-rank updates stand beside %d layers; %d that are no plain ones, or whose weights are handed to functions, "
            "get none (%s, ...)",
            len(names),
            len(without),
            without[0],
        )
    return names


def _dilate(layer: Any) -> None:
    """Let the update of a convolution see the positions that it sees itself: peft leaves its dilation at 1."""
    if isinstance(convolution := layer.get_base_layer(), nn.Conv2d):
        for update in layer.lora_A.values():
            update.dilation = convolution.dilation


def _takes_update(layer: nn.Module) -> bool:
    """Tell whether an update beside a layer is the same as one merged into its weight."""
    if type(layer) is nn.Conv2d:  # peft cannot merge grouped ones, and pads those beside circular ones with zeros
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear


def _called(suffix: nn.Module, example: Tensor | None) -> set[str]:
    """Return the names of the modules that are called as such when a suffix computes."""
    graphs = {name: part for name, part in suffix.named_modules() if isinstance(part, fx.GraphModule)}
    if graphs or example is None:
        return {
            f"{name}.{node.target}".removeprefix(".")
            for name, part in graphs.items()
            for node in part.graph.nodes
            if node.op == "call_module"
        }
    called: set[str] = set()
    hooks = [module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in suffix.named_modules()]
    try:
        with torch.no_grad():  # what attention keeps of an inference could not be trained
            suffix(example)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def merge_lora(suffix: nn.Module) -> None:
    """Add the updates to the weights that they stand beside, and take them away."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(suffix.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(suffix.get_submodule(parent), child, module.get_base_layer())


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
        # differentiable: the gradients of weight, norm.weight and norm.bias are those of the two layers apart
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


_AFTER = ("drop", "act")  # what timm's BatchNormAct2d does after normalising


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
            continue  # another reader of the convolution's output needs it as it is
        convolution, norm = (part.get_submodule(str(call.target)) for call in (before, node))
        if type(convolution) is nn.Conv2d and convolution.padding_mode == "zeros" and _is_plain_norm(norm):
            name = f"{node.target}_folded".replace(".", "_")
            part.add_submodule(name, ConvolutionAndNorm(convolution, norm))
            with graph.inserting_before(node):
                joined = graph.call_module(name, before.args)
            node.replace_all_uses_with(joined)
            graph.erase_node(node)
            graph.erase_node(before)
    # the convolution and the norm are submodules of the joined module now; their parameters are the same objects
    part.delete_all_unused_submodules()
    part.recompile()


def _is_plain_norm(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Tell whether a module is BatchNorm with weights and running statistics, with what it does besides known."""
    if not isinstance(norm, nn.BatchNorm2d) or not norm.affine or norm.running_var is None:
        return False
    return type(norm) is nn.BatchNorm2d or all(hasattr(norm, step) for step in _AFTER)


class ProcessGroup:
    """The processes of this run; alone, it does nothing."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1 and not dist.is_initialized():
            on_gpu = torch.cuda.is_available()
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # both: gradients are summed on the GPU, barriers and votes are tensors on the CPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)

    def share(self, index: Index) -> Index:
        """Return this process's positions among those of a batch."""
        # every size-th: shares differ by one image at most, whatever the batch's length
        return index[self.rank :: self.size]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes: each loss counts by its rows in the whole step."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # this process's share of a last batch may be empty; the sum needs all of them
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def total(self, numbers: NDArray[np.float64], device: torch.device) -> NDArray[Any]:
        """Return the sums of all processes' numbers."""
        if self.size == 1:
            return numbers
        tensor = torch.from_numpy(numbers.copy()).to(device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def agrees(self, each: bool) -> bool:  # noqa: FBT001 - what is voted on
        """Tell whether all processes say yes."""
        return bool(self.total(np.array([float(each)]), torch.device("cpu"))[0] == self.size)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Let the first process go through the block before the others: they find what it has put into the cache."""
        if self.rank:
            self._wait()
        try:
            yield
        finally:
            if not self.rank:
                self._wait()

    def _wait(self) -> None:
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))
