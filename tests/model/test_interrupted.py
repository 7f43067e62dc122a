"""Forwards that fail half-way, and caches that went on without their memory: the next use says so."""

import contextvars
import copy
import pickle

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model
from transformers import DynamicCache, StaticCache

from deltamem_fast import (
    DeltaMemError,
    MemoryState,
    load_adapter,
    memory_disabled,
    memory_state,
    patch_model,
    save_adapter,
    unpatch_model,
)
from deltamem_fast.model import patched_forward

IDS = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    return loud_adapter(patch_model(tiny_model()))


def cache_of(model, kind):
    return StaticCache(config=model.config, max_cache_len=64) if kind == "static" else DynamicCache(config=model.config)


class failing:
    """Inside, a part of the model raises."""

    def __init__(self, module, error):
        self.handle = module.register_forward_hook(self.fail)
        self.error = error

    def fail(self, *_):
        raise self.error("on the way")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


PLACES = {
    "first layer": lambda model: model.model.layers[0].mlp,
    "last layer": lambda model: model.model.layers[-1].mlp,
    "after the layers": lambda model: model.model.norm,
    "logits": lambda model: model.lm_head,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("length", [12, 1])
def test_a_memory_that_a_forward_left_half_written_is_marked(model, place, error, length):
    memory = MemoryState.zeros(model)
    with torch.no_grad():
        model(IDS, memory=memory, use_cache=False)
    before = memory.clone()
    with torch.no_grad(), failing(PLACES[place](model), error), pytest.raises(error):
        model(IDS[:, :length], memory=memory, use_cache=False)
    for use in (
        lambda: model(IDS, memory=memory, use_cache=False),
        lambda: model.generate(IDS, memory=memory, max_new_tokens=1),
        lambda: memory.save("never.safetensors"),
        lambda: model(IDS, memory=memory.clone(), use_cache=False),
        lambda: model(IDS, memory=memory.detach().read_only(), use_cache=False),
        lambda: model(IDS, memory=MemoryState.cat([memory]), use_cache=False),
        lambda: model(IDS, memory=copy.deepcopy(memory), use_cache=False),
    ):
        with torch.no_grad(), pytest.raises(DeltaMemError, match=f"memory: a forward .* cut short by {error.__name__}"):
            use()
    with torch.no_grad():
        model(IDS, memory=before, use_cache=False)
        model(IDS, memory=memory.zero_(), use_cache=False)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("place", PLACES)
def test_so_is_a_cache(model, kind, place):
    cache = cache_of(model, kind)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with failing(PLACES[place](model), RuntimeError), pytest.raises(RuntimeError):
            model(IDS, past_key_values=cache)
        with pytest.raises(DeltaMemError, match="past_key_values: a forward with this cache was cut short"):
            model(IDS, past_key_values=cache)
        with pytest.raises(DeltaMemError, match="cut short"):
            memory_state(cache).save("never.safetensors")
        cache.reset()
        if kind == "static":
            model(IDS, past_key_values=cache)


def fails(*_):
    raise KeyboardInterrupt("late")


def accelerates_hook(module):
    hooks = pytest.importorskip("accelerate.hooks")
    hook = hooks.ModelHook()
    hook.post_forward = fails
    hooks.add_hook_to_module(module, hook)
    return lambda: hooks.remove_hook_from_module(module)


def global_hook(module):
    def hook(called, *_):
        if called is module:
            fails()

    return torch.nn.modules.module.register_module_forward_hook(hook).remove


# What raises when the patched forward is over, and how it is taken off again.
LATE = {
    "hook": lambda module: module.register_forward_hook(fails).remove,
    "always called": lambda module: module.register_forward_hook(fails, always_call=True).remove,
    "global": global_hook,
    "accelerate": accelerates_hook,
}


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("part", ["model", "decoder"])
@pytest.mark.parametrize("kind", LATE)
def test_so_is_what_a_hook_behind_the_forward_spoils(kind, part, train):
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1), backend="reference"))
    called = model if part == "model" else model.model
    memory, own, other = MemoryState.zeros(model), cache_of(model, "dynamic"), cache_of(model, "dynamic")
    remove = LATE[kind](called)
    for arguments in ({"memory": memory, "past_key_values": other}, {"past_key_values": own}):
        with torch.set_grad_enabled(train), pytest.raises(KeyboardInterrupt, match="late"):
            called(IDS, **arguments)
    remove()
    for arguments in ({"memory": memory}, {"past_key_values": own}, {"memory": memory.clone()}):
        with torch.no_grad(), pytest.raises(DeltaMemError, match="cut short by KeyboardInterrupt"):
            called(IDS, **arguments)
    with torch.no_grad(), pytest.raises(DeltaMemError, match="past_key_values: .* cut short by KeyboardInterrupt"):
        called(IDS, memory=memory.zero_(), past_key_values=other)
    called(IDS, memory=memory)
    unpatch_model(model)
    assert "_call_impl" not in vars(model) | vars(model.model)


