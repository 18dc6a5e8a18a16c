"""Reading a user's array, and saying plainly what is wrong with it."""

import io
import pickle
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save, save_file

from sae_jax import InputError, read_array
from sae_jax.data import arrays

SUFFIXES = (".npy", ".npz", ".safetensors")


def write(path: Path, array) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, x=array)
    else:
        save_file({"x": np.asarray(array, order="C")}, path)
    return path


def content(suffix, array=None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        default = np.arange(12, dtype=np.float32).reshape(4, 3)
        return write(Path(folder) / f"a{suffix}", default if array is None else array).read_bytes()


def refused(path, *words, name=None) -> str:
    """Reading `path` raises InputError with one line that has these words; the line."""
    with pytest.raises(InputError) as caught:
        read_array(path, name)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# What can be read

shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))
dtypes = st.sampled_from(["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(SUFFIXES), st.booleans())
def test_what_was_written_is_read(data, suffix, fortran):
    kind = data.draw(dtypes.filter(lambda kind: suffix != ".safetensors" or kind[0] == "<"))
    finite = {"allow_nan": False, "allow_infinity": False}
    array = data.draw(hnp.arrays(kind, shapes, elements=finite))
    array = np.asfortranarray(array) if fortran else array
    with tempfile.TemporaryDirectory() as folder:
        read = read_array(write(Path(folder) / f"a{suffix}", array))
        assert read.dtype == (np.float64 if kind.endswith("8") else np.float32)
        assert read.dtype.isnative
        np.testing.assert_array_equal(read, array.astype(np.float64))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_in_safetensors_is_widened(tmp_path, dtype):
    array = np.array([[1.5, -2.25], [3.0, 0.001]], dtype)
    read = read_array(write(tmp_path / "a.safetensors", array))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, array.astype(np.float32))


def test_a_long_double_becomes_a_double(tmp_path):
    read = read_array(write(tmp_path / "a.npy", np.ones((2, 2), np.longdouble)))
    assert read.dtype == np.float64


def test_one_of_several_arrays_can_be_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 2)), y=np.ones((3, 2)))
    save_file({"x": np.zeros((1, 2)), "y": np.ones((3, 2))}, tmp_path / "a.safetensors")
    for suffix in (".npz", ".safetensors"):
        assert read_array(tmp_path / f"a{suffix}", "y").shape == (3, 2)
        refused(tmp_path / f"a{suffix}", "holds several arrays (x, y)")
        refused(tmp_path / f"a{suffix}", "has no array 'z'; it holds x, y", name="z")


def test_a_npy_is_mapped_and_not_read(tmp_path):
    assert isinstance(read_array(write(tmp_path / "a.npy", np.ones((3, 2), np.float32))), np.memmap)


# What cannot


def test_paths_that_are_no_file(tmp_path):
    refused(tmp_path / "none.npy", "none.npy does not exist")
    refused(tmp_path, "is not a file")
    (tmp_path / "folder.npy").mkdir()
    refused(tmp_path / "folder.npy", "folder.npy is not a file")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a", "a.npy.gz", "a.NPY", "a.pt"])
