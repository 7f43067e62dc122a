"""examples/recall_smollm2: the numbers that are chosen after the last step, and the recall they are chosen by."""

import pytest
import torch
from smollm2_for_tests import CONFIGS, example, fewer, fresh_trainee, short, stand_in
from tokenizers_for_tests import default_system_tokenizer

from deltamem_fast import patch_model


@pytest.fixture(scope="module")
def tokenizer():
    return default_system_tokenizer()


def test_a_setting_is_added_to_the_gates_logits_and_scales_what_is_beside_the_null_directions(tokenizer):
    trainee, _ = fresh_trainee(tokenizer)
    before = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    example("calibrate").adjust(trainee.model, example("calibrate").Setting(-2.0, 0.25, 0.5))
    for name, now in trainee.model.named_parameters():
        expected = before[name].clone()
        if name.endswith("beta_bias"):
            expected -= 2
        for projection, scale in (("memory_k_proj", 0.25), ("memory_q_proj", 0.5)):
            if name.endswith(projection):
                expected.view(2, 4, -1)[:, 2:] *= scale
        assert torch.equal(now, expected), name


@pytest.mark.parametrize(("shift", "keys"), [(-2.0, 0.5), (0.0, 1.0), (-4.0, 0.125)])
def test_the_most_right_gates_and_keys_are_found_and_set_with_shorter_queries(shift, keys, tokenizer, monkeypatch):
    calibrate = example("calibrate")
    trainee, drawn = fresh_trainee(tokenizer)
    memory = trainee.model.model.layers[2].self_attn.delta_memory
    before = {name: p.detach().clone() for name, p in memory.named_parameters()}

    def as_if(*_, **__):
        """Recall is best at ``shift`` and ``keys``, less behind text, and suffers from shorter queries."""
        now = (memory.beta_bias - before["beta_bias"]).mean().item()
        k = (memory.memory_k_proj[2] / before["memory_k_proj"][2]).mean().item()
        q = (memory.memory_q_proj[2] / before["memory_q_proj"][2]).mean().item()
        right = q - 0.1 * abs(now - shift) - 0.2 * abs(k - keys)
        return [right, right / 2]

    monkeypatch.setattr(calibrate, "recall", as_if)
    found = [tried.setting for tried in calibrate.calibrate(trainee, drawn)]
    assert found[:5] == [calibrate.Setting(each) for each in (0, -1, -2, -3, -4)]
    assert found[5:8] == [calibrate.Setting(shift, each) for each in (0.5, 0.25, 0.125)]
    assert found[8:] == [calibrate.Setting(shift, keys, calibrate.QUERIES)]
    torch.testing.assert_close(memory.beta_bias, before["beta_bias"] + shift)
    torch.testing.assert_close(memory.memory_k_proj[2:4], before["memory_k_proj"][2:4] * keys)
    torch.testing.assert_close(memory.memory_q_proj[2:4], before["memory_q_proj"][2:4] * calibrate.QUERIES)


def test_of_equally_right_settings_the_first_is_the_best():
    calibrate = example("calibrate")
    every = [calibrate.Setting(-shift) for shift in range(3)]
    rights = (0.1, 0.1), (0.75, 0.25), (0.25, 0.75)
    assert calibrate.most_right([calibrate.Tried(each, *right) for each, right in zip(every, rights)]) is every[1]


def test_a_finished_run_has_the_calibrated_adapter_and_the_checkpoint_as_trained(tokenizer, tmp_path, monkeypatch):
    train = example("train")
    fewer(monkeypatch)
    looks = []

    def narrower_is_best(*_, **__):
        """The first two looks are the estimate's; then come gates as trained, and narrower ones."""
        looks.append(None)
        return [float(len(looks) == 4)] * 2

    monkeypatch.setattr(example("calibrate"), "recall", narrower_is_best)
    assert train.train(stand_in(tokenizer), tokenizer, CONFIGS["msw"], short(train), tmp_path)
    assert len(looks) == 6
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["adapter"]
    calibrated = dict(patch_model(stand_in(tokenizer), tmp_path, backend="reference").named_parameters())
    for name, trained in kept.items():
        expected = trained - 2 if name.endswith("beta_bias") else trained.clone()
        if name.endswith("memory_q_proj"):
            expected.view(2, 4, -1)[:, 2:] *= example("calibrate").QUERIES
        torch.testing.assert_close(calibrated[name], expected)


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
