"""`python -m dfl_lora VERB`."""

from dfl_lora.cli import console_entry

if __name__ == "__main__":
    console_entry()
