import io
import itertools
import json
import math
import os
import re
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resumable
import toy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft import train
from jaxpeft._errors import need
from jaxpeft.prompts._checks import check_loss
from jaxpeft.train import _report


def run(data=None, **options):
    frozen, adapter = toy.model()
    data = [toy.batch(seed=seed) for seed in range(6)] if data is None else data
    options = {"progress": False} | options
    return train.fit(toy.loss_fn, optax.adamw(1e-2), frozen, adapter, data, **options)


def by_hand(batches):
    frozen, adapter = toy.model()
    tx = optax.adamw(1e-2)
    step = jax.jit(train.train_step(toy.loss_fn, tx))
    state, losses = train.init(adapter, tx), []
    for batch in batches:
        state, metrics = step(state, frozen, batch, None)
        losses.append(float(metrics.loss))
    return state, losses


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_it_takes_the_steps_of_a_loop_written_by_hand():
    batches = [toy.batch(seed=seed) for seed in range(6)]
    result = run(batches)
    assert_same(result.state, by_hand(batches)[0])
    assert result.finished
    assert_same(run(batches, max_steps=4).state, by_hand(batches[:4])[0])


def test_the_callers_adapter_stays_as_it_is():
    frozen, adapter = toy.model()
    train.fit(toy.loss_fn, optax.sgd(0.1), frozen, adapter, [toy.batch()], progress=False)
    assert_same((frozen, adapter), toy.model())


def test_evaluation_loss_is_weighted_by_tokens_over_the_whole_set():
    frozen, adapter = toy.model()
    batches = [toy.batch(seed=seed) for seed in range(3)]
    batches[1]["weights"] = batches[1]["weights"] * 0
    batches[2]["weights"][2:] = 0
    got = train.evaluate(toy.loss_fn, frozen, adapter, batches)
    whole = jax.tree.map(lambda *xs: np.concatenate(xs), *batches)
    total, weight = toy.loss_fn(frozen, adapter, whole, None)
    np.testing.assert_allclose(got, (total / weight, np.exp(total / weight), weight), rtol=1e-12)


def test_an_evaluation_set_without_target_tokens_is_an_error():
    frozen, adapter = toy.model()
    with pytest.raises(train.UserError, match="no target tokens"):
        train.evaluate(toy.loss_fn, frozen, adapter, [])


def test_a_huge_loss_has_infinite_perplexity():
    def huge(*_):
        return jnp.asarray(1e4), jnp.asarray(1.0)

    assert train.evaluate(huge, None, None, [None]).perplexity == math.inf


def test_evaluation_has_no_key_and_the_dtype_of_training():
    seen = []

    def loss_fn(frozen, adapter, batch, key):
        seen.append((key is None, adapter["w/a"].dtype == jnp.bfloat16))
        return toy.loss_fn(frozen, adapter, batch, key)

    frozen, adapter = toy.model(jnp.float32)
    train.fit(
        loss_fn,
        optax.sgd(0.1),
        frozen,
        adapter,
        [toy.batch()],
        key=jax.random.key(0),
        eval_data=[toy.batch()],
        compute_dtype=jnp.bfloat16,
        progress=False,
    )
    assert sorted(set(seen)) == [(False, True), (True, True)]


def test_metrics_hold_every_step_and_evaluation_in_order_and_no_times(tmp_path):
    result = resumable.main(tmp_path, 7, log_every=2, progress=False)
    records = train.read_metrics(tmp_path / "metrics.jsonl")
    steps = [(r["step"], "eval_loss" in r) for r in records]
    assert steps == [(0, True), (2, False), (4, False), (5, True), (6, False), (7, True)]
    assert set(records[1]) == {"step", "loss", "grad_norm", "tokens"}
    assert set(records[0]) == {"step", "eval_loss", "eval_perplexity"}
    assert records[-1]["eval_loss"] == result.evaluation.loss
    assert records[-1]["eval_perplexity"] == pytest.approx(math.exp(result.evaluation.loss))


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path):
    batches = [toy.batch(seed=seed) for seed in range(4)]
    batches[2]["weights"][0, 0] = np.nan
    with pytest.raises(
        train.UserError, match=r"not finite at step 3 \(loss nan, gradient norm nan"
    ):
        run(batches)


