"""What is trained: the part of a backbone behind a cut, opened, with what is put into it, and a linear head; and their file.

Low-rank updates beside weights (LoRA: Hu et al. 2022) are peft's, and merged into them when training is over, so that a
checkpoint is always timm's. BatchNorm whose statistics rest is a part of the convolution before it: folded in anew at every
step, weights, gradients and results stay the same, and activations are read and written once less, forward and backward
(as in Jacob et al. 2018, section 3.2, with running statistics throughout).
"""

import copy
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save as save_safetensors
from torch import Tensor, fx, nn

from featcache.backbones.base import OWN_HEAD, Backbone, Stage
from featcache.display import logger
from featcache.errors import SetupError, UsageError
from featcache.evaluation.splits import Index
from featcache.finetuning import Unfreeze
from featcache.specs import INPUT
from featcache.store.disk import make_folder, replace_file

_SCALE = 2  # of the update, times its rank: peft's and the paper's alpha over r
_PAYS = 2  # positions a weight of one output channel, from which on a pass over activations costs more than over weights
_AFTER = ("drop", "act")  # what timm's BatchNormAct2d does after normalising
Take = Callable[[Index], NDArray[Any]]


@dataclass(frozen=True)
class Trainable:
    """The stages that train, in forward order, each with those of its parameters that do, and the cut before them.

    Where low-rank updates train, the parameters are the weights that they stand beside.
    """

    stages: tuple[Stage, ...]
    cut: str
    spec: Unfreeze


def select_trainable(stages: Sequence[Stage], spec: Unfreeze, module: nn.Module | None = None) -> Trainable:
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


def _first_trained(stages: Sequence[Stage], spec: Unfreeze) -> int:
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


@dataclass(frozen=True)
class LinearHead:
    """A linear map from embeddings to logits: weights (classes, d), bias (classes,)."""

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]


@dataclass(frozen=True)
class Network:
    """A backbone's weights and a head; no weights where they are those that the backbone has anyway."""

    weights: dict[str, Tensor]
    head: LinearHead


class SuffixAndHead(nn.Module):
    """What follows the cut: stored activations (b, ...) -> logits (b, classes)."""

    def __init__(self, suffix: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.suffix = suffix
        self.head = nn.Linear(head.weights.shape[1], head.weights.shape[0])
        self.set_head(head)

    def set_head(self, head: LinearHead) -> None:
        """Make the head compute what a linear head computes."""
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(head.weights))
            self.head.bias.copy_(torch.from_numpy(head.bias))

    def linear_head(self) -> LinearHead:
        """Return the head as it is now."""
        weights, bias = (value.detach().double().cpu().numpy().copy() for value in (self.head.weight, self.head.bias))
        return LinearHead(weights, bias)

    def embed(self, stored: Tensor) -> Tensor:
        """Return the embeddings (b, d)."""
        if stored.is_floating_point():  # pixels and token ids are taken as they are stored
            stored = stored.float()
            if stored.dim() == 4 and stored.shape[-1] != 3:  # pixels, even as floats, have their channels last
                # rows are stored channels first, convolutions are faster on channels last: copied once, here
                stored = stored.contiguous(memory_format=torch.channels_last)
        return self.suffix(stored).flatten(1)  # type: ignore[no-any-return]

    def forward(self, stored: Tensor) -> Tensor:
        """Return the logits (b, classes)."""
        return self.head(self.embed(stored))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class OpenNetwork:
    """A copy of a backbone that is open for training.

    Attributes:
        backbone: the copy, whose parameters the model shares.
        trainable: which of them train.
        model: what follows the cut, and the head.
        stages: the parameters that train, stage by stage, in forward order; of low-rank updates, theirs.
    """

    backbone: Backbone
    trainable: Trainable
    model: SuffixAndHead
    stages: tuple[tuple[nn.Parameter, ...], ...]


