"""A backbone as a graph: traced, observed for every batch size, and relieved of tokens that nobody looks at.

A transformer that answers with its class token throws the others away after its last block. There only keys and values are
needed of them: query, projection and MLP of the class token alone give the same embeddings, and the same gradients.
"""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from featcache.errors import CutError, SetupError

try:
    import timm as timm  # noqa: PLC0414 - the rest of the package takes it from here, behind this guard
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    from importlib.metadata import version

    raise SetupError(
        f"torch {version('torch')} and torchvision {version('torchvision')} come from different builds. Repair: "
        "`pip uninstall -y torch torchvision && pip install torch torchvision` (both, in one command)."
    ) from error
import torch
import torch.nn.functional as F
from timm.layers import DropPath, get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Multiple:
    """A number that is ``factor`` times the batch size."""

    factor: int


UNKNOWN = object()


@dataclass(frozen=True)
class Call:
    """What went into a module's call, first argument alone, and what came out of it."""

    argument: Any
    result: Any


class _Tracer(fx.Tracer):
    """Stops at the modules and functions that timm declares untraceable, and at those that act in training alone.

    ``calls`` says what each module was called with, by its name below the backbone that is traced.
    """

    def __init__(self) -> None:
        # timm marks what tracing cannot enter: control flow that depends on shapes or values.
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = (DropPath, *get_notrace_modules())
        self.calls: dict[str, list[Call]] = {}

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, and remember what a hook on it would see."""
        result = super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m).removeprefix("backbone.")
        self.calls.setdefault(name, []).append(Call(args[0] if args else None, result))
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is called as a whole."""
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


FEATURES = "forward_features"  # timm's name for what gives the activations before pooling


class _OnlyImages(nn.Module):
    """Binds every argument of a backbone's ``forward`` but the images to its default."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings (b, d)."""
        return self.backbone(images)  # type: ignore[no-any-return]


class _Observer(fx.Interpreter):
    """Runs a graph and remembers what each node gave: shapes of tensors, values of numbers."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and remember what it gave."""
        value = super().run_node(n)
        self.seen[n] = _describe(value)
        return value


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor: its sizes without the batch, and its dtype."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def length(self) -> int:
        """The number of elements an image."""
        return math.prod(self.sizes)


def trace(backbone: nn.Module) -> tuple[fx.GraphModule, dict[str, list[Call]]]:
    """Return a backbone's graph, images its only input, and what each module was called with.

    Raises:
        CutError: it cannot be traced.
    """
    root, tracer = _OnlyImages(backbone).eval(), _Tracer()
    try:
        with _watching_features(backbone, tracer):
            return fx.GraphModule(root, tracer.trace(root)), tracer.calls
    except Exception as error:  # tracing runs the model's own Python code: it can fail in any way
        raise CutError(f"this backbone cannot be traced ({type(error).__name__}: {error}).") from error


