import jax
import numpy as np
import pytest
from test_layout import PAIRS, REF

from dpo_jax.data.encode import Encoded
from dpo_jax.data.loader import (
    WORTH_COMPILING,
    batch_indices,
    eval_batches,
    few_shapes,
    plan_layout,
    total_steps,
    train_batches,
)


def test_an_epoch_holds_every_example_once_whatever_the_batch():
    for batch in (4, 11, 16):
        seen = np.concatenate(
            [
                batch_indices(11, batch=batch, seed=3, step=step, epochs=2)
                for step in range(total_steps(11, batch=batch, epochs=2))
            ]
        )
        for epoch in (seen[:11], seen[11:]):
            assert sorted(epoch) == list(range(11))
        assert list(seen[:11]) != list(seen[11:])


def test_a_part_of_an_epoch_holds_a_random_part_of_the_examples():
    assert [total_steps(11, batch=4, epochs=epochs) for epochs in (0.01, 0.5, 1, 1.5)] == [1, 2, 3, 4]
    half = np.concatenate([batch_indices(11, batch=4, seed=3, step=step, epochs=0.5) for step in range(2)])
    whole = np.concatenate([batch_indices(11, batch=4, seed=3, step=step, epochs=1) for step in range(3)])
    assert half.tolist() == whole[:6].tolist()
    assert sorted(half) != list(range(6))
    assert len(batch_indices(11, batch=4, seed=3, step=0, epochs=0.01)) == 1


def test_a_step_is_a_pure_function_of_its_number():
    steps = [batch_indices(100, batch=8, seed=1, step=step).tolist() for step in range(40)]
    assert batch_indices(100, batch=8, seed=1, step=33).tolist() == steps[33]
    assert batch_indices(100, batch=8, seed=2, step=33).tolist() != steps[33]


@pytest.mark.parametrize("kind", ["plain", "shared", "packed"])
def test_hosts_together_build_the_global_batch(kind):
    layout = plan_layout(PAIRS, kind=kind, batch=6, multiple=8)
    whole = train_batches(PAIRS, layout=layout, batch=6, seed=1, ref_logps=REF)
    for hosts in (1, 2, 4):
        built = [train_batches(PAIRS, layout=layout, batch=6, seed=1, ref_logps=REF, part=(i, hosts)) for i in range(hosts)]
        for step in (0, 5):
            batches, expected = [at(step) for at in built], whole(step)
            rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(batch.rows for batch in batches))
            jax.tree.map(np.testing.assert_array_equal, rows, expected.rows)
            for batch in batches:
                np.testing.assert_array_equal(batch.index, expected.rows.index)
                assert (batch.uids, batch.stats) == (expected.uids, expected.stats)


@pytest.mark.parametrize("kind", ["plain", "shared", "packed"])
def test_batches_keep_one_shape_and_lose_nothing(kind):
    layout = plan_layout(PAIRS, kind=kind, batch=4, multiple=2)
    batches = train_batches(PAIRS, layout=layout, batch=4, seed=0, epochs=1, ref_logps=REF)
    uids = []
    for step in range(total_steps(len(PAIRS), batch=4, epochs=1)):
        batch = batches(step)
        assert batch.rows.tokens.shape[0] % 2 == 0
        assert batch.rows.weight.sum() == len(batch.uids) == batch.stats["pairs"]
        assert len(batch.rows.weight) * 2 == batch.rows.tokens.shape[0] * batch.rows.slots
        for place, index in enumerate(batch.rows.index):
            if index >= 0:
                np.testing.assert_array_equal(batch.rows.ref_logps[place], REF[int(batch.uids[index].split(":")[1])])
        uids += batch.uids
    assert sorted(uids) == sorted(pair.uid for pair in PAIRS)
    if kind != "packed":
        shapes = {batches(step).rows.tokens.shape for step in range(3)}
        assert len(shapes) == 1


def test_eval_batches_hold_every_example_once_in_order():
    layout = plan_layout(PAIRS, kind="shared", batch=4)
    visited = [*eval_batches(PAIRS, layout=layout, batch=4)]
    uids = np.full(len(PAIRS), "", object)
    for batch in visited:
        numbers, values = batch.of_examples(batch.index * 2)
        np.testing.assert_array_equal(values, 2 * (numbers - batch.first))
        uids[numbers] = [batch.uids[i] for i in values // 2]
    assert uids.tolist() == [pair.uid for pair in PAIRS]
    assert len({batch.rows.tokens.shape for batch in visited}) == 1


def test_padding_share_counts_positions_that_hold_no_token():
    layout = plan_layout(PAIRS[:4], kind="shared", batch=4)
    batch = train_batches(PAIRS[:4], layout=layout, batch=4, seed=0)(0)
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in PAIRS[:4])
    assert batch.stats["tokens"] == tokens
    assert batch.stats["padding"] == pytest.approx(1 - tokens / (4 * layout.length))
    assert batch.stats["scored_tokens"] == sum(len(p.chosen) + len(p.rejected) for p in PAIRS[:4])


