"""A frozen backbone as a scikit-learn transformer."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from featcache.datasets import Dataset, FileStat, Sample, read_file, stat_file
from featcache.datasets.decoding import UnreadableImage, encode, encode_image
from featcache.errors import DataError, UsageError
from featcache.extraction import default_cache
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.specs import POOLED, BackboneSpec, TransformOverrides, cut_of_layers, freeze_args


class FeatureExtractor(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no annotations
    """Images, or texts, to the embeddings of a frozen backbone, float32 (n, d), computed once and kept in the cache.

    Takes file paths, PIL images, or arrays uint8 (h, w) or (h, w, 3); of an encoder of texts, texts; one column
    of a data frame or a list alike. Works in ``Pipeline``, ``GridSearchCV`` and ``ColumnTransformer``; a copy or a pickle
    holds parameters, never weights.

    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> model = make_pipeline(FeatureExtractor(), LogisticRegression())
    >>> model.fit(paths, labels).predict(others)  # doctest: +SKIP

    Args:
        backbone: ``mini``, a timm name, or ``text:`` before a folder or a name of the hub.
        layers: concatenate the pooled activations of these layers instead of the last embedding.
        pool: how activations become a vector, see BackboneSpec.
        weights: a checkpoint file.
        random_init: a seed: random weights.
        model_args: passed to timm.
        input_size: pixels, or of texts tokens, where not the backbone's own.
        cache: where features are kept; default as for the command line.
        device: ``cpu``, ``cuda``, ...
        batch_size: images at a time.
        runtime: what computes on the CPU, see ``Settings.runtime``.
    """

    def __init__(
        self,
        backbone: str = "lite0",
        *,
        layers: Sequence[str] | None = None,
        pool: str = "default",
        weights: str | Path | None = None,
        random_init: int | None = None,
        model_args: dict[str, Any] | None = None,
        input_size: int | None = None,
        cache: str | Path | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        runtime: str = "auto",
    ) -> None:
        self.backbone = backbone
        self.layers = layers
        self.pool = pool
        self.weights = weights
        self.random_init = random_init
        self.model_args = model_args
        self.input_size = input_size
        self.cache = cache
        self.device = device
        self.batch_size = batch_size
        self.runtime = runtime

    def fit(self, X: Any, y: Any = None) -> "FeatureExtractor":  # noqa: ARG002 - scikit-learn's signature
        """Learn nothing but the width of the embedding, from the first image."""
        first = _one_column(X)[:1]
        if not first:
            raise DataError("FeatureExtractor: at least one image is needed to fit.")
        self.feature_key_ = ""
        rows, self.feature_key_ = self._embed(first)
        self.n_features_out_ = int(rows.shape[1])
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Return the embeddings (n, d).

        Raises:
            DataError: an image cannot be used; the message names it. Or another network lies behind the backbone's name than
                when this was fitted.
        """
        check_is_fitted(self)
        images = _one_column(X)
        return self._embed(images)[0] if images else np.empty((0, self.n_features_out_), np.float32)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:  # noqa: ARG002 - scikit-learn's signature
        """Return ``<backbone>_0``, ``<backbone>_1``, ..."""
        check_is_fitted(self)
        return np.array([f"{self._spec().label}_{number}" for number in range(self.n_features_out_)], dtype=object)

    def __getstate__(self) -> dict[str, Any]:
        """Return the parameters and what was fitted, without the loaded backbone."""
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_loaded"}

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that images are not numbers in columns."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = tags.input_tags.string = True
        tags.no_validation = True
        return tags

    def _spec(self) -> BackboneSpec:
        pool: Any = self.pool
        return BackboneSpec(
            name=self.backbone,
            weights=str(self.weights) if self.weights is not None else None,
            random_init=self.random_init,
            model_args=freeze_args(self.model_args or {}),
            overrides=TransformOverrides(input_size=self.input_size),
            pool=pool,
        )

    def _embed(self, images: list[Any]) -> tuple[NDArray[np.float32], str]:
        """Return embeddings and the key that they are cached under: of fitting's, where that has been."""
        spec = self._spec()
        reader = _TextReader(tuple(images)) if spec.samples == "text" else _ImageReader(tuple(images))
        paths = [reader.path(number) for number in range(len(images))]
        position = {path: number for number, path in enumerate(dict.fromkeys(paths))}
        samples = [Sample(path, "") for path in position]
        where = f"{spec.samples}s given to FeatureExtractor"
        dataset = Dataset("extractor", where, samples, reader, kind=spec.samples)
        runtime: Any = self.runtime
        folder = Path(self.cache) if self.cache is not None else default_cache()
        settings = Settings(folder, self.batch_size, self.device, max_bad=1.0, runtime=runtime)
        cache = FeatureCache(dataset, spec, settings, lists=False)
        loaded = getattr(self, "_loaded", None)
        if loaded is not None and loaded[0] == (cache.spec, self.device) and loaded[1].is_current:
            cache.backbone = loaded[1]
        extracted = cache.extracted(cut_of_layers(self.layers) if self.layers else POOLED)
        if "backbone" in cache.__dict__:
            self._loaded = ((cache.spec, self.device), cache.backbone)
        if getattr(self, "feature_key_", "") not in {"", extracted.store.key}:
            raise DataError(
                f"FeatureExtractor: {self.backbone} is not what it was when this was fitted (other weights, transform or "
                "parameters). Fit it, and what stands behind it, again."
            )
        if extracted.report.quarantined:
            bad = extracted.report.quarantined[0]
            raise DataError(f"FeatureExtractor: {bad.path}: {bad.reason} ({len(extracted.report.quarantined)} such images).")
        rows = extracted.store.rows_of(cache.files.sha256[[position[path] for path in paths]])
        return np.asarray(rows, dtype=np.float32), extracted.store.key