def test_a_loss_that_is_not_finite_is_skipped_on_request(tmp_path):
    class Poisoned(resumable.Stream):
        def __next__(self):
            batch = super().__next__()
            if self.position == 3:
                batch["weights"][0, 0] = np.inf
            return batch

    result = run(Poisoned(), max_steps=5, on_nan="skip", output_dir=tmp_path, log_every=2)
    records = train.read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"] is None, r.get("skipped", False)) for r in records] == [
        (2, False, False),
        (3, True, True),
        (4, False, False),
    ]
    stream = resumable.Stream()
    batches = [next(stream) for _ in range(5)]
    expected, _ = by_hand([*batches[:2], *batches[3:]])
    assert_same(result.state.adapter, expected.adapter)
    assert result.state.step == 5


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, resumable.main(folder, 7, progress=False)


@pytest.mark.parametrize("at", [1, 5, 6, 7])
def test_sigterm_saves_and_the_next_process_ends_with_the_same_bytes(
    tmp_path, straight, at, monkeypatch
):
    """At a step that is evaluated, at one that is saved, at the first and at the last."""
    folder, unstopped = straight

    class Preempted(resumable.Stream):
        def __next__(self):
            if self.position + 1 == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "Stream", Preempted)
        first = resumable.main(tmp_path, 7, progress=False)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not first.finished
    assert first.state.step == at
    second = resumable.main(tmp_path, 7, progress=False)
    assert second.finished
    assert_same(second.state, unstopped.state)
    assert second.evaluation == unstopped.evaluation
    name = "metrics.jsonl"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_finished_run_started_again_changes_nothing_and_reports_its_evaluation(tmp_path):
    first = resumable.main(tmp_path, 4, progress=False)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    again = resumable.main(tmp_path, 4, progress=False)
    assert_same(again.state, first.state)
    assert again.evaluation == first.evaluation
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_records_after_the_checkpoint_and_an_incomplete_line_are_removed(tmp_path):
    resumable.main(tmp_path, 4, progress=False)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + json.dumps({"step": 5, "loss": 1.0}).encode() + b"\n" + b'{"ste')
    resumable.main(tmp_path, 4, progress=False)
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-3])  # incomplete itself: the lost record stays lost, the others stay
    resumable.main(tmp_path, 4, progress=False)
    assert whole.startswith(file.read_bytes())


def test_put_batch_puts_batches_on_a_mesh(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("data"))
    batches = [toy.batch(seed=seed) for seed in range(3)]
    seen = []

    def put_batch(batch):
        batch = jax.device_put(batch, spread)
        seen.append(batch["tokens"].sharding)
        return batch

    got = run(batches, put_batch=put_batch, eval_data=batches[:1])
    assert seen == [spread] * 5
    want, _ = by_hand(batches)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 1e-12), got.state, want)


def test_progress_is_quiet_where_there_is_no_terminal(capfd):
    run(progress=None)
    assert capfd.readouterr() == ("", "")


def test_progress_shows_step_loss_rate_and_time_left(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    run(progress=True, max_steps=6, eval_data=[toy.batch()])
    shown = capfd.readouterr().err
    for part in (
        r"6/6",
        r"(?<!eval )loss 3\.\d{4}",
        r"eval loss 3\.\d{4}",
        r"[\d,]+ tokens/s",
        r"\d:\d\d:\d\d\s+left",
    ):
        assert re.search(part, shown), part


def test_progress_without_rich_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    run(progress=None)
    with pytest.raises(train.UserError, match=r"rich: pip install 'jaxpeft\[train\]'"):
        run(progress=True)


def test_progress_in_lines_is_one_per_evaluation_on_stdout(capfd):
    run(progress="lines", max_steps=6, eval_data=[toy.batch()], eval_every=4)
    out, err = capfd.readouterr()
    first, middle, last = out.splitlines()
    assert re.fullmatch(r"step 0/6  eval loss 3\.\d{4}", first)
    assert re.fullmatch(r"step 4/6  loss 3\.\d{4}  eval loss 3\.\d{4}  [\d,]+ tokens/s", middle)
    assert last.startswith("step 6/6  loss 3.") and err == ""
    with pytest.raises(ValueError, match="True, False or \"lines\", got 'bars'"):
        run(progress="bars")


def test_each_line_of_progress_is_written_at_once(monkeypatch):
    """Python buffers output that goes to a file, where nobody would see it until the end."""

    class File(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue().count("\n"))

    flushed = []
    monkeypatch.setattr(sys, "stdout", File())
    run(progress="lines", max_steps=3, eval_data=[toy.batch()])
    assert set(flushed) == {1, 2}


def without(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def never(*_):
    raise AssertionError("a step or an evaluation was begun")


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("matplotlib", {"loss_figure": "loss.png"}, r"a loss figure needs .*'jaxpeft\[figure\]'"),
        ("rich", {"progress": True}, r"progress=True needs rich: pip install 'jaxpeft\[train\]'"),
    ],
)
def test_the_package_that_an_option_needs_is_checked_before_the_first_step(
    tmp_path, monkeypatch, module, options, message
):
    without(monkeypatch, module)
    frozen, adapter = toy.model()
    data = resumable.Stream()
    if "loss_figure" in options:
        options = options | {
            "output_dir": tmp_path,
            "loss_figure": tmp_path / options["loss_figure"],
        }
    with pytest.raises(train.UserError, match=message):
        train.fit(never, optax.sgd(0.1), frozen, adapter, data, **{"progress": False} | options)


