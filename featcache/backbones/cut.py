"""Split a backbone where its frozen part ends, so that the frozen part's output can be stored.

It is traced, observed for every batch size, and relieved of tokens that nobody looks at: a transformer that answers with its
class token throws the others away after its last block. There only keys and values are needed of them: query, projection and
MLP of the class token alone give the same embeddings, and the same gradients.

The traced graph's *hot* nodes use a trained parameter or follow from one. The cut is the minimum vertex cut, in stored
bytes an image, between the images and the hot nodes, where only operations without parameters, their own or handed to
them, may be done again after it (max-flow min-cut: Ford and Fulkerson 1956). Where several tensors cross, such as the
branches of a backbone that works at two scales, they are stored as one row. What crosses as an integer (heights, batch
sizes) is no tensor to store: it becomes a constant, or a multiple of the batch size.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from timm.layers import DropPath, get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

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


_TOLERANCE = 1e-4  # of the greatest embedding: what another order of float32 sums may differ by


@dataclass(frozen=True)
class SplitBackbone:
    """A frozen prefix, images (b, 3, h, w) -> activations (b, ...), and a suffix, activations -> embeddings (b, d).

    Both share the backbone's parameters; ``shape`` is that of one image's activations: (n,) where the cut goes through
    several ``tensors``, stored one behind the other. ``frozen`` names the parameters in the suffix that do not train: the
    layers that do train read them as well, such as a table of positions that all blocks share.
    """

    prefix: nn.Module
    suffix: nn.Module
    shape: tuple[int, ...]
    tensors: int = 1
    frozen: tuple[str, ...] = ()


_Border = tuple[fx.Node, ...]
_Reads = dict[fx.Node, set[int]]


@dataclass(frozen=True)
class Layer:
    """One tensor of a traced backbone."""

    node: fx.Node


Place = Layer | Callable[[str], bool] | None
"""Where activations are taken: one tensor; the cut before the first use of a parameter that trains; the end."""


class Cutter:
    """A traced backbone, ready to be cut anywhere.

    Args:
        backbone: in ``eval()`` mode; maps images (b, 3, h, w) to embeddings (b, d).
        image_size: height and width of an image, in pixels.
        narrows: leave out the tokens that the embeddings do not need. Layers' own outputs need all.

    Raises:
        CutError: the backbone cannot be traced.
    """

    def __init__(self, backbone: nn.Module, image_size: int, *, narrows: bool = True) -> None:
        self._backbone = backbone
        self._traced, self._calls = trace(backbone)
        self._images = random_images(backbone, 3, image_size)
        # Batches of two and of three: what stays is a constant, what grows with them is a multiple of the batch size.
        self._values = self._observed()
        if narrows and narrow(self._traced, self._sizes):
            self._values = self._observed()
        self._dependent = _descendants(node for node in self._traced.graph.nodes if node.op == "placeholder")
        self._held = {node: _parameter_ids(self._traced, node) for node in self._traced.graph.nodes}
        self._read = _with_handed_over(self._traced, self._held, self._dependent)
        self._borders: dict[tuple[frozenset[fx.Node], bool], _Border] = {}
        self._checked: set[_Border] = set()
        self._reproduces = False

    def _observed(self) -> dict[fx.Node, Any]:
        two, three = (observe(self._traced, self._images[:count]) for count in (2, 3))
        return {node: combine(two[node], three[node]) for node in self._traced.graph.nodes}

    def _sizes(self, node: fx.Node) -> tuple[int, ...] | None:
        value = self._values.get(node)
        return value.sizes if isinstance(value, Shape) else None

    def split(self, is_trained: Callable[[str], bool]) -> SplitBackbone:
        """Split before the first use of a trained parameter, told by its name.

        Raises:
            CutError: nothing is trained, no tensors of one row an image separate the two parts, or they do not
                reproduce the whole.
        """
        trained = self._trained(is_trained)
        hot = self._hot(trained)
        border = self._cheapest(hot)
        prefix = _prefix(self._traced, (border,))
        suffix = _suffix(self._traced, border, self._values, self._dependent)
        frozen = self._frozen(suffix, trained, hot)
        # Checked on the spot, once a border: a wrong split would only show as a worse accuracy.
        if border not in self._checked:
            _check(self._backbone, lambda images: suffix(prefix(images)), self._images)
            self._checked.add(border)
        shapes = [self._values[node] for node in border]
        shape = shapes[0].sizes if len(border) == 1 else (sum(tensor.length for tensor in shapes),)
        return SplitBackbone(prefix, suffix, shape, len(border), frozen)

    def has_moved(self, is_trained: Callable[[str], bool]) -> bool:
        """Tell whether this cut stores other tensors than version 1 of the format did.

        That took a function for free of parameters whose weight is handed to it, such as a convolution of standardised
        weights, and could cut before layers that are frozen.
        """
        hot = self._hot(self._trained(is_trained))
        return self._cheapest(hot) != self._cheapest(hot, held=True)

    def names_by_use(self) -> list[str]:
        """Return the names of the parameters, in the order in which what depends on the images first reads them."""
        names = {id(value): name for name, value in self._backbone.named_parameters()}
        readers = (node for node in self._traced.graph.nodes if node in self._dependent)
        return list(dict.fromkeys(names[number] for node in readers for number in self._read[node] if number in names))

    def joint_prefix(self, places: Sequence[Place]) -> nn.Module:
        """Return what computes several cuts in one pass: images -> a tuple of activations, or the only one.

        Raises:
            CutError: one of the cuts cannot be made.
        """
        return _prefix(self._traced, tuple(self._nodes(place) for place in places))

    def _nodes(self, place: Place) -> _Border:
        if isinstance(place, Layer):
            return (place.node,)
        if place is None:
            return (self.end.node,)
        self.split(place)
        return self._cheapest(self._hot(self._trained(place)))

    def layer(self, name: str, *, enters: bool = False) -> Layer:
        """Return what a module gives when it is called, or what enters it: what a forward hook, or pre-hook, sees.

        Raises:
            CutError: the module is not called, or several times, or this is no tensor with one row an image.
        """
        calls = self._calls.get(name, ())
        if len(calls) != 1:
            raise CutError(
                "no module of that name is called." if not calls else f"it is called {len(calls)} times an image."
            )
        value = calls[0].argument if enters else calls[0].result
        node = getattr(value, "node", None)
        if not isinstance(node, fx.Node) or not isinstance(self._values[node], Shape):
            is_sequence = isinstance(value, tuple | list | dict) or isinstance(self._values.get(node), tuple)  # type: ignore[arg-type]
            raise CutError(
                "several tensors leave it." if is_sequence else "what leaves it is no tensor with one row an image."
            )
        if not self._reproduces:
            _check(self._backbone, self._traced, self._images)
            self._reproduces = True
        return Layer(node)

    def calls(self, name: str) -> int:
        """Return how often a module is called for one batch of images."""
        return len(self._calls.get(name, ()))

    @property
    def end(self) -> Layer:
        """The embeddings."""
        return Layer(next(node for node in self._traced.graph.nodes if node.op == "output").args[0])

    def run(self, layer: Layer) -> Callable[[], Any]:
        """Return what computes a layer's output for a random image, anew at every call."""
        prefix, image = _prefix(self._traced, ((layer.node,),)), self._images[:1]
        return lambda: prefix(image)

    def border_of_version_1(self, is_trained: Callable[[str], bool]) -> Layer | None:
        """Return the tensor that version 1 of the format took for what leaves a stage, ``None`` where it took several."""
        hot = self._hot(self._trained(is_trained))
        border = self._cheapest(hot, held=True)
        return Layer(border[0]) if len(border) == 1 else None

    def parameters_before(self, layer: Layer) -> Iterator[nn.Parameter]:
        """Return the parameters that a layer's output depends on, the last read first; no tables of positions."""
        return _latest_first(self._backbone, self._traced, layer.node, self._read)

    def _cheapest(self, hot: set[fx.Node], *, held: bool = False) -> _Border:
        """Return the minimum cut before some nodes; ``held``: by parameters that nodes hold themselves, as in version 1."""
        key = frozenset(hot), held
        if key not in self._borders:  # a command asks for the same few cuts twenty times, of which each takes 50 ms
            reads = self._held if held else self._read
            self._borders[key] = _minimum_cut(self._traced, self._values, self._dependent, hot, reads)
        return self._borders[key]

    def _trained(self, is_trained: Callable[[str], bool]) -> set[int]:
        # By identity, not by name: one parameter can be reached under several names.
        trained = {id(value) for name, value in self._backbone.named_parameters() if is_trained(name)}
        if not trained:
            raise CutError("nothing is trained after this cut: use pooled.")
        return trained

    def _hot(self, trained: set[int]) -> set[fx.Node]:
        return _descendants(node for node, held in self._held.items() if held & trained)

    def _frozen(self, suffix: nn.Module, trained: set[int], hot: set[fx.Node]) -> tuple[str, ...]:
        """Return the names of the parameters behind a cut that do not train.

        Raises:
            CutError: one of them belongs to a layer that could have been done before the cut.
        """
        names = {id(value): name for name, value in self._backbone.named_parameters()}
        held = {id(value) for value in suffix.parameters()} - trained
        shared = {parameter for node in hot & self._dependent for parameter in self._read[node]}
        # Frozen layers behind the cut would run in every epoch: that is what the cut is to spare.
        if again := sorted(names.get(parameter, "?") for parameter in held - shared):
            raise CutError(f"{len(again)} frozen parameters ({again[0]}, ...) would lie behind this cut.")
        return tuple(sorted(names.get(parameter, "?") for parameter in held))