def test_a_context_that_outlives_the_forward_keeps_nothing_of_it():
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1)))
    kept = []
    remove = model.register_forward_hook(lambda *_: kept.append(contextvars.copy_context())).remove
    with torch.no_grad():
        model(IDS)
        remove()
        assert kept[0][patched_forward._running].calls is None
        memory = MemoryState.zeros(model)
        late = model.register_forward_hook(fails).remove
        with pytest.raises(KeyboardInterrupt, match="late"):
            kept[0].run(model, IDS, memory=memory)
        late()
        with pytest.raises(DeltaMemError, match="cut short by KeyboardInterrupt"):
            model(IDS, memory=memory)


def test_another_model_called_in_a_hook_is_not_marked_with_it(model):
    inner = loud_adapter(patch_model(tiny_model(num_hidden_layers=1), backend="reference"))
    memories = [MemoryState.zeros(model), MemoryState.zeros(inner)]

    def hook(*_):
        inner(IDS, memory=memories[1], use_cache=False)
        raise RuntimeError("late")

    handle = model.register_forward_hook(hook)
    with torch.no_grad(), pytest.raises(RuntimeError, match="late"):
        model(IDS, memory=memories[0], use_cache=False)
    handle.remove()
    inner(IDS, memory=memories[1], use_cache=False)
    with pytest.raises(DeltaMemError, match="cut short"):
        model(IDS, memory=memories[0], use_cache=False)


def test_what_a_hook_has_run_well_is_not_marked_with_the_call_around_it(model):
    memories = [MemoryState.zeros(model) for _ in range(2)]

    def hook(*_):
        handle.remove()
        model(IDS, memory=memories[1], use_cache=False)
        raise RuntimeError("late")

    handle = model.register_forward_hook(hook)
    with torch.no_grad(), pytest.raises(RuntimeError, match="late"):
        model(IDS, memory=memories[0], use_cache=False)
    model(IDS, memory=memories[1], use_cache=False)
    with pytest.raises(DeltaMemError, match="cut short"):
        model(IDS, memory=memories[0], use_cache=False)


def test_a_backward_that_fails_leaves_the_memory_as_the_forward_did():
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=2), backend="reference"))
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    memory, calls = MemoryState.zeros(model), []
    loss = model(IDS, memory=memory, use_cache=False).logits.square().mean()
    before = memory.detach()

    def second(*_):  # in the recomputation
        calls.append(1)
        raise RuntimeError("late")

    handle = model.model.layers[0].mlp.register_forward_pre_hook(second)
    with pytest.raises(RuntimeError, match="late"):
        loss.backward()
    handle.remove()
    assert calls and all(torch.equal(memory[i], before[i]) for i in memory)
    kept = memory.detach()
    model(IDS, memory=kept, use_cache=False).logits.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_what_fails_before_the_layers_marks_nothing(model):
    memory, cache = MemoryState.zeros(model), DynamicCache(config=model.config)
    with torch.no_grad():
        for arguments in ({"input_ids": IDS + 1000}, {"input_ids": IDS, "token_mask": 3}):
            with pytest.raises((IndexError, ValueError)):
                model(memory=memory, past_key_values=cache, **arguments)
        model(IDS, memory=memory, past_key_values=cache)
        with pytest.raises(IndexError):
            model(IDS + 1000, memory=memory, past_key_values=cache)
        model(IDS, memory=memory, past_key_values=cache)


def test_a_frozen_memory_is_not_marked(model):
    memory = MemoryState.zeros(model)
    memory.frozen = True
    with torch.no_grad(), failing(model.lm_head, RuntimeError), pytest.raises(RuntimeError):
        model(IDS, memory=memory, use_cache=False)
    model(IDS, memory=memory, use_cache=False)


def test_under_autograd_too(model):
    memory = MemoryState.zeros(model)
    with failing(model.model.layers[1], RuntimeError), pytest.raises(RuntimeError):
        model(IDS, memory=memory, use_cache=False)
    with pytest.raises(DeltaMemError, match="cut short"):
        model(IDS, memory=memory, use_cache=False)


