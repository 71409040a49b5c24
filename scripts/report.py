"""Build report.md and report.html from the results that the stages saved.

python -m scripts.report
"""

from nanochat.common import run_cli
from nanochat.report import ReportConfig, show_report

if __name__ == "__main__":
    run_cli(show_report, ReportConfig, "report")