def parameters_by_use(backbone: nn.Module) -> list[nn.Parameter]:
    """Return a backbone's parameters that have one row a channel, the last used first.

    Raises:
        CutError: it cannot be traced.
    """
    traced = trace(backbone)[0]
    images = [node for node in traced.graph.nodes if node.op == "placeholder"]
    end = next(node for node in traced.graph.nodes if node.op == "output")
    held = {node: _parameter_ids(traced, node) for node in traced.graph.nodes}
    return list(_latest_first(backbone, traced, end, _with_handed_over(traced, held, _descendants(images))))


def _latest_first(backbone: nn.Module, traced: fx.GraphModule, end: fx.Node, reads: _Reads) -> Iterator[nn.Parameter]:
    """Yield the parameters that a node depends on, the last read first; no tables, such as those of positions."""
    named = {id(value): (name, value) for name, value in backbone.named_parameters()}
    yielded: set[int] = set()
    for node in reversed(_ancestors_in_order(traced, (end,))):
        for parameter in sorted((reads[node] & named.keys()) - yielded, key=list(named).index, reverse=True):
            yielded.add(parameter)
            name, value = named[parameter]
            if name.endswith("weight") or sum(size > 1 for size in value.shape) <= 1:
                yield value


def split(backbone: nn.Module, is_trained: Callable[[str], bool], image_size: int) -> SplitBackbone:
    """Split a backbone once: see Cutter."""
    return Cutter(backbone, image_size).split(is_trained)


