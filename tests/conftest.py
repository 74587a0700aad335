"""Tiny models with random weights, token windows, and a comparison that scales with the values."""

import multiprocessing
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test looks for a model on the network

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedModel

from kfac_prune.data import Windows

VOCABULARY = 48
CONTEXT = 16
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **IDS,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_inner=40, n_layer=2, n_head=4, n_positions=CONTEXT, **IDS
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        word_embed_proj_dim=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        **IDS,
    ),
}
FAMILIES = tuple(CONFIGS)


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in evaluation mode whose predictions vary with the context and whose biases and norms matter."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.25 * noise)
            else:
                parameter.add_(0.2 * noise)
            parameter.data = parameter.to(dtype)  # buffers stay in float32, as in a model from disk
    return model.eval()


def random_windows(count: int = 5, length: int = 9, *, seed: int = 0, lengths: tuple[int, ...] = ()) -> Windows:
    """Random token ids; with ``lengths`` the rows are padded on the right to ``length``."""
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    if not lengths:
        return Windows(ids)
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    return Windows(torch.where(mask, ids, IDS["pad_token_id"]), mask)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance`` times the largest expected magnitude."""
    expected = expected.to(torch.float64)
    limit = tolerance * float(expected.abs().max())
    torch.testing.assert_close(actual.to(torch.float64), expected, rtol=0, atol=limit)


def forkserver() -> multiprocessing.context.ForkServerContext:
    """What starts processes that need not import everything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kfac_prune.pipeline"])
    return context


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """One model per family: Llama (grouped queries), GPT-2 (Conv1D) and OPT (Linear with bias), heads tied."""
    return build(family)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return build


@pytest.fixture
def make_windows() -> Callable[..., Windows]:
    return random_windows


@pytest.fixture
def near() -> Callable[[Tensor, Tensor, float], None]:
    return assert_near
