"""compiler/mixed/keep.py: --keep-worst keeps N, --keep-share what gains most for its work, bounds what they need."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixing import BAD, bad_conv, bad_decoder, images

from qcompile.compiler.console.numbers import decibels
from qcompile.compiler.measure.distance import LogitsKl, OutputSqnr
from qcompile.compiler.mixed import keep as mixed
from qcompile.compiler.mixed.keep import smallest
from qcompile.compiler.recipe import Recipe, dump_recipe, load_recipe, parse_passes
from qcompile.compiler.results.report import Report
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import run, session

QDQ = parse_passes("qdq(lm_head=static)")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache for the tests of this file: their models are few."""
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path_factory.getbasetemp() / "max-kl-cache"))


@pytest.fixture
def decoder(bench: Any) -> tuple[Any, Path, list[Path]]:
    """(bench, a decoder with a bad node, files: it is calibrated on the first, nodes are chosen by the second)."""
    source = bench.save(bad_decoder())
    rng, files = np.random.default_rng(4), []
    for i in range(2):
        files.append(bench.folder / f"{i}.npz")
        np.savez(files[-1], input_ids=rng.integers(0, 256, (1, 40)))
    return bench, source, files


def _compiled(decoder: Any, **settings: Any) -> Report:
    bench, source, files = decoder
    settings.setdefault("keep_as", "float")
    return bench.compile(source, "qdq(lm_head=static)", calibration=[str(file) for file in files], **settings)


def _kept(report: Report) -> list[str]:
    return [d.node for d in report.decisions["qdq"] if d.reason.startswith("kept for its sensitivity")]


def _saved_kl(decoder: Any) -> float:
    """KL(float ‖ compiled) of the file that is held aside, nats a token, in float64."""
    bench, source, files = decoder
    values = []
    for file in files[1:]:
        ids = np.load(file)["input_ids"]
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        p, q = (
            run(session(path, kernels="portable"), ["logits"], feeds)[0].astype(np.float64)
            for path in (source, bench.folder / "out/model.onnx")
        )
        p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
                for x in (p, q))  # fmt: skip
        values.append((np.exp(p) * (p - q)).sum(-1))
    return float(np.mean(values))


@pytest.mark.parametrize("count", [1, 3])
def test_keep_worst_keeps_exactly_so_many(decoder: Any, count: int) -> None:
    report = _compiled(decoder, keep_worst=count)
    made = report.mixed
    assert made is not None
    assert _kept(report) == [d.node for d in report.decisions["qdq"] if d.action == "kept"]
    assert sorted(_kept(report)) == sorted(own.node for own in made.kept)
    assert len(made.kept) == count
    assert made.kept[0].node == BAD
    assert report.coverage == 1.0, "what is kept by choice does not count"
    reason = next(d.reason for d in report.decisions["qdq"] if d.node == BAD)
    assert reason.startswith("kept for its sensitivity: rank 1, KL ")
    assert reason.endswith(" nats a token alone")
    assert made.after < made.before
    assert made.after == pytest.approx(_saved_kl(decoder), rel=0.01)


def test_max_kl_is_met_with_as_few_nodes_as_possible(decoder: Any) -> None:
    counts = []
    three = _compiled(decoder, keep_worst=3).mixed
    two = _compiled(decoder, keep_worst=2).mixed
    assert three is not None
    assert two is not None
    bounds = [1.01 * three.after, 1.01 * two.after, 0.99 * two.before]
    assert bounds[0] < two.after, "a bound that two nodes do not meet"
    for bound in bounds:
        report = _compiled(decoder, max_kl=bound)
        assert report.mixed is not None
        assert _saved_kl(decoder) <= bound
        assert report.mixed.after <= bound < report.mixed.before
        assert len(_kept(report)) == len(report.mixed.kept)
        counts.append(len(report.mixed.kept))
    assert counts == [3, 2, 1], "never more for a looser bound"


def test_a_bound_met_by_all_nodes_keeps_none(decoder: Any) -> None:
    bench = decoder[0]
    plain = _compiled(decoder, output="plain/model.onnx")
    report = _compiled(decoder, max_kl=10.0)
    assert report.mixed is not None
    assert report.mixed.kept == ()
    assert report.mixed.before == pytest.approx(report.mixed.after, rel=0.01)
    assert report.mixed.bytes_before == report.mixed.bytes_after
    assert plain.mixed is None
    (data,), (other,) = ((bench.folder / place).glob("*.data") for place in ("plain", "out"))
    assert data.read_bytes() == other.read_bytes()


def test_bytes_are_those_of_the_weights(decoder: Any) -> None:
    made = _compiled(decoder, keep_worst=1).mixed
    assert made is not None
    k, n = 64, 256
    # Codes and scales give way to floats; the scale and zero point of the node's own activation go, too.
    assert made.bytes_after - made.bytes_before == pytest.approx(4 * k * n - k * n - 4 * n, abs=16)


