"""What several tools need of runs, and the framework itself does not.

`arguments` reads the options of a command, `output` has the forms of what tools write, and `start` what is refused
before torch is imported. All else reads finished runs: their configurations (`read`), rows, and models, which are found
by name, loaded to answer, or exported. A tool imports this room, which imports no tool.
"""