def test_wrong_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(content(".npy"))
    refused(tmp_path / name, "must end in one of .npy, .npz, .safetensors")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(3), ["must be [rows, d_in]", "(3,)"]),
        (np.ones((2, 2, 2, 2)), ["must be [rows, d_in]", "(2, 2, 2, 2)"]),
        (np.array(1.0), ["must be [rows, d_in]", "()"]),
        (np.ones((0, 3)), ["no rows", "(0, 3)"]),
        (np.ones((3, 0)), ["no columns", "(3, 0)"]),
        (np.ones((2, 2), np.int64), ["floating-point", "int64"]),
        (np.ones((2, 2), np.uint8), ["floating-point", "uint8"]),
        (np.ones((2, 2), bool), ["floating-point", "bool"]),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_arrays_that_cannot_be_activations(tmp_path, suffix, array, words):
    refused(write(tmp_path / f"a{suffix}", array), f"a{suffix}", *words)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_kinds_that_only_numpy_has(tmp_path, suffix):
    refused(write(tmp_path / f"c{suffix}", np.ones((2, 2), complex)), "floating-point", "complex128")
    refused(write(tmp_path / f"s{suffix}", np.array([["a"]])), "floating-point")
    refused(write(tmp_path / f"t{suffix}", np.zeros((2, 2), "datetime64[s]")), "floating-point")
    refused(write(tmp_path / f"v{suffix}", np.zeros((2, 2), [("a", "f4")])), "floating-point")


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    bomb = np.array([[Bomb(tmp_path / "ran")]], object)
    refused(write(tmp_path / "a.npy", bomb), "Python objects")
    refused(write(tmp_path / "a.npz", bomb), "pickled Python objects")
    for suffix in SUFFIXES:
        (tmp_path / f"raw{suffix}").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        refused(tmp_path / f"raw{suffix}", f"raw{suffix}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nan_and_infinity_are_counted_and_the_first_is_told(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(arrays, "ROWS_AT_A_TIME", 4)
    array = np.ones((11, 3), np.float32)
    array[6, 2], array[7, 0], array[10, 1] = np.nan, np.inf, -np.inf
    refused(write(tmp_path / f"a{suffix}", array), "3 values that are NaN or infinite", "(6, 2)")


def test_values_a_half_cannot_hold_do_not_pass(tmp_path):
    array = np.array([[np.inf, 1]], np.float16)
    refused(write(tmp_path / "a.npy", array), "1 values that are NaN or infinite", "(0, 0)")


def test_a_container_without_arrays(tmp_path):
    np.savez(tmp_path / "a.npz")
    (tmp_path / "a.safetensors").write_bytes(save({}))
    refused(tmp_path / "a.npz", "holds no arrays")
    refused(tmp_path / "a.safetensors", "holds no arrays")


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", "hello")
    refused(tmp_path / "a.npz", "a.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("other", SUFFIXES)
def test_a_file_under_anothers_suffix(tmp_path, suffix, other):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content(other))
    if suffix == other:
        assert read_array(path).shape == (4, 3)
    else:
        refused(path, path.name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_short_anywhere(tmp_path, suffix):
    whole = content(suffix)
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        (tmp_path / f"a{suffix}").write_bytes(whole[:length])
        refused(tmp_path / f"a{suffix}", f"a{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_unreadable_file(tmp_path, suffix, monkeypatch):
    # not chmod: the tests may run as root, who reads everything
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", denied)
    monkeypatch.setattr(arrays, "safe_open", denied)
    (tmp_path / f"a{suffix}").write_bytes(content(suffix))
    refused(tmp_path / f"a{suffix}", "may not be read")


def one_line(error):
    assert "\n" not in str(error)


def only_input_error(suffix, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(data)
        try:
            array = read_array(path)
        except InputError as error:
            one_line(error)
        else:
            assert array.ndim == 2
            assert np.isfinite(array).all()


MAGIC = {".npy": b"\x93NUMPY\x01\x00", ".npz": b"PK\x03\x04", ".safetensors": b"\x20\0\0\0\0\0\0\0{"}


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_are_refused_or_read(suffix, data, with_magic):
    only_input_error(suffix, MAGIC[suffix] + data if with_magic else data)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=120, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), junk=st.binary(min_size=1, max_size=4))
def test_damaged_bytes_are_refused_or_read(suffix, place, junk):
    whole = content(suffix)
    start = int(place * len(whole))
    only_input_error(suffix, whole[:start] + junk + whole[start + len(junk) :])


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4,",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 9999999999), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -3), }",
    "{'descr': '<f4', 'fortran_order': 3, 'shape': (4, 3), }",
    "{'descr': 'zz', 'fortran_order': False, 'shape': (4, 3), }",
    "{'descr': [], 'fortran_order': False, 'shape': (4, 3), }",
    "[1, 2]",
    "((((((((((",
    "",
]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_headers_that_lie(suffix, header):
    text = header.encode().ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(48)
    if suffix == ".npz":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("x.npy", data)
        data = packed.getvalue()
    only_input_error(suffix, data)
