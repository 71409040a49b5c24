"""Write report.md and report.html from what the stages have saved.

python -m scripts.report
"""

from nanochat.common import run_cli
from nanochat.report import ReportConfig, show_report

if __name__ == "__main__":
    run_cli(show_report, ReportConfig, "report")
