"""compiler/measure/predictions.py: perplexity and KL of the check batches, against numpy in float64."""

from typing import Any

import numpy as np
import pytest

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.measure.predictions import predictions
from qcompile.compiler.report.page import to_html
from qcompile.models.tiny import tiny_decoder, tiny_encoder


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_against_float64() -> None:
    plan, rng = input_plan(tiny_decoder(layers=1)), np.random.default_rng(0)
    batches, x, y = [], [], []
    for length in (5, 9):
        ids = rng.integers(0, 256, (1, length))
        batches.append(Batch({"input_ids": ids, "attention_mask": np.ones_like(ids)}, length))
        x.append(rng.normal(size=(1, length, 256)).astype(np.float32))
        y.append(x[-1] + rng.normal(size=x[-1].shape).astype(np.float32) / 4)
    found = predictions(plan, batches, [{"logits": a} for a in y], [{"logits": a} for a in x])
    assert found is not None
    nll, kl, same = [], [], []
    for batch, a, b in zip(batches, x, y, strict=True):
        p, q = _log_softmax(a[0, :-1].astype(np.float64)), _log_softmax(b[0, :-1].astype(np.float64))
        targets = batch.feeds["input_ids"][0, 1:]
        nll += [(-p[i, t], -q[i, t]) for i, t in enumerate(targets)]
        kl += list((np.exp(p) * (p - q)).sum(-1))
        same += list(p.argmax(-1) == q.argmax(-1))
    assert found.tokens == 4 + 8
    assert (found.before, found.after) == pytest.approx(tuple(np.exp(np.mean(nll, axis=0))), rel=1e-5)
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.agreement == pytest.approx(np.mean(same))


def test_what_cannot_be_scored_is_not() -> None:
    ids = np.zeros((1, 4), np.int64)
    batch, x = Batch({"input_ids": ids}, 4), np.zeros((1, 4, 256), np.float32)
    decoder = input_plan(tiny_decoder(layers=1))
    assert predictions(input_plan(tiny_encoder()), [batch], [{}], [{}]) is None, "no logits"
    assert predictions(decoder, [batch], [{"logits": x[:, -1:]}], [{"logits": x[:, -1:]}]) is None, "of the last token"
    assert predictions(decoder, [batch], [{"logits": np.full_like(x, np.nan)}], [{"logits": x}]) is None
    one = Batch({"input_ids": ids[:, :1]}, 1)
    assert predictions(decoder, [one], [{"logits": x[:, :1]}], [{"logits": x[:, :1]}]) is None, "nothing follows"
    later = Batch({"input_ids": ids}, 4, follows=0)
    assert predictions(decoder, [batch, later], 2 * [{"logits": x}], 2 * [{"logits": x}]).tokens == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("kv_cache", [False, True])
def test_a_report_tells_it(bench: Any, capsys: pytest.CaptureFixture[str], kv_cache: bool) -> None:
    path = bench.save(tiny_decoder(kv_cache=kv_cache))
    assert bench.run(path, "--passes", "pack", "--calibration", str(bench.text)) == 0
    assert "accuracy  KL " in capsys.readouterr().out
    report = bench.compile(path, "smooth,pack")
    assert report.predictions.kl > 0
    assert "Perplexity" not in report.predictions.told()
    assert f"perplexity, {report.predictions.tokens} tokens" in to_html(report)
    exact = bench.compile(path, "smooth")
    assert exact.predictions.kl < 1e-6
    assert exact.predictions.agreement == 1


def test_random_tokens_have_no_perplexity(bench: Any) -> None:
    assert bench.compile(bench.save(tiny_decoder(), tokenizer=False), "pack", calibration=()).predictions is None