def test_a_figure_that_could_not_be_drawn_at_the_end_is_refused_before_the_first_step(tmp_path):
    pytest.importorskip("matplotlib")
    frozen, adapter = toy.model()
    for figure, message in [
        (
            tmp_path / "loss.xyz",
            r"loss\.xyz has the suffix '\.xyz', which is not a format .*png, .*svg",
        ),
        (tmp_path / "loss", r"loss has the suffix '', which is not a format"),
        (tmp_path / "none" / "loss.png", rf"there is no folder {tmp_path}/none"),
    ]:
        with pytest.raises(train.UserError, match=message):
            train.fit(
                never, optax.sgd(0.1), frozen, adapter, resumable.Stream(),
                output_dir=tmp_path, loss_figure=figure, progress=False,
            )  # fmt: skip


def test_an_optional_module_is_named_with_its_extra_and_what_it_lacks_itself(tmp_path, monkeypatch):
    assert need("json.decoder", "train", "this") is json.decoder
    without(monkeypatch, "tokenizers")
    with pytest.raises(
        train.UserError, match=r"reading text needs tokenizers: pip install 'jaxpeft\[train\]'\."
    ):
        need("tokenizers.models", "train", "reading text")
    (tmp_path / "halfway.py").write_text("import missing_part")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(train.UserError, match=r"this needs halfway: .*No module .*missing_part"):
        need("halfway", "train", "this")


