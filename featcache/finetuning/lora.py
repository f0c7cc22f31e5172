"""Low-rank updates beside frozen weights (LoRA: Hu et al. 2022), by peft; merged into the weights when training is over."""

from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from featcache.errors import SetupError, UsageError
from featcache.progress import logger

_SCALE = 2  # of the update, times its rank: peft's and the paper's alpha over r


def add_lora(
    suffix: nn.Module, weights: Collection[int], rank: int, seed: int, example: Tensor | None = None
) -> list[tuple[int, list[nn.Parameter]]]:
    """Put an update beside each layer whose weight is among some; it changes nothing yet.

    A weight that is read as a tensor, such as Swin V2's of queries, keys and values, or that belongs to a layer of another
    type than PyTorch's own, gets none: what is left out is said.

    Args:
        suffix: is changed in place.
        weights: identities of the weights' tensors.
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
        raise SetupError("--unfreeze lora:R needs peft: `pip install 'featcache[peft]'`.") from None
    called = _called(suffix, example)
    of_weights = {name: module for name, module in suffix.named_modules() if id(getattr(module, "weight", None)) in weights}
    names = [name for name, module in of_weights.items() if name in called and type(module) in {nn.Linear, nn.Conv2d}]
    if not names:
        raise UsageError(
            "--unfreeze lora: no layer of these stages can take a low-rank update: their weights are handed to functions, "
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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=names), suffix)
    layers = [module for module in suffix.modules() if isinstance(module, LoraLayer)]
    return [
        (id(layer.get_base_layer().weight), [value for name, value in layer.named_parameters() if "lora_" in name])
        for layer in layers
    ]


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
            parent, _, own = name.rpartition(".")
            setattr(suffix.get_submodule(parent), own, module.get_base_layer())
