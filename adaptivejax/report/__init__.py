# SPDX-License-Identifier: Apache-2.0
"""Reports: plain data in, one self-contained page and the same as JSON out."""

from adaptivejax.files import write_atomically
from adaptivejax.report.data import (
  Curve,
  Grid,
  Mixture,
  Point,
  Report,
  Sample,
  Snippet,
)
from adaptivejax.report.environment import environment
from adaptivejax.report.runs import curve, rebuild
from adaptivejax.report.store import load_report, write_report
from adaptivejax.report.table import print_table

__all__ = [
  "Curve",
  "Grid",
  "Mixture",
  "Point",
  "Report",
  "Sample",
  "Snippet",
  "curve",
  "environment",
  "load_report",
  "print_table",
  "rebuild",
  "write_atomically",
  "write_report",
]
