import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_jax.models.tensors import CHUNK, DTYPES, TensorFile, TensorFiles, write_file


def numbers(shape, dtype="float32", seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(DTYPES[dtype])


def save(folder, tensors, file="model.safetensors", *, index=None):
    """A file as the safetensors package writes it, and an index where one is given."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / file)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder / file


def written(path, tensors, order=None):
    """The same by write_file; the tensors come in any order."""
    described = {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
    write_file(path, described, ((name, tensors[name]) for name in order or tensors))


# What is read


@st.composite
def parts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    index = []
    for size in shape:
        start = draw(st.integers(0, size))
        index.append(slice(start, draw(st.integers(start, size))))
    return shape, tuple(index), draw(st.sampled_from(sorted(DTYPES))), draw(st.none() | st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(parts())
def test_any_part_of_a_tensor_is_numpys_and_no_other_byte_is_read(tmp_path_factory, case):
    shape, index, dtype, rows = case
    tensors = {"a": numbers((3, 2)), "b": np.asarray(numbers(shape, dtype, seed=1)), "c": numbers(5, "float16")}
    file = TensorFile(save(tmp_path_factory.mktemp("part"), tensors))
    assert (file.names(), file.shape("b"), file.dtype("b")) == ({"a", "b", "c"}, shape, dtype)
    found = file.read("b", index)
    assert found.dtype == tensors["b"].dtype and found.tobytes() == tensors["b"][index].tobytes()
    assert file.bytes_read == found.nbytes
    pieces = list(file.blocks("b", index, rows=rows))
    again = np.zeros(shape, found.dtype)
    for piece, block in pieces:
        assert rows is None or not shape or len(block) <= rows
        again[piece] = block
    assert again[index].tobytes() == found.tobytes() and file.bytes_read == 2 * found.nbytes
    assert file.read("b").tobytes() == tensors["b"].tobytes()


def test_bytes_are_asked_of_the_kernel_for_the_part_alone(tmp_path, monkeypatch):
    file = TensorFile(save(tmp_path, {"a": numbers((64, 32)), "b": numbers((10, 10))}))
    asked, preadv = [], os.preadv

    def short(descriptor, buffers, offset):
        asked.append((offset, len(buffers[0])))
        return preadv(descriptor, [buffers[0][:7]], offset)  # as kernels may: less than was asked for

    monkeypatch.setattr(os, "preadv", short)
    part = file.read("a", (slice(8, 16), slice(4, 8)))
    assert part.tobytes() == safetensors.numpy.load_file(file.path)["a"][8:16, 4:8].tobytes()
    assert sum(min(length, 7) for _, length in asked) == part.nbytes == 8 * 4 * 4
    assert len({offset // (4 * 32) for offset, _ in asked}) <= 9  # 8 rows, which need not begin at a multiple


def test_memory_is_the_parts_whatever_the_tensors_size(tmp_path):
    path = save(tmp_path, {"a": numbers((2048, 2048))})
    tracemalloc.start()
    file = TensorFile(path)
    file.read("a", (slice(None), slice(0, 64)))
    for _, block in file.blocks("a", rows=64):
        del block
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 2048 * 64 * 4  # the part, and what looking for NaN takes; the tensor has 16 MiB


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named_with_file_and_tensor_where_they_are_read(tmp_path, dtype, value):
    tensor = numbers((3, 5), dtype)
    tensor[1, 4] = value
    largest = np.full(4, ml_dtypes.finfo(DTYPES[dtype]).max)
    path = save(tmp_path, {"whole.weight": largest, "some.weight": tensor})
    file = TensorFile(path)
    with pytest.raises(ValueError, match=rf"^some.weight in '{path}' holds NaN or infinity; fetch the file again"):
        file.read("some.weight")
    assert file.read("some.weight", (slice(None), slice(0, 4))).shape == (3, 4)
    assert file.read("some.weight", (slice(2, 3), slice(None))).shape == (1, 5)
    assert (file.read("whole.weight") == largest).all()


@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 4])
def test_nan_is_found_anywhere_in_a_large_tensor(tmp_path, place):
    tensor = np.zeros(2 * CHUNK + 5, ml_dtypes.bfloat16)
    tensor[place] = np.nan
    with pytest.raises(ValueError, match=r"a in .* holds NaN"):
        TensorFile(save(tmp_path, {"a": tensor})).read("a")


# What is not whole


def test_a_file_cut_anywhere_is_named_with_the_first_tensor_that_is_not_whole(tmp_path):
    tensors = {"b.weight": numbers(3), "a.weight": numbers((2, 2)), "c.weight": numbers(5, "float16")}
    path = save(tmp_path, tensors)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # float32 stands before float16 and names are sorted: a.weight ends after 16 bytes, b.weight after 28.
    firsts = {0: "a.weight", 15: "a.weight", 16: "b.weight", 27: "b.weight", 28: "c.weight", 37: "c.weight"}
    for kept, name in firsts.items():
        path.write_bytes(whole[: header + kept])
        with pytest.raises(ValueError) as error:
            TensorFile(path)
        assert str(error.value) == (
            f"'{path}' is not a whole safetensors file (it ends within {name}: it has {header + kept} bytes, "
            f"its header says {len(whole)}); fetch it again"
        )
    for kept in (8, header - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"'{path}' .*it ends within its header of {header - 8} bytes"):
            TensorFile(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=rf"'{path}' .*it has {len(whole) + 1} bytes, its header says {len(whole)}"):
        TensorFile(path)


def with_header(header) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it has no header"),
        (b"<html><body>Not found", "it has no header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (with_header(b"{,}"), "its header cannot be read"),
        (with_header([1, 2]), "its header cannot be read"),
        (with_header({"a": {"dtype": "F32"}}), "its header cannot be read"),
        (with_header({"a": entry(shape=(-2,))}), "its header cannot be read"),
        (with_header({"a": entry(shape=(3,))}) + bytes(8), "gives a bytes 0 to 8, which do not fit"),
        (with_header({"a": entry(offsets=(4, 12))}) + bytes(12), "gives a bytes 4 to 12, which do not fit"),
        (with_header({"a": entry(), "b": entry()}) + bytes(8), "gives b bytes 0 to 8, which do not fit"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"'{path}' is not a whole safetensors file \(.*{reason}.*\); fetch it again"):
        TensorFile(path)


@pytest.mark.parametrize("dtype, name", [(np.int8, "I8"), (np.uint8, "U8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")])
def test_quantised_weights_are_refused_by_tensor(tmp_path, dtype, name):
    path = save(tmp_path, {"a.weight": np.zeros(4, np.float32), "b.weight": np.zeros(4, dtype)})
    with pytest.raises(
        ValueError,
        match=rf"b.weight in '{path}' is {name}; supported: F32, F16, BF16. Quantised weights are not supported",
    ):
        TensorFile(path)


def test_a_file_cut_after_it_was_opened_is_named(tmp_path):
    path = save(tmp_path, {"a": numbers((8, 8))})
    file = TensorFile(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ValueError, match=rf"'{path}' ends within a; it was cut while it was read"):
        file.read("a")


# Folders


def test_a_folder_of_several_files_is_read_as_one(tmp_path):
    one, two = {"a": numbers(3), "b": numbers((2, 4))}, {"c": numbers(5, "bfloat16")}
    save(tmp_path, one, "x-1.safetensors")
    save(
        tmp_path, two, "x-2.safetensors", index={"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}
    )
    files = TensorFiles(tmp_path)
    assert files.names() == {"a", "b", "c"}
    for name, tensor in (one | two).items():
        assert (files.shape(name), files.dtype(name)) == (tensor.shape, tensor.dtype.name)
        assert files.read(name).tobytes() == tensor.tobytes()
    assert files.read("b", (slice(1, 2), slice(0, 2))).tobytes() == one["b"][1:, :2].tobytes()
    assert files.bytes_read == sum(tensor.nbytes for tensor in (one | two).values()) + 8
    assert files.file_of("c").path == tmp_path / "x-2.safetensors"


def test_a_missing_file_is_named_with_what_it_holds(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"'{tmp_path}' has no model.safetensors; the weights must be safetensors"
    ):
        TensorFiles(tmp_path)
    places = {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"}
    save(tmp_path, {"a": numbers(3)}, "x-1.safetensors", index=places)
    with pytest.raises(
        FileNotFoundError, match=rf"'{tmp_path}' has no x-2.safetensors, which holds b and 1 more tensors; .* all files"
    ):
        TensorFiles(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    places = {"a": "x-1.safetensors", "gone": "x-1.safetensors"}
    path = save(tmp_path, {"a": numbers(3)}, "x-1.safetensors", index=places)
    with pytest.raises(ValueError, match=rf"'{path}' has no gone, which model.safetensors.index.json says it holds"):
        TensorFiles(tmp_path)
    save(tmp_path, {"a": numbers(3), "twice": numbers(2)}, "x-1.safetensors")
    save(tmp_path, {"b": numbers(3), "twice": numbers(2)}, "x-2.safetensors",
         index={"a": "x-1.safetensors", "b": "x-2.safetensors"})  # fmt: skip
    with pytest.raises(ValueError, match=r"twice is in '.*x-1.safetensors' and in '.*x-2.safetensors'; keep one"):
        TensorFiles(tmp_path)
    for text in ("version https://git-lfs.github.com/spec/v1", "{}", "[]", '{"weight_map": {"a": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"index.json' is not a safetensors index with a weight_map; fetch it again"
        ):
            TensorFiles(tmp_path)


def test_of_a_tensor_in_two_files_the_index_says_which(tmp_path):
    for number in (1, 2):
        save(tmp_path, {"twice": np.full(2, number, np.float32), f"t{number}": numbers(3)}, f"x-{number}.safetensors")
    for number in (1, 2):
        places = {"t1": "x-1.safetensors", "t2": "x-2.safetensors", "twice": f"x-{number}.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        assert (TensorFiles(tmp_path).read("twice") == number).all()


def test_of_one_file_and_an_index_the_one_file_counts_as_in_transformers(tmp_path):
    save(tmp_path, {"a": numbers(3)}, index={"a": "gone.safetensors"})
    assert TensorFiles(tmp_path).names() == {"a"}


# What is written


@pytest.mark.parametrize("order", [None, ["c", "a", "d", "b"]])
def test_a_written_file_is_read_by_the_safetensors_package(tmp_path, order):
    tensors = {"a": numbers((3, 5), "bfloat16"), "b": numbers((2, 3)), "c": numbers(7, "float16"), "d": numbers(1)}
    tensors["a"] = np.asfortranarray(tensors["a"])
    path = tmp_path / "model.safetensors"
    written(path, tensors, order)
    found = safetensors.numpy.load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].tobytes() == tensor.tobytes()
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert path.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_tensor_stands_where_its_numbers_are_aligned(tmp_path):
    tensors = {"a": numbers(3, "bfloat16"), "b": numbers(5), "c": numbers(1, "float16"), "d": numbers(2)}
    written(tmp_path / "a.safetensors", tensors)
    text = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(text[:8], "little")
    header = json.loads(text[8:start])
    assert start % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())


def test_one_tensor_at_a_time_is_held(tmp_path):
    shape, n = (4, CHUNK), 3
    described = {f"t{i}": ("float32", shape) for i in range(n)}

    def parts():
        for name in described:
            tensor = np.ones(shape, np.float32)
            yield name, tensor
            del tensor

    tracemalloc.start()
    write_file(tmp_path / "a.safetensors", described, parts())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 4 * CHUNK * 4  # one, and what looking for NaN in a quarter of it takes


def interrupted(tensors):
    yield "a", tensors["a"]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "parts, error",
    [
        (interrupted, KeyboardInterrupt),
        (lambda tensors: iter([("a", tensors["a"])]), "b never came"),
        (lambda tensors: iter([("a", tensors["a"].astype(np.float16))]), r"a is float16 \(3,\); .* room for float32"),
        (lambda tensors: iter([("a", tensors["a"][:2])]), r"a is float32 \(2,\); .* room for float32 \(3,\)"),
        (lambda tensors: iter([("b", tensors["b"] * np.inf)]), "b has NaN or infinity as float32; .* was not written"),
    ],
)
def test_a_file_is_written_whole_or_not_at_all(tmp_path, parts, error):
    tensors = {"a": numbers(3), "b": numbers(2)}
    described = {name: ("float32", tensor.shape) for name, tensor in tensors.items()}
    kind, match = (error, None) if isinstance(error, type) else (ValueError, error)
    with pytest.raises(kind, match=match):
        write_file(tmp_path / "model.safetensors", described, parts(tensors))
    assert not list(tmp_path.iterdir())
