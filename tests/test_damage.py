"""What stands in a cache is believed only where it is what was written there, and where it is, whatever its shape."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support import COLOURS, TINY, Run, draw_image

from featcache.errors import StorageError
from featcache.experiments.upkeep import verify
from featcache.fingerprint import fingerprint, sha256_of_file
from featcache.specs import FeatureSpec, LoadedBackbone, Transform
from featcache.store.entry import FeatureStore
from featcache.store.hdf5 import FileIndex, Listing, Part
from featcache.store.manifests import Manifest, Quarantined, encode_manifest

SPEC = FeatureSpec(Transform(), LoadedBackbone("x", "x", "00"))
OTHER = FeatureSpec(Transform(64), LoadedBackbone("x", "x", "00"))
ODD_JSON = [b"", b"null", b"[]", b'"text"', b"7", b"{", b"{}", b"\xff", b'{"a": NaN}', b"[" * 100_000, b"\0" * 50]


def entry(root: Path, spec: FeatureSpec = SPEC, first: float = 0.0) -> FeatureStore:
    """Make an entry of eight rows in two parts, with a listing, a table and a request."""
    store = FeatureStore.create(root / "data" / f"x.pooled-{spec.key[:8]}", spec)
    parts = []
    for start in (0, 4):
        rows = np.repeat(np.arange(start, start + 4, dtype=np.float32)[:, None], 3, axis=1) + np.float32(first)
        parts.append(store.add_part(Part([rows], seen(range(start, start + 4)))))
    store.commit(parts=parts, quarantined=[Quarantined("bad.png", "ab" * 32, "broken")])
    labels, splits = np.arange(8) % 2, np.zeros(8, np.uint8)
    bad = [Quarantined("bad.png", "ab" * 32, "broken")]
    store.commit(listing=Listing(seen(range(8)), labels, splits, ("a", "b")), quarantined=bad, seconds=1.5)
    store.write_table()
    store.remember_request({"name": "x", "random_init": 0})
    return FeatureStore.open(store.path)


def seen(numbers: range) -> FileIndex:
    """Return files, each with a hash of its own."""
    digests = np.zeros((len(numbers), 32), np.uint8)
    digests[:, 0] = numbers
    return FileIndex(tuple(f"{number}.png" for number in numbers), digests, np.zeros((len(numbers), 4), np.int64), 1)


def everything(store: FeatureStore) -> None:
    """Use an entry in every way that a command does."""
    again = FeatureStore.open(store.path)
    again.remembered()
    list(again.requests())
    features = again.features()
    assert features.X[:, 0].tolist() == list(range(8))
    assert again.rows_of(features_digests()).tolist() == features.X.tolist()
    assert again.reader().take(np.arange(8)).tolist() == features.X.tolist()


def features_digests() -> np.ndarray:
    """Return the hashes of the eight images."""
    return seen(range(8)).sha256


def fields_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where every value in some JSON stands."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    deeper = [each for name, part in inside for each in fields_of(part, (*path, name))]
    return [path, *deeper] if path else deeper


def edited(value: Any, path: tuple[Any, ...], new: Any) -> bytes:
    """Return JSON with one value replaced."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = new
    return json.dumps(copy, indent=1).encode()


def test_a_whole_entry_has_no_problems(tmp_path: Path) -> None:
    """What was just written is what is there."""
    store = entry(tmp_path)

    assert store.verify() == []
    everything(store)


@pytest.mark.parametrize("new", [None, 7, "other", [], {}, True, 1.5])
def test_no_field_of_a_spec_can_be_changed(tmp_path: Path, new: Any) -> None:
    """The key is the hash of what the spec says: another value anywhere is an error that names the file."""
    store = entry(tmp_path)
    path, before = store.path / "spec.json", store.spec
    for place in fields_of(before):
        content = edited(before, place, new)
        if json.loads(content) == before:
            continue
        path.write_bytes(content)

        with pytest.raises(StorageError, match=r"spec.json"):
            FeatureStore.open(store.path)


