"""Models in other libraries' wrappers: torch.compile, accelerate, data parallel, pipelines; and what is no model."""

import functools
import logging

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model
from tokenizers_for_tests import chatml_tokenizer
from torch import nn

import deltamem_fast
from deltamem_fast import (
    DeltaMemConfig,
    MemoryBank,
    MemorySession,
    MemoryState,
    is_patched,
    layer_paths,
    memory_disabled,
    patch_model,
    unpatch_model,
)
from deltamem_fast.errors import ArgumentError, ArgumentTypeError, DeltaMemError, UnsupportedError

IDS = torch.arange(5, 25)[None]


@torch.no_grad()
def run(model, patched=True):
    """Logits, the memory (bare: None), and what is generated."""
    memory = MemoryState.zeros(model) if patched else None
    given = {"memory": memory} if patched else {}
    out = model(IDS, **given).logits
    return out, memory, model.generate(IDS, max_new_tokens=3, do_sample=False)


@functools.cache
def expected():
    """The same of a patched model without a wrapper, and the logits of the bare one."""
    bare = run(tiny_model(), False)[0]
    return *run(loud_adapter(patch_model(tiny_model()))), bare


def agrees(model):
    logits, memory, tokens = run(model)
    want, state, words, _ = expected()
    assert relative_error(logits, want) < 1e-5 and torch.equal(tokens, words)
    assert all(relative_error(memory[i], state[i]) < 1e-5 for i in state)


def is_bare_again(model):
    assert not is_patched(model)
    assert relative_error(run(model, False)[0], expected()[-1]) < 1e-6
    assert not [name for name, _ in model.named_parameters() if "delta" in name]


# --- accelerate


def cpu_offload(model, directory):
    import accelerate

    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def disk_offload(model, directory):
    import accelerate

    accelerate.disk_offload(model, directory, execution_device="cpu")


def dispatch(model, directory):
    import accelerate

    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    places |= {f"model.layers.0.{part}": "cpu" for part in parts}
    places |= {"model.layers.1": "disk", "model.layers.2": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True, offload_dir=directory)


@pytest.mark.parametrize("order", ("hooks first", "patch first"))
@pytest.mark.parametrize("hooks", (cpu_offload, disk_offload, dispatch))
def test_offloaded_and_dispatched(hooks, order, tmp_path):
    pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_module

    for unpatch_under_hooks in (True, False):
        model = tiny_model()
        if order == "hooks first":
            hooks(model, tmp_path)
        loud_adapter(patch_model(model, DeltaMemConfig(output_init="zero")))
        if order == "patch first":
            hooks(model, tmp_path)
        assert all(state.device.type == "cpu" for _, state in MemoryState.zeros(model).items())
        agrees(model)
        if unpatch_under_hooks:
            is_bare_again(unpatch_model(model))
            remove_hook_from_module(model, recurse=True)
        else:
            remove_hook_from_module(model, recurse=True)
            unpatch_model(model)
        is_bare_again(model)


def test_offloaded_with_all_that_is_in_a_layer():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["Qwen3DecoderLayer"])
    with pytest.raises(ArgumentError, match="model.layers.0 is offloaded .*preload_module_classes"):
        patch_model(model, DeltaMemConfig(output_init="zero"))
    assert not is_patched(model)


@pytest.mark.parametrize("keep", (True, False))
@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_unpatch_after_accelerates_mixed_precision(precision, keep, caplog):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=True)
        model = loud_adapter(patch_model(tiny_model()))
        prepared = accelerator.prepare(model)
        assert is_patched(prepared) and run(prepared)[1][0].norm() > 0
        inner = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
        assert run(inner)[1][0].norm() > 0
        with caplog.at_level(logging.WARNING, "deltamem_fast"):
            unpatch_model(inner)
        assert ("mixed precision" in caplog.text) == (precision == "bf16" and keep)
        is_bare_again(inner)
        assert "forward" not in vars(inner) or precision == "no"
    finally:
        AcceleratorState._reset_state(True)


# --- PEFT's virtual tokens


def virtual(kind, **settings):
    peft = pytest.importorskip("peft")
    return getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)


