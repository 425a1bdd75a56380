"""NF4 and FP4 against bitsandbytes on CPU: bit for bit, in memory and in files.

Two things may differ, and only these:

- The mean of the scales that double quantization subtracts. It is a sum of float32 numbers whose
  order is neither library's promise, so that it may be off by a few units in the last place, and
  with it the scales of scales, which are maxima of differences to it. Given the same mean, all is
  equal.
- Blocks whose largest entry is below 2^-126, the smallest normal float32. XLA takes these numbers
  for zero, and so do we, where bitsandbytes keeps some of them, and has a scale of 1e-38 for a
  short last block of zeros.

Blocks of 128 are compared on rows of at least as many entries: on shorter ones, bitsandbytes 0.50.2
decodes by the scale of another block on CPU.
"""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft._tree import flatten
from jaxpeft.io import _safetensors as safetensors
from jaxpeft.models import decoder
from jaxpeft.quant import fp4, nf4
from jaxpeft.quant._blocks import unpack
from jaxpeft.quant._book import TINY
from jaxpeft.quant._fp4 import FP4
from jaxpeft.quant._nf4 import NF4

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
transformers = pytest.importorskip("transformers", reason="make parity installs the oracle")
bnb = pytest.importorskip("bitsandbytes.functional", reason="make parity installs the oracle")

pytestmark = pytest.mark.parity

SHAPES = [(64, 172), (48, 100), (1, 7), (5, 64), (300, 4096)]  # (out, in), as in PyTorch
FORMATS = {"nf4": (nf4, NF4), "fp4": (fp4, FP4)}
DATA = Path(os.environ.get("JAXPEFT_DATA", Path(__file__).parents[3] / "shared" / "data"))
ULP = 2**-23


