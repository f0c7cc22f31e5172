"""Whether ``--layers`` and ``--pool`` give what forward hooks and ``forward_features`` give, pooled by hand.

    python benchmarks/hooks.py [--only PATTERN]

For each backbone of a list, with random weights: every stage, some layers inside of stages, every pooling. Which axis holds
channels and how many tokens precede the patches is written down here by hand, and told to nothing that is tested. Each
answer is right (within 1e-4 of its greatest number), refused with a reason, or wrong. Writes hooks.jsonl and hooks.md beside
this file; what is there is not tried again.
"""

import argparse
import fnmatch
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from featcache.backbones.base import Backbone, Normalise
from featcache.backbones.timm_models import load_backbone
from featcache.errors import FeatcacheError
from featcache.specs import POOLS, BackboneSpec

HERE = Path(__file__).parent
_CLOSE = 1e-4

MAP, LAST = "(b, c, h, w)", "(b, h, w, c)"
Known = str | int  # the axes of a map, or how many of the tokens (b, n, c) precede the patches
LAYOUTS: dict[str, tuple[Known, Known]] = {  # of what leaves stages, and of the last activations
    **dict.fromkeys(
        [
            *("resnet18", "resnet26", "resnetv2_50x1_bit", "legacy_seresnet18", "ecaresnet26t", "lambda_resnet26t"),
            *("convnext_atto", "convnextv2_atto", "test_convnext", "test_nfnet", "test_byobnet", "test_maxvit"),
            *("test_coatnet", "efficientnet_b0", "efficientnet_lite0", "tf_efficientnetv2_b0", "test_efficientnet_gn"),
            *("mobilenetv2_100", "mobilenetv3_small_050", "mnasnet_small", "densenet121", "vgg11", "vgg11_bn"),
            *("regnetx_002", "regnety_002", "poolformer_s12", "pvt_v2_b0", "edgenext_xx_small", "repvgg_a0"),
            *("ghostnet_050", "repghostnet_050", "cs3darknet_focus_s", "dla46x_c", "fastvit_t8", "starnet_s050"),
            *("mobilevit_xxs", "ese_vovnet19b_slim_dw", "hgnetv2_b0", "davit_tiny", "selecsls42b", "visformer_tiny"),
            *("repvit_m0_9", "focalnet_tiny_srf"),
        ],
        (MAP, MAP),
    ),
    **dict.fromkeys(
        ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "mambaout_femto", "sequencer2d_s"], (LAST, LAST)
    ),
    **dict.fromkeys(["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224", "test_vit"], (1, 1)),
    **dict.fromkeys(["mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224", "levit_128s", "mvitv2_tiny"], (0, 0)),
    "deit_tiny_distilled_patch16_224": (2, 2),
    "test_vit2": (1, 1),
    "vit_tiny_patch16_dinov3_qkvb": (5, 5),
    "volo_d1_224": (LAST, 1),
    "cait_xxs24_224": (0, 1),
    "xcit_nano_12_p16_224": (0, 1),
    "coat_lite_tiny": (1, 1),
}
OTHERS: dict[str, tuple[str, Known]] = {  # stages whose axes are not those of the rest, by how their names begin
    "xcit_nano_12_p16_224": ("cls_attn", 1),
    "volo_d1_224": ("post_", 1),
    "pvt_v2_b0": ("patch_embed", LAST),
    "levit_128s": ("stem", MAP),
}
CLASS_TOKEN = ("vit_tiny", "deit", "test_vit", "volo", "cait", "xcit", "coat_lite")  # but for test_vit2: a register alone


def vectors(activations: Tensor, known: Known, kind: str) -> Tensor:
    """Pool activations over positions by hand."""
    if activations.dim() == 2:
        return activations
    tokens = activations.permute(0, 2, 3, 1) if known == MAP else activations
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    patches = tokens[:, known if isinstance(known, int) else 0 :]
    if kind == "avg+cls":
        return torch.cat([patches.mean(1), tokens[:, 0]], 1)
    if kind == "max":
        return patches.max(1).values
    if kind == "gem":
        return (patches.clamp(min=1e-6) ** 3).mean(1) ** (1 / 3)
    return tokens[:, 0] if kind == "cls" else patches.mean(1)


