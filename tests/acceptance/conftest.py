# The script's own modules, which import each other by the folder that it runs from.
collect_ignore = ["exclusions.py", "peft_suite.py", "rows.py", "steering.py", "verdict.py"]
