"""examples/recall_smollm2: the two numbers that are chosen after the last step, and the recall they are chosen by."""

import pytest
import torch
from safetensors.torch import load_file
from smollm2_for_tests import CONFIGS, example, fewer, fresh_trainee, short, stand_in
from tokenizers_for_tests import default_system_tokenizer

from deltamem_fast import patch_model


@pytest.fixture(scope="module")
def tokenizer():
    return default_system_tokenizer()


def test_calibration_adds_to_the_gates_logits_and_scales_keys_beside_their_null_direction(tokenizer):
    trainee, _ = fresh_trainee(tokenizer)
    before = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    example("calibrate").adjust(trainee.model, -2.0, 0.25)
    for name, now in trainee.model.named_parameters():
        expected = before[name]
        if name.endswith("beta_bias"):
            expected = expected - 2
        elif name.endswith("memory_k_proj"):
            expected = expected.clone()
            expected.view(2, 4, -1)[:, 2:] *= 0.25
        assert torch.equal(now, expected), name


@pytest.mark.parametrize("peak", [(-2.0, 0.5), (0.0, 1.0), (-4.0, 0.125)])
def test_the_best_setting_is_found_and_set(peak, tokenizer, monkeypatch):
    calibrate = example("calibrate")
    trainee, drawn = fresh_trainee(tokenizer)
    memory = trainee.model.model.layers[2].self_attn.delta_memory
    bias, rows = memory.beta_bias.detach().clone(), memory.memory_k_proj.detach().clone()

    def of_setting(*_, **__):
        """As if recall were best at ``peak``: near it, and less behind text."""
        shift = (memory.beta_bias - bias).mean().item()
        scale = (memory.memory_k_proj[2] / rows[2]).mean().item()
        right = 1 - 0.1 * abs(shift - peak[0]) - 0.2 * abs(scale - peak[1])
        return [right, right / 2]

    monkeypatch.setattr(calibrate, "recall", of_setting)
    found = calibrate.calibrate(trainee, drawn)
    assert [f.shift for f in found[:5]] == [0, -1, -2, -3, -4] and {f.scale for f in found[:5]} == {1.0}
    assert [(f.shift, f.scale) for f in found[5:]] == [(peak[0], scale) for scale in (0.5, 0.25, 0.125)]
    assert (calibrate.best(found).shift, calibrate.best(found).scale) == peak
    torch.testing.assert_close(memory.beta_bias, bias + peak[0])
    torch.testing.assert_close(memory.memory_k_proj[2:4], rows[2:4] * peak[1])


def test_of_equally_good_settings_the_first_is_taken():
    calibrate = example("calibrate")
    found = [
        calibrate.Calibration(-shift, 1.0, *right) for shift, right in enumerate([(0, 0), (0.75, 0.25), (0.25, 0.75)])
    ]
    assert calibrate.best(found) is found[1]


def test_a_finished_run_has_a_calibrated_and_quiet_adapter_and_the_checkpoint_as_trained(
    tokenizer, tmp_path, monkeypatch
):
    train, start = example("train"), example("start")
    fewer(monkeypatch)
    asked = []

    def second_is_best(*_, **__):
        """The first look is the estimate's; then come gates as trained, and narrower ones."""
        asked.append(None)
        return [1.0, 1.0] if len(asked) == 3 else [0.0, 0.0]

    monkeypatch.setattr(example("calibrate"), "recall", second_is_best)
    config, path = CONFIGS["msw"], tmp_path / "delta_mem_adapter.safetensors"
    assert train.train(stand_in(tokenizer), tokenizer, config, short(train), tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["adapter"]
    shipped = dict(patch_model(stand_in(tokenizer), tmp_path, backend="reference").named_parameters())
    for name, trained in kept.items():
        torch.testing.assert_close(shipped[name], trained - 2 if name.endswith("beta_bias") else trained)

    def longest():
        rows = [v.unflatten(0, (-1, 4))[:, 2:] for k, v in load_file(path).items() if "memory_q_proj" in k]
        return max(each.norm(dim=-1).max() for each in rows)

    # The bound on queries was a looser one when the checkpoint was written.
    (tmp_path / "training.json").unlink()
    assert start.QUIET / 2 < longest() < 1.0001 * start.QUIET
    monkeypatch.setattr(start, "QUIET", start.QUIET / 2)
    assert train.train(stand_in(tokenizer), tokenizer, config, short(train), tmp_path)
    assert longest() < 1.0001 * start.QUIET


@pytest.mark.parametrize("strategy", CONFIGS)
def test_recall_is_of_what_is_asked_at_once_and_behind_texts(strategy, tokenizer, monkeypatch):
    """Right as ``answer`` has it; each text changes the memory, asking does not."""
    trainee, drawn = fresh_trainee(tokenizer, strategy)
    states, rows_asked, answer = [], [], type(trainee).answer

    def watched(self, rows, memory):
        states.append([state.clone() for _, state in memory.items()])
        rows_asked.append(len(rows))
        loss, right = answer(self, rows, memory)
        assert all(torch.equal(before, state) for before, (_, state) in zip(states[-1], memory.items(), strict=True))
        share = (1.0, 0.5, 0.25)[(len(states) - 1) % 3]
        return loss, torch.arange(len(right)) < share * len(right)

    monkeypatch.setattr(type(trainee), "answer", watched)
    found = example("recall").recall(trainee, drawn, (1, 2), episodes=4, behind=(0, 1, 3))
    assert found == [1.0, 0.5, 0.25] and rows_asked == [4] * 6
    for at_once, one, three in zip(states[::3], states[1::3], states[2::3]):
        assert all(a.any() for a in at_once)
        for before, after in ((at_once, one), (one, three)):
            assert not any(torch.equal(a, b) for a, b in zip(before, after))
    assert example("recall").recall(trainee, drawn, (1,)) == [1.0] and rows_asked[-1] == drawn.size
