"""A page to send: it loads nothing, runs nothing of a stranger's, and says what the records say."""

import base64
import csv
import hashlib
import io
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import TINY, Run, draw_subtle
from test_tables import record_of, tuned_record

import featcache
from featcache.cli.studies import command_of
from featcache.datasets.decoding import TILE, sheet_of
from featcache.display import csv_cell, latex_cell, markdown_cell
from featcache.experiments.report import best_head, projected, reliability
from featcache.reports import RunRecord, append_record, read_records
from featcache.reports.page import Cell, Confusion, DatasetEvidence, Scatter, Shown, Suspicion, answer_of, render
from featcache.reports.svg import Mark, pareto
from featcache.reports.tables import rows, short_table, to_csv

LAB = Path(__file__).parent.parent / "benchmarks"
VOID = {"meta", "link", "br", "img", "input"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><svg onload=alert(1)>",
    "=cmd|' /C calc'!A1",
    "\N{FULLWIDTH EQUALS SIGN}1+1",
    "{{ 7*7 }}{% raw %}",
    "a\x1b[2Jb\x07\r\n| forged | row |",
    "abc\u202egpj.exe\u2066\u200b",
    "[x](javascript:alert(1)) ![y](http://evil.example/p.png) `z`",
    "\\input{/etc/passwd} \\write18{x} % & $ # _ ^ ~",
    "[0pt]",
    "&lt;b&gt; &amp; &#x202e;",
)


class Page(HTMLParser):
    """What a page holds: elements with their attributes, texts by element; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close one."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note a text."""
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self) -> str:
        """Return all that can be read."""
        return " ".join(data for tag, data in self.texts if tag not in {"script", "style"})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[RunRecord]]:
    """Images that are hard to tell apart, a cache with two heads on them, and their records."""
    root = tmp_path_factory.mktemp("page")
    images = draw_subtle(root / "subtle")
    settings = featcache.Settings(root / "cache", batch_size=8)
    spec = featcache.BackboneSpec("test_resnet", random_init=0, overrides=featcache.TransformOverrides(input_size=32))
    plan = featcache.FitPlan(("knn", "logistic"), baselines=False)
    result = featcache.fit(images, spec, plan=plan, settings=settings)
    return images, root / "cache", [head.record for head in result.heads]


@pytest.fixture(scope="module")
def page(fitted: tuple[Path, Path, list[RunRecord]]) -> str:
    """The page of these records."""
    return featcache.report(files={"html": None}, cache=fitted[1]).texts["html"]


def test_a_page_loads_nothing(page: str) -> None:
    """No attribute and no rule of style names anything outside the file; the policy would forbid it."""
    parsed = Page(page)
    links = [value for _, attributes in parsed.elements for name, value in attributes.items() if name in {"href", "src"}]

    assert all(value == "data:," or (value or "").startswith("#") for value in links)
    assert all(address.startswith("data:image/webp;base64,") for address in re.findall(r"url\(\"?([^)\"]*)", page))
    assert "@import" not in page
    assert not re.findall(r"https?:|fetch|XMLHttp|\beval\b", re.sub(r"base64,[^\"]*", "", page))