@contextmanager
def _watching_features(backbone: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """Let a tracer remember what a backbone gave before it pooled: a method does that, of which no call is seen."""
    compute = getattr(backbone, FEATURES, None)
    if compute is None:
        yield
        return

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        tracer.calls.setdefault(FEATURES, []).append(Call(args[0] if args else None, result))
        return result

    setattr(backbone, FEATURES, watched)
    try:
        yield
    finally:
        delattr(backbone, FEATURES)


def observe(traced: fx.GraphModule, images: Tensor) -> dict[fx.Node, Any]:
    """Run a graph and return what is known of each node's value."""
    observer = _Observer(traced)
    with torch.inference_mode():
        observer.run(images)
    return observer.seen


def _describe(value: object) -> Any:
    if isinstance(value, Tensor):
        return Shape(tuple(value.shape), value.dtype)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    if isinstance(value, tuple | list):
        return tuple(_describe(part) for part in value)
    return UNKNOWN


def combine(two: Any, three: Any) -> Any:
    """Return what is known of a node for every batch size, from batches of two and of three images."""
    if isinstance(two, Shape) and isinstance(three, Shape):
        # A batch axis must come first and be the only one that changes: then one image is one row.
        rows = two.sizes[:1] == (2,) and three.sizes[:1] == (3,) and two.sizes[1:] == three.sizes[1:]
        return Shape(two.sizes[1:], two.dtype) if rows else UNKNOWN
    if isinstance(two, tuple) and isinstance(three, tuple) and len(two) == len(three):
        parts = tuple(combine(*pair) for pair in zip(two, three, strict=True))
        return UNKNOWN if any(part is UNKNOWN or isinstance(part, Shape) for part in parts) else parts
    if two is UNKNOWN or three is UNKNOWN or isinstance(two, Shape | tuple) or isinstance(three, Shape | tuple):
        return UNKNOWN
    if two == three:
        return two
    if isinstance(two, int) and isinstance(three, int) and two % 2 == 0 and two // 2 * 3 == three:
        return Multiple(two // 2)
    return UNKNOWN


def random_images(backbone: nn.Module, count: int, size: int) -> Tensor:
    """Return the same random images (n, 3, size, size) at every call, on the backbone's device."""
    device = next(backbone.parameters()).device
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


Sizes = Callable[[fx.Node], tuple[int, ...] | None]

_ALL, _ONE = slice(None, None, None), slice(0, 1, None)
_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.LayerNorm,
    nn.Identity,
    DropPath,
    nn.Dropout,
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
)
_FUNCTIONS: tuple[Any, ...] = (F.gelu, F.silu, F.relu, F.layer_norm)
_OF_TWO: tuple[Any, ...] = (operator.add, operator.mul, torch.add, torch.mul)


def narrow(traced: fx.GraphModule, sizes: Sizes) -> bool:
    """Let a traced backbone compute the first of tokens (b, n, c) alone where no other is used; tell if it is so anywhere.

    Args:
        traced: is changed in place.
        sizes: the shape of what a node gives, without the batch; ``None`` where it is no tensor with one row an image.
    """
    narrowed = _needed_first_only(traced, sizes)
    graph = traced.graph
    slices: dict[fx.Node, fx.Node] = {}
    for node in [node for node in graph.nodes if node in narrowed]:
        attention = _attention_behind(node)
        if attention is not None:
            query: Any = attention.args[0]
            with graph.inserting_before(attention):
                first = graph.call_function(operator.getitem, (query, (_ALL, _ALL, _ONE)))
            # Only queries shrink: keys and values of all tokens are what the class token attends to.
            attention.update_arg(0, first)
            node.update_arg(2, 1)
            continue
        for source in node.all_input_nodes:
            if source in narrowed or not _are_tokens(sizes(source)):
                continue
            if source not in slices:
                with graph.inserting_after(source):
                    slices[source] = graph.call_function(operator.getitem, (source, (_ALL, _ONE)))
            node.replace_input_with(source, slices[source])
    traced.recompile()
    return bool(narrowed)


def _needed_first_only(traced: fx.GraphModule, sizes: Sizes) -> set[fx.Node]:
    """Return the nodes that work token by token, and of whose tokens only the first is used."""
    narrowed: set[fx.Node] = set()
    waiting = [node.args[0] for node in traced.graph.nodes if _takes_first(node)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in narrowed or not _are_tokens(sizes(node)):
            continue
        unused = all(_takes_first(user) or user in narrowed for user in node.users)
        if unused and (_is_tokenwise(traced, node, sizes) or _attention_behind(node) is not None):
            narrowed.add(node)
            waiting.extend(node.all_input_nodes)
    return narrowed


def _are_tokens(sizes: tuple[int, ...] | None) -> bool:
    return sizes is not None and len(sizes) == 2


def _takes_first(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and node.args[1] == (_ALL, 0)


def _is_tokenwise(traced: fx.GraphModule, node: fx.Node, sizes: Sizes) -> bool:
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return False
        draws = isinstance(module, nn.Dropout) and module.p > 0  # another shape would draw other numbers
        return type(module) in _MODULES and not draws and not getattr(module, "inplace", False)
    if node.op != "call_function" or node.kwargs.get("inplace"):
        return False
    if node.target is F.layer_norm:
        return len(node.args) > 1 and len(node.args[1]) == 1  # type: ignore[arg-type]
    if node.target in _OF_TWO:
        return all(_is_alike(traced, operand, sizes(node), sizes) for operand in node.args)
    return node.target in _FUNCTIONS


def _is_alike(traced: fx.GraphModule, operand: object, expected: tuple[int, ...] | None, sizes: Sizes) -> bool:
    """Tell whether an operand has as many tokens, or is the same for all of them."""
    if not isinstance(operand, fx.Node):
        return isinstance(operand, int | float)
    if operand.op != "get_attr":
        return sizes(operand) == expected
    value: Any = traced
    for name in str(operand.target).split("."):
        value = getattr(value, name)
    # A vector over channels is the same for every token; a table of positions is not.
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
    # Heads beside tokens, (b, n, heads, d), is what the reshape joins; any other order is another operation.
    if turned.args[1:] not in {(1, 2), (2, 1)} or not isinstance(attention, fx.Node) or len(attention.users) > 1:
        return None
    is_attention = attention.op == "call_function" and attention.target is F.scaled_dot_product_attention
    plain = len(attention.args) == 3 and not any(attention.kwargs.values())  # no mask, no dropout, not causal
    return attention if is_attention and plain else None
