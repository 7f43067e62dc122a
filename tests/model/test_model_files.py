"""Whatever a patched model is saved with is loaded again: safetensors, accelerate, transformers, its Trainer, PEFT."""

import copy
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from support import loud_adapter, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

from deltamem_fast import load_adapter, patch_model, unpatch_model
from deltamem_fast.adapter.files import ADAPTER_FILES, SAFETENSORS_NAME, adapter_state_dict, read_weights
from deltamem_fast.config import CONFIG_NAME

IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(7))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture(scope="module")
def saved():
    """A patched model that no test changes."""
    return loud_adapter(patch_model(tiny_model()))


def other():
    return loud_adapter(patch_model(tiny_model(seed=5)), seed=9)


# --- state dicts


def test_no_two_tensors_look_tied(saved):
    model = copy.deepcopy(saved)
    for patched in (saved, model):
        tensors = patched.state_dict()
        storages = [tensor.untyped_storage() for tensor in tensors.values()]
        assert len({storage.data_ptr() for storage in storages}) == len(tensors)
        assert all(storage.nbytes() == tensor.nbytes for storage, tensor in zip(storages, tensors.values()))
    unpatch_model(model)  # each has its own memory again
    packed = model.model.layers[0].self_attn.q_proj.weight
    assert packed.untyped_storage().resizable()


def test_a_packed_weight_is_not_packed_by_another_model(saved):
    model = tiny_model()
    mine, theirs = (m.model.layers[0].self_attn.q_proj for m in (model, saved))
    mine.weight, place = theirs.weight, theirs.weight.data_ptr()
    patch_model(model)
    assert theirs.weight.data_ptr() == place


@pytest.mark.parametrize("way", ("save_model", "save_file", "torch.save", "parameters"))
def test_safetensors_and_torch(saved, tmp_path, way):
    model, path = other(), tmp_path / "weights"
    if way == "save_model":
        save_model(saved, path)
        assert load_model(model, path) == (set(), [])
    elif way == "torch.save":
        torch.save(saved.state_dict(), path)
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        save_file(saved.state_dict() if way == "save_file" else dict(saved.named_parameters()), path)
        model.load_state_dict(load_file(path))
    assert torch.equal(logits(model), logits(saved))
    # Every tensor is in the file once.
    assert os.path.getsize(path) < 1.3 * sum(tensor.nbytes for tensor in saved.state_dict().values())


@pytest.mark.parametrize("way", ("save_model", "shards", "save_state", "save_state, pickled"))
def test_accelerate(saved, tmp_path, way):
    accelerate = pytest.importorskip("accelerate")
    accelerator, model = accelerate.Accelerator(cpu=True), other()
    if way.startswith("save_state"):
        prepared = accelerator.prepare(copy.deepcopy(saved))
        accelerator.save_state(tmp_path, safe_serialization=way == "save_state")
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(model)
        accelerator.load_state(tmp_path)
        assert torch.equal(logits(prepared), logits(saved))
    else:
        accelerator.save_model(saved, tmp_path, max_shard_size="200KB" if way == "shards" else "1GB")
        accelerate.load_checkpoint_in_model(model, tmp_path)
    assert same(model.state_dict(), saved.state_dict()) and torch.equal(logits(model), logits(saved))


# --- save_pretrained


OPTIONS = {
    "plain": {},
    "small shards": {"max_shard_size": "200KB"},
    "not the original format": {"save_original_format": False},
    "a state dict": {"state_dict": ...},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_save_pretrained(saved, tmp_path, options):
    model = saved
    if "state_dict" in options:
        # The weights of another moment than now.
        options = {"state_dict": {key: tensor.clone() for key, tensor in saved.state_dict().items()}}
        model = other()
    model.save_pretrained(tmp_path, **options)
    assert same(read_weights(tmp_path), adapter_state_dict(saved))
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits(patch_model(loaded, tmp_path)), logits(saved))


def test_a_state_dict_with_a_part_of_the_adapter_or_none(saved, tmp_path, caplog):
    whole = saved.state_dict()
    part = {key: value for key, value in whole.items() if "memory_q_proj" not in key}
    with pytest.raises(ValueError, match=r"state_dict: lacks 3 of the adapter's 27 weights .*memory_q_proj"):
        saved.save_pretrained(tmp_path, state_dict=part)
    assert not os.listdir(tmp_path)
    bare = {key: value for key, value in whole.items() if "delta_memory" not in key}
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        saved.save_pretrained(tmp_path, state_dict=bare)
    assert "holds no adapter" in caplog.text and not {*ADAPTER_FILES} & {*os.listdir(tmp_path)}


def test_another_process_writes_nothing(saved, tmp_path, caplog):
    saved.save_pretrained(tmp_path, False)
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        saved.save_pretrained(tmp_path, False, {})  # as FSDP gives it to all but the first
    assert not caplog.text and not {*ADAPTER_FILES} & {*os.listdir(tmp_path)}


@pytest.mark.parametrize("way", ("push_to_hub", "save_pretrained"))
def test_the_whole_model_is_pushed_with_its_adapter(saved, tmp_path, monkeypatch, way):
    sent = {}

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Repository", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **_):
            sent[repo_id] = sorted(operation.path_in_repo for operation in operations)

    class Card:
        def save(self, path):
            pass

    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        for name, value in (
            ("hf_api", Api),
            ("create_repo", Api().create_repo),
            ("create_commit", Api().create_commit),
        ):
            monkeypatch.setattr(f"{module}.{name}", value, raising=False)
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: Card())
    if way == "push_to_hub":
        saved.push_to_hub("someone/model")
    else:
        for _ in range(2):  # the second time over files that are there
            saved.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/model")
    assert {SAFETENSORS_NAME, CONFIG_NAME, "model.safetensors", "config.json"} <= {*sent["someone/model"]}


