"""Stored matrices by hand: values, layout, dtypes, and which layers they are used for."""

from __future__ import annotations

import pytest
import torch

from nextstep_core.errors import NextStepError
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.runtime.chosen import Switch
from nextstep_core.runtime.quantization import RECIPES, QuantizedLinear, formats, quantized_linears
from nextstep_core.runtime.quantization.formats import (
    FP8,
    INT4,
    INT4_32,
    INT4_128,
    INT8,
    Format,
    Int4,
    quantize_in_pieces,
)
from nextstep_core.runtime.quantization.products import usual
from nextstep_core.runtime.quantization.selection import usual_kernel

FORMATS = list({f.name: f for recipe in RECIPES.values() for f in (recipe.transformer, recipe.head)}.values())
# Root mean square error of a stored normal matrix, relative to the matrix: what the number of steps allows.
STORED_ERROR = {"int8": 0.01, "int4": 0.1, "int4-g128": 0.11, "int4-g32": 0.09, "fp8": 0.03}
FLOAT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_int8_by_hand() -> None:
    """The largest magnitude of a row is 127; scales are bfloat16."""
    weight, scale = INT8.quantize(torch.tensor([[127.0, -63.4, 0.6, 0.4], [0.0, 0.0, 0.0, 0.0], [-254.0, 2.0, 3.2, 0]]))
    assert scale.tolist() == pytest.approx([1, 0, 2], abs=1e-7) and scale.dtype == torch.bfloat16
    assert weight.tolist() == [[127, -63, 1, 0], [0, 0, 0, 0], [-127, 1, 2, 0]] and weight.dtype == torch.int8
    assert INT8.dequantize(weight, scale, torch.float32)[2].tolist() == [-254, 2, 4, 0]


def test_fp8_by_hand() -> None:
    weight, scale = FP8.quantize(torch.tensor([[448.0, -224.0, 1.0, 0.0]]) * 2)
    assert scale.tolist() == [2] and weight.float().tolist() == [[448, -224, 1, 0]]


