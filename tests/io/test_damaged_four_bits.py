"""Damaged weights of bitsandbytes: each folder loads, or is refused by tensor and file."""

import json
import random
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.io import _safetensors as safetensors
from jaxpeft.models import decoder
from tests.io.test_damage import JUNK

CONFIG = decoder.Config(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)
UP = "model.layers.{}.mlp.up_proj.weight"
FORMATS = ["nf4", "nf4+dq", "fp4+dq"]
DTYPES = [np.uint8, np.int8, np.float16, np.float32, np.float64, np.int64, np.bool_]


@pytest.fixture(scope="module", params=FORMATS)
def whole(request, tmp_path_factory):
    """The config and the tensors of a folder, by name, and what it loads as."""
    folder = tmp_path_factory.mktemp("whole")
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    sites = jp.sites(decoder.apply_fn(CONFIG), decoder.shapes(CONFIG), tokens)
    dense = decoder.init(CONFIG, jax.random.key(0))
    quantize = jp.quantize(request.param, sites.match("*up*"), block=8, layout="flat")
    decoder.save(folder, CONFIG, quantize(jax.random.key(0), dense))
    about, tensors = safetensors.open_folder(folder)
    values = {name: safetensors.read(tensor) for name, tensor in tensors.items()}
    return about, values, decoder.load(folder)[1]


def write(folder, about, values):
    lazies = {
        name: safetensors.Lazy(value.shape, value.dtype, lambda value=value: value)
        for name, value in values.items()
    }
    safetensors.write_folder(folder, about, lazies)


def tensor_of(text):
    return np.frombuffer(text, np.uint8)


def state_of(values, layer=0):
    return next(name for name in values if name.startswith(f"{UP.format(layer)}.quant_state."))


def damaged_field(rng, values):
    """A field of the state has another value, is missing, or there is one more."""
    name = state_of(values, rng.randrange(2))
    about = json.loads(values[name].tobytes())
    field = rng.choice([*about, "nested_offset", "nested_blocksize", "more"])
    near = about.get(field)
    change = rng.choice(["junk", "junk", "gone", "near"])
    if change == "gone":
        about.pop(field, None)
    elif change == "near" and isinstance(near, (int, float)):
        about[field] = rng.choice([near + 1, -near, near * 10**6, float(near), str(near), [near]])
    elif change == "near" and isinstance(near, list):
        about[field] = rng.choice([near[::-1], near[:1], [*near, 1], [float(n) for n in near], {}])
    else:
        about[field] = rng.choice(JUNK)
    return {name: tensor_of(json.dumps(about).encode())}


def damaged_state(rng, values):
    """The bytes of the state are no longer what they were."""
    name = state_of(values, rng.randrange(2))
    data = bytearray(values[name].tobytes())
    at = rng.randrange(len(data))
    match rng.choice(["bit", "cut", "append", "empty", "deep", "dtype", "no object", "long"]):
        case "bit":
            data[at] ^= 1 << rng.randrange(8)
        case "cut":
            del data[at:]
        case "append":
            data += b"}"
        case "empty":
            data = b""
        case "deep":
            data = b"[" * 9000
        case "dtype":
            return {name: tensor_of(data).astype(rng.choice(DTYPES[1:]))}
        case "no object":
            data = rng.choice([b"3", b"[]", b'"nf4"', b"null", b"NaN"])
        case "long":
            data = bytes(data) + b" " * 20_000
    return {name: tensor_of(bytes(data))}


def damaged_tensor(rng, values):
    """A tensor has another shape or dtype, is missing, or has the name of another."""
    own = [name for name in values if name.startswith(tuple(map(UP.format, range(2))))]
    name = rng.choice(own)
    value = values[name]
    match rng.choice(["dtype", "short", "long", "empty", "gone", "renamed", "scalar", "nan"]):
        case "dtype":
            return {name: value.astype(rng.choice(DTYPES))}
        case "short":
            return {name: value[:-1]}
        case "long":
            return {name: np.concatenate([value, value])}
        case "empty":
            return {name: np.zeros((0, 3), value.dtype)}
        case "gone":
            return {name: None}
        case "renamed":
            part = rng.choice(["absmax", "quant_map", "nested_absmax", "quant_state", "scb"])
            return {name: None, f"{UP.format(0)}.{part}": value}
        case "scalar":
            return {name: value.reshape(-1)[0].reshape(())}
        case "nan":
            return {name: np.full(value.shape, np.nan).astype(value.dtype)}


def fuzz(folder, whole, seeds):
    about, values, want = whole
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), want)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        kind = rng.choice([damaged_field, damaged_field, damaged_state, damaged_tensor])
        with np.errstate(all="ignore"):
            changes = kind(rng, values)
        changed = {k: v for k, v in (values | changes).items() if v is not None}
        write(folder, about, changed)
        try:
            got = decoder.load(folder)[1]
        except ValueError as error:
            said = str(error)
            assert str(folder) in said, f"seed {seed}, {kind.__name__}: {said}"
            assert any(name in said for name in map(UP.format, range(2))), f"seed {seed}: {said}"
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kind.__name__}") from error
        # An intact structure with another number, which nothing in the file speaks against.
        like = jax.tree.map(lambda x: (x.shape, x.dtype), got)
        assert jax.tree.leaves(like) == jax.tree.leaves(shapes), f"seed {seed}, {kind.__name__}"
    assert refused > 0.6 * len(seeds)  # else little was damaged
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert time.perf_counter() - start < 60 + len(seeds)


def test_sixty_damaged_weights_load_or_are_refused_by_tensor_and_file(tmp_path, whole):
    fuzz(tmp_path, whole, range(60))


@pytest.mark.conformance
def test_a_thousand_damaged_weights_load_or_are_refused_by_tensor_and_file(tmp_path, whole):
    fuzz(tmp_path, whole, range(60, 1060))


BLOCKS = [0, -8, 2**62, 10**9, True, 8.0, "8", None, [8], float("inf"), float("nan")]


@pytest.mark.parametrize("value", BLOCKS, ids=repr)
def test_a_block_size_that_is_none_is_refused_before_anything_is_made(tmp_path, whole, value):
    about, values, _ = whole
    name = state_of(values, 1)
    state = json.loads(values[name].tobytes()) | {"blocksize": value}
    write(tmp_path, about, values | {name: tensor_of(json.dumps(state).encode())})
    with pytest.raises(ValueError, match=f"{name} in {tmp_path}/model.safetensors .*blocksize"):
        decoder.load(tmp_path)


@pytest.mark.parametrize("about", ["bitsandbytes", ["nf4"], 4, {"quant_method": ["bitsandbytes"]}])
def test_a_quantization_config_that_is_none_is_refused(tmp_path, whole, about):
    config, values, _ = whole
    write(tmp_path, {**config, "quantization_config": about}, values)
    with pytest.raises(ValueError, match="quantization_config="):
        decoder.load(tmp_path)
