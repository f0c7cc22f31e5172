"""One ONNX model of a backbone and its head: decoded samples in, scores out."""

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import VotingClassifier
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from featcache.backbones.attention import AttentiveHead
from featcache.backbones.base import TorchRuntime
from featcache.datasets import Dataset
from featcache.display import logger
from featcache.errors import DataError, SetupError, UnreadableSample, UsageError
from featcache.evaluation import ColumnCoder
from featcache.evaluation.metrics import LEAST_SCALED, at_temperature
from featcache.experiments.predict import cache_of
from featcache.extraction.feature_cache import Settings
from featcache.extraction.runtimes import own_randomness
from featcache.heads.bundle import Bundle
from featcache.heads.nonlinear import TEMPERATURE
from featcache.heads.rejection import UNFAMILIAR, ClassCentres, Neighbours, Rejection, RejectPlan, centre_nearness
from featcache.specs import Views
from featcache.store.disk import replace_file

AGREEMENT = 1e-4
_CHECKED = 16
_EXPORTABLE = "centroid, ridge, knn, logistic, svm, selected, lda, rbf, mlp, attentive, or an ensemble of them"


@dataclass(frozen=True)
class ModelFile:
    """What is written: where it goes, and when it shall say that it does not know, if it shall."""

    path: Path
    reject: RejectPlan | None = None


@dataclass(frozen=True)
class Exported:
    """A model that was written: the greatest difference of its scores from the head's own on so many samples.

    ``notes`` say where its answers are not those of ``predict``.
    """

    path: Path
    difference: float
    samples: int
    notes: tuple[str, ...] = ()


@own_randomness()  # of new layers
def export(bundle: Bundle, file: ModelFile, check: Dataset, settings: Settings, *, weights: str | None = None) -> Exported:
    """Write backbone and head as one ONNX model, once it has agreed with them on real samples.

    The input is what the backbone's ``preprocess`` makes of a sample, called by its ``input_name``, with a batch before it:
    the model's metadata say how it is made, normalising is inside.
    Output ``scores`` is float32 (batch, classes): probabilities where the head knows them, scaled by its temperature
    as those of ``predict``. It looks at one view of a sample; a head that averages several says so in a note.
    Asked when it does not know, it has the outputs ``set``, bool (batch, classes), and ``familiar``, float32 (batch,), as
    ``heads.rejection`` has them; the metadata ``reject`` say the coverage, and up to which share a sample is unfamiliar.

    Args:
        bundle: the head.
        file: what to write.
        check: samples to compare on.
        settings: of the backbone's device.
        weights: where the backbone's weights file is now.

    Raises:
        SetupError: ONNX is not installed.
        UsageError: the head is of a kind that cannot be exported, or cannot say so that it does not know.
        DataError: no sample of ``check`` can be read, the model disagrees, or another network lies behind the backbone's
            name than when the head was trained.
    """
    _require_one_class_alone(bundle)
    path, rejection = file.path, _rejection(bundle, file.reject)
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise SetupError("export needs ONNX: `pip install 'featcache[onnx]'`.") from None
    cache = cache_of(bundle, check, settings, weights)
    preprocess, arrays = cache.backbone.preprocess, []
    for item in check.samples:
        try:
            arrays.append(preprocess(check.read(item.path), Views())[0])
        except (OSError, ValueError, UnreadableSample):
            continue
        if len(arrays) == _CHECKED:
            break
    if not arrays:
        raise DataError(f"{check.location}: none of its {check.kind}s can be read to check the model on.")
    samples, name = np.stack(arrays), preprocess.input_name
    head, temperature = _as_module(bundle.estimator, len(bundle.classes)), bundle.card.get("scaled_by")
    head = head if temperature is None else _Scaled(head, temperature)
    model = _Whole(cache.backbone.program((bundle.card.get("cut", "pooled"),)), head, rejection).eval()
    outputs = _outputs(rejection)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draft = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (torch.from_numpy(samples[:2] if len(samples) > 1 else np.repeat(samples, 2, axis=0)),),
            str(draft),
            input_names=[name],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        proto = onnx.load(str(draft))
    facts = {"classes": list(bundle.classes), "transform": asdict(preprocess.spec), "head": bundle.card.get("head", "")}
    if rejection is not None:
        facts["reject"] = asdict(rejection.plan) | {"unfamiliar": UNFAMILIAR}
    for fact, value in facts.items():
        proto.metadata_props.add(key=fact, value=json.dumps(value))
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    program = cache.backbone.program((bundle.card.get("cut", "pooled"),))
    (features,) = TorchRuntime(program, cache.backbone.device, cache.spec.precision)(samples)
    expected = _expected(bundle, features)
    alone, together = session.run(outputs, {name: samples[:1]}), session.run(outputs, {name: samples})
    got = [np.concatenate([first, rest[1:]]) for first, rest in zip(alone, together, strict=True)]
    difference = _difference(got[0], expected)
    if difference > AGREEMENT:
        raise DataError(f"{path}: not written, the model's scores differ by {difference:.1g} from the head's own.")
    if rejection is not None and (unlike := _judged_otherwise(got, rejection, expected, features)):
        raise DataError(f"{path}: not written, the model's {unlike} is not the head's own.")
    replace_file(path, content)
    return Exported(path, difference, len(samples), _notes(bundle, path))