@dataclass(frozen=True)
class _ImageReader:
    """Paths, PIL images and arrays, read as the files of a data set."""

    images: tuple[Any, ...]

    def path(self, number: int) -> str:
        """Return what an image is called."""
        image = self.images[number]
        return os.path.abspath(image) if isinstance(image, str | os.PathLike) else f"image {number}"  # noqa: PTH100 - links stay

    def read(self, path: str) -> bytes:
        """Return an image's bytes."""
        if not path.startswith("image "):
            return read_file(path)
        image = self.images[int(path.removeprefix("image "))]
        try:
            return encode_image(image) if isinstance(image, Image.Image) else encode(np.asarray(image))
        except UnreadableImage as error:
            raise OSError(str(error)) from error

    def stat(self, path: str) -> FileStat | None:
        """Return a file's signs; what is in memory has none."""
        if path.startswith("image "):
            return None
        return stat_file(path)


@dataclass(frozen=True)
class _TextReader:
    """Texts, read as the samples of a data set."""

    texts: tuple[Any, ...]

    def path(self, number: int) -> str:
        """Return what a text is called."""
        return f"text {number}"

    def read(self, path: str) -> bytes:
        """Return a text's bytes."""
        text = self.texts[int(path.removeprefix("text "))]
        if not isinstance(text, str):
            raise OSError(f"a {type(text).__name__}, and no text")
        return text.encode("utf-8", "surrogatepass")

    def stat(self, path: str) -> None:
        """Return nothing: there is no file."""


def _one_column(X: Any) -> list[Any]:
    """Return images as a list, from a list, an array, a series, or a table of one column."""
    if isinstance(X, str | os.PathLike):
        raise UsageError("FeatureExtractor takes a list of images, not one path.")
    if hasattr(X, "columns"):
        if len(X.columns) != 1:
            raise UsageError(f"FeatureExtractor takes one column of images, not {len(X.columns)}.")
        X = X.iloc[:, 0] if hasattr(X, "iloc") else X[X.columns[0]]
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] == 1 and X.dtype.kind in "OUS":
        X = X[:, 0]
    return list(X)