def test_the_policy_knows_the_one_script_and_the_style_by_their_hashes(page: str) -> None:
    """Both are what the hashes in the policy are of, and nothing else of the kind is there."""
    parsed = Page(page)
    (policy,) = [facts["content"] for tag, facts in parsed.elements if facts.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    for kind in ("script", "style"):
        (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert not [name for _, facts in parsed.elements for name in facts if name == "style" or name.startswith("on")]


def test_the_page_says_what_the_records_say(page: str, fitted: tuple[Path, Path, list[RunRecord]]) -> None:
    """Each row of the table, how many test images are right, and the number of mistakes are those of the records."""
    _, cache, records = fitted
    text = Page(page).text()
    head, _ = best_head(records, cache)
    assert head is not None
    counts = [int(count) for count in re.findall(r": (\d+) images\"", page)]
    right = [int(count) for count in re.findall(r"\"(?:a taken for a|b taken for b|c taken for c): (\d+) images\"", page)]

    for row in rows(records):
        assert all(cell in text for cell in row[:7])
    assert sum(counts) == head.record.split["test"]
    assert sum(right) == head.record.right.count("1")
    assert f"of {head.record.right.count('0')} wrong answers of {head.record.method}" in text


def test_reliability_is_the_calibration_error_in_a_picture(fitted: tuple[Path, Path, list[RunRecord]]) -> None:
    """The distances of its points from the diagonal, weighted by their images, come to the record's error."""
    _, cache, records = fitted
    head, _ = best_head(records, cache)
    assert head is not None
    bins = reliability(head.tested)
    total = sum(each.count for each in bins)
    error = sum(each.count / total * abs(each.accuracy - each.confidence) / 100 for each in bins)

    assert total == len(head.record.right)
    assert error == pytest.approx(head.record.test["ece"], abs=1e-6)


def test_a_page_without_images_has_no_pixel(fitted: tuple[Path, Path, list[RunRecord]], page: str) -> None:
    """Without ``images`` neither sheet nor tile is in it; charts, matrix, paths of mistakes and map are."""
    plain = featcache.report(files={"html": None}, plan=featcache.PagePlan(samples=False), cache=fitted[1]).texts["html"]

    assert "data:image" in page
    assert "data:image" not in plain
    assert not [
        facts
        for _, facts in Page(plain).elements
        if "data-tile" in facts or (facts.get("role") == "img" and "t" in str(facts.get("class")).split())
    ]
    assert plain.count("<circle") >= 60
    assert 'class="map"' in plain


def test_images_that_cannot_be_read_any_more_are_not_shown(
    fitted: tuple[Path, Path, list[RunRecord]], tmp_path: Path
) -> None:
    """One that was changed, and a folder that is gone, cost their pictures and no more; the page says so."""
    images, _, _ = fitted
    moved = shutil.copytree(images, tmp_path / "subtle")
    settings = featcache.Settings(tmp_path / "cache", batch_size=8)
    spec = featcache.BackboneSpec("test_resnet", random_init=0, overrides=featcache.TransformOverrides(input_size=32))
    featcache.fit(moved, spec, plan=featcache.FitPlan(("knn",), baselines=False), settings=settings)
    (moved / "a" / "00.png").write_bytes((moved / "b" / "00.png").read_bytes())
    changed = featcache.report(files={"html": None}, cache=settings.cache).texts["html"]
    shutil.rmtree(moved)
    gone = featcache.report(files={"html": None}, cache=settings.cache).texts["html"]

    assert "1 of 60 images that had a place here cannot be read any more, or have changed since" in changed
    assert "data:image" in changed
    assert "The samples cannot be read any more, so that none is shown" in gone
    assert "data:image" not in gone
    assert "Map of the embeddings" in gone


@pytest.mark.parametrize("artefact", ["", "../outside.joblib", "/etc/passwd", "subtle/nowhere/heads/x.joblib"])
def test_a_strangers_record_leads_nowhere(artefact: str, fitted: tuple[Path, Path, list[RunRecord]]) -> None:
    """A path that leads out of the cache, or to no head of this user, is not followed: the page has the record alone."""
    _, cache, records = fitted
    (cache.parent / "outside.joblib").write_bytes(b"")
    head, remarks = best_head([replace(records[0], artefact=artefact)], cache)

    assert head is None
    assert "not in the cache" in remarks[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_inert_on_a_page(name: str, fitted: tuple[Path, Path, list[RunRecord]]) -> None:
    """Whatever a stranger calls a data set, a class, a file or a method, the page has its elements and nothing more."""
    _, _, records = fitted
    record = replace(records[0], environment={"platform": name, "versions": {name: name}})
    hostile = replace(record, dataset=name, method=name, backbone=name)

    def drawn(record: RunRecord, name: str) -> Page:
        shown = Shown(name, name, f"{name}2", 0.5, None, name, name)
        cell = Cell(name, f"{name}2", 1, (shown,))
        evidence = DatasetEvidence(
            head=name,
            confusion=Confusion(((cell, None), (None, cell)), (name, f"{name}2")),
            mistakes=(shown,),
            suspicions=(Suspicion(name, 1, (shown,)),),
            scatter=Scatter(((0.0, 1.0), (1.0, 0.0)), (shown, shown), (name,), name, 2),
            facts=((name, name),),
            left_out=((name, name),),
            remarks=(name,),
        )
        return Page(render([record], {record.dataset: evidence}, None, lambda record: record.dataset))

    page, usual = drawn(hostile, name), drawn(replace(record, dataset="x", method="x", backbone="x"), "x")

    assert [tag for tag, _ in page.elements] == [tag for tag, _ in usual.elements]
    assert [sorted(facts) for _, facts in page.elements] == [sorted(facts) for _, facts in usual.elements]
    assert all(char.isprintable() or char in " \n" for _, text in page.texts for char in text)
    assert all((value or "").isprintable() for tag, facts in page.elements for value in facts.values())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_inert_in_tables(name: str) -> None:
    """No format obeys a name: CSV runs no formula, Markdown has no markup or link, LaTeX no command, none an escape."""
    (record, *_) = read_records([LAB / "quickstart.jsonl"])
    record = replace(record, dataset=name, method=name)
    _, line = csv.reader(io.StringIO(to_csv([record])))
    plain = short_table([record]).plain()

    assert not line[0].startswith(("=", "+", "-", "@", "\t", "\r", "\N{FULLWIDTH EQUALS SIGN}"))
    assert all(char.isprintable() for cell in line for char in cell)
    assert all(char.isprintable() or char == "\n" for char in plain)
    assert len(plain.splitlines()) == 4  # with the note
    bare = re.sub(r"\\[\\`*\[\]<>|&~#$/._]", "", markdown_cell(name))
    assert not re.search(r"[`*\[\]<>|&]|://|\n", bare)
    escaped = re.sub(
        r"\\(?:textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar)\{\}|\\[{}$&#_%]",
        "",
        latex_cell(name),
    )
    assert not re.search(r"[\\$&#^_~%]|\n", escaped)
    assert not set(re.sub(r"\{[\[\]*]\}", "", escaped)) & set("[]{}*")


def test_plain_names_stay_as_they_are() -> None:
    """Escaping costs a usual name nothing in Markdown and CSV; LaTeX needs its underscore escaped."""
    for name in ("mobilenetv2_100", "last:1", "cifar10-5k", "± 1.2 (3 seeds)", "blocks.3", "größer"):
        assert markdown_cell(name) == csv_cell(name) == name
    assert latex_cell("mobilenetv2_100") == r"mobilenetv2\_100"


def test_a_sheet_stays_small() -> None:
    """600 tiles of noise, which nothing can pack, come to at most 1 MB, and a page with them to at most 2 MB."""
    rng = np.random.default_rng(0)
    tiles = list(rng.integers(0, 256, (600, TILE, TILE, 3), dtype=np.uint8))

    sheet = sheet_of(tiles, 1_000_000)

    assert (sheet.count, sheet.rows) == (600, 24)
    assert len(sheet.content) <= 1_000_000


@pytest.mark.parametrize("name", ["lab-lite0", "gap", "lab", "quickstart"])
def test_committed_records_have_a_page(name: str, tmp_path: Path) -> None:
    """It is whole without their cache: answers, table and charts, with every accuracy as the table in Markdown has it."""
    records = read_records([LAB / f"{name}.jsonl"])
    result = featcache.report(LAB / f"{name}.jsonl", {"html": tmp_path / "page.html", "tex": None}, cache=tmp_path)
    text = Page((tmp_path / "page.html").read_text()).text()

    assert result.paths == {"html": str(tmp_path / "page.html")}
    assert all(row[3] in text for row in rows(records))
    assert result.texts["tex"].count(r"\\") == len(rows(records)) + 1
    assert "<svg" in result.texts["html"]
    assert len(result.texts["html"]) < 500_000


def test_a_gaps_steps_are_drawn_in_their_order(tmp_path: Path) -> None:
    """JSON sorts them by name; the waterfall begins with the linear probe and ends with the whole network."""
    text = featcache.report(LAB / "gap.jsonl", {"html": None}, datasets=["flowers5"], cache=tmp_path).texts["html"]
    (drawing,) = re.findall(r'<svg[^>]*"d0-gap0-title[^>]*>(.*?)</svg>', text, re.DOTALL)
    names = re.findall(r'class="tick end">([a-z]\w*:?\d?)</text>', drawing)

    assert names == ["linear", "pooling", "layers", "attentive", *(f"last:{depth}" for depth in range(1, 8)), "all"]


@pytest.mark.parametrize(
    "params",
    [{}, {"steps": 1}, {"steps": {"linear": 3}}, {"steps": {"a": {"test": "x"}}}, {"curve": [[1]], "best_epoch": "x"}],
)
def test_records_that_were_edited_cost_a_chart_and_no_page(params: dict[str, Any]) -> None:
    """What is not as it is written there is not drawn."""
    records = [replace(record, params=params) for record in read_records([LAB / "gap.jsonl", LAB / "quickstart.jsonl"])]

    page = render(records, {}, None, lambda record: record.method)

    assert Page(page).text().count("Accuracy against cost") >= 1


LITE = record_of(method="knn", val=0.9, backbone="lite0", cell="lite", right="1" * 39 + "0")


def test_the_answer_says_which_backbone_was_fine_tuned() -> None:
    """That training one gained nothing tells nothing of another, whose heads are better; nor does what it lost to them."""
    tuned = tuned_record(0.7, epoch=0, backbone="mini", right="1" * 20 + "0" * 20)
    gained = replace(tuned, params={"best_epoch": 2})
    own = replace(tuned, backbone="lite0", method="last:2", cell="own")

    assert answer_of([LITE, tuned]).sentence == (
        "knn on frozen lite0 features is the best head on validation; fine-tuning mini (last:1) gained nothing there. "
        "Nothing on lite0 was fine-tuned yet."
    )
    assert answer_of([LITE, tuned, own]).sentence == (
        "Stay with knn on frozen lite0 features: fine-tuning (last:2) gained nothing on validation."
    )
    sentence = answer_of([LITE, gained]).sentence
    assert sentence.startswith("Fine-tuning mini is worse here: last:1 comes to -47.5 points")
    assert "to knn on frozen lite0 features, for " in sentence
    assert sentence.endswith(" Nothing on lite0 was fine-tuned yet.")
    assert "Nothing on" not in answer_of([LITE, gained, own]).sentence


def test_a_data_set_that_was_copied_is_still_reported(tmp_path: Path) -> None:
    """Under each of its names, and what a gap is stands below the table."""
    photos = replace(LITE, dataset="photos")
    for record in (photos, replace(photos, dataset="pics")):
        append_record(tmp_path / "runs.jsonl", record)

    both = featcache.report(tmp_path / "runs.jsonl", {}, cache=tmp_path)
    first = featcache.report(tmp_path / "runs.jsonl", {}, datasets=["photos"], cache=tmp_path)

    assert [row[0] for row in both.table().rows] == ["photos", "pics"]
    assert [record.dataset for record in first.records] == ["photos"]
    assert repr(both).endswith("gap: points of test accuracy to the head that is best on validation, on the same samples")


def test_the_front_has_what_nothing_cheaper_is_as_good_as() -> None:
    """A dearer point that is no better, and a cheaper one that is worse than none, are told apart."""
    cheap, equal, dear, worse = Mark(1, 80), Mark(2, 80), Mark(3, 90), Mark(4, 70)

    assert pareto([worse, dear, equal, cheap]) == [cheap, dear]


def test_a_map_is_that_of_scikit_learn() -> None:
    """The plane is that of the two directions of greatest variance, wide or tall, and the same in every run."""
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    for shape in ((40, 9), (9, 40)):
        X = rng.normal(size=shape) * np.linspace(1, 3, shape[1])
        plane, expected = projected(X), PCA(2).fit(X)

        np.testing.assert_allclose(np.abs(plane.xy), np.abs(expected.transform(X)), rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(plane.xy, projected(X).xy)
        assert f"{100 * expected.explained_variance_ratio_.sum():.0f} %" in plane.how


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour such as #1f5fbf (WCAG 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_told_apart() -> None:
    """Every text has a contrast of 4.5 to what is behind it, light, dark and printed; so has every colour of a chart."""
    style = (resources.files("featcache") / "assets" / "page.css").read_text()
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    pairs = [
        (ink, back)
        for ink in ("ink", "soft", "accent", *(f"c{number}" for number in range(10)))
        for back in ("card", "back")
    ]
    pairs += [("on-good", "good"), ("on-bad", "bad"), ("ink", "remark")]

    assert len(themes) == 3
    for theme in themes:
        for ink, back in pairs:
            dark, light = sorted((luminance(theme[ink]), luminance(theme[back])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, back)


def test_the_command_of_a_record_makes_it_again(run: Run, tmp_path: Path) -> None:
    """What the page says was typed leads to the same experiment, whatever was asked for."""
    images = draw_subtle(tmp_path / "subtle", per_class=10)
    usual = [str(word) for word in (images, *TINY[:-2])]
    asked = [
        ("fit", *usual, "--head", "logistic", "--grid", "C=0.1,1", "--seed", "3", "--folds", "3", "--no-baselines"),
        ("fit", *usual, "--head", "ridge", "--layers", "layer3,layer4", "--views", "2", "--no-baselines"),
        ("finetune", *usual, "--unfreeze", "last:1", "--epochs", "1", "--lr", "0.001", "--train-batch", "16", "--no-refit"),
    ]
    for command in asked:
        assert run(*command, "--json").code == 0
    file = tmp_path / "cache" / "records" / "runs.jsonl"
    before = {
        record.cell: record for record in read_records([file]) if record.method != "logistic" or record.request.get("grid")
    }
    for cell, record in before.items():
        file.unlink(missing_ok=True)
        _, *words = shlex.split(command_of(record, str(images)))
        assert run(*words, "--json").code == 0
        assert cell in {again.cell for again in read_records([file])}, words


def test_the_command_prints_and_writes(run: Run, folder: Path, tmp_path: Path) -> None:
    """Without a file the table is printed; ``-`` is stdout; JSON says what was written; an absent data set is named."""
    assert run("fit", folder, *TINY, "--head", "ridge", "--no-baselines").code == 0
    assert "ridge" in run("report").out
    assert run("report", "--md", "-").out.startswith("| dataset")
    written = run("report", "--html", tmp_path / "page.html", "--csv", tmp_path / "t.csv", "--json").json

    assert written["files"] == {"html": str(tmp_path / "page.html"), "csv": str(tmp_path / "t.csv")}
    assert written["bytes"]["html"] == (tmp_path / "page.html").stat().st_size
    missing = run("report", "--dataset", "nothing", "--html", tmp_path / "no.html")
    assert missing.code == 3
    assert "there are images" in missing.err
    assert run("report", tmp_path / "none.jsonl").code == 3
    assert run("report", "--md", "-", "--json").code == 2


def test_commands_say_how_a_page_is_made(run: Run, tmp_path: Path) -> None:
    """What ``fit`` says on stderr makes the page, with its learning curve; after an audit its suspects are on it too."""
    images = draw_subtle(tmp_path / "subtle", per_class=12)
    shutil.copy(images / "a" / "00.png", images / "b" / "copy.png")
    (told,) = re.findall(
        r"featcache (report .*)", run("fit", images, *TINY, "--head", "knn", "--curve", "--no-baselines").err
    )
    assert run("audit", images, *TINY).code == 0
    _, *words = shlex.split(told)
    place = tmp_path / "page.html"
    assert run("report", *(str(place) if word == "subtle.html" else word for word in words)).code == 0
    page = place.read_text()

    assert "Accuracy by training samples: knn" in page
    assert "Suspects of the audit" in page
    assert "copy of" in Page(page).text()
    assert "--curve" not in page