def _require_one_class_alone(bundle: Bundle) -> None:
    """Refuse a head that tells more than one class a sample, or needs more than the sample.

    Raises:
        UsageError: so it is.
    """
    if bundle.card.get("target", "label") != "label":
        raise UsageError(f"{bundle.path}: only heads of one class a sample can be exported.")
    if columns := bundle.card.get("columns"):
        names = ", ".join(ColumnCoder.of_card(columns).names)
        raise UsageError(f"{bundle.path}: a model takes samples alone, and this head needs the columns {names} beside them.")


def _notes(bundle: Bundle, path: Path) -> tuple[str, ...]:
    """Return, and log, where the model's answers are not those of ``predict``."""
    if (views := bundle.card.get("views", 1)) == 1:
        return ()
    note = f"the head averages its answers over {views} views of a sample, this model answers on the plain view alone"
    logger.warning("%s: %s", path, note)
    return (note,)


def _rejection(bundle: Bundle, plan: RejectPlan | None) -> Rejection | None:
    """Return when a model shall say that it does not know, ``None`` where that is not asked.

    Raises:
        UsageError: a model cannot say it as the head does.
        DataError: as of ``Rejection.of``.
    """
    if plan is None:
        return None
    if plan.sets != "lac":
        raise UsageError(
            f"`sets` {plan.sets}: goes by a hash of a sample's bytes, of which a model knows nothing: take lac."
        )
    if (views := bundle.card.get("views", 1)) > 1:
        raise UsageError(f"`reject`: the head was calibrated on answers over {views} views, a model gives those of one.")
    return Rejection.of(bundle, plan)


def _outputs(rejection: Rejection | None) -> list[str]:
    if rejection is None:
        return ["scores"]
    return ["scores", "set", *(["familiar"] if rejection.familiar is not None else [])]


def _judged_otherwise(
    got: Sequence[NDArray[Any]], rejection: Rejection, expected: NDArray[Any], features: NDArray[Any]
) -> str:
    """Return which output is not what ``predict`` says of the same samples, "" where none is; rounding is no difference."""
    # contents decide nothing of these sets
    judged = rejection.judge(expected, features.astype(np.float32), [""] * len(expected))
    is_near = np.abs(1 - expected - rejection.threshold) <= AGREEMENT
    if not np.array_equal(got[1] | is_near, judged.sets | is_near):
        return "set"
    if rejection.familiar is None:
        return ""
    familiarity = rejection.familiar.familiarity(features.astype(np.float32))
    low, high = (rejection.familiar.share_of(familiarity + step) for step in (-AGREEMENT, AGREEMENT))
    return "" if ((low - AGREEMENT <= got[2]) & (got[2] <= high + AGREEMENT)).all() else "familiar"


class _Familiarity(nn.Module):
    """Shares of ``Neighbours`` or ``ClassCentres``, features (b, d) -> (b,)."""

    mean: Tensor
    usual: Tensor

    def __init__(self, familiar: Neighbours | ClassCentres) -> None:
        super().__init__()
        self.familiarity = _votes if isinstance(familiar, Neighbours) else _nearness
        self.widths = familiar.widths.tolist() or [len(familiar.mean)]
        for name, values in vars(familiar).items():
            if name != "widths":
                self.register_buffer(name, torch.from_numpy(values.astype(np.float32)))

    def forward(self, features: Tensor) -> Tensor:
        layers = (features - self.mean).split_with_sizes(self.widths, dim=1)
        units = [layer / layer.norm(dim=1, keepdim=True).clamp(min=1e-12) for layer in layers]
        rows = torch.cat(units, dim=1) / math.sqrt(len(units))
        at_most = (self.usual[None] <= self.familiarity(self, rows)[:, None]).to(torch.float32).sum(dim=1)
        shares: Tensor = (1 + at_most) / (1 + len(self.usual))
        return shares


