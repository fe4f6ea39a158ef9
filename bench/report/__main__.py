"""`python -m bench.report DIR`: writes DIR/report.html anew from DIR/results.json."""

import argparse
import sys
from pathlib import Path

from bench.report.page import write_report
from dopsd_fast.errors import UserError

parser = argparse.ArgumentParser(prog="python -m bench.report", description="Writes report.html of a folder of results.")
parser.add_argument("folder", type=Path, help="with results.json, as bench/run.py --out writes it")
try:
    print(f"written: {write_report(parser.parse_args().folder)}")
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
