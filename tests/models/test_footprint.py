"""What a row takes, from the config alone: beside published figures, and beside the caches that Transformers makes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BloomConfig,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MambaConfig,
)

from batchgen.models import shapes
from batchgen.models.footprint import (
    CacheFormat,
    Execution,
    Footprint,
    LayerCacheShape,
    cache_bytes,
    cache_bytes_per_token,
    cached_heads,
    find_cache_format,
    find_experts_per_token,
    list_layer_caches,
)
from tests.sweep.kinds import build, make_config

HALF = Execution(2)

# Of each kind of cache: the same in all layers, windows in some or in all, a window that is not used, heads by layer,
# one head of keys, layers that keep a state of fixed size beside attention or instead of it, layers that reuse others'
# keys, and chunks.
# fmt: off
KINDS = [
    "llama", "bloom", "gpt2", "gpt_neox", "mpt", "opt", "phi", "olmo2", "qwen3", "qwen3_moe", "glm4_moe", "dots1",
    "cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "lfm3",
    "mistral", "mixtral", "phi3", "phimoe", "starcoder2",
    "qwen2", "qwen2_moe", "smollm3",
    "gemma4_text", "mimo_v2_flash",
    "falcon", "gpt_bigcode",
    "bamba", "falcon_h1", "granitemoehybrid", "jamba", "mamba", "nemotron_h", "qwen3_next", "recurrent_gemma", "zamba",
    "gemma3n_text", "llama4_text",
]
# fmt: on
LATENT = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4", "minicpm3", "kimi_linear"]
_TOKENS = 40  # more than the windows of 16 tokens


def generate_cache(kind: str) -> tuple[Any, list[Any]]:
    """Returns the config of a tiny model, and the layers of the cache that `generate` has filled for it."""
    model = build(kind)
    ids = torch.arange(4, 4 + _TOKENS).unsqueeze(0)
    output: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        min_new_tokens=2,
        use_cache=True,
        return_dict_in_generate=True,
    )
    return model.config, output.past_key_values.layers


def keys_of(layer: Any) -> torch.Tensor | None:
    """Returns the keys that a layer of a cache holds, [1, heads, tokens, size]; None: it holds none."""
    keys: torch.Tensor | None = getattr(layer, "keys", None)
    return keys


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_keeps_what_the_cache_of_transformers_holds(kind: str) -> None:
    config, layers = generate_cache(kind)
    found = []
    for layer in layers:
        keys = keys_of(layer)
        if keys is None:
            found.append((0, 0, 0, 0))
        else:
            found.append((keys.shape[1], keys.shape[3], layer.values.shape[3], keys.shape[2]))
    expected = list_layer_caches(config)
    # The token that was chosen last is in no cache yet. A window counts the token that looks through it.
    tokens = [each.count_tokens(_TOKENS + 1) - bool(each.window) if each.heads else 0 for each in expected]
    sizes = [(each.heads, each.key_size, each.value_size) for each in expected]
    assert [(*size, count) for size, count in zip(sizes, tokens, strict=True)] == found


@pytest.mark.parametrize("kind", LATENT)
def test_latent_attention_counts_expanded_and_is_cached_smaller(kind: str) -> None:
    config, layers = generate_cache(kind)
    for layer, expected in zip(layers, list_layer_caches(config), strict=True):
        keys = keys_of(layer)
        assert (keys is None) == (expected.heads == 0)
        if keys is not None:
            nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
            assert expected == LayerCacheShape(config.num_attention_heads, nope + rope, config.v_head_dim)
            held = keys.shape[1] * (keys.shape[3] + layer.values.shape[3])
            assert held == config.kv_lora_rank + rope < expected.heads * expected.head_size


@pytest.mark.parametrize(
    ("shape", "token", "tokens", "sequence"),
    [
        ("llama-8b", 131_072, 5000, 5000 * 131_072),
        ("qwen3-30b-a3b", 98_304, 5000, 5000 * 98_304),
        # Half of its layers see 128 tokens, and keep no more.
        ("gpt-oss-20b", 49_152, 100, 100 * 49_152),
        ("gpt-oss-20b", 49_152, 5000, 5000 * 24_576 + 128 * 24_576),
        # 40 of 48 layers see 1,024 tokens.
        ("gemma3-12b", 393_216, 5000, 5000 * 65_536 + 1024 * 327_680),
        ("deepseek-v2-lite", 276_480, 5000, 5000 * 276_480),
    ],
)
def test_the_cache_of_a_published_model(shape: str, token: int, tokens: int, sequence: int) -> None:
    config = shapes.config_of(shape)
    assert cache_bytes_per_token(config, CacheFormat(2)) == token
    assert cache_bytes(config, CacheFormat(2), tokens) == sequence
    assert cache_bytes(config, CacheFormat(2), tokens, ranks=4) == sequence // 4
    footprint = Footprint.of(config)
    assert footprint.cache_bytes(tokens, HALF) == sequence
    assert footprint.cache_bytes(tokens, Execution(2, drops_past_windows=False)) == tokens * token
    # A window touches a page more than it fills; windows of these are multiples of a page.
    page = sum(
        16 * count * layer.heads * layer.head_size * 2 for layer, count in footprint.caches.items() if layer.window
    )
    in_pages = sequence + (page if tokens > 1040 else 0)
    assert footprint.cache_bytes(tokens, Execution(2, page_size=16)) == in_pages


@pytest.mark.parametrize(
    ("shape", "token"), [("llama-8b", 66_048), ("bloom-7b1", 247_680), ("deepseek-v2-lite", 139_104)]
)
def test_a_cache_of_8_bits_has_a_byte_for_each_number_and_one_for_each_key_and_value(shape: str, token: int) -> None:
    config, kept = shapes.config_of(shape), find_cache_format("fp8")
    assert kept is not None
    assert cache_bytes_per_token(config, kept) == token
    in_pages = Execution(2, page_size=16, cache=kept)
    assert Footprint.of(config).cache_bytes(100, in_pages) == 100 * token
    assert cache_bytes_per_token(config, CacheFormat(2)) / token == pytest.approx(2, rel=0.02)


def test_pages_are_kept_where_layers_differ_in_more_than_having_a_window() -> None:
    footprint = Footprint.of(shapes.config_of("gpt-oss-20b"))
    alike, other, wider = LayerCacheShape(2, 8, 8, 32), LayerCacheShape(1, 16, 16), LayerCacheShape(2, 8, 8, 48)
    in_pages = Execution(2, page_size=16)
    for layers, kept in (
        ([alike, LayerCacheShape(2, 8, 8)], 48 + 500),
        ([alike, other], 1000),
        ([alike, wider], 1000),
        ([alike, alike], 96),
    ):
        assert replace(footprint, caches=Counter(layers)).cache_bytes(500, in_pages) == kept * 2 * 16 * 2


@pytest.mark.parametrize(
    ("tokens", "window", "page_size", "kept"),
    [
        (100, 0, 1, 100),
        (100, 0, 16, 112),
        (100, 16, 1, 16),
        (10, 16, 1, 10),
        # 16 tokens that begin anywhere lie in two pages of 16; 18 of them in three, and one in one.
        (100, 16, 16, 32),
        (100, 17, 16, 32),
        (100, 18, 16, 48),
        (100, 1, 16, 16),
        (20, 100, 16, 32),
    ],
)
def test_a_window_keeps_the_pages_that_it_can_touch(tokens: int, window: int, page_size: int, kept: int) -> None:
    layer = LayerCacheShape(1, 1, 1, window)
    assert layer.count_tokens(tokens, page_size) == kept
    if window and page_size > 1 and tokens > window + page_size:  # the largest of all places that a window can have
        places = range(window, window + page_size)
        assert kept == page_size * max(len({p // page_size for p in range(end - window, end)}) for end in places)


@pytest.mark.parametrize(
    ("changed", "window"),
    [
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, 0),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "mistral", "sliding_window": 16}, 16),
    ],
)
def test_a_window_counts_where_the_family_uses_it(changed: dict[str, Any], window: int) -> None:
    config = AutoConfig.for_model(**{"num_hidden_layers": 3, **changed})
    assert [layer.window for layer in list_layer_caches(config)] == [window] * 3


@pytest.mark.parametrize(
    ("kind", "chosen"), [("mixtral", 2), ("ernie4_5_moe", 2), ("aria_text", 2), ("hunyuan_v1_moe", 1), ("llama", 0)]
)
def test_experts_of_a_token_under_each_name_that_configs_have_for_them(kind: str, chosen: int) -> None:
    assert find_experts_per_token(make_config(kind)) == chosen


def test_a_dense_model_of_a_family_with_mixtures_has_no_experts() -> None:
    dense = AutoConfig.for_model("granitemoehybrid", num_local_experts=0)
    assert dense.num_experts_per_tok > 0
    assert find_experts_per_token(dense) == 0


def test_copies_of_experts_are_what_a_row_of_a_mixture_takes_most_of() -> None:
    footprint = Footprint.of(shapes.config_of("qwen3-30b-a3b"))
    plain, copied = (footprint.row_bytes(1, 1, Execution(2, copies_experts=copies)) for copies in (False, True))
    # Eight experts of three matrices; the activations of one prompt token are less, and there at another time.
    assert copied - plain == pytest.approx(8 * 3 * 2048 * 768 * 2, rel=0.001)
    dense = Footprint.of(shapes.config_of("llama-8b"))
    assert dense.row_bytes(1, 1, HALF) == dense.row_bytes(1, 1, Execution(2, copies_experts=True))


def test_a_row_takes_what_the_cache_of_a_published_model_takes() -> None:
    llama = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    )
    bloom = BloomConfig(hidden_size=4096, n_layer=30, n_head=32, vocab_size=250_880)
    for config, a_token in ((llama, 131_072), (bloom, 491_520)):
        one, more = (Footprint.of(config).row_bytes(0, new, HALF) for new in (1, 1001))
        assert more - one == 1000 * a_token
    sdpa, eager = (Footprint.of(bloom).row_bytes(512, 1, Execution(2, eager=eager)) for eager in (False, True))
    assert eager - sdpa == 32 * 512 * 512 * 6


def test_heads_that_share_one_key_and_models_without_any_are_known_from_the_config() -> None:
    falcon_7b = FalconConfig(hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, multi_query=True)
    assert cached_heads(falcon_7b) == (1, 64)
    falcon_40b = FalconConfig(
        hidden_size=8192, num_attention_heads=128, num_kv_heads=8, multi_query=True, new_decoder_architecture=True
    )
    assert cached_heads(falcon_40b) == (8, 64)
    mamba = MambaConfig(hidden_size=2560, num_hidden_layers=64, vocab_size=50_280, state_size=16, conv_kernel=4)
    assert cached_heads(mamba) == (0, 0)
    few, many = (Footprint.of(mamba).row_bytes(0, new, HALF) for new in (1, 1001))
    assert few == many == 50_280 * 8 + 64 * 5120 * 20 * 2


def test_sizes_that_differ_by_layer_count_as_the_largest() -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    gemma4 = Gemma4TextConfig(
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        num_hidden_layers=2,
        **small,
    )
    assert cached_heads(gemma4) == (2, 16)
    each = [
        Footprint.of(
            Gemma3nTextConfig(intermediate_size=inner, num_hidden_layers=2, num_kv_shared_layers=0, **small)
        ).row_bytes(5, 5, Execution(4))
        for inner in (128, [64, 128])
    ]
    assert each[0] == each[1]