def test_an_entry_says_which_key_it_has_in_its_name(tmp_path: Path) -> None:
    """A sound spec.json in another entry's folder is an error."""
    one, other = entry(tmp_path), entry(tmp_path, OTHER)
    shutil.copy(other.path / "spec.json", one.path / "spec.json")

    with pytest.raises(StorageError, match=r"spec.json: damaged"):
        FeatureStore.open(one.path)


def test_an_entry_that_was_killed_at_its_start_begins_again(tmp_path: Path) -> None:
    """A torn spec.json is written again as long as nothing was committed, and is an error afterwards."""
    path = tmp_path / "data" / f"x.pooled-{SPEC.key[:8]}"
    (path / "parts").mkdir(parents=True)
    (path / "spec.json").write_bytes(b'{"tran')
    assert FeatureStore.create(path, SPEC).key == SPEC.key

    entry(tmp_path)
    (path / "spec.json").write_bytes(b'{"tran')
    with pytest.raises(StorageError, match=r"spec.json: damaged"):
        FeatureStore.create(path, SPEC)


@pytest.mark.parametrize("content", ODD_JSON)
@pytest.mark.parametrize("name", ["spec.json", "manifest-2.json"])
def test_json_of_another_kind_is_one_plain_error(tmp_path: Path, name: str, content: bytes) -> None:
    """Whatever stands in the files that must be read: an error that names the file, and a line of verify."""
    store = entry(tmp_path)
    (store.path / name).write_bytes(content)

    with pytest.raises(StorageError, match=r"spec.json|not an entry|manifest-2.json: damaged"):
        FeatureStore.open(store.path).features()


@pytest.mark.parametrize("content", ODD_JSON)
def test_notes_of_another_kind_are_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    """checked.json and requests only save work: damaged they are found by verify, and rows are read all the same."""
    store = entry(tmp_path)
    (request,) = (store.path / "requests").iterdir()
    for path in (store.path / "checked.json", request):
        path.write_bytes(content)

    found = store.verify()

    assert content == b"{}" or any("checked.json" in problem for problem in found)  # {} notes nothing, soundly
    assert any(request.name in problem for problem in found)
    everything(store)
    assert list(FeatureStore.open(store.path).requests()) == []


@pytest.mark.parametrize(
    "stamps",
    [{"features.h5": 7}, {"features.h5": []}, {"features.h5": ["x"] * 6}, {"features.h5": [None] * 6}, {"features.h5": {}}],
)
def test_stamps_of_another_shape_are_none(tmp_path: Path, stamps: dict[str, Any]) -> None:
    """Sound JSON that says no hash is not believed."""
    store = entry(tmp_path)
    (store.path / "checked.json").write_text(json.dumps(stamps))

    assert any("checked.json" in problem for problem in store.verify())
    everything(store)


@pytest.mark.parametrize("new", [None, -1, "x", [], {}, True, 1e300])
def test_no_field_of_a_manifest_can_be_changed(tmp_path: Path, new: Any) -> None:
    """Each version carries its own hash: another value anywhere is an error, and verify names the version."""
    store = entry(tmp_path)
    path = store.path / "manifest-2.json"
    before = json.loads(path.read_bytes())
    for place in fields_of(before):
        content = edited(before, place, new)
        if json.loads(content) == before:
            continue
        path.write_bytes(content)

        with pytest.raises(StorageError, match=r"manifest-2.json: damaged"):
            FeatureStore.open(store.path).features()
        assert any("manifest-2.json" in problem for problem in store.verify())


def test_an_older_version_that_was_changed_is_found(tmp_path: Path) -> None:
    """Versions are a chain: one that was written anew, with its own hash made to fit, is not what the next one follows."""
    store = entry(tmp_path)
    first = store.path / "manifest-1.json"
    said = json.loads(first.read_bytes())
    forged = Manifest(number=1, previous=said["previous"], seconds=99.0)
    first.write_bytes(encode_manifest(forged, store.key))

    assert [problem for problem in store.verify() if "manifest-1.json: is not the version" in problem]