# --- transformers' Trainer, as it is


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(output, checkpoint=None, model=None, steps=4):
    """A run of a plain Trainer, its weights, and where they are; a rate that makes every step worse than the first."""
    model = other() if model is None else model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("delta_memory" in name and parameter.requires_grad)
    arguments = TrainingArguments(
        output_dir=output, max_steps=steps, per_device_train_batch_size=2, learning_rate=1.0,
        lr_scheduler_type="constant", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", report_to="none", disable_tqdm=True, use_cpu=True,
        logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Examples(), eval_dataset=Examples())
    trainer.train(resume_from_checkpoint=checkpoint)
    return model, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    model, trainer = train(output, model=loud_adapter(patch_model(tiny_model()), seed=3))
    return output, model, trainer


def test_the_trainer_loads_the_best_model(run):
    output, model, trainer = run
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(adapter_state_dict(model), read_weights(output / "checkpoint-2"))
    assert not same(adapter_state_dict(model), read_weights(output / "checkpoint-4"))


@pytest.mark.parametrize("kind", ("one file", "shards"))
def test_the_trainer_goes_on_from_a_checkpoint(run, tmp_path, kind):
    output = run[0]
    checkpoint = output / "checkpoint-2"
    if kind == "shards":
        checkpoint = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
        AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size="200KB")
        (checkpoint / "model.safetensors").unlink()
    train(tmp_path, str(checkpoint))
    assert same(read_weights(tmp_path / "checkpoint-4"), read_weights(output / "checkpoint-4"))


def test_a_checkpoint_without_an_adapter_leaves_it_and_says_so(tmp_path, caplog):
    tiny_model().save_pretrained(tmp_path, max_shard_size="200KB")
    model = other()
    before = adapter_state_dict(model)
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        load_sharded_checkpoint(model, tmp_path, strict=False)
    assert "holds no adapter" in caplog.text and same(adapter_state_dict(model), before)


def test_the_backbones_checkpoint_is_loaded_into_a_patched_model(saved, tmp_path, caplog):
    saved.save_pretrained(tmp_path)
    weights, model = load_file(tmp_path / "model.safetensors"), other()
    adapter = adapter_state_dict(model)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(weights)
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        result = model.load_state_dict(weights, strict=False)
    assert not result.missing_keys and not result.unexpected_keys and "holds no adapter" in caplog.text
    assert same(adapter_state_dict(model), adapter) and torch.equal(model.lm_head.weight, saved.lm_head.weight)


# --- PEFT


def test_peft_around_a_model_that_is_then_patched(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], r=4))
    loud_adapter(patch_model(model))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(patch_model(again, tmp_path)), logits(model))
    unpatch_model(model)
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / CONFIG_NAME).exists()


def goes_on(wrapped, tmp_path):
    """A run that begins at another's checkpoint ends as that one does, whatever model it was given."""
    train(tmp_path / "whole", model=wrapped(3))
    train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"), model=wrapped(4))
    whole, again = (read_weights(tmp_path / name / "checkpoint-4") for name in ("whole", "again"))
    assert same(whole, again) and not same(whole, read_weights(tmp_path / "whole" / "checkpoint-2"))


def test_the_trainer_goes_on_with_peft_and_a_memory(tmp_path):
    peft = pytest.importorskip("peft")

    def wrapped(seed):
        config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
        torch.manual_seed(0)
        return loud_adapter(patch_model(peft.get_peft_model(tiny_model(), config)), seed=seed)

    goes_on(wrapped, tmp_path)


def test_peft_trains_the_memory_beside_lora(saved, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["delta_memory"])
    model = peft.get_peft_model(copy.deepcopy(saved), config)
    trained = model.base_model.model.model.layers[0].self_attn.delta_memory.modules_to_save["default"].memory_q_proj
    with torch.no_grad():
        trained.add_(1)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(saved), tmp_path)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(saved))
    assert torch.equal(adapter_state_dict(model)["model.layers.0.self_attn.memory_q_proj"], trained)


def test_an_offloaded_adapter_is_saved(saved, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(copy.deepcopy(saved), execution_device=torch.device("cpu"))
    assert same(adapter_state_dict(model), adapter_state_dict(saved))
    other = loud_adapter(patch_model(tiny_model()), seed=7)
    other.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)  # it stays on the device that computes
    assert same(adapter_state_dict(model), adapter_state_dict(other))


def test_peft_around_a_patched_model_saves_the_memory_too(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(saved), peft.LoraConfig(target_modules=["q_proj"], r=4))
    model.state_dict()  # by itself it writes nothing
    model.save_pretrained(tmp_path / "another process", is_main_process=False)
    assert not (tmp_path / "another process" / CONFIG_NAME).exists()
    model.save_pretrained(tmp_path / "here")
    assert same(read_weights(tmp_path / "here"), adapter_state_dict(saved))
    again = peft.PeftModel.from_pretrained(patch_model(tiny_model(), tmp_path / "here"), tmp_path / "here")
    assert torch.equal(logits(again), logits(model))
    unpatch_model(model)
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / CONFIG_NAME).exists()


def test_the_trainer_goes_on_with_peft_around_a_patched_model(tmp_path):
    peft = pytest.importorskip("peft")

    def wrapped(seed):
        model = loud_adapter(patch_model(tiny_model()), seed=seed)
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
        around = peft.get_peft_model(model, config)  # which freezes the memory
        for layer in model.model.layers:
            layer.self_attn.delta_memory.requires_grad_()
        return around

    goes_on(wrapped, tmp_path)
