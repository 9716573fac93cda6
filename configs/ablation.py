"""The variants of the ablation study: what each changes, on whatever data (see `python -m magnet_jax.study`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs.lavt_refcoco import use_lavt

_OFF = {"model.alignment": False, "loss.grounding": 0.0, "loss.alignment": 0.0}
# Segmentation sees whole sentences: in a pass shared with Mask Grounding it would have to learn from sentences that lack a
# word, which in so short a training costs it two points (docs/study.md).
_GROUNDING = {"loss.grounding": 1.0, "loss.grounding_shared_pass": False}
_FUSION, _CONTRAST = {"model.alignment": True}, {"loss.alignment": 1.0}
_ALL = {**_GROUNDING, **_FUSION, **_CONTRAST}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One network of a study: its name in tables, the fields that it sets, and what it is compared with."""

    label: str
    fields: dict[str, Any]
    reference: str = "baseline"
    lavt: bool = False


VARIANTS = {
    # Words read the image nowhere, and the image words by PWAM, as in LAVT; decoder and predictor are MagNet's.
    "baseline": Variant("baseline", {}, ""),
    "mg": Variant("+ Mask Grounding", _GROUNDING),
    "cam": Variant("+ CAM", _FUSION),
    "cal": Variant("+ alignment loss", _CONTRAST),
    "mg_cam": Variant("+ Mask Grounding + CAM", {**_GROUNDING, **_FUSION}),
    "mg_cal": Variant("+ Mask Grounding + alignment loss", {**_GROUNDING, **_CONTRAST}),
    "cam_cal": Variant("+ CAM + alignment loss", {**_FUSION, **_CONTRAST}),
    "all": Variant("MagNet (all three)", _ALL),
    "lavt": Variant("LAVT", {}, "", lavt=True),
    "lavt_mg": Variant("LAVT + Mask Grounding", _GROUNDING, "lavt", lavt=True),
    "ratio_0": Variant(
        "MagNet, no word masked", {**_ALL, "loss.mask_ratio": 0.0, "loss.mask_at_least_one": False}, "all"
    ),
    "ratio_30": Variant("MagNet, 30 % of words masked", {**_ALL, "loss.mask_ratio": 0.3}, "all"),
    "ratio_50": Variant("MagNet, 50 % of words masked", {**_ALL, "loss.mask_ratio": 0.5}, "all"),
    "tau_05": Variant(
        "MagNet, temperatures 0.05", {**_ALL, "loss.tau_pixel": 0.05, "loss.tau_text": 0.05}, "all"
    ),
    "tau_20": Variant(
        "MagNet, temperatures 0.2", {**_ALL, "loss.tau_pixel": 0.2, "loss.tau_text": 0.2}, "all"
    ),
    "shared_pass": Variant(
        "MagNet, one forward pass for both tasks",
        {**_ALL, "loss.grounding_shared_pass": True},
        "all",
    ),
    "released_fusion": Variant(
        "MagNet, language fusion as released", {**_ALL, "model.language_fusion": "released"}, "all"
    ),
    "released_gates": Variant("MagNet, gates as released", {**_ALL, "model.gate_init": "released"}, "all"),
    # LAVT's cross-entropy is a hundredth of MagNet's losses of masks, so that at 1.0 the segmentation hardly counts beside
    # Mask Grounding; at this weight its share of the whole is the same in both (docs/study.md).
    "lavt_mg_light": Variant(
        "LAVT + Mask Grounding at 0.01", {**_GROUNDING, "loss.grounding": 0.01}, "lavt", lavt=True
    ),
    # Is it the alignment loss's scale that harms?
    "cal_light": Variant("+ alignment loss at 0.1", {"loss.alignment": 0.1}),
}

STUDIES = {
    "ablation": ("baseline", "mg", "cam", "cal", "all", "lavt", "lavt_mg"),
    "pairs": ("baseline", "mg", "cam", "cal", "mg_cam", "mg_cal", "cam_cal", "all"),
    "masking": ("all", "ratio_0", "ratio_30", "ratio_50", "shared_pass"),
    "temperature": ("all", "tau_05", "tau_20"),
    "language": ("all", "released_fusion", "released_gates"),
    "weight": ("baseline", "cal", "cal_light", "lavt", "lavt_mg", "lavt_mg_light"),
    "everything": tuple(VARIANTS),
}


def use_variant(c: ConfigDict, name: str) -> ConfigDict:
    """Makes a configuration of MagNet that of a variant; raises ValueError for an unknown one."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant '{name}'; expected one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    if variant.lavt:
        use_lavt(c)
    else:
        c.update_from_flattened_dict(_OFF)
    c.update_from_flattened_dict(variant.fields)
    return c
