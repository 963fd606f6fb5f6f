"""The prompts of the optimum are checked before a sweep begins, not after its hours."""

from conftest import GOLDEN
from tiny_run import call

from dpo_jax.lab.world import World

CONFIG = """\
run: {{dir: {dir}}}
data: {{source: reviews, reviews_train: 16, reviews_test: 8, max_length: 128, max_prompt_length: 64}}
tokenizer: {{path: {golden}/tokenizer}}
model: {{path: {golden}/gpt_neox/init}}
dpo: {{policy: {golden}/gpt_neox/init}}
frontier: {{methods: dpo, prompts: 4, test_prompts: 4, optimum_prompts: 6, max_new_tokens: 4}}
"""


def test_prompts_of_the_optimum_that_do_not_fit_are_refused_before_any_run(tmp_path, monkeypatch):
    def too_long(self, *, train, test):
        assert len(test.ids) > len(self.test.ids)
        raise ValueError("a prompt of 99 tokens")

    monkeypatch.setattr(World, "with_prompts", too_long)
    config = tmp_path / "toy.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run", golden=GOLDEN))
    code, _, err = call("frontier", config)
    assert code == 2, err
    assert "frontier.optimum_prompts: a prompt of 99 tokens; lower data.max_prompt_length" in err
    assert not (tmp_path / "run" / "frontier" / "runs").exists()


def test_whole_prompts_that_leave_no_room_are_refused_before_anything_is_sampled(tmp_path):
    config = tmp_path / "toy.yaml"
    config.write_text(CONFIG.format(dir=tmp_path / "run", golden=GOLDEN))
    code, _, err = call(
        "frontier", config, "--data.truncation", "completions", "--data.max-prompt-length", 4, "--data.max-length", 9
    )
    assert code == 2, err
    assert "data.max_length: 9 leaves no token for a completion of the longest prompt" in err
    assert not (tmp_path / "run" / "frontier" / "runs").exists()
