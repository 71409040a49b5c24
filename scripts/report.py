"""Build report.md and report.html from what the stages have saved.

python -m scripts.report
"""

from dataclasses import dataclass

from nanochat.common import print0, run_cli
from nanochat.report import write_report


@dataclass(frozen=True)
class ReportConfig:
    "The report needs no options."


def main(config: ReportConfig) -> None:
    markdown, page = write_report()
    print0(markdown.read_text(encoding="utf-8").partition("\n## Samples")[0])
    print0(f"report: {markdown}\n        {page}")


if __name__ == "__main__":
    run_cli(main, ReportConfig, "report")
