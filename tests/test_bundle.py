"""Heads as files: they load where scikit-learn is, predict the same, and nothing foreign runs unasked."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache import bundle, heads
from featcache.errors import DataError, UsageError

CARD = {"classes": ["a", "b", "c"]}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures are made with a secret in the user's data folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))


def fitted(name: str) -> tuple[Any, Any]:
    """Return a head and its features."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    X = (rng.normal(0, 3, (3, 8))[y] + rng.normal(size=(90, 8))).astype(np.float32)
    head, _ = heads.train(name, heads.HEADS[name].grid(90)[0], X, y, 0)
    return head, X


@pytest.mark.parametrize("how", ["joblib", "skops"])
@pytest.mark.parametrize("name", list(heads.HEADS))
def test_a_head_comes_back_as_it_was(name: str, how: bundle.Format, tmp_path: Path) -> None:
    """Both formats, every head, its card beside it."""
    pytest.importorskip("skops")
    head, X = fitted(name)

    path = bundle.save(head, CARD, tmp_path / name, how)
    loaded = bundle.load(path)

    assert loaded.classes == ("a", "b", "c")
    np.testing.assert_array_equal(loaded.estimator.predict(X), head.predict(X))


@pytest.mark.parametrize("name", list(heads.HEADS))
def test_scikit_learn_alone_is_enough(name: str, tmp_path: Path) -> None:
    """A joblib head loads in a process that cannot import featcache, and predicts the same."""
    head, X = fitted(name)
    path = bundle.save(head, CARD, tmp_path / name)
    np.save(tmp_path / "x.npy", X)
    code = (
        "import sys; sys.modules['featcache'] = None\n"
        "import joblib, numpy as np\n"
        "print(*joblib.load(sys.argv[1]).predict(np.load(sys.argv[2])))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "x.npy")], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == [str(one) for one in head.predict(X)]


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("open('canary', 'w')",))


def test_a_foreign_head_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A joblib file with a right hash, but not signed by this user, is refused before it is opened."""
    monkeypatch.chdir(tmp_path)
    head, _ = fitted("ridge")
    path = bundle.save(head, CARD, tmp_path / "head")
    content = pickle.dumps(_Evil())
    path.write_bytes(content)

    with pytest.raises(DataError, match="another SHA-256"):
        bundle.load(path)
    card = json.loads(path.with_suffix(".json").read_text())
    card["sha256"] = bundle.sha256_of_bytes(content)
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(UsageError, match="--trust"):
        bundle.load(path)

    assert not Path("canary").exists()


def test_another_users_head_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another user wrote is loaded only where that is said."""
    head, X = fitted("logistic")
    path = bundle.save(head, CARD, tmp_path / "head")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "elsewhere"))

    with pytest.raises(UsageError, match="--trust"):
        bundle.load(path)

    np.testing.assert_array_equal(bundle.load(path, trust=True).estimator.predict(X), head.predict(X))


def test_another_scikit_learn_is_an_error(tmp_path: Path) -> None:
    """A head of another version is not even opened."""
    head, _ = fitted("ridge")
    path = bundle.save(head, CARD, tmp_path / "head")
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(card | {"scikit_learn": "0.1"}))

    with pytest.raises(DataError, match=r"scikit-learn 0\.1"):
        bundle.load(path)


def test_a_foreign_card(tmp_path: Path) -> None:
    """JSON that is no card is said to be none."""
    (tmp_path / "head.joblib").write_bytes(b"")
    for text in ("[]", "{}", '{"sha256": ""}', "no JSON"):
        (tmp_path / "head.json").write_text(text)
        with pytest.raises(DataError, match="card"):
            bundle.load(tmp_path / "head.joblib")


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(DataError, match="nothing"):
        bundle.load(tmp_path / "nothing.joblib")
