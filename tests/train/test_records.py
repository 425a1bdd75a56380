import re

import pytest

from jaxpeft.data._records import read_records
from jaxpeft.train import UserError


def write(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_jsonl_records_know_their_lines(tmp_path):
    file = write(tmp_path, "a.jsonl", '\ufeff{"text": "one"}\n\n  \n{"text": "zwölf"}')
    assert [(r.fields, r.line) for r in read_records(file)] == [
        ({"text": "one"}, 1),
        ({"text": "zwölf"}, 4),
    ]


def test_csv_records_know_their_lines_and_keep_quoted_line_breaks(tmp_path):
    file = write(tmp_path, "a.csv", '\ufeffmr,ref\r\nname[x],"a\nb, c"\r\n\r\n1,2\r\n')
    assert [(r.fields, r.line) for r in read_records(file)] == [
        ({"mr": "name[x]", "ref": "a\nb, c"}, 3),
        ({"mr": "1", "ref": "2"}, 5),
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "line 2: not JSON: Expecting value, at column 7."),
        ("a.jsonl", '{"a": 1}\n{"a": 1', "line 2: not JSON: Expecting ',' delimiter, at column 8."),
        ("a.jsonl", '{"a": 1}\n\n[1, 2]\n', "line 3: a JSON object .* got list."),
        ("a.jsonl", b'{"a": "\xff"}\n', "line 1: not UTF-8 text, at byte 7 of the line."),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3: 3 columns, but the header has 2."),
        ("a.csv", "a,b\n1\n", "line 2: 1 columns, but the header has 2."),
        ("a.csv", 'a,b\n1,"2" 3\n', "line 2: not CSV: ',' expected after '\"'."),
        ("a.csv", b"a,b\n1,\xff\n", "line 2: not UTF-8 text, at byte 2 of the line."),
        ("a.txt", "x", "is neither .jsonl nor .csv"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, name, content, problem):
    file = write(tmp_path, name, content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}.*{problem}"):
        list(read_records(file))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"cannot read {tmp_path}/no.jsonl: No such file"):
        list(read_records(tmp_path / "no.jsonl"))


def test_fields_that_hold_no_text_are_named_with_file_and_line(tmp_path):
    file = write(tmp_path, "a.jsonl", '{"n": 3, "empty": " ", "text": "x"}\n')
    (record,) = read_records(file)
    assert record.text("text") == "x"
    place = re.escape(f"{file}, line 1: ")
    with pytest.raises(UserError, match=place + "field 'n' is int, not text."):
        record.text("n")
    with pytest.raises(UserError, match=place + "field 'empty' is empty."):
        record.text("empty")
    with pytest.raises(
        UserError, match=place + "no field 'prompt'. The fields there are: 'n', 'empty', 'text'."
    ):
        record.text("prompt")
