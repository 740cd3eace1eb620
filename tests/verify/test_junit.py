"""Parity as JUnit XML."""

import xml.etree.ElementTree as ElementTree

import pytest
from test_judge import site_with
from tiny_engines import comparison, record_of, stored_case

from tokred_export.verify.judge import FLOAT32, judge_parity
from tokred_export.verify.junit import junit_xml, write_junit

GOOD = stored_case(sites=(site_with(0.5),))
RECORDS = {
    "good": record_of(GOOD, GOOD),
    "empty": record_of(),
    "off": record_of(GOOD, stored_case(comparison("logits", 1.0))),
    "nan": record_of(stored_case(comparison("logits", nonfinite=2))),
    "flip": record_of(stored_case(sites=(site_with(0.5, None, 9.0),))),
    "missing": record_of(stored_case(tensors=())),
    "malformed": record_of(stored_case(tensors=(), problems={"choice.src.0": "is missing"})),
}


def parse(record):
    """The document's root, as any reader sees it."""
    return ElementTree.fromstring(junit_xml(record, FLOAT32))


@pytest.mark.parametrize("name", RECORDS)
def test_it_fails_where_the_verdict_does(name):
    """As many failures as the verdict has reasons, with the same words."""
    record = RECORDS[name]
    verdict = judge_parity(record, FLOAT32)
    messages = [node.get("message") for node in parse(record).iter("failure")]
    assert len(messages) == len(verdict.reasons)
    assert (verdict.outcome == "FAIL") == bool(messages)
    for message, reason in zip(messages, verdict.reasons, strict=True):
        assert reason.endswith(message)


@pytest.mark.parametrize("name", RECORDS)
def test_counts_are_those_of_the_tests(name):
    """tests and failures of suites and document are what is in them; nothing passes empty."""
    root = parse(RECORDS[name])
    for node in (root, *root):
        tests = list(node.iter("testcase"))
        failed = [test for test in tests if test.find("failure") is not None]
        assert (int(node.get("tests")), int(node.get("failures"))) == (len(tests), len(failed))
        assert len(tests) > 0


def test_one_test_a_tensor_and_a_site():
    """Cases with the same description stay apart."""
    root = parse(RECORDS["good"])
    assert [suite.get("name") for suite in root] == ["prefill-37: by hand"] * 2
    names = [test.get("name") for test in root[0]]
    assert names == [*(t.name for t in GOOD.tensors), "choices of site 1"]
    assert root[0][0].get("classname") == "onnxruntime.prefill-37: by hand"


def test_any_text_can_be_quoted():
    """Markup is escaped, and what XML cannot hold is replaced."""
    odd = 'a <b> & "c" \x00\x1b é \ud800'
    root = parse(record_of(stored_case(description=odd)))
    assert root[0].get("name") == 'prefill-37: a <b> & "c" \ufffd\ufffd é \ufffd'


def test_written_to_a_file(tmp_path):
    """The file is the document, declared as UTF-8."""
    path = tmp_path / "parity.xml"
    write_junit(path, RECORDS["off"], FLOAT32)
    assert path.read_bytes() == junit_xml(RECORDS["off"], FLOAT32)
    assert path.read_bytes().startswith(b"<?xml version='1.0' encoding='utf-8'?>")
