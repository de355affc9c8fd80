"""What several tools need of runs, and the framework itself does not.

`words` has the options of a command, and `start` what is refused before torch is imported; all else reads finished
runs: their configurations (`read`), rows, and models, which are found by name, loaded to answer, or exported. A tool
imports this room, which imports no tool.
"""