def _votes(arrays: Any, rows: Tensor) -> Tensor:
    """``Neighbours.familiarity`` of unit rows (b, d) -> (b,)."""
    votes = torch.exp(2 * (rows @ arrays.rows.T - 1)) @ arrays.votes
    greatest: Tensor = votes.amax(dim=1)
    return greatest


def _nearness(arrays: Any, rows: Tensor) -> Tensor:
    """``ClassCentres.familiarity`` of unit rows (b, d) -> (b,)."""
    nearness: Tensor = centre_nearness(arrays, rows, lambda distances: distances.amin(dim=1))
    return nearness


class _Whole(nn.Module):
    def __init__(self, program: nn.Module, head: nn.Module, rejection: Rejection | None) -> None:
        super().__init__()
        self.program = program
        self.head = head
        self.threshold = None if rejection is None else rejection.threshold
        familiar = None if rejection is None else rejection.familiar
        self.familiarity = None if familiar is None else _Familiarity(familiar)

    def forward(self, samples: Tensor) -> tuple[Tensor, ...]:
        (features,) = self.program(samples)
        scores: Tensor = self.head(features)
        if self.threshold is None:
            return (scores,)
        inside = 1 - scores <= self.threshold
        return (scores, inside) if self.familiarity is None else (scores, inside, self.familiarity(features))


def _expected(bundle: Bundle, features: NDArray[Any]) -> NDArray[Any]:
    estimator = bundle.estimator
    scores = np.full((len(features), len(bundle.classes)), _of_unknown(estimator))
    found = (
        estimator.predict_proba(features) if hasattr(estimator, "predict_proba") else estimator.decision_function(features)
    )
    scores[:, estimator.classes_] = np.stack([-found, found], axis=1) if found.ndim == 1 else found
    temperature = bundle.card.get("scaled_by")
    return scores if temperature is None else at_temperature(scores, temperature)


def _of_unknown(estimator: Any) -> float:
    """Return the score of a class that a head never saw: no probability, or a decision against it."""
    return 0.0 if hasattr(estimator, "predict_proba") else -np.inf