def test_int4_by_hand() -> None:
    """Groups of four columns: 16 steps from their least to their greatest, two values in a byte."""
    format = Int4("test", 4)
    matrix = torch.tensor([[0.0, 15.0, 1.0, 7.0, -8.0, 7.0, 0.0, -1.0]])
    weight, scale = format.quantize(matrix)
    assert format.values(weight).tolist() == [[0, 15, 1, 7, 0, 15, 8, 7]]
    assert weight.tolist() == [[0 << 4 | 15, 1 << 4 | 7, 0 << 4 | 15, 8 << 4 | 7]]
    assert scale.tolist() == [[[1, 8]], [[1, 0]]], "[scale, zero] by group and row"
    assert torch.equal(format.dequantize(weight, scale, torch.float32), matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_integers_are_fitted_in_float32_whatever_the_matrix_is_in(format: Format, dtype: torch.dtype) -> None:
    matrix = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    pairs = zip(format.quantize(matrix), format.quantize(matrix.float()))
    assert all(torch.equal(a.float(), b.float()) for a, b in pairs)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_a_stored_matrix_is_the_matrix_but_for_its_steps(format: Format, monkeypatch) -> None:
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 64)[:, None]
    weight, scale = format.quantize(matrix)
    stored = format.dequantize(weight, scale, torch.float32)
    errors = (stored - matrix).norm(dim=1) / matrix.norm(dim=1)
    assert errors.max() <= 1.5 * STORED_ERROR[format.name], "every row has scales of its own"
    again, scale_again = format.quantize(stored)
    assert relative(format.dequantize(again, scale_again, torch.float32), stored) <= STORED_ERROR[format.name] / 10
    empty_weight, empty_scale = format.empty(64, 256, "meta")
    for made, announced in ((weight, empty_weight), (scale, empty_scale)):
        assert (made.shape, made.dtype) == (announced.shape, announced.dtype)
    monkeypatch.setattr(formats, "PIECE", 24)
    assert all(torch.equal(a, b) for a, b in zip(quantize_in_pieces(format, matrix), (weight, scale)))
    assert format.dequantize(*format.quantize(torch.zeros(16, 256)), torch.float32).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_kernel_multiplies_by_the_stored_matrix(format: Format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, scale = format.quantize(torch.randn(64, 256))
    stored = format.dequantize(weight, scale, torch.float32)
    for kernel in [*usual(format, "cpu"), usual_kernel(format, 256, weight, scale, dtype, Switch.parse(""))]:
        packed = kernel.packed(weight)
        for rows in (1, 2, 40):
            x = torch.randn(rows, 256).to(dtype)
            assert relative(kernel.run(x, packed, scale), x.float() @ stored.T) <= 0.01, kernel.name


def test_which_shapes_fit() -> None:
    assert [INT4.fits(*shape) for shape in ((16, 64), (32, 128), (16, 96), (8, 64), (24, 64))] == [1, 1, 0, 0, 0]
    assert not INT4_128.fits(16, 64) and INT4_128.fits(16, 128) and INT4_32.fits(16, 96)
    assert INT8.fits(3, 5) and FP8.fits(3, 5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_results_have_the_dtype_of_the_input(format: Format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, scale = format.quantize(torch.randn(64, 256))
    assert format.dequantize(weight, scale, dtype).dtype == dtype
    for kernel in [*usual(format, "cpu"), usual_kernel(format, 256, weight, scale, dtype, Switch.parse(""))]:
        packed = kernel.packed(weight)
        for rows in (1, 16, 17):
            assert kernel.run(torch.randn(rows, 256).to(dtype), packed, scale).dtype == dtype, kernel.name


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_packed_product_comes_first_and_the_plain_one_last(device: str) -> None:
    for format in FORMATS:
        names = [kernel.name for kernel in usual(format, device)]
        packed = {"int4": ["torch-int4"], "int8": ["torch-int8"]}.get(format.name.split("-")[0], [])
        assert names == [*(packed if device != "cuda" else []), "plain"], "on CUDA all are measured"


@torch.inference_mode()
def test_a_quantized_layer_is_a_linear_layer() -> None:
    """Any number of axes before the last, with and without a bias."""
    torch.manual_seed(0)
    for bias in (True, False):
        layer = QuantizedLinear(INT8, 32, 64, bias)
        layer.weight.data, layer.weight_scale.data = INT8.quantize(torch.randn(32, 64))
        if bias:
            layer.bias.data.normal_()
        layer.pack(usual(INT8, "cpu")[-1], torch.device("cpu"))
        x = torch.randn(2, 3, 64)
        expected = torch.nn.functional.linear(x, INT8.dequantize(layer.weight, layer.weight_scale, x.dtype), layer.bias)
        assert (layer(x) - expected).abs().max() <= 1e-5 and layer(x).shape == (2, 3, 32)
        assert layer(x.bfloat16()).dtype == torch.bfloat16, "whatever the bias is in"


def test_which_layers_are_stored_in_what() -> None:
    """The transformer in the recipe's own format where its shape fits, the head's wide matrices in the safer one."""
    recipe = RECIPES["int4"]
    names = {
        "layers.0.self_attn.qkv_proj": ((48, 64), INT4),
        "layers.0.mlp.down_proj": ((64, 96), INT8),  # 96 columns are no whole groups
        "image_head.net.res_blocks.2.mlp.0": ((64, 64), INT8),
        "image_out_projector": ((64, 64), INT8),
        "image_in_projector": ((64, 64), None),
        "image_head.net.cond_embed": ((64, 64), None),
        "image_head.net.final_layer.linear": ((64, 64), None),
    }
    assert {name: recipe.format_of(name, *shape) for name, (shape, _) in names.items()} == {
        name: format for name, (_, format) in names.items()
    }


def test_the_embedded_models_layers_are_stored_so() -> None:
    plan = plan_model(ASSETS / "tiny", "int4")
    stored = {name: layer.format.name for name, layer in quantized_linears(plan.empty_model())}
    layers, blocks = plan.config.num_hidden_layers, plan.config.fm_head_layers
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    in_blocks = ("mlp.0", "mlp.2", "adaLN_modulation.1")
    assert stored == (
        {f"layers.{n}.{part}": "int4" for n in range(layers) for part in parts}
        | {f"image_head.net.res_blocks.{n}.{part}": "int8" for n in range(blocks) for part in in_blocks}
        | {"image_out_projector": "int8"}
    )


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_scales_that_no_dtype_can_multiply_by_are_one_sentence(format: Format) -> None:
    weight, scale = format.quantize(torch.randn(64, 256))
    scale = torch.full_like(scale.float(), -3e38)
    with pytest.raises(NextStepError, match=f"A matrix of the {format.name} weights gives numbers"):
        usual_kernel(format, 256, weight, scale, torch.float32, Switch.parse(""))
