"""Low-rank updates beside frozen weights (LoRA: Hu et al. 2022), by peft; merged into the weights when training is over."""

from collections.abc import Collection

import torch
from torch import nn

from featcache.errors import SetupError, UsageError

_SCALE = 2  # of the update, times its rank: peft's and the paper's alpha over r


def add_lora(suffix: nn.Module, weights: Collection[int], rank: int, seed: int) -> list[tuple[int, list[nn.Parameter]]]:
    """Put an update beside each layer whose weight is among some; it changes nothing yet.

    Args:
        suffix: is changed in place.
        weights: identities of the weights' tensors.
        rank: of the updates.
        seed: of their random half.

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
    names = [name for name, module in suffix.named_modules() if id(getattr(module, "weight", None)) in weights]
    if not names:
        raise UsageError("--unfreeze lora: no layer of these stages can take a low-rank update.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=names), suffix)
    layers = [module for module in suffix.modules() if isinstance(module, LoraLayer)]
    return [
        (id(layer.get_base_layer().weight), [value for name, value in layer.named_parameters() if "lora_" in name])
        for layer in layers
    ]


def merge_lora(suffix: nn.Module) -> None:
    """Add the updates to the weights that they stand beside, and take them away."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(suffix.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(suffix.get_submodule(parent), own, module.get_base_layer())
