"""`python -m bench.report DIR`: writes DIR/report.html anew from DIR/results.json."""

import sys

from bench.report.page import main

sys.exit(main(sys.argv[1:]))
