"""Fine-tuning methods, one file per method or tight family."""

from jaxpeft.methods.adalora import adalora, orthogonality, ranks, shrunk
from jaxpeft.methods.boft import boft
from jaxpeft.methods.bottleneck import bottleneck, parallel
from jaxpeft.methods.calibration import Moments, input_moments, mean_gradients
from jaxpeft.methods.compensation import compensate
from jaxpeft.methods.corda import corda
from jaxpeft.methods.dora import dora
from jaxpeft.methods.eva import eva
from jaxpeft.methods.folding import fold
from jaxpeft.methods.gates import gates, open_gates, openness
from jaxpeft.methods.hira import hira
from jaxpeft.methods.hra import hra
from jaxpeft.methods.hybrids import mam, unipelt
from jaxpeft.methods.ia3 import ia3
from jaxpeft.methods.loha import loha
from jaxpeft.methods.lokr import lokr
from jaxpeft.methods.longlora import longlora
from jaxpeft.methods.lora import lora
from jaxpeft.methods.lora_fa import lora_fa
from jaxpeft.methods.lora_ga import lora_ga
from jaxpeft.methods.masks import density, keep, prune
from jaxpeft.methods.miss import miss
from jaxpeft.methods.mixtures import for_task, moelora, poly
from jaxpeft.methods.oft import oft
from jaxpeft.methods.pissa import olora, pissa
from jaxpeft.methods.placeholders import check_prefix
from jaxpeft.methods.prefix import prefix, with_prefixes, with_virtual, without_virtual
from jaxpeft.methods.prompt import (
    check_ids,
    check_prompt,
    p_tuning,
    prompt,
    template,
    virtual_ids,
)
from jaxpeft.methods.road import road
from jaxpeft.methods.scores import magnitude, obs, saliency
from jaxpeft.methods.selection import bitfit, full, last_layers, linear_probe, norm_tuning, unfreeze
from jaxpeft.methods.shifting import as_lora
from jaxpeft.methods.sparse import sparse
from jaxpeft.methods.tokens import trainable_tokens
from jaxpeft.methods.units import cut, keep_units, unit_scores, units
from jaxpeft.methods.vera import vera
from jaxpeft.methods.xlora import bank, for_shares, xlora

__all__ = [
    "Moments",
    "adalora",
    "as_lora",
    "bank",
    "bitfit",
    "boft",
    "bottleneck",
    "check_ids",
    "check_prefix",
    "check_prompt",
    "compensate",
    "corda",
    "cut",
    "density",
    "dora",
    "eva",
    "fold",
    "for_shares",
    "for_task",
    "full",
    "gates",
    "hira",
    "hra",
    "ia3",
    "input_moments",
    "keep",
    "keep_units",
    "last_layers",
    "linear_probe",
    "loha",
    "lokr",
    "longlora",
    "lora",
    "lora_fa",
    "lora_ga",
    "magnitude",
    "mam",
    "mean_gradients",
    "miss",
    "moelora",
    "norm_tuning",
    "obs",
    "oft",
    "olora",
    "open_gates",
    "openness",
    "orthogonality",
    "p_tuning",
    "parallel",
    "pissa",
    "poly",
    "prefix",
    "prompt",
    "prune",
    "ranks",
    "road",
    "saliency",
    "shrunk",
    "sparse",
    "template",
    "trainable_tokens",
    "unfreeze",
    "unipelt",
    "unit_scores",
    "units",
    "vera",
    "virtual_ids",
    "with_prefixes",
    "with_virtual",
    "without_virtual",
    "xlora",
]
