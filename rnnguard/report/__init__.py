"""What was found and done, to read: terminal, notebook, HTML, JSON, figure."""

from rnnguard.report.report import Report as Report