def test_a_version_of_another_entry_is_refused(tmp_path: Path) -> None:
    """A manifest belongs to one key."""
    one, other = entry(tmp_path), entry(tmp_path, OTHER)
    shutil.copy(other.path / "manifest-2.json", one.path / "manifest-2.json")

    with pytest.raises(StorageError, match=r"manifest-2.json: damaged"):
        FeatureStore.open(one.path).features()


@pytest.mark.parametrize(
    "name", ["../../x.h5", "/etc/passwd", "x.h5", "ab" * 8 + ".items.h5", "ab" * 8 + ".h5/x", "", ".", "AB" * 8 + ".h5"]
)
def test_a_part_lies_in_the_entry(tmp_path: Path, name: str) -> None:
    """A planted manifest cannot lead elsewhere: a part is called by its hash."""
    store = entry(tmp_path)
    manifest = store.manifest
    planted = replace(manifest, number=3, parts=(replace(manifest.parts[0], name=name),))
    (store.path / "manifest-3.json").write_text(json.dumps(asdict(planted)))

    with pytest.raises(StorageError, match=r"manifest-3.json: damaged"):
        FeatureStore.open(store.path).features()


@pytest.mark.parametrize(
    "name",
    [
        "manifest-007.json",
        "manifest-٣.json",
        "manifest-0.json",
        "manifest-.json",
        f"manifest-{'9' * 30}.json",
        "manifest-3.json.json",
    ],
)
def test_odd_names_are_no_versions(tmp_path: Path, name: str) -> None:
    """What is called almost like a version is left alone, and nothing waits for it."""
    store = entry(tmp_path)
    (store.path / name).write_text("{}")

    everything(store)


