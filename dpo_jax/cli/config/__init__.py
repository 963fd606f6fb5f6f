"""Every option of every command: one module per section, with defaults, units, and the texts that `--help` prints.

One YAML file holds these sections and can serve all commands; options left out keep their defaults. Relative paths are relative
to the folder in which the command is started. "none" is `null` in YAML and `None` in a flag. Nothing here imports JAX, so
`--help` answers at once.
"""

from __future__ import annotations

from dpo_jax.cli.config.bench import BenchConfig as BenchConfig
from dpo_jax.cli.config.control import ControlConfig as ControlConfig
from dpo_jax.cli.config.data import GENERATED as GENERATED
from dpo_jax.cli.config.data import DataConfig as DataConfig
from dpo_jax.cli.config.data import MixConfig as MixConfig
from dpo_jax.cli.config.data import PrepareConfig as PrepareConfig
from dpo_jax.cli.config.data import TokenizerConfig as TokenizerConfig
from dpo_jax.cli.config.dialogue import DialogueConfig as DialogueConfig
from dpo_jax.cli.config.diffusion import DiffusionConfig as DiffusionConfig
from dpo_jax.cli.config.dpo import DpoConfig as DpoConfig
from dpo_jax.cli.config.dpo import RefsConfig as RefsConfig
from dpo_jax.cli.config.evaluation import EvalConfig as EvalConfig
from dpo_jax.cli.config.evaluation import SampleConfig as SampleConfig
from dpo_jax.cli.config.export import ExportConfig as ExportConfig
from dpo_jax.cli.config.file import ConfigError as ConfigError
from dpo_jax.cli.config.judge import JudgeConfig as JudgeConfig
from dpo_jax.cli.config.lab import FrontierConfig as FrontierConfig
from dpo_jax.cli.config.lab import PpoConfig as PpoConfig
from dpo_jax.cli.config.limits import LimitsConfig as LimitsConfig
from dpo_jax.cli.config.loading import at_home as at_home
from dpo_jax.cli.config.loading import check as check
from dpo_jax.cli.config.loading import dump_config as dump_config
from dpo_jax.cli.config.loading import every_option as every_option
from dpo_jax.cli.config.loading import help_text as help_text
from dpo_jax.cli.config.loading import load_config as load_config
from dpo_jax.cli.config.loading import load_config_with_lines as load_config_with_lines
from dpo_jax.cli.config.loading import problems as problems
from dpo_jax.cli.config.loading import with_policy as with_policy
from dpo_jax.cli.config.lora import LoraConfig as LoraConfig
from dpo_jax.cli.config.model import ModelConfig as ModelConfig
from dpo_jax.cli.config.online import OnlineConfig as OnlineConfig
from dpo_jax.cli.config.plan import PlanConfig as PlanConfig
from dpo_jax.cli.config.report import ReportConfig as ReportConfig
from dpo_jax.cli.config.robust import RobustConfig as RobustConfig
from dpo_jax.cli.config.run import MeshConfig as MeshConfig
from dpo_jax.cli.config.run import RunConfig as RunConfig
from dpo_jax.cli.config.scenes import ScenesConfig as ScenesConfig
from dpo_jax.cli.config.sections import Config as Config
from dpo_jax.cli.config.study import AgreeConfig as AgreeConfig
from dpo_jax.cli.config.study import StudyConfig as StudyConfig
from dpo_jax.cli.config.training import SftConfig as SftConfig
from dpo_jax.cli.config.training import TrainingConfig as TrainingConfig