def test_packed_batches_come_in_few_shapes_with_little_padding():
    generator = np.random.default_rng(1)
    lengths = np.minimum(generator.lognormal(4.2, 0.6, (600, 3)).astype(int) + 1, 250)  # as uneven as real dialogues
    pairs = [Encoded(*(np.ones(n, np.int32) for n in sizes), uid=str(i)) for i, sizes in enumerate(lengths)]
    layout = plan_layout(pairs, kind="packed", batch=64)
    longest = max(lengths.sum(axis=1))
    assert longest <= layout.length <= max(1024, 2 * longest)
    batches = [train_batches(pairs, layout=layout, batch=64, seed=0)(step) for step in range(100)]
    shapes = {batch.rows.tokens.shape for batch in batches}
    assert shapes <= {(count, layout.length) for count in layout.row_counts}
    assert 2 <= len(shapes) <= 5
    assert np.mean([batch.stats["padding"] for batch in batches]) < 0.08
    of_devices = plan_layout(pairs, kind="packed", batch=64, multiple=4)
    assert {count % 4 for count in of_devices.row_counts} == {0}


def test_microbatches_of_empty_rows_are_no_padding():
    """Nor do they keep a batch from coming in one shape; how often it is exceeded is left to chance."""
    generator = np.random.default_rng(1)
    lengths = np.minimum(generator.lognormal(4.2, 0.6, (600, 3)).astype(int) + 1, 250)
    pairs = [Encoded(*(np.ones(n, np.int32) for n in sizes), uid=str(i)) for i, sizes in enumerate(lengths)]
    layout = plan_layout(pairs, kind="packed", batch=64, multiple=32, microbatches=32)
    batches = [train_batches(pairs, layout=layout, batch=64, seed=0)(step) for step in range(50)]
    assert len({batch.rows.tokens.shape for batch in batches}) <= 2
    assert np.mean([batch.stats["padding"] for batch in batches]) < 0.08
    for batch in batches:
        parts = batch.rows.weight.reshape(32, -1).any(axis=1)
        assert parts[: parts.sum()].all()  # the empty rows are the last
        assert batch.stats["positions"] == pytest.approx(parts.mean() * batch.rows.tokens.size)
        assert batch.stats["padding"] == pytest.approx(1 - batch.stats["tokens"] / batch.stats["positions"])


def test_rows_are_no_longer_than_what_the_devices_share():
    pairs = [Encoded(*(np.ones(n, np.int32) for n in (256, 256, 256)), uid=str(i)) for i in range(64)]
    alone, shared = (plan_layout(pairs, kind="packed", batch=64, multiple=devices) for devices in (1, 64))
    assert alone.length % 768 == 0
    assert (shared.length, shared.row_counts[0]) == (768, 64)  # a pair for each device, and no empty half rows


def test_a_short_pass_has_fewer_programs_and_the_same_row_length():
    generator = np.random.default_rng(0)
    pairs = [Encoded(*(np.ones(n, np.int32) for n in generator.integers(4, 40, 3)), uid=str(i)) for i in range(400)]
    layout = plan_layout(pairs, kind="packed", batch=16)
    short = few_shapes(layout, examples=len(pairs), batch=16)
    assert (short.length, short.scored, short.per_row) == (layout.length, layout.scored, layout.per_row)
    used, before = ({batch.rows.tokens.shape for batch in eval_batches(pairs, layout=one, batch=16)} for one in (short, layout))
    assert len(used) == 1 < len(before)
    assert few_shapes(layout, examples=WORTH_COMPILING * 16 + 1, batch=16) == layout
    shared = plan_layout(pairs, kind="shared", batch=16)
    assert few_shapes(shared, examples=16, batch=16) == shared


@pytest.mark.parametrize("count", [len(PAIRS) - 1, len(PAIRS) + 1])
def test_reference_log_probabilities_of_other_examples_are_refused_before_the_first_batch(count):
    layout = plan_layout(PAIRS, kind="shared", batch=4)
    with pytest.raises(ValueError, match=rf"ref_logps has shape \({count}, 2\), but \[{len(PAIRS)}, 2\] is expected"):
        train_batches(PAIRS, layout=layout, batch=4, seed=0, ref_logps=np.zeros((count, 2)))
    with pytest.raises(ValueError, match=rf"uids: expected one for each of the {len(PAIRS)} examples, got {count}"):
        train_batches(PAIRS, layout=layout, batch=4, seed=0, uids=["a"] * count)


def test_a_stream_says_where_it_ends():
    at = train_batches(PAIRS, layout=plan_layout(PAIRS, kind="shared", batch=4), batch=4, seed=0, epochs=1)
    steps = total_steps(len(PAIRS), batch=4, epochs=1)
    at(steps - 1)
    with pytest.raises(ValueError, match=rf"step {steps} is beyond epochs=1 \({steps} steps\): use total_steps"):
        at(steps)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="kind: expected one of plain, shared, packed, got 'Plain'"):
        plan_layout(PAIRS, kind="Plain", batch=4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no examples to lay out"):
        plan_layout([], kind="packed", batch=4)
    layout = plan_layout(PAIRS, kind="shared", batch=4)
    with pytest.raises(ValueError, match="no examples to train on"):
        train_batches([], layout=layout, batch=4, seed=0)
    for refused in (
        lambda: plan_layout(PAIRS, kind="packed", batch=0),
        lambda: train_batches(PAIRS, layout=layout, batch=0, seed=0),
        lambda: total_steps(len(PAIRS), batch=0, epochs=1),
    ):
        with pytest.raises(ValueError, match="batch: expected at least 1 example, got 0"):
            refused()
    with pytest.raises(TypeError, match=r"examples: expected their number, got list: give len\(examples\)"):
        total_steps([1, 2], batch=1, epochs=1)  # pyright: ignore[reportArgumentType]
