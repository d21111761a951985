"""The VAE in tiles: put together rightly, close to the whole picture, and taken only when memory runs out."""

from __future__ import annotations

import errno
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.errors import OutOfMemory, is_out_of_memory
from nextstep_core.images.tiling import check_tile, in_tiles, run_in_tiles, within_memory
from training.scenes import COLORS

DECODER, ENCODER = (8, 1), (1, 8)  # pixels per position of a network's input and output
FLOAT_NOISE = 1e-5


@pytest.fixture(scope="module")
def vae(pipeline):
    """The embedded model's VAE (`pipeline` for its one thread)."""
    return NextStepPipeline.from_pretrained("tiny", dtype=torch.float32).vae


def dots(height: int, width: int) -> Tensor:
    """A picture (1, 3, height, width) in [-1, 1] of what the embedded VAE knows: flat dots of its colors."""
    ground, *colors = torch.tensor(list(COLORS.values())) / 127.5 - 1
    picture = ground[:, None, None].repeat(1, height, width)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    for n, cy in enumerate(range(32, height, 64)):
        for m, cx in enumerate(range(32, width, 64)):
            inside = (y - cy) ** 2 + (x - cx) ** 2 < (12 + 4 * (m % 3)) ** 2
            picture[:, inside] = colors[(3 * n + m) % len(colors)][:, None]
    return picture[None]


@pytest.mark.parametrize("size", [(128, 128), (256, 384), (200, 328), (232, 240), (136, 1000), (64, 2000)], ids=str)
def test_every_pixel_comes_from_its_place(size: tuple[int, int]) -> None:
    """A network whose pixels do not know their neighbours gives the same in tiles."""
    picture = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    latents = F.avg_pool2d(picture, 8)
    assert (in_tiles(lambda x: F.avg_pool2d(x, 8), picture, *ENCODER, 128) - latents).abs().max() <= FLOAT_NOISE
    enlarged = F.interpolate(latents, scale_factor=8)
    tiled = in_tiles(lambda x: F.interpolate(x, scale_factor=8), latents, *DECODER, 128)
    assert (tiled - enlarged).abs().max() <= FLOAT_NOISE


def test_neighbours_fade_into_each_other_linearly() -> None:
    calls = iter((0.0, 1.0))
    line = in_tiles(lambda x: torch.full((1, 1, 128, 128), next(calls)), torch.zeros(1, 1, 16, 28), *DECODER, 128)
    ramp = (torch.arange(32) + 0.5) / 32
    expected = torch.cat([torch.zeros(96), ramp, torch.ones(96)])
    assert (line[0, 0] - expected).abs().max() <= FLOAT_NOISE


