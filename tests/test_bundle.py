"""Heads as files: they load where scikit-learn is, predict the same, and nothing foreign runs unasked."""

import hmac
import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import DataError, SetupError, UsageError
from featcache.heads import bundle, search
from featcache.store import disk

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
    head = search.train(name, search.HEADS[name].grid(90)[0], X, y, 0)
    return head, X


@pytest.mark.parametrize("how", ["joblib", "skops"])
@pytest.mark.parametrize("name", list(search.HEADS))
def test_a_head_comes_back_as_it_was(name: str, how: bundle.Format, tmp_path: Path) -> None:
    """Both formats, every head, its card beside it."""
    pytest.importorskip("skops")
    head, X = fitted(name)

    path = bundle.save(head, CARD, tmp_path / name, how)
    loaded = bundle.load(path)

    assert loaded.classes == ("a", "b", "c")
    np.testing.assert_array_equal(loaded.estimator.predict(X), head.predict(X))


@pytest.mark.parametrize("name", list(search.HEADS))
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


def card_of(path: Path) -> Path:
    """Return where a head's card lies."""
    return path.with_name(f"{path.name}.json")


def change(path: Path, **fields: Any) -> None:
    """Change some fields of a head's card; ``None`` takes one away."""
    card = json.loads(card_of(path).read_text()) | fields
    card_of(path).write_text(json.dumps({name: value for name, value in card.items() if value is not None}))


def test_a_foreign_head_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A joblib file with a right hash, but not signed by this user, is refused before it is opened."""
    monkeypatch.chdir(tmp_path)
    head, _ = fitted("ridge")
    path = bundle.save(head, CARD, tmp_path / "head")
    content = pickle.dumps(_Evil())
    path.write_bytes(content)

    with pytest.raises(DataError, match="another SHA-256"):
        bundle.load(path)
    change(path, sha256=bundle.sha256_of_bytes(content))
    with pytest.raises(UsageError, match="`trust=True`"):
        bundle.load(path)

    assert not Path("canary").exists()


FULL: dict[str, Any] = CARD | {
    "target": "label",
    "head": "ridge",
    "cut": "pooled",
    "views": 1,
    "temperature": 1.5,
    "data": "/photos",
    "weights": None,
    "feature_key": "key",
    "params": {"alpha": 1.0},
    "test": {"accuracy": 0.5},
    "backbone": {"name": "mini", "weights": None, "random_init": None, "model_args": [], "overrides": {}},
}


@pytest.mark.parametrize("how", ["joblib", "skops"])
@pytest.mark.parametrize(
    "fields",
    [
        {"classes": ["b", "a", "c"]},
        {"weights": "/elsewhere.safetensors"},
        {"backbone": FULL["backbone"] | {"name": "hf-hub:somebody/something"}},
        {"cut": "layer3"},
        {"temperature": 9.0},
        {"data": "/other"},
        {"views": 2},
        {"target": "number"},
        {"params": {}},
        {"test": {"accuracy": 1.0}},
        {"signature": "00"},
        {"signature": None},
        {"signature": ""},
        {"format": None, "signature": None},
        {"note": "added"},
    ],
    ids=str,
)
def test_a_changed_card_is_refused(fields: dict[str, Any], how: bundle.Format, tmp_path: Path) -> None:
    """Whatever field of a card was changed, added or taken away: the head is not loaded unasked."""
    pytest.importorskip("skops")
    path = bundle.save(fitted("ridge")[0], FULL, tmp_path / "head", how)
    assert bundle.load(path).card["classes"] == ["a", "b", "c"]

    change(path, **fields)

    with pytest.raises(UsageError, match=r"was changed since.*`trust=True`"):
        bundle.load(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"classes": 5},
        {"classes": ["a", 1, "c"]},
        {"cut": 5},
        {"views": "x"},
        {"views": 0},
        {"views": True},
        {"temperature": -1},
        {"temperature": "warm"},
        {"target": ["label"]},
        {"signature": "ä"},
        {"signature": 5},
        {"format": "zip"},
        {"format": []},
        {"backbone": "mini"},
        {"backbone": {"name": 5}},
        {"backbone": {"name": "mini", "model_args": {"a": 1}}},
        {"backbone": {"name": "mini", "overrides": []}},
        {"weights": 1},
        {"params": []},
        {"sha256": 0},
        {"scikit_learn": None},
        {"classes": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("trust", [False, True])
def test_a_card_of_other_kinds(fields: dict[str, Any], trust: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """A field that is no text, number or list where one is needed is no card's, trusted or not."""
    path = bundle.save(fitted("ridge")[0], FULL, tmp_path / "head")
    change(path, **fields)

    with pytest.raises(DataError, match="not a head's card"):
        bundle.load(path, trust=trust)


