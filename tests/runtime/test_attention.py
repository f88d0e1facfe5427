"""GroupQueryAttention of the native library against its body, ONNX Runtime's own, over generated inputs."""

import ctypes
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from native_models import native_library, open_session
from onnx import helper

from qcompile.passes.formats.attention import attention_body

_NAMES = list(attention_body().input)


@dataclass(frozen=True)
class Case:
    """One run of one node. lengths: of each sequence, this run's rows included; room: of caches, beyond the longest."""

    lengths: tuple[int, ...] = (5,)
    rows: int = 1
    groups: int = 2
    sharing: int = 2
    width: int = 16
    half: bool = False
    cache: str = "float"  # as queries; int8; or float16, beside float32 queries
    channels: bool = True
    packed: bool = False
    room: int = 0
    pairs: int = 0
    interleaved: bool = False
    positions: bool = False
    bias: tuple[int, int] | None = None  # its sizes beside the batch and the heads: 1 or all
    window: int = -1
    softcap: float = 0.0
    scale: float = 0.0
    seed: int = 0

    @property
    def total(self) -> int:
        """total_sequence_length."""
        return max(self.lengths)

    @property
    def dtype(self) -> type:
        """Of queries."""
        return np.float16 if self.half else np.float32

    def attributes(self) -> dict[str, object]:
        """Of the node."""
        found: dict[str, object] = {"num_heads": self.groups * self.sharing, "kv_num_heads": self.groups}
        found |= {"local_window_size": self.window, "softcap": self.softcap, "scale": self.scale}
        found |= {"do_rotary": int(self.pairs > 0), "rotary_interleaved": int(self.interleaved)}
        if self.cache == "int8":
            per = "PER_CHANNEL" if self.channels else "PER_TENSOR"
            found |= {"k_quant_type": per, "v_quant_type": per, "kv_cache_bit_width": 8}
        return found

    def feeds(self) -> dict[str, np.ndarray]:
        """Inputs by name."""
        rng, batch = np.random.default_rng(self.seed), len(self.lengths)
        heads = self.groups * self.sharing

        def numbers(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(self.dtype)

        if self.packed:
            feeds = {"query": numbers(batch, self.rows, (heads + 2 * self.groups) * self.width)}
        else:
            wide = {"query": heads, "key": self.groups, "value": self.groups}
            feeds = {name: numbers(batch, self.rows, n * self.width) for name, n in wide.items()}
        past = self.total - self.rows if self.room == 0 else self.total + self.room
        for name in ("past_key", "past_value"):
            own = numbers(batch, self.groups, past, self.width)
            kinds = {"float": own, "float16": own.astype(np.float16)}
            feeds[name] = kinds.get(self.cache, np.clip(np.rint(own * 40), -128, 127).astype(np.int8))
        feeds["seqlens_k"] = np.array(self.lengths, np.int32) - 1
        feeds["total_sequence_length"] = np.array(self.total, np.int32)
        if self.pairs:
            angles = np.arange(self.total + 3)[:, None] * np.exp(-np.arange(self.pairs))
            feeds |= {"cos_cache": np.cos(angles).astype(self.dtype), "sin_cache": np.sin(angles).astype(self.dtype)}
        if self.positions:
            feeds["position_ids"] = np.tile(np.arange(self.total - self.rows, self.total), (batch, 1))
        if self.bias:
            sizes = (batch if self.bias[0] else 1, heads if self.bias[1] else 1)
            feeds["attention_bias"] = np.where(rng.random((*sizes, self.rows, self.total)) < 0.2, -1e4, 0.5)
            feeds["attention_bias"] = feeds["attention_bias"].astype(self.dtype)
        if self.cache == "int8":
            shape = (1, self.groups, 1, self.width) if self.channels else (1,)
            feeds |= {name: rng.uniform(0.01, 0.04, shape).astype(np.float32) for name in ("k_scale", "v_scale")}
        return feeds

    def model(self) -> bytes:
        """The node and its function."""
        feeds = self.feeds()
        inputs = [name if name in feeds else "" for name in _NAMES]
        while not inputs[-1]:
            inputs.pop()
        names = ["output", "present_key", "present_value"]
        name = "GroupQueryAttentionF16" if self.cache == "float16" else "GroupQueryAttention"
        node = helper.make_node(name, inputs, names, domain="qcompile", **self.attributes())
        kinds = [helper.np_dtype_to_tensor_dtype(feeds[name].dtype) for name in ("query", "past_key", "past_value")]
        graph = helper.make_graph(
            [node], "g",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(own.dtype), [None] * own.ndim)
                for name, own in feeds.items()
            ],
            [
                helper.make_tensor_value_info(name, kind, [None] * rank)
                for name, kind, rank in zip(names, kinds, (3, 4, 4), strict=True)
            ],
        )  # fmt: skip
        opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), ("qcompile", 1))]
        model = helper.make_model(graph, opset_imports=opsets, functions=[attention_body(name)], ir_version=10)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())


