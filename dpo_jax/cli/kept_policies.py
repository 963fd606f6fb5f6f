"""Policies that a command saves to disk for its later stages: whole models, or adapters beside their base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_jax.cli import build
from dpo_jax.cli.exports import write_lora
from dpo_jax.cli.trainable import Trainable
from dpo_jax.lab.world import World
from dpo_jax.models.adapter import read_adapter, resumed
from dpo_jax.models.digest import WeightsDigest
from dpo_jax.models.folder import ADAPTER
from dpo_jax.models.hf import assemble, save_hf
from dpo_jax.models.lora import LORA, adapter_shapes
from dpo_jax.runtime import hosts
from dpo_jax.types import Variables


class KeptPolicies(NamedTuple):
    """Saves policies of `trainable` and reads them back, exactly. An adapter is not merged: bfloat16 would round it away."""

    trainable: Trainable
    world: World
    source: str  # the folder of the policy that training started from
    digests: Mapping[str, str]  # of its weights
    name: str  # of the command or option, for errors

    def save(self, folder: Path, variables: Variables) -> None:
        """Writes a policy, in the form of `get_state`. All hosts call this; the first one writes."""
        if self.trainable.lora is None:
            save_hf(folder, self.trainable.base, self.trainable.merged(variables), fetch=hosts.whole, write=hosts.is_first())
        else:
            write_lora(folder, self.trainable, variables, source=self.source, digests=self.digests)

    def load(self, folder: Path) -> tuple[Variables, str]:
        """A policy on the devices, and the digest of what was read: the whole model, or its adapter."""
        base, partitioner = self.trainable.base, self.world.partitioner
        # Earlier versions kept the references of rounds as whole models, also of adapters.
        if self.trainable.lora is None or not (folder / ADAPTER).is_file():
            return build.load_weights(str(folder), base, partitioner, name=self.name)
        with build.naming_option(self.name, str(folder)):
            found, digest = read_adapter(folder, base.config), WeightsDigest()
            found.digest_into(digest)
            _, pieces = resumed(found, base.config)
            adapter = assemble({LORA: adapter_shapes(base.config, self.trainable.lora)}, pieces, put=np.asarray)
        return partitioner.put_variables({**partitioner.to_host(self.world.reference), **adapter}), digest.hexdigest()