@pytest.mark.parametrize("kind", ["dangling", "folder", "pipe"])
def test_a_version_that_is_no_file_is_an_error(tmp_path: Path, kind: str) -> None:
    """A link into nothing, a folder, a pipe: an error at once."""
    store = entry(tmp_path)
    path = store.path / "manifest-9.json"
    {"dangling": lambda: path.symlink_to("nowhere"), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()

    with pytest.raises(StorageError, match=r"manifest-9.json"):
        FeatureStore.open(store.path).features()


def test_requests_are_called_by_their_content(tmp_path: Path) -> None:
    """Flags that were changed lead nowhere, and the next request that leads here removes them."""
    store = entry(tmp_path)
    (path,) = (store.path / "requests").iterdir()
    path.write_text(path.read_text().replace('"random_init": 0', '"random_init": 1'))

    assert list(store.requests()) == []
    assert any(path.name in problem for problem in store.verify())
    store.remember_request({"name": "x", "random_init": 0})
    assert list(store.requests()) == [{"name": "x", "random_init": 0}]
    assert store.verify() == []


def test_requests_belong_to_one_entry(tmp_path: Path) -> None:
    """A sound file of flags in another entry's folder does not lead there; one from before there was a binding does."""
    one, other = entry(tmp_path), entry(tmp_path, OTHER)
    (path,) = (other.path / "requests").iterdir()
    shutil.rmtree(one.path / "requests")
    shutil.copytree(path.parent, one.path / "requests")
    assert list(one.requests()) == []

    text = json.dumps({"name": "old"}, sort_keys=True, indent=1).encode()
    draft = one.path / "draft"
    draft.write_bytes(text)
    draft.rename(one.path / "requests" / f"{sha256_of_file(draft)[:16]}.json")
    assert list(one.requests()) == [{"name": "old"}]


def flip(path: Path) -> None:
    """Change one bit of the rows."""
    content, rows = bytearray(path.read_bytes()), np.arange(8, dtype=np.float32).repeat(3).tobytes()
    content[bytes(content).index(rows) + 50] ^= 1
    path.write_bytes(content)


def flip_unseen(path: Path) -> None:
    """Change one bit, and put the times back."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shorten(path: Path) -> None:
    """Cut off the end."""
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    """Cut off everything."""
    path.write_bytes(b"")


def zero_the_head(path: Path) -> None:
    """Make it no HDF5 file any more."""
    path.write_bytes(b"\0" * 512 + path.read_bytes()[512:])


def put_a_part_there(path: Path) -> None:
    """Put another file of the entry in its place."""
    shutil.copy(next((path.parent / "parts").glob("*.h5")), path)


def edit_a_row(path: Path) -> None:
    """Write into the table with h5py."""
    with h5py.File(path, "a") as file:
        file["features"][2] = 99


@pytest.mark.parametrize(
    "damage", [flip, flip_unseen, shorten, empty, zero_the_head, put_a_part_there, edit_a_row, os.unlink]
)
@pytest.mark.parametrize("noted", ["noted", "not noted"])
def test_a_damaged_table_is_found_not_read_and_written_again(
    tmp_path: Path, damage: Callable[[Path], None], noted: str
) -> None:
    """Whatever happens to features.h5: its rows are not believed, verify finds it, written again it is as it was."""
    store = entry(tmp_path)
    path = store.path / "features.h5"
    whole = path.read_bytes()
    if noted == "not noted":
        (store.path / "checked.json").unlink()
        assert store.verify() == []
    damage(path)

    assert any("features.h5" in problem for problem in store.verify()) == path.exists()
    everything(store)
    if noted == "not noted" and damage in {empty, zero_the_head, shorten, put_a_part_there}:
        with pytest.raises(StorageError, match="not written by featcache"):  # it may be anybody's
            FeatureStore.open(store.path).write_table()
        return
    assert FeatureStore.open(store.path).write_table() == path
    assert path.read_bytes() == whole
    assert FeatureStore.open(store.path).verify() == []


def short_alone(path: Path) -> str:
    """Hash a file, but no terabyte."""
    return sha256_of_file(path) if path.stat().st_size < 10**9 else pytest.fail("it was read")


def test_what_is_too_long_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte in the place of a part or of the table is refused by its size."""
    store = entry(tmp_path)
    monkeypatch.setattr("featcache.store.disk.sha256_of_file", short_alone)
    os.truncate(store.path / "features.h5", 10**12)
    assert FeatureStore.open(store.path)._current_table() is None
    for record in store.manifest.parts:
        os.truncate(store.path / "parts" / record.name, 10**12)

    with pytest.raises(StorageError, match="not what featcache wrote"):
        FeatureStore.open(store.path).remembered()


def test_pipes_keep_nobody_waiting(tmp_path: Path) -> None:
    """A pipe with the name of any of our files is an error or is left aside, at once."""
    store = entry(tmp_path)
    for name in ("heads", "tuned"):
        (store.path / name).mkdir()
    (request,) = (store.path / "requests").iterdir()
    places = ["checked.json", "features.h5", f"requests/{request.name}", "parts/0123456789abcdef.h5", "heads/x.joblib"]
    places += ["heads/x.joblib.json", "tuned/x.safetensors", "tuned/x.unfinished"]
    for place in places:
        (store.path / place).unlink(missing_ok=True)
        os.mkfifo(store.path / place)
    (tmp_path / "records").mkdir()
    os.mkfifo(tmp_path / "records" / "runs.jsonl")
    os.mkfifo(tmp_path / "data" / "source.json")

    checked, problems = verify(tmp_path)

    assert checked == 1
    for place in (*places[:1], *places[2:], "runs.jsonl", "source.json"):
        assert any(place in problem for problem in problems), place
    everything(store)


@pytest.mark.parametrize(
    "change", [{"transform": {}}, {"transform": []}, {"transform": {"size": 3}}, {"dtype": "x"}, {"cut": 7}]
)
def test_a_spec_of_other_values_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A planted spec whose key fits what it says must say what a spec says."""
    spec = {name: value for name, value in entry(tmp_path).spec.items() if name != "key"} | change
    key = fingerprint(spec)
    folder = tmp_path / "data" / f"x.pooled-{key[:8]}"
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps({**spec, "key": key}))

    with pytest.raises(StorageError, match="not of this version"):
        FeatureStore.open(folder)


def replanted(store: FeatureStore, which: str, change: Callable[[h5py.File], None]) -> None:
    """Change a part or the listing, and make every hash fit."""
    manifest = store.manifest
    record = manifest.parts[0] if which == "part" else manifest.listing
    assert record is not None
    path = store.path / "parts" / record.name
    with h5py.File(path, "a") as file:
        change(file)
    digest = sha256_of_file(path)
    suffix = record.name[16:]
    new = replace(record, name=digest[:16] + suffix, sha256=digest, bytes=path.stat().st_size)
    path.rename(path.with_name(new.name))
    planted = (
        replace(manifest, number=3, parts=(new, *manifest.parts[1:]))
        if which == "part"
        else replace(manifest, number=3, listing=new)
    )
    (store.path / "manifest-3.json").write_bytes(encode_manifest(planted, store.key))
    (store.path / "features.h5").unlink()


def set_to(name: str, value: Any) -> Callable[[h5py.File], None]:
    """Replace a member."""

    def change(file: h5py.File) -> None:
        del file[name]
        if value is not None:
            file[name] = value

    return change


def outside(name: str) -> Callable[[h5py.File], None]:
    """Let a member's bytes lie in another file."""

    def change(file: h5py.File) -> None:
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        secret = Path(file.filename).parent / "secret"
        secret.write_bytes(b"a secret" * 1000)
        file.create_dataset(name, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])

    return change


