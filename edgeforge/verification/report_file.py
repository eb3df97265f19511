"""The name and the schema version of a report's file."""

REPORT = "report.json"
REPORT_VERSION = 3
