"""One small strict model per stage; a run is one YAML file.

    config = load_config(Path("configs/quickstart.yaml"), overrides=["proposals.num_per_prompt=8"])

Unknown keys are refused, with the most similar known key. A file that begins with `base: other.yaml` holds only what
differs from that file. Every stage receives its own section and nothing else.

    strict.py      the base class of every model      engines.py    engines and their placement
    data.py        prompts to training set            training.py   fine-tuning
    serving.py     the endpoint                       evaluation.py the systems to evaluate
    run.py         `Config`, the whole run            templates.py  the templates around prompts and proposals
    loading.py     YAML and --set -> `Config`
"""

from aft_ray.config.data import (
    ULTRAFEEDBACK,
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
from aft_ray.config.engines import (
    EngineConfig,
    OpenAIEngineConfig,
    PlacementConfig,
    PricesConfig,
    ScriptedEngineConfig,
    TransformersEngineConfig,
    VllmEngineConfig,
)
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
)
from aft_ray.config.templates import TemplatesConfig
from aft_ray.config.training import DeepSpeedPreset, LoraSettings, TrainingConfig

__all__ = [
    "ULTRAFEEDBACK",
    "AdmissionConfig",
    "Config",
    "DeepSpeedPreset",
    "EngineConfig",
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
    "TrainingConfig",
    "TrainingSetConfig",
    "TransformersEngineConfig",
    "Variant",
    "VllmEngineConfig",
    "load_config",
    "merge",
    "validate",
]