@pytest.mark.parametrize("passes", ["qdq(lm_head=static)", "dynamic(lm_head=dynamic)"])
def test_int8_weights_where_only_the_activation_is_bad(bench: Any, passes: str) -> None:
    # Outliers of tiny_decoder are in its norms, so that activations are bad and weights are not.
    source, name = bench.save(tiny_decoder(layers=1)), passes.split("(")[0]
    made = bench.compile(source, passes, keep_worst=2, keep_as="weights")
    mixed = made.mixed
    assert [own.weights_only for own in mixed.kept] == [True, True]
    assert mixed.bytes_after == pytest.approx(mixed.bytes_before, abs=16), "the codes are the same"
    reasons = [d.reason for d in made.decisions[name] if "weights only: kept for its sensitivity: rank" in d.reason]
    assert len(reasons) == 2
    in_float = bench.compile(source, passes, keep_worst=2, keep_as="float").mixed
    assert in_float.bytes_after > mixed.bytes_after
    assert in_float.after < mixed.after < 0.8 * mixed.before
    auto = bench.compile(source, passes, keep_worst=2).mixed
    assert auto.after in (mixed.after, in_float.after)


def test_floats_where_the_weight_is_bad(decoder: Any) -> None:
    auto, light = (_compiled(decoder, keep_worst=1, keep_as=form).mixed for form in ("auto", "weights"))
    assert auto is not None
    assert light is not None
    assert not auto.kept[0].weights_only
    assert light.kept[0].weights_only
    assert auto.after < 0.5 * light.after
    bounded = _compiled(decoder, max_kl=1.01 * auto.after, keep_as="auto").mixed
    assert bounded is not None
    assert bounded.after <= 1.01 * auto.after


def test_convolutions_are_kept_in_float_all_the_same(bench: Any) -> None:
    source = bench.save(bad_conv(), tokenizer=False)
    report = bench.compile(source, "qdq", calibration=images(bench.folder), keep_worst=1)
    assert report.mixed is not None
    assert not report.mixed.kept[0].weights_only


def test_other_networks_by_the_noise_of_their_outputs(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source, files = bench.save(bad_conv()), images(bench.folder)
    options = ["--passes", "qdq(lm_head=static)", "--calibration", *files]
    assert bench.run(source, *options, "--keep-worst", "1") == 0
    assert "mixed     1 of 5 nodes kept in float: conv_1 (SQNR " in capsys.readouterr().out
    assert bench.run(source, *options, "--min-sqnr", "20") == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "SQNR" in line and "→" in line)
    before, after = (float(part) for part in line.split()[1:4:2])
    assert before < 20 <= after
    assert "conv_1 (SQNR" in shown
    bench.refuses(capsys, source, [*options, "--min-sqnr", "300"], "min_sqnr 300 cannot be met: with all 5 nodes in fl")
    bench.refuses(capsys, source, [*options, "--min-sqnr", "100"], "is met only with all 5 nodes in float: nothing w")
    bench.refuses(capsys, source, [*options, "--max-kl", "1"], "max_kl is for decoders, .* give min_sqnr in dB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-kl", "1e-9"], "max_kl 1e-09 is met only with all 9 nodes in float: nothing would be quantized"),
        (["--min-sqnr", "30"], "min_sqnr is for models without logits, .* give max_kl in nats"),
        (["--keep-worst", "9"], "keep_worst 9 leaves nothing to quantize: the model has 9 nodes"),
        (["--keep-worst", "0"], "keep_worst must be at least 1, got 0"),
        (["--keep-share", "1.5"], "keep_share must lie between 0 and 1, got 1.5"),
        (["--keep-share", "0.1", "--keep-worst", "2"], "keep_worst and keep_share are two ways to choose"),
        (["--max-kl", "-1"], "max_kl must be a positive number, got -1.0"),
        (["--max-kl", "nan"], "max_kl must be a positive number, got nan"),
        (["--max-kl", "0.1", "--keep-worst", "2"], "keep_worst and max_kl are two ways to choose"),
        (
            ["--max-kl", "0.1", "--passes", "smooth"],
            "max_kl keeps nodes of qdq or dynamic in float, or is kept by",
        ),
        (["--keep-worst", "2", "--passes", "pack"], "keep_worst keeps nodes of qdq or dynamic in float: add one of th"),
        (["--max-kl", "lots"], "--max-kl: expected a number, got 'lots'"),
    ],
)
def test_bad_bounds_are_told_in_a_line(
    decoder: Any, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    bench, source, files = decoder
    if "--passes" not in options:
        options = ["--passes", "qdq(lm_head=static)", *options]
    bench.refuses(capsys, source, [*options, "--calibration", *map(str, files)], message)


def test_a_recipe_file_has_the_bound(tmp_path: Path) -> None:
    recipe = Recipe(QDQ, max_kl=0.03)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert "keep_worst" not in path.read_text()
    with pytest.raises(UserError, match=r"keep_worst must be int, got 1\.5"):
        Recipe.from_dict({"passes": "qdq", "keep_worst": 1.5})


@pytest.mark.parametrize("most", [1, 2, 5, 212])
def test_the_smallest_number_that_holds(most: int) -> None:
    for least in range(most + 1):
        asked: list[int] = []

        def holds(k: int, least: int = least, asked: list[int] = asked) -> bool:
            asked.append(k)
            return k >= least

        assert smallest(holds, most) == least
        assert most not in asked
        assert len(asked) == len(set(asked)) <= 2 * np.log2(max(least, 1)) + 3


def test_a_pass_list_without_integers_has_no_choice() -> None:
    with pytest.raises(UserError, match="add qdq or dynamic"):
        mixed.integer_pass([])


def test_effects_against_their_formulas() -> None:
    rng = np.random.default_rng(0)
    p, q = (np.log(rng.dirichlet(np.ones(7), (1, 5))).astype(np.float32) for _ in range(2))
    effect = LogitsKl("y", [{"y": p}])
    assert effect.distance([{"y": q + 3}]) == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=1e-5)
    assert effect.distance([{"y": p}]) == pytest.approx(0, abs=1e-6)
    error = OutputSqnr(["a", "b"], [{"a": p, "b": q}])
    assert error.distance([{"a": p, "b": q * 1.1}]) == pytest.approx(0.1, rel=1e-4)
    assert error.distance([{"a": p, "b": q}]) == 0
    assert decibels(0.1) == pytest.approx(20)
    with pytest.raises(UserError, match="'y' is NaN or infinite where it is compared"):
        effect.distance([{"y": np.full_like(p, np.nan)}])


