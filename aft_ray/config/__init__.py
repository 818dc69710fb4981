"""One small strict model per stage; a run is one YAML file.

    config = load_config(Path("configs/quickstart.yaml"), overrides=["proposals.num_per_prompt=8"])

Unknown keys are refused, with the most similar known key. A file that begins with `base: other.yaml` holds only what
differs from that file. Every stage receives its own section and nothing else.

    strict.py      the base class of every model      engines.py    engines and their placement
    endpoints.py   remote endpoints, and presets
    data.py        prompts to training set            training.py   fine-tuning
    serving.py     the endpoint                       evaluation.py the systems to evaluate
    run.py         `Config`, the whole run            templates.py  the templates around prompts and proposals
    estimate.py    what `plan` assumes
    conditions.py  what must hold between sections
    loading.py     YAML and --set -> `Config`
"""

from aft_ray.config.data import (
    LAYOUTS,
    JudgeConfig,
    LikelihoodConfig,
    PromptsConfig,
    ProposalsConfig,
    ProposerConfig,
    ResponsesConfig,
    ScoresConfig,
    SelectionConfig,
    TargetFilters,
    TargetsConfig,
    TrainingSetConfig,
    Variant,
)
from aft_ray.config.endpoints import OpenAIEngineConfig, PricesConfig
from aft_ray.config.engines import (
    EngineConfig,
    PlacementConfig,
    ScriptedEngineConfig,
    TransformersEngineConfig,
    VllmEngineConfig,
    gpus_of,
    samples_at_once,
    why_not_on_gpus,
)
from aft_ray.config.estimate import EstimateConfig
from aft_ray.config.evaluation import EvaluationConfig, SystemConfig
from aft_ray.config.loading import load_config, merge, validate
from aft_ray.config.run import Config, RunSection
from aft_ray.config.serving import (
    AdmissionConfig,
    KeyConfig,
    KeyLimits,
    ProposerPoolConfig,
    ReplicaConfig,
    ServingConfig,
    TracesConfig,
)
from aft_ray.config.templates import TemplatesConfig
from aft_ray.config.training import DeepSpeedPreset, LoraSettings, TrainingConfig

__all__ = [
    "LAYOUTS",
    "AdmissionConfig",
    "Config",
    "DeepSpeedPreset",
    "EngineConfig",
    "EstimateConfig",
    "EvaluationConfig",
    "JudgeConfig",
    "KeyConfig",
    "KeyLimits",
    "LikelihoodConfig",
    "LoraSettings",
    "OpenAIEngineConfig",
    "PlacementConfig",
    "PricesConfig",
    "PromptsConfig",
    "ProposalsConfig",
    "ProposerConfig",
    "ProposerPoolConfig",
    "ReplicaConfig",
    "ResponsesConfig",
    "RunSection",
    "ScoresConfig",
    "ScriptedEngineConfig",
    "SelectionConfig",
    "ServingConfig",
    "SystemConfig",
    "TargetFilters",
    "TargetsConfig",
    "TemplatesConfig",
    "TracesConfig",
    "TrainingConfig",
    "TrainingSetConfig",
    "TransformersEngineConfig",
    "Variant",
    "VllmEngineConfig",
    "gpus_of",
    "load_config",
    "merge",
    "samples_at_once",
    "validate",
    "why_not_on_gpus",
]
