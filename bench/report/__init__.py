"""What becomes of rows: tables on the terminal, plots, report.html, and the comparison of two runs."""