@pytest.mark.parametrize("how", ["joblib", "skops"])
@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\5\6" + bytes(18), pickle.dumps({"a": 1})], ids=str)
def test_bytes_that_are_no_head(content: bytes, how: str, tmp_path: Path) -> None:
    """Trusted, they are said to be none."""
    pytest.importorskip("skops")
    path = bundle.save(fitted("ridge")[0], FULL, tmp_path / "head")
    path.write_bytes(content)
    change(path, sha256=bundle.sha256_of_bytes(content), format=how)

    with pytest.raises(DataError, match=r"head\.joblib: (cannot be loaded|not a skops file|holds a dict)"):
        bundle.load(path, trust=True)


def test_a_head_of_more_classes_than_its_card(tmp_path: Path) -> None:
    """It would answer with names that are not there."""
    path = bundle.save(fitted("ridge")[0], CARD | {"classes": ["a", "b"]}, tmp_path / "head")

    with pytest.raises(DataError, match="up to number 2, its card names 2"):
        bundle.load(path)


def of_before(path: Path) -> None:
    """Make a head's card one of an earlier version: named without the format, its signature of the file's bytes alone."""
    card = json.loads(card_of(path).read_text())
    secret = disk.secret_path().read_bytes()
    card["signature"] = hmac.new(secret, path.read_bytes(), "sha256").hexdigest()
    path.with_suffix(".json").write_text(json.dumps(card))
    card_of(path).unlink()


def test_a_head_of_before_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a word that its card is not covered; another user's is refused as ever; fitted again, it is covered."""
    head, X = fitted("logistic")
    path = bundle.save(head, CARD, tmp_path / "head")
    of_before(path)

    np.testing.assert_array_equal(bundle.load(path).estimator.predict(X), head.predict(X))
    assert "does not cover its card" in caplog.text
    caplog.clear()
    bundle.load(bundle.save(head, CARD, tmp_path / "head"))
    assert not caplog.messages
    of_before(path)
    disk.secret_path().unlink()
    with pytest.raises(UsageError, match="`trust=True`"):
        bundle.load(path)


def test_a_signed_card_is_no_signed_head(tmp_path: Path) -> None:
    """What was signed as a card does not pass as the bytes of a head of before."""
    path = bundle.save(fitted("ridge")[0], CARD, tmp_path / "head")
    card = json.loads(card_of(path).read_text())
    text = json.dumps({name: value for name, value in card.items() if name != "signature"}, sort_keys=True).encode()
    for content in (text.replace(b": ", b":").replace(b", ", b","), text):
        path.write_bytes(content)
        change(path, sha256=bundle.sha256_of_bytes(content))
        with pytest.raises(UsageError, match="`trust=True`"):
            bundle.load(path)


NAMES = ("blocks", "blocks.5", "blocks.6", "10.3pct", "10.5pct", "a.joblib", "a.skops", "a.json", "a", "a.")


def test_names_with_dots_do_not_meet(tmp_path: Path) -> None:
    """Each name and format is two files of its own: every head loads with its own card."""
    pytest.importorskip("skops")
    heads_by_name: dict[Path, tuple[str, bundle.Format]] = {}
    head, _ = fitted("ridge")
    for name in NAMES:
        for how in ("joblib", "skops"):
            heads_by_name[bundle.save(head, CARD | {"data": f"{name} {how}"}, tmp_path / name, how)] = (name, how)

    assert len(heads_by_name) == 2 * len(NAMES)
    assert len(list(tmp_path.iterdir())) == 4 * len(NAMES) + 1  # and the home of the secret
    for path, (name, how) in heads_by_name.items():
        assert path.name == f"{name}.{how}"
        assert bundle.load(path).card["data"] == f"{name} {how}"


def test_a_kill_between_card_and_head_leaves_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each of a save's steps the head that is there loads with its own card, the one of before or the new one."""
    (old, _), (new, _) = fitted("ridge"), fitted("centroid")
    for steps in range(4):
        path = bundle.save(old, CARD | {"head": "old"}, tmp_path / f"head{steps}")
        done: list[Path] = []

        def until(target: Path, *content: Any, done: list[Path] = done, steps: int = steps) -> None:
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(target)
            (disk.replace_file if content else disk.remove_file)(target, *content)

        with monkeypatch.context() as patched:
            patched.setattr(bundle, "replace_file", until)
            patched.setattr(bundle, "remove_file", until)
            with pytest.raises(KeyboardInterrupt):
                bundle.save(new, CARD | {"head": "new"}, tmp_path / f"head{steps}")

        loaded = bundle.load(path)
        kinds = {"old": "Ridge", "new": "LogisticRegression"}
        assert kinds[loaded.card["head"]] in repr(loaded.estimator)
        assert loaded.card["head"] == ("old" if steps < 2 else "new")
        bundle.save(new, CARD | {"head": "new"}, tmp_path / f"head{steps}")
        assert {one.name for one in tmp_path.glob(f"head{steps}*")} == {path.name, f"{path.name}.json"}