@pytest.mark.parametrize("length", [129, 160, 224, 225, 1000])
def test_neighbours_share_a_quarter_or_more(length: int) -> None:
    """As few tiles as that allows, whole latent positions, from the first pixel to the last."""
    length = -(-length // 8) * 8
    seen = []
    in_tiles(lambda x: seen.append(x[0, 0, 0]) or x, torch.arange(length).expand(1, 3, 8, length), 1, 1, 128)
    starts = [int(line[0]) for line in seen]
    assert starts[0] == 0 and seen[-1][-1] == length - 1
    assert all(0 < b - a <= 96 for a, b in zip(starts, starts[1:]))
    assert len(starts) == 1 + -(-(length - 128) // 96)


@pytest.mark.parametrize(("rows", "columns"), [(256, 300), (300, 256)])
def test_both_sides_must_be_whole_positions(rows: int, columns: int) -> None:
    with pytest.raises(NextStepError, match=f"A picture of {columns}x{rows} cannot be cut"):
        in_tiles(lambda x: x, torch.zeros(1, 3, rows, columns), *ENCODER, 128)


def test_the_smallest_tile_and_whole_positions_are_allowed() -> None:
    for tile in (128, 136, 512):
        check_tile(tile, 8)
    for tile in (120, 132):
        with pytest.raises(NextStepError):
            check_tile(tile, 8)
        with pytest.raises(NextStepError, match=f"{tile}.*use"):
            run_in_tiles(lambda x: x, torch.zeros(1, 3, 64, 64), *ENCODER, tile=tile)


def test_tiles_of_a_batch_keep_its_dtype_and_order() -> None:
    pictures = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 128, 256).bfloat16()
    sizes = []
    out = in_tiles(lambda x: sizes.append(len(x)) or x, pictures, 1, 1, 128, together=2)
    assert out.dtype == torch.bfloat16 and torch.equal(out, pictures)
    assert sizes == [2] * 3 + [1] * 3


@pytest.mark.slow
@torch.inference_mode()
def test_tiles_are_close_to_the_whole_picture(vae) -> None:
    """Measured: 0.9 and 0.3 of 255 for decoding by 128 and 256 pixels, 0.05 of a standard deviation for encoding."""
    picture = dots(256, 384)
    latents, _ = vae.encode_moments(picture)
    whole = vae.decode(latents)
    assert (vae.decode(latents, run=partial(run_in_tiles, tile=128)) - whole).abs().mean() * 127.5 <= 1.2
    assert (vae.decode(latents, run=partial(run_in_tiles, tile=256)) - whole).abs().mean() * 127.5 <= 0.5
    tiled, logvar = vae.encode_moments(picture, run=partial(run_in_tiles, tile=128))
    assert (tiled - latents).abs().mean() <= 0.07
    assert tiled.shape == logvar.shape == (1, 16, 32, 48)
    assert tiled.std(dim=1, correction=0).sub(1).abs().max() <= 1e-4, "normalized after blending"


@torch.inference_mode()
def test_a_picture_that_fits_into_one_tile_is_the_whole_picture(vae) -> None:
    picture = dots(96, 128)
    latents, _ = vae.encode_moments(picture)
    assert torch.equal(vae.encode_moments(picture, run=partial(run_in_tiles, tile=128))[0], latents)
    assert torch.equal(vae.decode(latents, run=partial(run_in_tiles, tile=128)), vae.decode(latents))


class SmallDevice:
    """A network on a device that holds so many positions; it sees to it that a failed attempt lets go of its memory."""

    def __init__(self, network, holds: int, error: type[RuntimeError] = torch.cuda.OutOfMemoryError) -> None:
        self.network, self.holds, self.error = network, holds, error
        self.asked: list[tuple[int, ...]] = []
        self.left_over = weakref.WeakSet()

    def __call__(self, x: Tensor) -> Tensor:
        assert not self.left_over, "memory of the attempt before is still held"
        activation = x.repeat(1, 2, 1, 1)
        self.asked.append((len(x), *x.shape[-2:]))
        if len(x) * x.shape[-2] * x.shape[-1] > self.holds:
            self.left_over.add(activation)
            raise self.error("Tried to allocate")
        return self.network(x)


@pytest.mark.slow
@torch.inference_mode()
def test_out_of_memory_goes_picture_by_picture_then_in_ever_smaller_tiles(pipeline, monkeypatch) -> None:
    vae = pipeline.vae
    latents = torch.randn(2, 16, 32, 40, generator=torch.Generator().manual_seed(0))
    expected = [vae.decode(latents), *(vae.decode(latents, partial(run_in_tiles, tile=tile)) for tile in (256, 128))]
    attempts, decoder = [(2, 32, 40), (1, 32, 40), (1, 32, 32), (1, 16, 16)], vae.decoder
    for n, holds in enumerate((32 * 40, 32 * 32, 16 * 16)):
        device = SmallDevice(decoder, holds)
        monkeypatch.setattr(type(vae), "decoder", device, raising=False)
        assert (vae.decode(latents, run=run_in_tiles) - expected[n]).abs().max() <= FLOAT_NOISE
        assert list(dict.fromkeys(device.asked)) == attempts[: n + 2]


@torch.inference_mode()
def test_generate_finishes_when_the_vae_runs_out_of_memory(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the VAE, and the same picture as when tiles are asked for."""
    options = {"images": dots(64, 256)[0].movedim(0, -1) / 2 + 0.5, "height": 64, "width": 256, "steps": 1, "cfg": 1.0}
    options |= {"sampler": "flow-ode", "use_norm": True}
    asked_for = pipeline.generate("<image>Add a hat.", **options, vae_tile=128)
    vae = pipeline.vae
    encoder, decoder = SmallDevice(vae.encoder, 64 * 128), SmallDevice(vae.decoder, 8 * 16)
    monkeypatch.setattr(type(vae), "encoder", encoder, raising=False)
    monkeypatch.setattr(type(vae), "decoder", decoder, raising=False)
    out = pipeline.generate("<image>Add a hat.", **options)
    assert torch.equal(out.images, asked_for.images)
    assert (encoder.asked[0], decoder.asked[0]) == ((1, 64, 256), (1, 8, 32))


def test_where_nothing_helps_it_is_one_sentence_and_every_step_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OutOfMemory, match="128 pixels.*cpu.*Tried to allocate"):
        run_in_tiles(SmallDevice(lambda x: x, 0), torch.zeros(1, 16, 64, 64), *DECODER)
    assert [r.getMessage().count("did not fit") for r in caplog.records] == [1, 1]
    with pytest.raises(OutOfMemory, match="256 pixels"):
        run_in_tiles(SmallDevice(lambda x: x, 0), torch.zeros(1, 16, 64, 64), *DECODER, tile=256)


def test_memory_of_the_host_counts_too_and_our_own_sentence_does_not() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OutOfMemory("out of memory"))


def test_what_is_not_about_memory_or_cannot_be_helped_is_raised() -> None:
    latents = torch.zeros(1, 16, 64, 64)
    broken = SmallDevice(lambda x: x, 0, RuntimeError)
    with pytest.raises(RuntimeError, match="Tried"):
        within_memory(broken, latents, *DECODER)
    assert len(broken.asked) == 1
    tiny = SmallDevice(lambda x: x, 0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        within_memory(tiny, latents, *DECODER)
    assert tiny.asked == [(1, 64, 64), (1, 32, 32), (1, 16, 16)]


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("MPS backend out of memory (MPS allocated: 9.00 GB)", True),
        ("Invalid buffer size: 16.00 GB", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_every_device_says_it_in_its_own_words(message: str, is_memory: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) is is_memory


@pytest.mark.parametrize("tile", [0, 64, 130])
def test_a_tile_that_cannot_be_is_one_sentence_before_any_work(pipeline, monkeypatch, tile: int) -> None:
    monkeypatch.setattr(pipeline.engine.model, "forward", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(NextStepError, match=rf"tile is {tile}.*(multiple of 8|from 128)"):
        pipeline.generate("A red apple.", height=64, width=64, vae_tile=tile)


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has one error type for all")
def test_an_error_of_cuda_is_known_by_its_number() -> None:
    error = torch.AcceleratorError("CUDA error: the driver says something else")
    assert not is_out_of_memory(error)
    error.error_code = 2
    assert is_out_of_memory(error)
    error.error_code = 700
    assert not is_out_of_memory(error)
