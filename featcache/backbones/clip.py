"""The world of open_clip: two towers of one file of weights. Images take one, as a backbone; class names take the other."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featcache.backbones import Origin, hub_has_an_address, local_files_only, origin_of, sha256_of_given_weights
from featcache.backbones.base import OWN_HEAD, TimmBackbone, default_device
from featcache.backbones.timm_models import freeze, hash_weights, transform_of, try_image
from featcache.errors import DataError, FeatcacheError, SetupError, UsageError, did_you_mean
from featcache.fingerprint import canonical
from featcache.resources import FETCH, may_fetch
from featcache.specs import CLIP, BackboneSpec, LoadedBackbone, freeze_args

_VISUAL = "visual."  # what names of the image tower's tensors begin with, in open_clip's files and in ours
# of several files in a folder the first of these, as open_clip itself takes them
_CHECKPOINTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
_TEXTS_AT_ONCE = 64
_LAST = (99999,)  # timm's mark for what joins the last group


@dataclass(frozen=True)
class ClassTexts:
    """What the text tower says of classes: unit rows (k, d) float32, and how cosines become logits."""

    rows: NDArray[np.float32]
    scale: float
    bias: float


class ImageTower(nn.Module):
    """Images (b, 3, h, w) -> embeddings (b, d), not normalised; its tensors are called as in files of both towers."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings."""
        embeddings = self.visual(images)
        # some towers give their tokens beside
        return embeddings[0] if isinstance(embeddings, tuple) else embeddings  # type: ignore[no-any-return]

    def group_matcher(self, *, coarse: bool = False) -> dict[str, Any]:
        """Return timm's kind of rules that order parameters by depth."""
        inner = getattr(getattr(self.visual, "trunk", None), "group_matcher", None)
        if inner is not None:
            return {name: _below(rule, "visual.trunk.") for name, rule in inner(coarse=coarse).items()}
        if hasattr(self.visual, "layer1"):
            blocks = [(r"^visual\.layer(\d+)", None), (r"^visual\.attnpool", _LAST)]
            return {"stem": r"^visual\.(?:conv|bn)\d", "blocks": blocks}
        blocks = [(r"^visual\.transformer\.resblocks\.(\d+)", None), (r"^visual\.(?:ln_post|proj|attn_pool)", _LAST)]
        return {"stem": r"^visual\.(?:conv1|class_embedding|positional_embedding|ln_pre)", "blocks": blocks}


