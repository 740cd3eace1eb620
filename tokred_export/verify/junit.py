"""A parity record as JUnit XML, which every CI system can show."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokred_export.disk import write_atomic
from tokred_export.verify.judge import Tolerance, judge_flip, judge_tensor, missing_tensors
from tokred_export.verify.margins import unexplained
from tokred_export.verify.records import ParityCase, ParityRecord

# What XML 1.0 cannot hold, not even escaped; a description may quote any text.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(path: Path, record: ParityRecord, tolerance: Tolerance) -> None:
    """Write one test suite a case, one test a tensor and a site, failures with their reason."""
    write_atomic(path, junit_xml(record, tolerance))


def junit_xml(record: ParityRecord, tolerance: Tolerance) -> bytes:
    """What :func:`write_junit` writes. It has failures exactly where ``judge_parity`` fails."""
    root = ElementTree.Element("testsuites", name=_clean(f"parity of {record.backend}"))
    for case in record.cases:
        name = f"{case.component}: {case.description}"
        _add_suite(root, name, record.backend, _tests(case, tolerance))
    if not record.cases:  # a document without tests would count as a success
        nothing = [("cases", ["no prompt was run, so nothing is proven"])]
        _add_suite(root, "parity", record.backend, nothing)
    for count in ("tests", "failures", "errors"):
        root.set(count, str(sum(int(suite.get(count)) for suite in root)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _tests(case: ParityCase, tolerance: Tolerance) -> Iterator[tuple[str, list[str]]]:
    """What is tested in one case, and what speaks against it."""
    for name, problem in case.problems.items():
        yield name, [f"{name} {problem}"]
    for name in missing_tensors(case):
        yield name, [f"{name} was not compared"]
    for comparison in case.tensors:
        wrong = judge_tensor(comparison, tolerance)
        yield comparison.name, [wrong] if wrong else []
    flips = unexplained(case)
    for site in case.sites:
        here = [judge_flip(flip) for flip in flips if flip.site == site.site]
        yield f"choices of site {site.site}", here


def _add_suite(
    root: ElementTree.Element, name: str, backend: str, tests: Iterable[tuple[str, list[str]]]
) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=_clean(name))
    total = failed = 0
    for test, failures in tests:
        attributes = {"classname": _clean(f"{backend}.{name}"), "name": _clean(test)}
        node = ElementTree.SubElement(suite, "testcase", attributes)
        for failure in failures:
            ElementTree.SubElement(node, "failure", message=_clean(failure))
        total, failed = total + 1, failed + bool(failures)
    for count, number in (("tests", total), ("failures", failed), ("errors", 0)):
        suite.set(count, str(number))


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
