"""Which backbones can be cut where: the smallest model of every timm module, at every stage boundary.

    python benchmarks/cut_survey.py [--only PATTERN]

Each model has random weights and runs in a process of its own. At every boundary the two parts must reproduce the whole
(float32, a batch other than the traced ones), and the gradients from stored activations must be those of the whole model.
Frozen parameters behind the boundary are counted: those of layers that could have been done before it must be none. Apart
from them are counted those that are read on both sides, such as the position encodings that all of CoaT's blocks share.
Writes cut_survey.jsonl and cut_survey.md beside this file; what is there is not tried again.
"""

import argparse
import fnmatch
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import timm
import torch

from featcache.backbones.timm_models import load_backbone
from featcache.errors import CutError, FeatcacheError
from featcache.specs import BackboneSpec

HERE = Path(__file__).parent
MINUTES = 10
_CLOSE = 1e-4


def families() -> dict[str, list[str]]:
    """Return the models of each of timm's modules."""
    return {module: timm.list_models(module=module) for module in timm.list_modules() if timm.list_models(module=module)}


def smallest(names: list[str]) -> str:
    """Return the model with the fewest parameters, created without memory."""
    sizes = {}
    for name in names:
        try:
            with torch.device("meta"):
                module = timm.create_model(name, num_classes=0)
        except Exception:  # noqa: BLE001, S112 - some need values while they are built: others of the module do not
            continue
        sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    return min(sizes, key=lambda name: sizes[name]) if sizes else names[0]


def survey(module: str, names: list[str]) -> dict[str, Any]:
    """Return what came of cutting a module's smallest model at every boundary."""
    torch.set_num_threads(1)
    name, started = smallest(names), time.monotonic()
    facts: dict[str, Any] = {"module": module, "models": len(names), "model": name, "version": timm.__version__}
    try:
        backbone = load_backbone(BackboneSpec(name, random_init=0))
        stages = [stage.name for stage in backbone.stages]
        boundaries = {}
        for cut in stages[:-1]:
            try:
                boundaries[cut] = check(backbone, cut)
            except CutError as error:
                boundaries[cut] = {"error": str(error)}
        facts |= {"stages": len(stages), "boundaries": boundaries}
    except FeatcacheError as error:
        facts["error"] = str(error)
    return facts | {"seconds": round(time.monotonic() - started, 1)}


def check(backbone: Any, cut: str) -> dict[str, Any]:
    """Return the kilobytes an image at a cut, what is frozen behind it, and how far gradients are from the whole model's."""
    size = backbone.transform.input_size
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        stored = backbone.prefix(cut)(images)
    is_trained = backbone.trained_after(cut)
    for parameter_name, parameter in backbone.module.named_parameters():
        parameter.requires_grad_(is_trained(parameter_name))
    found = []
    suffix = backbone.suffix(cut)
    trained = {id(value) for key, value in backbone.module.named_parameters() if is_trained(key)}
    before = {id(value) for value in backbone.prefix(cut).parameters()}
    frozen = [id(value) for value in suffix.parameters() if id(value) not in trained]
    shared = sum(number in before for number in frozen)
    for module, given in ((suffix, stored.clone()), (backbone.module, images)):
        backbone.module.train()  # some attention keeps its biases, with their graph or without, until the mode changes
        backbone.module.eval()
        (module(given).float() ** 2).mean().backward()
        found.append({key: value.grad for key, value in backbone.module.named_parameters() if value.grad is not None})
        backbone.module.zero_grad(set_to_none=True)
    one, other = found
    if one.keys() != other.keys():
        raise CutError("other parameters get a gradient behind this cut than in the whole model.")
    scale = max(float(value.abs().max()) for value in other.values())
    apart = max(float((one[key] - other[key]).abs().max()) for key in other) / max(scale, 1e-12)
    if apart > _CLOSE:
        raise CutError(f"gradients differ by {apart:.1g} of the greatest.")
    return {
        "half_kb": round(stored[0].numel() * 2 / 1000, 1),
        "frozen": len(frozen) - shared,
        "shared": shared,
        "gradient_difference": apart,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as Markdown."""
    whole = [record for record in records if cuts_everywhere(record)]
    boundaries = [one for record in records for one in record.get("boundaries", {}).values()]
    exact = sum("error" not in one for one in boundaries)
    frozen, shared = (sum(one.get(count, 0) for one in boundaries) for count in ("frozen", "shared"))
    lines = [
        "# Where backbones can be cut",
        "",
        f"`python benchmarks/cut_survey.py`; timm {records[0]['version']}, which has {len(families())} modules of models.",
        f"Of the {len(records)} tried so far, {len(whole)} are cut",
        f"({100 * len(whole) / len(records):.1f} %) exactly at every stage boundary of their smallest model;",
        f"of {len(boundaries)} boundaries, {exact}. Frozen tensors (parameters) behind all of these: {frozen};",
        f"read on both sides: {shared}.",
        "kB are of one image in half precision, from the first boundary to the last.",
        "",
        "| module | smallest model | boundaries | frozen behind | on both sides | kB an image | what failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        found = record.get("boundaries", {})
        errors = {one["error"] for one in (*found.values(), record) if "error" in one}
        sizes = " ".join(f"{one['half_kb']:.0f}" for one in found.values() if "error" not in one)
        count = f"{sum('error' not in one for one in found.values())} of {len(found)}"
        behind, both = (sum(one.get(count, 0) for one in found.values()) for count in ("frozen", "shared"))
        what = "; ".join(sorted(errors))
        lines.append(f"| {record['module']} | {record['model']} | {count} | {behind} | {both} | {sizes} | {what} |")
    return "\n".join(lines) + "\n"


def cuts_everywhere(record: dict[str, Any]) -> bool:
    """Tell whether a model is cut exactly at every boundary."""
    return "error" not in record and all("error" not in one for one in record["boundaries"].values())


def main() -> None:
    """Try what was not tried yet, and write records and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="Modules whose name matches.")
    options = parser.parse_args()
    path = HERE / "cut_survey.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    there = {record["module"] for record in records}
    context = multiprocessing.get_context("spawn")
    for module, names in families().items():
        if module in there or not fnmatch.fnmatch(module, options.only):
            continue
        with context.Pool(1) as pool:
            try:
                record = pool.apply_async(survey, (module, names)).get(60 * MINUTES)
            except multiprocessing.TimeoutError:
                record = {"error": f"not done after {MINUTES} minutes"}
            except Exception as error:  # noqa: BLE001 - a backbone's own code fails in any way
                record = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        record = {"module": module, "models": len(names), "model": names[0], "version": timm.__version__} | record
        records.append(record)
        print(json.dumps(record), flush=True)
        records.sort(key=lambda one: one["module"])
        path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    if records:
        (HERE / "cut_survey.md").write_text(table(records))


if __name__ == "__main__":
    main()