def run(session: ort.InferenceSession, feeds: dict[str, np.ndarray], *, shared: bool) -> list[np.ndarray]:
    """Outputs; shared: past and present are one buffer each."""
    if not shared:
        return list(session.run(None, feeds))
    binding = session.io_binding()
    for name, array in feeds.items():
        if not name.startswith("past"):
            binding.bind_cpu_input(name, array)
    for name in ("past_key", "past_value"):
        value = ort.OrtValue.ortvalue_from_numpy(feeds[name].copy())
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past", "present"), value)
    binding.bind_output("output")
    session.run_with_iobinding(binding)
    key, value, output = binding.copy_outputs_to_cpu()
    return [output, key, value]


@cache
def kernels() -> list[str]:
    """The instruction sets of this machine."""
    library = ctypes.CDLL(str(native_library()))
    library.qcompile_kernels.restype = ctypes.c_char_p
    return str(library.qcompile_kernels().decode()).split(",")


def check(case: Case, kernel: str, threads: int = 1) -> None:
    """The kernel's outputs and caches against the body's."""
    feeds, model = case.feeds(), case.model()
    wanted = run(open_session(model, None), feeds, shared=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOMPILE_KERNEL", kernel)
        session = open_session(model, native_library(), threads)
        found = [run(session, feeds, shared=False)] + ([run(session, feeds, shared=True)] if case.room else [])
    close = {"rtol": 2e-3, "atol": 4e-3} if case.half or case.cache == "float16" else {"rtol": 1e-4, "atol": 2e-5}
    for y, *presents in found:
        assert y.dtype == case.dtype
        assert y.shape == wanted[0].shape
        for i, length in enumerate(case.lengths):
            before = 0 if case.rows == case.total else length - case.rows
            rows = min(case.rows, length - before)  # of a padded prompt the others say nothing
            within = {"rtol": 1e-2, "atol": 2e-2} if case.cache == "int8" else close  # a new code may be the next one
            np.testing.assert_allclose(y[i, :rows], wanted[0][i, :rows], **within)
            for own, other in zip(presents, wanted[1:], strict=True):
                assert own.dtype == other.dtype
                assert own.shape == other.shape
                own, other = (x[i, :, :length].astype(np.float32) for x in (own, other))
                if case.cache == "int8":
                    assert np.abs(own - other).max(initial=0) <= 1
                    assert (own != other).mean() < 0.01
                else:
                    np.testing.assert_allclose(own, other, **close)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Prompts of padded sequences, steps behind others of any length, rows behind one that is cached."""
    width = draw(st.sampled_from([8, 16, 24, 64, 80]))
    kind = draw(st.sampled_from(["prompt", "step", "more"]))
    most = draw(st.sampled_from([4, 70, 300, 600]))
    if kind == "prompt":
        lengths = tuple(draw(st.lists(st.integers(1, min(most, 130)), min_size=1, max_size=3)))
        rows = max(lengths)
    elif kind == "step":
        lengths, rows = tuple(draw(st.lists(st.integers(2, most), min_size=1, max_size=3))), 1
    else:
        rows = draw(st.integers(2, 70))
        lengths = (rows + draw(st.integers(1, most)),)
    pairs = draw(st.sampled_from([0, 8, width // 2]))
    assume(pairs == 0 or (width % 16 == 0 and 2 * pairs <= width and pairs % 8 == 0))
    half, cached = draw(st.booleans()), draw(st.sampled_from(["float", "int8", "float16"]))
    return Case(
        lengths, rows, draw(st.integers(1, 3)), draw(st.integers(1, 4)), width,
        half and cached != "float16", cached, draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from([0, 1, 40])), pairs, draw(st.booleans()),
        pairs > 0 and len(lengths) == 1 and draw(st.booleans()),
        draw(st.sampled_from([None, (0, 0), (1, 0), (1, 1)])), draw(st.sampled_from([-1, 1, 7, 100])),
        draw(st.sampled_from([0.0, 5.0])), draw(st.sampled_from([0.0, 0.3])), draw(st.integers(0, 9)),
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(case=cases(), data=st.data())
def test_it_computes_what_its_body_does(case: Case, data: st.DataObject) -> None:
    check(case, data.draw(st.sampled_from(kernels())), data.draw(st.sampled_from([1, 2])))


@pytest.mark.parametrize("width", [8, 24, 64])
@pytest.mark.parametrize("cache", ["float", "int8", "float16"])
def test_every_instruction_set_and_long_steps(cache: str, width: int) -> None:
    """Steps whose positions are shared among threads, in parts, of sequences that end in different ones."""
    for kernel in kernels():
        for threads in (1, 2):
            check(Case((700, 257, 3), width=width, cache=cache, pairs=8 * (width % 16 == 0), room=9), kernel, threads)


def test_a_window_reads_no_more_than_it_lets_through() -> None:
    """Keys and values before it may be anything, not numbers among them."""
    case = Case((400,), width=16, window=5, room=8)
    feeds = case.feeds()
    for name in ("past_key", "past_value"):
        feeds[name][:, :, :200] = np.nan
    (y, *_) = open_session(case.model(), native_library()).run(None, feeds)
    assert np.isfinite(y).all()


def test_not_a_number_stays_one() -> None:
    case = Case((90,), width=16)
    feeds = case.feeds()
    feeds["past_value"][:, 0, 3, 2] = np.nan
    (y, *_) = open_session(case.model(), native_library()).run(None, feeds)
    assert np.isnan(y[0, 0].reshape(4, 16)[:2, 2]).all()
    assert np.isfinite(y[0, 0].reshape(4, 16)[2:]).all()
    feeds = case.feeds()
    feeds["query"][0, 0, 0] = np.nan
    (y, *_) = open_session(case.model(), native_library()).run(None, feeds)
    assert np.isnan(y[0, 0, :16]).all()


def test_rows_that_nothing_is_let_through_to_are_zeros() -> None:
    case = Case((70,), width=16, bias=(0, 0))
    feeds = case.feeds()
    feeds["attention_bias"][:] = -np.inf
    (y, *_) = open_session(case.model(), native_library()).run(None, feeds)
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"past_key": np.zeros((1, 2, 4, 8), np.float32)}, "past_key has shape (1, 2, 4, 8)"),
        ({"past_value": np.zeros((1, 2, 3, 16), np.float32)}, "past_value has shape (1, 2, 3, 16)"),
        ({"key": np.zeros((1, 2, 32), np.float32)}, "key has shape (1, 2, 32)"),
        ({"query": np.zeros((1, 1, 63), np.float32)}, "query has shape (1, 1, 63), for 4 heads"),
        ({"seqlens_k": np.array([9], np.int32)}, "sequence 0 ends at position 9"),
        ({"seqlens_k": np.array([-1], np.int32)}, "sequence 0 ends at position -1"),
        ({"seqlens_k": np.array([5], np.int32)}, "sequence 0 ends at position 5"),
        ({"seqlens_k": np.array([2**31 - 1], np.int32)}, "sequence 0 ends at position 2147483647"),
        ({"total_sequence_length": np.array(4, np.int32)}, "sequence 0 ends at position 4"),
        ({"total_sequence_length": np.array(0, np.int32)}, "total_sequence_length is 0, it must be positive"),
        ({"total_sequence_length": np.array(-1, np.int32)}, "total_sequence_length is -1"),
        ({"seqlens_k": np.array([4, 4], np.int32)}, "seqlens_k has shape (2,) for 1 sequences"),
        ({"cos_cache": np.zeros((4, 8), np.float32)}, "cos_cache (4, 8) and sin_cache (8, 8)"),
        ({"position_ids": np.array([[8]])}, "position 8 is beyond the 8 rows of cos_cache"),
        ({"position_ids": np.array([[-1]])}, "position -1 is beyond"),
        ({"attention_bias": np.zeros((1, 1, 1, 4), np.float32)}, "attention_bias has shape (1, 1, 1, 4)"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, np.ndarray], told: str) -> None:
    case = Case(pairs=8, positions=True, bias=(0, 0))
    session = open_session(case.model(), native_library())
    with pytest.raises(Exception, match=re.escape(f"GroupQueryAttention: {told}")):
        session.run(None, case.feeds() | changed)


@pytest.mark.parametrize("total", [1, 2, 4095])
def test_no_sequence_is_longer_than_the_total(total: int) -> None:
    """The caches have room for it, but a bias as long as the total has not: it would be read behind its end."""
    case = Case((4096,), groups=1, sharing=1, room=1, bias=(0, 0))
    short = {
        "total_sequence_length": np.array(total, np.int32),
        "attention_bias": np.zeros((1, 1, 1, total), np.float32),
    }
    session = open_session(case.model(), native_library())
    with pytest.raises(Exception, match=f"sequence 0 ends at position 4095, .* total_sequence_length {total}"):
        session.run(None, case.feeds() | short)


def test_a_bias_has_all_rows_as_com_microsoft_s() -> None:
    case = Case((7,), rows=3, bias=(0, 0))
    feeds = case.feeds() | {"attention_bias": np.zeros((1, 1, 1, 7), np.float32)}
    for library, told in (
        (native_library(), "attention_bias has shape (1, 1, 1, 7)"),
        (None, "attention_bias dimension 2"),
    ):
        with pytest.raises(Exception, match=re.escape(told)):
            open_session(case.model(), library).run(None, feeds)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("cache", ["float", "int8"])
def test_what_many_short_sequences_append_is_shared_among_threads(cache: str, rows: int) -> None:
    """Pieces of it begin and end within sequences."""
    lengths = tuple(range(1, 41)) if rows == 1 else (9, 5, 7, 9, 1)
    check(Case(lengths, rows, cache=cache, pairs=8, room=3, bias=(1, 1)), kernels()[0], 2)


def test_the_widest_head() -> None:
    check(Case((5,), width=1024), kernels()[0])
    case = Case((5,), width=1032)
    with pytest.raises(Exception, match="heads of 1032 numbers, it takes 1 to 1024"):
        open_session(case.model(), native_library()).run(None, case.feeds())