def normal(shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def coarse(shape):
    """As in bfloat16, where many blocks have two entries of the same magnitude."""
    return np.asarray(jnp.asarray(normal(shape), jnp.bfloat16).astype(jnp.float32))


def tied(shape):
    """Entries halfway between two values of either format, and values, in units of the scale."""
    between = np.r_[NF4.middles, FP4.middles, NF4.values, -1, 1, 0].astype(np.float32)
    return np.random.default_rng(0).choice(between, size=shape)


def zeros(shape):
    """A whole block of them, where there is one."""
    w = normal(shape)
    w.reshape(-1)[: w.size // 64 and 64] = 0
    return w


def real(shape):
    file = DATA / "minilm-l6" / "model.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}: set JAXPEFT_DATA to the folder that holds minilm-l6")
    table = safetensors.open_file(file)["embeddings.word_embeddings.weight"]
    values = safetensors.read(table, slice(2000, 2000 + 4096)).astype(np.float32)
    return values.reshape(-1)[: np.prod(shape)].reshape(shape)


INPUTS = [normal, coarse, tied, zeros, real]
over_inputs = pytest.mark.parametrize("weights", INPUTS, ids=lambda f: f.__name__)
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
over_formats = pytest.mark.parametrize("name", FORMATS)


def theirs(w, name, nested, block=64):
    """Codes, state and values of bitsandbytes."""
    codes, state = bnb.quantize_4bit(
        torch.tensor(w), blocksize=block, quant_type=name, compress_statistics=nested
    )
    values = bnb.dequantize_4bit(codes, state)
    assert values.dtype == torch.float32
    return codes.numpy().reshape(-1), state, values.numpy()


def ours(w, name, **options):
    return FORMATS[name][0](jnp.asarray(w.T), layout="flat", **options)


def equal(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@over_formats
@over_inputs
@pytest.mark.parametrize(
    ("shape", "block"), [*((shape, 64) for shape in SHAPES), ((300, 4096), 128)], ids=str
)
def test_codes_scales_and_values_are_equal_bit_for_bit(shape, weights, name, block):
    w = weights(shape)
    codes, state, values = theirs(w, name, False, block)
    got = ours(w, name, block=block)
    equal(got.codes, codes)
    equal(got.scales, state.absmax.numpy())
    equal(got.decode().T, values)
    equal(jax.jit(lambda m: m.decode())(got).T, values)


@over_formats
@over_inputs
@over_shapes
def test_with_the_same_mean_scales_in_eight_bits_are_equal_too(shape, weights, name, monkeypatch):
    w = weights(shape)
    codes, state, values = theirs(w, name, True)
    mean = np.float32(state.offset.item())
    monkeypatch.setattr("jaxpeft.quant._flat.mean", lambda x: jnp.asarray(mean))
    got = ours(w, name, double=True)
    equal(got.offset, mean)
    equal(got.codes, codes)
    equal(got.scales, state.absmax.numpy())
    equal(got.tiles, state.state2.absmax.numpy())
    equal(got.decode().T, values)
    equal(jax.jit(lambda m: m.decode())(got).T, values)


@over_formats
@over_inputs
@over_shapes
def test_by_itself_the_mean_is_equal_to_a_few_units_in_the_last_place(shape, weights, name):
    w = weights(shape)
    codes, state, values = theirs(w, name, True)
    got = ours(w, name, double=True)
    equal(got.codes, codes)
    mean = state.offset.item()
    np.testing.assert_allclose(got.offset, mean, rtol=8 * ULP)
    np.testing.assert_allclose(got.tiles, state.state2.absmax.numpy(), rtol=0, atol=8 * ULP * mean)
    # A scale may then be nearer to a neighbour in the map. There are at most a few of these.
    other = np.asarray(got.scales) != state.absmax.numpy()
    assert other.sum() <= 1 + other.size // 1000
    apart = np.abs(np.asarray(got.decode()).T - values).reshape(-1)
    apart = np.pad(apart, (0, -apart.size % 64)).reshape(-1, 64)[~other]
    assert apart.max(initial=0) <= 32 * ULP * np.abs(w).max(initial=0)


@over_formats
@over_inputs
@pytest.mark.parametrize("shape", [(64, 192), (5, 64), (300, 4096)], ids=str)
def test_rows_of_whole_blocks_hold_the_same_numbers_transposed(shape, weights, name):
    w = weights(shape)
    codes, state, values = theirs(w, name, False)
    got = FORMATS[name][0](jnp.asarray(w.T))
    pairs = np.stack([codes >> 4, codes & 15], axis=-1).reshape(shape)
    (blocks,) = unpack(got.codes, shape[1] // 64, 64, 0)
    equal(blocks.reshape(shape[::-1]).T, pairs)
    equal(got.scales.T.reshape(-1), state.absmax.numpy())
    equal(got.decode().T, values)


@over_formats
@pytest.mark.parametrize("nested", [False, True])
def test_on_gaussian_weights_the_error_is_theirs(name, nested):
    w = normal((256, 1024))
    *_, values = theirs(w, name, nested)
    want = np.sqrt(np.mean((values - w) ** 2))
    got = np.sqrt(np.mean((np.asarray(ours(w, name, double=nested).decode()).T - w) ** 2))
    print(f"\n  rms error: ours {got:.7f}, theirs {want:.7f}", end="")
    np.testing.assert_allclose(got, want, rtol=1e-5)


@over_formats
def test_blocks_without_a_normal_number_are_zero_here_and_tiny_there(name):
    w = normal((4, 64)) * np.float32(1e-40)
    assert 0 < np.abs(w).max() < TINY
    *_, values = theirs(w, name, False)
    assert not np.asarray(ours(w, name).decode()).any()
    assert np.abs(values).max() < TINY
    _, state, values = theirs(np.zeros((1, 7), np.float32), name, False)
    assert state.absmax.item() == np.float32(1e-38) and not values.any()
    assert not np.asarray(ours(np.zeros((1, 7), np.float32), name).scales).any()


# Files -------------------------------------------------------------------------------------------

# What the products of bitsandbytes on CPU can do: whole blocks in a row, multiples of 32 outputs.
CONFIG = decoder.Config(
    vocab=96, width=64, mlp_width=192, layers=3, heads=4, kv_heads=2, head_dim=16
)
# Their products may run in bfloat16 on CPU, whatever dtype the model has.
BFLOAT16 = 0.06
PARTS = {
    "all linear weights": None,
    "the MLP alone": ["lm_head", "q_proj", "k_proj", "v_proj", "o_proj"],
    "with the head": [],
}


def dense_folder(folder):
    params = decoder.init(CONFIG, jax.random.key(0))
    decoder.save(folder, CONFIG, jax.tree.map(lambda x: 4 * x if x.ndim == 3 else x, params))
    return folder


@functools.cache
def found():
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return jp.sites(decoder.pure(CONFIG), decoder.shapes(CONFIG), tokens)


def ids():
    return np.random.default_rng(1).integers(3, CONFIG.vocab, (2, 12))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids())).logits.numpy()


@pytest.fixture(scope="module", params=PARTS, ids=list(PARTS))
def quantized(request, tmp_path_factory):
    """A model that transformers and bitsandbytes have quantized, and the folder it is in."""
    about = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4" if request.param == "the MLP alone" else "nf4",
        bnb_4bit_use_double_quant=request.param != "with the head",
        llm_int8_skip_modules=PARTS[request.param],
    )
    dense = dense_folder(tmp_path_factory.mktemp("dense"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=about, attn_implementation="eager"
    )
    folder = tmp_path_factory.mktemp("quantized")
    model.save_pretrained(folder)
    return model, folder


def weights_of(model):
    """{name: (codes, state)} of the quantized weights."""
    return {
        name: (weight.detach().numpy().reshape(-1), weight.quant_state)
        for name, weight in model.named_parameters()
        if hasattr(weight, "quant_state") and weight.quant_state is not None
    }


def test_a_folder_of_transformers_loads_with_the_numbers_it_has(quantized):
    model, folder = quantized
    _, params = decoder.load(folder)
    stored = weights_of(model)
    kinds, leaves = {}, flatten(params, is_leaf=lambda x: isinstance(x, jp.View))[0]
    for path, stack in decoder.plan(CONFIG).items():
        for i, name in enumerate(stack.names):
            kinds[name] = type(getattr(leaves[path], "weight", None)).__name__
            if name not in stored:
                continue
            (codes, state), flat = stored[name], leaves[path].weight
            flat = jax.tree.map(lambda x, i=i: x[i], flat) if stack.stacked else flat
            equal(flat.codes, codes)
            equal(flat.scales, state.absmax.numpy())
            assert (flat.book.name, flat.block) == (state.quant_type, state.blocksize)
            assert flat.shape == tuple(state.shape)[::-1]
            if state.nested:
                equal(flat.tiles, state.state2.absmax.numpy())
                equal(flat.offset, np.float32(state.offset.item()))
            else:
                assert flat.tiles is None and flat.offset is None
            values = bnb.dequantize_4bit(torch.tensor(codes)[:, None], state)
            equal(flat.decode().T, values.numpy())
    assert {name for name, kind in kinds.items() if kind == "Flat"} == set(stored)
    assert len(stored) >= 3 * CONFIG.layers


def test_its_logits_are_those_of_the_dense_model_that_it_stands_for(quantized, tmp_path):
    model, folder = quantized
    _, params = decoder.load(folder)
    decoder.save(tmp_path, CONFIG, jp.merge(params))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    got = jax.jit(jp.lift(decoder.pure(CONFIG)))(params, jnp.asarray(ids()))
    dense = logits(plain)
    np.testing.assert_allclose(got, dense, rtol=0, atol=1e-4 * dense.std())
    np.testing.assert_allclose(got, logits(model), rtol=0, atol=BFLOAT16 * dense.std())


@pytest.mark.parametrize("format", ["nf4+dq", "nf4", "fp4+dq"])
@pytest.mark.parametrize("selected", ["hidden", "linear", "*up*"])
def test_a_folder_written_here_loads_in_transformers_with_the_same_numbers(
    tmp_path, format, selected
):
    _, dense = decoder.load(dense_folder(tmp_path / "dense"))
    sites = found().match(selected) if "*" in selected else getattr(found(), selected)
    params = jp.quantize(format, sites, layout="flat")(jax.random.key(0), dense)
    decoder.save(tmp_path / "coded", CONFIG, params)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "coded", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    stored, merged = weights_of(model), jp.merge(params)
    plan = decoder.plan(CONFIG)
    assert set(stored) == {name for path in sites for name in plan[path].names}
    matrices = flatten(merged)[0]
    for path in sites:
        for i, name in enumerate(plan[path].names):
            codes, state = stored[name]
            values = bnb.dequantize_4bit(torch.tensor(codes)[:, None], state).numpy()
            equal(matrices[path][i].T if plan[path].stacked else matrices[path].T, values)
    want = np.asarray(decoder.pure(CONFIG)(merged, jnp.asarray(ids())))
    np.testing.assert_allclose(logits(model), want, rtol=0, atol=BFLOAT16 * want.std())


def test_a_folder_of_theirs_written_again_is_the_same_tensor_by_tensor(quantized, tmp_path):
    _, folder = quantized
    config, params = decoder.load(folder)
    decoder.save(tmp_path, config, params)
    _, want = safetensors.open_folder(folder)
    _, got = safetensors.open_folder(tmp_path)
    assert got.keys() == want.keys()
    for name in want:
        if "quant_state" not in name:  # JSON, whose entries have an order of their own
            equal(safetensors.read(got[name]), safetensors.read(want[name]))