def open_up(
    backbone: Backbone, trainable: Trainable, cut: str, start: Network, *, drop_path: float = 0.0, seed: int = 0
) -> OpenNetwork:
    """Return a copy of a backbone, as a network at its start, in which the trainable parameters train and no others.

    Args:
        backbone: is left as it is.
        trainable: what trains.
        cut: what is before it is left out of the model.
        start: weights and head.
        drop_path: stochastic depth.
        seed: of the random half of low-rank updates.

    Raises:
        SetupError: low-rank updates need peft.
        UsageError: no layer can take one.
    """
    separate = _copied(backbone, drop_path)
    if start.weights:
        separate.module.load_state_dict(start.weights)
    model = SuffixAndHead(separate.suffix(cut), start.head).to(separate.device)
    named = dict(separate.module.named_parameters())
    for parameter in (*model.parameters(), *named.values()):
        parameter.requires_grad_(False)
    if trainable.spec.what == "lora":
        weights = {id(named[name]): stage.name for stage in trainable.stages for name in stage.parameters}
        blank = torch.from_numpy(separate.example_inputs(1)).to(separate.device)  # untraced, it takes prepared samples
        if separate.spec.samples == "text" and cut != INPUT:  # never traced, it takes what is stored
            (blank,) = separate.program((cut,))(blank)
        by_stage: dict[str, list[nn.Parameter]] = {stage.name: [] for stage in trainable.stages}
        for weight, parameters in add_lora(model.suffix, weights, trainable.spec.rank, seed, blank):
            by_stage[weights[weight]] += parameters
        stages = tuple(tuple(parameters) for parameters in by_stage.values())
    else:
        stages = tuple(tuple(named[name] for name in stage.parameters) for stage in trainable.stages)
        fold_norms(model.suffix)
    for parameter in (*model.head.parameters(), *(parameter for stage in stages for parameter in stage)):
        parameter.requires_grad_(True)
    return OpenNetwork(separate, trainable, model, stages)


def _copied(backbone: Backbone, drop_path: float) -> Backbone:
    if not drop_path:
        return backbone.separate()
    from featcache.backbones.timm_models import with_drop_path

    return with_drop_path(backbone, drop_path)


def moving_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers that train."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 - no public name
        and any(parameter.requires_grad for parameter in module.parameters())
    ]


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
            "Low-rank updates stand beside %d layers; %d that are no plain ones, or whose weights are handed to functions, "
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


def save_checkpoint(module: nn.Module, model: SuffixAndHead, path: Path, facts: dict[str, Any]) -> Path:
    """Write the whole tuned network as safetensors, under timm's own names where its classifier is one linear layer.

    Args:
        module: the backbone, whose parameters the model has trained.
        model: its head is written.
        path: of the file.
        facts: kept in its metadata.

    Raises:
        StorageError: the disk failed.
    """
    module = copy.deepcopy(module)
    classes = model.head.out_features
    head = {"weight": model.head.weight.detach(), "bias": model.head.bias.detach()}
    classifier = _timm_classifier(module, classes, model.head.in_features)
    if classifier is None:
        state = module.state_dict() | {f"{OWN_HEAD}{name}": value for name, value in head.items()}
    else:
        classifier.load_state_dict(head)
        state = module.state_dict()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    make_folder(path.parent)
    replace_file(path, save_safetensors(tensors, metadata={"featcache": json.dumps(facts)}))
    return path


def _timm_classifier(module: nn.Module, classes: int, width: int) -> nn.Linear | None:
    """Return a module's classifier, set to so many classes; ``None`` where it is no one linear layer of that width."""
    reset = getattr(module, "reset_classifier", None)
    if reset is None:
        return None
    trial = copy.deepcopy(module)  # some architectures' classifiers have layers before the last: those are left as they are
    trial.reset_classifier(classes)  # type: ignore[operator]
    classifier = trial.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear) or classifier.in_features != width:
        return None
    reset(classes)
    classifier = module.get_classifier()  # type: ignore[operator]
    return classifier if isinstance(classifier, nn.Linear) else None
