"""The scikit-learn transformer: in pipelines, grids and column transformers, from the cache, without weights in copies."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from featcache import FeatureExtractor
from featcache.backbones import timm_models as backbone
from featcache.datasets import open_dataset
from featcache.errors import DataError, UsageError
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.specs import BackboneSpec


@pytest.fixture
def extractor(tmp_path: Path) -> FeatureExtractor:
    """A small backbone with random weights."""
    return FeatureExtractor("test_resnet", random_init=0, input_size=32, cache=tmp_path / "cache", batch_size=8)


def paths_of(folder: Path) -> tuple[list[str], list[str]]:
    """Return the images' paths and labels."""
    paths = sorted(folder.rglob("*.png"))
    return [str(path) for path in paths], [path.parent.name for path in paths]


def test_rows_are_those_of_extract(
    folder: Path, extractor: FeatureExtractor, tiny: BackboneSpec, settings: Settings
) -> None:
    """Paths, PIL images and arrays give the same rows as the command, in the order given, twice where given twice."""
    paths, _ = paths_of(folder)
    expected = FeatureCache(open_dataset(folder), tiny, settings).extracted().store.features()
    row = {str(folder / path): features for path, features in zip(expected.paths, expected.X, strict=True)}
    given = [*paths[::-1], paths[3]]

    from_paths = extractor.fit(paths).transform(given)
    from_images = extractor.transform([Image.open(path) for path in given])
    from_arrays = extractor.transform([np.asarray(Image.open(path)) for path in given])

    for got in (from_paths, from_images, from_arrays):
        np.testing.assert_allclose(got, [row[path] for path in given], rtol=1e-4, atol=1e-6)
    assert extractor.transform([]).shape == (0, from_paths.shape[1])


def test_the_second_time_computes_nothing(
    folder: Path, extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known images need no backbone, in a copy or a pickle either."""
    paths, _ = paths_of(folder)
    first = extractor.fit_transform(paths)
    monkeypatch.setattr(backbone, "load_backbone", lambda *_: pytest.fail("the backbone was loaded"))

    for other in (extractor, clone(extractor).fit(paths), pickle.loads(pickle.dumps(extractor))):  # noqa: S301 - our own
        np.testing.assert_array_equal(other.transform(paths[5:9]), first[5:9])


def test_pickles_hold_no_weights(folder: Path, extractor: FeatureExtractor) -> None:
    """A fitted one is a few hundred bytes."""
    paths, _ = paths_of(folder)

    assert len(pickle.dumps(extractor.fit(paths))) < 1000


def test_pipelines_and_grids(folder: Path, extractor: FeatureExtractor) -> None:
    """Its own parameters can be searched, over processes."""
    paths, labels = paths_of(folder)
    pipeline = make_pipeline(extractor, LogisticRegression(max_iter=500))
    grid = {"featureextractor__layers": [None, ["layer2", "layer4"]], "logisticregression__C": [0.1, 1.0]}

    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(paths, labels)

    assert search.best_score_ > 0.5
    assert set(search.predict(paths)) <= set(labels)


def test_column_transformer_and_names(folder: Path, extractor: FeatureExtractor) -> None:
    """A column of paths beside other columns; every output column has a name."""
    paths, _ = paths_of(folder)
    columns = np.array([[path, index] for index, path in enumerate(paths)], dtype=object)
    both = ColumnTransformer([("image", extractor, [0]), ("number", "passthrough", [1])])

    out = both.fit_transform(columns)

    names = extractor.fit(paths).get_feature_names_out()
    assert out.shape == (len(paths), len(names) + 1)
    assert names[0] == "test_resnet.random0_0"


def test_what_cannot_be_transformed_is_named(folder: Path, extractor: FeatureExtractor) -> None:
    """A broken or absent file, a wrong array, several columns, one string, nothing fitted."""
    paths, _ = paths_of(folder)
    (folder / "red" / "bad.png").write_bytes(b"nothing")

    with pytest.raises(NotFittedError):
        extractor.transform(paths)
    extractor.fit(paths)
    for bad in (str(folder / "red" / "bad.png"), str(folder / "absent.png")):
        with pytest.raises(DataError, match=Path(bad).name):
            extractor.transform([paths[0], bad])
    with pytest.raises(DataError, match="image 0"):
        extractor.transform([np.zeros((4, 4, 3))])
    with pytest.raises(UsageError, match="not one path"):
        extractor.transform(paths[0])