def _difference(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the greatest difference, relative to the greatest score; infinite where they rule out other classes."""
    known = np.isfinite(expected)
    if not np.array_equal(known, np.isfinite(got)):
        return np.inf
    got, expected = got[known], expected[known]
    return float(np.abs(got - expected).max() / max(1.0, float(np.abs(expected).max())))


def _as_module(estimator: Any, classes: int) -> nn.Module:
    """Return a fitted head as a module, features (b, d) -> scores (b, classes).

    Raises:
        UsageError: there is no way to write this kind of head.
    """
    if isinstance(estimator, VotingClassifier):
        return _Mean([_as_module(member, classes) for member in estimator.estimators_])
    steps = [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else [estimator]
    for step in steps:
        if type(step) not in _WRITERS:
            raise UsageError(f"{type(step).__name__} heads cannot be exported: use {_EXPORTABLE}.")
    return nn.Sequential(
        *(_WRITERS[type(step)](step) for step in steps), _Spread(steps[-1].classes_, classes, _of_unknown(steps[-1]))
    )


class _Affine(nn.Module):
    """Scores of a linear model; of two classes the one row becomes two."""

    def __init__(self, weights: NDArray[Any], bias: NDArray[Any], *, probabilities: bool) -> None:
        super().__init__()
        if len(weights) == 1:
            zero = 0.0 if probabilities else -1.0
            weights, bias = np.concatenate([zero * weights, weights]), np.concatenate([zero * bias, bias])
        self.linear = nn.Linear(weights.shape[1], len(weights))
        self.linear.weight.data = torch.from_numpy(weights.astype(np.float32))
        self.linear.bias.data = torch.from_numpy(bias.astype(np.float32))
        self.finish = nn.Softmax(dim=1) if probabilities else nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        scores: Tensor = self.finish(self.linear(rows))
        return scores


class _Constants(nn.Module):
    """Applies a function of the rows and of some constants."""

    def __init__(self, act: Callable[..., Tensor], *constants: NDArray[Any]) -> None:
        super().__init__()
        self.act = act
        self.count = len(constants)
        for number, constant in enumerate(constants):
            kind = np.int64 if constant.dtype.kind == "i" else np.float32
            self.register_buffer(f"constant{number}", torch.from_numpy(constant.astype(kind)))

    def forward(self, rows: Tensor) -> Tensor:
        return self.act(rows, *(getattr(self, f"constant{number}") for number in range(self.count)))


class _Spread(nn.Module):
    """Puts the scores of the classes that a head knows into their places among all."""

    def __init__(self, known: NDArray[np.int64], classes: int, unknown: float) -> None:
        super().__init__()
        place = torch.zeros(len(known), classes)
        place[torch.arange(len(known)), torch.from_numpy(np.asarray(known))] = 1
        rest = torch.full((classes,), unknown)
        rest[torch.from_numpy(np.asarray(known))] = 0
        self.register_buffer("place", place)
        self.register_buffer("rest", rest)
        self.is_whole = len(known) == classes

    def forward(self, scores: Tensor) -> Tensor:
        return scores if self.is_whole else scores @ self.place + self.rest  # type: ignore[operator]


class _Mean(nn.Module):
    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.stack([member(rows) for member in self.members]).mean(dim=0)


class _Scaled(nn.Module):
    """Probabilities with their logits divided by a temperature, as ``metrics.at_temperature``."""

    def __init__(self, head: nn.Module, temperature: float) -> None:
        super().__init__()
        self.head = head
        self.temperature = temperature

    def forward(self, rows: Tensor) -> Tensor:
        probabilities = self.head(rows)
        there = probabilities > LEAST_SCALED
        logits = torch.log(probabilities.clamp(min=LEAST_SCALED)) / self.temperature
        raised = torch.exp(logits - logits.max(dim=1, keepdim=True).values) * there
        scaled: Tensor = raised / raised.sum(dim=1, keepdim=True)
        return scaled


def _network(model: MLPClassifier) -> nn.Module:
    layers: list[nn.Module] = []
    for weights, bias in zip(model.coefs_[:-1], model.intercepts_[:-1], strict=True):
        layers += [_Affine(weights.T, bias, probabilities=False), nn.ReLU()]
    return nn.Sequential(*layers, _Affine(model.coefs_[-1].T, model.intercepts_[-1], probabilities=True))


def _neighbours(model: KNeighborsClassifier) -> nn.Module:
    labels = np.eye(len(model.classes_), dtype=np.float32)[model._y]  # noqa: SLF001 - the only place of the labels
    count = model.n_neighbors

    def vote(rows: Tensor, train: Tensor, one_hot: Tensor) -> Tensor:
        cosines, index = torch.topk(rows @ train.T, count, dim=1)
        weights = torch.exp((cosines - cosines[:, :1]) / TEMPERATURE)
        votes = (weights[:, :, None] * one_hot[index]).sum(dim=1)
        return votes / votes.sum(dim=1, keepdim=True)

    return _Constants(vote, model._fit_X, labels)  # noqa: SLF001 - as above


def _average(model: VotingClassifier) -> nn.Module:
    """Return nearest neighbours with the vote that the classes share; its members number the classes anew, in order."""
    neighbours, shared = model.estimators_
    if not (isinstance(neighbours, KNeighborsClassifier) and isinstance(shared, DummyClassifier)):
        raise UsageError(f"an average of {type(neighbours).__name__} heads cannot be exported: use {_EXPORTABLE}.")
    share = model.weights[1] / sum(model.weights)
    even = np.full((1, len(model.classes_)), share / len(model.classes_))
    return nn.Sequential(_neighbours(neighbours), _Constants(lambda votes, rest: votes * (1 - share) + rest, even))


def _kernel(model: Nystroem) -> nn.Module:
    gamma = float(model.gamma)

    def act(rows: Tensor, landmarks: Tensor, mix: Tensor) -> Tensor:
        distance = (rows**2).sum(1, keepdim=True) - 2 * rows @ landmarks.T + (landmarks**2).sum(1)
        return torch.exp(-gamma * distance.clamp(min=0)) @ mix.T

    return _Constants(act, model.components_, model.normalization_)


_WRITERS: dict[type, Callable[[Any], nn.Module]] = {
    StandardScaler: lambda step: _Constants(lambda rows, mean, scale: (rows - mean) / scale, step.mean_, step.scale_),
    Normalizer: lambda _: _Constants(lambda rows: rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)),
    Nystroem: _kernel,
    LogisticRegression: lambda step: _Affine(step.coef_, step.intercept_, probabilities=True),
    LinearDiscriminantAnalysis: lambda step: _Affine(step.coef_, step.intercept_, probabilities=True),
    RidgeClassifier: lambda step: _Affine(step.coef_, step.intercept_, probabilities=False),
    LinearSVC: lambda step: _Affine(step.coef_, step.intercept_, probabilities=False),
    KNeighborsClassifier: _neighbours,
    VotingClassifier: _average,
    MLPClassifier: _network,
    AttentiveHead: lambda step: nn.Sequential(step.module(), nn.Softmax(dim=1)),
}