class TokenTower(ImageTower):
    """An image tower that is a plain transformer: its last tokens are what other poolings and attention train on."""

    num_prefix_tokens = 1

    @classmethod
    def fits(cls, visual: nn.Module) -> bool:
        """Tell whether a tower is one: patches and a class token, normalised, then pooled and projected."""
        is_plain = type(visual).__name__ == "VisionTransformer" and getattr(visual, "attn_pool", True) is None
        return is_plain and not visual.final_ln_after_pool and visual.pool_type in {"tok", "avg"}

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the tokens (b, n, c), the class token first."""
        visual: Any = self.visual
        return visual.ln_post(visual.transformer(visual._embeds(images)))  # type: ignore[no-any-return] # noqa: SLF001

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens."""
        visual: Any = self.visual
        pooled = visual._global_pool(tokens)[0]  # noqa: SLF001 - the model's own way
        return pooled if visual.proj is None else pooled @ visual.proj  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings."""
        return self.forward_head(self.forward_features(images))


def load_image_tower(spec: BackboneSpec, device: torch.device | None = None) -> TimmBackbone:
    """Load the image tower of a model of open_clip's: ``clip:MODEL/TAG``, or a folder with open_clip_config.json.

    Raises:
        UsageError: there is no such model, tag or folder, or it does not take what is asked for.
        DataError: the weights are broken, of another architecture, or changed while they were read.
        SetupError: open_clip is not installed, or the published weights cannot be had.
    """
    if spec.model_args:
        raise UsageError("`model_args` are of timm's models: a model of open_clip's is built as its configuration says.")
    device, origin = device or default_device(), _origin(spec)
    before, digest = origin.content() if origin is not None else None, sha256_of_given_weights(spec)
    model, config = _load(spec)
    tower = (TokenTower if TokenTower.fits(model.visual) else ImageTower)(model.visual)
    freeze(tower, device)
    preprocess = dict(model.visual.preprocess_cfg)
    if preprocess.get("resize_mode") == "longest":
        raise UsageError(
            f"`backbone` {spec.name}: it fills images up to a square (resize_mode longest), which is not possible."
        )
    size: Any = getattr(model.visual, "image_size", preprocess["size"])
    published = preprocess | {
        "input_size": (size, size) if isinstance(size, int) else tuple(size),
        "crop_mode": "squash" if preprocess.get("resize_mode") == "squash" else "center",
    }
    transform = transform_of(published, spec)
    try_image(tower, spec, transform.input_size, device)
    # what of the configuration decides a row, beside the weights and their shapes
    facts = {"vision": canonical(config["vision_cfg"]), "quick_gelu": bool(config.get("quick_gelu"))}
    loaded = LoadedBackbone("clip", _weights_tag(spec), hash_weights(tower), freeze_args(facts), spec.pool)
    content = origin.content() if origin is not None else None
    if before not in {None, content} or sha256_of_given_weights(spec) != digest:
        raise DataError(f"`backbone` {spec.name}: its files changed while they were read. Run again.")
    return TimmBackbone(spec, loaded, transform, tower, device, origin, content, digest)


def embed_classes(
    spec: BackboneSpec, names: Sequence[str], templates: Sequence[str], device: torch.device | None = None
) -> ClassTexts:
    """Return what the text tower makes of classes: each template's unit row, averaged, of unit length again.

    That is the zero-shot classifier of Radford et al. 2021, section 3.1.4 (an ensemble in the space of embeddings).

    Args:
        spec: the backbone whose image tower made the rows.
        names: of the classes; nothing in them is code.
        templates: texts in which {} stands for a name.
        device: to compute on.

    Raises:
        FeatcacheError: as of ``load_image_tower``; or there is no text tower.
    """
    device, library = device or default_device(), _open_clip()
    model, _ = _load(spec)
    if not model.has_texts:
        raise UsageError(f"`weights` {spec.weights}: an image tower alone. Name the model's own weights too, as MODEL/TAG.")
    with _quiet(), _offline_unless_allowed():
        try:
            tokenise = library.get_tokenizer(_open_clip_name(spec))
        except Exception as error:  # it may be of another library, and looks for its files in a folder or on the hub
            raise SetupError(f"`backbone` {spec.name}: its tokeniser cannot be had ({error!r:.200}).") from error
    model = model.to(device).eval()
    texts = [template.replace("{}", name) for name in names for template in templates]
    with torch.inference_mode():
        parts = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
        rows = torch.cat([model.encode_text(tokenise(part).to(device), normalize=True).float() for part in parts])
        means = nn.functional.normalize(rows.reshape(len(names), len(templates), -1).mean(dim=1), dim=-1)
        bias = 0.0 if model.logit_bias is None else float(model.logit_bias)
        return ClassTexts(means.cpu().numpy(), float(model.logit_scale.exp()), bias)


def towers_content(spec: BackboneSpec) -> str | None:
    """Return the SHA-256 of the files that both towers are of, ``None`` where it cannot be told without loading them."""
    origin = _origin(spec) if spec.weights is None and spec.random_init is None else None
    return None if origin is None else origin.content()


def _load(spec: BackboneSpec) -> tuple[Any, dict[str, Any]]:
    """Return the whole model on the CPU, and its configuration; ``has_texts``: its text tower has weights of its own."""
    library, name = _open_clip(), _open_clip_name(spec)
    folder, tag = _folder(spec), _weights_tag(spec)
    published = _published(spec)
    if published is not None and not may_fetch() and ((origin := _origin(spec)) is None or origin.content() is None):
        raise SetupError(f"`backbone` {spec.name}: its weights are not on this machine, and {FETCH}=never.")
    config = _model_config(spec, library, name)
    options: dict[str, Any] = {"pretrained": tag} if published is not None else {"load_weights": False}
    # a tag knows which GELU it was trained with, whatever the model's name says
    options["force_quick_gelu"] = bool(config.get("quick_gelu"))
    options["force_image_size"] = spec.overrides.input_size
    with _quiet(), torch.random.fork_rng(devices=[]), _offline_unless_allowed():
        torch.default_generator.manual_seed(spec.random_init or 0)
        try:
            model = library.create_model(name, pretrained_text=False, weights_only=True, **options)
        except Exception as error:  # a configuration is another's text, and a download can fail in any way
            kind = SetupError if published is not None else DataError
            raise kind(f"`backbone` {spec.name}: open_clip cannot create it ({error!r:.200}).") from error
        model.has_texts = published is not None or spec.random_init is not None
        if folder is not None and spec.random_init is None and (spec.weights is None or not _has_text_tower(spec)):
            _fill_towers(library, model, _checkpoint(folder), spec)
        if spec.weights is not None:
            _fill_towers(library, model, Path(spec.weights), spec)
    return model, config


def _model_config(spec: BackboneSpec, library: Any, name: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = library.get_model_config(name)
        vision = dict(config["vision_cfg"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"`backbone` {spec.name}: its configuration cannot be read ({error!r:.200}).") from error
    if spec.overrides.input_size is not None:
        vision["image_size"] = spec.overrides.input_size
    quick = bool(config.get("quick_gelu")) or bool((_published(spec) or {}).get("quick_gelu"))
    return config | {"vision_cfg": vision, "quick_gelu": quick}


def _fill_towers(library: Any, model: Any, path: Path, spec: BackboneSpec) -> None:
    """Load a file of tensors into both towers, or into the image tower where it holds that alone.

    Raises:
        DataError: it is no such file, or another model's.
    """
    state = _state(library, path, spec)
    try:
        if all(name.startswith(_VISUAL) for name in state):
            model.visual.load_state_dict({name.removeprefix(_VISUAL): value for name, value in state.items()})
            return
        library.load_checkpoint(model, str(path), weights_only=True)
    except Exception as error:  # tensors of another shape, or called otherwise
        raise DataError(f"{path}: not for {spec.name} ({' '.join(str(error).split())[:300]}).") from error
    model.has_texts = True


def _state(library: Any, path: Path, spec: BackboneSpec) -> dict[str, Tensor]:
    """Return a file's tensors without a head of ours.

    Raises:
        DataError: it cannot be read without running code, or is not there.
    """
    if not path.is_file():
        raise DataError(f"`weights` {path}: there is no such file.")
    try:
        state = library.factory.load_state_dict(str(path), weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise DataError(f"{path}: not for {spec.name}: it holds more than tensors. Save the model's own state_dict().")
    except FeatcacheError:
        raise
    except Exception as error:  # a foreign file can be anything
        raise DataError(f"{path}: not a safetensors file or a plain state of tensors ({type(error).__name__}).") from error
    return {name: value for name, value in state.items() if not name.startswith(OWN_HEAD)}


def _has_text_tower(spec: BackboneSpec) -> bool:
    state = _state(_open_clip(), Path(spec.weights or ""), spec)
    return not all(name.startswith(_VISUAL) for name in state)


def _checkpoint(folder: Path) -> Path:
    """Return the file of a folder that holds both towers.

    Raises:
        DataError: there is none.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in {".safetensors", ".bin", ".pth", ".pt"})
    ranked = sorted(
        files, key=lambda path: _CHECKPOINTS.index(path.name) if path.name in _CHECKPOINTS else len(_CHECKPOINTS)
    )
    if not ranked:
        raise DataError(f"`backbone` {CLIP}{folder}: no weights in it: a .safetensors, .bin or .pth file is needed.")
    return ranked[0]