@pytest.mark.parametrize("order", ("peft first", "patch first"))
@pytest.mark.parametrize(
    ("kind", "settings"), [("PromptTuningConfig", {}), ("PromptEncoderConfig", {"encoder_hidden_size": 16})]
)
def test_virtual_tokens_in_front_of_a_prompt(kind, settings, order):
    config, model = virtual(kind, **settings), tiny_model()
    import peft

    if order == "patch first":
        patch_model(model)
    wrapped = peft.get_peft_model(model, config).eval()
    if order == "peft first":
        assert patch_model(wrapped) is wrapped
    loud_adapter(model)
    ids = torch.cat([IDS, IDS + 40])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids[1, :5] = 0
    written, again = MemoryState.zeros(wrapped, 2), MemoryState.zeros(wrapped, 2)
    with torch.no_grad():
        whole = wrapped.generate(
            input_ids=ids, attention_mask=mask, memory=written, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        read = whole[:, :-1]  # the last token is not fed
        mask = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], 1)
        wrapped(read, attention_mask=mask, memory=again)
    assert whole.shape[1] == ids.shape[1] + 4
    assert written[0].norm() > 0 and all(relative_error(written[i], again[i]) < 1e-4 for i in written)


@pytest.mark.parametrize("order", ("peft first", "patch first"))
@pytest.mark.parametrize("granularity", ("token", "message_mean"))
def test_rows_that_ended_and_segments_beside_virtual_tokens(order, granularity):
    import peft

    config, model = virtual("PromptTuningConfig"), tiny_model()
    adapter = DeltaMemConfig(memory_write_granularity=granularity)
    if order == "patch first":
        patch_model(model, adapter)
    wrapped = peft.get_peft_model(model, config).eval()
    if order == "peft first":
        patch_model(wrapped, adapter)
    loud_adapter(model)
    ids = torch.cat([IDS, IDS + 40])
    both, alone = MemoryState.zeros(wrapped, 2), MemoryState.zeros(wrapped, 1)
    settings = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        # Whatever row 0 says first ends it; its padding is not written.
        first = wrapped.generate(input_ids=ids[:1], memory=alone, **settings | {"max_new_tokens": 2})[0, ids.shape[1]]
        alone.zero_()
        ends = {"eos_token_id": int(first), "pad_token_id": 0}
        for rows, memory in ((ids, both), (ids[:1], alone)):
            wrapped.generate(input_ids=rows, attention_mask=torch.ones_like(rows), memory=memory, **settings, **ends)
    assert alone[0].norm() > 0 and all(relative_error(both[i][:1], alone[i]) < 1e-4 for i in alone)
    unpatch_model(wrapped)
    wrapped.generate(input_ids=ids, **settings)


def test_prefix_tuning_is_refused():
    config = virtual("PrefixTuningConfig")
    import peft

    with pytest.raises(UnsupportedError, match="model: PEFT's PREFIX_TUNING fills the cache"):
        patch_model(peft.get_peft_model(tiny_model(), config))
    model = peft.get_peft_model(patch_model(tiny_model()), config).eval()
    for call in (lambda: model(IDS), lambda: model.generate(input_ids=IDS, max_new_tokens=2)):
        with pytest.raises(ArgumentError, match="PEFT's prefix tuning has put its prefix there"):
            call()


# --- torch


def test_a_data_parallel_model_is_patched_before_it_is_wrapped():
    model = tiny_model()
    around = nn.DataParallel(model)
    with pytest.raises(ArgumentError, match="model: got a DataParallel, allowed the model in it"):
        patch_model(around)
    with pytest.raises(ArgumentError, match="DataParallel"):
        patch_model(torch.compile(around, backend="eager"))
    loud_adapter(patch_model(model))
    assert is_patched(around)
    memory = MemoryState.zeros(around)
    assert relative_error(around(IDS, memory=memory).logits, expected()[0]) < 1e-5


# --- what is no model


class LikeSentenceTransformer(nn.Sequential):
    """Holds a model, and has no configuration."""

    def __init__(self):
        super().__init__()
        self.add_module("0", nn.Module())
        self[0].auto_model = tiny_model()


def pipeline():
    from transformers import pipeline

    return pipeline("text-generation", model=tiny_model(), tokenizer=chatml_tokenizer())


NO_MODELS = {
    "None": (lambda: None, "got None, allowed a model of transformers"),
    "a name": (lambda: "Qwen/Qwen3-4B", "got the name 'Qwen/Qwen3-4B', allowed a model: AutoModelForCausalLM"),
    "a pipeline": (pipeline, "got a TextGenerationPipeline, allowed the model in it: its .model, a Qwen3ForCausalLM"),
    "a tokenizer": (chatml_tokenizer, "got a .*Tokenizer.*, allowed a model"),
    "a class": (
        lambda: type(tiny_model()),
        "got the class Qwen3ForCausalLM, allowed a model, as Qwen3ForCausalLM.from",
    ),
    "a number": (lambda: 3, "got a int, allowed a model"),
    "a dict of weights": (lambda: tiny_model().state_dict(), "got a .*Dict, allowed a model"),
    "a module": (lambda: nn.Linear(2, 2), "Linear"),
    "a model in a module": (LikeSentenceTransformer, "LikeSentenceTransformer"),
}


