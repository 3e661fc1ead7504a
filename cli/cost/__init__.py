"""`imagen cost`: what a day's requests cost a month.

`inputs.py` reads the three files, `bill.py` does the arithmetic, `command.py` shows it.
"""

from cli.cost.command import cost

__all__ = ["cost"]
