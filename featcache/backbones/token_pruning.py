"""Tokens that nobody looks at are not computed.

A transformer that answers with its class token throws the others away after its last block. There only keys and values are
needed of them: query, projection and MLP of the class token alone give the same embeddings, and the same gradients.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Sizes = Callable[[fx.Node], tuple[int, ...] | None]

_ALL, _ONE = slice(None, None, None), slice(0, 1, None)
_MODULES: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm, nn.Identity, nn.Dropout, nn.GELU, nn.SiLU, nn.ReLU)
_FUNCTIONS: tuple[Any, ...] = (F.gelu, F.silu, F.relu, F.layer_norm)
_OF_TWO: tuple[Any, ...] = (operator.add, operator.mul, torch.add, torch.mul)


def narrow(traced: fx.GraphModule, sizes: Sizes, also: tuple[type[nn.Module], ...] = ()) -> bool:
    """Let a traced backbone compute the first of tokens (b, n, c) alone where no other is used; tell if it is so anywhere.

    Args:
        traced: is changed in place.
        sizes: the shape of what a node gives, without the batch; ``None`` where it is no tensor with one row an image.
        also: modules that treat every token alike, beside PyTorch's own.
    """
    found = _needed_first_only(traced, sizes, (*_MODULES, *also))
    graph = traced.graph
    slices: dict[fx.Node, fx.Node] = {}
    for node in [node for node in graph.nodes if node in found]:
        attention = _attention_behind(node)
        if attention is not None:
            query: Any = attention.args[0]
            with graph.inserting_before(attention):
                first = graph.call_function(operator.getitem, (query, (_ALL, _ALL, _ONE)))
            attention.update_arg(0, first)
            node.update_arg(2, 1)
            continue
        for given in node.all_input_nodes:
            if given in found or not _are_tokens(sizes(given)):
                continue
            if given not in slices:
                with graph.inserting_after(given):
                    slices[given] = graph.call_function(operator.getitem, (given, (_ALL, _ONE)))
            node.replace_input_with(given, slices[given])
    traced.recompile()
    return bool(found)


def _needed_first_only(traced: fx.GraphModule, sizes: Sizes, modules: tuple[type[nn.Module], ...]) -> set[fx.Node]:
    """Return the nodes that work token by token, and of whose tokens only the first is used."""
    found: set[fx.Node] = set()
    waiting = [node.args[0] for node in traced.graph.nodes if _takes_first(node)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in found or not _are_tokens(sizes(node)):
            continue
        unused = all(_takes_first(user) or user in found for user in node.users)
        if unused and (_is_tokenwise(traced, node, sizes, modules) or _attention_behind(node) is not None):
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _are_tokens(sizes: tuple[int, ...] | None) -> bool:
    return sizes is not None and len(sizes) == 2


def _takes_first(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and node.args[1] == (_ALL, 0)


def _is_tokenwise(traced: fx.GraphModule, node: fx.Node, sizes: Sizes, modules: tuple[type[nn.Module], ...]) -> bool:
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return False
        draws = isinstance(module, nn.Dropout) and module.p > 0  # another shape would draw other numbers
        return type(module) in modules and not draws and not getattr(module, "inplace", False)
    if node.op != "call_function" or node.kwargs.get("inplace"):
        return False
    if node.target is F.layer_norm:
        return len(node.args) > 1 and len(node.args[1]) == 1  # type: ignore[arg-type]
    if node.target in _OF_TWO:
        return all(_is_alike(traced, given, sizes(node), sizes) for given in node.args)
    return node.target in _FUNCTIONS


def _is_alike(traced: fx.GraphModule, given: object, expected: tuple[int, ...] | None, sizes: Sizes) -> bool:
    """Tell whether an operand has as many tokens, or is the same for all of them."""
    if not isinstance(given, fx.Node):
        return isinstance(given, int | float)
    if given.op != "get_attr":
        return sizes(given) == expected
    value: Any = traced
    for name in str(given.target).split("."):
        value = getattr(value, name)
    return isinstance(value, Tensor) and value.dim() <= 1


def _attention_behind(node: fx.Node) -> fx.Node | None:
    """Return the attention (b, heads, n, d) whose heads a node puts side by side as (b, n, c), if that is all it does."""
    if node.op != "call_method" or node.target != "reshape" or len(node.args) != 4:
        return None
    turned = node.args[0]
    if (
        not isinstance(turned, fx.Node)
        or turned.op != "call_method"
        or turned.target != "transpose"
        or len(turned.users) > 1
    ):
        return None
    attention = turned.args[0]
    if turned.args[1:] not in {(1, 2), (2, 1)} or not isinstance(attention, fx.Node) or len(attention.users) > 1:
        return None
    known = attention.op == "call_function" and attention.target is F.scaled_dot_product_attention
    plain = len(attention.args) == 3 and not any(attention.kwargs.values())  # no mask, no dropout, not causal
    return attention if known and plain else None