def test_the_rate_counts_target_tokens_and_seconds_after_the_first_step(monkeypatch):
    seconds = itertools.count(100.0, 0.5)
    monkeypatch.setattr(_report, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    batches = [toy.batch(seed=seed) for seed in range(6)]
    tokens = sum(batch["weights"].sum() for batch in batches[1:])
    assert run(batches).tokens_per_second == pytest.approx(tokens / (5 * 0.5), rel=1e-12)
    assert run([toy.batch()]).tokens_per_second is None  # compilation only


def test_a_loss_figure_shows_both_losses_over_steps(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    figures, savefig = [], matplotlib.figure.Figure.savefig

    def kept(figure, *args, **options):
        figures.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", kept)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        resumable.main(tmp_path, 6, progress=False, loss_figure=tmp_path / "loss.svg")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    records = train.read_metrics(tmp_path / "metrics.jsonl")
    points = lambda name: [(r["step"], r[name]) for r in records if name in r]  # noqa: E731
    assert drawn == {"training": points("loss"), "evaluation": points("eval_loss")}
    assert [len(drawn[label]) for label in ("training", "evaluation")] == [6, 3]
    text = (tmp_path / "loss.svg").read_text()
    for label in ("step", "loss per target token (nats)", "training", "evaluation"):
        assert f">{label}</text>" in text


def test_a_figure_needs_matplotlib_and_records(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text("")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(train.UserError, match=r"pip install 'jaxpeft\[figure\]'"):
            train.plot_loss(file, tmp_path / "loss.png")
    pytest.importorskip("matplotlib")
    with pytest.raises(train.UserError, match=rf"{file} has no records"):
        train.plot_loss(file, tmp_path / "loss.png")


# The order of arguments --------------------------------------------------------------------------


def lifted():
    """A loss, a frozen tree with placeholders, and an adapter."""
    model = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": jnp.ones((3, 2))}
    sites = jp.sites(model, params, jnp.ones((4, 3)))
    frozen, adapter = jp.split(jp.lora(1, sites.linear)(jax.random.key(0), params))

    def loss_fn(frozen, adapter, batch, key):
        return jnp.sum(jp.lift(model)(jp.combine(frozen, adapter), batch)), 1.0

    return loss_fn, frozen, adapter


def test_the_adapter_before_the_frozen_tree_is_an_error():
    loss_fn, frozen, adapter = lifted()
    tx, x = optax.sgd(0.1), jnp.ones((4, 3))
    calls = {
        r"fit\(loss_fn, tx, frozen, adapter, data\)": lambda: train.fit(
            loss_fn, tx, adapter, frozen, [x], progress=False
        ),
        r"evaluate\(loss_fn, frozen, adapter, batches\)": lambda: train.evaluate(
            loss_fn, adapter, frozen, [x]
        ),
        r"estimate_memory\(loss, frozen, adapter, \.\.\.\)": lambda: jp.estimate_memory(
            lambda *given: loss_fn(*given)[0], adapter, frozen, x, None
        ),
        r"check_loss\(loss_fn, frozen, adapter, batch, key\)": lambda: check_loss(
            loss_fn, adapter, frozen, x, None
        ),
        r"init\(adapter, tx\)": lambda: train.init(frozen, tx),
    }
    for call, swapped in calls.items():
        with pytest.raises(ValueError, match=rf"`{call}`: the adapter has a placeholder for 'w/a'"):
            swapped()
    with pytest.raises(ValueError, match=r"adapter is \{\}: it has no arrays.* order of arguments"):
        train.fit(toy.loss_fn, tx, adapter, {}, [x], progress=False)


def test_a_loss_that_takes_the_adapter_before_the_frozen_tree_is_an_error():
    _, frozen, adapter = lifted()
    tx, x = optax.sgd(0.1), jnp.ones((4, 3))

    def old(adapter, frozen, batch, key):
        raise AssertionError("the loss was called")

    def other(params, frozen, batch, key):
        raise AssertionError("the loss was called")

    names = (
        r"`old\(adapter, frozen, \.{3}\)` takes the adapter first.*`old\(frozen, adapter, \.{3}\)`"
    )
    for call in (
        lambda loss: train.fit(loss, tx, frozen, adapter, [x], progress=False),
        lambda loss: train.train_step(loss, tx),
        lambda loss: train.evaluate(loss, frozen, adapter, [x]),
        lambda loss: jp.estimate_memory(loss, frozen, adapter, x),
        lambda loss: check_loss(loss, frozen, adapter, x, None),
    ):
        with pytest.raises(ValueError, match=names):
            call(old)
        with pytest.raises(ValueError, match=names):
            call(jax.jit(old))
        with pytest.raises(ValueError, match=r"`other\(params, frozen, \.\.\.\)`"):
            call(other)
    # Names that say nothing: it is `combine` that refuses the frozen tree as an adapter.
    unnamed = lambda a, f, b, k: (jp.combine(f, a), 1.0)  # noqa: E731
    with pytest.raises(KeyError, match="Is it the frozen tree. That comes first"):
        train.evaluate(unnamed, frozen, adapter, [x])


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_every": 0, "eval_data": []}, r"`eval_every` .* at least 1; got 0"),
        ({"save_every": -1}, r"`save_every` .* at least 1; got -1"),
        ({"log_every": 0}, r"`log_every` .* at least 1; got 0"),
        ({"eval_every": 5}, r"`eval_every=5` needs `eval_data`"),
        ({"save_every": 5}, r"`save_every=5` needs `output_dir`"),
        ({"loss_figure": "loss.png"}, r"`loss_figure='loss.png'` needs `output_dir`"),
        ({"output_dir": "run"}, r"get_state and set_state, .* got list_iterator"),
    ],
)
def test_options_that_do_not_fit_together_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_user_error_is_one_line_and_exit_code_2_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit) as end, train.one_line_errors():
        raise train.UserError("line 3 of x.jsonl is\nno JSON")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: line 3 of x.jsonl is no JSON\n"
    with pytest.raises(KeyError), train.one_line_errors():
        raise KeyError("defect")