def _share_of(report: Report, share: float) -> bool:
    """Whether what is kept is within a share of the weights' bytes."""
    assert report.mixed is not None
    # An int8 weight has a fourth of its float bytes: one that is kept adds three fourths.
    return report.mixed.bytes_after - report.mixed.bytes_before <= 0.75 * 4 * share * report.mixed.bytes_before + 64


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_a_share_of_the_work_is_kept_where_it_gains_most(bench: Any, share: float) -> None:
    source, files = bench.save(bad_conv(), tokenizer=False), images(bench.folder, 8)
    plain = bench.compile(source, "qdq", calibration=files, keep_share=0.0).mixed
    assert plain.kept == ()
    report = bench.compile(source, "qdq", calibration=files, keep_share=share)
    made = report.mixed
    assert len(_kept(report)) == len(made.kept) < made.nodes
    assert _share_of(report, share)
    assert made.after <= 1.001 * plain.after
    if made.kept:
        assert made.after < plain.after
        assert made.held is not None
        assert made.held < plain.held
    if share == 0.9:
        assert made.kept[0].node == "conv_1"
        assert made.after < 0.5 * plain.after


def test_no_share_is_kept_that_rows_held_aside_do_not_confirm(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, files = bench.save(bad_conv(), tokenizer=False), images(bench.folder, 8)
    own = mixed.finished_distances
    told = iter((0.1, 0.2))
    monkeypatch.setattr(mixed, "finished_distances", lambda *given: (own(*given)[0], next(told)))
    found = bench.compile(source, "qdq", calibration=files, keep_share=0.9).mixed
    assert found.kept == ()
    assert found.held == 0.1


def test_decoders_keep_a_share_by_their_kl(decoder: Any) -> None:
    made = _compiled(decoder, keep_share=0.9).mixed
    assert made is not None
    assert BAD in [own.node for own in made.kept]
    assert made.after < 0.5 * made.before


@pytest.mark.parametrize("text", [True, False])
def test_a_bound_holds_on_what_nodes_were_not_chosen_by(bench: Any, text: bool) -> None:
    """On text other windows, of arrays a half of the batches that are held aside; bounds between what nodes give."""
    source, files = bench.save(bad_decoder()), []
    for i in range(0 if text else 8):
        files.append(str(bench.folder / f"{i}.npz"))
        np.savez(files[-1], input_ids=np.random.default_rng(i).integers(0, 256, (1, 40)))
    settings = {"keep_as": "float", "samples": 4, "context": 32, "calibration": files}
    found = bench.compile(source, "qdq(lm_head=static)", keep_worst=2, **settings).mixed
    assert found.held is None, "without a bound there is none to hold"
    for bound in (0.7 * found.after, found.after, 1.5 * found.after):
        report = bench.compile(source, "qdq(lm_head=static)", max_kl=bound, **settings)
        assert report.mixed.held is not None
        assert max(report.mixed.held, report.mixed.after) <= bound
        assert any("held aside" in line for line in report.mixed.lines())
