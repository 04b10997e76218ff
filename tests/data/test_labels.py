from __future__ import annotations

import errno
import io
import json
import os
import pickle
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpn_fast.config import VOC_CLASSES
from cpn_fast.data.image_ids import Ids
from cpn_fast.data.labels import class_names, listed_in, read_labels
from cpn_fast.runtime.errors import UserError

CLASSES = ("cat", "dog", "potted plant")
REAL = Path(__file__).parents[3] / "shared" / "voc12mini" / "cls_labels.npy"


def names(labels: dict[str, np.ndarray]) -> dict[str, list[str]]:
    return {id_: [CLASSES[k] for k in np.flatnonzero(label)] for id_, label in labels.items()}


def refused(path: Path, ids: list[str] | None = None, classes: tuple[str, ...] = CLASSES) -> str:
    with pytest.raises(UserError) as caught:
        read_labels(path, ids or ["a", "b"], classes)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_labels_are_read_only_bools_of_the_ids_that_are_there(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("a,cat\nb,dog\n")
    labels = read_labels(path, ["b", "missing"], CLASSES)
    assert list(labels) == ["b"]
    assert labels["b"].dtype == bool
    assert labels["b"].tolist() == [False, True, False]
    with pytest.raises(ValueError, match="read-only"):
        labels["b"][0] = True


@pytest.mark.parametrize("name", ["labels", "labels.npy", "labels.csv"])
def test_a_missing_source_is_named(tmp_path, name):
    message = refused(tmp_path / name)
    assert "no such file or folder" in message
    assert "VOC XML" in message


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "labels.xlsx"
    path.write_text("")
    assert "found .xlsx" in refused(path)


@pytest.mark.parametrize("suffix", ["npy", "csv", "json"])
@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_labels(path, ["a"], CLASSES),
        lambda path: listed_in(path, ["a"]),
        lambda path: class_names(path, ["a"]),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch, suffix, read):
    def fail(path, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    path = tmp_path / f"labels.{suffix}"
    path.write_text("")
    for name in ("read_bytes", "read_text"):
        monkeypatch.setattr(f"cpn_fast.runtime.reading.{name}", fail)
    with pytest.raises(UserError, match=rf"labels.{suffix}: not readable"):
        read(path)


# VOC XML


def write_xml(folder: Path, id_: str, *objects: str) -> None:
    body = "\n".join(f"<object>\n<name>{name}</name>\n</object>" for name in objects)
    (folder / f"{id_}.xml").write_text(f"<annotation>\n<folder>VOC</folder>\n{body}\n</annotation>")


def test_xml_objects_count_once_and_parts_do_not(tmp_path):
    write_xml(tmp_path, "a", "cat", "cat", "potted plant")
    (tmp_path / "b.xml").write_text(
        "<annotation><object><name> dog </name><part><name>head</name></part></object>"
        "<owner><name>cat</name></owner></annotation>"
    )
    write_xml(tmp_path, "c")
    assert names(read_labels(tmp_path, ["a", "b", "c", "d"], CLASSES)) == {
        "a": ["cat", "potted plant"],
        "b": ["dog"],
        "c": [],
    }


def test_xml_names_with_escapes_and_comments_are_whole(tmp_path):
    (tmp_path / "a.xml").write_text("<annotation><object><name>salt &amp;<!-- --> pepper</name></object></annotation>")
    assert read_labels(tmp_path, ["a"], ("salt & pepper",))["a"].all()


def test_unknown_xml_names_are_reported_once_each_with_file_line_and_nearest_class(tmp_path):
    write_xml(tmp_path, "a", "dgo", "zebra")
    write_xml(tmp_path, "b", "dgo")
    message = refused(tmp_path)
    assert "2 problem(s)" in message
    assert "a.xml line 4 and 1 more: 'dgo' is not a class; did you mean dog?" in message
    assert "a.xml line 7: 'zebra' is not a class; classes are cat, dog, potted plant" in message


def test_damaged_xml_files_are_all_named(tmp_path):
    (tmp_path / "a.xml").write_text("<annotation><object>")
    (tmp_path / "b.xml").write_text("")
    message = refused(tmp_path)
    assert "a.xml: not VOC's XML" in message
    assert "b.xml: not VOC's XML" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<annotations><image><box label='cat'/></image></annotations>", "it begins with <annotations>"),
        ("<v:annotation xmlns:v='x'><v:object><v:name>cat</v:name></v:object></v:annotation>", "expected <annotation>"),
        ("<annotation>\n<object><pose/></object></annotation>", "the object in line 2 has no <name>"),
        ("<annotation><object/><object><name>cat</name></object></annotation>", "the object in line 1 has no <name>"),
    ],
)
def test_xml_of_another_form_is_no_negative(tmp_path, text, reason):
    write_xml(tmp_path, "b", "cat")
    (tmp_path / "a.xml").write_text(text)
    message = refused(tmp_path)
    assert "1 problem(s) in the labels\n  a.xml: not VOC's XML: " in message
    assert reason in message