@pytest.mark.parametrize("owner", ["caller", "cache"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_that_the_memory_has_not_read_are_noticed(owner, kind, tmp_path):
    model = loud_adapter(patch_model(tiny_model()))
    save_adapter(model, tmp_path)
    memory = {"memory": MemoryState.zeros(model)} if owner == "caller" else {}

    def filled():
        cache = cache_of(model, kind)
        if memory:
            memory["memory"].zero_()
        model(IDS, past_key_values=cache, **memory)
        return cache

    with torch.no_grad():
        cache, copied = filled(), copy.deepcopy(filled())
        for used in (cache, copied):
            with memory_disabled(model):
                model(IDS, past_key_values=used)
            with pytest.raises(DeltaMemError, match="got tokens while the memory was disabled"):
                model(IDS, past_key_values=used, **memory)
        if owner == "cache":  # also where its memory is handed over as if it were the caller's
            with pytest.raises(DeltaMemError, match="got tokens while the memory was disabled"):
                model(IDS, past_key_values=cache, memory=memory_state(cache))
        cache = filled()
        unpatch_model(model)
        model(IDS, past_key_values=cache)
        patch_model(model, tmp_path)
        with pytest.raises(DeltaMemError, match="holds 24 tokens, of which its memory has read 12"):
            model(IDS, past_key_values=cache, **memory)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_keys_of_one_adapter_do_not_go_on_under_another(kind, tmp_path):
    model, other = (loud_adapter(patch_model(tiny_model()), seed=seed) for seed in (1, 2))
    save_adapter(other, tmp_path)
    cache, memory = cache_of(model, kind), MemoryState.zeros(other)
    with torch.no_grad():
        model(IDS, past_key_values=cache, memory=MemoryState.zeros(model))
        with pytest.raises(DeltaMemError, match="its keys and values were computed under another adapter"):
            other(IDS, past_key_values=cache, memory=memory)
        load_adapter(model, tmp_path)
        with pytest.raises(DeltaMemError, match="its keys and values were computed under another adapter"):
            model(IDS, past_key_values=cache, memory=MemoryState.zeros(model))
        cache.reset()
        if kind == "static":  # a dynamic one keeps the length of its keys
            model(IDS, past_key_values=cache, memory=MemoryState.zeros(model))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_pickled_cache_and_memory_still_know_their_adapter(model, kind):
    other = loud_adapter(patch_model(tiny_model()), seed=2)
    cache, memory = cache_of(model, kind), MemoryState.zeros(model)
    with torch.no_grad():
        model(IDS, past_key_values=cache, memory=memory)
        found, read = pickle.loads(pickle.dumps((cache, memory)))
        with pytest.raises(DeltaMemError, match="past_key_values: .* under another adapter"):
            other(IDS, past_key_values=found, memory=MemoryState.zeros(other))
        with pytest.raises(DeltaMemError, match="memory: made under adapter"):
            other(IDS, memory=read)
        wanted = model(IDS, past_key_values=cache, memory=memory).logits
        assert torch.equal(model(IDS, past_key_values=found, memory=read).logits, wanted)


@pytest.mark.parametrize("change", ["a training step", "load_state_dict", "other tensors"])
def test_keys_of_weights_that_were_trained_since_do_not_go_on(change):
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1), backend="reference"))
    cache, memory = cache_of(model, "dynamic"), MemoryState.zeros(model)
    with torch.no_grad():
        model(IDS, past_key_values=cache, memory=memory)
        model(IDS, past_key_values=cache, memory=memory)
    if change == "load_state_dict":
        model.load_state_dict(model.state_dict())
    elif change == "other tensors":
        with torch.inference_mode():  # whose versions nothing counts
            model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)
    else:
        model.requires_grad_(False)
        adapter = [p.requires_grad_() for n, p in model.named_parameters() if ".delta_memory." in n]
        model(IDS, use_cache=False).logits.square().mean().backward()
        torch.optim.AdamW(adapter, 1e-3).step()
    with torch.no_grad():
        with pytest.raises(DeltaMemError, match="past_key_values: the adapter's weights were changed"):
            model(IDS, past_key_values=cache, memory=memory)
        model(IDS, memory=memory)  # a memory goes on: that is how one is trained over several contexts


def test_a_cache_that_was_cut_by_hand_does_not_go_on_with_its_memory(model):
    cache, memory = cache_of(model, "dynamic"), MemoryState.zeros(model)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
        with pytest.raises(DeltaMemError, match="holds 5 tokens, but its memory has read 12: .* were cut"):
            model(IDS, past_key_values=cache)
        # A caller who cuts a cache can take back a memory of their own.
        cache = cache_of(model, "dynamic")
        model(IDS[:, :5], past_key_values=cache, memory=memory)
        before = memory.clone()
        model(IDS, past_key_values=cache, memory=memory)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
        model(IDS, past_key_values=cache, memory=before)
    assert all(relative_error(before[i], memory[i]) < 1e-5 for i in memory)


def test_compiled_forwards_look_at_the_marks_too(model, tmp_path):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    memory, cache = MemoryState.zeros(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache, memory=memory)
        with memory_disabled(model):
            model(IDS, past_key_values=cache)
        with pytest.raises(Exception, match="got tokens while the memory was disabled"):
            compiled(IDS[:, :1], past_key_values=cache, memory=memory)
        other = loud_adapter(patch_model(tiny_model()), seed=2)
        static = cache_of(model, "static")
        compiled(IDS, past_key_values=static, memory=MemoryState.zeros(model))
        with pytest.raises(DeltaMemError, match="computed under another adapter"):
            other(IDS, past_key_values=static, memory=MemoryState.zeros(other))
        # Eager ones behind them are counted again.
        memory = MemoryState.zeros(model)
        model(IDS, past_key_values=static, memory=memory)
        tiny_model()(IDS, past_key_values=static)
        with pytest.raises(DeltaMemError, match="holds 36 tokens, of which its memory has read 24"):
            model(IDS, past_key_values=static, memory=memory)


def test_an_early_refusal_marks_no_memory_of_a_cache(model):
    cache = cache_of(model, "static")
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        cache.reset()
        with pytest.raises(ValueError, match="token_mask"):
            model(IDS, past_key_values=cache, token_mask=3)
        model(IDS, past_key_values=cache)
