"""The whole configuration: all sections, and the paths derived from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dpo_jax.cli.config.bench import BenchConfig
from dpo_jax.cli.config.control import ControlConfig
from dpo_jax.cli.config.data import DataConfig, PrepareConfig, TokenizerConfig
from dpo_jax.cli.config.dialogue import DialogueConfig
from dpo_jax.cli.config.diffusion import DiffusionConfig
from dpo_jax.cli.config.dpo import DpoConfig, RefsConfig
from dpo_jax.cli.config.evaluation import EvalConfig, SampleConfig
from dpo_jax.cli.config.export import ExportConfig
from dpo_jax.cli.config.judge import JudgeConfig
from dpo_jax.cli.config.lab import FrontierConfig, PpoConfig
from dpo_jax.cli.config.limits import LimitsConfig
from dpo_jax.cli.config.lora import LoraConfig
from dpo_jax.cli.config.model import ModelConfig
from dpo_jax.cli.config.online import OnlineConfig
from dpo_jax.cli.config.plan import PlanConfig
from dpo_jax.cli.config.report import ReportConfig
from dpo_jax.cli.config.robust import RobustConfig
from dpo_jax.cli.config.run import MeshConfig, RunConfig
from dpo_jax.cli.config.scenes import ScenesConfig
from dpo_jax.cli.config.study import AgreeConfig, StudyConfig
from dpo_jax.cli.config.training import SftConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections of the configuration. `None` paths have defaults inside the run directory: read them through the methods
    below."""

    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    sft: SftConfig = SftConfig()
    refs: RefsConfig = RefsConfig()
    dpo: DpoConfig = DpoConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    export: ExportConfig = ExportConfig()
    prepare: PrepareConfig = PrepareConfig()
    bench: BenchConfig = BenchConfig()
    plan: PlanConfig = PlanConfig()
    frontier: FrontierConfig = FrontierConfig()
    ppo: PpoConfig = PpoConfig()
    robust: RobustConfig = RobustConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    scenes: ScenesConfig = ScenesConfig()
    dialogue: DialogueConfig = DialogueConfig()
    online: OnlineConfig = OnlineConfig()
    control: ControlConfig = ControlConfig()
    judge: JudgeConfig = JudgeConfig()
    study: StudyConfig = StudyConfig()
    agree: AgreeConfig = AgreeConfig()
    report: ReportConfig = ReportConfig()
    limits: LimitsConfig = LimitsConfig()
    lora: LoraConfig = LoraConfig()

    def checkpoints_of(self, task: str) -> str:
        """Checkpoint folder of `sft` or `dpo`: a local folder or `gs://...`, exactly as given."""
        return f"{self.run.checkpoints}/{task}" if self.run.checkpoints else f"{self.run.dir}/{task}/checkpoints"

    def dpo_policy(self) -> str:
        """The starting policy of DPO; it is also the reference, unless another one is named."""
        return self.dpo.policy or f"{self.run.dir}/sft/export"

    def kept_dtype(self) -> str:
        """Type in which DPO keeps its starting weights and those of the reference."""
        return self.dpo.param_dtype if self.lora.rank is None else self.lora.base_dtype

    def dpo_reference(self) -> str:
        return self.dpo.reference or self.dpo_policy()

    def refs_cache(self) -> str:
        return self.refs.cache or f"{self.run.dir}/refs"

    def features_cache(self) -> str:
        """Cache folder for image features, beside the reference log-probabilities: one folder per encoder."""
        return str(Path(self.refs_cache()).with_name("features"))

    def eval_policy(self) -> str:
        return self.eval.policy or f"{self.run.dir}/dpo/export"

    def eval_reference(self) -> str:
        return self.eval.reference or self.dpo_reference()

    def judge_out(self) -> str:
        return self.judge.out or f"{self.run.dir}/judge"

    def robust_out(self) -> str:
        return f"{self.run.dir}/robust-{self.robust.experiment}"

    def diffusion_out(self) -> str:
        return f"{self.run.dir}/diffusion-{self.diffusion.experiment}"

    def sample_policy(self) -> str:
        return self.sample.policy or f"{self.run.dir}/dpo/export"