def test_entities_are_refused(tmp_path):
    bomb = '<!DOCTYPE a [<!ENTITY x "cat"><!ENTITY y "&x;&x;">]>'
    (tmp_path / "a.xml").write_text(f"{bomb}<annotation><object><name>&y;</name></object></annotation>")
    assert "declares an entity" in refused(tmp_path)


def test_long_reports_are_cut_with_a_count(tmp_path):
    write_xml(tmp_path, "a", *(f"unknown {k}" for k in range(25)))
    message = refused(tmp_path)
    assert message.count("is not a class") == 10
    assert "and 15 more" in message


# CSV and JSON


@pytest.mark.parametrize(
    "text",
    [
        "a,cat;dog\nb,dog\n",
        "id,names\na,cat;dog\nb,dog\n",
        "a,cat,dog\nb,dog,\n",
        "a,cat\na,dog\nb,dog\n",
        "a.jpg, cat; dog\nJPEGImages/b.png,dog\n",
        "\ufeffa,cat;dog\r\n\r\nb,dog;\r\n",
        'a,"cat;dog"\nb,"dog"\nunasked,zebra\n',
        'file;tags\r\na.jpg;"cat;dog"\r\nb.jpg;dog\r\n',
        "a;cat;dog\nb;dog\n",
        "a\tcat;dog\nb\tdog\n",
    ],
)
def test_csv_forms(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert names(read_labels(path, ["a", "b"], CLASSES)) == {"a": ["cat", "dog"], "b": ["dog"]}


def test_csv_spaces_separate_only_where_no_class_name_has_one(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("a,cat dog\nb,potted plant\n")
    assert "'cat dog' is not a class" in refused(path)
    assert read_labels(path, ["a"], ("cat", "dog"))["a"].all()
    assert names(read_labels(path, ["b"], CLASSES)) == {"b": ["potted plant"]}


def test_csv_row_without_names_has_no_class(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("a\nb,\n")
    assert names(read_labels(path, ["a", "b"], CLASSES)) == {"a": [], "b": []}


def test_an_id_that_looks_like_a_file_name_is_taken_as_it_stands(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("a.jpg,cat\na,dog\n")
    assert names(read_labels(path, ["a.jpg", "a"], CLASSES)) == {"a.jpg": ["cat"], "a": ["dog"]}


def test_csv_errors_name_the_line(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("a,cat\nb,Dog\n")
    assert "line 2: 'Dog' is not a class; did you mean dog?" in refused(path)


def test_csv_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes("a,chèvre\n".encode("latin1"))
    assert "its text is not UTF-8 (byte 0xe8 at 4): save it as CSV UTF-8" in refused(path)


def test_two_names_of_one_image_in_a_csv_are_refused(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("cats/1.jpg,cat\ndogs/1.jpg,dog\n")
    assert "line 2: 'dogs/1.jpg' stands for 1, and so does 'cats/1.jpg'" in refused(path, ["1"])


@pytest.mark.parametrize("key", ["rosé", "more/rosé.jpg"])
@pytest.mark.parametrize(("of_file", "of_tag"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_accents_may_be_composed_or_not(tmp_path, key, of_file, of_tag):
    id_ = unicodedata.normalize(of_file, "rosé")
    path = tmp_path / "labels.csv"
    path.write_text(f"{unicodedata.normalize(of_tag, key)},cat\n", encoding="utf-8")
    assert names(read_labels(path, [id_], CLASSES)) == {id_: ["cat"]}


def test_endings_may_be_capitals(tmp_path):
    (tmp_path / "TAGS.CSV").write_text("a,cat\n")
    (tmp_path / "Tags.Json").write_text('{"a": ["cat"]}')
    for path in tmp_path.iterdir():
        assert names(read_labels(path, ["a"], CLASSES)) == {"a": ["cat"]}


def test_json(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"a": ["cat", "dog"], "b.jpg": [], "unasked": ["zebra"]}))
    assert names(read_labels(path, ["a", "b"], CLASSES)) == {"a": ["cat", "dog"], "b": []}


@pytest.mark.parametrize(
    "table",
    [
        "filename,label,split\na.jpg,cat,train\nb.jpg,dog,val\n",
        "image,class,truncated,difficult\na,cat,0,1\nb,dog,1,0\n",
        "filename,width,height,class,xmin\na.jpg,8,8,cat,1\na.jpg,8,8,cat,0\nb.jpg,8,8,dog,1\n",
        "Image;Note;Image Tags;;Tag 3\na;blurred;cat;;\nb;;;dog;dog\n",
        "image,tags\na,cat,cat\nb,dog\n",
        "image,tags,split\nnegative,,train\na,cat,train\nb,dog,val\n",
    ],
)
def test_columns_that_the_header_calls_tags_count_alone(tmp_path, table):
    path = tmp_path / "labels.csv"
    path.write_text(table)
    assert not any(label.any() for label in read_labels(path, ["negative"], CLASSES).values())
    assert class_names(path, ["a", "b"]) == ["cat", "dog"]
    assert names(read_labels(path, ["a", "b"], CLASSES)) == {"a": ["cat"], "b": ["dog"]}
    assert names(read_labels(path, ["b"], CLASSES)) == {"b": ["dog"]}  # the row of another image is no header


@pytest.mark.parametrize(
    "table",
    [
        "label,filename\ncat,1.jpg\ndog,photos/0.jpg\n",
        ",filename,label\n0,1.jpg,cat\n1,0.jpg,dog\n",  # as pandas writes it; its index is no image
        "cat,1.jpg\ndog,0.jpg\n",
    ],
)
def test_the_files_of_images_need_not_be_in_the_first_column(tmp_path, table):
    path = tmp_path / "labels.csv"
    path.write_text(table)
    assert class_names(path, ["0", "1"]) == ["cat", "dog"]
    assert names(read_labels(path, ["0", "1"], CLASSES)) == {"1": ["cat"], "0": ["dog"]}
    assert {Path(name).stem for name in listed_in(path, ["0", "1"])} == {"0", "1"}


def test_a_column_of_other_files_is_not_that_of_the_images(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("id,mask,label\n0,masks/0.png,cat\n1,masks/1.png,dog\n")
    assert names(read_labels(path, ["0", "1"], CLASSES)) == {"0": ["cat"], "1": ["dog"]}


def test_a_row_with_more_cells_than_the_header_loses_no_tag(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("image,tags,split\na,cat,dog,train\n")
    assert "line 2: expected 3 cells, as in the header, found 4" in refused(path)


def test_classes_may_be_called_like_columns_of_tags(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("image,label,tag\na,1,0\nb,0,1\n")
    assert class_names(path, ["a", "b"]) == ["label", "tag"]
    assert read_labels(path, ["a"], ("label", "tag"))["a"].tolist() == [True, False]


def test_spaces_around_a_name_in_json_do_not_make_another_class(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"a": ["cat ", "\\tdog"], "b": ["cat"]}')
    assert class_names(path, ["a", "b"]) == ["cat", "dog"]
    assert names(read_labels(path, ["a", "b"], CLASSES)) == {"a": ["cat", "dog"], "b": ["cat"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1]", "found a list"),
        ('{"a": "cat", "b": [1]}', 'a: expected a list of class names, found "cat"'),
        ('{"a": "cat", "b": [1]}', "2 problem(s)"),
        ('{"a": ["cta"]}', "a: 'cta' is not a class; did you mean cat?"),
        ('{"a": [], "a": ["cat"]}', "the key a occurs twice"),
        ('{"a": ["dog"], "x/a.jpg": ["cat"]}', "x/a.jpg: a has tags already"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_json_errors(tmp_path, text, expected):
    path = tmp_path / "labels.json"
    path.write_text(text)
    assert expected in refused(path)


IDS = st.text("abcdefgh_0123456789", min_size=1, max_size=30)


@given(st.dictionaries(IDS, st.sets(st.sampled_from(CLASSES)), min_size=1))
def test_csv_json_and_npy_agree(tmp_path_factory, tags):
    folder = tmp_path_factory.mktemp("labels")
    (folder / "l.csv").write_text("".join(f"{id_},{';'.join(sorted(tag))}\n" for id_, tag in tags.items()))
    (folder / "l.json").write_text(json.dumps({id_: sorted(tag) for id_, tag in tags.items()}))
    arrays = {id_: np.array([name in tag for name in CLASSES], np.float32) for id_, tag in tags.items()}
    np.save(folder / "l.npy", np.array(arrays), allow_pickle=True)
    for name in ("l.csv", "l.json", "l.npy"):
        assert {id_: set(tag) for id_, tag in names(read_labels(folder / name, list(tags), CLASSES)).items()} == tags


# psa's cls_labels.npy


def save(path: Path, content: object, protocol: int = 4) -> Path:
    """Save as np.save does, in any pickle protocol."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    path.write_bytes(file.getvalue() + pickle.dumps(content, protocol=protocol))
    return path


def boxed(content: object) -> np.ndarray:
    array = np.empty((), object)
    array[()] = content
    return array


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "i8", "u1", "?"])
def test_npy_of_numpy_1_and_2(tmp_path, protocol, module, dtype):
    path = save(tmp_path / "l.npy", boxed({"a": np.array([1, 0, 1], dtype), "b": np.zeros(3, dtype)}), protocol)
    raw = path.read_bytes()
    here = b"numpy._core.multiarray" if b"numpy._core.multiarray" in raw else b"numpy.core.multiarray"
    if protocol == 4:  # names and the frame around them carry their lengths
        raw = pickle_unframed(raw).replace(b"\x8c" + bytes([len(here)]) + here, b"\x8c" + bytes([len(module)]) + module)
    else:
        raw = raw.replace(here, module)
    assert module in raw
    path.write_bytes(raw)
    assert names(read_labels(path, ["a", "b"], CLASSES)) == {"a": ["cat", "potted plant"], "b": []}


def test_npy_with_two_names_of_an_image_is_refused(tmp_path):
    path = save(tmp_path / "l.npy", boxed({"2007_01": np.zeros(3), 200701: np.ones(3)}), 4)
    assert "200701: 2007_01 has labels already" in refused(path, ["2007_01"])


def pickle_unframed(raw: bytes) -> bytes:
    start = raw.index(b"\x80\x04\x95")
    return raw[: start + 2] + raw[start + 11 :]


@pytest.mark.skipif(not REAL.exists(), reason="the label file that psa, SEAM and CPN share is not here")
def test_the_real_label_file():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.load(REAL, allow_pickle=True).item()
    labels = read_labels(REAL, list(expected), VOC_CLASSES)
    assert len(labels) == len(expected) == 12_031
    assert all((labels[id_] == (value == 1)).all() for id_, value in expected.items())


class Runs:
    """An object whose pickle is a call that creates a file."""

    def __init__(self, path: Path, call: object = os.mkdir) -> None:
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["whole", "in the array", "value", "key"])
def test_a_hostile_pickle_does_not_run(tmp_path, where, protocol):
    evil = Runs(tmp_path / "ran")
    content = {
        "whole": evil,
        "in the array": boxed(evil),
        "value": boxed({"a": evil}),
        "key": boxed({evil: np.ones(3, np.float32)}),
    }[where]
    path = save(tmp_path / "l.npy", content, protocol)
    assert "which a label file does not need" in refused(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["load", "fromfile", "memmap", "lib.format.open_memmap"])
def test_other_functions_of_numpy_are_refused(tmp_path, name):
    call = np
    for part in name.split("."):
        call = getattr(call, part)
    assert "does not need" in refused(save(tmp_path / "l.npy", boxed({"a": Runs(tmp_path / "x", call)})))


def test_a_huge_array_is_refused_without_reserving_memory(tmp_path):
    content = boxed({"a": np.zeros(3, np.float32)})
    raw = pickle.dumps(content, protocol=2)
    huge = raw.replace(b"K\x03\x85", b"\x8a\x05\x00\x00\x00\x00\x10\x85")  # (3,) becomes (2**36,)
    assert huge != raw
    path = save(tmp_path / "l.npy", content, 2)
    path.write_bytes(path.read_bytes().replace(raw, huge))
    assert "cannot reshape" in refused(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cpn_fast.data.cls_labels.MAX_PICKLE", 2**20)
    path = save(tmp_path / "l.npy", boxed({"a": np.zeros(2**19, np.float32)}))
    assert "cpn-fast reads at most 1,048,576 of a file of this kind" in refused(path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.zeros(20, np.float32), "a: expected an array of 3 numbers, one per class, found float32(20,)"),
        (np.zeros((1, 3), np.float32), "found float32(1, 3)"),
        (np.array([0, 0.5, 1]), "expected only 0 and 1, found 0.5"),
        (np.array([0, np.nan, 1]), "expected only 0 and 1, found nan"),
        ("cat", "found a str"),
        (np.array(["1", "0", "0"]), "found <U1(3,)"),
    ],
)
def test_npy_values_that_are_no_labels(tmp_path, value, expected):
    assert expected in refused(save(tmp_path / "l.npy", boxed({"a": value})))


def test_npy_files_that_are_no_label_files(tmp_path):
    np.save(tmp_path / "l.npy", np.zeros(4))
    assert "it holds float64 numbers" in refused(tmp_path / "l.npy")
    assert "it holds a list" in refused(save(tmp_path / "l.npy", boxed([1])))
    whole = save(tmp_path / "l.npy", boxed({"a": np.ones(3, np.float32)})).read_bytes()
    for end in range(0, len(whole) - 1, 7):
        (tmp_path / "l.npy").write_bytes(whole[:end])
        assert "not a pickled dict" in refused(tmp_path / "l.npy")


# Tables, cells and keys as other programs write them


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,cat,dog\na.jpg,1,0\nb.jpg,0,1\n", {"a": ["cat"], "b": ["dog"]}),
        ("id;dog;size;cat\na;1.0;33;0.0\nb;;44;1\n", {"a": ["dog"], "b": ["cat"]}),
        ("file\tcat\tdog\na\tTrue\tFalse\nb\tFalse\tFalse\n", {"a": ["cat"], "b": []}),
        ("image,cat\na,1\nb,0\n", {"a": ["cat"], "b": []}),
        ("c.jpg,cat\na,cat\nb,dog\n", {"a": ["cat"], "b": ["dog"]}),
        ('a,"cat, dog"\nb,"potted plant, cat"\n', {"a": ["cat", "dog"], "b": ["cat", "potted plant"]}),
        ("a\nb,\n", {"a": [], "b": []}),
        ("image,tags\na,\"['cat', 'potted plant']\"\nb,['dog']\n", {"a": ["cat", "potted plant"], "b": ["dog"]}),
        ('a,"[""cat"", ""dog""]"\nb,[]\n', {"a": ["cat", "dog"], "b": []}),
        ("C:\\photos\\a.jpg,cat\nphotos/b.JPG,dog\n", {"a": ["cat"], "b": ["dog"]}),
    ],
)
def test_csv_as_other_programs_write_it(tmp_path, text, expected):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    assert names(read_labels(path, ["a", "b"], CLASSES)) == expected


def test_a_table_names_the_cell_and_the_column_that_are_wrong(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("image,cat,dog\na,1,0\nb,0,2\n")
    assert "line 3: expected 0 or 1 in column dog, which the header names, found '2'" in refused(path)
    path.write_text("image,cat,dgo\na,1,0\nb,0,1\n")
    assert "line 3: 'dgo' is not a class; did you mean dog?" in refused(path)


def test_whole_numbers_stand_for_ids_by_their_digits_where_only_one_has_them(tmp_path):
    path = tmp_path / "labels.npy"
    np.save(path, {2007000032: np.array([1, 0, 0]), 7: np.array([0, 1, 0])}, allow_pickle=True)
    found = read_labels(path, ["2007_000032", "a7", "b7"], CLASSES)
    assert names(found) == {"2007_000032": ["cat"]}


@pytest.mark.parametrize("protocol", [2, 4])
def test_keys_that_are_scalars_of_numpy_are_read(tmp_path, protocol):
    labels = {np.int32(2007000032): np.array([1, 0, 0]), np.str_("cats/ü"): np.array([0, 1, 0])}  # the first as irn's
    path = save(tmp_path / "l.npy", boxed(labels), protocol)
    found = names(read_labels(path, ["2007_000032", "cats/ü"], CLASSES))
    assert found == {"2007_000032": ["cat"], "cats/ü": ["dog"]}
    assert listed_in(path, ["2007_000032"]) == ["2007_000032", "cats/ü"]


@given(
    st.lists(st.text("ab/", min_size=1, max_size=5), max_size=4, unique=True), st.text("ab/", min_size=1, max_size=6)
)
def test_a_name_finds_only_ids_that_are_its_end_or_end_with_it(ids: list[str], name: str) -> None:
    found = Ids(ids)(name)
    assert found is None or f"/{name}".endswith(f"/{found}") or f"/{found}".endswith(f"/{name}")
    if name in ids:
        assert found == name


def test_a_photo_of_another_folder_gives_no_tags(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("cats/1,cat\ndogs/1,dog\n")
    assert names(read_labels(path, ["cats/1"], CLASSES)) == {"cats/1": ["cat"]}
    assert names(read_labels(path, ["photos/dogs/1"], CLASSES)) == {"photos/dogs/1": ["dog"]}


TABLES = {
    "Excel's separator": "sep=;\nname;dog;cat\na.jpg;1;0\nb.jpg;0;1\n",
    "Excel's comma, quoted": '"sep=,"\r\nname,dog,cat\r\na.jpg,1,0\r\nb.jpg,0,1\r\n',
    "Excel's bar": "sep=|\nname|dog|cat\na|1|0\nb|0|1\n",
    "title": "My photos,,\nname,dog,cat\na.jpg,1,0\nb.jpg,0,1\n",
    "empty row": ",,\nname,dog,cat\na.jpg,1,0\nb.jpg,0,1\n",
    "two headers": ",pets,pets\nname,dog,cat\na,1,0\nb,0,1\n",
    "other photos first": "name,dog,cat\nz,0,1\ny,1,0\na,1,0\nb,0,1\n",
    "x": "name,dog,cat\na,x,\nb,,X\n",
    "x and a remark": "name,dog,cat,remark\na,x,,a nice one\nb,,x,\n",
    "0 and 1, and an x beside them": "name,dog,cat,checked\na,1,0,x\nb,0,1,\n",
    "German": "name;dog;cat\na;WAHR;FALSCH\nb;FALSCH;WAHR\n",
    "crosses": "name,dog,cat\na,✓,✗\nb,✗,✓\n",
    "boxes": "name,dog,cat\na,☑,☐\nb,☐,☑\n",
    "letters": "name,dog,cat\na,Y,N\nb,N,Y\n",
    "yes and nothing": "name,dog,cat\na,ja,\nb,nein,ja\n",
    "remark of two lines": 'name,dog,cat,remark\na,1,0,"one\ntwo"\nb,0,1,\n',
}


@pytest.mark.parametrize("form", TABLES)
def test_tables_of_ticks_as_people_make_them(tmp_path, form):
    path = tmp_path / "labels.csv"
    path.write_text(TABLES[form], encoding="utf-8", newline="")
    assert class_names(path, ["a", "b"]) == ["dog", "cat"]
    for ids in (["a", "b"], ["b"]):
        assert names(read_labels(path, ids, CLASSES)) == {id_: {"a": ["dog"], "b": ["cat"]}[id_] for id_ in ids}


def test_excel_s_separator_is_no_image(tmp_path):
    (tmp_path / "list.csv").write_text("sep=;\nname;tags\na.jpg;cat\nb;dog\n")
    assert listed_in(tmp_path / "list.csv", ["a", "b"]) == ["a.jpg", "b"]


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("name,tags\na,x\nb,dog;x\n", ["dog", "x"]),
        ("name,first,second\na,x,y\nb,y,\n", ["x", "y"]),
        ("name,first,second\na,dog,x\nb,cat,\n", ["cat", "dog", "x"]),
        ("z,dog,x\na,x,\nb,dog,x\n", ["dog", "x"]),  # the first photo is no longer there
        ("name,dog\na,Y\nb,N\n", ["dog"]),
        ("name,dog,cat\na,x,\nb,,\n", ["dog"]),
    ],
)
def test_a_word_is_a_class_where_it_is_no_tick(tmp_path, text, classes):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    assert class_names(path, ["a", "b"]) == classes
    assert any(label.any() for label in read_labels(path, ["a", "b"], classes).values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,1,0\nb.jpg,0,1\n", "0, 1 would be classes"),
        ("z,1,0\na,1,0\nb,0,1\n", "0, 1 would be classes"),
        ("name,dog,cat\na,0.9,0.1\nb,.2,80%\n", ".2, 0.1, 0.9, 80% would be classes"),
        ("name;dog;cat\na;0,9;0,1\n", "0, 1, 9 would be classes"),
        ("name,tag\na,7\nb,3\n", "3, 7 would be classes"),
        ("a,TRUE,FALSE\nb,FALSE,TRUE\n", "FALSE, TRUE would be classes"),
        ("name,dog,cat\na,x,n\nb,ja,\n", "ja, n, x would be classes"),
        ("name,dog,cat,cow\na,1,0,0\nb,2,1,1\nc,0,1,1\n", "line 3: expected 0 or 1 in column dog, as in most of its"),
        ('name,"dog\n(big)",cat\na,1,0\nb,0,1\n', "line 1: expected a name, found a line break in 'dog"),
    ],
)
def test_ticks_and_numbers_are_no_classes(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        class_names(path, ["a", "b", "c"])
    assert f"{path}" in str(caught.value)
    assert message in str(caught.value)


def test_scores_are_refused_where_the_classes_are_known(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("name,dog,cat\na,0.9,0.1\n")
    assert "line 2: expected 0 or 1 in column dog, which the header names, found '0.9'" in refused(path)


@pytest.mark.parametrize("bare", ["a", "a.jpg", "a;", "a;;"])
@pytest.mark.parametrize("first", [True, False])
def test_the_separator_is_that_of_most_rows(tmp_path, bare, first):
    path = tmp_path / "labels.csv"
    rows = ["b;dog;cat", "c;dog"]
    path.write_text("\n".join([bare, *rows] if first else [*rows, bare]))
    assert class_names(path, ["a", "b", "c"]) == ["cat", "dog"]
    assert names(read_labels(path, ["a", "b", "c"], CLASSES)) == {"a": [], "b": ["cat", "dog"], "c": ["dog"]}


def test_a_row_with_another_separator_is_said(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("a;dog\nb;cat\n\nc.jpg,dog\n")
    assert "line 4: found ',' after c.jpg, expected ';' as in other rows" in refused(path, ["a", "b", "c"])


@pytest.mark.parametrize(
    "text",
    [
        'a,dog\nb.jpg,"dog\nc,cat\nd,cat\n',
        'a,dog\nb.jpg,"dog\nc,"cat"\nd,cat\n',
        'a,dog\n"b.jpg,dog\n"c","cat"\nd,cat\n',
        'a;dog\nb.jpg;"dog\nc\nd\n',
        'a,dog\nb,dog,"nice\nc,cat\nd,cat\n',
        'a,dog\nb,"dog\ncat"\nc,cat\n',
    ],
)
def test_an_open_quote_is_said_with_its_row(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    message = refused(path, ["a", "b", "c", "d"])
    assert "line 2: expected a name, found a line break in " in message
    assert 'A quote (") is probably open' in message