def _folder(spec: BackboneSpec) -> Path | None:
    origin = origin_of(spec)
    return origin.folder() if origin is not None else None


def _open_clip_name(spec: BackboneSpec) -> str:
    """Return what open_clip calls a model.

    Raises:
        UsageError: it knows none of that name.
    """
    folder = _folder(spec)
    if folder is not None:
        return f"local-dir:{folder}"
    name, models = spec.name.removeprefix(CLIP).partition("/")[0], _open_clip().list_models()
    if name not in models:
        raise UsageError(f"`backbone` {spec.name}: open_clip has no such model.{did_you_mean(name, models)}")
    return name


def _weights_tag(spec: BackboneSpec) -> str:
    if spec.random_init is not None:
        return f"random:{spec.random_init}"
    if spec.weights is not None:
        return "file"
    return "folder" if _folder(spec) is not None else spec.name.partition("/")[2]


def _published(spec: BackboneSpec) -> dict[str, Any] | None:
    """Return what open_clip notes of a tag's weights; ``None`` where weights come from elsewhere.

    Raises:
        UsageError: the model has no such tag.
    """
    if spec.random_init is not None or _folder(spec) is not None:
        return None
    name, _, tag = spec.name.removeprefix(CLIP).partition("/")
    if not tag and spec.weights is not None:
        return None
    facts: dict[str, Any] = _open_clip().get_pretrained_cfg(name, tag)
    if not facts:
        tags = _open_clip().list_pretrained_tags_by_model(_open_clip_name(spec))
        raise UsageError(
            f"`backbone` {spec.name}: write {CLIP}{name}/TAG, of the tags {', '.join(tags) or '(none)'}; or give `weights`."
        )
    return facts


def _origin(spec: BackboneSpec) -> Origin | None:
    """Return where the files behind a name lie: a folder, or the hub's copy of a tag's repository."""
    spelt = origin_of(spec)
    if spelt is not None:
        return spelt
    place = str((_published(spec) or {}).get("hf_hub", "")) if spec.weights is None else ""
    return Origin("hub", place.rpartition("/")[0], reads=("weights",)) if place else None


def _below(rule: Any, place: str) -> Any:
    """Return a rule of timm's for the names of a network that is part of another."""
    if isinstance(rule, str):
        inside = re.sub(r"(?<!\[)\^", "", rule)  # timm's patterns begin anywhere in an alternative
        return rf"^{re.escape(place)}(?:{inside})"
    return [(_below(pattern, place), *rest) for pattern, *rest in rule]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip from writing to the root logger, which would put a handler there that says everything twice."""
    root = logging.getLogger()
    before, handlers = logging.root.manager.disable, list(root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        root.handlers[:] = handlers


@contextmanager
def _offline_unless_allowed() -> Iterator[None]:
    with nullcontext() if hub_has_an_address() else local_files_only():
        yield


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError:
        raise SetupError("`backbone` clip:... needs open_clip: `pip install 'featcache[clip]'`.") from None
    return open_clip