def put(path: Path, content: bytes = bytes(32), mode: int = 0o600) -> None:
    """Write a file of some mode."""
    path.write_bytes(content)
    path.chmod(mode)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: put(path, b""), "holds 0 bytes instead of 32"),
        (lambda path: put(path, bytes(31)), "holds 31 bytes"),
        (lambda path: put(path, bytes(4096)), "holds 33 bytes"),
        *[
            (lambda path, mode=mode: put(path, mode=mode), f"mode {mode:04o}")
            for mode in (0o644, 0o640, 0o602, 0o666, 0o610)
        ],
        (lambda path: path.symlink_to("/dev/zero"), "cannot be read"),
        (lambda path: path.symlink_to(path.parent / "nowhere"), "cannot be read"),
        (lambda path: os.mkfifo(path, 0o600), "no regular file"),
        (lambda path: path.mkdir(mode=0o700), "no regular file"),
    ],
)
def test_a_secret_that_others_may_know_is_refused(spoil: Any, why: str, tmp_path: Path) -> None:
    """Neither what it signed counts, nor is anything signed with it; the message says what to do."""
    path = bundle.save(fitted("ridge")[0], CARD, tmp_path / "head")
    disk.secret_path().unlink()
    spoil(disk.secret_path())

    with pytest.raises(SetupError, match=rf"secret.*{why}.*Delete it"):
        bundle.load(path)
    with pytest.raises(SetupError, match=why):
        bundle.save(fitted("ridge")[0], CARD, tmp_path / "other")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_secret_is_refused(tmp_path: Path) -> None:
    """It is theirs, whatever its mode."""
    path = bundle.save(fitted("ridge")[0], CARD, tmp_path / "head")
    os.chown(disk.secret_path(), 12345, -1)

    with pytest.raises(SetupError, match="belongs to another user"):
        bundle.load(path)


def test_an_empty_secret_runs_no_planted_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and a card that are signed with the empty key, which anyone can do, are not opened."""
    monkeypatch.chdir(tmp_path)
    path, content = bundle.save(fitted("ridge")[0], CARD, tmp_path / "head"), pickle.dumps(_Evil())
    put(disk.secret_path(), b"")
    path.write_bytes(content)
    change(path, sha256=bundle.sha256_of_bytes(content), signature=hmac.new(b"", content, "sha256").hexdigest())

    with pytest.raises(SetupError, match="0 bytes"):
        bundle.load(path)

    assert not Path("canary").exists()


def test_the_secret_is_made_whole_and_for_one_user() -> None:
    """32 bytes, mode 0600 under any umask, nothing beside it; the next signature is of the same one."""
    before = os.umask(0)
    try:
        first = disk.sign(b"", b"content")
    finally:
        os.umask(before)

    facts = disk.secret_path().stat()
    assert (facts.st_size, stat.S_IMODE(facts.st_mode)) == (32, 0o600)
    assert [path.name for path in disk.secret_path().parent.iterdir()] == ["secret"]
    assert disk.sign(b"", b"content") == first


def test_a_head_that_is_no_file(tmp_path: Path) -> None:
    """A pipe is not waited for."""
    os.mkfifo(tmp_path / "head.joblib")

    with pytest.raises(DataError, match="is no file"):
        bundle.load(tmp_path / "head.joblib")


def test_another_users_head_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another user wrote is loaded only where that is said."""
    head, X = fitted("logistic")
    path = bundle.save(head, CARD, tmp_path / "head")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "elsewhere"))

    with pytest.raises(UsageError, match="`trust=True`"):
        bundle.load(path)

    np.testing.assert_array_equal(bundle.load(path, trust=True).estimator.predict(X), head.predict(X))


def test_another_scikit_learn_is_an_error(tmp_path: Path) -> None:
    """A head of another version is not even opened."""
    head, _ = fitted("ridge")
    path = bundle.save(head, CARD, tmp_path / "head")
    change(path, scikit_learn="0.1")

    with pytest.raises(DataError, match=r"scikit-learn 0\.1"):
        bundle.load(path)


def test_a_foreign_card(tmp_path: Path) -> None:
    """JSON that is no card is said to be none."""
    (tmp_path / "head.joblib").write_bytes(b"")
    for text in ("[]", "{}", '{"sha256": ""}', "no JSON", "[" * 100_000, "\0"):
        (tmp_path / "head.json").write_text(text)
        with pytest.raises(DataError, match="card"):
            bundle.load(tmp_path / "head.joblib")


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    """The message names the file."""
    with pytest.raises(DataError, match="nothing"):
        bundle.load(tmp_path / "nothing.joblib")
