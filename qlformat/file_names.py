"""Names of the files that describe a model to people."""

CARD = "README.md"
CARD_PICTURE = "quantization-error.png"
MERGE_REPORT = "merge_report.json"
MERGE_PICTURE = "merge_report.svg"