def linked(name: str, link: Any) -> Callable[[h5py.File], None]:
    """Let a member be a link."""

    def change(file: h5py.File) -> None:
        file["kept"] = file[name]
        del file[name]
        file[name] = link

    return change


def virtual(name: str) -> Callable[[h5py.File], None]:
    """Let a member be put together from another file's."""

    def change(file: h5py.File) -> None:
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource("elsewhere.h5", name, shape, dtype)
        file.create_virtual_dataset(name, layout)

    return change


def huge(name: str, *more: int) -> Callable[[h5py.File], None]:
    """Let a member say that it has more rows than any memory."""

    def change(file: h5py.File) -> None:
        dtype = file[name].dtype
        del file[name]
        file.create_dataset(name, (10**12, *more), dtype)

    return change


def chunked(name: str, *more: int) -> Callable[[h5py.File], None]:
    """Let a member be compressed, and blow up."""

    def change(file: h5py.File) -> None:
        dtype = file[name].dtype
        del file[name]
        file.create_dataset(name, (10**9, *more), dtype, chunks=(1000, *more), compression="gzip")

    return change


def attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    """Replace an attribute."""

    def change(file: h5py.File) -> None:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value

    return change


def group(name: str) -> Callable[[h5py.File], None]:
    """Let a member be a group."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_group(name)

    return change


ROWS = {"part": 4, "listing": 8}
COLUMNS = {"path": (), "sha256": (32,), "stat": (3,), "ctime": ()}
EVERYWHERE = [(which, name) for which in ROWS for name in COLUMNS]
PLANTED: list[tuple[str, str, Callable[[h5py.File], None]]] = [
    *((which, f"{name} missing", set_to(name, None)) for which, name in EVERYWHERE if name != "ctime"),
    *((which, f"{name} outside", outside(name)) for which, name in EVERYWHERE),
    *((which, f"{name} a soft link", linked(name, h5py.SoftLink("/kept"))) for which, name in EVERYWHERE),
    *((which, f"{name} elsewhere", linked(name, h5py.ExternalLink("x.h5", "/x"))) for which, name in EVERYWHERE),
    *((which, f"{name} virtual", virtual(name)) for which, name in EVERYWHERE),
    *((which, f"{name} huge", huge(name, *COLUMNS[name])) for which, name in EVERYWHERE),
    *((which, f"{name} compressed", chunked(name, *COLUMNS[name])) for which, name in EVERYWHERE),
    *((which, f"{name} a group", group(name)) for which, name in EVERYWHERE),
    *((which, f"{name} a number", set_to(name, 7)) for which, name in EVERYWHERE),
    *((which, f"{name} texts", set_to(name, ["a", "b"])) for which, name in EVERYWHERE),
    *((which, f"{name} without extent", set_to(name, h5py.Empty("i8"))) for which, name in EVERYWHERE),
    *((which, f"{name} short", lambda file, name=name: set_to(name, file[name][1:])(file)) for which, name in EVERYWHERE),  # type: ignore[misc]
    *(
        (which, f"{name} long", lambda file, name=name: set_to(name, np.concatenate([file[name][:]] * 2))(file))
        for which, name in EVERYWHERE
    ),  # type: ignore[misc]
    *(
        (which, f"{name} deep", lambda file, name=name: set_to(name, file[name][:][..., None])(file))
        for which, name in EVERYWHERE
    ),  # type: ignore[misc]
    *((which, f"dated {value!r}", attribute("checked_ns", value)) for which in ROWS for value in (None, "x", 1.5, [1, 2])),
    ("part", "features short", lambda file: set_to("features", file["features"][1:])(file)),
    ("part", "features of doubles", lambda file: set_to("features", file["features"][:].astype(float))(file)),
    ("part", "features of halves", lambda file: set_to("features", file["features"][:].astype(np.float16))(file)),
    ("part", "features wider", set_to("features", np.zeros((4, 7), np.float32))),
    ("part", "features of texts", set_to("features", ["a"] * 4)),
    ("part", "features missing", set_to("features", None)),
    ("part", "features outside", outside("features")),
    ("part", "features elsewhere", linked("features", h5py.ExternalLink("x.h5", "/x"))),
    ("part", "features a soft link", linked("features", h5py.SoftLink("/kept"))),
    ("part", "features virtual", virtual("features")),
    ("part", "features huge", huge("features", 3)),
    ("part", "features compressed", chunked("features", 3)),
    ("part", "features a group", group("features")),
    ("listing", "classes outside", outside("classes")),
    ("listing", "classes elsewhere", linked("classes", h5py.ExternalLink("x.h5", "/x"))),
    ("listing", "classes missing", set_to("classes", None)),
    ("listing", "classes too few", set_to("classes", np.array([b"a"]))),
    ("listing", "classes numbers", set_to("classes", np.arange(2))),
    ("listing", "classes huge", huge("classes")),
    ("listing", "labels outside", outside("label")),
    ("listing", "labels above", set_to("label", np.full(8, 2))),
    ("listing", "labels below", set_to("label", np.full(8, -1))),
    ("listing", "labels short", set_to("label", np.zeros(7, np.int64))),
    ("listing", "labels fractions", set_to("label", np.zeros(8))),
    ("listing", "splits above", set_to("split", np.full(8, 4, np.uint8))),
    ("listing", "splits short", set_to("split", np.zeros(7, np.uint8))),
    ("listing", "splits missing", set_to("split", None)),
]


@pytest.mark.parametrize(("which", "case", "change"), PLANTED, ids=[f"{which}: {case}" for which, case, _ in PLANTED])
def test_nothing_of_a_planted_file_is_believed(
    tmp_path: Path, which: str, case: str, change: Callable[[h5py.File], None]
) -> None:
    """A part or a listing whose hash fits and whose structure is not ours: one plain error, and a line of verify."""
    store = entry(tmp_path)
    replanted(store, which, change)

    with pytest.raises(StorageError):
        everything(store)
    with pytest.raises(StorageError):
        FeatureStore.open(store.path).write_table()
    assert FeatureStore.open(store.path).verify(), case


def test_files_of_before_are_read(tmp_path: Path) -> None:
    """Parts and listings without ctime, manifests without their own hash: an older cache stays what it was."""
    store = entry(tmp_path)
    for which in ROWS:
        replanted(store, which, lambda file: file.__delitem__("ctime"))
        (store.path / "manifest-3.json").rename(store.path / "manifest-2.json")
        said = json.loads((store.path / "manifest-2.json").read_bytes()) | {"number": 2}
        del said["check"]
        (store.path / "manifest-2.json").write_text(json.dumps(said))
        (store.path / "features.h5").touch()
        store = FeatureStore.open(store.path)
    (store.path / "features.h5").unlink()

    everything(store)
    assert store.verify() == []


@pytest.mark.parametrize("command", ["extract", "fit"])
@pytest.mark.parametrize(
    "file",
    ["spec.json", "manifest-*.json", "parts/*.h5", "parts/*.items.h5", "features.h5", "requests/*.json", "checked.json"],
)
def test_damaged_thumbnails_are_made_anew(run: Run, folder: Path, tmp_path: Path, command: str, file: str) -> None:
    """They are decoded once more, which is said in a line; embeddings are not computed again, and heads stay."""
    assert run("fit", folder, *TINY).code == 0
    (thumbnails,) = (tmp_path / "cache").glob("*/pixels.input-*")
    before = FeatureStore.open(thumbnails).features().X
    for path in thumbnails.glob(file):
        path.write_bytes(b"\0" * path.stat().st_size)
    draw_image(folder / "red" / "new.png", COLOURS["red"], 99)

    done = run(command, folder, *TINY)

    assert done.code == 0, done.err
    repaired = run("fit", folder, *TINY)
    assert repaired.code == 0, repaired.err
    if file not in {"features.h5", "requests/*.json", "checked.json"}:
        (line,) = {line for line in (done.err + repaired.err).splitlines() if "are made anew" in line}
        assert str(thumbnails) in line
    after = FeatureStore.open(thumbnails)
    assert after.verify() == []
    assert len(after.features().X) == len(before) + 1
    assert len(list((tmp_path / "cache").glob("*/*/heads/*.joblib"))) == 2


def test_what_a_backbone_computed_is_not_dropped(run: Run, folder: Path, tmp_path: Path) -> None:
    """Embeddings that are damaged are an error that names the file: they may have cost days."""
    assert run("extract", folder, *TINY).code == 0
    (embeddings,) = (tmp_path / "cache").glob("*/test_resnet*")
    (part,) = (path for path in embeddings.glob("parts/*.h5") if not path.name.endswith(".items.h5"))
    part.write_bytes(b"\0" * part.stat().st_size)

    done = run("extract", folder, *TINY)

    assert done.code == 4
    assert str(part) in done.err
    assert part.is_file()


def test_tuned_weights_outlive_damaged_pixels(run: Run, folder: Path, tmp_path: Path) -> None:
    """Pixels that a training read are decoded again; what was trained from them lies where it lay."""
    tune = ("finetune", folder, *TINY, "--unfreeze", "all", "--epochs", "1", "--lr", "0.001")
    assert run(*tune).code == 0
    (checkpoint,) = (tmp_path / "cache").glob("*/pixels.input-*/tuned/*.safetensors")
    before = checkpoint.read_bytes()
    for part in checkpoint.parent.parent.glob("parts/*.h5"):
        part.write_bytes(b"\0")

    done = run(*tune, "--seed", "1")

    assert done.code == 0, done.err
    assert "are made anew" in done.err
    assert checkpoint.read_bytes() == before


def test_a_hit_says_if_asked_what_was_there(run: Run, folder: Path, tmp_path: Path) -> None:
    """With -v a command tells entry, key, rows, when they were made and how, and heads that were fitted before."""
    assert run("fit", folder, *TINY).code == 0
    (embeddings,) = (tmp_path / "cache").glob("*/test_resnet*")

    told, brief = run("-v", "fit", folder, *TINY).err, run("fit", folder, *TINY).err

    entry_line, head_line = (
        line for line in told.splitlines() if line.startswith("Taken from the cache: ") and "pixels" not in line
    )
    for fact in ("36 rows", str(embeddings), embeddings.name[-8:], "made 20", "with torch"):
        assert fact in entry_line
    assert "logistic" in head_line
    assert "Taken from the cache" not in brief
