"""The networks' parts by hand: shared heads, what a mask hides, the VAE's moments."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nextstep_core.model.flow_head import TIME_FEATURES, FlowHead, time_features
from nextstep_core.model.kv_cache import KVCache, bucketed
from nextstep_core.model.nextstep import NextStepModel, TextEmbedding
from nextstep_core.model.transformer import fused_rows, grouped_attention, span_at, whole_span
from nextstep_core.model.vae import AutoencoderKL, channel_norm


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("length", [1, 3])
def test_shared_heads_are_repeated_heads(kv_heads: int, length: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, length, 4)
    k, v = torch.randn(2, 2, kv_heads, 5, 4)
    mask = torch.zeros(2, 1, length, 5).masked_fill(torch.rand(2, 1, length, 5) < 0.4, -torch.inf)
    mask[..., 0] = 0
    repeated = (x.repeat_interleave(6 // kv_heads, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask)
    assert (grouped_attention(q, k, v, mask) - expected).abs().max() <= 1e-6


def test_a_mask_by_hand() -> None:
    """Positions 1 and 3 of rows with no and with two padded places, in a cache of 6; a padded query sees itself."""
    valid = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    span = span_at(torch.tensor([1, 3]), torch.arange(12.0).view(2, 6, 1), valid, visible=5)
    seen = (span.mask[:, 0] == 0).int().tolist()
    assert seen == [[[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], [[0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]]
    assert set(span.mask.unique().tolist()) == {0.0, -math.inf}
    assert span.rotary.flatten().tolist() == [1, 3, 7, 9] and span.visible == 5


def test_the_cache_keeps_what_is_written_where_it_stands(pipeline) -> None:
    config = pipeline.engine.config
    cache = KVCache(config, 2, 257, torch.device("cpu"), torch.bfloat16)
    assert cache.data.nbytes == KVCache.bytes_needed(config, 2, 257, torch.bfloat16)
    assert cache.data.shape == (3, 2, 2, 2, 512, 16) and not cache.data.any()
    assert [bucketed(n) for n in (1, 256, 257)] == [256, 256, 512]
    keys, values = torch.ones(2, 2, 2, 16), torch.full((2, 2, 2, 16), 2.0)
    k, v = cache.write(1, torch.tensor([4, 6]), keys.bfloat16(), values.bfloat16(), visible=7)
    assert k.shape == v.shape == (2, 2, 7, 16)
    assert k[0, 0, :, 0].tolist() == [0, 0, 0, 0, 1, 0, 1] and v[1, 1, :, 3].tolist() == [0, 0, 0, 0, 2, 0, 2]
    assert not cache.data[0].any() and not cache.data[2].any()


def test_fused_rows_by_hand(pipeline) -> None:
    rows = fused_rows(replace(pipeline.engine.config, num_attention_heads=6, num_key_value_heads=2, head_dim=16))
    assert rows["self_attn.qkv_proj"] == {"q_proj": 96, "k_proj": 32, "v_proj": 32}
    assert rows["mlp.gate_up_proj"] == {"gate_proj": 192, "up_proj": 192}


def test_layers_whose_heads_are_not_as_wide_as_the_hidden_state(pipeline) -> None:
    """Two biases and no square matrix: each projection goes from and to the width that is its own."""
    config = replace(pipeline.engine.config, head_dim=8, num_hidden_layers=1, o_attention_bias=True, mlp_bias=True)
    config = replace(config, vocab_size=700, fm_head_dim=40)
    model = NextStepModel(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith(("weight", "bias"))}
    wanted = {
        "self_attn.qkv_proj": (80, 96),  # (6 + 2 + 2) heads of 8
        "self_attn.o_proj": (96, 48),
        "mlp.gate_up_proj": (384, 96),
        "mlp.down_proj": (96, 192),
    }
    for name, shape in wanted.items():
        assert shapes[f"layers.0.{name}.weight"] == shape and shapes[f"layers.0.{name}.bias"] == shape[:1], name
    wanted = {"image_in_projector": (96, 64), "image_out_projector": (96, 96)}
    wanted |= {"image_head.net.cond_embed": (40, 96), "image_head.net.input_proj": (40, 64)}
    wanted |= {"image_head.net.final_layer.linear": (64, 40)}
    assert {name: shapes[f"{name}.weight"] for name in wanted} == wanted
    assert TextEmbedding(config).embed_tokens.weight.shape == (700, 96)
    span = whole_span(config, torch.ones(1, 5, dtype=torch.bool), torch.float32)
    assert model(torch.randn(1, 5, 96), span).shape == (1, 5, 96)


def test_time_features_by_hand() -> None:
    features, half = time_features(torch.tensor([0.0, 0.5])), TIME_FEATURES // 2
    assert features.shape == (2, 256) and features.dtype == torch.float32
    assert features[0].tolist() == [1] * half + [0] * half
    frequency = 10000 ** (-3 / half)
    assert features[1, 3] == pytest.approx(math.cos(0.5 * frequency))
    assert features[1, half + 3] == pytest.approx(math.sin(0.5 * frequency))


def test_a_head_block_by_hand() -> None:
    """h + gate * MLP(LayerNorm(h) * (1 + scale) + shift), then Linear(LayerNorm(h) * (1 + scale) + shift)."""
    torch.manual_seed(0)
    head = FlowHead(token_dim=4, condition_dim=6, dim=8, layers=1)
    condition, x, times = torch.randn(2, 6), torch.randn(2, 4), torch.tensor([0.3, 0.3])
    (block,), last = head.res_blocks, head.final_layer
    code = head.time_embed(times, torch.float32) + head.cond_embed(condition)
    shift, scale, gate = block.adaLN_modulation(code).chunk(3, dim=-1)
    h = head.input_proj(x)
    h = h + gate * block.mlp(block.in_ln(h) * (1 + scale) + shift)
    shift, scale = last.adaLN_modulation(code).chunk(2, dim=-1)
    expected = last.linear(F.layer_norm(h, (8,), eps=1e-6) * (1 + scale) + shift)
    velocity = head.velocity(x, head.modulations(head.time_embed(times, torch.float32), condition))
    assert (velocity - expected).abs().max() <= 1e-6
    assert block.in_ln.eps == 1e-6


def test_the_spread_is_the_root_of_the_variance(pipeline) -> None:
    vae = AutoencoderKL(replace(pipeline.vae.config, deterministic=False))
    logvar = torch.tensor([0.0, 2 * math.log(3.0), -100.0, 100.0])
    assert vae.posterior_std(logvar).tolist() == pytest.approx([1, 3, math.exp(-15), math.exp(10)])
    assert pipeline.vae.posterior_std(logvar) is None, "deterministic"


@torch.inference_mode()
def test_moments_are_normalized_where_the_config_says_so(pipeline) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 32, 48)
    raw = AutoencoderKL(replace(pipeline.vae.config, encoder_norm=False))
    mean, logvar = raw.encode_moments(pixels)
    assert mean.shape == logvar.shape == (1, 16, 4, 6)
    assert torch.equal(torch.cat([mean, logvar], dim=1), raw.encoder(pixels)), "the mean comes first, as it is"
    normed, _ = pipeline.vae.encode_moments(pixels)
    assert normed.mean(dim=1).abs().max() <= 1e-5 and (normed.var(dim=1, correction=0) - 1).abs().max() <= 1e-3


@torch.inference_mode()
def test_a_vae_whose_levels_differ_in_width(pipeline) -> None:
    """As the published one's do; the shapes are those of its weights by name."""
    vae = AutoencoderKL(replace(pipeline.vae.config, ch_mult=(1, 2, 4), num_res_blocks=2))
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    wanted = {
        "encoder.down.1.block.0.conv1": (64, 32),
        "encoder.down.1.block.0.nin_shortcut": (64, 32),
        "encoder.down.1.block.1.conv1": (64, 64),
        "encoder.down.1.downsample.conv": (64, 64),
        "encoder.mid.block_1.conv1": (128, 128),
        "encoder.conv_out": (32, 128),
        "decoder.conv_in": (128, 16),
        "decoder.up.1.block.0.conv1": (64, 128),
        "decoder.up.0.block.0.nin_shortcut": (32, 64),
        "decoder.up.2.upsample.conv": (128, 128),
        "decoder.conv_out": (3, 32),
    }
    assert {name: shapes[f"{name}.weight"][:2] for name in wanted} == wanted
    mean, _ = vae.encode_moments(torch.randn(1, 3, 16, 24))
    assert mean.shape == (1, 16, 4, 6) and vae.decode(mean).shape == (1, 3, 16, 24)


def test_norm_over_a_patch() -> None:
    """With patch 2 four neighbouring positions of all channels share one mean and one deviation."""
    x = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 5 + 2
    normed = channel_norm(x, 2)
    block = x[0, :, 2:4, 4:6]
    expected = (block - block.mean()) / block.var(correction=0).add(1e-6).sqrt()
    assert (normed[0, :, 2:4, 4:6] - expected).abs().max() <= 1e-5
    assert torch.equal(channel_norm(x, None), channel_norm(x, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_attention_gets_masks_of_floats(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With booleans, Apple GPUs compute the second row wrong in several versions of PyTorch, without an error."""
    seen: list[torch.Tensor] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        seen.append(attn_mask)
        return plain(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    q, k = torch.randn(2, 4, 3, 8).to(dtype), torch.randn(2, 2, 5, 8).to(dtype)
    valid = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    span = span_at(torch.arange(2, 5), torch.zeros(2, 5, 8, dtype=dtype), valid, 5)
    grouped_attention(q, k, k, span.mask)
    assert [mask.dtype for mask in seen] == [dtype]
    assert sorted(set(seen[0].flatten().tolist())) == [-torch.inf, 0.0]
