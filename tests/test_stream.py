import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen3Config,
)

from kfac_prune.data import Windows
from kfac_prune.models import find_blocks, prunable_layers
from kfac_prune.objective import CAUSAL
from kfac_prune.quality import compared
from kfac_prune.stream import BlockStack, find_writers

SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}
#: family -> (configuration, names of the writers in a block, what the stream gains from each)
FAMILIES = {
    "llama": (LlamaConfig(**GATED), ("self_attn.o_proj", "mlp.down_proj"), 1.0),
    "qwen3": (Qwen3Config(**GATED, head_dim=8), ("self_attn.o_proj", "mlp.down_proj"), 1.0),
    "phi3": (Phi3Config(**GATED), ("self_attn.o_proj", "mlp.down_proj"), 1.0),
    "granite": (GraniteConfig(**GATED, residual_multiplier=0.25), ("self_attn.o_proj", "mlp.down_proj"), 0.25),
    "gpt2": (
        GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        ("attn.c_proj", "mlp.c_proj"),
        1.0,
    ),
    "opt": (
        OPTConfig(**SMALL, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16),
        ("self_attn.out_proj", "fc2"),
        1.0,
    ),
    "gpt_neox-parallel": (
        GPTNeoXConfig(**SMALL, intermediate_size=24, max_position_embeddings=32),
        ("attention.dense", "mlp.dense_4h_to_h"),
        1.0,
    ),
    "phi-parallel": (
        PhiConfig(**SMALL, intermediate_size=24, max_position_embeddings=32),
        ("self_attn.dense", "mlp.fc2"),
        1.0,
    ),
    # normalises what its layers give before it adds it: no layer writes into the stream itself
    "gemma2": (Gemma2Config(**GATED, head_dim=8), (), 1.0),
}


def build(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family][0]).eval()
    for parameter in model.parameters():  # away from the symmetric start, where outputs are nearly zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tokens(padded):
    ids = torch.randint(1, 48, (5, 9), generator=torch.Generator().manual_seed(1))
    if not padded:
        return Windows(ids)
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[1, 6:] = False
    mask[3, 3:] = False
    return Windows(ids, mask)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_through_all_blocks_is_the_models_own(family, padded):
    model, windows = build(family), tokens(padded)
    stack = BlockStack(model, windows, batch_size=2)
    last = []
    handle = stack.blocks[-1].register_forward_hook(lambda m, a, o: last.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        for batch in windows.batches(2):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    handle.remove()
    for index, entry in enumerate(stack.entries):
        stream = entry
        with torch.no_grad():
            for block in range(len(stack.blocks)):
                stream = stack.run(block, index, stream)
        assert torch.equal(stream, last[index])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_can_begin_at_every_block_and_after_the_last(family, padded):
    model, windows = build(family), tokens(padded)
    stack = BlockStack(model, windows, batch_size=2)
    with torch.no_grad():
        for index, batch in enumerate(windows.batches(2)):
            whole, stream = compared(model, batch, CAUSAL), stack.entries[index]
            for block in range(len(stack.blocks)):
                assert torch.equal(stack.compared(CAUSAL, block, index, stream), whole)
                stream = stack.run(block, index, stream)
            assert torch.equal(stack.compared(CAUSAL, len(stack.blocks), index, stream), whole)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_mixture_whose_configuration_asks_for_its_routers_loss_can_begin_after_the_last_block():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**GATED, num_local_experts=2, output_router_logits=True))
    stack = BlockStack(model.eval(), tokens(False), batch_size=5)
    with torch.no_grad():
        stream = stack.entries[0]
        for block in range(len(stack.blocks)):
            stream = stack.run(block, 0, stream)
        whole = compared(model, next(tokens(False).batches(5)), CAUSAL)
        assert torch.equal(stack.compared(CAUSAL, len(stack.blocks), 0, stream), whole)
    assert model.config.output_router_logits


@pytest.mark.parametrize("family", FAMILIES)
def test_writers_are_found_from_what_the_block_adds(family):
    model = build(family)
    layers = prunable_layers(model)
    stack = BlockStack(model, tokens(False), batch_size=5)
    names, blocks = find_blocks(model, layers)
    assert len(blocks) == 2
    mine = [layer for layer in layers if layer.name.startswith(f"{names[0]}.")]
    writers = find_writers(stack, 0, stack.entries[0], mine)
    _, expected, factor = FAMILIES[family]
    assert [writer.layer.name.removeprefix(f"{names[0]}.") for writer in writers] == list(expected)
    assert all(abs(writer.factor - factor) < 1e-3 for writer in writers)


def test_writers_are_found_where_a_large_stream_rounds_what_is_added():
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight *= 60
    model.bfloat16()
    stack = BlockStack(model, tokens(False), batch_size=5)
    layers = [layer for layer in prunable_layers(model) if ".layers.0." in layer.name]
    stream = stack.entries[0]
    added = (stack.run(0, 0, stream) - stream).float()
    assert added.norm() < 0.1 * stream.float().norm()
    writers = find_writers(stack, 0, stream, layers)
    assert [writer.layer.name.rpartition(".")[2] for writer in writers] == ["o_proj", "down_proj"]
    assert all(abs(writer.factor - 1) < 0.1 for writer in writers)


def test_without_a_stack_of_blocks_there_is_nothing_to_run():
    assert find_blocks(torch.nn.Linear(2, 2), []) == ([], [])


def test_arguments_that_are_equal_for_all_batches_are_kept_once():
    config = MistralConfig(**GATED, sliding_window=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    windows = tokens(False)

    def held(stack):
        found = []
        for calls in stack._calls:
            for call in calls:
                for value in (*call.args, *call.kwargs.values()):
                    found += [x for x in (value if isinstance(value, tuple) else [value]) if torch.is_tensor(x)]
        return {tensor.data_ptr() for tensor in found if tensor.numel()}

    one, all_five = (BlockStack(model, windows.chosen(torch.arange(count)), batch_size=1) for count in (1, 5))
    assert len(held(all_five)) == len(held(one)) > 2
