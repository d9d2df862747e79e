# SPDX-License-Identifier: Apache-2.0
"""Typed, validated settings of a run.

`ml_collections` ends at the door: `main` turns the nested mapping of a config file
into these frozen dataclasses once, and everything behind it reads attributes. A key
that no field has is an error, so that no misspelt setting is silently dead. A setting
may still have nothing to say beside another one, as `milestones` under the schedule
"cosine": the shipped templates name every field.

Names of models, data sets and triggers are checked where they are used; here are types,
ranges and closed lists. Rates and fractions are in [0, 1].
"""

from nad_jax.settings.attacks import (
    HOLDABLE_RANGES,
    RECIPES,
    AdaptiveEotSettings,
    AttackSettings,
    CompArtifactSettings,
    OutlierSettings,
    PoisoningSettings,
    PqSettings,
    QuAntiSettings,
    SmallErrorSettings,
    TrojanSettings,
)
from nad_jax.settings.basics import (
    LOADERS,
    OPTIMIZERS,
    SCHEDULES,
    DataSettings,
    GridSettings,
    ModelSettings,
    TrainingSettings,
    TriggerSettings,
)
from nad_jax.settings.jobs import (
    JOBS,
    AuditSettings,
    ExperimentSettings,
    InspectSettings,
    NadExperimentSettings,
    VerdictSettings,
    VetSettings,
)
from nad_jax.settings.parsing import (
    from_mapping,
    parse,
)
from nad_jax.settings.quantization import (
    ADAM_FORMS,
    BLIND_ROUNDINGS,
    ROUNDINGS,
    AdamSettings,
    ControlSettings,
    EfrapSettings,
    QuantizationSettings,
)
from nad_jax.settings.repairs import (
    REPAIRS,
    FinePruningSettings,
    FtSamSettings,
    LogitSettings,
    ModeConnectivitySettings,
    NadSettings,
    RepairSettings,
    TuningSettings,
)
from nad_jax.settings.variants import zoo_variant

__all__ = [
    "ADAM_FORMS",
    "AdamSettings",
    "AdaptiveEotSettings",
    "AttackSettings",
    "AuditSettings",
    "BLIND_ROUNDINGS",
    "CompArtifactSettings",
    "ControlSettings",
    "DataSettings",
    "EfrapSettings",
    "ExperimentSettings",
    "FinePruningSettings",
    "GridSettings",
    "HOLDABLE_RANGES",
    "InspectSettings",
    "JOBS",
    "LOADERS",
    "FtSamSettings",
    "LogitSettings",
    "ModeConnectivitySettings",
    "ModelSettings",
    "NadExperimentSettings",
    "NadSettings",
    "OPTIMIZERS",
    "OutlierSettings",
    "PoisoningSettings",
    "PqSettings",
    "QuAntiSettings",
    "QuantizationSettings",
    "RECIPES",
    "REPAIRS",
    "ROUNDINGS",
    "RepairSettings",
    "SCHEDULES",
    "SmallErrorSettings",
    "TrainingSettings",
    "TriggerSettings",
    "TrojanSettings",
    "TuningSettings",
    "VerdictSettings",
    "VetSettings",
    "from_mapping",
    "parse",
    "zoo_variant",
]