def without_unused_tokens(backbone: nn.Module, image_size: int) -> nn.Module:
    """Return a backbone as it is traced, without the tokens that nobody looks at.

    Raises:
        CutError: it cannot be traced, or the trace does not reproduce it.
    """
    traced, images = trace(backbone)[0], random_images(backbone, 2, image_size)
    seen = observe(traced, images)
    narrow(traced, lambda node: seen[node].sizes[1:] if isinstance(seen.get(node), Shape) else None)
    _check(backbone, traced, images)
    return traced.eval()


def _check(backbone: nn.Module, computed: Callable[[Tensor], Tensor], images: Tensor) -> None:
    with torch.inference_mode():
        expected, got = backbone(images), computed(images)
    # NaN equals nothing, itself included: without this the message would be about the cut.
    if not expected.isfinite().all():
        raise CutError("this backbone answers a random image with NaN or infinity.")
    if not torch.allclose(expected, got, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())):
        raise CutError("what was traced does not reproduce the whole backbone.")


def _descendants(starts: Iterable[fx.Node]) -> set[fx.Node]:
    return _reachable(starts, lambda node: node.users)


def _reachable(starts: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(neighbours(node))
    return reached


def _with_handed_over(traced: fx.GraphModule, held: _Reads, dependent: set[fx.Node]) -> _Reads:
    """Return the parameters that each node reads, those too that are handed to it by nodes that no image has a part in."""
    # Standardised weights, for one, are computed by functions: those hold nothing, and must still count as frozen.
    parameters = {id(value) for value in traced.parameters()}  # a buffer, such as a mask, costs nothing to apply again
    reads: _Reads = {}
    for node in traced.graph.nodes:
        handed = (reads[source] & parameters for source in node.all_input_nodes if source not in dependent)
        reads[node] = held[node].union(*handed)
    return reads


def _parameter_ids(traced: fx.GraphModule, node: fx.Node) -> set[int]:
    """Return the identities of the parameters and buffers that a node holds: a module's, or the one it is."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        return {id(value) for value in (*module.parameters(), *module.buffers())}
    if node.op == "get_attr":
        value: Any = traced
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return {id(value)}
    return set()


def _minimum_cut(
    traced: fx.GraphModule, values: dict[fx.Node, Any], dependent: set[fx.Node], hot: set[fx.Node], reads: _Reads
) -> _Border:
    """Return the nodes whose tensors separate the images from the hot nodes at the least bytes."""
    # Each node is split in two: cutting a vertex costs its tensor's bytes, edges between nodes are free (infinite).
    flow = nx.DiGraph()
    for node in traced.graph.nodes:
        if node not in dependent or node in hot:
            continue
        value = values[node]
        if isinstance(value, Shape):
            flow.add_edge((node, "in"), (node, "out"), capacity=value.length * value.dtype.itemsize)
        # No capacity is infinite: what has no row an image can never be stored.
        elif value is UNKNOWN:
            flow.add_edge((node, "in"), (node, "out"))
        # Whatever reads a parameter is tied to the source: doing it again in the suffix would cost computing.
        if node.op == "placeholder" or reads[node]:
            flow.add_edge("images", (node, "in"))
        for user in node.users:
            flow.add_edge((node, "out"), "hot" if user in hot else (user, "in"))
    if "hot" not in flow or "images" not in flow:
        raise CutError("the trained part does not depend on the images.")
    try:
        _, (before, after) = nx.minimum_cut(flow, "images", "hot")
    except nx.NetworkXUnbounded as error:
        raise CutError("no tensor with one row an image separates the frozen from the trained part.") from error
    border = [node for node in traced.graph.nodes if (node, "in") in before and (node, "out") in after]
    tensors = tuple(node for node in border if isinstance(values[node], Shape))
    # Tensors of one border are stored as one row, which has one dtype.
    if len({values[node].dtype for node in tensors}) != 1:
        raise CutError("tensors of several kinds of numbers would have to be stored for this cut.")
    return tensors


def _prefix(traced: fx.GraphModule, borders: tuple[_Border, ...]) -> fx.GraphModule:
    # A graph of its own over the same modules: prefix and suffix share parameters with the backbone, nothing is copied.
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    ends = {node for border in borders for node in border}
    needed = _ancestors_in_order(traced, list(ends))
    stored: dict[fx.Node, fx.Node] = {}
    for node in needed:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in ends:  # what follows may write into it: an activation, or a sum, that works in place
            used = not node.users.keys().isdisjoint(needed)
            stored[node] = graph.call_method("clone", (copies[node],)) if used else copies[node]
    rows = [tuple(stored[node] for node in border) for border in borders]
    outputs = tuple(row[0] if len(row) == 1 else graph.call_function(_packed, row) for row in rows)
    graph.output(outputs if len(outputs) > 1 else outputs[0])
    return fx.GraphModule(traced, graph).eval()


def _suffix(traced: fx.GraphModule, border: _Border, values: dict[fx.Node, Any], dependent: set[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    stored = graph.placeholder("stored")
    copies: dict[fx.Node, Any] = {border[0]: stored}
    if len(border) > 1:
        parts = graph.call_function(_unpacked, (stored, tuple(values[node].sizes for node in border)))
        copies = {node: graph.call_function(operator.getitem, (parts, index)) for index, node in enumerate(border)}

    def known(node: fx.Node) -> bool:
        value = values[node]
        return node in border or (node in dependent and value is not UNKNOWN and not isinstance(value, Shape))

    needed: set[fx.Node] = set()
    waiting = [node for node in traced.graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend([] if known(node) and node.op != "output" else node.all_input_nodes)
    for node in traced.graph.nodes:
        if node in border or node not in needed:
            continue
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
        elif known(node):
            copies[node] = _constant(graph, stored, values[node])
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(traced, graph).eval()


def _constant(graph: fx.Graph, stored: fx.Node, value: Any) -> Any:
    """Return a value that no longer depends on the images, its batch sizes read off the stored tensor."""
    if isinstance(value, Multiple):
        rows = graph.call_method("size", (stored, 0))
        return rows if value.factor == 1 else graph.call_function(_times, (rows, value.factor))
    if isinstance(value, tuple):
        return graph.call_function(_gather, tuple(_constant(graph, stored, part) for part in value))
    return graph.call_function(_same, (value,))


def _packed(*parts: Tensor) -> Tensor:
    """Return tensors (b, ...) as one, (b, n)."""
    return torch.cat([part.flatten(1) for part in parts], 1)


def _unpacked(stored: Tensor, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """Return the tensors that were packed, each (b, *shape)."""
    parts = torch.split(stored, [math.prod(shape) for shape in shapes], 1)
    # Contiguous, as the backbone's own tensors are: a view of the packed row would have the row's strides.
    return tuple(part.reshape(-1, *shape).contiguous() for part, shape in zip(parts, shapes, strict=True))


def _times(rows: int, factor: int) -> int:
    return rows * factor


def _gather(*parts: Any) -> tuple[Any, ...]:
    return parts


def _same(value: Any) -> Any:
    return value


def _ancestors_in_order(traced: fx.GraphModule, ends: Sequence[fx.Node]) -> list[fx.Node]:
    needed = _reachable(ends, lambda node: node.all_input_nodes)
    return [node for node in traced.graph.nodes if node in needed]
