"""runtime/kernels/ort_api.h declares ONNX Runtime's C API as it is: slots, fields, values."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "runtime" / "kernels"
HEADER = (KERNELS / "ort_api.h").read_text()
CHECK = (KERNELS / "ort_header_check.cpp").read_text()
LINES = (ROOT / "tests" / "data" / "ort_c_api_slots.txt").read_text().splitlines()
SLOTS = {name: int(slot) for slot, name in (line.split() for line in LINES if line[:1].isdigit()) if name != "TOTAL"}
# In the order of the struct.
FIELDS = re.findall(
    r"\w+",
    """
    version CreateKernel GetName GetExecutionProviderType GetInputType GetInputTypeCount GetOutputType
    GetOutputTypeCount KernelCompute KernelDestroy GetInputCharacteristic GetOutputCharacteristic GetInputMemoryType
    GetVariadicInputMinArity GetVariadicInputHomogeneity GetVariadicOutputMinArity GetVariadicOutputHomogeneity
    CreateKernelV2 KernelComputeV2 InferOutputShapeFn GetStartVersion GetEndVersion GetMayInplace ReleaseMayInplace
    GetAliasMap ReleaseAliasMap
    """,
)

declared = {name: int(slot) for name, slot in re.findall(r"using (\w+) =\s+Slot<(\d+),", HEADER)}
values = {name: int(value) for name, value in re.findall(r"\b([A-Z]\w+) = (-?\d+)[,\s]", HEADER.split("template")[0])}


def test_the_list_is_whole() -> None:
    assert sorted(SLOTS.values()) == list(range(425))


def test_every_slot_is_the_listed_one() -> None:
    assert len(declared) > 25
    assert declared == {name: SLOTS[name] for name in declared}
    assert len(re.findall(r"Slot<\d", HEADER)) == len(declared)


def test_every_declared_function_is_used() -> None:
    files = [path for end in ("cpp", "h") for path in KERNELS.rglob(f"*.{end}")]
    sources = "".join(path.read_text() for path in files if path.name not in ("ort_header_check.cpp", "ort_api.h"))
    assert [name for name in declared if name not in sources] == []


def test_values_are_read_with_their_sign() -> None:
    assert values["OrtMemTypeCPUInput"] == -2
    assert values["ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16"] == 16


def test_the_fields_of_a_custom_operator() -> None:
    body = HEADER[HEADER.index("struct OrtCustomOp {") :]
    assert re.findall(r"^  (?:uint32_t|Function<.*>) (\w+);", body, re.MULTILINE) == FIELDS
    assert len(FIELDS) == 26
    assert "OrtCustomOp 26" in LINES
    assert "sizeof(OrtCustomOp) == 26 * sizeof(void*)" in HEADER


def test_the_header_check_names_everything() -> None:
    assert re.findall(r"^SLOT\((\w+)\);", CHECK, re.MULTILINE) == list(declared)
    assert re.findall(r"^FIELD\((\w+)\);", CHECK, re.MULTILINE) == FIELDS
    assert re.findall(r"^VALUE\((\w+)\);", CHECK, re.MULTILINE) == list(values)


def _official(slots: list[str], fields: list[str], values: dict[str, int]) -> str:
    """A header with the names of the official one, as far as the check reads it."""
    functions = "\n".join(f"  void (*{name})();" for name in slots)
    words = "\n".join(f"  {'unsigned' if name == 'version' else 'void*'} {name};" for name in fields)
    enumerators = ", ".join(f"{name} = {value}" for name, value in values.items())
    return f"""
#define ORT_API_VERSION 24
struct OrtApiBase {{ void* GetApi; void* GetVersionString; }};
enum Everything {{ {enumerators} }};
struct OrtApi {{
{functions}
}};
struct OrtCustomOp {{
{words}
}};
"""


@pytest.mark.parametrize("damage", [None, "slot", "field", "value"])
def test_the_header_check_compiles_and_sees_a_difference(tmp_path: Path, damage: str | None) -> None:
    """Against a stand-in made of the list: no package brings the official header."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    slots, fields, numbers = sorted(SLOTS, key=SLOTS.__getitem__), list(FIELDS), dict(values)
    if damage == "slot":
        slots[86], slots[87] = slots[87], slots[86]
    elif damage == "field":
        fields[20], fields[21] = fields[21], fields[20]
    elif damage == "value":
        numbers["ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4"] = 23
    (tmp_path / "onnxruntime_c_api.h").write_text(_official(slots, fields, numbers))
    command = [compiler, "-std=c++17", "-fsyntax-only", "-I", str(tmp_path), str(KERNELS / "ort_header_check.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if damage is None:
        assert done.returncode == 0, done.stderr
    else:
        expected = {"slot": "has another slot", "field": "lies elsewhere in OrtCustomOp", "value": "has another value"}
        assert expected[damage] in done.stderr
