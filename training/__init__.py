"""The training recipe of the shipped checkpoint "tiny"; README.md beside this file has the commands."""