def takes_a_model(directory):
    """Every public function that takes a model, with other arguments that are right."""
    tokenizer = chatml_tokenizer()
    memory = MemoryState.zeros(patch_model(tiny_model()))
    yield "unpatch_model", unpatch_model
    yield "layer_paths", layer_paths
    yield "memory_disabled", lambda model: memory_disabled(model).__enter__()
    yield "MemoryState.zeros", MemoryState.zeros
    yield "MemoryState.load", lambda model: MemoryState.load(directory / "no file", model)
    yield "save_adapter", lambda model: deltamem_fast.save_adapter(model, directory / "adapter")
    yield "load_adapter", lambda model: deltamem_fast.load_adapter(model, directory / "adapter")
    yield "export_adapter", lambda model: deltamem_fast.export_adapter(model, directory / "adapter")
    yield "ingest", lambda model: deltamem_fast.ingest(model, tokenizer, memory, "a text")
    yield "retrieve", lambda model: deltamem_fast.retrieve(model, tokenizer, memory, "a text")
    yield "revise", lambda model: deltamem_fast.revise(model, tokenizer, memory, "a text")
    yield "forget", lambda model: deltamem_fast.forget(model, tokenizer, memory, "a text")
    yield "MemorySession", lambda model: MemorySession(model, tokenizer)
    yield "MemorySession.load", lambda model: MemorySession.load(directory, model, tokenizer)
    yield "MemoryBank", lambda model: MemoryBank(directory / "bank", model)


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_named(name, tmp_path):
    make, message = NO_MODELS[name]
    given = make()
    with pytest.raises(ArgumentTypeError, match=f"model: {'got a ' if isinstance(given, nn.Module) else ''}{message}"):
        patch_model(given)
    assert not is_patched(given)
    for function, call in takes_a_model(tmp_path):
        with pytest.raises(DeltaMemError, match="model: ") as caught:
            call(given)
        assert "not patched" in str(caught.value) or "allowed" in str(caught.value), function
    assert not list(tmp_path.iterdir())


# --- weights of a class of their own: .to() swaps them, where others get other data


class Halves(torch.Tensor):
    """A tensor in two parts, as quantised ones are in values and scales."""

    @staticmethod
    def __new__(cls, first, second):
        return torch.Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype, device=first.device)

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __tensor_flatten__(self):
        return ["first", "second"], None

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return Halves(parts["first"], parts["second"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        def each(name):
            taken = (getattr(a, name) if isinstance(a, cls) else a for a in args)
            return function(*taken, **(kwargs or {}))

        first, second = each("first"), each("second")
        whole = function.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.clone, torch.ops.aten._to_copy)
        return cls(first, second) if whole else first + second


def test_weights_of_a_class_of_their_own_are_moved():
    model = tiny_model()
    weight = model.model.layers[1].self_attn.q_proj.weight
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(Halves(weight.data / 2, weight.data / 2), False)
    loud_adapter(patch_model(model, DeltaMemConfig(output_init="random")))
    assert layer_paths(model)[1].path == "generic" and layer_paths(model)[0].path == "fast"
    before = run(model)[0]
    model.double().float()
    assert type(model.model.layers[1].self_attn.q_proj.weight.data) is Halves
    assert layer_paths(model)[0].path == "fast"
    assert relative_error(run(model)[0], before) < 1e-5


def test_weights_are_swapped_where_that_is_asked_for():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = loud_adapter(patch_model(tiny_model()), seed=2)
        model.double().float()
        model.load_state_dict(loud_adapter(patch_model(tiny_model())).state_dict())
        assert {path.path for path in layer_paths(model).values()} == {"fast"}
        agrees(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_move_that_fails_leaves_the_fast_path():
    model = loud_adapter(patch_model(tiny_model()))

    def refuse(tensor):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        model._apply(refuse)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.data = model.model.layers[0].self_attn.q_proj.weight.data.clone()
    assert {path.path for path in layer_paths(model).values()} == {"fast"}
    agrees(model)
