"""Advice for a terminal: the candidates, the evidence, how sure it is, and the textbook rule beside it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from featcache.datasets.thumbnails import STATISTICS
from featcache.display import Table, printable
from featcache.reports.wording import interval_text

if TYPE_CHECKING:
    from featcache.evaluation.metrics import Gap
    from featcache.evaluation.resampling import MoreSamples
    from featcache.experiments.advise import AdviceResult, Evidence
    from featcache.experiments.backbone_race import Standing

_DEPTHS = {
    "features": "train a head on its features only",
    "last": "train its last stages too",
    "all": "train all of its weights",
}
_UNSURE = 0.9  # below that a choice is called open


def advice_table(result: "AdviceResult") -> Table:
    """Return the candidates, the best first: accuracy on samples that a head had not seen, and the chance to be the best."""
    rows = [_standing_row(standing) for standing in result.standings]
    heads = [f"{head} %" for head in result.standings[0].accuracies]
    title = f"{result.dataset}: heads on features, on samples that they had not seen"
    return Table(("backbone", "samples", *heads, "best or as good", "s per 1,000", ""), rows, title)


def _standing_row(standing: "Standing") -> tuple[str, ...]:
    price = standing.runner.price(1000)
    cells = (f"{100 * accuracy:.1f}" for accuracy in standing.accuracies.values())
    chance = _percent_sure(standing.chance)
    where = "left there" if standing.is_left else ""
    name = standing.runner.spec.text
    return (name, str(standing.samples), *cells, chance, f"{price:.1f}" if price else "cached", where)


def advice_lines(result: "AdviceResult") -> Iterator[str]:
    """Yield the candidates, then the answers, each with what it rests on."""
    yield advice_table(result).plain()
    yield ""
    name, evidence = printable(result.backbone.text), result.evidence
    if len(result.standings) == 1:
        yield f"Backbone: {name}, the only candidate."
    else:
        open_ = "" if result.chance >= _UNSURE else "; that is open, compare the best ones on all samples"
        told = _percent_sure(result.chance)
        yield f"Backbone: {name}. {told} sure that no candidate is better by over half a point{open_}."
    depth, sure = evidence.depth
    yield f"Weights: {_DEPTHS[depth]}. {_sureness(evidence, sure)}"
    yield f"The textbook rule: {_textbook(evidence)}"
    yield f"More samples: {more_text(result.more)}"
    yield ""
    yield "Evidence:"
    yield from (f"  {line}" for line in evidence_lines(evidence))
    if result.missing:
        yield f"Not measured: {'; '.join(result.missing)}."
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    yield f"Cost: {spent}. Rows stay in the cache; the test split was not looked at."


def _percent_sure(chance: float) -> str:
    # draws of one sample never make certain, whatever share of them agrees
    return "over 99 %" if chance > 0.99 else "under 1 %" if chance < 0.01 else f"{100 * chance:.0f} %"


def _sureness(evidence: "Evidence", sure: float | None) -> str:
    if sure is None:
        return "How sure that is was not measured: no short training was made."
    does = "does not pay" if evidence.depth[0] == "features" else "pays"
    open_ = "" if sure >= _UNSURE else "; that is open, a fine-tuning will tell"
    return f"{_percent_sure(sure)} sure, by a short training of the last stage, that it {does} by over half a point{open_}."


def _textbook(evidence: "Evidence") -> str:
    if evidence.textbook is None:
        return "needs to know whether the task is like the backbone's, which was not measured."
    kind = {True: "like what the last features tell", False: "unlike it: earlier layers add", None: "of unknown kind"}
    amount = f"{evidence.samples} training samples, {kind[evidence.is_similar]}"
    return f"{_DEPTHS[evidence.textbook]} ({amount})."


def more_text(more: "MoreSamples | None") -> str:
    """Return what more samples would bring to a head on features."""
    if more is None:
        return "too few for a learning curve, or too few of them wrong."
    low, high = more.interval
    nothing = "; it may be nothing" if low <= 0 else ""
    return (
        f"+{more.samples} to {more.now}: {more.points:+.1f} points, {low:+.1f} to {high:+.1f}{nothing} (a head on features; "
        f"the error falls as samples to the power of {more.slope:.2f})."
    )


def evidence_lines(evidence: "Evidence") -> Iterator[str]:
    """Yield what was measured, a line each."""
    size = f"{evidence.samples} samples of {evidence.classes} classes"
    yield f"{size} to train and choose on, {evidence.seen} of them looked at"
    told = ", ".join(f"{head} {100 * accuracy:.1f} %" for head, accuracy in evidence.accuracies.items())
    statistics = "" if evidence.statistics is None else f", neighbours by {STATISTICS} {100 * evidence.statistics:.1f} %"
    yield f"heads on features: {told}; without a backbone: commonest class {100 * evidence.majority:.1f} %{statistics}"
    if evidence.layers is not None:
        yield f"several layers less the last one: {_gain_text(evidence.layers)}"
    if evidence.tuned is not None:
        wrong = "" if evidence.error_left is None else f"; it leaves {100 * evidence.error_left:.1f} % wrong"
        yield f"last stage shortly trained less its probe, on the same samples: {_gain_text(evidence.tuned)}{wrong}"


def _gain_text(gap: "Gap") -> str:
    return f"{gap.points:+.1f} points ({interval_text(gap.ci, 1, 1)}, p = {gap.p_value:.2g})"
