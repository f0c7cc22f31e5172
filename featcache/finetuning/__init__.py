"""Training of what follows a cut. Told without PyTorch: what is asked for, which part of a backbone trains, and how."""

import re
from dataclasses import dataclass
from typing import Literal

from featcache.errors import UsageError
from featcache.specs import Precision, StoredDtype, Views, check_fields, check_value

RATES = (1e-4, 5e-4, 2.5e-3)  # factors of five: no rate between them is further than 2.3 times from one that is tried
Optimiser = Literal["adamw", "adam", "sgd"]
OPTIMISERS: tuple[Optimiser, ...] = ("adamw", "adam", "sgd")
_STAGES = r"last:[1-9]\d*|\d+(?:\.\d+)?%|[A-Za-z_][\w.]*"


@dataclass(frozen=True)
class Unfreeze:
    """Which part of a backbone is trained.

    ``stages`` are the last ones, a share of the parameters, those from a stage on, or all; ``what`` of them trains:
    every weight, the affine parameters of norms (Frankle et al. 2021), the biases (BitFit: Ben Zaken et al. 2022), or
    low-rank updates of ``rank`` beside the weights (LoRA: Hu et al. 2022).
    """

    text: str
    kind: Literal["last", "share", "stage", "all"]
    amount: float = 0.0
    stage: str = ""
    what: Literal["weights", "norm", "bias", "lora"] = "weights"  # fields' names are in the keys of experiments
    rank: int = 0

    @classmethod
    def parse(cls, text: str) -> "Unfreeze":
        """Read ``last:2``, ``25%``, ``layer4``, ``all``, or ``norm``, ``bias``, ``lora:8`` with such stages behind a colon.

        Raises:
            UsageError: the text is none of them.
        """
        text = check_value(text, str, "unfreeze")
        part = re.fullmatch(rf"(?:(norm|bias)|lora:([1-9]\d*))(?::({_STAGES}))?", text)
        if part is None:
            return cls(text, *_stages(text, text))
        parameters: Literal["norm", "bias", "lora"] = part[1] or "lora"  # type: ignore[assignment]
        kind, amount, stage = _stages(part[3] or "all", text)
        return cls(text, kind, amount, stage, parameters, int(part[2] or 0))


def _stages(stages: str, text: str) -> tuple[Literal["last", "share", "stage", "all"], float, str]:
    last = re.fullmatch(r"last:(\d+)", stages)
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", stages)
    if stages == "all":
        return "all", 0.0, ""
    if last and int(last[1]) > 0:
        return "last", int(last[1]), ""
    if share and 0 < float(share[1]) <= 100:
        return "share", float(share[1]) / 100, ""
    if re.fullmatch(r"[A-Za-z_][\w.]*", stages) and stages != "lora":  # without a rank it is a mistake, no stage's name
        return "stage", 0.0, stages
    raise UsageError(
        f"`unfreeze` {text}: write last:K, P% (up to 100%), the name of a stage, or all; or norm, bias or lora:R, with such "
        "stages behind a colon."
    )


def depths(count: int) -> list[Unfreeze]:
    """Return what to unfreeze of so many stages, from the last to all: every depth up to 8 stages, else doubling ones."""
    # a long backbone's depths double: 24 blocks one by one would be 24 trainings for a curve that five points show
    numbers = range(1, count) if count <= 8 else (2**power for power in range(count.bit_length()) if 2**power < count)
    return [*(Unfreeze.parse(f"last:{number}") for number in numbers), Unfreeze.parse("all")]


@dataclass(frozen=True)
class FineTunePlan:
    """How the unfrozen part is trained.

    ``lr`` are the rates that are tried for the backbone's last stage; the best on validation is kept, since a rate that
    is too low looks as if fine-tuning did not pay. Each stage before it has ``layer_decay`` times the next one's (Clark
    et al. 2020, ELECTRA, appendix A; Bao et al. 2021, BEiT, section 3.1). ``warmup`` is a share of all steps, then a half
    cosine to zero follows.

    Attributes:
        unfreeze: which part trains.
        epochs: at most.
        batch_size: images a step.
        lr: rates of the last stage that are tried.
        head_lr: rate of the head.
        layer_decay: factor from each stage to the one before.
        weight_decay: of matrices, not of vectors.
        warmup: share of the steps in which the rate rises.
        label_smoothing: of the training loss.
        patience: epochs without gain that end a trial.
        train_batchnorm: let running statistics of the trained part move; ``None``: where images have another size than those
            of pretraining the best rate is tried so too, and validation chooses; elsewhere they rest.
        dtype: of the stored activations.
        optimiser: ``adamw``, ``adam`` (decay in the gradient), or ``sgd`` (momentum 0.9).
        views: stored views of each image; every epoch draws one of them.
        augment: flip and shift pixels as they are read; at the cut ``input`` alone.
        mixup: alpha of the Beta distribution that mixes pairs of stored rows (Zhang et al. 2018; on activations: Verma
            et al. 2019); 0 for none.
        drop_path: share of residual branches left out at the last block (Huang et al. 2016), rising from 0 at the first.
        ema: decay of the average of weights that is kept instead of the last ones; 0 for none.
        clip: greatest norm of the gradient; 0 for none.
        accumulate: batches a step.
        precision: of the training steps; ``None``: bfloat16 on a GPU that has it, else float32; "auto": bfloat16 also on a
            CPU that has it (AMX) and is faster so. Weights, optimiser, validation and test are float32 in any case.
        refit: train once more on train and validation together, as long as the best trial did, as the probe is.
    """

    unfreeze: Unfreeze
    epochs: int = 10
    batch_size: int = 32
    lr: tuple[float, ...] = RATES
    head_lr: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.1
    patience: int = 3
    train_batchnorm: bool | None = None
    dtype: StoredDtype | None = None
    optimiser: Optimiser = "adamw"
    views: int = 1
    augment: bool = False
    mixup: float = 0.0
    drop_path: float = 0.0
    ema: float = 0.0
    clip: float = 0.0
    accumulate: int = 1
    precision: Precision | Literal["auto"] | None = None
    refit: bool = True

    def __post_init__(self) -> None:
        """Refuse values that train nothing."""
        check_fields(self)
        if min(self.epochs, self.batch_size, self.patience, self.views, self.accumulate) < 1:
            raise UsageError(
                "`epochs`, `FineTunePlan.batch_size`, `patience`, `views` and `accumulate`: at least 1 is needed."
            )
        Views(self.views)
        if self.train_batchnorm and self.batch_size == 1:
            raise UsageError(
                "`train_batchnorm`: statistics of one image are none: give a `FineTunePlan.batch_size` of 2 or more."
            )
        if not self.lr or min(*self.lr, self.head_lr) <= 0:
            raise UsageError("`lr` and `head_lr`: a rate above 0 is needed.")
        if not (0 <= self.ema < 1 and 0 <= self.drop_path < 1 and 0 <= self.label_smoothing < 1):
            raise UsageError("`ema`, `drop_path` and `label_smoothing`: from 0 up to, but not, 1.")
        if self.warmup > 1:
            raise UsageError(f"`warmup` {self.warmup:g}: a share of all steps, from 0 to 1, is needed.")
        if min(self.mixup, self.clip, self.weight_decay, self.warmup, self.layer_decay) < 0:
            raise UsageError("`mixup`, `clip`, `weight_decay`, `warmup` and `layer_decay`: 0 or more is needed.")
