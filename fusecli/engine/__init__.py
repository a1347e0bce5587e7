"""Plan (groups x rules -> decisions with reasons), then compute, then apply.

All groups are checked before the first is applied; if one fails, nothing has changed. What all rules share
(members used under one name, weights not tied, unknown classes proven by a probe) lives here, once.
"""

from __future__ import annotations

from fusecli.engine.baking import alone, bake_tree, baking, computed_layers
from fusecli.engine.decisions import CustomFuser, Decision, Group, Plan, Vocabulary, refusal, rules_in
from fusecli.engine.discovery import Offer, discover
from fusecli.engine.folding import compute, compute_all, fuse_tree, replaced
from fusecli.engine.planning import plan
from fusecli.engine.sharing import needed, owning, separate, shared_roots

__all__ = [
    "CustomFuser",
    "Decision",
    "Group",
    "Offer",
    "Plan",
    "Vocabulary",
    "alone",
    "bake_tree",
    "baking",
    "compute",
    "compute_all",
    "computed_layers",
    "discover",
    "fuse_tree",
    "needed",
    "owning",
    "plan",
    "refusal",
    "replaced",
    "rules_in",
    "separate",
    "shared_roots",
]