def places(backbone: Backbone) -> Iterator[tuple[str, nn.Module, bool, Known]]:
    """Yield layers: name, the module that is hooked, whether before it is called, and what its axes are."""
    name, stages = backbone.spec.name, [stage.name for stage in backbone.stages]
    modules = dict(backbone.module.named_modules())
    known = LAYOUTS[name][0]
    for number, stage in enumerate(stages):
        other = OTHERS.get(name, ("-", known))
        of_stage = other[1] if stage.startswith(other[0]) else known
        if stage in modules:
            yield stage, modules[stage], False, of_stage
        elif number + 1 < len(stages) and stages[number + 1] in modules:
            yield stage, modules[stages[number + 1]], True, of_stage
    middle = stages[len(stages) // 2]
    inside = [key for key, module in modules.items() if key.startswith(f"{middle}.") and type(module) is nn.Conv2d]
    for key in {*inside[:1], *inside[-1:]}:
        yield key, modules[key], False, MAP
    inside = [key for key, module in modules.items() if key.startswith(f"{middle}.") and type(module) is nn.Linear]
    for key in {*inside[:1], *inside[-1:]}:
        yield key, modules[key], False, known if known != MAP else LAST


def compare(given: Tensor, right: Tensor) -> str:
    """Return "" where two answers agree, else how they differ."""
    if given.shape != right.shape:
        return f"width {given.shape[1]} instead of {right.shape[1]}"
    apart = float((given - right).abs().max()) / max(float(right.abs().max()), 1e-12)
    return "" if apart <= _CLOSE else f"apart by {apart:.2g} of the greatest"


def check_layer(backbone: Backbone, name: str, module: nn.Module, before: bool, known: Known, pixels: Tensor) -> str:  # noqa: FBT001
    """Return "right", "refused: ..." or "wrong: ..." of a layer."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> None:
        if not isinstance(value, torch.fx.Proxy):
            found.append(vectors(value, known, "avg"))

    try:
        (rows,) = backbone.program((f"{name}+",))(pixels)
    except FeatcacheError as error:
        return f"refused: {error}"
    hook = (
        module.register_forward_pre_hook(lambda _, given: keep(given[0]))
        if before
        else module.register_forward_hook(lambda _, __, out: keep(out))
    )
    try:
        backbone.module(Normalise(backbone.transform)(pixels))
    finally:
        hook.remove()
    apart = compare(rows, found[0])
    return f"wrong: {apart}" if apart else "right"


def check_pool(name: str, kind: Any, pixels: Tensor) -> str:
    """Return "right", "refused: ..." or "wrong: ..." of a pooling."""
    try:
        backbone = load_backbone(BackboneSpec(name, random_init=0, pool=kind))
        (rows,) = backbone.program(("pooled",))(pixels)
    except FeatcacheError as error:
        return f"refused: {error}"
    if "cls" in kind and (name == "test_vit2" or not name.startswith(CLASS_TOKEN)):
        return "wrong: there is no class token"
    last = backbone.module.forward_features(Normalise(backbone.transform)(pixels))  # type: ignore[operator]
    apart = compare(rows, vectors(last, LAYOUTS[name][1], kind))
    return f"wrong: {apart}" if apart else "right"


def look(name: str) -> dict[str, Any]:
    """Return what came of a backbone's layers and poolings."""
    torch.set_num_threads(1)
    started = time.monotonic()
    backbone = load_backbone(BackboneSpec(name, random_init=0))
    size = backbone.transform.input_size
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        layers = {layer: check_layer(backbone, layer, *rest, pixels) for layer, *rest in places(backbone)}
        pools = {kind: check_pool(name, kind, pixels) for kind in POOLS[1:]}
    seconds = round(time.monotonic() - started, 1)
    return {"model": name, "version": timm.__version__, "layers": layers, "pools": pools, "seconds": seconds}


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as Markdown."""
    every = [
        (record["model"], kind, answer)
        for record in records
        for kind in ("layers", "pools")
        for answer in record[kind].items()
    ]

    def count(kind: str, start: str, among: list[dict[str, Any]] = records) -> int:
        return sum(answer.startswith(start) for record in among for answer in record[kind].values())

    lines = [
        "# Layers and poolings beside forward hooks",
        "",
        f"`python benchmarks/hooks.py`; timm {records[0]['version']}; random weights; {len(records)} backbones.",
        *(
            f"{what}: {count(kind, 'right')} right, {count(kind, 'refused')} refused, {count(kind, 'wrong')} wrong."
            for what, kind in (("`--layers` (stages, and layers inside of them)", "layers"), ("`--pool`", "pools"))
        ),
        "`cls` is rightly refused where there is no class token.",
        "",
        "| backbone | layers right | refused | wrong | poolings right | refused | wrong |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {record['model']} | "
            + " | ".join(
                str(count(kind, start, [record])) for kind in ("layers", "pools") for start in ("right", "refused", "wrong")
            )
            + " |"
            for record in records
        ),
        "",
        "## What was refused, but for class tokens",
        "",
        "| backbone | layer or pooling | reason |",
        "|---|---|---|",
        *(
            f"| {model} | {name} | {answer.partition(': ')[2]} |"
            for model, _, (name, answer) in every
            if not answer.startswith("right") and "has no class token" not in answer
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Look at what was not looked at yet, and write records and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="Backbones whose name matches.")
    options = parser.parse_args()
    path = HERE / "hooks.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    there = {record["model"] for record in records}
    for name in sorted(LAYOUTS):
        if name not in there and fnmatch.fnmatch(name, options.only):
            records.append(look(name))
            print(json.dumps(records[-1]), flush=True)
            records.sort(key=lambda record: str(record["model"]))
            path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
            (HERE / "hooks.md").write_text(table(records))


if __name__ == "__main__":
    main()
