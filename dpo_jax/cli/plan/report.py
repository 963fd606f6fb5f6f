"""A plan, and a ranking of plans, as text."""

from __future__ import annotations

from dpo_jax.cli.plan.one import Plan
from dpo_jax.runtime.chips import Chip
from dpo_jax.runtime.mesh_shape import mesh_words
from dpo_jax.runtime.plan import HEADROOM


def report(one: Plan, chip: Chip) -> str:
    """The plan as text. GB are 10^9 bytes; a device is a chip, or one of the cores that JAX sees in it."""
    step, flops, gb = one.step, one.flops_per_pair, 1e9
    memory, temporary = chip.hbm_bytes / chip.cores, step.temporary_bytes / gb
    rows, length, scored = one.row_shape
    lines = {
        "mesh": f"{mesh_words(one.mesh)}, attention {one.attention}, remat {one.remat}, "
        f"{one.pairs} pairs a step in {one.microbatches} microbatches",
        "rows": f"{rows} of {length} tokens, {scored} of them scored",
        "parameters": f"{one.parameters:,}",
        "fits": "yes" if step.fits else f"NO: {step.problem}",
        "peak": f"{step.peak_bytes / gb:.2f} GB a device, {step.peak_bytes / memory:.0%} of {memory / gb:.1f} "
        f"(limit {HEADROOM:.0%})",
        "of it": f"parameters {step.parameter_bytes / gb:.2f}, optimizer {step.optimizer_bytes / gb:.2f}; "
        f"activations, gradients, buffers {temporary:.2f} GB, not all at the same time",
        "operations": f"{flops.training:.3e} a pair: trunk {flops.passes * flops.trunk:.2e}, "
        f"attention {3 * flops.attention:.2e}, head {flops.passes * flops.head:.2e}",
    }
    if step.seconds:
        lines |= _program_lines(one, chip)
    if one.refs is not None:
        fits = "fits" if one.refs.fits else f"DOES NOT FIT: {one.refs.problem}"
        lines["refs"] = f"{fits}, peak {one.refs.peak_bytes / gb:.2f} GB"
    return "\n".join(f"{name:11} {text}" for name, text in lines.items())


def _program_lines(one: Plan, chip: Chip) -> dict[str, str]:
    step, seconds = one.step, one.step.seconds
    (low, high), (mfu_low, mfu_high) = one.pairs_per_second(), one.mfu()
    lines = {"computed": f"{step.matmul_flops:.3e} a device and step in matrix products, padding and repetition included"}
    for kind, found in step.collectives.items():
        count, held, sent = found["count"], found["operand_bytes"] / 1e9, found["moved_bytes"] / 1e9
        across = f", {found['crossing_bytes'] / 1e9:.2f} GB of it between hosts" if found["crossing_bytes"] else ""
        lines[kind] = f"{count:,.0f} a step of {held:.2f} GB in all, {sent:.2f} GB sent per device{across}"
    if step.unknown_loops:
        lines["loops"] = f"{step.unknown_loops} of unknown length; their contents are counted once"
    whole = f": MORE THAN {step.head_chunk:,} AT ONCE" if step.logits_tokens > step.head_chunk else ""
    lines["logits"] = (
        f"largest buffer {step.logits_tokens:,} tokens x vocabulary; a device scores {step.scored_tokens:,} at a time{whole}"
    )
    lines["at peak"] = (
        f"{chip.flops / 1e12:,.0f} TFLOP/s dense bfloat16, {chip.hbm_bandwidth / 1e12:.2f} TB/s memory, "
        f"{chip.link_bandwidth / 1e9:.0f} GB/s links" + (f", {chip.network / 1e9:.0f} GB/s network a GPU" if chip.gpu else "")
    )
    lines["seconds"] = f"compute {seconds['compute']:.3f}, memory {seconds['memory']:.3f}, links {seconds['links']:.3f} at peak"
    lines["predicted"] = (
        f"{low:.3g} to {high:.3g} pairs/s, MFU {mfu_low:.0%} to {mfu_high:.0%}, without or with full overlap of these three; "
        "not measured"
    )
    lines["compiled in"] = f"{step.compile_seconds:.0f} s"
    return lines


def print_ranking(plans: list[Plan]) -> None:
    print("\nranked, predicted and not measured:")
    for number, one in enumerate(plans, 1):
        low, high = one.pairs_per_second()
        rate = f"{low:8.3g} to {high:8.3g} pairs/s" if one.step.fits else "does not fit"
        print(
            f"{number:3}  {mesh_words(one.mesh):28} remat {one.remat:14} microbatches {one.microbatches:<3} "
            f"peak {one.step.peak_bytes / 1e9:6.1f} GB  {rate}"
        )
