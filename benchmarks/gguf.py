"""What the formats of GGUF files lose, and what storing them in formats of ours loses on top.

    python -m benchmarks.gguf
    python -m benchmarks.gguf --llama-quantize PROGRAM   # llama.cpp's, for the formats that the package gguf only reads

The model's matrices are quantized as such files hold them and turned into floats again. Told are the relative errors
(Euclidean norm), in percent, of the weights of its layers and of `c`, what the transformer hands to the head, for
tokens that the model drew. Where a matrix has no whole blocks of 256 columns its rows are joined until it does.
"""

from __future__ import annotations

import argparse
import copy
import math
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from nextstep_core.loading.calibration import Drawn, conditions, relative_error
from nextstep_core.loading.gguf_file import NEAREST, PLAIN, Blocks, open_tensors
from nextstep_core.loading.gguf_int4 import KINDS, scale_of, weight_of
from nextstep_core.model.nextstep import NextStepModel
from nextstep_core.request.layout import Caption
from nextstep_core.runtime.quantization import RECIPES
from nextstep_core.runtime.quantization.formats import INT4_32, Format
from training.evaluate import held_out_singles
from training.scenes import SQUARE

from .subjects import Subject, load_subject
from .tables import table

CPU = torch.device("cpu")
PROMPTS = 24
ROW = 256  # numbers in the largest block
PACKAGE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # formats that the package gguf writes itself
# By llama.cpp's name, and how its program calls them.
PROGRAM = {
    kind: kind
    for kind in ("BF16", "F16", "Q6_K", "Q5_K", "Q4_K", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K", "TQ2_0", "TQ1_0")
} | {"MXFP4": "MXFP4_MOE"}
STORED = ("int8", "int4", "int4-g32")


@torch.inference_mode()
def drawn(subject: Subject, prompts: int) -> Drawn:
    """Pictures of prompts that the model was not trained on."""
    engine, (width, height) = subject.engine, SQUARE
    captions = [Caption(text, ()) for text, _, _ in held_out_singles(prompts, 0, SQUARE)]
    seeds = list(range(len(captions)))
    job = engine.make_job(captions, engine.grid(height, width), engine.recommended(), seed=seeds)
    *_, progress = engine.decode(job, CPU, torch.float32)
    return Drawn(job.rows.ids, job.rows.valid, progress.tokens, job.grid)


def joined(matrix: Tensor) -> Tensor:
    """A matrix with as many rows joined to one as make whole blocks of every format."""
    return matrix.float().reshape(-1, math.lcm(matrix.shape[1], ROW))


def written(matrices: Mapping[str, Tensor], path: Path) -> None:
    """A GGUF file of plain floats that llama.cpp's program takes for one of its own."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(ROW)
    writer.add_embedding_length(ROW)
    writer.add_feed_forward_length(ROW)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, matrix in matrices.items():
        writer.add_tensor(name, joined(matrix).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_package(matrices: Mapping[str, Tensor], kind: str) -> dict[str, Tensor | Blocks]:
    """The matrices in a format that the package gguf writes."""
    from gguf import GGMLQuantizationType, quantize

    type_ = GGMLQuantizationType[kind]
    rows = {name: joined(matrix) for name, matrix in matrices.items()}
    return {name: Blocks(quantize(whole.numpy(), type_), kind, tuple(whole.shape)) for name, whole in rows.items()}


def by_program(program: str, source: Path, kind: str, names: list[str]) -> dict[str, Tensor | Blocks]:
    """The matrices of a file in a format that llama.cpp's program writes."""
    target = source.with_name(f"{kind}.gguf")
    command = [program, "--pure", str(source), str(target), PROGRAM[kind]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    read = open_tensors(target)
    return {name: read(name) for name in names}


def stored(floats: Tensor, format: Format, held: Tensor | Blocks) -> Tensor:
    """The numbers of a matrix once it is loaded in a format of ours."""
    if format == INT4_32 and isinstance(held, Blocks) and held.kind in KINDS:
        return format.dequantize(weight_of(held), scale_of(held), torch.float32).view(floats.shape)
    if not format.fits(*floats.shape):
        return floats
    return format.dequantize(*format.quantize(floats), torch.float32)


class Measured:
    """Errors of the transformer with other numbers in its layers' matrices."""

    def __init__(self, subject: Subject, prompts: int) -> None:
        self._subject, self._drawn = subject, drawn(subject, prompts)
        self._truth = self._conditions(subject.model)
        linears = subject.model.layers.named_modules(prefix="layers")
        self.matrices = {f"{n}.weight": m.weight.detach() for n, m in linears if isinstance(m, nn.Linear)}

    def errors(self, matrices: Mapping[str, Tensor]) -> tuple[float, float]:
        """Percent of the weights, and of `c`."""
        model = copy.deepcopy(self._subject.model)
        model.load_state_dict(dict(matrices), strict=False)
        own, new = (torch.cat([each[name].flatten() for name in self.matrices]) for each in (self.matrices, matrices))
        return 100 * relative_error(new, own), 100 * relative_error(self._conditions(model), self._truth)

    @torch.inference_mode()
    def _conditions(self, model: NextStepModel) -> Tensor:
        return conditions(model, self._subject.engine.text_embedding, self._drawn, torch.float32)


def rows(measured: Measured, kinds: Mapping[str, Mapping[str, Tensor | Blocks]]) -> Iterator[list[object]]:
    """A row of the table for each format."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    yield ["float32", "32", "-", "-", *(f"{_stored(measured, measured.matrices, {}, r):.2f}" for r in STORED), "none"]
    for kind, held in kinds.items():
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        floats = {name: held[name][:].float().view(own.shape) for name, own in measured.matrices.items()}
        weights, c = measured.errors(floats)
        again = (f"{_stored(measured, floats, held, recipe):.2f}" for recipe in STORED)
        plain = GGMLQuantizationType[kind] in PLAIN
        nearest = "none" if plain else NEAREST.get(kind, "int8")
        yield [kind, f"{8 * size / numbers:.2f}".rstrip("0").rstrip("."), f"{weights:.2f}", f"{c:.2f}", *again, nearest]


def _stored(
    measured: Measured, floats: Mapping[str, Tensor], held: Mapping[str, Tensor | Blocks], recipe: str
) -> float:
    format = RECIPES[recipe].transformer
    return measured.errors({n: stored(m, format, held.get(n, m)) for n, m in floats.items()})[1]


def main() -> None:
    """Parse the command line, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a checkpoint that reads the embedded one's captions")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--llama-quantize", help="llama.cpp's program of this name")
    options = parser.parse_args()
    measured = Measured(load_subject(options.model, CPU, torch.float32), options.prompts)
    with TemporaryDirectory() as folder:
        held: dict[str, Mapping[str, Tensor | Blocks]] = {k: in_package(measured.matrices, k) for k in PACKAGE}
        if options.llama_quantize is not None:
            source = Path(folder) / "source.gguf"
            written(measured.matrices, source)
            for kind in PROGRAM:
                held[kind] = by_program(options.llama_quantize, source, kind, list(measured.matrices))
        titles = ["format", ">bits", ">weights", ">`c`", *(f">`c`, as `{name}`" for name in STORED), "loaded as"]
        order = sorted(held, key=lambda kind: -np.mean([_bits(t) for t in held[kind].values()]))
        print(table(titles, rows(measured, {kind: held[kind] for kind in order})))


def _bits(held: Tensor | Blocks) -> float:
    return 8 * (held.raw if isinstance(held, Blocks) else held).nbytes / math.prod(held.shape)


if __name__ == "__main__":
    main()
