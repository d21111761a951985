"""Weight-only quantization: an option that replaces linear layers and can be deleted without touching the model.

`formats` says how a matrix is stored, `search` and `compensation` which numbers of int4 are best, without looking at
inputs and for them, `products` how it is multiplied on which device, `layers` which matrices of the model are stored in
which format.
"""

from .layers import (
    RECIPES,
    Held,
    QuantizedLinear,
    Recipe,
    Storage,
    choose_kernels,
    find_recipe,
    quantize_model,
    quantized_linears,
    replace_linears,
)

__all__ = [
    "RECIPES",
    "Held",
    "QuantizedLinear",
    "Recipe",
    "Storage",
    "find_recipe",
    "choose_kernels",
    "quantize_model",
    "quantized_linears",
    "replace_linears",
]
